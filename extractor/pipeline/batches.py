"""The main loop of an extraction: decoded images to features in batches, and batches to shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from extractor.data.reader import Outcome
from extractor.futures import in_flight
from extractor.machine import Clock, timed
from extractor.runtime.batch_size import Pace
from extractor.runtime.devices import DevicePool
from extractor.runtime.session import Embedder
from store.format.samples import Row
from store.progress.stages import Stage
from store.writer import CacheWriter

AHEAD = 2  # batches under way per lane at most: results are taken in order, and a slow one must not idle the other lanes


@dataclass
class Embedded:
    """Outcomes in the order of the stream, and features of those that have pixels.

    Each feature set is ``(n, d)``, or ``(n, views, d)`` if images have several views.
    """

    outcomes: list[Outcome]
    features: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def computed(self) -> list[Row]:
        return [outcome.row for outcome in self.outcomes if outcome.decoded]


def embedded(
    stream: Iterator[Outcome],
    embedder: Embedder | DevicePool,
    pace: Pace,
    progress: Stage,
    clock: Clock,
    *,
    views: int = 1,
    fail_fast: bool = False,
) -> Iterator[Embedded]:
    """Pass decoded images through the backbone in batches; while the lanes compute, the next batch is gathered.

    Every view counts in the size of a batch, so the views of an image may be in several batches: it is yielded with the last.
    With ``fail_fast`` it ends at the first failed input, which is then the last outcome.
    """
    gathered: deque[tuple[Outcome, int]] = deque()  # each with the number of views up to its last one
    waiting: deque[NDArray[np.uint8]] = deque()
    came = sent = 0
    unfinished: list[NDArray[np.float32]] = []  # features of an image whose other views are under way

    def launch(size: int) -> tuple[list[Outcome], Future[list[NDArray[np.float32]]]]:
        nonlocal sent
        batch = np.stack([waiting.popleft() for _ in range(size)])
        sent += size
        complete = []
        while gathered and gathered[0][1] <= sent:
            complete.append(gathered.popleft()[0])
        future = embedder.submit(batch)
        pace.begin()
        return complete, future

    def launched() -> Iterator[tuple[list[Outcome], Future[list[NDArray[np.float32]]]]]:
        nonlocal came
        while True:
            with timed(clock, "wait"):
                outcome = next(stream, None)
            if outcome is None:
                break
            known = outcome.row.ok and outcome.pixels is None
            (progress.skip if known else progress.step)()
            if outcome.pixels is not None:
                waiting.extend(outcome.pixels.reshape(-1, *outcome.pixels.shape[-3:]))
                came += views
                outcome.pixels = None
            gathered.append((outcome, came))
            if fail_fast and not outcome.row.ok:
                break
            while len(waiting) >= (size := pace.size):
                yield launch(size)
        if waiting:
            yield launch(len(waiting))

    def land(outcomes: list[Outcome], future: Future[list[NDArray[np.float32]]]) -> Embedded:
        nonlocal unfinished
        with timed(clock, "embed"):
            features = future.result()
        if views == 1:
            return Embedded(outcomes, features)
        rows = [np.concatenate(parts) for parts in zip(unfinished, features, strict=True)] if unfinished else features
        whole = len(rows[0]) // views * views
        unfinished = [each[whole:] for each in rows]
        return Embedded(outcomes, [each[:whole].reshape(-1, views, each.shape[1]) for each in rows])

    for outcomes, future in in_flight(launched(), AHEAD * embedder.lanes - 1):
        yield land(outcomes, future)
    if gathered:
        yield Embedded([outcome for outcome, _ in gathered])


@dataclass
class ShardResult:
    """The outcomes that one call of `run_shard` finished, and how many images were computed."""

    outcomes: list[Outcome]
    computed: int


def run_shard(batches: Iterator[Embedded], writer: CacheWriter, clock: Clock) -> ShardResult | None:
    """Take batches until a shard is due, and begin to commit it; None when there are no more.

    The shard is written while the next one is computed; `CacheWriter.settle` says whether that worked. Repeating it is
    harmless: rows are keyed by content, and only a committed shard counts.
    """
    result = ShardResult([], 0)
    while not writer.due:
        batch = next(batches, None)
        if batch is None:
            break
        result.outcomes += batch.outcomes
        if rows := batch.computed:
            writer.append(batch.features, [row.sha256 for row in rows], [row.path for row in rows])
            result.computed += len(rows)
    with timed(clock, "settle"):
        writer.commit_behind()
    return result if result.outcomes else None
