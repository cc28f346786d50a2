"""Tables as plain text, for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len

from store.errors import printable

GAP = 3  # between two columns
EDGES = 2  # at both ends of a line
READABLE = 16  # characters that a column of text gets at least, if it needs them


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, width: int | None = None) -> str:
    """Format a table; the first ``left`` columns are text, the others numbers. ``width`` in characters; None is the terminal's.

    Text is wrapped if needed, a number never: a table that is still too wide is transposed, or becomes a list. Control
    characters are escaped.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=width, highlight=False)
    columns, rows = [printable(name) for name in columns], [[printable(cell) for cell in row] for row in rows]
    if narrowest(columns, rows, left) > console.width:
        transposed = [columns[0], *(row[0] for row in rows)], [[*cells] for cells in zip(columns, *rows, strict=True)][1:]
        if narrowest(*transposed, 1) <= console.width:
            return table(*transposed, width=console.width)
        # one line per number is longer, but can be read
        heading = max(map(cell_len, columns))
        blocks = [[f"{name:{heading}}  {cell}" for name, cell in zip(columns, row, strict=True)] for row in rows]
        return "\n\n".join("\n".join(block) for block in blocks)
    widths = _widths(columns, rows)
    fits = sum(max(cell_len(name), width) + GAP for name, width in zip(columns, widths, strict=True)) <= console.width + GAP
    grid = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        if i < left:
            grid.add_column(Text(column), overflow="fold")  # text, so that no name is taken for markup
        else:  # its heading may be broken between words, a number never
            grid.add_column(Text(column), justify="right", width=None if fits else widths[i])
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column whose heading may be broken between words and whose cells may not."""
    words = [max(map(cell_len, column.split()), default=0) for column in columns]
    return [max([words[i], *(cell_len(row[i]) for row in rows)]) for i in range(len(columns))]


def narrowest(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> int:
    """The smallest width in characters in which the table is readable, with its text wrapped."""
    widths = _widths(columns, rows)
    return sum(min(width, READABLE) if i < left else width for i, width in enumerate(widths)) + GAP * (len(columns) - 1) + EDGES
