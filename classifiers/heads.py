"""Heads by name: our own, which can be saved, and any scikit-learn classifier, which lives in this process only."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import packages_distributions
from typing import Any

from store.errors import UsageError

OWN = {
    "logistic": "logistic.LogisticHead",
    "mlp": "mlp.MlpHead",
    "ridge": "ridge.RidgeHead",
    "knn": "neighbours.KnnHead",
    "centroid": "centroid.CentroidHead",
}
HEADS = tuple(OWN)


def make_head(name: str, **settings: Any) -> Any:
    """An unfitted head by name; settings that are None keep its defaults.

    Args:
        name: one of `HEADS`, or the dotted name of a scikit-learn classifier in an installed package, such as
            ``sklearn.svm.SVC``. That one is imported, fitted and evaluated like the others, and cannot be saved.
        settings: what its ``__init__`` takes.

    Raises:
        UsageError: no such head, or a setting that it does not have.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if "." in name:
        return _estimator(name, given)
    if name not in HEADS:
        message = f"--head {name}: there is {', '.join(HEADS)}"
        raise UsageError(message)
    module, _, kind = OWN[name].partition(".")
    head: Any = getattr(importlib.import_module(f".{module}", __package__), kind)()
    unknown = sorted(set(given) - set(head.get_params()))
    if unknown:
        message = f"the {name} head has no setting {', '.join(unknown)}"
        raise UsageError(message)
    return head.set_params(**given)


def _estimator(name: str, settings: dict[str, Any]) -> Any:
    from sklearn.base import BaseEstimator, is_classifier

    module, _, kind = name.rpartition(".")
    if module.partition(".")[0] not in packages_distributions():  # never a file that happens to lie in this folder
        message = f"{name}: no installed package has the module {module.partition('.')[0]!r}; install it, or correct the name"
        raise UsageError(message)
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        message = f"{name}: {error}; expected a module and a class, such as sklearn.svm.SVC"
        raise UsageError(message) from error
    if not (inspect.isclass(found) and issubclass(found, BaseEstimator)):
        message = f"{name} is no scikit-learn estimator; expected a class, such as sklearn.svm.SVC"
        raise UsageError(message)
    try:
        head = found(**settings)
    except TypeError as error:
        message = f"{name}: {error}"
        raise UsageError(message) from error
    if not is_classifier(head) or not hasattr(head, "predict_proba"):
        message = (
            f"{name} is no classifier with predict_proba, and a head must give probabilities; "
            f"sklearn.calibration.CalibratedClassifierCV(estimator=...) adds them to one that has none"
        )
        raise UsageError(message)
    return head


def need_saveable(head: Any) -> None:
    """Refuse what could only be saved as a pickle.

    Raises:
        UsageError: it is none of our own heads.
    """
    if not hasattr(type(head), "again"):
        message = (
            f"{type(head).__name__} cannot be saved: a bundle holds ONNX and JSON and never a pickle. Evaluate it here with "
            f"classifiers.evaluate.evaluate(head, subset), or train one of {', '.join(HEADS)}"
        )
        raise UsageError(message)
