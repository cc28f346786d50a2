"""Plots and HTML: self-contained pages that load nothing, and a confusion matrix as a file of its own."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store import hdf5
from store.errors import OutputExistsError, UsageError
from store.fingerprint import short
from store.samples import MULTI_LABEL, SINGLE_LABEL

from .tasks import output_table, task_of_bundle, whole_rows

if TYPE_CHECKING:
    from .bundle import Bundle

log = logging.getLogger("penult.classifiers")

PLOT_FORMATS = ("png", "svg", "pdf")
BLUE = "#2b6cb0"
ORANGE = "#c05621"
SEARCHES = (  # what a history is a search of: the setting, what to call it, what is least at the best one
    ("C", "C (inverse regularisation)", "log_loss"),
    ("alpha", "lambda (regularisation)", "squared_error"),
    ("k", "k (neighbours)", "log_loss"),
)
MANY_CLASSES = 40  # more do not fit a matrix that can be read; the most confused ones are shown


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading with text, a plot, or a table; a table without ``columns`` is a list of facts."""

    heading: str
    text: str = ""
    plot: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    figures: Sequence[tuple[str, str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Render a page; everything but the plots is escaped."""
    return str(
        _template().render(title=title, lead=lead, figures=figures, notes=notes, sections=sections, version=version("penult"))
    )


@cache
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files(__package__) / "report.html.j2").read_text("utf-8"))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(bounds: Sequence[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def bundle_report(bundle: Bundle) -> str:
    """The page that lies in every bundle."""
    metrics = bundle.metrics
    split = bundle.split
    task = task_of_bundle(bundle)
    lead = f"{bundle.head} head on {bundle.backbone.name} ({bundle.backbone.weights}), {len(bundle.classes)} {task.plural}"
    figures: list[tuple[str, str, str]] = []
    sections: list[Section] = []
    notes: list[str] = []
    if metrics is None:
        notes.append("Nothing was held out, so this page cannot say how good the head is.")
    elif bundle.task != SINGLE_LABEL:
        figures = [
            (what.partition(":")[0], value, "" if bounds == "-" else f"95 % interval {bounds}")
            for what, value, bounds in whole_rows(metrics)
        ]
        figures.append(("held-out images", str(metrics["n"]), f"split {metrics['split']!r}"))
        notes += metrics["notes"]
        columns, lines = output_table(metrics)
        sections.append(Section(f"The {task.plural}", columns=columns, rows=lines))
    else:
        detail = f"95 % interval {interval(metrics['accuracy_interval'])}"
        figures = [
            ("accuracy", percent(metrics["accuracy"]), detail),
            ("macro F1", f"{metrics['macro_f1']:.3f}", "mean over the classes"),
            ("held-out images", str(metrics["n"]), f"split {metrics['split']!r}, {metrics['n'] - metrics['correct']} errors"),
        ]
        notes += metrics["notes"]
        sections += [
            Section("Confusion matrix", plot=confusion_svg(metrics)),
            Section("Per class", columns=CLASS_COLUMNS, rows=class_rows(metrics)),
        ]
    cost = bundle.cost
    figures.append(("images through the backbone", f"{cost['images']}", f"training took {cost['train_seconds']:.1f} s"))
    if bundle.history and bundle.head != "centroid":  # which has nothing to choose
        sections.append(Section("Training", text=_history_text(bundle), plot=history_svg(bundle)))
    if bundle.few_shot:
        from . import fewshot

        text = "Accuracy on the held-out images by training images of each class; the interval is that of the mean over draws."
        rows = [fewshot.cells(point) for point in bundle.few_shot]
        sections.append(Section("With few images", text=text, columns=fewshot.COLUMNS, rows=rows))
    sections += [
        Section("Split", rows=[(key.replace("_", " "), str(value)) for key, value in split.items()]),
        Section("Settings", rows=[(key, json.dumps(value)) for key, value in bundle.hyperparameters.items()]),
        Section("Fingerprint", rows=[(key, short(value)) for key, value in bundle.fingerprint.leaves().items()]),
    ]
    return page(bundle.name, lead, sections, figures=figures, notes=notes)


CLASS_COLUMNS = ("class", "images", "precision", "recall", "95 % interval", "F1")


def class_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the per-class table, as text."""
    return [
        (
            entry["label"],
            str(entry["n"]),
            f"{entry['precision']:.3f}",
            f"{entry['recall']:.3f}",
            interval(entry["recall_interval"]),
            f"{entry['f1']:.3f}",
        )
        for entry in metrics["per_class"]
    ]


def _history_text(bundle: Bundle) -> str:
    if bundle.task == MULTI_LABEL and bundle.head == "logistic":
        return "Log-loss out of fold or on validation for each value of C, mean over the labels; each label has its own best C."
    if bundle.head == "logistic":
        return f"Log-loss out of fold or on validation for each value of C; C = {bundle.hyperparameters['C']:.4g} was chosen."
    if bundle.head == "ridge":
        alpha = bundle.hyperparameters["alpha"]
        return f"Squared error out of fold or on validation for each value of lambda; {alpha:.4g} was chosen."
    if bundle.head == "knn":
        k, tau = (bundle.hyperparameters[name] for name in ("k", "tau"))
        return f"Log-loss out of fold or on validation by number of neighbours; k = {k}, tau = {tau:.4g} was chosen."
    return "Loss on training and validation images by epoch."


def history_svg(bundle: Bundle) -> str:
    """The regularisation path, or the losses by epoch."""

    def draw(axes: Any) -> None:
        history = bundle.history
        for key, meaning, loss in SEARCHES:
            if key in history[0]:
                chosen = bundle.hyperparameters
                line = [p for p in history if p.get("tau") == chosen.get("tau")]  # of knn's lines, the one of the chosen tau
                axes.semilogx([p[key] for p in line], [p[loss] for p in line], "o-", color=BLUE, ms=4)
                for value in chosen[key] if isinstance(chosen[key], list) else [chosen[key]]:  # one for each label
                    axes.axvline(value, color=ORANGE, ls="--", lw=1)
                axes.set_xlabel(meaning)
                axes.set_ylabel(loss.replace("_", "-" if loss == "log_loss" else " "))
                return
        epochs = [p["epoch"] for p in history]
        for key, colour in (("train_loss", BLUE), ("val_loss", ORANGE)):
            axes.plot(epochs, [p[key] for p in history], "o-", color=colour, ms=3, label=key.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)

    return svg(draw, (6.4, 3.0))


def draw_confusion(axes: Any, metrics: dict[str, Any]) -> None:
    """A confusion matrix on matplotlib axes: row-normalised colour, counts as numbers."""
    import numpy as np

    matrix, classes = np.array(metrics["confusion"]), [_shorten(label) for label in metrics["classes"]]
    if len(classes) > MANY_CLASSES:
        errors = matrix.sum(axis=1) - np.diag(matrix) + matrix.sum(axis=0) - np.diag(matrix)
        chosen = np.sort(np.argsort(-errors, kind="stable")[:MANY_CLASSES])
        matrix, classes = matrix[np.ix_(chosen, chosen)], [classes[i] for i in chosen]
        axes.set_title(f"the {MANY_CLASSES} classes with the most errors", fontsize=9)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= 25:
        for i in ticks:
            for j in ticks:
                if matrix[i, j]:
                    axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.5 else "#333")


def _shorten(label: str) -> str:
    text = label if len(label) <= 18 else label[:17] + "…"
    return text.replace("$", r"\$")


def _confusion_size(metrics: dict[str, Any]) -> tuple[float, float]:
    side = min(2.6 + 0.34 * min(len(metrics["classes"]), MANY_CLASSES), 11.0)
    return side + 0.8, side


def confusion_svg(metrics: dict[str, Any]) -> str:
    """The confusion matrix as inline SVG."""
    return svg(lambda axes: draw_confusion(axes, metrics), _confusion_size(metrics))


def save_confusion(metrics: dict[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """The confusion matrix as a file: PNG, SVG or PDF by the name's ending.

    Raises:
        UsageError: another ending.
        OutputExistsError: the file exists.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in PLOT_FORMATS:
        message = f"{path}: a plot is written as {', '.join('.' + name for name in PLOT_FORMATS)}"
        raise UsageError(message)
    if kind != "svg":  # there the reader's fonts draw the text
        names = [label if _drawable(label) else f"class {i + 1}" for i, label in enumerate(metrics["classes"])]
        if names != metrics["classes"]:
            log.warning("%s: its font lacks letters of some labels, which are numbered as in the per-class table", path)
        metrics = {**metrics, "classes": names}
    write_output(path, _figure(lambda axes: draw_confusion(axes, metrics), _confusion_size(metrics), kind), overwrite=overwrite)


def _drawable(label: str) -> bool:
    """Whether matplotlib's font has every letter; others would be drawn as empty boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters = get_font(findfont(FontProperties())).get_charmap()
    return all(ord(letter) in letters for letter in label)


def write_output(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write one output file whole.

    Raises:
        OutputExistsError: it exists and may not be replaced.
        StorageError: it cannot be written.
    """
    if path.exists() and not overwrite:
        message = f"{path} exists; choose another name or pass --overwrite"
        raise OutputExistsError(message)
    hdf5.commit(path, data)


def svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    text = _figure(draw, size, "svg").decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _figure(draw: Callable[[Any], None], size: tuple[float, float], kind: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no global state, no display. A fixed salt makes equal plots equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "penult", "svg.fonttype": "none", "font.size": 9}), warnings.catch_warnings():
        # An SVG keeps its text as text: who looks at it has the letters that are missing here, where only sizes are guessed.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from|Matplotlib currently does not support")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
