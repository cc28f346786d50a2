"""A two-dimensional map of features (t-SNE, or principal axes), on which similar images lie close together.

The map is for looking at, so it must cost little, whatever the machine: it has one thread, and a bound on images and steps.
scikit-learn's t-SNE takes a thread for each core, and these wait for each other in a loop: on busy cores a map of 400 images
took 14 core-seconds; one thread takes 0.8 everywhere.
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
ITERATIONS = 400  # of 1,000, which look the same


@dataclass(frozen=True)
class FeatureMap:
    """Positions of images on a map.

    Attributes:
        rows: which of the images are on it, rising ``(m,)``.
        points: ``(m, 2)``.
        method: its name for people, such as ``t-SNE``.
    """

    rows: NDArray[np.intp]
    points: NDArray[np.float32]
    method: str


@staged("making the map of features")
def feature_map(X: NDArray[np.floating[Any]] | LazyFeatures, seed: int = 0) -> FeatureMap | None:
    """Map features ``(n, d)``, scaled to length 1, to a plane; of many images, a seeded draw of `POINTS`.

    Returns:
        None if there are too few images, or all are the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = np.sort(np.random.default_rng(seed).permutation(len(X))[:POINTS])
    chosen = unit_rows(np.asarray(X[rows]))
    axes = min(AXES, *chosen.shape)
    if len(rows) < FEWEST or axes < 2 or np.ptp(chosen, axis=0).max() <= 1e-6:
        return None
    with threadpool_limits(1):
        flat = PCA(axes, svd_solver="randomized", random_state=seed).fit_transform(chosen)
        if len(rows) < NEIGHBOURHOODS:
            return FeatureMap(rows, flat[:, :2], "principal axes")
        perplexity = min(30, len(rows) // 4)
        points = TSNE(2, perplexity=perplexity, init="pca", max_iter=ITERATIONS, random_state=seed).fit_transform(flat)
    return FeatureMap(rows, points, "t-SNE")
