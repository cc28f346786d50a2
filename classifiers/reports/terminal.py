"""Scores as plain text for a terminal or a pipe: strings, nothing is printed."""

from __future__ import annotations

from typing import Any

from classifiers.evaluation.intervals import interval, percent
from classifiers.evaluation.registry import task_of
from classifiers.evaluation.task import SCORE_COLUMNS, Evaluation, Measured, images_of
from extractor.text_table import narrowest, table

from .tables import CLASS_COLUMNS, class_rows, output_table, score_rows, whole_rows

MATRIX_CLASSES = 20  # a wider confusion matrix does not fit a terminal; `--plot` shows it


def evaluation_text(result: Evaluation | Measured, *, width: int | None = None) -> str:
    """Accuracy with its interval, the other scores, the per-class table, and the confusion matrix if it fits."""
    if isinstance(result, Measured):
        return _measured_text(result, width)
    low, high = result.accuracy_interval
    parts = [
        f"accuracy {result.accuracy:.4f} [{low:.4f}, {high:.4f}] (95 % Wilson), {result.n - result.correct} errors in "
        f"{images_of(vars(result))} of {result.split!r}, macro F1 {result.macro_f1:.4f}",
        table(SCORE_COLUMNS, score_rows(result.scores, result.classes), width=width),
        *_confidence(result),
        *_abstention(result.sets, result.n),
        *_novelty(result.novelty, result.n),
        table(CLASS_COLUMNS, class_rows(result.to_json()), width=width),
    ]
    if len(result.classes) <= MATRIX_CLASSES:
        parts.append(confusion_text(result, width=width))
    return "\n\n".join(parts)


def _measured_text(result: Measured, width: int | None) -> str:
    """The headline, the scores over all labels or targets, and those of each."""
    metrics = result.to_json()
    task = task_of(result.task, [entry["name"] for entry in result.per_output])
    parts = [
        f"{task.headline(metrics)} (95 % interval), {images_of(vars(result))} of {result.split!r}",
        table(SCORE_COLUMNS, whole_rows(metrics), width=width),
        *_novelty(result.novelty, result.n),
        table(*output_table(metrics), width=width),
    ]
    return "\n\n".join(parts)


def _confidence(result: Evaluation) -> list[str]:
    """How to read the calibration error, and what temperature scaling changed."""
    scores = {name: score["value"] for name, score in result.scores.items()}
    if "ece" not in scores:
        return []
    text = f"Perfect confidence would show an ECE of about {scores['ece_by_chance']:.3f} on {result.n} images."
    if result.temperature is not None:
        text += (
            f" Before temperature scaling (T = {result.temperature:.2f}): ECE {scores['ece_before']:.3f}, "
            f"log-loss {scores['log_loss_before']:.3f}."
        )
    return [text]


def _abstention(sets: dict[str, Any] | None, n: int) -> list[str]:
    """How many images the prediction sets decide, and their coverage."""
    if sets is None:
        return []
    marginal = sets["marginal"]
    decided, right = marginal["decided"], marginal["decided_right"]
    accuracy = f" and right on {right} of these ({percent(right / decided)})" if decided else ""
    return [
        f"Allowed to abstain, it is sure of {decided} of {n} images{accuracy}: those with one label in their prediction set.\n"
        f"Prediction sets for a coverage of {100 * sets['target']:.0f} % hold the true label of "
        f"{percent(marginal['coverage'])} of images ({interval(marginal['coverage_interval'])}), "
        f"with {marginal['mean_size']:.2f} labels on average."
    ]


def _novelty(novelty: dict[str, Any] | None, n: int) -> list[str]:
    if novelty is None:
        return []
    return [
        f"Unlike the training images: {novelty['novel']} of {n} ({percent(novelty['share'])}, {interval(novelty['interval'])}"
        f"); {100 * novelty['expected']:.0f} % are expected for images of the same kind."
    ]


def confusion_text(result: Evaluation, *, width: int | None = None) -> str:
    """The confusion matrix; its columns have numbers instead of labels if these do not fit."""
    from rich.console import Console

    available = Console(width=width).width
    counts = [[*map(str, line)] for line in result.confusion]
    numbers = [str(i + 1) for i in range(len(counts))]
    labelled = [(label, *line) for label, line in zip(result.classes, counts, strict=True)]
    numbered = [(f"{number} {row[0]}", *row[1:]) for number, row in zip(numbers, labelled, strict=True)]
    for names, rows in ((result.classes, labelled), (numbers, numbered)):
        columns = ("true \\ predicted", *names)
        if narrowest(columns, rows, 1) <= available:
            return table(columns, rows, width=available)
    return f"The confusion matrix of {len(counts)} classes does not fit {available} columns: --plot FILE or --json has it."
