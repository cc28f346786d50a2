"""How many images a CPU is handed at once, where the user leaves it open: measured on the very work."""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict

from .devices import DevicePool
from .session import Embedder

log = logging.getLogger("penult.extractor")

GAIN = 1.03  # another batch size must be faster by this factor: larger ones cost memory, and a measurement is this uncertain
# No network was seen to gain by more than 8, and ONNX Runtime keeps the memory of the largest batch it has seen.
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

    def __init__(self, embedder: Embedder | DevicePool, images: int = 0) -> None:
        self._embedder = embedder
        self._took: dict[int, list[float]] = defaultdict(list)
        self._begun = 0
        self._trying: Embedder | None = None
        if isinstance(embedder, Embedder) and embedder.provider == "cpu" and not embedder.fixed_batch and images >= ENOUGH:
            self._trying = embedder
            embedder.batch_size = max(SIZES)  # whatever is smaller goes through as it is
            embedder.told = self._tell

    @property
    def size(self) -> int:
        """Of the batch to be gathered next; once as many have begun as are needed, of all that follow."""
        return SIZES[self._begun % len(SIZES)] if self._trying else self._embedder.batch_size

    def begin(self) -> None:
        """The batch was handed over."""
        self._begun += 1
        if self._trying and min(len(self._took[size]) for size in SIZES) >= TRIALS:
            self._trying.batch_size = self._fastest()
            self._trying = None

    def _tell(self, images: int, seconds: float) -> None:
        if self._trying:
            self._took[images].append(seconds / images)

    def _fastest(self) -> int:
        typical = {size: statistics.median(self._took[size]) for size in SIZES}
        best = min(SIZES, key=lambda size: typical[size] * (1.0 if size == SIZES[0] else GAIN))
        rates = ", ".join(f"{size} gives {1 / seconds:.1f} images/s" for size, seconds in sorted(typical.items()))
        log.info("batches of %d: %s", best, rates)
        return best
