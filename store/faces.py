"""What the faces of the three packages share: names imported when asked for, and objects that show themselves in a notebook."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def lazily(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names are imported when they are first asked for (PEP 562).

    Args:
        package: its name.
        home: the module of each public name, relative to the package.

    >>> get, names = lazily("store", {"FeatureCache": "cache"})
    >>> get("FeatureCache").__name__, names()
    ('FeatureCache', ['FeatureCache'])
    """

    def get(name: str) -> Any:
        if name not in home:
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home)


def html_table(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str] = ()) -> str:
    """A title over a table as HTML, everything escaped; ``columns`` are its headings.

    >>> html_table("pets.cache", [("images", 24)])
    '<b>pets.cache</b><table><tr><td>images</td><td>24</td></tr></table>'
    """
    from html import escape

    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<b>{escape(title)}</b><table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
