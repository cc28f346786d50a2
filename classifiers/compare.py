"""Heads side by side on the same held-out images: what each is worth, with an interval, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from store.errors import BadDataError, UsageError

from .bundle import Bundle
from .plots import BLUE, svg
from .report import Section, interval, page, percent
from .tasks import need_single_label

SPLIT_FLAGS = (("val-fraction", "val"), ("test-fraction", "test"), ("seed", "seed"))
COLUMNS = ("bundle", "kind", "accuracy", "95 % interval", "macro F1", "training", "extraction", "images through backbone")


@dataclass(frozen=True)
class Compared:
    """One line of the comparison; times in seconds.

    ``images`` counts passes through the backbone: each image once for cached features, once an epoch when fine-tuning.
    """

    name: str
    kind: str
    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    train_seconds: float
    extract_seconds: float
    images: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """The line as text, in the order of `COLUMNS`."""
        once = f"{self.extract_seconds:.1f} s once" if self.kind == "frozen" else "-"
        figures = (percent(self.accuracy), interval(self.accuracy_interval), f"{self.macro_f1:.3f}")
        return (self.name, self.kind, *figures, f"{self.train_seconds:.1f} s", once, str(self.images))


def compare(bundles: Sequence[Bundle]) -> list[Compared]:
    """Line up bundles by accuracy, the best first.

    Raises:
        UsageError: fewer than two, or one of them twice.
        BadDataError: they were not evaluated on the same images with the same labels.
    """
    places = [bundle.path.resolve() for bundle in bundles]
    twice = next((bundle.path for bundle, place in zip(bundles, places, strict=True) if places.count(place) > 1), None)
    if twice is not None or len(bundles) < 2:
        message = f"{twice} is given twice" if twice else f"there is one bundle, {bundles[0].path}, and nothing beside it"
        message += "; name two or more different ones, such as those of `penult train` and `penult finetune`"
        raise UsageError(message)
    for bundle in bundles:
        need_single_label(bundle.task, f"penult compare ({bundle.name})")
    held_out = [bundle.predictions() for bundle in bundles]
    first = held_out[0]
    for bundle, predictions in zip(bundles[1:], held_out[1:], strict=True):
        if predictions.ids != first.ids:
            shared = len(set(predictions.sha256) & set(first.sha256))
            message = (
                f"{bundles[0].name} was evaluated on {len(first.sha256)} images ({first.split}) and {bundle.name} on "
                f"{len(predictions.sha256)} ({predictions.split}), {shared} of them the same: there is nothing to compare. "
                f"{_remedy(bundles[0], bundle)}"
            )
            raise BadDataError(message)
    lines = []
    for bundle in bundles:
        metrics = bundle.metrics or {}
        lines.append(
            Compared(
                name=bundle.name,
                kind=bundle.kind,
                n=metrics["n"],
                accuracy=metrics["accuracy"],
                accuracy_interval=tuple(metrics["accuracy_interval"]),
                macro_f1=metrics["macro_f1"],
                train_seconds=bundle.cost["train_seconds"],
                extract_seconds=bundle.cost["extract_seconds"],
                images=bundle.cost["images"],
            )
        )
    return sorted(lines, key=lambda line: (-line.accuracy, line.train_seconds))


def _remedy(*bundles: Bundle) -> str:
    own = [bundle for bundle in bundles if bundle.split.get("override")]
    if not own:
        return "Train both from the same cache"
    flags = " ".join(f"--{name} {own[0].split[key]}" for name, key in SPLIT_FLAGS)
    return (
        f"{' and '.join(bundle.name for bundle in own)} was trained with --val-fraction or --test-fraction, on a split of its "
        f"own that no other command takes over. Train it again without them; or, to have that split everywhere, run the same "
        f"`penult extract` with {flags} (nothing is computed again) and train both from the cache"
    )


def comparison_report(lines: Sequence[Compared], *, notes: Sequence[str] = (), title: str = "Comparison") -> str:
    """The comparison as a page."""

    def draw(axes: Any) -> None:
        places = range(len(lines))[::-1]
        accuracies = [100 * line.accuracy for line in lines]
        below = [100 * (line.accuracy - line.accuracy_interval[0]) for line in lines]
        above = [100 * (line.accuracy_interval[1] - line.accuracy) for line in lines]
        axes.errorbar(accuracies, list(places), xerr=[below, above], fmt="o", color=BLUE, capsize=4)
        axes.set_yticks(list(places), [line.name for line in lines])
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.set_xlabel("accuracy, % (95 % interval)")

    lead = f"{len(lines)} heads on the same {lines[0].n} held-out images"
    sections = [
        Section("Accuracy", plot=svg(draw, (6.4, 1.0 + 0.45 * len(lines)))),
        Section("Table", columns=COLUMNS, rows=[line.cells() for line in lines]),
    ]
    return page(title, lead, sections, notes=notes)
