"""Ridge regression for every lambda from one eigendecomposition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import Float32

from .standardise import standardisation

Floats = NDArray[np.floating[Any]]

PRECISE = 2**33  # multiplications; up to this many, the Gram matrix is computed in float64, which costs twice as much
LEAST = 1e-6  # smallest divisor of a row's residual for its leave-one-out residual
BLOCK = 8192  # rows of a float32 product, which is then added in float64


class Spectrum:
    """One training set, decomposed once: after that, the solution of any lambda is a product.

    Standardised features are Z = P V^T, where P^T P is diagonal, so Z^T Z + lambda is diagonal in V. V comes from the
    eigenvectors of Z^T Z, or of Z Z^T if there are fewer rows than columns.

    Args:
        X: features ``(n, d)``.
        targets: ``(n, k)``.

    Attributes:
        mean, scale: standardisation of the features, ``(d,)``.
    """

    def __init__(self, X: Float32, targets: NDArray[np.float64]) -> None:
        n, d = X.shape
        self.mean, self.scale = standardisation(X)
        # If n is near d, residuals for a small lambda are tiny, and float32 would lose them.
        self._dtype = np.float64 if n * d * min(n, d) <= PRECISE or max(n, d) < 4 * min(n, d) else np.float32
        self._Z: Floats = X.astype(self._dtype)  # a copy, which is standardised in place
        self._Z -= self.mean
        self._Z /= self.scale
        self._tall = n > d
        self._bias = targets.mean(axis=0)
        self._centred = targets - self._bias
        gram = _gram(self._Z if self._tall else self._Z.T)
        if not self._tall:  # a mean left by rounding would count as much as a small lambda
            gram -= gram.mean(axis=0)
            gram -= gram.mean(axis=1, keepdims=True)
        values, self._vectors = np.linalg.eigh(gram)
        self._values = np.maximum(values, 0.0)  # rounding makes zeros negative
        if self._tall:
            right = np.asarray(self._Z.T @ self._centred.astype(self._dtype), np.float64)
            self._right = self._vectors.T @ right
        else:
            self._dual = self._vectors.T @ self._centred

    def solution(self, alpha: float) -> tuple[Float32, Float32]:
        """Weights ``(k, d)`` and intercepts ``(k,)`` for one lambda."""
        if self._tall:
            weights = self._vectors @ (self._right / (self._values + alpha)[:, None])
        else:
            dual = self._vectors @ (self._dual / (self._values + alpha)[:, None])
            weights = self._Z.T @ dual.astype(self._dtype)
        return np.ascontiguousarray(weights.T, np.float32), self._bias.astype(np.float32)

    def left_out(self, rows: NDArray[np.intp], alphas: Sequence[float]) -> Iterator[Float32]:
        """Decision values ``(m, k)`` of training rows, each by the fit on all others, for one lambda after another.

        A fit that leaves out row i changes its residual from e to e / (1 - h), where h is the i-th diagonal element of the
        matrix that maps targets to fitted values (Cook and Weisberg 1982); 1/n of it is the intercept's.
        """
        scores = self._Z[rows] @ self._vectors.astype(self._dtype) if self._tall else self._vectors[rows]
        centred, once = self._centred[rows], 1 / len(self._Z)
        inverse = (1 / (self._values + np.array(alphas)[:, None])).astype(self._dtype)
        if self._tall:
            left = 1 - once - scores**2 @ inverse.T
        else:  # the same without a difference of nearly equal numbers, because the result may be close to 0
            left = scores**2 @ (inverse * np.array(alphas)[:, None]).T - once
        for i, alpha in enumerate(alphas):
            if self._tall:
                residual = centred - scores @ (self._right * inverse[i, :, None]).astype(self._dtype)
            else:
                residual = scores @ (self._dual * (alpha * inverse[i])[:, None])
            residual /= np.maximum(left[:, i, None], LEAST)
            yield np.asarray(centred + self._bias - residual, np.float32)


def _gram(Z: Floats) -> NDArray[np.float64]:
    """``Z^T Z``, summed in float64."""
    total = np.zeros((Z.shape[1], Z.shape[1]))
    for start in range(0, len(Z), BLOCK):
        block = Z[start : start + BLOCK]
        total += block.T @ block
    return total
