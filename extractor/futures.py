"""Work that is on its way: begun a bounded number of steps ahead of whoever takes it, and handed on in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_flight(begun: Iterable[T], most: int) -> Iterator[T]:
    """What an iterable yields, such as futures that it submits as it goes; ``most`` more are on their way while one is taken.

    >>> list(in_flight([1, 2, 3], most=2))
    [1, 2, 3]
    """
    waiting: deque[T] = deque()
    for each in begun:
        waiting.append(each)
        if len(waiting) > most:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
