"""Logistic regression for several labels an image: one sigmoid for each, all of them fitted at once.

The objective of each label is scikit-learn's, one against the rest: summed log-losses plus ``|w|^2 / 2C``. It is fast because
one product of matrices serves all labels, in the principal axes of the rows, where the curvature of the loss is nearly diagonal
(Boehning 1992) and L-BFGS needs few steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from store.tasks import MultiLabelTask

from .dense import DenseHead, Float32, standardisation
from .folds import Fold, group_folds, on_first_views
from .rowsums import Float64
from .searched import Head
from .softmax import principal_axes
from .threads import threads_for

log = logging.getLogger("penult.classifiers")

CS = tuple(float(C) for C in np.logspace(-5, 3, 17))
WORSE = 4  # a log-loss falls and then rises along the path: after so many values above the best of every label, none can win
INTERCEPT = 1e4  # C of the intercepts: without any, that of a label that a fold lacks would run away
GAIN = 1e-9  # relative, of the objective: a step that gains less is the last


class _Problem:
    """One training set, fitted for one C after another (or one for each label); each fit starts from the one before."""

    def __init__(self, X: Float32, truth: NDArray[np.bool_], max_iter: int) -> None:
        self._mean, self._scale = standardisation(X)
        self._rows, self._axes, self._spread = principal_axes((X - self._mean) / self._scale)
        self._truth, self._max_iter = truth, max_iter
        share = np.clip(truth.mean(axis=0), 0.5 / len(X), 1 - 0.5 / len(X))
        self._curvature = share * (1 - share)
        self._place = np.concatenate([np.zeros((len(self._spread), len(share))), np.log(share / (1 - share))[None]])

    def fit(self, C: float | Float64) -> tuple[DenseHead, bool]:
        """The head, and whether L-BFGS converged; C is one for all labels, or ``(k,)``."""
        from scipy.optimize import minimize

        strength = np.full(self._place.shape, 1 / np.asarray(C))
        strength[-1] = 1 / INTERCEPT
        unit = 1 / np.sqrt(np.append(self._spread, len(self._rows))[:, None] * self._curvature + strength)
        limits: Any = {"maxiter": self._max_iter, "ftol": GAIN, "gtol": 0.0}
        objective: Any = partial(self._objective, unit=unit, strength=strength)
        found = minimize(
            objective,
            (self._place / unit).ravel(),
            jac=True,
            method="L-BFGS-B",
            options=limits,
        )
        self._place = found.x.reshape(unit.shape) * unit
        weight = np.ascontiguousarray((self._axes @ self._place[:-1].astype(np.float32)).T)
        names = [str(k) for k in range(len(weight))]
        layer = weight, self._place[-1].astype(np.float32)
        return DenseHead(self._mean, self._scale, [layer], names, activation="Sigmoid"), found.nit < self._max_iter

    def _objective(self, scaled: Float64, unit: Float64, strength: Float64) -> tuple[float, Float64]:
        place = scaled.reshape(unit.shape) * unit
        logits = (self._rows @ place[:-1].astype(np.float32) + place[-1].astype(np.float32)).astype(np.float64)
        residual = 1 / (1 + np.exp(-np.clip(logits, -500, 500))) - self._truth
        gradient = strength * place
        gradient[:-1] += self._rows.T @ residual.astype(np.float32)
        gradient[-1] += residual.sum(axis=0)
        value = _losses(logits, self._truth).sum() + 0.5 * (strength * place**2).sum()
        return float(value), (gradient * unit).ravel()


def _losses(logits: NDArray[np.floating[Any]], truth: NDArray[np.bool_]) -> Float64:
    """Negative log-likelihood of each label of each row ``(n, k)``."""
    wide = logits.astype(np.float64)
    return np.asarray(np.logaddexp(0, np.where(truth, -wide, wide)))


@dataclass(frozen=True)
class _Point:
    """What one value of C gave on the held-out rows of one fold."""

    C: float
    losses: Float64
    converged: bool
    seconds: float


class MultiLabelLogisticHead(ClassifierMixin, Head):  # type: ignore[misc]
    """L2 logistic regression for several labels an image: y is a label indicator ``(n, k)``.

    Args:
        C: inverse regularisation strength of all labels; None chooses one for each.
        Cs: the values to choose from.
        cv: number of folds where no validation set is given.
        max_iter: limit of L-BFGS iterations for each fit.
        seed: of the folds.

    Attributes:
        classes_: the columns of y, by number.
        C_: the value in use for each label ``(k,)``.
        path_: for each value tried: C, log_losses of each label (out of fold or on validation) and log_loss, their mean,
            seconds, converged.
        fitted_: the fitted head as arrays.
    """

    name, task = "logistic", MultiLabelTask.name

    def __init__(
        self, C: float | None = None, *, Cs: Sequence[float] = CS, cv: int = 5, max_iter: int = 1000, seed: int = 0
    ) -> None:
        self.C = C
        self.Cs = Cs
        self.cv = cv
        self.max_iter = max_iter
        self.seed = seed

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        """Choose C by the log-loss, for each label its own, and fit."""
        features, given = map(np.asarray, validate_data(self, X, y, dtype=np.float32, multi_output=True))
        truth = given.reshape(len(given), -1).astype(bool)
        self.classes_ = np.arange(truth.shape[1])
        if validation is None:
            folds = group_folds(len(features), groups, self.cv, self.seed)
        else:
            held, labels = np.asarray(validation[0], np.float32), np.asarray(validation[1], bool)
            folds = [(np.arange(len(features)), len(features) + np.arange(len(held)))]
            features, truth = np.concatenate([features, held]), np.concatenate([truth, labels])
        with threads_for(features.size):
            self.history_ = self.path_ = self._path(features, truth, on_first_views(folds, views))
            if self.path_:
                best = np.argmin([point["log_losses"] for point in self.path_], axis=0)
                self.C_ = np.array([point["C"] for point in self.path_])[best]
            else:
                self.C_ = np.full(truth.shape[1], self.C or 1.0)
                if self.C is None:
                    log.warning("there is a single training sample or group: C cannot be chosen and is 1")
            self.fitted_, self.converged_ = _Problem(features, truth, self.max_iter).fit(self.C_)
        return self

    def _path(self, X: Float32, truth: NDArray[np.bool_], folds: Sequence[Fold]) -> list[dict[str, Any]]:
        """Log-losses out of fold for every C, from small to large."""
        tried = [self._path_of_fold(X, truth, fold) for fold in folds]
        path = []
        for points in zip(*tried, strict=False):  # as far as the shortest
            losses = np.concatenate([point.losses for point in points]).mean(axis=0)
            path.append(
                {
                    "C": points[0].C,
                    "log_loss": float(losses.mean()),
                    "log_losses": losses.tolist(),
                    "seconds": round(sum(point.seconds for point in points), 4),
                    "converged": all(point.converged for point in points),
                }
            )
        return path

    def _path_of_fold(self, X: Float32, truth: NDArray[np.bool_], fold: Fold) -> list[_Point]:
        train, test = fold
        begin = time.perf_counter()
        problem = _Problem(X[train], truth[train], self.max_iter)
        points: list[_Point] = []
        for C in [self.C] if self.C is not None else sorted(self.Cs):
            dense, converged = problem.fit(float(C))
            losses = _losses(dense.logits(X[test]), truth[test])
            points.append(_Point(float(C), losses, converged, time.perf_counter() - begin))
            best = np.argmin([point.losses.mean(axis=0) for point in points], axis=0)
            if len(points) - 1 - int(best.max()) >= WORSE:
                break
            begin = time.perf_counter()
        return points

    def refit(self, X: ArrayLike, y: ArrayLike) -> DenseHead:
        features = np.asarray(X, np.float32)
        with threads_for(features.size):
            return _Problem(features, np.asarray(y), self.max_iter).fit(self.C_)[0]

    def predict_proba(self, X: ArrayLike) -> Float32:
        """Probability of each label ``(n, k)``."""
        check_is_fitted(self)
        return self.fitted_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """Which labels each row has ``(n, k)``: those more probable than not."""
        return (self.predict_proba(X) >= 0.5).astype(np.intp)

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """What was used, as JSON."""
        return {
            "C": self.C_.tolist(),
            "chosen": self.C is None and bool(self.path_),
            "threshold": 0.5,
            "max_iter": self.max_iter,
            "cv": self.cv,
            "seed": self.seed,
        }
