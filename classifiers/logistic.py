"""L2-regularised multinomial logistic regression on standardised features, its regularisation chosen on validation.

The protocol is that of Kornblith et al. 2019 and SimCLR (Appendix B.8): L-BFGS, no augmentation, 45 values over eleven
decades, chosen on validation and refitted on everything. C = 1 / lambda with summed losses, as in scikit-learn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from .dense import DenseHead, Fold, class_indices, log_loss, standardisation, with_validation
from .softmax import Optimum, SoftmaxPath

log = logging.getLogger("penult.classifiers")

CS = tuple(float(C) for C in np.logspace(-5, 6, 45))
SMALL = 2**22  # numbers; below, waiting for each other costs BLAS threads more than they gain (8 times, on 1,100 x 512)
WORSE = 8  # the log-loss falls and then rises along the path: after so many values above the best, the rest cannot win


class _Problem:
    """One training set, to be fitted with one C after another."""

    def __init__(self, X: NDArray[np.float32], targets: NDArray[np.intp], classes: list[str], max_iter: int) -> None:
        self._mean, self._scale = standardisation(X)
        self._classes, self._max_iter = classes, max_iter
        self._path = SoftmaxPath((X - self._mean) / self._scale, targets, len(classes))

    def heads(self, Cs: Sequence[float]) -> Iterator[tuple[DenseHead, Optimum]]:
        """A head for each C, in rising order, and how it was found."""
        for found in self._path.optima(Cs, self._max_iter):
            weight, bias = found.weight, found.bias
            if len(weight) == 1:  # two classes: one logit z; softmax([0, z]) is its sigmoid
                weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
            yield DenseHead(self._mean, self._scale, [(weight, bias)], self._classes), found

    def fit(self, C: float) -> tuple[DenseHead, Optimum]:
        return next(self.heads([C]))


@dataclass(frozen=True)
class _Point:
    """What one value of C gave on the held-out rows of one fold."""

    found: Optimum
    logits: NDArray[np.float32]
    seconds: float


class LogisticHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic regression with scikit-learn's manners.

    Args:
        C: inverse regularisation strength; None chooses it.
        Cs: the values to choose from, in rising order.
        cv: number of folds where no validation set is given.
        max_iter: limit of evaluations of the objective for each value.
        seed: of the folds.

    Attributes:
        classes_: labels in the order of the outputs.
        C_: the value in use.
        path_: for each value tried: C; log_loss and accuracy (out of fold or on validation); gradient, the certificate of the
            fit (see `softmax.Optimum`, the worst of the folds); evaluations, seconds, converged.
        dense_: the fitted head as arrays, temperature included.
        temperature_: fitted on the out-of-fold or validation logits of the chosen value.
    """

    def __init__(
        self,
        C: float | None = None,
        *,
        Cs: Sequence[float] = CS,
        cv: int = 5,
        max_iter: int = 2000,
        seed: int = 0,
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
    ) -> Self:
        """Choose C and fit.

        Args:
            X: features ``(n, d)``.
            y: labels ``(n,)``.
            validation: ``(X, y)`` to choose on; the final fit uses both. Without it, k-fold inside ``X``.
            groups: what must not be divided between folds, one per row of ``X``.
        """
        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        self.classes_, targets = class_indices(labels)
        with threadpool_limits(1 if features.size < SMALL else None):
            self._choose_and_fit(features, targets, validation, groups)
        return self

    def _choose_and_fit(
        self,
        features: NDArray[np.float32],
        targets: NDArray[np.intp],
        validation: tuple[ArrayLike, ArrayLike] | None,
        groups: Sequence[bytes] | None,
    ) -> None:
        if validation is None:
            folds = list(self._folds(features, targets, groups))
        else:
            features, targets, folds = with_validation(features, targets, validation, self.classes_)
        self.path_, held_out = self._path(features, targets, folds)
        best = min(self.path_, key=lambda point: float(point["log_loss"]), default=None)
        self.C_ = float(best["C"]) if best else float(self.C or 1.0)
        dense, found = self._problem(features, targets).fit(self.C_)
        self.converged_ = found.converged
        if best:
            rows = np.concatenate([test for _, test in folds])
            dense = dense.calibrated(held_out[self.C_], targets[rows])
        self.dense_ = dense
        self.temperature_ = dense.temperature

    def _folds(self, X: NDArray[np.float32], targets: NDArray[np.intp], groups: Sequence[bytes] | None) -> Iterator[Fold]:
        from sklearn.model_selection import StratifiedGroupKFold

        owners = np.arange(len(X)) if groups is None else np.unique(np.array(groups, dtype=object), return_inverse=True)[1]
        fewest = min(len(np.unique(owners[targets == k])) for k in range(len(self.classes_)))
        n_splits = min(self.cv, fewest)
        if n_splits < 2:
            if self.C is None:
                log.warning("a class has a single training sample or group: C cannot be chosen and is 1, without calibration")
            return iter(())
        splitter = StratifiedGroupKFold(n_splits=n_splits, shuffle=True, random_state=self.seed)
        # Where groups span classes, a fold may take all of one class; what is fitted on the rest could not know it.
        whole = len(self.classes_)
        return iter([fold for fold in splitter.split(X, targets, owners) if len(np.unique(targets[fold[0]])) == whole])

    def _path(
        self, X: NDArray[np.float32], targets: NDArray[np.intp], folds: list[Fold]
    ) -> tuple[list[dict[str, float | bool]], dict[float, NDArray[np.float32]]]:
        """Log-loss and accuracy out of fold for every C, from small to large, and the logits of each."""
        if not folds:
            return [], {}
        Cs = [float(C) for C in ([self.C] if self.C is not None else sorted(self.Cs))]
        tried = [self._path_of_fold(X, targets, fold, Cs) for fold in folds]  # one standardised copy at a time
        truth = np.concatenate([targets[test] for _, test in folds])
        path: list[dict[str, float | bool]] = []
        held_out: dict[float, NDArray[np.float32]] = {}
        for points in zip(*tried, strict=False):  # as far as the shortest
            found = [point.found for point in points]
            C = found[0].C
            logits = held_out[C] = np.concatenate([point.logits for point in points])
            path.append(
                {
                    "C": C,
                    "log_loss": log_loss(logits, truth),
                    "accuracy": float(np.mean(logits.argmax(axis=1) == truth)),
                    "gradient": max(each.gradient for each in found),
                    "evaluations": sum(each.evaluations for each in found),
                    "seconds": round(sum(point.seconds for point in points), 4),
                    "converged": all(each.converged for each in found),
                }
            )
        return path, held_out

    def _path_of_fold(self, X: NDArray[np.float32], targets: NDArray[np.intp], fold: Fold, Cs: list[float]) -> list[_Point]:
        train, test = fold
        problem = self._problem(X[train], targets[train])
        points: list[_Point] = []
        losses: list[float] = []
        begin = time.perf_counter()
        for dense, found in problem.heads(Cs):
            logits = dense.logits(X[test])
            points.append(_Point(found, logits, time.perf_counter() - begin))
            losses.append(log_loss(logits, targets[test]))
            begin = time.perf_counter()
            if len(losses) - 1 - int(np.argmin(losses)) >= WORSE:
                break
        return points

    def _problem(self, X: NDArray[np.float32], targets: NDArray[np.intp]) -> _Problem:
        return _Problem(X, targets, [str(label) for label in self.classes_], self.max_iter)

    def again(self, X: NDArray[np.float32], targets: NDArray[np.intp], classes: list[str]) -> DenseHead:
        """A head on other rows ``(n, d)`` with what was chosen here, without choosing again."""
        with threadpool_limits(1 if X.size < SMALL else None):
            return _Problem(X, targets, classes, self.max_iter).fit(self.C_)[0]

    def decision_function(self, X: ArrayLike) -> NDArray[np.float32]:
        """Logits ``(n, k)``; for two classes ``(n,)``, positive for the second."""
        check_is_fitted(self)
        logits = self.dense_.logits(validate_data(self, X, dtype=np.float32, reset=False))
        return np.asarray(logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits)

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """Probabilities ``(n, k)``, temperature included."""
        check_is_fitted(self)
        return self.dense_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable label of each row."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """What was used, as JSON."""
        return {
            "C": self.C_,
            "chosen": self.C is None and bool(self.path_),
            "max_iter": self.max_iter,
            "cv": self.cv,
            "seed": self.seed,
        }

    @property
    def history_(self) -> list[dict[str, Any]]:
        """The regularisation path, for the bundle."""
        return self.path_
