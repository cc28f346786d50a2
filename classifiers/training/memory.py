"""Whether the features for training fit into memory, or have to be streamed from disk."""

from __future__ import annotations

import logging
from typing import Any

from extractor.machine import default_limit, resident
from store.errors import UsageError
from store.format.lazy_features import ROWS

log = logging.getLogger("penult.classifiers")


LEAST = 4  # bytes of each number on top of the stored ones: every head converts it to float32
USUAL = 20  # as a rule: training and validation rows together, those of a fold, standardised, rotated to their axes
FLOOR = 24  # bytes of each number of a block that is read, and of the Gram matrix, with its eigenvectors


def must_stream(head: Any, rows: int, dim: int, itemsize: int, limit: int | None) -> bool:
    """Whether a head has to stream its features from disk in every step.

    Args:
        head: an unfitted one of `registry.rows`.
        rows, dim: of all features.
        itemsize: bytes of each number, as stored.
        limit: of the memory of this process, bytes; None is `default_limit`.

    Raises:
        UsageError: it has to, but cannot.
    """
    left = (default_limit() if limit is None else limit) - resident()
    numbers = rows * dim
    needed = numbers * (itemsize + (USUAL if head.streams else LEAST))
    if needed <= left:
        return False
    estimate = (
        f"{numbers / 1e6:,.0f} million numbers need about {needed / 1e9:,.1f} GB of memory, "
        f"of which {max(left, 0) / 1e9:,.1f} GB are left"
    )
    if not head.streams:
        message = (
            f"this head reads all features at once: {estimate}. Train with --head logistic (without --l1-ratio), which reads "
            f"them from disk block by block, or raise --max-memory"
        )
        raise UsageError(message)
    log.info("the features stay on disk and are read again for every step: %s (--max-memory)", estimate)
    floor = FLOOR * (ROWS + dim) * dim
    if left < floor:
        log.warning("even so, this takes about %.1f GB of memory, more than --max-memory leaves", floor / 1e9)
    return True
