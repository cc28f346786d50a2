"""Ordered look-ahead over futures: a bounded number run ahead of the consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_flight(items: Iterable[T], most: int) -> Iterator[T]:
    """The items of an iterable in order, such as futures that it submits; ``most`` more are drawn ahead of the consumer.

    >>> list(in_flight([1, 2, 3], most=2))
    [1, 2, 3]
    """
    waiting: deque[T] = deque()
    for each in items:
        waiting.append(each)
        if len(waiting) > most:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
