"""HTML tables that show an object in a notebook: a title and rows, with everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str] = ()) -> str:
    """A title over a table; ``columns`` are its headings.

    >>> html_table("pets.cache", [("images", 24)])
    '<b>pets.cache</b><table><tr><td>images</td><td>24</td></tr></table>'
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<b>{escape(title)}</b><table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
