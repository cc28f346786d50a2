"""The ranges that 8 bits cover for each tensor of a network, chosen from observed values by one of several methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

METHODS = ("min-max", "percentile 99.999", "percentile 99.99", "least squares")
BINS = 2048


@dataclass(frozen=True)
class Observed:
    """Observed values of the tensors of a float network.

    Attributes:
        low, high: least and greatest value of each tensor by name.
        counts: histogram of `BINS` equal bins, from -r to r where r is `reach_of` these.
        followers: output of the activation by the name of its input, if nothing else uses that: both share a range.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    counts: Mapping[str, NDArray[np.int64]]
    followers: Mapping[str, str]


def ranges(observed: Observed, method: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The range of every tensor by one of `METHODS`; values beyond it will saturate."""
    chosen = {}
    for name, counts in observed.counts.items():
        low, high = observed.low[name], observed.high[name]
        reach = reach_of(low, high)
        edges = np.linspace(-reach, reach, BINS + 1)
        if method.startswith("percentile"):
            beyond = (1 - float(method.split()[1]) / 100) / 2
            share = np.cumsum(counts) / counts.sum()
            narrow = edges[np.searchsorted(share, beyond)], edges[min(int(np.searchsorted(share, 1 - beyond)) + 1, BINS)]
        elif method == "least squares":
            narrow = _least_squares(counts, edges, min(low, 0.0), max(high, 0.0))
        else:
            narrow = low, high
        chosen[name] = np.array(max(low, narrow[0]), np.float32), np.array(min(high, narrow[1]), np.float32)
    return chosen | {name: chosen[of] for name, of in observed.followers.items() if of in chosen}


def reach_of(low: float, high: float) -> float:
    """The greatest absolute value, at least a tiny one."""
    return max(-low, high, 1e-12)


def histogram(values: NDArray[np.float32], reach: float) -> NDArray[np.int64]:
    """Counts of values in `BINS` equal bins from ``-reach`` to ``reach``; ``numpy.histogram`` takes three times as long."""
    places = ((values + np.float32(reach)) * np.float32(BINS / (2 * reach))).clip(0, BINS - 1).astype(np.int32)
    return np.asarray(np.bincount(places, minlength=BINS), np.int64)


def _least_squares(counts: NDArray[np.int64], edges: NDArray[np.float64], low: float, high: float) -> tuple[float, float]:
    """The range, narrowed by one factor on both sides, with the least expected squared error of rounding and saturation."""
    centres = (edges[1:] + edges[:-1]) / 2

    def error(factor: float) -> float:
        a, b = low * factor, high * factor
        lost = np.where((centres < a) | (centres > b), (centres - np.clip(centres, a, b)) ** 2, ((b - a) / 255) ** 2 / 12)
        return float((counts * lost).sum())

    best = min(np.linspace(1, 0.2, 81).tolist(), key=error)
    return low * best, high * best
