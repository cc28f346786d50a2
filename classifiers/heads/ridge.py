"""The ridge heads: ridge regression of numbers, or as a classifier on targets of +1 and -1."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from classifiers.evaluation.probabilities import Float32
from classifiers.evaluation.regression import Intervals
from classifiers.heads.solvers.spectrum import Spectrum
from classifiers.heads.solvers.standardise import standardisation
from classifiers.heads.solvers.threads import threads_for
from store.progress.stages import Stage
from store.tasks import RegressionTask

from .fitted import DenseHead, FittedHead
from .folds import group_folds, on_first_views, units_of
from .search import JUDGED, Head, SearchHead, Tried, drawing

log = logging.getLogger("penult.classifiers")

ALPHAS = tuple(float(alpha) for alpha in np.logspace(-2, 7, 37))
DEFAULT_ALPHA = 1.0  # scikit-learn's


def _signs(targets: NDArray[np.intp], k: int) -> NDArray[np.float64]:
    return np.where(targets[:, None] == np.arange(k), 1.0, -1.0)


def _head(spectrum: Spectrum, alpha: float, classes: list[str]) -> DenseHead:
    return DenseHead(spectrum.mean, spectrum.scale, [spectrum.solution(alpha)], classes)


class RidgeHead(SearchHead):
    """Ridge regression as a classifier: the target of each class is 1 for its own rows and -1 for all others.

    Lambda (alpha in scikit-learn) is chosen by the squared error, as `RidgeClassifierCV` does: by leave-one-out, which needs no
    other fit, or by folds if rows form groups, or on validation. Probabilities are a softmax of the decision values over a
    temperature, which is fitted on the same out-of-fold values.

    Args:
        alpha: regularisation strength on standardised features; None chooses it.
        alphas: the values to choose from.
        cv, seed: folds, if rows form groups and there is no validation set.

    Attributes:
        alpha_: the value in use.
        classes_, history_, fitted_, temperature_: as in `SearchHead`; ``squared_error`` is the criterion.

    >>> from classifiers import RidgeHead
    >>> from store import FeatureCache
    >>> train = FeatureCache("pets.cache").subset("train")
    >>> RidgeHead().fit(train.X, train.y).predict(train.X[:2]).tolist()
    ['cat', 'cat']
    """

    name, criterion = "ridge", "squared_error"

    def __init__(self, alpha: float | None = None, *, alphas: Sequence[float] = ALPHAS, cv: int = 5, seed: int = 0) -> None:
        self.alpha = alpha
        self.alphas = alphas
        self.cv = cv
        self.seed = seed

    @property
    def alpha_(self) -> float:
        return float(self.setting_["alpha"])

    def _settings(self, n: int) -> list[dict[str, Any]]:
        return [{"alpha": float(alpha)} for alpha in ([self.alpha] if self.alpha is not None else sorted(self.alphas))]

    def _unchosen(self, n: int) -> dict[str, Any]:
        return {"alpha": float(DEFAULT_ALPHA if self.alpha is None else self.alpha)}

    def _by_folds(self, X: Float32, targets: NDArray[np.intp], groups: Sequence[bytes] | None, views: int) -> Tried | None:
        alone = views == 1 and (groups is None or len(set(groups)) == len(groups))
        if not alone or np.bincount(targets).min() < 2:
            return super()._by_folds(X, targets, groups, views)
        spectrum = Spectrum(X, _signs(targets, len(self.classes_)))
        settings, rows = self._settings(len(X)), drawing(len(X), len(self.classes_), self.seed)(np.arange(len(X)))
        logits = list(spectrum.left_out(rows, [setting["alpha"] for setting in settings]))
        names = [str(label) for label in self.classes_]
        return Tried(settings, logits, targets[rows], "leave-one-out", lambda setting: _head(spectrum, setting["alpha"], names))

    def _judge(
        self, X: Float32, targets: NDArray[np.intp], held: Float32, settings: Sequence[dict[str, Any]]
    ) -> Sequence[Float32]:
        spectrum = Spectrum(X, _signs(targets, len(self.classes_)))
        names = [str(label) for label in self.classes_]
        return [_head(spectrum, setting["alpha"], names).logits(held) for setting in settings]

    def _fitted(self, X: Float32, targets: NDArray[np.intp], classes: list[str], setting: dict[str, Any]) -> FittedHead:
        return _head(Spectrum(X, _signs(targets, len(classes))), setting["alpha"], classes)

    def _score(self, logits: Float32, targets: NDArray[np.intp]) -> dict[str, float]:
        return {"squared_error": float(np.mean((logits - _signs(targets, logits.shape[1])) ** 2))}


class RidgeRegressionHead(RegressorMixin, Head):  # type: ignore[misc]
    """Ridge regression of one number or several: y is ``(n,)`` or ``(n, t)``.

    Features and numbers are standardised. One lambda serves all columns: that with the least mean squared error, by
    leave-one-out, which needs no other fit, or by folds if rows form groups, or on validation. The prediction intervals come
    from the same predictions.

    Args:
        alpha, alphas, cv, seed: as in `RidgeHead`.

    Attributes:
        alpha_: the value in use.
        chosen_by_: ``leave-one-out``, ``folds`` or ``validation``; None if nothing could be chosen.
        history_: for each value tried: alpha, and squared_error of the standardised numbers, mean over columns.
        fitted_: the fitted head as arrays; its outputs are in the units of y.
        conformal_: prediction intervals; None if no row was out of fold.

    >>> import numpy as np
    >>> from classifiers import RidgeRegressionHead
    >>> X = np.arange(12, dtype=np.float32).reshape(-1, 1)
    >>> float(RidgeRegressionHead(alpha=0.01).fit(X, 3 * X[:, 0]).predict(X[4:5])[0].round(1))
    12.0
    """

    name, task = "ridge", RegressionTask.name

    def __init__(self, alpha: float | None = None, *, alphas: Sequence[float] = ALPHAS, cv: int = 5, seed: int = 0) -> None:
        self.alpha = alpha
        self.alphas = alphas
        self.cv = cv
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
        """Choose lambda and fit; without a validation set, on left-out rows."""
        features, targets = map(np.asarray, validate_data(self, X, y, dtype=np.float32, multi_output=True, y_numeric=True))
        self.n_outputs_ = None if targets.ndim == 1 else targets.shape[1]
        numbers = targets.reshape(len(targets), -1).astype(np.float64)
        held = None
        if validation is not None:
            held = np.asarray(validation[0], np.float32), np.asarray(validation[1], np.float64).reshape(-1, numbers.shape[1])
        with threads_for(features.size):
            self._choose_and_fit(features, numbers, held, groups, views)
        return self

    def _choose_and_fit(
        self,
        X: Float32,
        numbers: NDArray[np.float64],
        validation: tuple[Float32, NDArray[np.float64]] | None,
        groups: Sequence[bytes] | None,
        views: int,
    ) -> None:
        n, whole = len(X), None
        if validation is not None:
            X, numbers = np.concatenate([X, validation[0]]), np.concatenate([numbers, validation[1]])
        centre, unit = standardisation(numbers)
        targets = (numbers - centre) / unit
        alphas = [float(alpha) for alpha in ([self.alpha] if self.alpha is not None else sorted(self.alphas))]
        self.alpha_ = float(self.alpha or DEFAULT_ALPHA)
        self.chosen_by_: str | None = None
        self.conformal_: Intervals | None = None
        self.history_: list[dict[str, float]] = []
        if validation is None and views == 1 and n > 2 and (groups is None or len(set(groups)) == n):
            whole, by = Spectrum(X, targets), "leave-one-out"
            rows = np.sort(np.random.default_rng(self.seed).permutation(n)[:JUDGED])
            held = self._choose(by, alphas, list(whole.left_out(rows, alphas)), targets[rows])
            self.conformal_ = Intervals.fit(held * unit + centre, (held - targets[rows]) * unit)
        elif folds := [(np.arange(n), np.arange(n, len(X)))] if validation else group_folds(n, groups, self.cv, self.seed):
            by = "validation" if validation else "folds"
            folds = on_first_views(folds, views)
            spectra = (Spectrum(X[train], targets[train]) for train, _ in folds)
            with Stage(f"choosing lambda of the {self.name} head", len(folds), "folds") as stage:
                parts = [
                    [_head(spectrum, alpha, []).logits(X[test]) for alpha in alphas]
                    for spectrum, (_, test) in zip(spectra, stage.each(folds), strict=True)
                ]
            rows = np.concatenate([test for _, test in folds])
            held = self._choose(by, alphas, [np.concatenate(each) for each in zip(*parts, strict=True)], targets[rows])
            units = units_of(groups, rows)
            self.conformal_ = Intervals.fit(held * unit + centre, (held - targets[rows]) * unit, units=units)
        elif self.alpha is None:
            log.warning("there is a single training sample or group, so lambda cannot be chosen and is %g", self.alpha_)
        self.fitted_ = self._fitted(whole or Spectrum(X, targets), centre, unit)

    def _choose(
        self, by: str, alphas: Sequence[float], predictions: Sequence[Float32], targets: NDArray[np.float64]
    ) -> Float32:
        """Choose lambda by predictions ``(m, t)`` of left-out rows for each lambda; returns those of the best."""
        errors = [float(np.mean((values - targets) ** 2)) for values in predictions]
        best = int(np.argmin(errors))
        self.chosen_by_, self.alpha_ = by, alphas[best]
        self.history_ = [{"alpha": alpha, "squared_error": error} for alpha, error in zip(alphas, errors, strict=True)]
        return predictions[best]

    def _fitted(self, spectrum: Spectrum, centre: Float32, unit: Float32) -> DenseHead:
        """The fitted head, with outputs in the units of y."""
        weight, bias = spectrum.solution(self.alpha_)
        layers = [(weight * unit[:, None], bias * unit + centre)]
        return DenseHead(spectrum.mean, spectrum.scale, layers, [str(j) for j in range(len(unit))], activation="Identity")

    def refit(self, X: ArrayLike, y: ArrayLike) -> DenseHead:
        numbers = np.asarray(y, np.float64)
        centre, unit = standardisation(numbers)
        return self._fitted(Spectrum(np.asarray(X, np.float32), (numbers - centre) / unit), centre, unit)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """The predicted numbers, in the shape of y."""
        check_is_fitted(self)
        values = self.fitted_.probabilities(validate_data(self, X, dtype=np.float32, reset=False)).astype(np.float64)
        return values[:, 0] if self.n_outputs_ is None else values

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use, as JSON."""
        tried = {"tried": len(self.history_), "chosen_by": self.chosen_by_}
        return {"alpha": self.alpha_, **tried, "cv": self.cv, "seed": self.seed}
