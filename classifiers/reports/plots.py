"""Plots as inline SVG for pages, or as files: drawn by matplotlib without a display, equal bytes for equal numbers."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.intervals import modified_wilson
from classifiers.evaluation.scores import confidence_bins
from classifiers.heads.registry import Search
from store.errors import UsageError
from store.format.output import require_free, write_output

if TYPE_CHECKING:
    from .feature_map import FeatureMap

PLOT_FORMATS = ("png", "svg", "pdf")
BLUE = "#2b6cb0"
ORANGE = "#c05621"
GREEN = "#2f855a"
GREY = "#c9d1dc"
INK = "#1d2430"
COLOURS = ("#2b6cb0", "#dd8a1d", "#2f855a", "#b83280", "#6b46c1", "#0f9bb3", "#a0522d", "#7a8599", "#b7a313", "#e05252")
WIDTH = 4.6  # inches: two plots stand side by side on a wide screen, and the text of one can be read on a telephone
MANY_CLASSES = 40  # more do not fit a readable matrix; those with the most errors are shown
MANY_BARS = 24
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NUMBERED = 25  # a matrix of more classes has no room for counts


def plain_log(axes: Any, values: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic for these values, with as many plain numbers below it as there is room for."""
    from matplotlib.ticker import LogLocator, NullLocator

    least, most = min(values) / 1.25, max(values) * 1.25
    decades = math.log10(most / least)
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def powers_of_ten(power: float) -> str:
    """A power of ten as text; matplotlib's own formatter sets it as mathematics, a quarter of the time of a page.

    >>> powers_of_ten(0.001), powers_of_ten(1e6)
    ('10⁻³', '10⁶')
    """
    return "10" + str(round(math.log10(power))).translate(SUPERSCRIPTS)


def history_svg(history: Sequence[dict[str, Any]], chosen: dict[str, Any], search: Search | None = None) -> str:
    """The loss by the searched setting, with the accuracy if it is known; or the losses by epoch.

    Args:
        history: as in `Bundle`; not empty.
        chosen: the hyperparameters.
        search: the search that the history records; None if it records epochs.
    """

    def draw(axes: Any) -> None:
        if search:
            key, loss = search.setting, search.loss
            line = [p for p in history if p.get("tau") == chosen.get("tau")]  # knn has one for each tau
            axes.semilogx([p[key] for p in line], [p[loss] for p in line], "o-", color=BLUE, ms=4)
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda power, _: powers_of_ten(power))
            for value in chosen[key] if isinstance(chosen[key], list) else [chosen[key]]:  # one for each label
                axes.axvline(value, color=ORANGE, ls="--", lw=1)
            axes.set_xlabel(search.label)
            axes.set_ylabel(loss.replace("_", "-" if loss == "log_loss" else " "), color=BLUE)
            if "accuracy" in line[0]:
                right = axes.twinx()
                right.plot([p[key] for p in line], [p["accuracy"] for p in line], "s:", color=GREEN, ms=2.5, lw=1)
                right.yaxis.set_major_formatter("{x:.1%}")
                right.set_ylabel("accuracy", color=GREEN)
                right.spines["top"].set_visible(False)
            return
        epochs = [p["epoch"] for p in history]
        for key, colour in (("train_loss", BLUE), ("val_loss", ORANGE)):
            axes.plot(epochs, [p[key] for p in history], "o-", color=colour, ms=3, label=key.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)

    return svg(draw, (WIDTH, 3.2))


def few_shot_svg(curve: Sequence[dict[str, Any]], axis: str = "training images of each class") -> str:
    """Accuracy by training images: every draw, the mean and its interval; ``axis`` says what is counted."""

    def draw(axes: Any) -> None:
        shots = [point["shots"] for point in curve]
        means = np.array([point["accuracy"] for point in curve])
        low, high = np.array([point["accuracy_interval"] for point in curve]).T
        for n, point in zip(shots, curve, strict=True):
            axes.plot([n] * len(point["accuracies"]), point["accuracies"], "o", color=GREY, ms=3)
        axes.errorbar(shots, means, yerr=[means - low, high - means], fmt="o-", color=BLUE, ms=4, capsize=3)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(shots, [str(n) for n in shots])
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy")

    return svg(draw, (WIDTH, 3.2))


