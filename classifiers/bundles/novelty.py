"""Novelty scores: how far an image is from the training images, relative to the usual distance among these.

The distance is one minus the cosine to the fifth nearest training image (Sun et al. 2022, "Out-of-distribution detection with
deep nearest neighbors"). docs/metrics.md has its results on real photos, and those of the Mahalanobis distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.intervals import wilson
from classifiers.heads.solvers.cosines import nearest, unit_rows
from store.cache import Subset
from store.errors import CorruptCacheError
from store.format import hdf5
from store.format.lazy_features import LazyFeatures

ENCODING_TYPE = "penult-novelty"
REFERENCE = 2048  # training images that are kept at most: 8 MB of 2,048 features
NEIGHBOUR = 5
FALSE_ALARMS = 0.05
FEWEST = 20  # with fewer training images of other groups, a share of one in twenty means nothing


@dataclass(frozen=True)
class Novelty:
    """Reference features of training images, and the usual distance among these.

    Attributes:
        reference: features of some of them, scaled to length 1, ``(m, d)`` float32; saved as float16.
        usual: the distance that only a share ``FALSE_ALARMS`` of training images exceed; the unit of scores.
    """

    reference: NDArray[np.float32]
    usual: float

    @classmethod
    def fit(cls, fitted: Sequence[Subset], seed: int = 0) -> Self | None:
        """Learn the usual distance from everything that was fitted.

        Each image is compared with those of other groups only, because images of the same thing do not show what is usual. If
        there are more than ``REFERENCE`` images, the others are compared with these.

        Returns:
            None if there are too few images, or all are the same.
        """
        chosen = np.random.default_rng(seed).permutation(sum(map(len, fitted)))[: 2 * REFERENCE]
        X = np.empty((len(chosen), fitted[0].X.shape[1]), np.float32)
        groups = np.array([group for subset in fitted for group in subset.groups], dtype=object)[chosen]
        owners = np.unique(groups, return_inverse=True)[1]
        begin = 0
        for subset in fitted:
            here = (chosen >= begin) & (chosen < begin + len(subset))
            X[here] = unit_rows(np.asarray(subset.X[chosen[here] - begin]))
            begin += len(subset)
        judged = slice(REFERENCE, None) if len(X) >= REFERENCE + FEWEST else slice(None)
        reference = X[:REFERENCE].astype(np.float16).astype(np.float32)  # as it is saved
        distances = 1 - X[judged] @ reference.T
        distances[owners[judged][:, None] == owners[:REFERENCE]] = np.inf
        if (np.isfinite(distances).sum(axis=1) < FEWEST).any():
            return None
        radii = np.sort(np.partition(distances, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1])
        usual = float(radii[min(math.ceil((len(radii) + 1) * (1 - FALSE_ALARMS)), len(radii)) - 1])
        return cls(reference, usual) if usual > 0 else None

    def scores(self, X: NDArray[np.floating[Any]] | LazyFeatures) -> NDArray[np.float32]:
        """Distances ``(n,)`` of features ``(n, d)`` in units of ``usual``; above 1 an image is unlike the training images."""
        if isinstance(X, LazyFeatures):
            return np.concatenate([self.scores(rows) for _, rows in X.blocks()])
        cosines, _ = nearest(X, self.reference, NEIGHBOUR)
        return np.asarray((1 - cosines[:, -1]) / np.float32(self.usual))

    def to_bytes(self) -> bytes:
        """The content of ``novelty.h5``."""
        datasets = {"reference": self.reference.astype(np.float16), "usual": np.array([self.usual])}
        return hdf5.build(ENCODING_TYPE, datasets, {"rows": len(self.reference)})[0]

    @classmethod
    def load(cls, path: Path, dim: int | None = None) -> Self:
        """Read a ``novelty.h5``, for features of length ``dim`` if that is known.

        Raises:
            CorruptCacheError: the file is damaged, or is not for these.
        """
        with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, _):
            reference, usual = datasets["reference"][()].astype(np.float32), float(datasets["usual"][0])
        fits = reference.ndim == 2 and reference.shape[1] == (dim or reference.shape[1]) and len(reference) >= NEIGHBOUR
        if not fits or not np.isfinite(reference).all() or not 0 < usual < math.inf:
            message = f"{path}: features {reference.shape} and a distance of {usual:g} are no reference for these features"
            raise CorruptCacheError(message)
        return cls(reference, usual)


def novel_share(scores: NDArray[np.float32]) -> dict[str, Any]:
    """The share of images that are unlike the training images, as JSON: ``novel``, ``share``, ``interval``, ``expected``."""
    novel = int((scores > 1).sum())
    return {"novel": novel, "share": novel / len(scores), "interval": wilson(novel, len(scores)), "expected": FALSE_ALARMS}
