"""Near copies among features: versions of one image, and frames of one burst.

Where images lie evenly in D dimensions, the distances d_1 <= d_2 <= ... of an image to the others follow one law:
j log(d_j+1 / d_j) are independent and exponential, with mean 1/D (Renyi 1953; D is the intrinsic dimension of Levina & Bickel
2004). So log(d_j+m / d_j) exceeds t with a probability of at most m exp(-D t), and an image whose first j neighbours are
further inside than that has copies: these j. D is learned from the same images, so no backbone needs a threshold of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from classifiers.heads.solvers.cosines import BLOCK, Float32, nearest, unit_rows
from store.progress.stages import Stage, staged

NEIGHBOURS = 60  # distances that are looked at
LONGEST = 30  # copies of an image; more of them look like images of their own kind
BEYOND = 4  # a gap is measured to this neighbour after it, because the next one may be near by chance
WINDOW = 9  # neighbours from which the dimension is learned
FALSE_ALARMS = 0.002  # data sets without copies in which some are seen; where images do not lie evenly it is more
FURTHEST = 0.7  # a copy is nearer than this share of the distance behind the gap, however many dimensions there are
FEWEST = 16  # images of a class; with fewer, what belongs to one class looks like copies
MOST_PRODUCTS = 4e12  # multiplications, a minute or two on two cores; beyond, only as many images as this allows
STEP = 8 * BLOCK  # images between two counts of progress
NEAREST = 1e-6  # squared distances below are rounding


@dataclass(frozen=True, eq=False)
class NearCopies:
    """What images have near copies among each other.

    Attributes:
        units: number of the unit of each image ``(n,)``: images that are copies of one another, or of others of the unit.
        rows: features ``(n, d)`` around their mean, of length 1.
        usual: distance of each image ``(n,)`` to what is not of its unit: the fifth nearest.

    >>> import numpy as np
    >>> from classifiers.near_copies import near_copies
    >>> X = np.random.default_rng(0).normal(size=(100, 32))
    >>> copies = near_copies(np.concatenate([X, X[:1] + 0.1]))
    >>> np.flatnonzero(copies.units == copies.units[0])
    array([  0, 100])
    """

    units: NDArray[np.intp]
    rows: Float32
    usual: Float32

    @property
    def sizes(self) -> NDArray[np.intp]:
        """Number of images ``(n,)`` of the unit of each image; 1 if it has no copies."""
        return np.bincount(self.units)[self.units]

    def nearest(self, row: int, others: NDArray[np.intp]) -> tuple[int, float]:
        """Which of the others is nearest to an image, and its distance as a share of the usual one."""
        distances = np.sqrt(np.maximum(2 - 2 * self.rows[others] @ self.rows[row], 0))
        best = int(distances.argmin())
        return int(others[best]), float(distances[best] / self.usual[row])


def most_images(n: int, dim: int) -> int:
    """How many of ``n`` images are searched: all, if their products are not more than `MOST_PRODUCTS`."""
    return min(n, math.isqrt(int(MOST_PRODUCTS / max(dim, 1))))


@staged("looking for near copies")
def near_copies(X: NDArray[np.floating], labels: Sequence[str] | None = None) -> NearCopies:
    """Search images for near copies among each other.

    Args:
        X: features ``(n, d)`` of images with different bytes.
        labels: the class of each image. What holds more than half of a class is the class, and no burst; and in classes of
            fewer than `FEWEST` images nothing is seen. None if there are no classes.

    Returns:
        Units, of one image each where nothing is seen. A set of copies is missed where another image is as near.
    """
    n = len(X)
    rows = unit_rows(X)
    rows = unit_rows(rows - rows.mean(axis=0)) if n else rows
    alone = np.arange(n)
    if n < FEWEST:
        return NearCopies(alone, rows, np.ones(n, np.float32))
    distances, which = _neighbours(rows)
    spacing = _spacing(distances)
    units = alone if spacing <= 0 else _units(distances, which, spacing, _classes(labels))
    return NearCopies(units, rows, _usual(units, distances, which))


def _neighbours(rows: Float32) -> tuple[Float32, NDArray[np.intp]]:
    """Distances ``(n, k)`` to the nearest others in rising order, and which they are."""
    count = min(NEIGHBOURS, len(rows) - 1)
    with Stage("searching for near copies", len(rows), "images") as stage:
        parts = []
        for begin in range(0, len(rows), STEP):
            parts.append(nearest(rows[begin : begin + STEP], rows, count + 1))
            stage.step(len(parts[-1][0]))
    cosines, which = (np.concatenate(each) for each in zip(*parts, strict=True))
    others = np.argsort(which == np.arange(len(rows))[:, None], axis=1, kind="stable")[:, :count]  # the image itself last
    cosines, which = np.take_along_axis(cosines, others, axis=1), np.take_along_axis(which, others, axis=1)
    return np.sqrt(np.maximum(2 - 2 * cosines, NEAREST)), which


def _spacing(distances: Float32) -> float:
    """1/D: the mean of j log(d_j+1 / d_j), the median over all images, over those neighbours where it is least.

    Copies widen what is near. So if most images have some, other neighbours show the dimension.
    """
    count = distances.shape[1]
    spacings = np.arange(1, count) * np.diff(np.log(distances), axis=1)
    width = min(WINDOW, (count - 1) // 2)
    return min(float(np.median(spacings[:, i : i + width].mean(axis=1))) for i in range(1, count - width, width))


def _classes(labels: Sequence[str] | None) -> NDArray[np.intp] | None:
    return None if labels is None else np.unique(np.asarray(labels), return_inverse=True)[1]


def _units(distances: Float32, which: NDArray[np.intp], spacing: float, classes: NDArray[np.intp] | None) -> NDArray[np.intp]:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    n, count = distances.shape
    logs = np.log(distances)
    longest = min(LONGEST, count - BEYOND)
    gaps = logs[:, BEYOND : BEYOND + longest] - logs[:, :longest]
    if classes is not None:
        gaps[~_within_class(which[:, :longest], classes)] = 0
    gaps = np.maximum.accumulate(gaps[:, ::-1], axis=1)[:, ::-1]  # of each neighbour the widest gap behind it
    one_way = csr_array((np.maximum(gaps, 0).ravel(), which[:, :longest].ravel(), np.arange(n + 1) * longest), shape=(n, n))
    listed = csr_array((np.ones(n * longest), one_way.indices, one_way.indptr), shape=(n, n))
    both = one_way.multiply(listed.T)  # where each is among the nearest of the other
    pairs = ((both + both.T) / 2).tocoo()  # a chance makes one of the two gaps wide, a copy makes both
    widest = np.zeros(n)
    np.maximum.at(widest, pairs.row, pairs.data)
    p = np.minimum(BEYOND * np.exp(-widest / spacing), 1)
    least = max(spacing * math.log(BEYOND / _bound(p)), -math.log(FURTHEST))
    kept = pairs.data >= least
    edges = csr_array((kept[kept], (pairs.row[kept], pairs.col[kept])), shape=(n, n))
    units = np.asarray(connected_components(edges, directed=False)[1], np.intp)
    return units if classes is None else _without_classes(units, classes)


def _without_classes(units: NDArray[np.intp], classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Units of which none holds more than half of a class; the images of one that does are alone."""
    counts = np.zeros((units.max() + 1, classes.max() + 1), np.intp)
    np.add.at(counts, (units, classes), 1)
    whole = np.asarray((2 * counts > np.bincount(classes)).any(axis=1))[units]
    alone = units.max() + 1 + np.arange(len(units))
    return np.asarray(np.unique(np.where(whole, alone, units), return_inverse=True)[1], np.intp)


