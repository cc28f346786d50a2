"""From samples to decoded pixels: read, hash, decode, a bounded number ahead of whoever consumes them.

Threads read and hash; the decoding is done by the children of `decoder`.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from store.errors import InterruptedRunError
from store.samples import Row

from .decoder import Decoder
from .files import Files
from .images import ImageError
from .preprocess import Preprocess
from .progress import StopFlag
from .samples import Sample

AHEAD = 8  # decoded images per worker that wait at most

Clock = dict[str, float]  # seconds by stage


@contextmanager
def timed(clock: Clock, stage: str) -> Iterator[None]:
    """Add what the block takes to a stage."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        clock[stage] += time.perf_counter() - begin


T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Outcome:
    """What became of one file that had to be read."""

    index: int
    row: Row
    pixels: NDArray[np.uint8] | None = None  # taken away once they are on their way
    decoded: bool = False


class Reader:
    """Reads, hashes and decodes samples in a few threads, a bounded number ahead, in the order asked for.

    Args:
        files: where the samples are.
        preprocess: what happens to their pixels.
        known: content digests that need no decoding.
        workers: threads, each with a decode worker of its own.
        ahead: how many images may wait, where that is more than `AHEAD` for each worker.
    """

    def __init__(self, files: Files, preprocess: Preprocess, known: set[bytes], workers: int, ahead: int = 0) -> None:
        self._files, self._preprocess, self._workers, self._ahead = files, preprocess, workers, ahead
        self._claimed, self._lock = set(known), Lock()
        self.seconds: Clock = defaultdict(float)

    def stream(self, todo: Sequence[tuple[int, Sample]], stop: StopFlag) -> Generator[Outcome, None, None]:
        """Outcomes in the order of ``todo``; ends early when ``stop`` is set."""
        decoder = Decoder(self._preprocess, stop=stop)
        return ahead(lambda item: self._read(*item, decoder), todo, self._workers, stop, decoder, self._ahead)

    def _read(self, index: int, sample: Sample, decoder: Decoder) -> Outcome:
        begin = time.perf_counter()
        row = Row(sample.path, sample.label, sample.split, sample.group, targets=sample.targets)
        try:
            data, stat = self._files.read(sample.path)
            digest = hashlib.sha256(data).digest()
            row = replace(row, sha256=digest, stat=stat)
            if not self._claim(digest):
                return Outcome(index, row)
            return Outcome(index, row, decoder(data), decoded=True)
        except ImageError as error:
            return Outcome(index, replace(row, code=error.code, message=str(error)))
        finally:
            self.seconds["read+decode"] += time.perf_counter() - begin

    def _claim(self, digest: bytes) -> bool:
        """Whether this content is new; whoever asks first embeds it."""
        with self._lock:
            new = digest not in self._claimed
            self._claimed.add(digest)
            return new


def ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int, stop: StopFlag, decoder: Decoder, at_least: int = 0
) -> Generator[R, None, None]:
    """Results in order, computed by a few threads a bounded number of items ahead of the consumer.

    The decoder that ``function`` uses is closed at the end, before the threads are waited for: one may hang in it.
    """
    with ThreadPoolExecutor(workers, "penult-decode") as pool, decoder, suppress(InterruptedRunError):
        pending: deque[Future[R]] = deque()
        most = max(workers * AHEAD, at_least)
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= most:
                    yield pending.popleft().result()
                if stop:
                    return
            while pending and not stop:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