def recall_svg(metrics: dict[str, Any]) -> str:
    """Recall of each class with its interval; if there are too many classes, the worst ones."""
    entries = [entry for entry in metrics["per_class"] if entry["n"]]
    title = ""
    if len(entries) > MANY_BARS:
        entries = sorted(entries, key=lambda entry: entry["recall"])[:MANY_BARS]
        title = f"the {MANY_BARS} classes of least recall"

    def draw(axes: Any) -> None:
        places = np.arange(len(entries))[::-1]
        recall = np.array([entry["recall"] for entry in entries])
        low, high = np.array([entry["recall_interval"] for entry in entries]).T
        spread = [np.maximum(recall - low, 0), np.maximum(high - recall, 0)]
        axes.barh(places, recall, 0.62, color=BLUE)
        axes.errorbar(recall, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        axes.set_yticks(places, [f"{shorten(entry['label'])} ({entry['n']})" for entry in entries])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, len(entries) - 0.3)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("recall, with its 95 % interval")
        if title:
            axes.set_title(title, fontsize=9)

    return svg(draw, (WIDTH, 0.9 + 0.24 * max(len(entries), 3)))


def reliability_svg(
    truth: NDArray[np.intp], probabilities: NDArray[np.floating[Any]], before: NDArray[np.floating[Any]] | None
) -> str:
    """Accuracy by confidence, in the bins of the ECE; ``before`` is probabilities without temperature scaling."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], ls="--", lw=1, color="#8a94a6")
        label = "as predicted" if before is None else "after scaling"
        confidence, accuracy, low, high, share = _calibration(truth, probabilities)
        axes.bar(confidence, share, 0.03, color=GREY, label="share of images")
        if before is not None:
            axes.plot(*_calibration(truth, before)[:2], "o", mfc="none", color=ORANGE, ms=5, label="before scaling")
        spread = [np.maximum(accuracy - low, 0), np.maximum(high - accuracy, 0)]
        axes.errorbar(confidence, accuracy, yerr=spread, fmt="o", color=BLUE, ms=4, elinewidth=0.9, label=label)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.4, columnspacing=1.2)

    return svg(draw, (WIDTH, 3.9))


def _calibration(truth: NDArray[np.intp], probabilities: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], ...]:
    """Of each bin that is not empty: mean confidence, accuracy, its Wilson interval, share of the images."""
    confidence, bins = confidence_bins(probabilities)
    right = probabilities.argmax(axis=1) == truth
    rows = []
    for each in np.unique(bins):
        here = bins == each
        bounds = modified_wilson(int(right[here].sum()), int(here.sum()))
        rows.append((confidence[here].mean(), right[here].mean(), *bounds, here.mean()))
    return tuple(np.array(rows).T)


def map_svg(layout: FeatureMap, truth: NDArray[np.intp], guess: NDArray[np.intp], classes: Sequence[str]) -> str:
    """Images as points, coloured by true class; a ring around the misclassified ones."""
    truth, guess, points = truth[layout.rows], guess[layout.rows], layout.points
    present = np.unique(truth)
    few = len(present) <= len(COLOURS)

    def draw(axes: Any) -> None:
        from matplotlib import colormaps

        place = np.searchsorted(present, truth)
        hues = np.array(COLOURS) if few else colormaps["hsv"](np.arange(len(present)) / len(present))
        dots = {"s": 14, "alpha": 0.75, "linewidths": 0}
        if few:  # each has a line in the legend
            for i, c in enumerate(present):
                axes.scatter(*points[place == i].T, color=hues[i], label=shorten(classes[c]), **dots)
        else:
            axes.scatter(*points.T, c=hues[place], **dots)
        wrong = points[truth != guess]
        axes.scatter(*wrong.T, s=34, facecolors="none", edgecolors=INK, linewidths=0.9, label="misclassified")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if few:
            columns = 4 if max(len(classes[c]) for c in present) < 8 else 2
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, handletextpad=0.1)
        elif len(present) <= MANY_CLASSES:
            for c in present:
                x, y = np.median(points[truth == c], axis=0)
                box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
                axes.text(x, y, shorten(classes[c]), ha="center", va="center", fontsize=8, bbox=box)

    return svg(draw, (WIDTH, 4.0 + 0.12 * (len(present) + 2)) if few else (9.4, 6.2))


def draw_confusion(axes: Any, metrics: dict[str, Any]) -> None:
    """A confusion matrix on matplotlib axes: row-normalised colour, counts as numbers."""
    matrix, classes = np.array(metrics["confusion"]), [shorten(label) for label in metrics["classes"]]
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
    if len(classes) <= NUMBERED:
        for i in ticks:
            for j in ticks:
                if matrix[i, j]:
                    axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.5 else "#333")


def shorten(label: str) -> str:
    """A label as matplotlib can draw it: not too long, and no formula."""
    text = label if len(label) <= 18 else label[:17] + "…"
    return ("\N{ZERO WIDTH SPACE}" if text.startswith("_") else "") + text.replace("$", r"\$")  # a legend omits _names


def confusion_size(metrics: dict[str, Any]) -> tuple[float, float]:
    """Width and height, inches."""
    side = min(2.6 + 0.34 * min(len(metrics["classes"]), MANY_CLASSES), 11.0)
    return side + 0.8, side


def confusion_svg(metrics: dict[str, Any]) -> str:
    """The confusion matrix as inline SVG."""
    return svg(lambda axes: draw_confusion(axes, metrics), confusion_size(metrics))


def svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """What ``draw`` draws on axes, as an element for a page; ``size`` in inches."""
    text = render(draw, size, "svg").decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def render(draw: Callable[[Any], None], size: tuple[float, float], kind: str) -> bytes:
    """What ``draw`` draws on axes, as a file of one of `PLOT_FORMATS`; ``size`` in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no global state, no display. A fixed salt makes equal plots equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "penult", "svg.fonttype": "none", "font.size": 9}), warnings.catch_warnings():
        # An SVG keeps its text as text: the reader's fonts have the letters that are missing here, only sizes are estimated.
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