def _bound(p: NDArray[np.float64]) -> float:
    """The largest p that is significant (Benjamini & Hochberg 1995): the more copies there are, the less each must show.

    Without any copies, one is seen in a share `FALSE_ALARMS` of data sets.
    """
    allowed = FALSE_ALARMS * np.arange(1, len(p) + 1) / len(p)
    significant = np.flatnonzero(np.sort(p) <= allowed)
    return float(allowed[significant[-1] if len(significant) else 0])


def _within_class(which: NDArray[np.intp], classes: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether an image with its first j + 1 neighbours ``(n, j)`` holds at most half of each class, and its class is large."""
    sizes, mine, theirs = np.bincount(classes), classes[:, None], classes[which]
    fits = np.empty(which.shape, bool)
    for j in range(which.shape[1]):
        last = theirs[:, j : j + 1]
        counts = (theirs[:, : j + 1] == last).sum(axis=1) + (mine == last)[:, 0]
        own = (theirs[:, : j + 1] == mine).sum(axis=1) + 1
        fits[:, j] = (2 * counts <= sizes[last[:, 0]]) & (2 * own <= sizes[classes])
    return np.logical_and.accumulate(fits, axis=1) & (sizes[mine] >= FEWEST)


def _usual(units: NDArray[np.intp], distances: Float32, which: NDArray[np.intp]) -> Float32:
    """The distance to the fifth nearest image of another unit, or to the furthest that is known."""
    outside = np.cumsum(units[which] != units[:, None], axis=1)
    fifth = np.minimum((outside <= BEYOND).sum(axis=1), distances.shape[1] - 1)
    return np.asarray(distances[np.arange(len(units)), fifth])
