"""Comparison of bundles on the same held-out images: accuracy with paired intervals, costs, and whether a cost pays off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.predictions import Predictions
from classifiers.evaluation.intervals import bounds, percent, signed
from classifiers.evaluation.paired_tests import Change, paired
from classifiers.evaluation.task import images_of, need_single_label
from classifiers.evaluation.units import Units
from classifiers.training.cost import fitted_share, needed
from store.cache import FeatureCache
from store.errors import BadDataError, UsageError
from store.faces import html_table
from store.progress.stages import staged
from store.splits import merge_groups

from .label_curve import LabelCurve, label_curve
from .verdict import Verdict, judge

SPLIT_FLAGS = (("val-fraction", "val"), ("test-fraction", "test"), ("seed", "seed"))
WORTHWHILE = 1.0  # percentage points
FINE_TUNED = "fine-tuned"


@dataclass(frozen=True)
class Entrant:
    """A head with its predictions, as it enters a comparison.

    Attributes:
        name, kind, classes, cost, history, split: as in `Bundle`.
        predictions: on the held-out images.
        share: of its extraction that it needed, see `cost.fitted_share`.
        caveats: what is uneven about it, by kind, as it is said if it is not so of all; see `CAVEATS`.
    """

    name: str
    kind: str
    predictions: Predictions
    classes: Sequence[str]
    cost: Mapping[str, Any]
    history: Sequence[dict[str, Any]] = ()
    split: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    caveats: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Bundle) -> Entrant:
        """The entrant of a bundle.

        Raises:
            UsageError: it is for another task.
            BadDataError: nothing was held out.
        """
        need_single_label(bundle.task, f"penult compare ({bundle.name})")
        facts = (bundle.classes, bundle.cost, bundle.history, bundle.split)
        return cls(bundle.name, bundle.kind, bundle.predictions(), *facts, fitted_share(bundle), _caveats(bundle))

    @property
    def needed(self) -> dict[str, Any]:
        """The part of the cost that is compared, see `cost.needed`."""
        return needed(self.cost, self.share)

    @property
    def seconds(self) -> float:
        """Wall time of extraction and training, as far as this head needed them."""
        return float(self.needed["train_seconds"] + self.needed["extract_seconds"])


CAVEATS = {
    "fitted": "{names}: fitted on fewer images than the others, without those that chose the epoch ({what}). `penult finetune` "
    "without --no-refit fits these too",
    "temperature": "{names}: without a temperature, so log-loss, Brier score and ECE cannot be compared with those of the "
    "others, which are {what}",
    "start": "{names}: started from {what}; what that head took is not known here, and is not in the cost",
}


def _caveats(bundle: Bundle) -> dict[str, str]:
    chosen, caveats = bundle.hyperparameters, {}
    if bundle.kind == FINE_TUNED and not chosen.get("refit"):
        caveats["fitted"] = str(bundle.split.get("chosen_on"))
    averaged = bool((chosen.get("views") or {}).get("averaged"))  # each of its outputs is calibrated
    if (chosen.get("temperature") is None and not averaged) or chosen.get("chosen_by", "") is None:
        caveats["temperature"] = "calibrated"
    if chosen.get("init_head") and "init_head" not in bundle.cost:
        caveats["start"] = str(chosen["init_head"])
    return caveats


def _notes(entrants: Sequence[Entrant]) -> list[str]:
    """What is not the same for all of them, in words."""
    notes = []
    for kind, text in CAVEATS.items():
        concerned = [entrant for entrant in entrants if kind in entrant.caveats]
        if concerned and len(concerned) < len(entrants):
            whats = dict.fromkeys(entrant.caveats[kind] for entrant in concerned)
            notes.append(text.format(names=", ".join(each.name for each in concerned), what=", ".join(whats)))
    return notes


@dataclass(frozen=True)
class Compared:
    """One head of a comparison.

    Attributes:
        name, kind: those of the bundle.
        accuracy, accuracy_interval: accuracy, and its 95 % Wilson interval.
        scores: by name, see docs/metrics.md; among them ``f1_macro``, ``log_loss``, ``brier`` and ``ece``.
        seconds: wall time of extraction and training, as far as it needed them.
        needed: the cost that is compared, see `cost.needed`. ``images`` counts passes through the backbone: each image once for
            cached features, once an epoch when fine-tuning.
        cost: as in `Bundle`, with the extraction of everything.
        change, verdict: against the baseline; None for the baseline itself.
        history: as in `Bundle`.
        probabilities: ``(n, k)``, in the order of the comparison's classes; not in JSON.
    """

    name: str
    kind: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    scores: dict[str, float]
    seconds: float
    needed: dict[str, Any]
    cost: dict[str, Any]
    change: Change | None
    verdict: Verdict | None
    history: list[dict[str, Any]]
    probabilities: NDArray[np.floating[Any]]

    @property
    def difference(self) -> str:
        """Difference of accuracy from the baseline, as text; empty for the baseline itself."""
        if self.change is None:
            return ""
        score = self.change.scores["accuracy"]
        return f" ({signed(score['value'])} points {bounds(score['interval'])})"


@dataclass(frozen=True, repr=False)
class Comparison:
    """Several heads on the same images.

    Attributes:
        baseline: the name of the head that the others are compared with.
        split, n, groups: the split they were measured on, its number of images, and of groups if they are not independent.
        classes: all classes of the heads and images.
        worthwhile: the smallest difference of accuracy that matters, as a share.
        resamples: of the bootstrap.
        lines: the baseline first, then the others, best first.
        notes: what is not the same for all of them.
        curve: accuracy by number of labelled images; None without one.
        truth: class index of each image ``(n,)``; not in JSON.
    """

    baseline: str
    split: str
    n: int
    groups: int | None
    classes: list[str]
    worthwhile: float
    resamples: int
    lines: list[Compared]
    truth: NDArray[np.intp]
    notes: list[str] = field(default_factory=list)
    curve: LabelCurve | None = None

    def __repr__(self) -> str:
        shown = ", ".join(f"{line.name} {100 * line.accuracy:.1f} %{line.difference}" for line in self.lines)
        return f"<Comparison on {images_of(vars(self))} of {self.split!r}: {shown}>"

    def _repr_html_(self) -> str:
        rows = [
            (line.name, line.kind, percent(line.accuracy), line.difference.strip(" ()") or "baseline") for line in self.lines
        ]
        title = f"accuracy on {images_of(vars(self))} of {self.split!r}; differences with paired 95 % intervals"
        return html_table(title, rows, ("bundle", "kind", "accuracy", "difference"))

    def to_json(self) -> dict[str, Any]:
        """As read back from a JSON file: lists, no tuples."""
        lines = [asdict(replace(line, probabilities=np.empty(0))) for line in self.lines]
        for line in lines:
            del line["probabilities"], line["history"]
        facts = {key: value for key, value in vars(self).items() if key not in ("truth", "lines", "curve")}
        curve = self.curve and self.curve.to_json()
        return dict(json.loads(json.dumps({**facts, "bundles": lines, "curve": curve})))


@staged("comparing the bundles")
def compare(
    bundles: Sequence[str | Path | Bundle],
    *,
    against: str | None = None,
    worthwhile: float = WORTHWHILE,
    curve: FeatureCache | None = None,
) -> Comparison:
    """Compare bundles with one of them, on the same held-out images.

    Args:
        bundles: two or more, loaded or not.
        against: name or path of the baseline; by default the first frozen one, or the first one (not chosen by its score).
        worthwhile: the smallest difference of accuracy that matters, percentage points.
        curve: the cache that a frozen bundle was trained from (the baseline, or the first one); its head is refitted on shares
            of the training images, see `label_curve`.

    Raises:
        UsageError: fewer than two, one of them twice, one for another task, or a baseline that is none of them.
        BadDataError: they were not evaluated on the same images with the same labels.

    >>> import classifiers
    >>> classifiers.compare(["pets.head", "centroid.head"])
    <Comparison on 6 images of 'test': pets.head 100.0 %, centroid.head 100.0 % (+0.0 points [-39.0, +39.0])>
    """
    opened = [Bundle.opened(bundle) for bundle in bundles]
    places = [bundle.path.resolve() for bundle in opened]
    twice = next((bundle.path for bundle, place in zip(opened, places, strict=True) if places.count(place) > 1), None)
    if twice is not None or len(opened) < 2:
        message = f"{twice} is given twice" if twice else f"there is only one bundle, {opened[0].path}"
        message += "; name two or more different ones, such as those of `penult train` and `penult finetune`"
        raise UsageError(message)
    entrants = [Entrant.of(bundle) for bundle in opened]
    names = [entrant.name for entrant in entrants]
    if len(set(names)) < len(names):
        entrants = [replace(entrant, name=str(bundle.path)) for entrant, bundle in zip(entrants, opened, strict=True)]
    baseline = _baseline(opened, against)
    comparison = compare_entrants(entrants, baseline=baseline, worthwhile=worthwhile)
    if curve is None:
        return comparison
    frozen = next((bundle for bundle in (opened[baseline], *opened) if bundle.kind == "frozen"), None)
    if frozen is None:
        message = (
            "--curve refits a head on cached features, and all of these are fine-tuned; name a bundle of `penult train` too"
        )
        raise UsageError(message)
    return replace(comparison, curve=label_curve(frozen, curve, worthwhile=worthwhile / 100))


def _baseline(bundles: Sequence[Bundle], against: str | None) -> int:
    if against is None:
        return next((i for i, bundle in enumerate(bundles) if bundle.kind == "frozen"), 0)
    matching = [i for i, bundle in enumerate(bundles) if against in (bundle.name, str(bundle.path))]
    if len(matching) != 1:
        known = ", ".join(str(bundle.path) for bundle in bundles)
        message = f"--against {against}: {len(matching)} of the bundles have this name; expected one of {known}"
        raise UsageError(message)
    return matching[0]


def compare_entrants(entrants: Sequence[Entrant], *, baseline: int = 0, worthwhile: float = WORTHWHILE) -> Comparison:
    """Compare heads that need not be saved; ``baseline`` is an index, else as `compare`.

    Raises:
        BadDataError: they were not evaluated on the same images with the same labels.
    """
    _need_same_images(entrants)
    held = [entrant.predictions for entrant in entrants]
    orders = [_order(each) for each in held]
    labels = held[0].labels[orders[0]].tolist()
    classes = list(dict.fromkeys([*entrants[baseline].classes, *(c for e in entrants for c in e.classes), *labels]))
    index = {label: i for i, label in enumerate(classes)}
    truth = np.array([index[label] for label in labels], np.intp)
    outputs = []
    for entrant, order in zip(entrants, orders, strict=True):
        columns = np.zeros((len(truth), len(classes)), np.float32)
        columns[:, [index[label] for label in entrant.classes]] = entrant.predictions.probabilities[order]
        outputs.append(columns)
    groups = [held[0].sha256[i] for i in orders[0]]
    for each, order in zip(held, orders, strict=True):  # bundles from before know none
        groups = merge_groups([each.groups[i] for i in order], groups) if each.groups else groups
    units = Units.of_groups(groups)
    standings, resamples = paired(truth, outputs, classes, baseline, units)
    tuned = [i for i, entrant in enumerate(entrants) if entrant.kind == FINE_TUNED and i != baseline]
    least, others = worthwhile / 100, len(entrants) - 1

    def verdict(change: Change, subject: str, entrant: Entrant) -> Verdict:
        mine, theirs = entrant.seconds, entrants[baseline].seconds
        ratio = mine / theirs if mine and theirs else None
        return judge(change, units, subject=subject, cost_ratio=ratio, worthwhile=least, comparisons=others)

    lines = []
    for i, (entrant, standing) in enumerate(zip(entrants, standings, strict=True)):
        subject = "fine-tuning" if tuned == [i] and entrants[baseline].kind == "frozen" else entrant.name
        lines.append(
            Compared(
                name=entrant.name,
                kind=entrant.kind,
                accuracy=standing.scores["accuracy"],
                accuracy_interval=units.proportion(outputs[i].argmax(axis=1) == truth),
                scores=standing.scores,
                seconds=entrant.seconds,
                needed=entrant.needed,
                cost=dict(entrant.cost),
                change=standing.change,
                verdict=verdict(standing.change, subject, entrant) if standing.change else None,
                history=list(entrant.history),
                probabilities=outputs[i],
            )
        )
    against = lines.pop(baseline)
    return Comparison(
        baseline=against.name,
        split=held[0].split,
        n=len(truth),
        groups=units.groups,
        classes=classes,
        worthwhile=least,
        resamples=resamples,
        lines=[against, *sorted(lines, key=lambda line: (-line.accuracy, line.seconds))],
        truth=truth,
        notes=[*_notes(entrants), *units.compared_notes],
    )


def _order(predictions: Predictions) -> list[int]:
    """Row indices that bring predictions into the same order, whatever order they were saved in."""
    keys = list(zip(predictions.sha256, map(str, predictions.labels.tolist()), strict=True))
    return sorted(range(len(keys)), key=keys.__getitem__)


def _need_same_images(entrants: Sequence[Entrant]) -> None:
    first = entrants[0]
    mine = first.predictions
    for other in entrants[1:]:
        theirs = other.predictions
        if theirs.ids == mine.ids:
            continue
        if sorted(theirs.sha256) == sorted(mine.sha256):
            message = (
                f"{first.name} and {other.name} were evaluated on the same {len(mine.sha256)} images, but some labels "
                f"have changed since: train both again from the current cache"
            )
            raise BadDataError(message)
        shared = len(set(theirs.sha256) & set(mine.sha256))
        message = (
            f"{first.name} was evaluated on {len(mine.sha256)} images ({mine.split}) and {other.name} on "
            f"{len(theirs.sha256)} ({theirs.split}), {shared} of them the same, so they cannot be compared. "
            f"{_remedy(first, other)}"
        )
        raise BadDataError(message)


def _remedy(*entrants: Entrant) -> str:
    own = [entrant for entrant in entrants if entrant.split.get("override")]
    if not own:
        return "Train both from the same cache"
    flags = " ".join(f"--{name} {own[0].split[key]}" for name, key in SPLIT_FLAGS)
    return (
        f"{' and '.join(entrant.name for entrant in own)} was trained with --val-fraction or --test-fraction, on a split of "
        f"its own that no other command uses. Train it again without them; or, to use that split everywhere, run the "
        f"same `penult extract` with {flags} (nothing is computed again) and train both from the cache"
    )
