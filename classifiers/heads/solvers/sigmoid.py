"""L2-regularised logistic regression for several labels an image, all labels at once.

The objective of each label is scikit-learn's, one against the rest: summed log-losses plus ``|w|^2 / 2C``. It is fast because
one matrix product serves all labels, in the principal axes of the rows, where the curvature of the loss is nearly diagonal
(Boehning 1992) and L-BFGS needs few steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import Float32

from .row_sums import Float64
from .softmax import principal_axes
from .standardise import standardisation

INTERCEPT = 1e4  # C of the intercepts: without it, the intercept of a label that a fold lacks would diverge
GAIN = 1e-9  # relative decrease of the objective: L-BFGS stops at a smaller one


class SigmoidProblem:
    """One training set, fitted for one C after another (or one for each label); each fit starts from the one before.

    Attributes:
        mean, scale: standardisation of the features, ``(d,)``.
    """

    def __init__(self, X: Float32, truth: NDArray[np.bool_], max_iter: int) -> None:
        self.mean, self.scale = standardisation(X)
        self._rows, self._axes, self._spread = principal_axes((X - self.mean) / self.scale)
        self._truth, self._max_iter = truth, max_iter
        share = np.clip(truth.mean(axis=0), 0.5 / len(X), 1 - 0.5 / len(X))
        self._curvature = share * (1 - share)
        self._place = np.concatenate([np.zeros((len(self._spread), len(share))), np.log(share / (1 - share))[None]])

    def fit(self, C: float | Float64) -> tuple[Float32, Float32, bool]:
        """Weights ``(k, d)`` and intercepts ``(k,)``, and whether L-BFGS converged; C is one for all labels, or ``(k,)``."""
        from scipy.optimize import minimize

        strength = np.full(self._place.shape, 1 / np.asarray(C))
        strength[-1] = 1 / INTERCEPT
        unit = 1 / np.sqrt(np.append(self._spread, len(self._rows))[:, None] * self._curvature + strength)
        limits: Any = {"maxiter": self._max_iter, "ftol": GAIN, "gtol": 0.0}
        objective: Any = partial(self._objective, unit=unit, strength=strength)
        result = minimize(
            objective,
            (self._place / unit).ravel(),
            jac=True,
            method="L-BFGS-B",
            options=limits,
        )
        self._place = result.x.reshape(unit.shape) * unit
        weight = np.ascontiguousarray((self._axes @ self._place[:-1].astype(np.float32)).T)
        return weight, self._place[-1].astype(np.float32), result.nit < self._max_iter

    def _objective(self, scaled: Float64, unit: Float64, strength: Float64) -> tuple[float, Float64]:
        place = scaled.reshape(unit.shape) * unit
        logits = (self._rows @ place[:-1].astype(np.float32) + place[-1].astype(np.float32)).astype(np.float64)
        residual = 1 / (1 + np.exp(-np.clip(logits, -500, 500))) - self._truth
        gradient = strength * place
        gradient[:-1] += self._rows.T @ residual.astype(np.float32)
        gradient[-1] += residual.sum(axis=0)
        value = losses_of(logits, self._truth).sum() + 0.5 * (strength * place**2).sum()
        return float(value), (gradient * unit).ravel()


def losses_of(logits: NDArray[np.floating[Any]], truth: NDArray[np.bool_]) -> Float64:
    """Negative log-likelihood of each label of each row ``(n, k)``."""
    wide = logits.astype(np.float64)
    return np.asarray(np.logaddexp(0, np.where(truth, -wide, wide)))
