"""Whether the features of a training fit into memory."""

from __future__ import annotations

import logging
from typing import Any

from extractor.machine import default_limit, resident
from store.errors import UsageError
from store.format.lazy_features import ROWS

log = logging.getLogger("penult.classifiers")


LEAST = 4  # bytes of each number, on top of those that are stored: every head makes float32 of it
USUAL = 20  # as a rule: training and validation rows together, those of a fold, standardised, turned to their axes
FLOOR = 24  # bytes of each number of a block that is read, and of the Gram matrix, with its eigenvectors


def must_stream(head: Any, rows: int, dim: int, itemsize: int, limit: int | None) -> bool:
    """Whether a head has to read its features from disk again and again.

    Args:
        head: an unfitted one of `registry.rows`.
        rows, dim: of all features.
        itemsize: bytes of each number, as stored.
        limit: of the memory of this process, bytes; None is `default_limit`.

    Raises:
        UsageError: it has to, and cannot.
    """
    left = (default_limit() if limit is None else limit) - resident()
    numbers = rows * dim
    needed = numbers * (itemsize + (USUAL if head.streams else LEAST))
    if needed <= left:
        return False
    found = (
        f"{numbers / 1e6:,.0f} million numbers need about {needed / 1e9:,.1f} GB of memory, "
        f"of which {max(left, 0) / 1e9:,.1f} GB are left"
    )
    if not head.streams:
        message = (
            f"this head reads all features at once: {found}. Train with --head logistic (without --l1-ratio), which reads them "
            f"from disk block by block, or raise --max-memory"
        )
        raise UsageError(message)
    log.info("the features stay on disk and are read anew for every step: %s (--max-memory)", found)
    floor = FLOOR * (ROWS + dim) * dim
    if left < floor:
        log.warning("that takes about %.1f GB of memory all the same, more than --max-memory leaves", floor / 1e9)
    return True
