"""A two-dimensional map of features (t-SNE, or principal axes), on which similar images lie close together.

The map is for looking at, so it must cost little, whatever the machine: it has one thread, and a bound on images and steps.
scikit-learn's t-SNE has a thread for each core, and these wait for each other in a loop: on busy cores a map of 400 images took
14 core-seconds. On one thread its import and its tree still cost 0.3 more than all pairs here, a seventh of `penult train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from classifiers.heads.solvers.cosines import unit_rows
from store.format.lazy_features import LazyFeatures
from store.progress.stages import staged

POINTS = 500  # more images take seconds and show no more
FEWEST = 3
NEIGHBOURHOODS = 60  # images below which t-SNE has no neighbourhoods to keep, and principal axes are shown
AXES = 50  # principal axes that t-SNE takes, as in van der Maaten & Hinton 2008
STEPS = 500  # half of what is usual, and looks the same
EXAGGERATED = 250  # steps in which neighbours attract each other more, so that clusters form ..
EXAGGERATION = 12.0  # .. by this factor; this and the learning rate as in Belkina et al. 2019
HALVINGS = 50  # of the interval in which the width of a neighbourhood is searched
TINY = 1e-12

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureMap:
    """Positions of images on a map.

    Attributes:
        rows: which of the images are on it, rising ``(m,)``.
        points: ``(m, 2)``.
        method: its name for people, such as ``t-SNE``.
    """

    rows: NDArray[np.intp]
    points: Float32
    method: str


@staged("making the map of features")
@staged("making the map of features")
def feature_map(X: NDArray[np.floating[Any]] | LazyFeatures, seed: int = 0) -> FeatureMap | None:
    """Map features ``(n, d)``, scaled to length 1, to a plane; of many images, a seeded draw of `POINTS`.

    Returns:
        None if there are too few images, or all are the same.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(X))[:POINTS])
    chosen = unit_rows(np.asarray(X[rows]))
    axes = min(AXES, *chosen.shape)
    if len(rows) < FEWEST or axes < 2 or np.ptp(chosen, axis=0).max() <= 1e-6:
        return None
    with threadpool_limits(1):
        flat = principal_axes(chosen, axes)
        if len(rows) < NEIGHBOURHOODS:
            return FeatureMap(rows, flat[:, :2].astype(np.float32), "principal axes")
        return FeatureMap(rows, tsne(flat, min(30, len(rows) // 4)), "t-SNE")


def principal_axes(X: Float32, count: int) -> Float64:
    """The coordinates of rows ``(n, d)`` on their first principal axes ``(n, count)``; the largest of each is positive."""
    centred = X - X.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    flat = vectors[:, ::-1][:, :count] * np.sqrt(np.maximum(values[::-1][:count], 0))
    return np.asarray(flat * np.where(flat.max(axis=0) < -flat.min(axis=0), -1.0, 1.0))


def tsne(X: Float64, perplexity: float) -> Float32:
    """The positions ``(n, 2)`` of rows ``(n, d)`` by t-SNE (van der Maaten & Hinton 2008), from the first two columns on.

    Gradient descent with momentum and a gain for each coordinate; every step looks at all pairs.
    """
    p = _neighbours(X, perplexity).astype(np.float32)
    y = (X[:, :2] / max(float(X[:, 0].std()), TINY) * 1e-4).astype(np.float32)
    rate = np.float32(max(len(X) / EXAGGERATION / 4, 50.0))
    step, gains = np.zeros_like(y), np.ones_like(y)
    for i in range(STEPS):
        early = i < EXAGGERATED
        squares = (y**2).sum(axis=1)
        near = 1 / (1 + np.maximum(squares[:, None] + squares - 2 * (y @ y.T), 0))  # as Student's t with one degree of freedom
        np.fill_diagonal(near, 0)
        pull = (p * np.float32(EXAGGERATION if early else 1) - near / near.sum()) * near
        gradient = 4 * (pull.sum(axis=1)[:, None] * y - pull @ y)
        gains = np.maximum(np.where(step * gradient < 0, gains + np.float32(0.2), gains * np.float32(0.8)), np.float32(0.01))
        step = np.float32(0.5 if early else 0.8) * step - rate * gains * gradient
        y += step
    return y


def _neighbours(X: Float64, perplexity: float) -> Float64:
    """How likely each pair of rows are neighbours ``(n, n)``, of sum 1.

    The width of each neighbourhood is found by bisection, so that its entropy is that of ``perplexity`` equal neighbours.
    """
    squares = (X**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * X @ X.T, 0)
    np.fill_diagonal(distances, np.inf)
    distances -= distances.min(axis=1, keepdims=True)  # changes no share, and keeps the nearest from vanishing
    finite = np.where(np.isfinite(distances), distances, 0)
    low, high = np.zeros(len(X)), np.full(len(X), np.inf)
    narrow = 1 / np.maximum(finite.mean(axis=1), TINY)  # one over twice the variance
    for _ in range(HALVINGS):
        shares = np.exp(-distances * narrow[:, None])
        total = shares.sum(axis=1)
        entropy = np.log(total) + narrow * (shares * finite).sum(axis=1) / total
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, narrow, low), np.where(wide, high, narrow)
        narrow = np.where(np.isinf(high), 2 * narrow, (low + high) / 2)
    shares /= total[:, None]
    return np.asarray(np.maximum((shares + shares.T) / (2 * len(X)), TINY))
