"""The HTML page of a sweep: backbones in order, with plots of cost and of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.registry import KINDS
from classifiers.evaluation.task import images_of
from classifiers.reports.page import Card, Section, page
from classifiers.reports.plots import BLUE, GREY, INK, WIDTH, plain_log, svg

from .ranking import AGREEMENT_COLUMNS, SCORES, Ranking

MEANINGS = {
    "logme": "The evidence of a linear model of the labels, per image. No head is trained for it; larger is better.",
    "h_score_shrunk": "How far apart the class means are, for the spread of the features. No head is trained for it.",
}


def ranking_page(ranking: Ranking) -> str:
    """The ranking of a sweep as an HTML page."""
    best, agreements = ranking.lines[0], ranking.agreements()
    lead = f"{len(ranking.lines)} feature sources on {ranking.data}, a {ranking.head} head on each. First: {best.source}"
    cards: list[Card] = []
    chosen = ranking.chosen_on + (", without the luck of the best" if ranking.luck else "")
    for score, where in ((ranking.expected, chosen), (best.held_out, f"{ranking.reported_on}, held out")):
        if score is not None:
            value, _, bounds = ranking.text(score).partition(" [")
            cards.append((f"{ranking.metric} of the first", value, f"95 % [{bounds or ']'}, {images_of(vars(score))}: {where}"))
    cards.append(("its extraction", f"{best.extract_seconds:.1f} s", f"{best.dim} features, {best.images} images"))
    logme = agreements[0]
    tau = "-" if logme.kendall_tau is None else f"{logme.kendall_tau:.2f}"
    cards.append(("LogME against trained heads", tau, f"Kendall's tau, {logme.n} sources: {logme.so}"))
    text = "Sources by their rank. Grey is dominated: another is as good in less time, or better in the same."
    agree = f"Rank correlation of the scores with the {ranking.metric} of trained heads, {logme.n} sources."
    sections = [
        Section("What it costs", text=text, plot=_cost_svg(ranking), half=True),
        *(_score_section(ranking, name) for name in ranking.shown),
        Section("Do the scores agree?", agree, columns=AGREEMENT_COLUMNS, rows=[a.cells() for a in agreements], half=True),
        Section(
            "Ranking", " ".join(ranking.notes()), columns=ranking.columns[1:], rows=[row[1:] for row in _numbered(ranking)]
        ),
    ]
    missing = [f"No features of {each.source}: {each.error}" for each in ranking.failed]
    return page("Which backbone?", lead, sections, cards=cards, notes=missing)


def _numbered(ranking: Ranking) -> list[tuple[str, ...]]:
    """Rows whose source begins with its rank, because only the first column of a page is text."""
    return [(row[0], f"{row[0]}  {row[1]}", *row[2:]) for row in ranking.rows()]


def _score_section(ranking: Ranking, name: str) -> Section:
    values = [line.scores[name] or 0.0 for line in ranking.lines]
    title = f"{SCORES[name]} and {ranking.metric}"
    return Section(title, MEANINGS[name], plot=_score_svg(ranking, values, SCORES[name]), half=True)


def _cost_svg(ranking: Ranking) -> str:
    """Score, with its interval, by extraction time; sources of one pass are side by side."""
    sources_at: dict[float, int] = {}
    places = []
    for line in ranking.lines:
        x = max(line.extract_seconds, 1e-3)
        places.append(x * 1.012 ** sources_at.get(x, 0))
        sources_at[x] = sources_at.get(x, 0) + 1
    best = np.array(ranking.front())

    def draw(axes: Any) -> None:
        values = _draw_sources(axes, ranking, places, best)
        order = [i for i in np.argsort(places) if best[i]]
        axes.step([places[i] for i in order], [values[i] for i in order], where="post", color=BLUE, lw=1, ls=":")
        plain_log(axes, places)
        axes.set_xlabel("extraction, seconds")

    return svg(draw, (WIDTH, 3.6))


def _score_svg(ranking: Ranking, scores: Sequence[float], name: str) -> str:
    def draw(axes: Any) -> None:
        _draw_sources(axes, ranking, scores, np.array(ranking.front()))
        axes.set_xlabel(name)

    return svg(draw, (WIDTH, 3.6))


def _draw_sources(axes: Any, ranking: Ranking, x: Sequence[float], best: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every source's score with interval and rank, at its x; returns the scores."""
    values = np.array([line.choice.value for line in ranking.lines])
    for i, line in enumerate(ranking.lines):
        colour = BLUE if best[i] else "#8a94a6"
        low, high = line.choice.interval or (values[i], values[i])
        spread = [[max(values[i] - low, 0)], [max(high - values[i], 0)]]
        axes.errorbar(
            [x[i]], [values[i]], yerr=spread, fmt="o", color=colour, ecolor=BLUE if best[i] else GREY, ms=5, capsize=3
        )
        axes.annotate(str(i + 1), (x[i], values[i]), xytext=(5, 4), textcoords="offset points", color=INK)
    if KINDS[ranking.task].in_percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel(ranking.metric)
    return values
