"""Logistic regression with an elastic net for several values of C, fitted one by one with scikit-learn's SAGA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from classifiers.evaluation.probabilities import log_loss

from .row_sums import Float32, Float64
from .softmax import Optimum

STEEPEST = 1e-3  # gradient of an optimum; if all weights are 0, SAGA stops too early, before its intercepts converge


class ElasticPath:
    """Like `SoftmaxPath`, with the penalty ``(l1 |w|_1 + (1 - l1) |w|^2 / 2) / C``.

    Args:
        inputs, targets, classes, weights: as in `SoftmaxPath`.
        l1: share of the absolute values in the penalty.
        seed: of the order in which SAGA (Defazio et al. 2014) visits rows.
    """

    def __init__(
        self, inputs: Float32, targets: NDArray[np.intp], classes: int, weights: Float64 | None, *, l1: float, seed: int
    ) -> None:
        self._inputs, self._targets, self._classes, self._l1 = inputs, targets, classes, l1
        self._weights = np.ones(len(targets)) if weights is None else weights
        self._model = LogisticRegression(solver="saga", l1_ratio=l1, random_state=seed, warm_start=True)

    def optima(self, Cs: Sequence[float], most: int) -> Iterator[Optimum]:
        """One optimum for each C in rising order; ``most`` and `Optimum.evaluations` are passes over the rows."""
        for C in Cs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
                self._model.set_params(C=C, max_iter=most).fit(self._inputs, self._targets, sample_weight=self._weights)
            weight, bias = self._model.coef_.astype(np.float32), self._model.intercept_.astype(np.float32)
            passes = int(self._model.n_iter_.max())
            objective, gradient = self._judge(weight, bias, C)
            yield Optimum(C, weight, bias, objective, gradient, passes, converged=passes < most and gradient <= STEEPEST)

    def _judge(self, weight: Float32, bias: Float32, C: float) -> tuple[float, float]:
        """The objective, and the largest entry of its least-norm subgradient divided by the sum of the row weights."""
        logits = self._inputs.astype(np.float64) @ weight.T + bias
        if len(weight) == 1:
            logits = np.concatenate([0 * logits, logits], axis=1)
        l1, l2 = self._l1 / C, (1 - self._l1) / C
        penalty = l1 * np.abs(weight).sum() + l2 * np.square(weight).sum() / 2
        objective = log_loss(logits, self._targets, self._weights) * self._weights.sum() + penalty
        residual = np.exp(logits - logits.max(axis=1, keepdims=True))
        residual /= residual.sum(axis=1, keepdims=True)
        residual[np.arange(len(residual)), self._targets] -= 1
        residual *= self._weights[:, None]
        residual = residual[:, -len(weight) :]
        smooth = residual.T @ self._inputs + l2 * weight
        steepest = np.where(weight == 0, np.maximum(np.abs(smooth) - l1, 0), np.abs(smooth + l1 * np.sign(weight)))
        largest = max(steepest.max(), np.abs(residual.sum(axis=0)).max())
        return float(objective), float(largest / self._weights.sum())
