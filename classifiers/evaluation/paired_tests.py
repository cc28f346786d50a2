"""Paired comparison of heads on the same images: differences of scores with intervals, and McNemar's test.

All heads are resampled on the same images, so that what makes an image hard for all of them cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .intervals import Z95, Interval, bootstrap_interval, resampled, resamples_for, wilson
from .scores import Probabilities, Values, ratio, weighted_scores

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
        p: p value of McNemar's exact test that both are right equally often.
        p_adjusted: the same, adjusted by Holm's method for all heads that are compared with the other one.
        per_class: label, ``n``, ``wins``, ``losses``, and ``value`` and ``interval`` of the difference of the recalls.
    """

    scores: dict[str, dict[str, Any]]
    wins: int
    losses: int
    p: float
    p_adjusted: float
    per_class: list[dict[str, Any]]


@dataclass(frozen=True)
class Standing:
    """One head among others: its own scores, and its `Change` from the baseline (None for the baseline itself)."""

    scores: dict[str, float]
    change: Change | None


def paired(
    truth: NDArray[np.intp], outputs: Sequence[Probabilities], classes: Sequence[str], baseline: int = 0
) -> tuple[list[Standing], int]:
    """Compare each head with the baseline, on the same images.

    Args:
        truth: class index of each image ``(n,)``.
        outputs: probabilities of each head for these images, ``(n, k)``.
        classes: label of each column.
        baseline: index of the head that the others are compared with.

    Returns:
        A `Standing` for each head, and the number of resamples.
    """
    n, resamples = len(truth), resamples_for(len(truth), len(classes))
    right = np.stack([probabilities.argmax(axis=1) == truth for probabilities in outputs])
    changes = right.astype(np.int8) - right[baseline].astype(np.int8)
    once = [_scores(truth, probabilities, np.ones((n, 1), np.float32)) for probabilities in outputs]
    drawn: list[list[dict[str, Values]]] = [[] for _ in outputs]
    recalls: list[list[Values]] = [[] for _ in outputs]
    for weights in resampled(truth, resamples):
        for i, probabilities in enumerate(outputs):
            drawn[i].append(_scores(truth, probabilities, weights))
            recalls[i].append(_recall_changes(truth, changes[i], len(classes), weights))
    wins, losses = (changes > 0).sum(axis=1), (changes < 0).sum(axis=1)
    others = [i for i in range(len(outputs)) if i != baseline]
    p = {i: mcnemar(int(wins[i]), int(losses[i])) for i in others}
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
            interval = difference_interval(value, draws, *counts, n) if name == "accuracy" else bootstrap_interval(value, draws)
            scores[name] = {"value": value, "interval": interval}
        per_class = list(_class_changes(truth, changes[i], classes, np.concatenate(recalls[i], axis=1)))
        standings.append(Standing(own, Change(scores, *counts, p[i], adjusted[i], per_class)))
    return standings, resamples


def _scores(truth: NDArray[np.intp], probabilities: Probabilities, weights: NDArray[np.float32]) -> dict[str, Values]:
    right = (probabilities.argmax(axis=1) == truth).astype(np.float32)
    return {"accuracy": (right @ weights).astype(np.float64) / len(truth), **weighted_scores(truth, probabilities, weights)}


def _recall_changes(truth: NDArray[np.intp], change: NDArray[np.int8], k: int, weights: NDArray[np.float32]) -> Values:
    """Difference of the recall of each class ``(k, b)``; 0 for a class that no image has."""
    from scipy.sparse import csr_array

    (rows,) = np.nonzero(change)
    pick = csr_array((change[rows].astype(np.float32), (truth[rows], rows)), shape=(k, len(truth)))
    return ratio(np.asarray(pick @ weights), np.bincount(truth, minlength=k)[:, None] + np.zeros((1, weights.shape[1])))


def _all(blocks: Sequence[dict[str, Values]], name: str) -> Values:
    return np.concatenate([block[name] for block in blocks])


def _class_changes(
    truth: NDArray[np.intp], change: NDArray[np.int8], classes: Sequence[str], drawn: Values
) -> Iterator[dict[str, Any]]:
    for k in np.unique(truth).tolist():
        own = change[truth == k]
        n, wins, losses = len(own), int((own > 0).sum()), int((own < 0).sum())
        value = (wins - losses) / n
        interval = difference_interval(value, drawn[k], wins, losses, n)
        yield {"label": classes[k], "n": n, "wins": wins, "losses": losses, "value": value, "interval": interval}


def difference_interval(value: float, drawn: Values, wins: float, losses: float, n: int) -> Interval:
    """The paired bootstrap interval of ``value = (wins - losses) / n``, extended to `score_interval` if that is wider.

    If two heads disagree on few images, resampling shows too little spread.
    """
    low, high = score_interval(wins, losses, n)
    resampled_low, resampled_high = bootstrap_interval(value, drawn) or (low, high)
    return min(low, resampled_low), max(high, resampled_high)


def score_interval(wins: float, losses: float, n: int) -> Interval:
    """The 95 % interval of ``(wins - losses) / n`` from the Wilson intervals of both shares (Zou & Donner 2008).

    An image is a win, a loss or neither, so the two shares are negatively correlated.
    """
    (low, high), (low_lost, high_lost) = wilson(wins, n), wilson(losses, n)
    won, lost = wins / n, losses / n
    together = math.sqrt(won * lost / ((1 - won) * (1 - lost))) if wins and losses else 0.0

    def reach(mine: float, other: float) -> float:
        return math.sqrt(mine**2 + other**2 + 2 * together * mine * other)

    return won - lost - reach(won - low, high_lost - lost), won - lost + reach(high - won, lost - low_lost)


def mcnemar(wins: int, losses: int) -> float:
    """The two-sided p value of McNemar's exact test of equally many wins and losses among the images two heads disagree on."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for all comparisons together (Holm 1979)."""
    adjusted, least = [0.0] * len(p), 0.0
    for place, i in enumerate(np.argsort(p, kind="stable").tolist()):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = least
    return adjusted


def needed_images(discordant: float, difference: float) -> int:
    """How many images McNemar's test needs to show a difference of two accuracies at the 5 % level, with a power of 80 %.

    Args:
        discordant: share of images on which one head is right and the other wrong.
        difference: of the accuracies, positive. (Connor 1987.)
    """
    share = max(discordant, difference)
    root = Z95 * math.sqrt(share) + Z80 * math.sqrt(share - difference**2)
    return math.ceil((root / difference) ** 2)
