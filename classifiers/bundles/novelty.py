"""Novelty scores: how far an image is from the training images, relative to the usual distance among these.

The distance is one minus the cosine to the fifth nearest training image (Sun et al. 2022, "Out-of-distribution detection with
deep nearest neighbors"). docs/metrics.md has its results on real photos, and those of the Mahalanobis distance.

One bound for all images is wrong for a class that has few of them: the fifth nearest of its images is often of another class.
Such a class has a bound of its own, on the distance to its nearest image: the limit below which a new image lies with 95 %,
if the logarithms of these distances are normal (the prediction interval of Hahn 1969, "Factors for calculating two-sided
prediction intervals"). Their spread is that of all classes together, because a handful of images does not show it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.units import Units
from classifiers.heads.solvers.cosines import BLOCK, nearest, unit_rows
from extractor.data.samples import in_words
from store.cache import Subset
from store.errors import CorruptCacheError
from store.format import hdf5
from store.format.lazy_features import LazyFeatures
from store.progress.stages import staged

log = logging.getLogger("penult.classifiers")

ENCODING_TYPE = "penult-novelty"
REFERENCE = 2048  # training images that are kept at most: 8 MB of 2,048 features
NEIGHBOUR = 5
FALSE_ALARMS = 0.05
FEWEST = 20  # with fewer training images of other groups, or of a class, a share of one in twenty means nothing
RARE = 0.5  # of the images that a class has on average: one with fewer, and fewer than FEWEST, has its own bound
Z95 = 1.6448536269514722  # one-sided 95 % quantile of the normal distribution
CLOSEST = 1e-6  # a smaller distance is rounding


@dataclass(frozen=True)
class Novelty:
    """Reference features of training images, and the usual distance among these.

    Attributes:
        reference: features of some of them, scaled to length 1, ``(m, d)`` float32; saved as float16.
        usual: the distance that only a share ``FALSE_ALARMS`` of training images exceed; the unit of scores.
        own: of classes for which ``usual`` is wrong, features of their images likewise ``(r, d)``.
        bounds: for each of these images the own bound of its class ``(r,)``.
    """

    reference: NDArray[np.float32]
    usual: float
    own: NDArray[np.float32]
    bounds: NDArray[np.float32]

    @classmethod
    @staged("measuring how unlike images are")
    def fit(cls, fitted: Sequence[Subset], seed: int = 0) -> Self | None:
        """Learn the usual distance from everything that was fitted.

        Each image is compared with those of other groups only, because images of the same thing do not show what is usual. If
        there are more than ``REFERENCE`` images, the others are compared with these.

        Returns:
            None if there are too few images, or all are the same.
        """
        order = np.random.default_rng(seed).permutation(sum(map(len, fitted)))
        groups = np.array([group for subset in fitted for group in subset.groups], dtype=object)
        owners = np.unique(groups, return_inverse=True)[1]
        chosen = order[: 2 * REFERENCE]
        X = _rows(fitted, chosen)
        judged = slice(REFERENCE, None) if len(X) >= REFERENCE + FEWEST else slice(None)
        reference = _as_saved(X[:REFERENCE])
        distances = 1 - X[judged] @ reference.T
        distances[owners[chosen][judged, None] == owners[chosen][:REFERENCE]] = np.inf
        if (np.isfinite(distances).sum(axis=1) < FEWEST).any():
            return None
        radii = np.partition(distances, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1]
        usual = float(np.sort(radii)[min(math.ceil((len(radii) + 1) * (1 - FALSE_ALARMS)), len(radii)) - 1])
        if usual <= 0:
            return None
        own, bounds = np.empty((0, X.shape[1]), np.float32), np.empty(0, np.float32)
        if all(subset.y.ndim == 1 and subset.y.dtype.kind == "U" for subset in fitted):  # else there are no classes
            names, of = np.unique(np.concatenate([subset.y for subset in fitted]), return_inverse=True)
            distances[of[chosen][judged, None] != of[chosen][:REFERENCE]] = np.inf
            classes = _Classes(names, of, owners)
            wrong = classes.judged_wrongly(chosen[judged], radii > usual)
            spread = classes.spread(chosen[judged], distances.min(axis=1))
            kept = [order[of[order] == k][: max(REFERENCE // len(wrong), NEIGHBOUR)] for k in wrong]
            parts = [_as_saved(_rows(fitted, rows)) for rows in kept]
            limits = [classes.bound(rows, part, spread) for rows, part in zip(kept, parts, strict=True)]
            _warn([str(names[k]) for k, limit in zip(wrong, limits, strict=True) if limit is None])
            for part, limit in zip(parts, limits, strict=True):
                if limit is not None:
                    own, bounds = np.append(own, part, axis=0), np.append(bounds, np.full(len(part), limit, np.float32))
        return cls(reference, usual, own, bounds)

    def scores(self, X: NDArray[np.floating[Any]] | LazyFeatures) -> NDArray[np.float32]:
        """How unlike the training images features ``(n, d)`` are ``(n,)``: distances in units of the bound, the least that is.

        Above 1 an image is unlike the training images as a whole, and unlike each class that has its own bound.
        """
        if isinstance(X, LazyFeatures):
            return np.concatenate([self.scores(rows) for _, rows in X.blocks()])
        cosines, _ = nearest(X, self.reference, NEIGHBOUR)
        scores = np.asarray((1 - cosines[:, -1]) / np.float32(self.usual))
        for start in range(0, len(X) if len(self.own) else 0, BLOCK):
            rows = slice(start, start + BLOCK)
            own = (1 - unit_rows(X[rows]) @ self.own.T) / self.bounds
            scores[rows] = np.minimum(scores[rows], own.min(axis=1))
        return scores

    def to_bytes(self) -> bytes:
        """The content of ``novelty.h5``."""
        datasets = {"reference": self.reference.astype(np.float16), "usual": np.array([self.usual])}
        if len(self.own):
            datasets |= {"own": self.own.astype(np.float16), "bounds": self.bounds}
        return hdf5.build(ENCODING_TYPE, datasets, {"rows": len(self.reference)})[0]

    @classmethod
    def load(cls, path: Path, dim: int | None = None) -> Self:
        """Read a ``novelty.h5``, for features of length ``dim`` if that is known; older ones have no bounds of classes.

        Raises:
            CorruptCacheError: the file is damaged, or is not for these.
        """
        with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, _):
            reference, usual = datasets["reference"][()].astype(np.float32), float(datasets["usual"][0])
            own, bounds = np.empty((0, *reference.shape[1:]), np.float32), np.empty(0, np.float32)
            if "own" in datasets:
                own, bounds = datasets["own"][()].astype(np.float32), datasets["bounds"][()].astype(np.float32)
        fits = reference.ndim == 2 and reference.shape[1] == (dim or reference.shape[1]) and len(reference) >= NEIGHBOUR
        if not fits or not np.isfinite(reference).all() or not 0 < usual < math.inf:
            message = f"{path}: features {reference.shape} and a distance of {usual:g} are no reference for these features"
            raise CorruptCacheError(message)
        fits = own.ndim == 2 and own.shape[1] == reference.shape[1] and bounds.shape == (len(own),)
        if not fits or not np.isfinite(own).all() or not np.isfinite(bounds).all() or not (bounds > 0).all():
            message = f"{path}: features {own.shape} and bounds {bounds.shape} are none of classes of these features"
            raise CorruptCacheError(message)
        return cls(reference, usual, own, bounds)


@dataclass(frozen=True)
class _Classes:
    """The classes and groups of all fitted images, by number.

    Attributes:
        names: of the classes.
        of: class of each image.
        owners: group of each image.
    """

    names: NDArray[np.str_]
    of: NDArray[np.intp]
    owners: NDArray[np.intp]

    def units(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """How many different groups each class has among these rows."""
        pairs = np.unique(np.stack([self.of[rows], self.owners[rows]], axis=1), axis=0)
        return np.bincount(pairs[:, 0], minlength=len(self.names))

    def judged_wrongly(self, rows: NDArray[np.intp], alarms: NDArray[np.bool_]) -> list[int]:
        """Classes that are rare, or of which more images give an alarm than chance explains (binomial test, 5 %)."""
        from scipy.stats import binom

        counts, judged = self.units(np.arange(len(self.of))), self.units(rows)
        images = np.maximum(np.bincount(self.of[rows], minlength=len(self.names)), 1)
        often = np.bincount(self.of[rows], alarms, minlength=len(self.names)) / images * judged
        rare = (counts < FEWEST) & (counts < RARE * counts.mean())
        too_often = binom.sf(np.ceil(often - 1e-9) - 1, judged, FALSE_ALARMS) < FALSE_ALARMS
        return np.flatnonzero(rare | too_often).tolist()

    def spread(self, rows: NDArray[np.intp], distances: NDArray[np.float32]) -> float:
        """The standard deviation of the logarithm of the distance to the nearest image of the same class, within classes."""
        known = np.isfinite(distances)
        logs, of = np.log(np.maximum(distances[known], CLOSEST)), self.of[rows[known]]
        counts = np.bincount(of, minlength=len(self.names))
        means = np.bincount(of, logs, minlength=len(self.names)) / np.maximum(counts, 1)
        return math.sqrt(float(((logs - means[of]) ** 2).sum()) / max(int(np.maximum(counts - 1, 0).sum()), 1))

    def bound(self, rows: NDArray[np.intp], X: NDArray[np.float32], spread: float) -> float | None:
        """The own bound of a class with these images; None if they are of a single group."""
        distances = 1 - X @ X.T
        distances[self.owners[rows][:, None] == self.owners[rows]] = np.inf
        nearest_of_each = distances.min(axis=1)
        if not np.isfinite(nearest_of_each).all():
            return None
        units = len(np.unique(self.owners[rows]))
        return math.exp(np.log(np.maximum(nearest_of_each, CLOSEST)).mean() + Z95 * spread * math.sqrt(1 + 1 / units))


def _warn(lone: Sequence[str]) -> None:
    """Say of which classes nothing is known, if there are any."""
    if lone:
        what = "may be called unlike the training images: one image, or group, does not show how different its images are"
        log.warning("new images of %s %s", in_words(list(map(repr, lone))), what)


def _rows(fitted: Sequence[Subset], rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Features of rows of all subsets together, scaled to length 1."""
    X = np.empty((len(rows), fitted[0].X.shape[1]), np.float32)
    begin = 0
    for subset in fitted:
        here = (rows >= begin) & (rows < begin + len(subset))
        X[here] = unit_rows(np.asarray(subset.X[rows[here] - begin]))
        begin += len(subset)
    return X


def _as_saved(X: NDArray[np.float32]) -> NDArray[np.float32]:
    return X.astype(np.float16).astype(np.float32)


def novel_share(scores: NDArray[np.float32], units: Units) -> dict[str, Any]:
    """The share of images that are unlike the training images, as JSON: ``novel``, ``share``, ``interval``, ``expected``."""
    novel = scores > 1
    facts = {"novel": int(novel.sum()), "share": float(novel.mean()), "interval": units.proportion(novel)}
    return {**facts, "expected": FALSE_ALARMS}
