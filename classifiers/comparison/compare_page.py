"""A comparison of bundles as text for a terminal, and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from classifiers.evaluation.intervals import bounds, interval, percent, points, signed
from classifiers.evaluation.paired_tests import COMPARED
from classifiers.evaluation.task import images_of
from classifiers.reports import plots
from classifiers.reports.page import LONG, Card, Section, page
from extractor.text_table import table

from .compare import FINE_TUNED, Compared, Comparison
from .label_curve import LabelCurve

ACCURACY_COLUMNS = ("bundle", "kind", "accuracy, %", "difference, points", "p", "cost")
CURVE_COLUMNS = ("training images", "accuracy", "95 % interval", "draws")
SCORES = {"f1_macro": "macro F1", "log_loss": "log-loss", "brier": "Brier", "ece": "ECE"}
CARDS = 4  # differences that are shown large
PAIRS = 6  # heads whose reliability is drawn


def accuracy_cells(line: Compared) -> tuple[str, ...]:
    """A row of the accuracy table, in the order of `ACCURACY_COLUMNS`."""
    low, high = line.accuracy_interval
    accuracy = f"{100 * line.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if line.change is None:
        return (line.name, line.kind, accuracy, "baseline", "-", _seconds(line.seconds))
    return (line.name, line.kind, accuracy, _difference(line), _p(line.change.p_adjusted), _seconds(line.seconds))


def _difference(line: Compared) -> str:
    assert line.change is not None
    score = line.change.scores["accuracy"]
    return f"{signed(score['value'])} {bounds(score['interval'])}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _seconds(value: float) -> str:
    return _short(value, "s") if value < 1e4 else _short(value / 3600, "h")


def _short(value: float, unit: str) -> str:
    """A number in few characters, so that ten columns fit side by side."""
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def cost_table(lines: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of the other scores and the cost of each head."""
    energy = any(line.needed["energy"] is not None for line in lines)
    columns = ["bundle", *SCORES.values(), "extract", "train", "images", "memory", *(["energy"] if energy else [])]
    rows = []
    for line in lines:
        cost, memory = line.needed, line.cost.get("peak_memory")
        row = [line.name, *(f"{line.scores[name]:.3f}" for name in SCORES)]
        row += [_seconds(cost["extract_seconds"]) if cost["extract_seconds"] else "-", _seconds(cost["train_seconds"])]
        row += [str(cost["images"]), "-" if memory is None else _short(memory / 1e9, "GB")]
        row += [_joules(cost["energy"])] if energy else []
        rows.append(row)
    return columns, rows


def _joules(energy: float | None) -> str:
    return "-" if energy is None else _short(energy / 1000, "kJ")


def _tests(comparison: Comparison) -> str:
    """The images, intervals and tests of the accuracy table, in words."""
    others = len(comparison.lines) - 1
    holm = "" if others == 1 else f", by Holm's method for {others} comparisons"
    images = f"{images_of(vars(comparison))} of {comparison.split!r}"
    test = "the exact test that exchanges the heads group by group" if comparison.groups else "McNemar's exact test"
    return f"{images}; difference with its paired 95 % interval; p of {test}{holm}"


def comparison_text(comparison: Comparison, *, width: int | None = None) -> str:
    """The tables, the learning curve and the verdicts; ``width`` in characters, None for that of the terminal."""
    parts = [
        table(ACCURACY_COLUMNS, [accuracy_cells(line) for line in comparison.lines], left=2, width=width),
        _tests(comparison),
        table(*cost_table(comparison.lines), width=width),
    ]
    if comparison.curve:
        parts += [table(CURVE_COLUMNS, _curve_rows(comparison.curve), left=0, width=width), comparison.curve.sentence]
    parts += [*comparison.notes, *(line.verdict.sentence for line in comparison.lines if line.verdict)]
    return "\n\n".join(parts)


def _curve_rows(curve: LabelCurve) -> list[tuple[str, ...]]:
    return [
        (str(point["images"]), percent(point["accuracy"]), interval(point["accuracy_interval"]), str(len(point["accuracies"])))
        for point in curve.points
    ]


