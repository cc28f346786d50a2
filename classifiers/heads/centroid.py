"""The centroid head: the nearest class mean by cosine, for a handful of images a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import Float32
from classifiers.heads.solvers.cosines import unit_rows

from .fitted import DenseHead, FittedHead
from .search import SearchHead


class CentroidHead(SearchHead):
    """Nearest class mean of features that are scaled to length 1, centred, and scaled to length 1 again.

    This is the classifier CL2N of Wang et al. 2019, "SimpleShot"; here the centre is the mean of the class means. Features
    after a ReLU all point in a similar direction; without centring, their cosines may differ only in the third digit. The
    logits are cosines over a temperature, which is fitted out of fold or on validation; nothing else is chosen.

    Args:
        cv, seed: folds, if there is no validation set.

    Attributes:
        classes_, history_, fitted_, temperature_: as in `SearchHead`.

    >>> from classifiers import CentroidHead
    >>> from store import FeatureCache
    >>> train = FeatureCache("pets.cache").subset("train")
    >>> CentroidHead().fit(train.X, train.y).classes_.tolist()
    ['cat', 'dog']
    """

    uncalibrated = 0.2  # near what is fitted on real datasets

    name = "centroid"

    def __init__(self, *, cv: int = 5, seed: int = 0) -> None:
        self.cv = cv
        self.seed = seed

    def _settings(self, n: int) -> list[dict[str, Any]]:
        return [{}]

    def _unchosen(self, n: int) -> dict[str, Any]:
        return {}

    def _judge(
        self, X: Float32, targets: NDArray[np.intp], held: Float32, settings: Sequence[dict[str, Any]]
    ) -> Sequence[Float32]:
        head = self._fitted(X, targets, [str(label) for label in self.classes_], {})
        return [head.logits(held) for _ in settings]

    def _fitted(self, X: Float32, targets: NDArray[np.intp], classes: list[str], setting: dict[str, Any]) -> FittedHead:
        own = [targets == k for k in range(len(classes))]
        units = unit_rows(X)
        centre = np.mean([units[rows].mean(axis=0, dtype=np.float64) for rows in own], axis=0).astype(np.float32)
        units = unit_rows(units - centre)
        means = unit_rows(np.stack([units[rows].mean(axis=0) for rows in own]))
        layer = means, np.zeros(len(classes), np.float32)
        return DenseHead(centre, np.ones_like(centre), [layer], classes, unit=True)
