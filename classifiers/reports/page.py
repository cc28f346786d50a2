"""Self-contained HTML pages, rendered from sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from .illustrations import Mistake

LONG = 25  # rows of a table that are shown at once; longer tables are folded
Card = tuple[str, str, str]  # label, value and detail of a number


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading with text, and a plot, mistakes or a table; a table without ``columns`` is a list of facts.

    Attributes:
        half: two such sections stand side by side if there is room.
        folded: the table is shown on a click.
    """

    heading: str
    text: str = ""
    plot: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    mistakes: Sequence[Mistake] = ()
    half: bool = False
    folded: bool = False


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    *,
    cards: Sequence[Card] = (),
    notes: Sequence[str] = (),
) -> str:
    """Render a page; everything but the plots is escaped."""
    return str(
        _template().render(title=title, lead=lead, cards=cards, notes=notes, sections=sections, version=version("penult"))
    )


@cache
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files(__package__) / "page.html.j2").read_text("utf-8"))
