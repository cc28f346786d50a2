"""Base classes of heads: `Head`, and `SearchHead`, which tries settings out of fold and fits with the best one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from classifiers.evaluation.conformal import Conformal
from classifiers.evaluation.probabilities import Float32, log_loss
from classifiers.evaluation.units import Units
from classifiers.heads.solvers.threads import threads_for
from store.progress.stages import Stage
from store.tasks import ONE_LABEL, TASKS

from .fitted import FittedHead, calibrate
from .folds import NOTHING_TO_JUDGE, Fold, class_indices, on_first_views, stratified_folds, units_of, with_validation

log = logging.getLogger("penult.classifiers")

JUDGED = 10_000  # rows that settings are judged on, drawn at random if there are more: an accuracy to half a point
LOGITS = 2**22  # numbers; at most this many for one setting, if there are many classes


@dataclass(frozen=True)
class Tried:
    """Settings, and their logits on rows that they were not fitted on.

    Attributes:
        settings: in the order they were tried.
        logits: ``(m, k)`` for each setting.
        targets: class indices of the m rows ``(m,)``.
        by: how these rows were held out: ``folds``, ``validation`` or ``leave-one-out``.
        fit: fits the head on all rows with one setting, if trying them has done most of that work.
        units: which of the m rows belong together; None if each is independent.
    """

    settings: Sequence[dict[str, Any]]
    logits: Sequence[Float32]
    targets: NDArray[np.intp]
    by: str = "folds"
    fit: Callable[[dict[str, Any]], FittedHead] | None = None
    units: Units | None = None


def drawing(total: int, outputs: int, seed: int) -> Callable[[NDArray[np.intp]], NDArray[np.intp]]:
    """A function that draws, from any part of ``total`` held-out rows, those that settings are judged on."""
    share = min(1.0, JUDGED / total, LOGITS / outputs / total)
    rng = np.random.default_rng(seed)
    return lambda rows: rows if share == 1 else np.sort(rng.choice(rows, max(round(share * len(rows)), 1), replace=False))


class Head(BaseEstimator, ABC):  # type: ignore[misc]
    """A scikit-learn estimator on features whose fit gives a `FittedHead`, which is saved, fused and used for prediction.

    A new head is a subclass and a row of `registry.ROWS`. `fit` chooses its settings, on a validation set or by folds.

    Attributes:
        name, task: as in its row of the registry.
        streams: whether it can be fitted on lazy features.
        device: where it is fitted.
        fitted_: the head as arrays, temperature included.
        temperature_: fitted on rows out of fold or of the validation set; None if it has none.
        conformal_: prediction sets or intervals, calibrated on the same rows: `conformal.Conformal` or `regression.Intervals`.
        history_: each setting tried, or each epoch, as JSON.
    """

    name: ClassVar[str] = ""
    task: ClassVar[str] = ONE_LABEL.name
    streams: bool = False
    device: str = "cpu"
    fitted_: FittedHead
    temperature_: float | None = None
    conformal_: Any = None
    history_: Sequence[dict[str, Any]]

    @property
    @abstractmethod
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use, as JSON."""

    @abstractmethod
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        """Choose the settings and fit.

        Args:
            X: features ``(n, d)``.
            y: as `Task.truth` returns it: labels ``(n,)``, indicators ``(n, k)`` or numbers ``(n, t)``.
            validation: ``(X, y)`` to choose on; the final fit uses both. Without it, folds inside ``X``.
            groups: the group of each row of ``X``, and then of the validation rows; folds never divide a group, and prediction
                sets and intervals are calibrated by groups.
            views: number of consecutive rows that are views of one image, all of one group. All are fitted; choosing and
                calibrating use the first of each.
        """

    @abstractmethod
    def refit(self, X: ArrayLike, y: ArrayLike) -> FittedHead:
        """A head on other rows with the settings chosen in `fit`, without choosing or calibrating again.

        Args:
            X: features ``(n, d)``.
            y: as for `fit`; the distinct labels, sorted, are the outputs.
        """


