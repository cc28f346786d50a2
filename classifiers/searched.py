"""What ridge, knn and centroid have in common: settings tried out of fold, a fit with the best, a temperature."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from .conformal import Conformal, calibrate
from .dense import FittedHead, Float32, class_indices, log_loss, with_validation
from .folds import Fold, on_first_views, stratified_folds
from .threads import threads_for

log = logging.getLogger("penult.classifiers")

JUDGED = 10_000  # rows that settings are judged on, drawn where there are more: an accuracy to half a point
LOGITS = 2**22  # numbers; and not more than that many for one setting, where there are many classes


@dataclass(frozen=True)
class Tried:
    """Settings, and what they gave on rows that they were not fitted on.

    Attributes:
        settings: in the order they were tried.
        logits: ``(m, k)`` of each.
        targets: of the m rows.
        by: how those rows were kept apart: ``folds``, ``validation`` or ``leave-one-out``.
        fit: makes the head on all rows from one setting, where trying them has done most of that work.
    """

    settings: Sequence[dict[str, Any]]
    logits: Sequence[Float32]
    targets: NDArray[np.intp]
    by: str = "folds"
    fit: Callable[[dict[str, Any]], FittedHead] | None = None


class SearchedHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A head with scikit-learn's manners whose settings are chosen from a short list.

    A kind of head says what its settings are, what each gives on held-out rows, and how it is fitted with one of them.
    Its ``__init__`` has ``cv``, the number of folds where no validation set is given, and ``seed``, of the folds.

    Attributes:
        classes_: labels in the order of the outputs.
        setting_: what was chosen.
        chosen_by_: ``folds``, ``validation`` or ``leave-one-out``; None where nothing could be chosen.
        history_: for each setting tried: what it is, the criterion and accuracy, out of fold or on validation.
        dense_: the fitted head as arrays, temperature included.
        temperature_: fitted on the out-of-fold or validation logits of the chosen setting.
        conformal_: prediction sets, calibrated on the same logits; None where nothing could be chosen.
    """

    cv: int
    seed: int
    criterion = "log_loss"  # of history_, the least of which is chosen
    unscaled = True  # whether the temperature also gives the logits their scale
    uncalibrated = 1.0  # the temperature where there are too few samples to fit one

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
            y: labels ``(n,)``.
            validation: ``(X, y)`` to choose on; the final fit uses both. Without it, folds inside ``X``.
            groups: what must not be divided between folds, one per row of ``X``.
            views: rows come in runs of so many views of an image, all of one group. All are fitted; what is chosen and
                calibrated is judged on the first of each.
        """
        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        check_classification_targets(labels)
        self.classes_, targets = class_indices(labels)
        with threads_for(features.size):
            if validation is None:
                tried = self._by_folds(features, targets, groups, views)
            else:
                features, targets, folds = with_validation(features, targets, validation, self.classes_)
                tried = replace(self._by(on_first_views(folds, views), features, targets), by="validation")
            self._choose_and_fit(features, targets, tried)
        return self

    @abstractmethod
    def _settings(self, n: int) -> list[dict[str, Any]]:
        """What to choose from with ``n`` training rows."""

    @abstractmethod
    def _unchosen(self, n: int) -> dict[str, Any]:
        """The setting where a class is too small to choose one."""

    @abstractmethod
    def _judge(
        self, X: Float32, targets: NDArray[np.intp], held: Float32, settings: Sequence[dict[str, Any]]
    ) -> Sequence[Float32]:
        """Logits ``(m, k)`` of held-out rows ``(m, d)`` for each setting, fitted on the others."""

    @abstractmethod
    def _fitted(self, X: Float32, targets: NDArray[np.intp], classes: list[str], setting: dict[str, Any]) -> FittedHead:
        """The head on these rows with one setting."""

    def _score(self, logits: Float32, targets: NDArray[np.intp]) -> dict[str, float]:
        """What one setting is worth, by its logits on held-out rows."""
        return {"log_loss": log_loss(logits, targets)}

    def _by_folds(self, X: Float32, targets: NDArray[np.intp], groups: Sequence[bytes] | None, views: int) -> Tried | None:
        """Every setting on rows it was not fitted on; None where a class is too small for that."""
        folds = on_first_views(stratified_folds(targets, groups, self.cv, self.seed), views)
        return self._by(folds, X, targets) if folds else None

    def _by(self, folds: Sequence[Fold], X: Float32, targets: NDArray[np.intp]) -> Tried:
        settings = self._settings(min(len(train) for train, _ in folds))
        draw = self._drawing(sum(len(test) for _, test in folds))
        drawn = [(train, draw(test)) for train, test in folds]
        parts = [self._judge(X[train], targets[train], X[test], settings) for train, test in drawn]
        logits = [np.concatenate(each) for each in zip(*parts, strict=True)]
        return Tried(settings, logits, targets[np.concatenate([test for _, test in drawn])])

    def _drawing(self, total: int) -> Callable[[NDArray[np.intp]], NDArray[np.intp]]:
        """What draws, of any part of ``total`` held-out rows, those that settings are judged on."""
        share = min(1.0, JUDGED / total, LOGITS / len(self.classes_) / total)
        rng = np.random.default_rng(self.seed)
        return lambda rows: rows if share == 1 else np.sort(rng.choice(rows, max(round(share * len(rows)), 1), replace=False))

    def _choose_and_fit(self, X: Float32, targets: NDArray[np.intp], tried: Tried | None) -> None:
        classes = [str(label) for label in self.classes_]
        self.chosen_by_ = tried.by if tried else None
        self.conformal_: Conformal | None = None
        if tried is None:
            self.setting_, self.history_ = self._unchosen(len(X)), []
            log.warning(
                "a class has a single training sample or group: nothing can be chosen or calibrated, and the %s head takes %s",
                type(self).__name__.removesuffix("Head").lower(),
                ", ".join(f"{key} {value:.4g}" for key, value in self.setting_.items()) or "no setting",
            )
            self.dense_ = self._fitted(X, targets, classes, self.setting_).with_temperature(self.uncalibrated)
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
            self.dense_, self.conformal_ = calibrate(fitted, tried.logits[best], tried.targets, unscaled=self.unscaled)
        self.temperature_ = self.dense_.temperature

    def again(self, X: Float32, targets: NDArray[np.intp], classes: list[str]) -> FittedHead:
        """A head on other rows ``(n, d)`` with what was chosen here, without choosing again."""
        with threads_for(X.size):
            return self._fitted(np.asarray(X, np.float32), targets, classes, self.setting_)

    def predict_proba(self, X: ArrayLike) -> Float32:
        """Probabilities ``(n, k)``, temperature included."""
        check_is_fitted(self)
        return self.dense_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable label of each row."""
        guess = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[guess])

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """What was used, as JSON."""
        tried = {"tried": len(self.history_), "chosen_by": self.chosen_by_}
        return {**self.setting_, **tried, "cv": self.cv, "seed": self.seed}
