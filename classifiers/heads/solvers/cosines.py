"""Rows scaled to length 1, and the nearest references of each row by cosine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Nearest = tuple[Float32, NDArray[np.intp]]  # cosines (n, count) in falling order, and the indices of their references

SHORTEST = 1e-12  # a row is divided by at least this, so that a row of zeros stays zero
BLOCK = 256  # rows whose cosines with every reference are in memory at once


def unit_rows(X: NDArray[np.floating[Any]]) -> Float32:
    """Rows of ``(n, d)`` scaled to length 1, float32; a row of zeros stays zero."""
    wide = np.asarray(X, np.float32)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), SHORTEST), np.float32)


def nearest(X: NDArray[np.floating[Any]], references: NDArray[np.floating[Any]], count: int) -> Nearest:
    """The references nearest to each row by cosine, computed in blocks of rows.

    Args:
        X: ``(n, d)``, of any length.
        references: ``(m, d)``, of length 1 (`unit_rows`), m at least ``count``.
        count: number of nearest references.
    """
    wide = references.astype(np.float32, copy=False).T
    cosines = np.empty((len(X), count), np.float32)
    which = np.empty((len(X), count), np.intp)
    for start in range(0, len(X), BLOCK):
        rows = slice(start, start + BLOCK)
        products = unit_rows(X[rows]) @ wide
        top = np.argpartition(-products, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(products, top, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        cosines[rows] = np.take_along_axis(values, order, axis=1)
        which[rows] = np.take_along_axis(top, order, axis=1)
    return cosines, which
