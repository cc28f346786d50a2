"""The number of BLAS threads: one for small features, where waiting for each other costs more than several threads gain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import threadpool_info, threadpool_limits

from extractor.futures import in_flight

SMALL = 2**22  # numbers; on 1,100 x 512 features two threads took 8 times as long as one
SHARE = 4  # blocks for each core: with fewer, the last ones leave cores idle

T = TypeVar("T")
R = TypeVar("R")


def threads_for(numbers: int) -> Any:
    """A context in which BLAS has one thread if there are few numbers, otherwise as many as before."""
    return threadpool_limits(1 if numbers < SMALL else None)


def side_by_side(function: Callable[[T], R], blocks: Sequence[T]) -> Iterator[R]:
    """Results of a function for each block, in order.

    If there are many blocks, as many threads as BLAS has take one block each, so that work other than matrix products is
    parallel, too.
    """
    threads = 1
    if len(blocks) >= SHARE * 2:  # the query takes a millisecond
        threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    if threads == 1 or len(blocks) < SHARE * threads:
        yield from map(function, blocks)
        return
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads, "penult-blocks") as pool:
        for future in in_flight((pool.submit(function, block) for block in blocks), 2 * threads):
            yield future.result()
