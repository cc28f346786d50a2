"""A ranking of feature sources: accuracy, cost, transferability scores, and whether these scores agree with the accuracy."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.intervals import FEWEST_RESAMPLES, Interval, resamples_for, wilson
from classifiers.evaluation.registry import KINDS
from classifiers.evaluation.task import images_of
from classifiers.evaluation.units import Units
from store.errors import PenultError

from .selection import Weighted, all_against_first, luck_of_best

SCORES = {"logme": "LogME", "h_score": "H-score, not shrunk", "h_score_shrunk": "H-score"}
SHOWN = ("logme", "h_score_shrunk")  # without shrinkage, the H-score is the same for all if features outnumber images
FEW = 5  # sources: with four, the right order or its reverse comes up by chance in one of twelve cases
UNLIKELY = 0.05
WITH_FAILURES = 3


@dataclass(frozen=True)
class Headline:
    """The main score of a head on ``n`` images, of so many groups if they are not independent, with its 95 % interval."""

    value: float
    interval: Interval | None
    n: int
    groups: int | None = None


@dataclass(frozen=True)
class Line:
    """One feature source of a ranking.

    Attributes:
        source: as written after ``-m``, with file names instead of paths.
        cache, layer: the path of its features, and the layer as the cache names it.
        dim: length of a feature vector.
        images: distinct images in the cache.
        extract_seconds: time of their extraction, over all runs; of the whole pass if a backbone has several layers.
        computed: images that went through the backbone in this run.
        choice: score of the head out of fold or on validation images; sources are ranked by it.
        held_out: score of the head on held-out images, by which nothing was chosen; None if there are none.
        scores: see `transferability.transferability`.
        train_seconds, score_seconds: time of training the head, with its search; time of the scores.
        right: which images of ``choice`` it classifies correctly, in one order for all sources; None if the score does
            not count single images.
        weighted: the score of ``choice`` if its images count so often, see `selection.Weighted`; None if it is not known.
        units: which images of ``choice`` belong together, in that order.
    """

    source: str
    cache: str
    layer: str
    dim: int
    images: int
    extract_seconds: float
    computed: int
    choice: Headline
    held_out: Headline | None
    scores: dict[str, float | None]
    train_seconds: float
    score_seconds: float
    right: NDArray[np.bool_] | None = None
    units: Units | None = None
    weighted: Weighted | None = None

    @property
    def cost(self) -> str:
        """Time and rate of the extraction, as text."""
        rate = f", {self.images / self.extract_seconds:.0f}/s" if self.extract_seconds else ""
        return f"{self.extract_seconds:.1f} s{rate}"


@dataclass(frozen=True)
class Failure:
    """A feature source without features, and the reason."""

    source: str
    error: str
    exit_code: int


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of a score with the metric that sources are ranked by; None if it is not defined."""

    score: str
    n: int
    kendall_tau: float | None
    kendall_p: float | None
    spearman_rho: float | None

    @property
    def so(self) -> str:
        """The conclusion that it allows, in words."""
        if self.n < FEW or self.kendall_p is None:
            return "too few to conclude" if self.n < FEW else "the same for all"
        return "hardly by chance" if self.kendall_p < UNLIKELY else "may be chance"

    def cells(self) -> tuple[str, ...]:
        """The agreement as text, in the order of `AGREEMENT_COLUMNS`."""
        shown = [("-" if each is None else f"{each:.2f}") for each in (self.kendall_tau, self.spearman_rho)]
        p = "-" if self.kendall_p is None else f"{self.kendall_p:.2g}"
        return (SCORES[self.score], *shown, p, self.so)


AGREEMENT_COLUMNS = ("score", "Kendall's tau", "Spearman's rho", "p", "conclusion")


