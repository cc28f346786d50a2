"""Automatic batch size on a CPU, measured during the first batches of a run."""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict

from .devices import DevicePool
from .session import Embedder

log = logging.getLogger("penult.extractor")

GAIN = 1.03  # another batch size must be faster by this factor: larger ones cost memory, and a measurement is this uncertain
# No network gained from more than 8, and ONNX Runtime keeps the memory of the largest batch.
SIZES = (4, 8, 2, 1)
TRIALS = 8  # batches of each size, in turn, so that other load on the machine affects all of them
ENOUGH = 2 * TRIALS * sum(SIZES)  # images; with fewer there is little left to gain after the trials


class Pace:
    """The batch size of a long run on a CPU: several sizes in turn for the first batches, then the fastest.

    All batches are real work, so measuring costs nothing, and they are measured beside the decoding that shares the cores.
    On other devices, and if ``images`` is 0, the size is the embedder's.

    Args:
        embedder: what computes; its ``on_batch`` is set.
        images: number of images in the run.
    """

    def __init__(self, embedder: Embedder | DevicePool, images: int = 0) -> None:
        self._embedder = embedder
        self._seconds: dict[int, list[float]] = defaultdict(list)
        self._batches = 0
        self._trying: Embedder | None = None
        if isinstance(embedder, Embedder) and embedder.shares_cores and not embedder.pads and images >= ENOUGH:
            self._trying = embedder
            embedder.batch_size = max(SIZES)  # smaller batches are run as they are
            embedder.on_batch = self._record

    @property
    def size(self) -> int:
        """Images in the next batch; after the trials, in all that follow."""
        return SIZES[self._batches % len(SIZES)] if self._trying else self._embedder.batch_size

    def begin(self) -> None:
        """Count a batch that is handed over."""
        self._batches += 1
        if self._trying and min(len(self._seconds[size]) for size in SIZES) >= TRIALS:
            self._trying.batch_size = self._fastest()
            self._trying = None

    def _record(self, images: int, seconds: float) -> None:
        if self._trying:
            self._seconds[images].append(seconds / images)

    def _fastest(self) -> int:
        typical = {size: statistics.median(self._seconds[size]) for size in SIZES}
        best = min(SIZES, key=lambda size: typical[size] * (1.0 if size == SIZES[0] else GAIN))
        rates = ", ".join(f"{size} gives {1 / seconds:.1f} images/s" for size, seconds in sorted(typical.items()))
        log.info("batches of %d: %s", best, rates)
        return best