log = logging.getLogger("penult.classifiers")


def require_plot(path: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a plot can be written to a path.

    Raises:
        UsageError: its name does not end in one of `PLOT_FORMATS`.
        OutputError: see `output.require_free`.
    """
    if path.suffix.lower().lstrip(".") not in PLOT_FORMATS:
        message = f"{path}: a plot is written as {', '.join('.' + name for name in PLOT_FORMATS)}"
        raise UsageError(message)
    require_free(path, overwrite=overwrite)


def save_confusion(metrics: dict[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write the confusion matrix as PNG, SVG or PDF, by the suffix of the file name.

    Raises:
        UsageError, OutputError: see `require_plot`.
    """
    require_plot(path, overwrite=overwrite)
    kind = path.suffix.lower().lstrip(".")
    if kind != "svg":  # the reader's fonts draw the text of an SVG
        names = [label if _drawable(label) else f"class {i + 1}" for i, label in enumerate(metrics["classes"])]
        if names != metrics["classes"]:
            log.warning("%s: its font lacks letters of some labels; these are numbered as in the per-class table", path)
        metrics = {**metrics, "classes": names}
    write_output(
        path,
        render(lambda axes: draw_confusion(axes, metrics), confusion_size(metrics), kind),
        overwrite=overwrite,
    )


def _drawable(label: str) -> bool:
    """Whether matplotlib's font has every letter; missing ones would be drawn as empty boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters = get_font(findfont(FontProperties())).get_charmap()
    return all(ord(letter) in letters for letter in label)