class ClassifierHead(ClassifierMixin, Head):  # type: ignore[misc]
    """A head for one label an image.

    Attributes:
        classes_: labels in the order of the outputs.
    """

    classes_: NDArray[Any]

    def refit(self, X: ArrayLike, y: ArrayLike) -> FittedHead:
        classes, targets = class_indices(np.asarray(y))
        return self._refit(np.asarray(X, np.float32), targets, [str(label) for label in classes])

    @abstractmethod
    def _refit(self, X: Float32, targets: NDArray[np.intp], classes: list[str]) -> FittedHead:
        """`refit` with class indices."""

    def predict_proba(self, X: ArrayLike) -> Float32:
        """Probabilities ``(n, k)``, temperature included."""
        check_is_fitted(self)
        return self.fitted_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable label of each row."""
        check_is_fitted(self)
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])


class SearchHead(ClassifierHead):
    """A head whose settings are chosen from a short list.

    A subclass lists its settings, computes the logits of each on held-out rows, and fits with one of them. Its ``__init__`` has
    ``cv``, the number of folds if there is no validation set, and ``seed``, of the folds.

    Attributes:
        setting_: the chosen setting.
        chosen_by_: ``folds``, ``validation`` or ``leave-one-out``; None if nothing could be chosen.
        history_: for each setting tried: the setting, the criterion and accuracy, out of fold or on validation.
        fitted_, temperature_, conformal_: as in `Head`.
    """

    cv: int
    seed: int
    criterion = "log_loss"  # of history_, the least of which is chosen
    unscaled = True  # whether the temperature also gives the logits their scale
    uncalibrated = 1.0  # the temperature if there are too few samples to fit one

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        check_classification_targets(labels)
        self.classes_, targets = class_indices(labels)
        with threads_for(features.size):
            if validation is None:
                tried = self._by_folds(features, targets, groups, views)
            else:
                features, targets, folds = with_validation(features, targets, validation, self.classes_)
                tried = replace(self._by(on_first_views(folds, views), features, targets, groups), by="validation")
            self._choose_and_fit(features, targets, tried)
        return self

    @abstractmethod
    def _settings(self, n: int) -> list[dict[str, Any]]:
        """The settings to choose from with ``n`` training rows."""

    @abstractmethod
    def _unchosen(self, n: int) -> dict[str, Any]:
        """The setting if a class is too small to choose one."""

    @abstractmethod
    def _judge(
        self, X: Float32, targets: NDArray[np.intp], held: Float32, settings: Sequence[dict[str, Any]]
    ) -> Sequence[Float32]:
        """Logits ``(m, k)`` of held-out rows ``(m, d)`` for each setting, fitted on the others."""

    @abstractmethod
    def _fitted(self, X: Float32, targets: NDArray[np.intp], classes: list[str], setting: dict[str, Any]) -> FittedHead:
        """The head fitted on these rows with one setting."""

    def _score(self, logits: Float32, targets: NDArray[np.intp]) -> dict[str, float]:
        """The criterion of one setting, from its logits on held-out rows."""
        return {"log_loss": log_loss(logits, targets)}

    def _by_folds(self, X: Float32, targets: NDArray[np.intp], groups: Sequence[bytes] | None, views: int) -> Tried | None:
        """Try every setting on rows it was not fitted on; None if a class is too small for that."""
        folds = on_first_views(stratified_folds(targets, groups, self.cv, self.seed), views)
        return self._by(folds, X, targets, groups) if folds else None

    def _by(self, folds: Sequence[Fold], X: Float32, targets: NDArray[np.intp], groups: Sequence[bytes] | None) -> Tried:
        settings = self._settings(min(len(train) for train, _ in folds))
        draw = drawing(sum(len(test) for _, test in folds), len(self.classes_), self.seed)
        drawn = [(train, draw(test)) for train, test in folds]
        with Stage(f"choosing settings of the {self.name} head", len(drawn), "folds") as stage:
            parts = [self._judge(X[train], targets[train], X[test], settings) for train, test in stage.each(drawn)]
        logits = [np.concatenate(each) for each in zip(*parts, strict=True)]
        rows = np.concatenate([test for _, test in drawn])
        return Tried(settings, logits, targets[rows], units=units_of(groups, rows))

    def _choose_and_fit(self, X: Float32, targets: NDArray[np.intp], tried: Tried | None) -> None:
        classes = [str(label) for label in self.classes_]
        self.chosen_by_ = tried.by if tried else None
        self.conformal_: Conformal | None = None
        if tried is None:
            self.setting_, self.history_ = self._unchosen(len(X)), []
            log.warning(
                "%s, so nothing can be chosen or calibrated; the %s head uses %s",
                NOTHING_TO_JUDGE,
                self.name,
                ", ".join(f"{key} {value:.4g}" for key, value in self.setting_.items()) or "its defaults",
            )
            self.fitted_ = self._fitted(X, targets, classes, self.setting_).with_temperature(self.uncalibrated)
        else:
            self.history_ = [
                {
                    **setting,
                    **self._score(logits, tried.targets),
                    "accuracy": float(np.mean(logits.argmax(axis=1) == tried.targets)),
                }
                for setting, logits in zip(tried.settings, tried.logits, strict=True)
            ]
            losses = [float(each[self.criterion]) for each in self.history_]
            best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))  # `min` would keep a NaN that comes first
            self.setting_ = tried.settings[best]
            fitted = tried.fit(self.setting_) if tried.fit else self._fitted(X, targets, classes, self.setting_)
            held = tried.logits[best], tried.targets
            self.fitted_, self.conformal_ = calibrate(fitted, *held, unscaled=self.unscaled, units=tried.units)
        self.temperature_ = self.fitted_.temperature

    def _refit(self, X: Float32, targets: NDArray[np.intp], classes: list[str]) -> FittedHead:
        with threads_for(X.size):
            return self._fitted(X, targets, classes, self.setting_)

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use, as JSON."""
        tried = {"tried": len(self.history_), "chosen_by": self.chosen_by_}
        return {**self.setting_, **tried, "cv": self.cv, "seed": self.seed}


