"""Automatic batch size on a CPU, measured during the first batches of a run."""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from .devices import DevicePool
from .session import Embedder

log = logging.getLogger("penult.extractor")

GAIN = 1.03  # another batch size must be faster by this factor: larger ones cost memory, and a measurement is this uncertain
# Half or twice the size makes at most this difference: a batch costs something, and something for each image. Where other work
# takes the cores, more was measured: 17, 176, 34 and 34 images/s for batches of 1, 2, 4 and 8.
PLAUSIBLE = 2.0
# No network gained from more than 8, and ONNX Runtime keeps the memory of the largest batch.
SIZES = (4, 8, 2, 1)
TRIALS = 8  # batches of each size, in turn, so that other load on the machine affects all of them
WINS = 7  # turns in which another size must be faster than the default: of equal ones, 4 % are (sign test)
ENOUGH = 2 * TRIALS * sum(SIZES)  # images; with fewer there is little left to gain after the trials


class Pace:
    """The batch size of a long run on a CPU: several sizes in turn for the first batches, then the one that is always faster.

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
        best = choose({size: seconds[:TRIALS] for size, seconds in self._seconds.items()})
        typical = {size: statistics.median(self._seconds[size]) for size in SIZES}
        rates = ", ".join(f"{size} gives {1 / seconds:.1f} images/s" for size, seconds in sorted(typical.items()))
        fastest = min(typical, key=typical.__getitem__)
        doubt = f"; the advantage of {fastest} is not certain" if typical[best] > GAIN * typical[fastest] else ""
        log.info("batches of %d: %s%s", best, rates, doubt)
        return best


def choose(seconds: Mapping[int, Sequence[float]]) -> int:
    """The batch size to go on with: the first of `SIZES`, unless another is faster by enough, in nearly every turn, and not by
    more than can be.

    Args:
        seconds: for an image, by batch size, in `TRIALS` turns.

    >>> turns = {4: [0.10] * 8, 8: [0.08] * 8, 2: [0.02] * 8, 1: [0.12] * 8}
    >>> choose(turns)
    8
    """
    default = SIZES[0]
    typical = {size: statistics.median(each) for size, each in seconds.items()}

    def trusted(size: int) -> bool:
        turns = zip(seconds[size], seconds[default], strict=True)
        neighbours = [typical[each] for each in (size // 2, 2 * size) if each in typical]
        steady = sum(mine < theirs for mine, theirs in turns) >= WINS
        return steady and typical[size] * GAIN < typical[default] and typical[size] * PLAUSIBLE >= max(neighbours)

    return min((size for size in SIZES if size == default or trusted(size)), key=typical.__getitem__)
