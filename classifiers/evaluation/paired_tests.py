"""Paired comparison of heads on the same images: differences of scores with intervals, and an exact test.

All heads are resampled on the same images, so that what makes an image hard for all of them cancels out. Images of one group
count together (see `units`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.progress.stages import staged

from .intervals import Z95, Interval, resamples_for, wilson
from .scores import Probabilities, Values, decision_scores, probability_scores, weighted_scores
from .units import Units

COMPARED = (
    "accuracy",
    "f1_macro",
    "log_loss",
    "brier",
)  # scores that are compared; noise only makes an ECE larger
Z80 = 0.8416212335729143  # 80 % quantile of the normal distribution: the power of `needed_images`


@dataclass(frozen=True)
class Change:
    """The differences of one head from another on the same images.

    Attributes:
        scores: by name ``value``, the difference of the scores, and its paired 95 % ``interval`` (None if resampling shows
            no spread).
        wins, losses: images that only this head classifies right, and only the other one.
        p: p value of `flip_test` that both are right equally often: McNemar's exact test where images are independent.
        p_adjusted: the same, adjusted by Holm's method for all heads that are compared with the other one.
        per_class: label, ``n``, ``wins``, ``losses``, and ``value`` and ``interval`` of the difference of the recalls.
        effect: how many images of the same groups count as one, see `Units.design`.
    """

    scores: dict[str, dict[str, Any]]
    wins: int
    losses: int
    p: float
    p_adjusted: float
    per_class: list[dict[str, Any]]
    effect: float = 1.0


@dataclass(frozen=True)
class Standing:
    """One head among others: its own scores, and its `Change` from the baseline (None for the baseline itself)."""

    scores: dict[str, float]
    change: Change | None


@staged("comparing the heads")
def paired(
    truth: NDArray[np.intp],
    outputs: Sequence[Probabilities],
    classes: Sequence[str],
    baseline: int = 0,
    units: Units | None = None,
) -> tuple[list[Standing], int]:
    """Compare each head with the baseline, on the same images.

    Args:
        truth: class index of each image ``(n,)``.
        outputs: probabilities of each head for these images, ``(n, k)``.
        classes: label of each column.
        baseline: index of the head that the others are compared with.
        units: which images belong together; by default none.

    Returns:
        A `Standing` for each head, and the number of resamples.
    """
    n, resamples, units = len(truth), resamples_for(len(truth), len(classes)), units or Units.each(len(truth))
    right = np.stack([probabilities.argmax(axis=1) == truth for probabilities in outputs])
    changes = right.astype(np.int8) - right[baseline].astype(np.int8)
    ones = np.ones((n, 1), np.float32)
    once = [_scores(truth, each, ones) | weighted_scores(truth, each, ones) for each in outputs]
    drawn: list[list[dict[str, Values]]] = [[] for _ in outputs]
    recalls: list[list[Values]] = [[] for _ in outputs]
    for weights in units.resampled(truth, resamples):
        for i, probabilities in enumerate(outputs):
            drawn[i].append(_scores(truth, probabilities, weights))
            recalls[i].append(_recall_changes(truth, changes[i], len(classes), weights))
    wins, losses = (changes > 0).sum(axis=1), (changes < 0).sum(axis=1)
    others = [i for i in range(len(outputs)) if i != baseline]
    p = {i: flip_test(units.sums(changes[i])) for i in others}
    adjusted = dict(zip(others, holm([p[i] for i in others]), strict=True))
    standings = []
    for i in range(len(outputs)):
        own = {name: float(value) for name, (value,) in once[i].items()}
        if i == baseline:
            standings.append(Standing(own, None))
            continue
        counts = int(wins[i]), int(losses[i])
        scores: dict[str, dict[str, Any]] = {}
        for name in COMPARED:
            value = own[name] - float(once[baseline][name][0])
            draws = _all(drawn[i], name) - _all(drawn[baseline], name)
            interval = difference_interval(changes[i], draws, units) if name == "accuracy" else units.bootstrap(value, draws)
            scores[name] = {"value": value, "interval": interval}
        per_class = list(_class_changes(truth, changes[i], classes, np.concatenate(recalls[i], axis=1), units))
        effect, _ = units.design(changes[i].astype(np.float64))
        standings.append(Standing(own, Change(scores, *counts, p[i], adjusted[i], per_class, effect)))
    return standings, resamples


def _scores(truth: NDArray[np.intp], probabilities: Probabilities, weights: NDArray[np.float32]) -> dict[str, Values]:
    right = (probabilities.argmax(axis=1) == truth).astype(np.float32)
    accuracy = (right @ weights).astype(np.float64) / weights.sum(axis=0, dtype=np.float64)
    decided, probable = (scores(truth, probabilities, weights) for scores in (decision_scores, probability_scores))
    return {"accuracy": accuracy, **decided, **probable}


def _recall_changes(truth: NDArray[np.intp], change: NDArray[np.int8], k: int, weights: NDArray[np.float32]) -> Values:
    """Difference of the recall of each class ``(k, b)``; NaN where no image of the class has a weight."""
    from scipy.sparse import csr_array

    def sums(values: NDArray[Any]) -> Values:
        (rows,) = np.nonzero(values)
        pick = csr_array((values[rows].astype(np.float32), (truth[rows], rows)), shape=(k, len(truth)))
        return np.asarray(pick @ weights, np.float64)

    support = sums(np.ones(len(truth)))
    return np.asarray(np.divide(sums(change), support, out=np.full(support.shape, np.nan), where=support > 0))


def _all(blocks: Sequence[dict[str, Values]], name: str) -> Values:
    return np.concatenate([block[name] for block in blocks])


def _class_changes(
    truth: NDArray[np.intp], change: NDArray[np.int8], classes: Sequence[str], drawn: Values, units: Units
) -> Iterator[dict[str, Any]]:
    for k in np.unique(truth).tolist():
        own = change[truth == k]
        n, wins, losses = len(own), int((own > 0).sum()), int((own < 0).sum())
        value = (wins - losses) / n
        interval = difference_interval(own, drawn[k], units.among(truth == k))
        yield {"label": classes[k], "n": n, "wins": wins, "losses": losses, "value": value, "interval": interval}


def difference_interval(change: NDArray[Any], drawn: Values, units: Units) -> Interval:
    """The paired bootstrap interval of the mean of ``change``, extended to `score_interval` if that is wider.

    If two heads disagree on few images, resampling shows too little spread. Images of groups have `score_interval` alone: what
    few groups hide is in its quantile, and with both it holds 98 to 99 % instead of 95.

    Args:
        change: of each image ``(n,)`` 1 if only this head is right, -1 if only the other one is, else 0.
        drawn: the mean on resamples ``(b,)``.
        units: which images belong together.
    """
    low, high = mean_change_interval(change, units)
    if not units.single:
        return low, high
    resampled_low, resampled_high = units.bootstrap(float(change.mean()), drawn) or (low, high)
    return min(low, resampled_low), max(high, resampled_high)


def mean_change_interval(change: NDArray[Any], units: Units) -> Interval:
    """`score_interval` of the mean of ``change`` by units; it may also hold fractions, which are means of several changes.

    These vary less than changes of 1 or -1, and count for more.
    """
    effect, z = units.design(change.astype(np.float64))
    if not math.isfinite(z):
        return -1.0, 1.0
    n = len(change)
    wins, losses = float(change[change > 0].sum()), -float(change[change < 0].sum())
    if change.dtype.kind == "f" and change.var() > 0:
        effect *= float(change.var()) / ((wins + losses) / n - ((wins - losses) / n) ** 2)
    return score_interval(wins / effect, losses / effect, n / effect, z)


def score_interval(wins: float, losses: float, n: float, z: float = Z95) -> Interval:
    """The 95 % interval of ``(wins - losses) / n`` from the Wilson intervals of both shares (Zou & Donner 2008).

    An image is a win, a loss or neither, so the two shares are negatively correlated.
    """
    (low, high), (low_lost, high_lost) = wilson(wins, n, z), wilson(losses, n, z)
    won, lost = wins / n, losses / n
    together = math.sqrt(won * lost / ((1 - won) * (1 - lost))) if wins and losses else 0.0

    def reach(mine: float, other: float) -> float:
        return math.sqrt(mine**2 + other**2 + 2 * together * mine * other)

    return won - lost - reach(won - low, high_lost - lost), won - lost + reach(high - won, lost - low_lost)


def flip_test(balances: NDArray[np.float64]) -> float:
    """The two-sided p value of the exact test that two heads are right equally often, by exchanging them unit by unit.

    If neither is better, the balance of a unit could as well have had the other sign. So p is the share of all choices of signs
    whose sum is at least as far from zero (Fisher's randomisation of pairs); with units of one image, McNemar's exact test.

    Args:
        balances: images of each unit that only the first head classifies correctly, less those that only the other does.

    >>> import numpy as np
    >>> from classifiers.evaluation.paired_tests import flip_test
    >>> [round(flip_test(np.array(balances)), 6) for balances in ([1, 1, 1, 1, 1, 1], [6, 0, 0])]
    [0.03125, 1.0]
    """
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    sizes, times = np.unique(np.abs(balances[balances != 0]).astype(np.int64), return_counts=True)
    law = np.ones(1)  # of half of (the sum plus the sum of all sizes)
    for size, count in zip(sizes.tolist(), times.tolist(), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        law = np.convolve(law, spread) if min(len(law), len(spread)) < 200 else fftconvolve(law, spread)
    far = np.abs(2 * np.arange(len(law)) - (len(law) - 1)) >= abs(int(balances.sum()))
    return float(np.clip(law[far].sum(), 0, 1))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for all comparisons together (Holm 1979)."""
    adjusted, least = [0.0] * len(p), 0.0
    for place, i in enumerate(np.argsort(p, kind="stable").tolist()):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = least
    return adjusted


def needed_images(discordant: float, gain: float, worthwhile: float = 0.0, comparisons: int = 1) -> float:
    """How many images decide, in four of five samples, whether a gain of accuracy is at least ``worthwhile``.

    A larger gain must be measured as one and be shown by McNemar's test at the 5 % level (Connor 1987; with the correction for
    continuity, because the test is exact). A smaller one must leave ``worthwhile`` outside of the interval of the difference.

    Args:
        discordant: share of images on which one head is right and the other wrong.
        gain: the true difference of the accuracies; infinitely many are needed if it is ``worthwhile`` itself.
        worthwhile: the smallest gain that matters; 0 for the test alone.
        comparisons: for so many heads p is adjusted.

    >>> from classifiers.evaluation.paired_tests import needed_images
    >>> [round(needed_images(0.12, gain, worthwhile=0.01)) for gain in (0.04, 0.02, 0.0)]
    [635, 2451, 9419]
    """
    from scipy.special import ndtri

    share = max(discordant, abs(gain))
    spread = math.sqrt(share - gain**2)
    if gain <= worthwhile:
        return ((Z95 + Z80) * spread / (worthwhile - gain)) ** 2 if gain < worthwhile else math.inf
    test = -float(ndtri(0.025 / comparisons)) * math.sqrt(share) + Z80 * spread
    shown = (test + math.sqrt(test**2 + 4 * gain)) / (2 * gain)
    return max(shown, Z80 * spread / (gain - worthwhile)) ** 2
