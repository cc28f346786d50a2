"""How true a choice is: the score of the best of several sources, what it is really better than, and how many images decide.

Run by ``make bench``; rewrites its tables in docs/sweep.md and docs/compare.md. Sources are right with a known probability; on
a half of the images one luck decides for all of them, because what is hard for one is hard for the others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from classifiers.comparison.ranking import UNLIKELY, Headline, Line, Ranking, ranked
from classifiers.comparison.verdict import NOT_WORTH, WORTH, judge
from classifiers.evaluation.paired_tests import Change, difference_interval, flip_test, needed_images
from classifiers.evaluation.single_label import SingleLabel
from classifiers.evaluation.units import Units

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- {}: made by `make bench` -->", "<!-- end -->"
SHARED = 0.5  # of the images, on which one luck decides for all sources


@dataclass(frozen=True)
class Sweep:
    """Sources of the same accuracy, and one that is better.

    Attributes:
        sources: how many there are.
        better: by how much the first is better; 0 for no better one.
        n: images that they are ranked by.
        size: images of a group, which share a half of their luck; 1 for none.
    """

    sources: int
    better: float = 0.0
    n: int = 250
    size: int = 1

    accuracy = 0.9

    def __str__(self) -> str:
        better = f", one better by {100 * self.better:g} points" if self.better else ", all equal"
        return f"{self.sources} sources{better}" + (f", groups of {self.size}" if self.size > 1 else "")

    def true(self, source: int) -> float:
        return self.accuracy + (self.better if source == 0 else 0.0)

    def draw(self, rng: np.random.Generator) -> Ranking:
        units = Units(np.arange(self.n) // self.size)
        luck = _luck(rng, (1, self.n), units, self.size)
        luck = np.where(rng.random(self.n) < SHARED, luck, _luck(rng, (self.sources, self.n), units, self.size))
        lines = []
        for source in range(self.sources):
            right = luck[source] < self.true(source)
            choice = Headline(float(right.mean()), units.proportion(right), self.n, units.groups)
            weighted = partial(accuracy, right.astype(np.float32))
            name = f"{source}"
            lines.append(Line(name, name, "", 8, self.n, 1.0, 0, choice, None, {}, 0, 0, right, units, weighted))
        return Ranking("", SingleLabel.name, "", "", None, ranked(lines))


def _luck(rng: np.random.Generator, shape: tuple[int, int], units: Units, size: int) -> NDArray[np.float64]:
    """Uniform numbers, which images of a group have in common on a half of them."""
    own = rng.random(shape)
    return own if size == 1 else np.where(rng.random(shape) < SHARED, rng.random((shape[0], units.count))[:, units.of], own)


def accuracy(right: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(right @ weights / weights.sum(axis=0), np.float64)


SWEEPS = tuple(Sweep(sources, better) for sources in (2, 5, 30) for better in (0.0, 0.02, 0.05))
SWEEPS += (Sweep(5, size=5), Sweep(30, size=5))


@dataclass
class Luck:
    """What a sweep says of its first source: means over many of them.

    Attributes:
        own, expected: by how much the score of the first and the corrected one exceed its true accuracy.
        own_held, expected_held: how often their intervals hold it.
        alone, told: share of sweeps that call a source worse than the first that is not: by tests of the first and one
            other, each alone, and by those of all pairs.
        power: share of the equal sources that are told from a better first one; NaN without one.
    """

    own: float
    expected: float
    own_held: float
    expected_held: float
    alone: float
    told: float
    power: float


def measured(sweep: Sweep, draws: int) -> Luck:
    rng, rows = np.random.default_rng(0), []
    for _ in range(draws):
        ranking = sweep.draw(rng)
        first, *others = ranking.lines
        true, units = sweep.true(int(first.source)), first.units
        assert first.right is not None
        assert units is not None
        row = []
        for score in (first.choice, ranking.expected):
            low, high = score.interval or (0.0, 1.0)
            row += [score.value - true, low - 1e-9 <= true <= high + 1e-9]
        worse = np.array([sweep.true(int(line.source)) < true for line in others])
        each = np.array([flip_test(units.sums(first.right.astype(np.int8) - line.right)) for line in others]) < UNLIKELY
        together = np.array(ranking.against_best[1:], float) < UNLIKELY
        row += [(each & ~worse).any(), (together & ~worse).any(), together[worse].mean() if worse.any() else math.nan]
        rows.append(row)
    table = np.array(rows, float)
    own, own_held, expected, expected_held, alone, told = table[:, :6].mean(axis=0).tolist()
    known = table[~np.isnan(table[:, 6]), 6]
    power = float(known.mean()) if sweep.better else math.nan
    return Luck(own, expected, own_held, expected_held, alone, told, power)


def sweeps_report(draws: int) -> Iterator[str]:
    yield f"{date.today()}, {draws} draws of each; 90 % of the images right, {Sweep.n} images."
    yield ""
    yield (
        "| | accuracy of the first: too high by | interval holds | corrected: too high by | interval holds "
        '| wrong "worse than 1" in a sweep (each tested alone) | equal ones told from a better first |'
    )
    yield "|---|---|---|---|---|---|---|"
    for sweep in SWEEPS:
        luck = measured(sweep, draws)
        numbers = f"{100 * luck.own:+.1f} | {luck.own_held:.1%} | {100 * luck.expected:+.1f} | {luck.expected_held:.1%}"
        power = "-" if math.isnan(luck.power) else f"{luck.power:.0%}"
        yield f"| {sweep} | {numbers} | {luck.told:.1%} ({luck.alone:.0%}) | {power} |"


@dataclass(frozen=True)
class Pair:
    """Two heads that disagree on a share of the images, one of which has a true gain over the other.

    Attributes:
        disputed: share of the images.
        gain: true difference of the accuracies.
        comparisons: for so many heads p is adjusted (by Bonferroni's method here: what is left of Holm's for the first).
        size: images of a group; 1 for none.
    """

    disputed: float
    gain: float
    comparisons: int = 1
    size: int = 1

    worthwhile, correlation, many = 0.01, 0.2, 60_000

    def __str__(self) -> str:
        groups = f", groups of {self.size}" if self.size > 1 else ""
        several = f", {self.comparisons} heads" if self.comparisons > 1 else ""
        return f"{100 * self.disputed:g} %, {100 * self.gain:+g} points{groups}{several}"

    def draw(self, rng: np.random.Generator, n: int) -> tuple[NDArray[np.int8], Units]:
        """Of each image 1, -1 or 0, as in `paired_tests.difference_interval`; and which belong together."""
        won, lost = (self.disputed + self.gain) / 2, (self.disputed - self.gain) / 2
        shares = np.array([won, lost, 1 - won - lost])
        units = Units.each(n) if self.size == 1 else Units(np.arange(math.ceil(n / self.size) * self.size) // self.size)
        if self.size > 1:
            shares = rng.dirichlet(shares * (1 / self.correlation - 1), units.count)[units.of]
        steps = np.broadcast_to(np.cumsum(shares, axis=-1), (len(units.of), 3))
        luck = rng.random(len(units.of))
        return np.select([luck < steps[:, 0], luck < steps[:, 1]], [1, -1], 0).astype(np.int8), units

    def needed(self) -> int:
        """How many images decide, by the true numbers."""
        change, units = self.draw(np.random.default_rng(1), self.many)
        effect, _ = units.design(change.astype(np.float64))
        return math.ceil(needed_images(self.disputed, self.gain, self.worthwhile, self.comparisons) * effect)


PAIRS = (
    Pair(0.12, 0.06),
    Pair(0.12, 0.04),
    Pair(0.04, 0.03),
    Pair(0.12, 0.02),
    Pair(0.12, -0.02),
    Pair(0.06, -0.01),
    Pair(0.12, 0.06, comparisons=3),
    Pair(0.12, 0.06, size=15),
    Pair(0.12, 0.04, size=15),
    Pair(0.12, -0.02, size=15),
)


def decided(pair: Pair, n: int, draws: int, resamples: int = 400) -> tuple[float, float]:
    """Share of samples of ``n`` images with the verdict ``worth it``, and with ``not worth it``."""
    rng, decisions = np.random.default_rng(0), []
    for seed in range(draws):
        change, units = pair.draw(rng, n)
        weights = units.resampled(np.zeros(len(change), np.intp), resamples, seed)
        drawn = np.concatenate([change.astype(np.float32) @ each for each in weights]).astype(np.float64) / len(change)
        p = flip_test(units.sums(change))
        score = {"value": float(change.mean()), "interval": difference_interval(change, drawn, units)}
        wins, losses = int((change > 0).sum()), int((change < 0).sum())
        adjusted = min(1.0, p * pair.comparisons)
        facts = Change({"accuracy": score}, wins, losses, p, adjusted, [], units.design(change.astype(np.float64))[0])
        decisions.append(judge(facts, units, subject="it", cost_ratio=10.0, worthwhile=pair.worthwhile).decision)
    return float(np.mean([each == WORTH for each in decisions])), float(np.mean([each == NOT_WORTH for each in decisions]))


def needed_report(draws: int) -> Iterator[str]:
    yield f"{date.today()}, {draws} draws of each; one point is worthwhile."
    yield ""
    yield "| disagree, true gain | images needed | worth it | not worth it |"
    yield "|---|---|---|---|"
    for pair in PAIRS:
        n = pair.needed()
        worth, not_worth = decided(pair, n, draws)
        yield f"| {pair} | {n:,} | {worth:.0%} | {not_worth:.0%} |"


REPORTS = {"sweeps": (DOCS / "sweep.md", sweeps_report), "needed": (DOCS / "compare.md", needed_report)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="of each (default 1000: about ten minutes)")
    parser.add_argument("--only", choices=REPORTS, help="this table alone")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    for name, (page, report) in REPORTS.items():
        if options.only not in (None, name):
            continue
        lines = []
        for line in report(options.draws):
            print(line, flush=True)
            lines.append(line)
        if not options.no_page:
            begin = BEGIN.format(name)
            before, _, rest = page.read_text("utf-8").partition(begin)
            text = "\n".join(lines)
            page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
