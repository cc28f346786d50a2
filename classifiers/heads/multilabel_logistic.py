"""The logistic head for several labels an image: one sigmoid for each label, all fitted at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from classifiers.evaluation.probabilities import Float32
from classifiers.heads.solvers.row_sums import Float64
from classifiers.heads.solvers.sigmoid import SigmoidProblem, losses_of
from classifiers.heads.solvers.threads import threads_for
from store.progress.stages import Stage
from store.tasks import MultiLabelTask

from .fitted import DenseHead
from .folds import Fold, group_folds, on_first_views
from .search import Head

log = logging.getLogger("penult.classifiers")

CS = tuple(float(C) for C in np.logspace(-5, 3, 17))
WORSE = 4  # a log-loss falls and then rises along the path: this many values past the best of every label, none can win


@dataclass(frozen=True)
class _Point:
    """Results of one value of C on the held-out rows of one fold."""

    C: float
    losses: Float64
    converged: bool
    seconds: float


def _fit(problem: SigmoidProblem, C: float | Float64) -> tuple[DenseHead, bool]:
    """The head for one C, or for one C per label, and whether the fit converged."""
    weight, bias, converged = problem.fit(C)
    names = [str(k) for k in range(len(weight))]
    return DenseHead(problem.mean, problem.scale, [(weight, bias)], names, activation="Sigmoid"), converged


class MultiLabelLogisticHead(ClassifierMixin, Head):  # type: ignore[misc]
    """L2 logistic regression for several labels an image: y is a label indicator ``(n, k)``.

    Args:
        C: inverse regularisation strength for all labels; None chooses one for each.
        Cs: the values to choose from.
        cv: number of folds, if there is no validation set.
        max_iter: limit of L-BFGS iterations for each fit.
        seed: of the folds.

    Attributes:
        classes_: the columns of y, by number.
        C_: the value in use for each label ``(k,)``.
        path_: for each value tried: C, log_losses of each label (out of fold or on validation) and log_loss, their mean,
            seconds, converged.
        fitted_: the fitted head as arrays.

    >>> import numpy as np
    >>> from classifiers import MultiLabelLogisticHead
    >>> X = np.eye(6, dtype=np.float32)
    >>> y = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 1], [0, 0]])
    >>> MultiLabelLogisticHead(C=100.0).fit(X, y).predict(X[:2]).tolist()
    [[1, 0], [1, 0]]
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
        """Choose C for each label by its log-loss, and fit."""
        features, indicators = map(np.asarray, validate_data(self, X, y, dtype=np.float32, multi_output=True))
        truth = indicators.reshape(len(indicators), -1).astype(bool)
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
                    log.warning("there is a single training sample or group, so C cannot be chosen and is 1")
            self.fitted_, self.converged_ = _fit(SigmoidProblem(features, truth, self.max_iter), self.C_)
        return self

    def _path(self, X: Float32, truth: NDArray[np.bool_], folds: Sequence[Fold]) -> list[dict[str, Any]]:
        """Log-losses out of fold for every C, from small to large."""
        with Stage(f"choosing C of the {self.name} head", len(folds), "folds") as stage:
            tried = [self._path_of_fold(X, truth, fold) for fold in stage.each(folds)]
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
        problem = SigmoidProblem(X[train], truth[train], self.max_iter)
        points: list[_Point] = []
        for C in [self.C] if self.C is not None else sorted(self.Cs):
            head, converged = _fit(problem, float(C))
            losses = losses_of(head.logits(X[test]), truth[test])
            points.append(_Point(float(C), losses, converged, time.perf_counter() - begin))
            best = np.argmin([point.losses.mean(axis=0) for point in points], axis=0)
            if len(points) - 1 - int(best.max()) >= WORSE:
                break
            begin = time.perf_counter()
        return points

    def refit(self, X: ArrayLike, y: ArrayLike) -> DenseHead:
        features = np.asarray(X, np.float32)
        with threads_for(features.size):
            return _fit(SigmoidProblem(features, np.asarray(y), self.max_iter), self.C_)[0]

    def predict_proba(self, X: ArrayLike) -> Float32:
        """Probability of each label ``(n, k)``."""
        check_is_fitted(self)
        return self.fitted_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """Which labels each row has ``(n, k)``: those with a probability of at least 0.5."""
        return (self.predict_proba(X) >= 0.5).astype(np.intp)

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use, as JSON."""
        return {
            "C": self.C_.tolist(),
            "chosen": self.C is None and bool(self.path_),
            "threshold": 0.5,
            "max_iter": self.max_iter,
            "cv": self.cv,
            "seed": self.seed,
        }
