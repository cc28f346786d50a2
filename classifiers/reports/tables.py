"""Columns and rows, as text, of the tables that both HTML pages and the terminal show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from classifiers.evaluation.intervals import interval, percent
from classifiers.evaluation.registry import KINDS
from classifiers.evaluation.scores import IN_UNITS, SCALES, SHARES, SHORT, WORDS

CLASS_COLUMNS = ("class", "images", "precision", "recall", "95 % interval", "F1")
SHOT_COLUMNS = ("images a class", "accuracy", "95 % interval", "lowest to highest", "draws")


def whole_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Score, value and 95 % interval, of `Measured` as JSON."""
    rows = []
    for name, score in metrics["scores"].items():
        bounds = score["interval"]
        rows.append(
            (WORDS.get(name, name), _number(name, score["value"]), " to ".join(_number(name, b) for b in bounds or ()) or "-")
        )
    return rows


def output_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, one for each label or target, of `Measured` as JSON."""
    names = list(metrics["per_output"][0]["scores"])
    columns = [KINDS[metrics["task"]].singular, "images", *(SHORT.get(name, name) for name in names)]
    return columns, [
        [entry["name"], str(entry["n"]), *(_with_interval(name, entry["scores"][name]) for name in names)]
        for entry in metrics["per_output"]
    ]


def _with_interval(name: str, score: dict[str, Any]) -> str:
    bounds = score["interval"]
    value = _number(name, score["value"])
    return f"{value} [{_number(name, bounds[0])}, {_number(name, bounds[1])}]" if bounds else value


def _number(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if name in IN_UNITS else f"{value:.3f}"


def class_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the per-class table, as text."""
    return [
        (
            entry["label"],
            str(entry["n"]),
            *("-" if entry[name] is None else f"{entry[name]:.3f}" for name in ("precision", "recall")),
            "-" if entry["recall_interval"] is None else interval(entry["recall_interval"]),
            "-" if entry["f1"] is None else f"{entry['f1']:.3f}",
        )
        for entry in metrics["per_class"]
    ]


def score_rows(scores: dict[str, dict[str, Any]], classes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, value and interval of each score, as text."""
    scales = SCALES | ({"pr_auc": f"PR-AUC: the same, for {classes[1]}"} if len(classes) == 2 else {})
    rows = [
        (text, percent(score["value"]), interval(score["interval"]) if score["interval"] else "-")
        for name, text in SHARES.items()
        if (score := scores.get(name))
    ]
    for name, text in scales.items():
        if score := scores.get(name):
            bounds = score["interval"]
            rows.append((text, f"{score['value']:.3f}", f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "-"))
    return rows


def shot_cells(point: dict[str, Any]) -> tuple[str, ...]:
    """A row of the few-shot table, in the order of `SHOT_COLUMNS`."""
    each = point["accuracies"]
    spread = interval([min(each), max(each)])
    return str(point["shots"]), percent(point["accuracy"]), interval(point["accuracy_interval"]), spread, str(len(each))