@dataclass(frozen=True)
class Ranking:
    """The result of a sweep.

    Attributes:
        data: name of the data.
        task: one of ``store.tasks.TASKS``.
        head: the head that was trained on each source.
        chosen_on, reported_on: what ``choice`` and ``held_out`` of the lines were measured on; None if nothing is held out.
        lines: best first; of equal ones, the fastest first.
        failed: sources without features.
        unusable: images that could not be used, in any of the caches.
    """

    data: str
    task: str
    head: str
    chosen_on: str
    reported_on: str | None
    lines: Sequence[Line]
    failed: Sequence[Failure] = field(default_factory=tuple)
    unusable: int = 0

    @property
    def exit_code(self) -> int:
        return WITH_FAILURES if self.failed or self.unusable else 0

    @property
    def metric(self) -> str:
        """The metric by which the sources are ranked."""
        return KINDS[self.task].ranked_by

    @property
    def columns(self) -> tuple[str, ...]:
        held = [] if self.reported_on is None else [f"held out: {self.reported_on}"]
        names = [SCORES[name] for name in self.shown]
        return ("rank", "source", "features", "extraction", self.metric, *held, *names, "Pareto")

    @property
    def shown(self) -> list[str]:
        """The scores that the table and the page show."""
        return [name for name in SHOWN if self.lines[0].scores[name] is not None]

    def front(self) -> list[bool]:
        """Whether each line is on the Pareto front: no other source is as good and as fast, and better in one of both."""
        return [
            not any(
                other.choice.value >= line.choice.value
                and other.extract_seconds <= line.extract_seconds
                and (other.choice.value, -other.extract_seconds) != (line.choice.value, -line.extract_seconds)
                for other in self.lines
            )
            for line in self.lines
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """The lines as text, in the order of `columns`."""
        return [
            (
                str(rank),
                line.source.replace("@", " @"),  # so that it can wrap
                str(line.dim),
                line.cost,
                self.text(line.choice),
                *([self.text(line.held_out)] if line.held_out else ()),
                *(f"{line.scores[name]:.3f}" for name in self.shown),
                "front" if best else "dominated",
            )
            for rank, (line, best) in enumerate(zip(self.lines, self.front(), strict=True), 1)
        ]

    def text(self, score: Headline) -> str:
        """A score with its interval."""
        scale, digits, unit = (100, 1, " %") if KINDS[self.task].in_percent else (1, 3, "")
        bounds = ", ".join(f"{scale * bound:.{digits}f}" for bound in score.interval or ())
        return f"{scale * score.value:.{digits}f}{unit}" + (f" [{bounds}]" if bounds else "")

    def agreements(self) -> list[Agreement]:
        """The agreement of each score that this task has."""
        achieved = [line.choice.value for line in self.lines]
        names = [name for name, value in self.lines[0].scores.items() if value is not None]
        return [agreement(name, [line.scores[name] or 0.0 for line in self.lines], achieved) for name in names]

    @cached_property
    def expected(self) -> Headline:
        """The score of the first on other images, see `selection.luck_of_best`; its own if nothing was chosen.

        The interval reaches from the lower bound for this score to the upper bound for its own: a source that is really the
        best loses too much.
        """
        choice, right = self.lines[0].choice, self.lines[0].right
        units = self.lines[0].units or Units.each(choice.n)
        candidates = sorted(self.lines, key=lambda line: (line.extract_seconds, line.source))  # as `ranked` takes equal ones
        weighted = [line.weighted for line in candidates if line.weighted]
        if len(weighted) < 2:
            return choice
        # Other scores than accuracy take longer, and a mean of few resamples is good enough.
        resamples = FEWEST_RESAMPLES if right is None else resamples_for(choice.n, len(weighted))
        luck = luck_of_best(weighted, units, resamples)
        value = choice.value - luck
        if choice.interval is None or not luck:
            return replace(choice, value=value)
        low, high = choice.interval
        effect, z = units.design(right.astype(np.float64)) if right is not None else (1.0, math.inf)
        low = wilson(value * choice.n / effect, choice.n / effect, z)[0] if math.isfinite(z) else low - choice.value + value
        return replace(choice, value=value, interval=(low, high))

    @cached_property
    def against_best(self) -> list[float | None]:
        """The p-value of each line against the first, see `selection.all_against_first`; None if not possible."""
        right = [line.right for line in self.lines if line.right is not None]
        if len(right) < len(self.lines):
            return [None] * len(self.lines)
        return [*all_against_first(right, self.lines[0].units or Units.each(len(right[0])))]

    @property
    def luck(self) -> list[str]:
        """How much of the score of the first is the luck of being chosen, in words."""
        own, expected = self.text(self.lines[0].choice), self.text(self.expected)
        if len(self.lines) < 2 or self.lines[0].weighted is None:
            return []
        if own == expected:
            return [f"1 leads so clearly that being the best of {len(self.lines)} adds nothing to its {self.metric}."]
        return [
            f"To be the best of {len(self.lines)} on these images takes some luck: on others, expect {expected} of 1 "
            f"(bootstrap bias correction)."
        ]

    def notes(self) -> list[str]:
        """Notes on how to read the table."""
        held = "nothing is held out" if self.reported_on is None else f"{self.reported_on!r} was not used for it"
        images = images_of(vars(self.lines[0].choice))
        notes = [f"Ranked by {self.metric} on {images}, by heads fitted without them ({self.chosen_on}); {held}."]
        notes += [*self.luck, *(self.lines[0].units.notes if self.lines[0].units else [])]
        p = self.against_best
        tied = [str(rank) for rank, each in enumerate(p, 1) if rank > 1 and each is not None and each >= UNLIKELY]
        if tied:
            notes.append(
                f"No significant difference from 1 on these images: {', '.join(tied)} (exact tests of all pairs, Holm's "
                f"method, p >= {UNLIKELY})."
            )
        if len({line.cache for line in self.lines}) < len(self.lines):
            notes.append("Layers of one backbone come from one pass, and each has the time of all of it.")
        heads, scores = (sum(getattr(line, name) for line in self.lines) for name in ("train_seconds", "score_seconds"))
        notes.append(f"Training the heads took {heads:.1f} s, the scores {scores:.1f} s.")
        return notes

    def advice(self) -> str:
        """The command that trains a bundle on the best features."""
        best = self.lines[0]
        several = sum(line.cache == best.cache for line in self.lines) > 1
        layer = f" --layer {shlex.quote(best.layer)}" if several else ""
        return f"penult train {shlex.quote(best.cache)}{layer} --head {self.head} -o best.head"

    def to_json(self) -> dict[str, Any]:
        facts = {
            name: getattr(self, name) for name in ("data", "task", "head", "metric", "chosen_on", "reported_on", "unusable")
        }
        sources = []
        for rank, (line, best, p) in enumerate(zip(self.lines, self.front(), self.against_best, strict=True), 1):
            known = asdict(replace(line, right=None, units=None, weighted=None))
            known = {key: value for key, value in known.items() if key not in ("right", "units", "weighted")}
            sources.append({"rank": rank, **known, "pareto": best, "p_against_best": p})
        agreements = [asdict(each) | {"so": each.so} for each in self.agreements()]
        expected = asdict(self.expected)
        return {
            **facts,
            "expected": expected,
            "sources": sources,
            "failed": [asdict(each) for each in self.failed],
            "agreement": agreements,
        }


def ranked(lines: Sequence[Line]) -> list[Line]:
    """Lines in order, best first; of equal ones, the fastest first."""
    return sorted(lines, key=lambda line: (-line.choice.value, line.extract_seconds, line.source))


def failure(source: str, error: PenultError) -> Failure:
    """The error of a source, with its advice."""
    return Failure(source, "; ".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)


def agreement(score: str, scores: Sequence[float], achieved: Sequence[float]) -> Agreement:
    """Whether a score orders sources as the heads do: Kendall's tau-b with its p-value, and Spearman's rho."""
    from scipy.stats import kendalltau, spearmanr

    n, scores = len(scores), [float(f"{value:.9g}") for value in scores]  # rounding errors must not make an order
    if n < 3 or len(set(scores)) == 1 or len(set(achieved)) == 1:
        return Agreement(score, n, None, None, None)
    tau = kendalltau(scores, achieved)
    return Agreement(score, n, float(tau.statistic), float(tau.pvalue), float(spearmanr(scores, achieved).statistic))