def comparison_report(comparison: Comparison, *, notes: Sequence[str] = (), title: str = "Comparison") -> str:
    """The comparison as an HTML page."""
    others = [line for line in comparison.lines if line.change]
    lead = f"{len(comparison.lines)} heads on the same {comparison.n} held-out images, compared with {comparison.baseline}"
    baseline = comparison.lines[0]
    cards: list[Card] = [
        (baseline.name, percent(baseline.accuracy), f"accuracy, 95 % interval {interval(baseline.accuracy_interval)}")
    ]
    for line in others[:CARDS]:
        value, between = _difference(line).split(" ", 1)
        cards.append((line.name, f"{value} points", f"of accuracy, 95 % interval {between}"))
    words = [(line.name, line.verdict.sentence) for line in others if line.verdict]
    rule = f"The smallest difference of accuracy that counts here is {points(comparison.worthwhile)}."
    cost_columns, cost_rows = cost_table(comparison.lines)
    sections = [
        Section("Is it worth it?", rule, rows=words),
        Section("Differences", _forest_text(comparison), plot=_forest(comparison, others), half=True),
        Section(
            "Accuracy and cost",
            "Seconds of extraction and training, without the held-out images.",
            plot=_cost_plot(comparison),
            half=True,
        ),
        Section(
            "Accuracy", _tests(comparison), columns=ACCURACY_COLUMNS, rows=[accuracy_cells(line) for line in comparison.lines]
        ),
        Section("Other scores and cost", _cost_text(), columns=cost_columns, rows=cost_rows),
        Section("Differences of all scores", columns=("bundle", *_DIFFERENT.values()), rows=_difference_rows(others)),
        *_reliability(comparison),
        *_training(comparison),
        *_curve(comparison.curve),
        *_per_class(comparison, others),
    ]
    return page(title, lead, sections, cards=cards, notes=[*comparison.notes, *notes])


_DIFFERENT = {"accuracy": "accuracy, points", **{name: SCORES[name] for name in COMPARED if name in SCORES}}


def _difference_rows(others: Sequence[Compared]) -> list[list[str]]:
    return [[line.name, *(_cell(line, name) for name in _DIFFERENT)] for line in others]


def _cell(line: Compared, name: str) -> str:
    if name == "accuracy":
        return _difference(line)
    assert line.change is not None
    score = line.change.scores[name]
    between = score["interval"]
    return f"{score['value']:+.3f}" + (f" [{between[0]:+.3f}, {between[1]:+.3f}]" if between else "")


def _cost_text() -> str:
    return (
        "Extract, train, images (passes through the backbone): without the held-out images, which no head needs. "
        "Memory: the peak of the process until then. "
        "Log-loss, Brier and ECE: lower is better."
    )


def _colour(comparison: Comparison, line: Compared) -> str:
    return plots.COLOURS[comparison.lines.index(line) % len(plots.COLOURS)]


def _forest_text(comparison: Comparison) -> str:
    return (
        f"Accuracy minus that of {comparison.baseline}, with its paired 95 % interval; "
        f"differences inside the grey band do not matter."
    )


def _forest(comparison: Comparison, others: Sequence[Compared]) -> str:
    def draw(axes: Any) -> None:
        band = 100 * comparison.worthwhile
        axes.axvspan(-band, band, color=plots.GREY, alpha=0.4, lw=0)
        axes.axvline(0, color=plots.INK, lw=0.8)
        for place, line in enumerate(reversed(others)):
            assert line.change is not None
            score = line.change.scores["accuracy"]
            _mark(axes, place, score, plots.BLUE)
        axes.set_yticks(range(len(others)), [plots.shorten(line.name) for line in reversed(others)])
        axes.set_ylim(-0.6, len(others) - 0.4)
        axes.set_xlabel("difference of accuracy, points")

    return plots.svg(draw, (plots.WIDTH, 0.9 + 0.35 * max(len(others), 3)))


def _mark(axes: Any, place: float, score: dict[str, Any], colour: str, label: str = "") -> None:
    value, (low, high) = 100 * score["value"], (100 * each for each in score["interval"])
    spread = [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar([value], [place], xerr=spread, fmt="o", color=colour, ms=4, capsize=3, label=label)


def _cost_plot(comparison: Comparison) -> str:
    def draw(axes: Any) -> None:
        seconds: list[float] = []
        for line in comparison.lines:
            low, high = line.accuracy_interval
            spread = [[line.accuracy - low], [high - line.accuracy]]
            seconds.append(max(line.seconds, 1e-3))
            name, colour = plots.shorten(line.name), _colour(comparison, line)
            axes.errorbar(seconds[-1:], [line.accuracy], yerr=spread, fmt="o", color=colour, capsize=3, label=name)
        plots.plain_log(axes, seconds)
        axes.yaxis.set_major_formatter("{x:.1%}")
        axes.set_xlabel("seconds")
        axes.set_ylabel("accuracy")
        _legend(axes)

    return plots.svg(draw, (plots.WIDTH, 3.2))


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.4, columnspacing=1.2)


