"""The reader of samples: reads, hashes and decodes images in threads, a bounded number ahead of the consumer.

Threads read and hash; the child processes of `decoder` decode.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from threading import Lock, Semaphore
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extractor.futures import in_flight
from extractor.machine import Clock, cores
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import ImageError
from extractor.pixels.preprocess import Preprocess
from extractor.pixels.views import Views
from extractor.signals import StopFlag
from store.errors import InterruptedRunError
from store.format.samples import Row

from .files import Files
from .samples import Sample

AHEAD = 8  # most decoded images that wait, per worker
WINDOW = 1.0  # seconds after which a pool checks whether it is too small ..
STARVED = 0.2  # .. which it is when the consumer waited for this share of them


T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Outcome:
    """The outcome of one file that had to be read; pixels are ``(crop, crop, 3)``, or of views ``(views, crop, crop, 3)``."""

    index: int
    row: Row
    pixels: NDArray[np.uint8] | None = None  # removed once they are passed on
    decoded: bool = False


class Reader:
    """Reads, hashes and decodes samples in a few threads, a bounded number ahead, in order.

    Args:
        files: where the samples are.
        preprocess: what happens to their pixels.
        known: content digests that need no decoding.
        workers: the threads, each with a decode worker of its own.
        ahead: how many images may wait, if that is more than `AHEAD` for each worker.
        views: drawn of each image in the threads: a decode worker has neither the memory nor the time to import torchvision.
    """

    def __init__(
        self,
        files: Files,
        preprocess: Preprocess,
        known: set[bytes],
        workers: WorkerPool,
        ahead: int = 0,
        views: Views | None = None,
    ) -> None:
        self._files, self._preprocess, self._workers, self._ahead = files, preprocess, workers, ahead
        self._views = views
        self._claimed, self._lock = set(known), Lock()
        self.seconds: Clock = defaultdict(float)

    def stream(
        self, todo: Sequence[tuple[int, Sample]], stop: StopFlag, decoder: Decoder | None = None
    ) -> Generator[Outcome, None, None]:
        """Outcomes in the order of ``todo``; ends early when ``stop`` is set.

        The decoder is closed at the end, also one from the caller, which must not crop if there are views.
        """
        decoder = decoder or Decoder(self._preprocess, crop=self._views is None, stop=stop)
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
            pixels = decoder(data)
            if self._views:
                pixels = self._views.pixels(Image.fromarray(pixels), digest, self._preprocess)
            return Outcome(index, row, pixels, decoded=True)
        except ImageError as error:
            return Outcome(index, replace(row, code=error.code, message=str(error)))
        finally:
            self.seconds["read+decode"] += time.perf_counter() - begin

    def _claim(self, digest: bytes) -> bool:
        """Whether this content is new; the first caller embeds it."""
        with self._lock:
            new = digest not in self._claimed
            self._claimed.add(digest)
            return new


def ahead(
    function: Callable[[T], R], items: Iterable[T], workers: WorkerPool, stop: StopFlag, decoder: Decoder, at_least: int = 0
) -> Generator[R, None, None]:
    """Results in order, computed by a few threads a bounded number of items ahead of the consumer.

    The decoder that ``function`` uses is closed at the end, before the threads are waited for: one may hang in it.
    """
    with ThreadPoolExecutor(workers.most, "penult-decode") as pool, decoder, suppress(InterruptedRunError):
        futures = (pool.submit(workers.work, function, item) for item in takewhile(lambda _: not stop, items))
        try:
            for future in in_flight(futures, max(workers.most * AHEAD, at_least) - 1):
                if stop:
                    return
                yield workers.wait(future)
        finally:
            workers.close()
            pool.shutdown(wait=False, cancel_futures=True)


class WorkerPool:
    """Limits how many threads work: a fixed number, or as many as the consumer needs.

    More decode workers than are needed take time from the backbone on the same cores, and each costs half a second to start.
    So half of the cores decode at first, and their number doubles when the consumer waits for them. Beside a backbone that
    computes elsewhere, all of them decode from the beginning.

    Args:
        workers: how many; None for as many as needed, up to one per core.
        shares_cores: whether the backbone computes on the same cores.
    """

    def __init__(self, workers: int | None = None, *, shares_cores: bool = True) -> None:
        self.most = workers or cores()
        self.size = self.most if workers or not shares_cores else max(self.most // 2, 1)
        self._gate = Semaphore(self.size)
        self._since, self._waited = 0.0, 0.0

    def work(self, function: Callable[[T], R], item: T) -> R:
        with self._gate:
            return function(item)

    def wait(self, future: Future[R]) -> R:
        """The result of a future; adds workers if too much time was spent waiting."""
        begin = time.perf_counter()
        result = future.result()
        now = time.perf_counter()
        if not self._since:  # the first one waits for a worker to start
            self._since = now
        elif self.size < self.most:
            self._waited += now - begin
            if now - self._since > WINDOW:
                if self._waited > STARVED * (now - self._since):
                    self._grow(min(2 * self.size, self.most))
                self._since, self._waited = now, 0.0
        return result

    def _grow(self, size: int) -> None:
        self._gate.release(size - self.size)
        self.size = size

    def close(self) -> None:
        """Release all threads that wait for their turn."""
        self._gate.release(self.most)
