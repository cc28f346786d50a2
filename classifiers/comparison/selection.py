"""What choosing the best of several costs in truth: its score without the luck, and which others it is really better than.

Of thirty equally good sources one comes first, with a score that is too high, and far ahead of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.paired_tests import flip_test, holm
from classifiers.evaluation.scores import Values, Weights
from classifiers.evaluation.units import Units

Weighted = Callable[[Weights], Values]  # a score by how often each image counts: ``(n, b)`` to ``(b,)``


def luck_of_best(weighted: Sequence[Weighted], units: Units, resamples: int) -> float:
    """By how much the score of the best source is too high (Tsamardinos, Greasidou & Borboudakis 2018, "BBC-CV").

    Of each bootstrap sample the best is chosen again, and measured on the images that are not in it. What it loses there to the
    source that is best on all images is the luck in that one's score. (In its published form the mean of these measurements
    itself is the corrected score, which is the same but for noise.)

    Args:
        weighted: the score of each source; of equal ones, the first is the best.
        units: which images belong together.
        resamples: how many samples are drawn.
    """
    n = len(units.of)
    scores = np.array([float(score(np.ones((n, 1), np.float32))[0]) for score in weighted])
    best, lost = int(scores.argmax()), []
    for weights in units.resampled(np.zeros(n, np.intp), resamples):
        inside = np.stack([score(weights) for score in weighted])
        chosen = np.where(np.isnan(inside), -np.inf, inside).argmax(axis=0)
        left_out = (weights == 0).astype(np.float32)
        filled = left_out.any(axis=0)  # of two units, every second sample has both
        if not filled.any():
            continue
        outside = np.stack([score(left_out[:, filled]) for score in weighted])
        lost.append(outside[best] - outside[chosen[filled], np.arange(outside.shape[1])])
    losses = np.concatenate([np.zeros(0), *lost])
    losses = losses[~np.isnan(losses)]
    return max(float(losses.mean()), 0.0) if len(losses) else 0.0


def all_against_first(right: Sequence[NDArray[np.bool_]], units: Units) -> list[float]:
    """The p value of each source that it is as good as the first, adjusted for all pairs; 1 for the first itself.

    The first was chosen by these images, so a test of it and one other is a test of the pair that looks most different. Holm's
    method over all pairs holds whichever pair is looked at.

    Args:
        right: of each source, which images it classifies correctly ``(n,)``.
        units: which images belong together.
    """
    pairs = list(combinations(range(len(right)), 2))
    adjusted = holm([flip_test(units.sums(right[j].astype(np.int8) - right[i])) for i, j in pairs])
    return [1.0, *(p for (i, _), p in zip(pairs, adjusted, strict=True) if i == 0)]
