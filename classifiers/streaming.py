"""Training on more features than fit into memory: how much there is, who can do with less, and rows that are read each time."""

from __future__ import annotations

import logging
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.stored import ROWS, StoredFeatures

from .dense import Float32, scale_of, validation_targets
from .folds import Fold

log = logging.getLogger("penult.classifiers")

LEAST = 4  # bytes of each number, on top of those that are stored: every head makes float32 of it
USUAL = 20  # as a rule: training and validation rows together, those of a fold, standardised, turned to their axes
FLOOR = 24  # bytes of each number of a block that is read, and of the Gram matrix, with its eigenvectors


def default_limit() -> int:
    """Half of the memory that the machine has to give, or the control group; bytes."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # macOS
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(facts["MemAvailable"].removesuffix("kB")) * 1024
    with suppress(OSError, ValueError):  # no control group, or one whose limit is "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available // 2


def resident() -> int:
    """Bytes of memory that this process has now."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and the most there ever was


def must_stream(head: Any, rows: int, dim: int, itemsize: int, limit: int | None) -> bool:
    """Whether a head has to read its features from disk again and again.

    Args:
        head: an unfitted one of `heads.rows`.
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


@dataclass(frozen=True, eq=False)
class StandardisedRows:
    """Stored features less their mean, over their scale, each time they are read."""

    features: StoredFeatures
    mean: Float32
    scale: Float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.features.shape

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice) -> Float32:
        block = np.asarray(self.features[rows], np.float32)
        block -= self.mean
        block /= self.scale
        return block


def stored_standardisation(X: StoredFeatures, weights: NDArray[np.float64] | None = None) -> tuple[Float32, Float32]:
    """As `dense.standardisation`, in two passes."""
    weights = np.ones(len(X)) if weights is None else weights
    mean, square = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for block, rows in X.blocks():
        mean += weights[block] @ rows
    mean /= weights.sum()
    for block, rows in X.blocks():
        square += weights[block] @ np.square(rows - mean)
    return scale_of(mean, np.sqrt(square / weights.sum()))


def stored_with_validation(
    X: StoredFeatures,
    targets: NDArray[np.intp],
    validation: tuple[StoredFeatures, Any],
    classes: NDArray[Any],
    views: int = 1,
) -> tuple[StoredFeatures, NDArray[np.intp], list[Fold]]:
    """As `dense.with_validation`, in the order on disk; the views of an image stay together."""
    held, labels = validation
    every = X.joined(held)
    order = every.order_of_runs(views)
    fold = np.flatnonzero(order < len(X)), np.flatnonzero(order >= len(X))
    return every[order], np.concatenate([targets, validation_targets(labels, classes)])[order], [fold]
