"""Figures as plain text for a terminal or a pipe; returns strings, prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .evaluate import Evaluation
from .report import CLASS_COLUMNS, class_rows

MATRIX_CLASSES = 20  # a wider confusion matrix does not fit a terminal; `--plot` shows it


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, width: int | None = None) -> str:
    """A table; the first ``left`` columns are text, the others numbers. ``width`` in characters; None asks the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=width, highlight=False)
    drawn = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def evaluation_text(result: Evaluation, *, width: int | None = None) -> str:
    """Accuracy with its interval, the per-class table, and the confusion matrix where it fits."""
    low, high = result.accuracy_interval
    parts = [
        f"accuracy {result.accuracy:.4f} [{low:.4f}, {high:.4f}] (95 % Wilson), {result.n - result.correct} errors in "
        f"{result.n} images of {result.split!r}, macro F1 {result.macro_f1:.4f}",
        table(CLASS_COLUMNS, class_rows(result.to_json()), width=width),
    ]
    if len(result.classes) <= MATRIX_CLASSES:
        rows = [(label, *map(str, counts)) for label, counts in zip(result.classes, result.confusion, strict=True)]
        parts.append(table(("true \\ predicted", *result.classes), rows, width=width))
    return "\n\n".join(parts)