def _reliability(comparison: Comparison) -> list[Section]:
    """A reliability plot of each head, side by side."""
    return [
        Section(
            f"Reliability of {line.name}",
            f"Accuracy by confidence; on the dashed line the two are equal. ECE {line.scores['ece']:.3f}.",
            plot=plots.reliability_svg(comparison.truth, line.probabilities, None),
            half=True,
        )
        for line in comparison.lines[:PAIRS]
    ]


def _training(comparison: Comparison) -> list[Section]:
    """Validation scores by epoch of the fine-tuned heads."""
    tuned = [line for line in comparison.lines if line.kind == FINE_TUNED and line.history]
    if not tuned:
        return []

    def plot(key: str, label: str) -> str:
        def draw(axes: Any) -> None:
            for line in tuned:
                known = [(row["epoch"], row[key]) for row in line.history if row.get(key) is not None]
                axes.plot(
                    *zip(*known, strict=True), "o-", color=_colour(comparison, line), ms=3, label=plots.shorten(line.name)
                )
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            if key == "val_accuracy":
                axes.yaxis.set_major_formatter("{x:.1%}")
            _legend(axes)

        return plots.svg(draw, (plots.WIDTH, 3.2))

    text = "On the validation images, by which the best epoch was chosen."
    return [
        Section("Loss by epoch", text, plot=plot("val_loss", "validation loss"), half=True),
        Section("Accuracy by epoch", text, plot=plot("val_accuracy", "validation accuracy"), half=True),
    ]


def _curve(curve: LabelCurve | None) -> list[Section]:
    if curve is None:
        return []
    drawn = plots.few_shot_svg([{**point, "shots": point["images"]} for point in curve.points], "training images")
    text = f"The head of {curve.head} on shares of its training images. {curve.sentence}"
    return [Section("Would more labels help?", text, drawn, columns=CURVE_COLUMNS, rows=_curve_rows(curve), half=True)]


def _per_class(comparison: Comparison, others: Sequence[Compared]) -> list[Section]:
    text = f"Recall minus that of {comparison.baseline}, points. Each interval is for one class: of many, one in twenty misses."
    drawn = _class_plot(comparison, others)
    sections = [Section("Classes", text, plot=drawn, half=True)] if drawn else []
    names = [line.name for line in others]
    columns = ["class", "images", *(word for name in names for word in (name, "won, lost"))]
    rows = []
    entries = [line.change.per_class for line in others if line.change]
    for each in zip(*entries, strict=True):
        row = [each[0]["label"], str(each[0]["n"])]
        for entry in each:
            row += [f"{signed(entry['value'])} {bounds(entry['interval'])}", f"{entry['wins']}, {entry['losses']}"]
        rows.append(row)
    text = (
        "Difference of recall, with its 95 % interval; images that only this head, and only the baseline, classifies correctly."
    )
    return [*sections, Section("Per class", text, columns=columns, rows=rows, folded=len(rows) > LONG)]


def _class_plot(comparison: Comparison, others: Sequence[Compared]) -> str:
    """Differences of the classes on which any two heads disagree, the largest if there are too many; empty without any."""
    entries = [line.change.per_class for line in others if line.change]
    disputed = [each for each in zip(*entries, strict=True) if any(entry["wins"] + entry["losses"] for entry in each)]
    disputed = sorted(disputed, key=lambda each: -max(abs(entry["value"]) for entry in each))[: plots.MANY_BARS]
    if not disputed:
        return ""
    offsets = np.linspace(0.25, -0.25, len(others)) if len(others) > 1 else [0.0]

    def draw(axes: Any) -> None:
        axes.axvline(0, color=plots.INK, lw=0.8)
        for place, each in enumerate(reversed(disputed)):
            for line, entry, offset in zip(others, each, offsets, strict=True):
                label = plots.shorten(line.name) if place == 0 else ""
                _mark(axes, place + offset, entry, _colour(comparison, line), label)
        names = [f"{plots.shorten(each[0]['label'])} ({each[0]['n']})" for each in reversed(disputed)]
        axes.set_yticks(range(len(disputed)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(disputed) - 0.4)
        axes.set_xlabel("difference of recall, points")
        _legend(axes)

    return plots.svg(draw, (plots.WIDTH, 1.1 + (0.2 + 0.12 * len(others)) * max(len(disputed), 3)))
