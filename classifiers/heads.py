"""Heads by name: our own, which can be saved, and any scikit-learn classifier, which lives in this process only."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import packages_distributions
from typing import Any

from store.errors import UsageError
from store.samples import MULTI_LABEL, REGRESSION, SINGLE_LABEL

OWN = {  # for each task; the first is its default
    SINGLE_LABEL: {
        "logistic": "logistic.LogisticHead",
        "mlp": "mlp.MlpHead",
        "ridge": "ridge.RidgeHead",
        "knn": "neighbours.KnnHead",
        "centroid": "centroid.CentroidHead",
    },
    MULTI_LABEL: {"logistic": "sigmoid.MultiLabelLogisticHead", "mlp": "mlp.MultiLabelMlpHead"},
    REGRESSION: {"ridge": "ridge.RidgeRegressionHead"},
}
HEADS = tuple(OWN[SINGLE_LABEL])


def make_head(name: str | None, task: str = SINGLE_LABEL, **settings: Any) -> Any:
    """An unfitted head by name; settings that are None keep its defaults.

    Args:
        name: one of `HEADS` (None is the task's default), or the dotted name of a scikit-learn classifier in an installed
            package, such as ``sklearn.svm.SVC``. That one is imported, fitted and evaluated like the others, and cannot be
            saved.
        task: what the samples were extracted for.
        settings: what its ``__init__`` takes.

    Raises:
        UsageError: no such head, or a setting that it does not have.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if name is not None and "." in name:
        return _estimator(name, given)
    known = OWN[task]
    name = name or next(iter(known))
    if name not in known:
        message = f"--head {name}: there is {', '.join(known)}" + (f" for --task {task}" if task != SINGLE_LABEL else "")
        raise UsageError(message)
    module, _, kind = known[name].partition(".")
    head: Any = getattr(importlib.import_module(f".{module}", __package__), kind)()
    unknown = sorted(set(given) - set(head.get_params()))
    if unknown:
        message = f"the {name} head has no setting {', '.join(unknown)}"
        raise UsageError(message)
    return head.set_params(**given)


def name_of(head: Any) -> str:
    """What a head is called in a bundle."""
    return str(getattr(head, "kind", type(head).__name__.removesuffix("Head").lower()))


def settings_of(head: Any) -> dict[str, Any]:
    """What a head was told beyond its defaults, as JSON and as `make_head` takes it: what a refit on other rows begins with."""
    plain = {name: value for name, value in head.get_params().items() if isinstance(value, (str, int, float, list, tuple))}
    defaults = type(head)().get_params()
    return {name: value for name, value in plain.items() if value != defaults[name]}


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


def need_task(head: Any, task: str) -> None:
    """Refuse a head for other targets than the samples have.

    Raises:
        UsageError: it is one.
    """
    made_for = getattr(head, "task", SINGLE_LABEL)
    if made_for != task:
        message = (
            f"{type(head).__name__} is a head for {made_for}, and these samples were extracted with --task {task}; "
            f"take --head {', '.join(OWN[task])}, or make_head({next(iter(OWN[task]))!r}, {task!r})"
        )
        raise UsageError(message)


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
