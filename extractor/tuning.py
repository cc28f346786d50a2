"""How many images to hand over at once, where the user leaves it open: measured, on a CPU on the very work."""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict

import numpy as np

from .fleet import Fleet
from .session import Embedder

log = logging.getLogger("penult.extractor")

WORTH = 60.0  # seconds that the backbone would take; below, measuring a GPU costs more than it gains
ROUNDS = 40  # rounds of batches, so many at least that the first look costs little
SECONDS = 0.5  # that one size is measured at least
GAIN = 1.03  # another batch size must be faster by this factor: larger ones cost memory, and a measurement is this uncertain
LARGEST = 512  # on a GPU

# On a CPU no network was seen to gain by more than 8, and ONNX Runtime keeps the memory of the largest batch it has seen.
SIZES = (4, 8, 2, 1)
TRIALS = 8  # batches of each, in turns, so that whatever else the machine does hits all of them
ENOUGH = 2 * TRIALS * sum(SIZES)  # images; with fewer there is little left to gain after the trials


class Pace:
    """The batch size of a long run on a CPU: its first batches are of several sizes in turn, the others of the fastest.

    All are real work, so nothing is spent on measuring, and each is measured beside the decoding that it shares the cores
    with. Elsewhere, and where ``images`` is 0, the size is the embedder's.

    Args:
        embedder: what computes; ``told`` is taken.
        images: how many there are to do.
    """

    def __init__(self, embedder: Embedder | Fleet, images: int = 0) -> None:
        self._embedder = embedder
        self._took: dict[int, list[float]] = defaultdict(list)
        self._begun, self._open = 0, False
        if isinstance(embedder, Embedder) and embedder.provider == "cpu" and not embedder.fixed_batch and images >= ENOUGH:
            self._open = True
            embedder.batch_size = max(SIZES)  # whatever is smaller goes through as it is
            embedder.told = self._tell

    @property
    def size(self) -> int:
        """Of the batch to be gathered next; once as many have begun as are needed, of all that follow."""
        return SIZES[self._begun % len(SIZES)] if self._open else self._embedder.batch_size

    def begin(self) -> None:
        """The batch was handed over."""
        self._begun += 1
        if self._open and min(len(self._took[size]) for size in SIZES) >= TRIALS:
            self._settle()

    def _tell(self, images: int, seconds: float) -> None:
        if self._open:
            self._took[images].append(seconds / images)

    def _settle(self) -> None:
        typical = {size: statistics.median(self._took[size]) for size in SIZES}
        best = min(SIZES, key=lambda size: typical[size] * (1.0 if size == SIZES[0] else GAIN))
        self._open = False
        self._embedder.batch_size = best
        log.info("batches of %d: %s", best, _rates({size: 1 / seconds for size, seconds in typical.items()}))


def tune(embedder: Embedder | Fleet, side: int, images: int) -> dict[int, float]:
    """Choose the batch size of a GPU by running it on noise: it doubles as long as that gains.

    Args:
        embedder: its ``batch_size`` is set.
        side: of its square input, pixels.
        images: how many there are to do.

    Returns:
        Images per second of each size that was tried; empty where nothing was measured. TensorRT builds an engine for every
        size, for minutes, and keeps the default.
    """
    default = embedder.batch_size
    if embedder.provider != "cuda" or embedder.fixed_batch or images < ROUNDS * default * embedder.lanes:
        return {}
    if images * _seconds(embedder, default, side) / (default * embedder.lanes) < WORTH:
        return {}
    best, size = default, 2 * default
    rates = {default: _rate(embedder, default, side)}
    while size <= LARGEST:
        rates[size] = _rate(embedder, size, side)
        if embedder.batch_size < size or rates[size] < GAIN * rates[best]:
            break  # it did not fit into the memory, or is hardly faster
        best, size = size, 2 * size
    embedder.batch_size = min(best, embedder.batch_size)
    log.info("batches of %d: %s", embedder.batch_size, _rates(rates))
    return rates


def _rates(rates: dict[int, float]) -> str:
    return ", ".join(f"{size} gives {rate:.1f} images/s" for size, rate in sorted(rates.items()))


def _rate(embedder: Embedder | Fleet, size: int, side: int) -> float:
    """Images per second of batches of one size in all lanes."""
    embedder.batch_size = size
    _seconds(embedder, size, side)  # what is allocated and chosen at the first call
    rounds, spent = 0, 0.0
    while spent < SECONDS:
        spent += _seconds(embedder, size, side)
        rounds += 1
    return rounds * size * embedder.lanes / spent


def _seconds(embedder: Embedder | Fleet, size: int, side: int) -> float:
    """How long one batch in every lane takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    begin = time.perf_counter()
    for future in [embedder.submit(pixels) for _ in range(embedder.lanes)]:
        future.result()
    return time.perf_counter() - begin
