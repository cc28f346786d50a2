"""Standardisation of features to mean 0 and standard deviation 1, in memory or block by block from disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import Float32
from store.format.lazy_features import LazyFeatures


def standardisation(X: NDArray[np.floating[Any]], weights: NDArray[np.float64] | None = None) -> tuple[Float32, Float32]:
    """Mean and standard deviation per feature, computed in float64; constant features keep a scale of 1."""
    if weights is None:
        mean = X.mean(axis=0, dtype=np.float64)
        scale = X.std(axis=0, dtype=np.float64)
    else:
        mean = np.average(X.astype(np.float64), axis=0, weights=weights)
        scale = np.sqrt(np.average(np.square(X - mean), axis=0, weights=weights))
    return scale_of(mean, scale)


def scale_of(mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> tuple[Float32, Float32]:
    """Mean and scale in float32, from the mean and standard deviation of each feature."""
    scale = deviation.copy()
    scale[scale < 1e-12 * np.maximum(np.abs(mean), 1e-30)] = 1.0
    scale[scale == 0] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


@dataclass(frozen=True, eq=False)
class StandardisedRows:
    """Lazy features that are standardised each time they are read."""

    features: LazyFeatures
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


def lazy_standardisation(X: LazyFeatures, weights: NDArray[np.float64] | None = None) -> tuple[Float32, Float32]:
    """`standardisation` of lazy features, in two passes."""
    weights = np.ones(len(X)) if weights is None else weights
    mean, square = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for block, rows in X.blocks():
        mean += weights[block] @ rows
    mean /= weights.sum()
    for block, rows in X.blocks():
        square += weights[block] @ np.square(rows - mean)
    return scale_of(mean, np.sqrt(square / weights.sum()))
