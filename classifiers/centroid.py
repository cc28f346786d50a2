"""The nearest class mean by cosine: the head for a handful of images a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dense import DenseHead, FittedHead, Float32, unit_rows
from .searched import SearchedHead


class CentroidHead(SearchedHead):
    """Nearest class mean with scikit-learn's manners: of features at length 1, which few-shot learning gains most from.

    After Wang et al. 2019, "SimpleShot", without the mean over other classes that it subtracts: there are none here. The logits
    are cosines over a temperature, which is fitted out of fold or on validation; nothing else is chosen.

    Args:
        cv, seed: folds where no validation set is given.

    Attributes:
        classes_, history_, dense_, temperature_: as in `SearchedHead`.
    """

    uncalibrated = 0.05  # of cosines between features after a ReLU, which lie close together

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
        rows = unit_rows(X)
        means = unit_rows(np.stack([rows[targets == k].mean(axis=0, dtype=np.float64) for k in range(len(classes))]))
        zeros, ones = np.zeros(X.shape[1], np.float32), np.ones(X.shape[1], np.float32)
        return DenseHead(zeros, ones, [(means, np.zeros(len(classes), np.float32))], classes, unit=True)
