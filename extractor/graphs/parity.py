"""Parity of features: ONNX Runtime against torch on the same input, and distances between rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError

from .cpu_session import cpu_session
from .reasons import reason

log = logging.getLogger("penult.extractor")

PARITY = 1e-5  # relative L2 per row, of float32 on the CPU against torch on the same pixels


def check_parity(
    model: Path, batches: Sequence[NDArray[np.float32]], expected: Sequence[Sequence[NDArray[np.floating[Any]]]], name: str
) -> float:
    """Compare ONNX Runtime with torch.

    Args:
        model: the ONNX file.
        batches: its inputs.
        expected: for each batch, what torch gives for each output, ``(n, d)``.
        name: for the message.

    Returns:
        The largest relative L2 of a row.

    Raises:
        BadDataError: a row differs by more than `PARITY`, or the file does not take a batch.
    """
    session = cpu_session(model)
    largest = 0.0
    for batch, references in zip(batches, expected, strict=True):
        try:
            outputs = session.run(None, {session.get_inputs()[0].name: batch})
        except Exception as error:  # onnxruntime's exceptions have no common public base
            message = f"the exported {name} does not take a batch of {len(batch)}: {reason(error)}"
            raise BadDataError(message) from error
        worst = max(float(relative_l2(*pair).max()) for pair in zip(outputs, references, strict=True))
        log.debug("%s: ONNX Runtime against torch at batch %d: %.1e", name, len(batch), worst)
        if not worst <= PARITY:
            message = f"the exported {name} differs from torch by {worst:.1e} at batch {len(batch)}; the limit is {PARITY}"
            raise BadDataError(message)
        largest = max(largest, worst)
    return largest


def relative_l2(rows: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Relative L2 distance of each row of ``(n, d)``: norm of the difference over norm of the expected row.

    It is 0 if both are zero, and infinity instead of NaN, because `max` may ignore a NaN.
    """
    with np.errstate(invalid="ignore"):
        difference = np.linalg.norm(rows.astype(np.float64) - expected, axis=1)
    norm = np.linalg.norm(expected.astype(np.float64), axis=1)
    distance = np.divide(difference, norm, out=np.where(difference == 0, 0.0, np.inf), where=norm > 0)
    return np.asarray(np.where(np.isnan(distance), np.inf, distance))


def cosines(exact: Sequence[NDArray[np.float32]], rounded: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The cosine between two features of each image ``(n,)``; over several feature sets the smallest."""
    by_set = []
    for first, second in zip(exact, rounded, strict=True):
        a, b = first.astype(np.float64), second.astype(np.float64)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(axis=1)  # also if both are zero
        by_set.append(np.where(same, 1.0, (a * b).sum(axis=1) / np.where(norms > 0, norms, np.inf)))
    return np.asarray(np.min(by_set, axis=0))
