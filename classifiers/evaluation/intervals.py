"""Confidence intervals of scores: Wilson's for proportions, a stratified bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000
FEWEST_RESAMPLES = 200  # the 2.5 % quantile still has five values below it
WORK = 4 * 10**9  # about ten seconds, in resamples x images x (classes + 100); larger data gets fewer resamples
RARE = 3  # successes or failures that are so few follow Poisson's law
BLOCK = 10**7  # numbers in one block of weights: 40 MB


def wilson(successes: float, n: float, z: float = Z95) -> Interval:
    """The 95 % score interval of a proportion (Wilson 1927). Unlike the normal one it is valid at 0 and at n.

    Both are fractions where they are means of several counts, or where images count less than one (see `units`).
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def modified_wilson(successes: float, n: float, z: float = Z95) -> Interval:
    """Wilson's interval, whose bound on the side of 0 is Poisson's if at most three, and a quarter, are successes; so at n.

    Wilson's bound there excludes shares that it should hold: of those near 0.2 / n it holds 84 % (Brown, Cai & DasGupta 2001,
    "Interval estimation for a binomial proportion", section 4.1.1).
    """
    from scipy.special import gammaincinv, ndtr

    low, high = wilson(successes, n, z)
    alpha, failures, rare = 2 * float(ndtr(-z)), n - successes, min(RARE, n / 4)
    if 0 < successes <= rare:
        low = min(low, float(gammaincinv(successes, alpha)) / n)
    if 0 < failures <= rare:
        high = max(high, 1 - float(gammaincinv(failures, alpha)) / n)
    return low, high


def resamples_for(n: int, classes: int) -> int:
    """Number of bootstrap resamples for ``n`` images of so many classes."""
    return int(np.clip(WORK // (n * (classes + 100)), FEWEST_RESAMPLES, RESAMPLES))


def resampled(strata: NDArray[np.intp], count: int, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """Bootstrap samples that keep the size of each stratum, as counts of how often each row was drawn.

    Args:
        strata: the stratum of each row ``(n,)``.
        count: number of samples.
        seed: of the random draws.

    Yields:
        Weights ``(n, b)``, whole numbers, one sample a column; ``count`` columns in all.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    width = max(BLOCK // len(strata), 1)
    for begin in range(0, count, width):
        b = min(width, count - begin)
        weights = np.empty((len(strata), b), np.float32)
        for rows in members:
            drawn = rng.integers(0, len(rows), (len(rows), b)) * b + np.arange(b)
            weights[rows] = np.bincount(drawn.ravel(), minlength=len(rows) * b).reshape(len(rows), b)
        yield weights


def bootstrap_interval(estimate: float, values: NDArray[np.float64], z: float = Z95) -> Interval | None:
    """The bias-corrected percentile interval (Efron & Tibshirani 1993, section 14.3, with an acceleration of zero).

    Args:
        estimate: the score on all images.
        values: the score on each resample ``(b,)``; NaN where it was not defined, which is left out.
        z: the quantile of the normal distribution that the interval reaches.

    Returns:
        None if all values are the same: without an error to draw, resampling shows nothing about errors.
    """
    from scipy.special import ndtr, ndtri

    values = values[~np.isnan(values)]
    if not len(values) or _no_spread(values):
        return None
    same = np.isclose(values, estimate, rtol=1e-9, atol=1e-12)
    share = np.mean(np.where(same, 0.5, values < estimate))
    shift = 2 * ndtri(np.clip(share, 1 / len(values), 1 - 1 / len(values)))
    low, high = np.quantile(values, ndtr([shift - z, shift + z]))
    return float(low), float(high)


def _no_spread(values: NDArray[np.float64]) -> bool:
    return bool(np.allclose(values, values[0], rtol=1e-9, atol=1e-12))


def distance_interval(
    estimate: float, values: NDArray[np.float64], chance: NDArray[np.float64], z: float = Z95
) -> Interval | None:
    """A cautious interval for a score that is 0 at best and that noise only makes larger, such as a sum of distances.

    Each resample adds as much noise again as the sample did; percentiles mirrored at the estimate remove it (Davison & Hinkley
    1997, section 5.2). The lower bound is the mirrored one, or 0 if chance alone explains the estimate; the upper bound is the
    larger of the mirrored and the plain one.

    Args:
        estimate, values, z: as in `bootstrap_interval`.
        chance: draws of the score where its true value is zero.
    """
    from scipy.special import ndtr

    if _no_spread(values):
        return None
    low, high = np.quantile(values, ndtr([-z, z]))
    explained = estimate <= np.quantile(chance, 0.95)
    return (0.0 if explained else max(2 * estimate - float(high), 0.0)), max(2 * estimate - float(low), float(high))


def percent(value: float) -> str:
    """A share in percent, as text."""
    return f"{100 * value:.1f} %"


def interval(bounds: Sequence[float]) -> str:
    """An interval of shares in percent, as text."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def points(share: float) -> str:
    """A share in percentage points, as short as possible."""
    return f"{100 * share:.4g} point" + ("" if round(100 * share, 4) == 1 else "s")


def signed(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # adding zero makes -0 a zero


def bounds(interval: Sequence[float]) -> str:
    """An interval of differences of shares, in percentage points."""
    return f"[{signed(interval[0])}, {signed(interval[1])}]"