class SavedHead(BaseEstimator):  # type: ignore[misc]
    """The head of a bundle as a fitted estimator on features; see `Bundle.as_estimator`.

    Args:
        bundle: the `Bundle` of the head; features must match its fingerprint.

    Attributes:
        n_features_in_: number of features, d.
        outputs_: classes, labels or targets, in the order of the outputs.
    """

    def __init__(self, bundle: Any) -> None:
        self.bundle = bundle

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def n_features_in_(self) -> int:
        return int(self.bundle.backbone.dim)

    @property
    def outputs_(self) -> NDArray[Any]:
        return np.array(self.bundle.classes)

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Return the saved head unchanged."""
        return self

    def _outputs(self, X: ArrayLike) -> Float32:
        features = validate_data(self, X, dtype=np.float32, reset=False)
        return np.asarray(self.bundle.head_function()(features))


class SavedClassifier(ClassifierMixin, SavedHead):  # type: ignore[misc]
    """The head of a bundle for one label an image, or several, as a fitted classifier."""

    @property
    def classes_(self) -> NDArray[Any]:
        """Classes; for several labels an image, the column numbers, as in scikit-learn."""
        return self.outputs_ if TASKS[self.bundle.task].stratifies else np.arange(len(self.bundle.classes))

    def predict_proba(self, X: ArrayLike) -> Float32:
        """Probabilities ``(n, k)``, temperature included."""
        return self._outputs(X)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class ``(n,)``; for several labels, which of them each row has ``(n, k)``."""
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(axis=1)] if TASKS[self.bundle.task].stratifies else (outputs >= 0.5).astype(np.intp)


class SavedRegressor(RegressorMixin, SavedHead):  # type: ignore[misc]
    """The head of a bundle for numbers, as a fitted regressor."""

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """The predicted numbers: ``(n,)`` for one target, ``(n, t)`` for several."""
        values = self._outputs(X).astype(np.float64)
        return values[:, 0] if values.shape[1] == 1 else values
