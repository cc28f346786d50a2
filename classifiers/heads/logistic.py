"""The logistic head: regularised multinomial logistic regression on standardised features, with C chosen on validation.

The protocol is that of Kornblith et al. 2019 and SimCLR (Appendix B.8): L-BFGS, no augmentation, 45 values of C over eleven
decades, chosen on validation, then a refit on everything. C = 1 / lambda with summed losses, as in scikit-learn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from classifiers.evaluation.conformal import Conformal
from classifiers.evaluation.probabilities import log_loss
from classifiers.heads.solvers.row_sums import Float32, Float64, gpu_for
from classifiers.heads.solvers.softmax import Optimum, SoftmaxPath
from classifiers.heads.solvers.standardise import StandardisedRows, lazy_standardisation, standardisation
from classifiers.heads.solvers.threads import threads_for
from store.format.lazy_features import LazyFeatures
from store.progress.stages import Stage

from .fitted import DenseHead, calibrate
from .folds import (
    NOTHING_TO_JUDGE,
    Fold,
    class_indices,
    lazy_with_validation,
    on_first_views,
    stratified_folds,
    units_of,
    with_validation,
)
from .search import ClassifierHead

if TYPE_CHECKING:
    from classifiers.heads.solvers.elastic import ElasticPath

log = logging.getLogger("penult.classifiers")

Features = Float32 | LazyFeatures

CS = tuple(float(C) for C in np.logspace(-5, 6, 45))
NET = CS[::4]  # for an elastic net, whose fits share no work
WORSE = 99.0  # results get better and then worse along the path: beyond this many times the best C, none can win
SELECT = ("log-loss", "accuracy")


class _Problem:
    """One training set, to be fitted with one C after another."""

    def __init__(
        self, head: LogisticHead, X: Features, targets: NDArray[np.intp], classes: list[str], rows: Float64 | None
    ) -> None:
        self._classes, self._max_iter = classes, head.max_iter
        weights = _class_weights(head.class_weight, targets, classes, rows)
        self._path: ElasticPath | SoftmaxPath
        if isinstance(X, LazyFeatures):
            self._mean, self._scale = lazy_standardisation(X, rows)
            self._path = SoftmaxPath(StandardisedRows(X, self._mean, self._scale), targets, len(classes), weights)
            return
        self._mean, self._scale = standardisation(X, rows)
        inputs = (X - self._mean) / self._scale
        if not head.l1_ratio:
            self._path = SoftmaxPath(inputs, targets, len(classes), weights, device=gpu_for(head.device, inputs.size))
            return
        from classifiers.heads.solvers.elastic import ElasticPath  # scikit-learn's linear models take time to import

        self._path = ElasticPath(inputs, targets, len(classes), weights, l1=head.l1_ratio, seed=head.seed)

    def heads(self, Cs: Sequence[float]) -> Iterator[tuple[DenseHead, Optimum]]:
        """A head for each C, in rising order, and its optimum."""
        for optimum in self._path.optima(Cs, self._max_iter):
            yield self._head(optimum), optimum

    def _head(self, optimum: Optimum) -> DenseHead:
        weight, bias = optimum.weight, optimum.bias
        if len(weight) == 1:  # two classes: one logit z; softmax([0, z]) is its sigmoid
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        return DenseHead(self._mean, self._scale, [(weight, bias)], self._classes)

    def fit(self, C: float, start: DenseHead | None = None) -> tuple[DenseHead, Optimum]:
        """The final head, fitted as exactly as the solver allows; ``start`` is a head that was fitted on some of these rows."""
        if isinstance(self._path, SoftmaxPath):
            optimum = next(self._path.optima([C], self._max_iter, 0.0, None if start is None else self._place(start)))
        else:
            optimum = next(self._path.optima([C], self._max_iter))
        return self._head(optimum), optimum

    def _place(self, head: DenseHead) -> tuple[Float64, Float64]:
        """Weights and biases of a head that standardises differently, for the standardisation of this problem."""
        ((weight, bias),) = head.layers
        w = weight.astype(np.float64) / head.scale
        b = bias - w @ head.mean + w @ self._mean
        w = w * self._scale
        return (w[1:] - w[:1], b[1:] - b[:1]) if len(w) == 2 else (w, b)


def enough(Cs: Sequence[float], ranks: Sequence[tuple[float, float]]) -> bool:
    """Whether no C after those that are ranked so far can win; the least rank is the best."""
    return Cs[len(ranks) - 1] > WORSE * Cs[ranks.index(min(ranks))]


def _class_weights(
    class_weight: str | Mapping[Any, float] | None, targets: NDArray[np.intp], classes: list[str], rows: Float64 | None
) -> Float64 | None:
    """The weight of each row ``(n,)``, its own included; None is 1 for each.

    Raises:
        ValueError: ``class_weight`` is neither ``"balanced"`` nor a dict.
    """
    if class_weight is None:
        return rows
    if class_weight == "balanced":
        counts = np.bincount(targets, rows, minlength=len(classes))
        each = counts.sum() / (len(classes) * np.maximum(counts, 1e-300))
    elif isinstance(class_weight, Mapping):
        known = {str(label): float(weight) for label, weight in class_weight.items()}
        each = np.array([known.get(label, 1.0) for label in classes])
    else:
        message = f"class_weight is {class_weight!r}; expected 'balanced', a dict of weights by label, or None"
        raise ValueError(message)
    weights: Float64 = each[targets]
    return weights if rows is None else weights * rows


@dataclass(frozen=True)
class _Point:
    """Results of one value of C on the held-out rows of one fold: weighted sums, because logits would fill the memory."""

    head: DenseHead
    optimum: Optimum
    loss: float
    right: float
    weight: float
    seconds: float


def _scores(points: Sequence[_Point]) -> dict[str, float]:
    """Mean log-loss and accuracy of one C over the folds."""
    total = sum(point.weight for point in points)
    return {
        "log_loss": sum(point.loss for point in points) / total,
        "accuracy": sum(point.right for point in points) / total,
    }


def _as_json(class_weight: str | Mapping[Any, float] | None) -> str | dict[str, float] | None:
    if isinstance(class_weight, Mapping):
        return {str(label): float(weight) for label, weight in class_weight.items()}
    return class_weight


class LogisticHead(ClassifierHead):
    """Multinomial logistic regression with an L2 or elastic net penalty.

    Args:
        C: inverse regularisation strength; None chooses it.
        Cs: the values to choose from; None is 45 over eleven decades, and every fourth of them for an elastic net.
        class_weight: None, ``"balanced"``, or a dict of weights by label, 1 for those it lacks.
        l1_ratio: share of absolute values in the penalty; more than 0 is an elastic net, fitted by scikit-learn's SAGA.
        select: what C is chosen by: the least ``"log-loss"``, or the best ``"accuracy"`` (in a tie, the least log-loss).
        cv: number of folds, if there is no validation set, or the folds themselves as pairs of arrays of row numbers.
        max_iter: limit of evaluations of the objective for each value.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if torch finds one and it is worth it; see `row_sums.gpu_for`.
        seed: of the folds.

    Attributes:
        classes_: labels in the order of the outputs.
        C_: the value in use.
        path_: for each value tried: C; log_loss and accuracy (out of fold or on validation); gradient, the certificate of the
            fit (see `softmax.Optimum`, the worst of the folds); evaluations, seconds, converged.
        fitted_: the fitted head as arrays, temperature included.
        temperature_: fitted on the out-of-fold or validation logits of the chosen value.
        conformal_: prediction sets, calibrated on the same logits; None if there were none out of fold.

    >>> from classifiers import LogisticHead
    >>> from store import FeatureCache
    >>> train = FeatureCache("pets.cache").subset("train")
    >>> head = LogisticHead(C=1.0).fit(train.X, train.y)
    >>> head.predict_proba(train.X[:3]).shape
    (3, 2)
    """

    name = "logistic"

    def __init__(
        self,
        C: float | None = None,
        *,
        Cs: Sequence[float] | None = None,
        class_weight: str | Mapping[Any, float] | None = None,
        l1_ratio: float = 0.0,
        select: str = "log-loss",
        cv: int | Iterable[Fold] = 5,
        max_iter: int = 2000,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.C = C
        self.Cs = Cs
        self.class_weight = class_weight
        self.l1_ratio = l1_ratio
        self.select = select
        self.cv = cv
        self.max_iter = max_iter
        self.device = device
        self.seed = seed

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        """Choose C and fit.

        Args:
            X: features ``(n, d)``; lazy features are read from disk at each step of the fit.
            y: labels ``(n,)``.
            sample_weight: how many times each row counts ``(n,)``, in fitting, choosing and calibrating; None is once.
            validation: ``(X, y)`` to choose on, each row once; the final fit uses both. Without it, k-fold inside ``X``.
            groups: as in `Head.fit`.
            views: number of consecutive rows that are views of one image, all of one group. All are fitted; choosing and
                calibrating use the first of each.

        Raises:
            ValueError: names the setting, label or weight that cannot be used.
        """
        features: Features
        if isinstance(X, LazyFeatures):
            features, labels, self.n_features_in_ = X, np.asarray(y), X.shape[1]
        else:
            features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        weights = None
        if sample_weight is not None:
            weights = np.asarray(_check_sample_weight(sample_weight, features, dtype=np.float64, ensure_non_negative=True))
        check_classification_targets(labels)
        self.classes_, targets = class_indices(labels)
        self._check_settings(targets, weights)
        with threads_for(features.size):
            self._choose_and_fit(features, targets, weights, validation, groups, views)
        return self

    def _check_settings(self, targets: NDArray[np.intp], weights: Float64 | None) -> None:
        weightless = np.bincount(targets, weights) == 0
        if weightless.any():
            message = f"class {self.classes_[weightless][0]!s} has only sample weights of 0; leave its rows out"
            raise ValueError(message)
        if self.select not in SELECT:
            message = f"select is {self.select!r}; expected {' or '.join(map(repr, SELECT))}"
            raise ValueError(message)
        if not 0 <= self.l1_ratio <= 1:
            message = f"l1_ratio is {self.l1_ratio}; expected 0 to 1"
            raise ValueError(message)
        if isinstance(self.class_weight, Mapping):
            unknown = sorted(set(map(str, self.class_weight)) - set(map(str, self.classes_)))
            if unknown:
                message = f"class_weight has labels that the data lacks: {', '.join(unknown)}"
                raise ValueError(message)

    def _choose_and_fit(
        self,
        features: Features,
        targets: NDArray[np.intp],
        weights: Float64 | None,
        validation: tuple[ArrayLike, ArrayLike] | None,
        groups: Sequence[bytes] | None,
        views: int,
    ) -> None:
        if validation is None:
            folds = self._folds(targets, groups)
        else:
            features, targets, folds, groups = self._with_validation(features, targets, validation, groups, views)
            weights = None if weights is None else np.append(weights, np.ones(len(targets) - len(weights)))
        folds = on_first_views(folds, views)
        self.path_, heads = self._path(features, targets, weights, folds)
        self.history_ = self.path_
        best = min(self.path_, key=self._rank, default=None)
        self.C_ = float(best["C"]) if best else float(self.C or 1.0)
        fitted, optimum = self._problem(features, targets, weights).fit(self.C_, heads[self.C_][0] if best else None)
        self.converged_, self.n_iter_ = optimum.converged, optimum.evaluations
        self.conformal_: Conformal | None = None
        if best:
            rows = np.concatenate([test for _, test in folds])
            row_weights = None if weights is None else weights[rows]
            logits = [head.logits(features[test]) for head, (_, test) in zip(heads[self.C_], folds, strict=True)]
            held = np.concatenate(logits), targets[rows]
            fitted, self.conformal_ = calibrate(fitted, *held, weights=row_weights, units=units_of(groups, rows))
        self.fitted_ = fitted
        self.temperature_ = fitted.temperature

    def _with_validation(
        self,
        features: Features,
        targets: NDArray[np.intp],
        validation: tuple[ArrayLike, ArrayLike],
        groups: Sequence[bytes] | None,
        views: int,
    ) -> tuple[Features, NDArray[np.intp], list[Fold], Sequence[bytes] | None]:
        held, labels = validation
        if isinstance(features, LazyFeatures) and isinstance(held, LazyFeatures):
            every, truth, folds, order = lazy_with_validation(features, targets, (held, labels), self.classes_, views)
            named = groups and len(groups) == len(order)
            return every, truth, folds, [groups[i] for i in order.tolist()] if groups and named else None
        return *with_validation(np.asarray(features), targets, validation, self.classes_), groups

    def _rank(self, point: Mapping[str, float | bool]) -> tuple[float, float]:
        """The rank of a point of the path; the least is chosen."""
        return (-float(point["accuracy"]) if self.select == "accuracy" else 0.0, float(point["log_loss"]))

    def _folds(self, targets: NDArray[np.intp], groups: Sequence[bytes] | None) -> list[Fold]:
        if not isinstance(self.cv, int):
            return list(self.cv)
        folds = stratified_folds(targets, groups, self.cv, self.seed)
        if not folds and self.C is None:
            log.warning("%s, so C cannot be chosen and is 1, without calibration", NOTHING_TO_JUDGE)
        return folds

    def _path(
        self, X: Features, targets: NDArray[np.intp], weights: Float64 | None, folds: list[Fold]
    ) -> tuple[list[dict[str, float | bool]], dict[float, list[DenseHead]]]:
        """Log-loss and accuracy out of fold for every C, from small to large, and the head of each fold."""
        if not folds:
            return [], {}
        grid = (NET if self.l1_ratio else CS) if self.Cs is None else self.Cs
        Cs = sorted({float(C) for C in (grid if self.C is None else [self.C])})
        tried: list[list[_Point]] = []
        with Stage(f"choosing C of the {self.name} head", len(folds), "folds") as stage:
            for fold in stage.each(folds):  # one standardised copy at a time; each goes at least as far as those before
                tried.append(self._path_of_fold(X, targets, weights, fold, Cs, max(map(len, tried), default=0)))
            for fold, points in zip(folds, tried, strict=True):
                missing = Cs[len(points) : len(tried[-1])]
                points += self._path_of_fold(X, targets, weights, fold, missing, len(missing)) if missing else []
        path: list[dict[str, float | bool]] = []
        heads: dict[float, list[DenseHead]] = {}
        for each_fold in zip(*tried, strict=True):
            optima = [point.optimum for point in each_fold]
            C = optima[0].C
            heads[C] = [point.head for point in each_fold]
            path.append(
                {
                    "C": float(C),
                    **_scores(each_fold),
                    "gradient": max(optimum.gradient for optimum in optima),
                    "evaluations": sum(optimum.evaluations for optimum in optima),
                    "seconds": round(sum(point.seconds for point in each_fold), 4),
                    "converged": all(optimum.converged for optimum in optima),
                }
            )
        return path, heads

    def _path_of_fold(
        self,
        X: Features,
        targets: NDArray[np.intp],
        weights: Float64 | None,
        fold: Fold,
        Cs: Sequence[float],
        least: int,
    ) -> list[_Point]:
        """Points along the path until no further C can win, but at least ``least``."""
        train, test = fold
        problem = self._problem(X[train], targets[train], None if weights is None else weights[train])
        points: list[_Point] = []
        ranks: list[tuple[float, float]] = []
        held, truth = X[test], targets[test]
        counts = np.ones(len(test)) if weights is None else weights[test]
        total = float(counts.sum())
        begin = time.perf_counter()
        for head, optimum in problem.heads(Cs):
            logits = head.logits(held)
            loss, right = log_loss(logits, truth, counts) * total, float(counts @ (logits.argmax(axis=1) == truth))
            points.append(_Point(head, optimum, loss, right, total, time.perf_counter() - begin))
            ranks.append(self._rank(_scores(points[-1:])))
            begin = time.perf_counter()
            if len(points) >= least and enough(Cs, ranks):
                break
        return points

    def _problem(self, X: Features, targets: NDArray[np.intp], weights: Float64 | None) -> _Problem:
        return _Problem(self, X, targets, [str(label) for label in self.classes_], weights)

    def _refit(self, X: Float32, targets: NDArray[np.intp], classes: list[str]) -> DenseHead:
        with threads_for(X.size):
            return _Problem(self, X, targets, classes, None).fit(self.C_)[0]

    def decision_function(self, X: ArrayLike) -> Float32:
        """Logits ``(n, k)``; for two classes ``(n,)``, positive for the second."""
        check_is_fitted(self)
        logits = self.fitted_.logits(validate_data(self, X, dtype=np.float32, reset=False))
        return np.asarray(logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        """Whether it can be fitted on lazy features."""
        return not self.l1_ratio

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use, as JSON."""
        return {
            "C": self.C_,
            "chosen": self.C is None and bool(self.path_),
            "select": self.select,
            "class_weight": _as_json(self.class_weight),
            "l1_ratio": self.l1_ratio,
            "max_iter": self.max_iter,
            "cv": self.cv if isinstance(self.cv, int) else "given",
            "seed": self.seed,
        }
