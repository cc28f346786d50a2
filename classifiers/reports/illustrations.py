"""The images in a report: a map of their features, and the worst mistakes beside their nearest training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.bundles.predictions import Predictions
from classifiers.heads.solvers.cosines import nearest, unit_rows
from extractor.data.files import Files
from extractor.data.sources import files_of
from store.cache import Subset
from store.errors import PenultError, display
from store.format.lazy_features import LazyFeatures
from store.format.samples import SampleTable
from store.progress.stages import staged

from .feature_map import FeatureMap, feature_map
from .thumbnails import thumbnails

MISTAKES = 12
NEIGHBOURS = 4
REPORT_FINDS_THEM = "If the images moved, `penult report BUNDLE DATA --root FOLDER -o FILE.html` finds them."
WITHOUT = "This page was made without images; `penult report BUNDLE DATA -o FILE.html` makes one with them."
BLOCK = 4096  # training images that are compared with the mistakes at once


@dataclass(frozen=True)
class Thumbnail:
    """One image of a page: its name and label, and a data URI, which is empty if it is not shown."""

    name: str
    label: str
    uri: str = ""


@dataclass(frozen=True)
class Mistake:
    """A misclassified image.

    Attributes:
        image: with its true label.
        guess, probability: the predicted label, and its probability.
        neighbours: the training images whose features are nearest (cosine), nearest first.
    """

    image: Thumbnail
    guess: str
    probability: float
    neighbours: list[Thumbnail] = field(default_factory=list)


@dataclass(frozen=True)
class Illustrations:
    """What a page shows beside scores.

    Attributes:
        mistakes: the most confident ones, most confident first.
        note: why thumbnails are missing, in words; empty if all are there.
        map: of the features; None if there are none, or too few.
    """

    mistakes: list[Mistake] = field(default_factory=list)
    note: str = ""
    map: FeatureMap | None = None


@staged("making pictures for the report")
def illustrate(
    predictions: Predictions,
    classes: Sequence[str],
    *,
    X: NDArray[np.floating[Any]] | LazyFeatures | None = None,
    fitted: Sequence[Subset] = (),
    files: Files | None = None,
) -> Illustrations:
    """Pick the most confident mistakes and their nearest training images, and map the features.

    Args:
        predictions: on held-out images.
        classes: labels of their columns.
        X: features of the same images ``(n, d)``; without them there are no map and no neighbours.
        fitted: training images, among which neighbours are searched.
        files: where the images are; None shows none of them.
    """
    guess = np.array(classes, dtype=str)[predictions.probabilities.argmax(axis=1)]
    confidence = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(guess != predictions.labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    worst: list[int] = wrong.tolist()
    near = _nearest(np.asarray(X[wrong], np.float32), fitted) if X is not None and fitted and len(wrong) else [[]] * len(wrong)
    paths = {predictions.sha256[i]: predictions.paths[i] for i in worst}
    paths |= {subset.sha256[j]: subset.paths[j] for each in near for subset, j in each}
    with ThreadPoolExecutor(1, "penult-illustrations") as pool:  # thumbnails are decoded in other processes
        loading = pool.submit(thumbnails, paths, files) if files is not None else None
        layout = feature_map(X) if X is not None else None
    shown, missing = loading.result() if loading is not None else ({}, {})

    def thumbnail(digest: bytes, path: bytes, label: str) -> Thumbnail:
        return Thumbnail(display(path), label, shown.get(digest, ""))

    return Illustrations(
        mistakes=[
            Mistake(
                thumbnail(predictions.sha256[i], predictions.paths[i], str(predictions.labels[i])),
                str(guess[i]),
                float(confidence[i]),
                [thumbnail(subset.sha256[j], subset.paths[j], str(subset.y[j])) for subset, j in each],
            )
            for i, each in zip(worst, near, strict=True)
        ],
        note=_missing(missing, len(paths)) if files is not None else WITHOUT,
        map=layout,
    )


def _nearest(X: NDArray[np.float32], fitted: Sequence[Subset]) -> list[list[tuple[Subset, int]]]:
    """The training images nearest to each of some features ``(m, d)``."""
    best: list[list[tuple[float, int, int]]] = [[] for _ in X]
    for s, subset in enumerate(fitted):
        for begin in range(0, len(subset), BLOCK):
            references = unit_rows(np.asarray(subset.X[begin : begin + BLOCK]))
            cosines, which = nearest(X, references, min(NEIGHBOURS, len(references)))
            for m, pairs in enumerate(zip(cosines.tolist(), which.tolist(), strict=True)):
                best[m] = sorted([*best[m], *((-cosine, s, begin + j) for cosine, j in zip(*pairs, strict=True))])[:NEIGHBOURS]
    return [[(fitted[s], j) for _, s, j in each] for each in best]


def _missing(missing: dict[bytes, str], count: int) -> str:
    if not missing:
        return ""
    reasons = ", ".join(f"{why}: {n}" for why, n in sorted(Counter(missing.values()).items()))
    return f"{len(missing)} of {count} images could not be read any more ({reasons}). {REPORT_FINDS_THEM}"


def files_or_none(table: SampleTable, root: Path | None = None) -> Files | None:
    """The files of a sample table; None if they cannot be opened any more."""
    try:
        return files_of(table, root)
    except PenultError:
        return None
