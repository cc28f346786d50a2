"""How many threads BLAS gets: for small features, waiting for each other costs them more than they gain."""

from __future__ import annotations

from typing import Any

from threadpoolctl import threadpool_limits

SMALL = 2**22  # numbers; on 1,100 x 512 features two threads took 8 times as long as one


def threads_for(numbers: int) -> Any:
    """A context in which BLAS has one thread where there are few numbers, and else as many as it had."""
    return threadpool_limits(1 if numbers < SMALL else None)
