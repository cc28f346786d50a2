"""The ranges that 8 bits cover for each tensor of a network, chosen from observed values by one of several methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TINY = 1e-12  # the reach of a tensor that is 0 everywhere
METHODS = ("min-max", "percentile 99.999", "percentile 99.99", "least squares")
BINS = 4096  # a multiple of 4
VALUES = 32768  # of each tensor and image, so that a large network takes seconds


@dataclass
class Histogram:
    """The values of a tensor, added array by array.

    Attributes:
        low, high: least and greatest value.
        reach: of the `BINS` equal bins, from ``-reach`` to ``reach``; it doubles when it is exceeded.
        counts: of some of the values, by bin.
    """

    low: float = np.inf
    high: float = -np.inf
    reach: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> bool:
        """Add the values of an image; return whether all of them are finite, else nothing is added."""
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-self.low, self.high, TINY)
        self.reach = self.reach or largest
        while self.reach < largest:
            self.reach *= 2
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, BINS // 4)
        some = values.ravel()[:: -(-values.size // VALUES)]
        self.counts += histogram(some, self.reach)
        return True


@dataclass(frozen=True)
class Observed:
    """Observed values of the tensors of a float network.

    Attributes:
        histograms: of each tensor by name.
        followers: output of the activation by the name of its input, if nothing else uses that: both share a range.
    """

    histograms: Mapping[str, Histogram]
    followers: Mapping[str, str]


def ranges(observed: Observed, method: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The range of every tensor by one of `METHODS`; values beyond it will saturate."""
    chosen = {}
    for name, values in observed.histograms.items():
        low, high, counts = values.low, values.high, values.counts
        edges = np.linspace(-values.reach, values.reach, BINS + 1)
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


def histogram(values: NDArray[np.float32], reach: float) -> NDArray[np.int64]:
    """Counts of values in `BINS` equal bins from ``-reach`` to ``reach``, beyond which there must be none.

    ``numpy.histogram`` takes five times as long.
    """
    places = values + np.float32(reach)
    places *= np.float32(BINS / (2 * reach))
    counts = np.bincount(places.astype(np.intp), minlength=BINS + 1)
    counts[BINS - 1] += counts[BINS]  # of what is at the last edge
    return np.asarray(counts[:BINS], np.int64)


def _least_squares(counts: NDArray[np.int64], edges: NDArray[np.float64], low: float, high: float) -> tuple[float, float]:
    """The range, narrowed by one factor on both sides, with the least expected squared error of rounding and saturation."""
    centres = (edges[1:] + edges[:-1]) / 2

    def error(factor: float) -> float:
        a, b = low * factor, high * factor
        lost = np.where((centres < a) | (centres > b), (centres - np.clip(centres, a, b)) ** 2, ((b - a) / 255) ** 2 / 12)
        return float((counts * lost).sum())

    best = min(np.linspace(1, 0.2, 81).tolist(), key=error)
    return low * best, high * best
