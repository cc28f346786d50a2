"""Heads by name: our own, a row and a group of settings each; and any scikit-learn classifier, which cannot be saved.

Nothing here imports NumPy: the command line and job files read the rows before there is anything to compute.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from extractor.settings.declaration import Settings, setting
from extractor.settings.groups import as_tuple
from store.errors import UsageError
from store.tasks import ONE_LABEL, MultiLabelTask, RegressionTask


class PenaltySettings(Settings):
    """Of every logistic head."""

    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: logistic"

    C: float | None = setting(None, "One value.", gt=0, metavar="C", shown="searched")


class LogisticSettings(PenaltySettings):
    class_weight: Literal["balanced"] | None = setting(None, "As if every class had as many images.")
    select: Literal["log-loss", "accuracy"] = setting("log-loss", "What C is chosen by.")
    l1_ratio: float = setting(0.0, "Elastic net (slow): the share of |w| in its penalty.", ge=0, le=1, metavar="SHARE")


Width = Annotated[int, Field(ge=1, le=65536)]  # of a hidden layer


class MlpSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: mlp"

    hidden: Annotated[tuple[Width, ...], BeforeValidator(as_tuple)] | None = setting(
        None, "Width of each hidden layer.", metavar="N,N", shown="searched"
    )
    lr: float | None = setting(None, "Learning rate.", gt=0, metavar="RATE", shown="searched")
    schedule: Literal["constant", "cosine"] = setting("constant", "Of the learning rate.")
    dropout: float | None = setting(None, "Probability.", ge=0, lt=1, metavar="P", shown="0.3")
    weight_decay: float | None = setting(None, "Of AdamW.", ge=0, metavar="X", shown="0.01")


class RidgeSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: ridge"

    alpha: float | None = setting(None, "One lambda.", gt=0, metavar="X", shown="searched")


class KnnSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: knn"

    k: int | None = setting(None, "How many neighbours vote.", ge=1, metavar="N", shown="searched")


@dataclass(frozen=True)
class HeadRow:
    """One head.

    Attributes:
        name: on the command line, in jobs and in bundles.
        task: what it is for; the first of a task is its default.
        settings: those that are its own.
        place: module of this package and class.
    """

    name: str
    task: str
    settings: type[Settings]
    place: str

    def make(self) -> Any:
        """An unfitted one with its defaults."""
        module, _, kind = self.place.partition(".")
        return getattr(importlib.import_module(f".{module}", __package__), kind)()


ROWS = (
    HeadRow("logistic", ONE_LABEL.name, LogisticSettings, "logistic.LogisticHead"),
    HeadRow("mlp", ONE_LABEL.name, MlpSettings, "mlp.MlpHead"),
    HeadRow("ridge", ONE_LABEL.name, RidgeSettings, "ridge.RidgeHead"),
    HeadRow("knn", ONE_LABEL.name, KnnSettings, "neighbours.KnnHead"),
    HeadRow("centroid", ONE_LABEL.name, Settings, "centroid.CentroidHead"),
    HeadRow("logistic", MultiLabelTask.name, PenaltySettings, "sigmoid.MultiLabelLogisticHead"),
    HeadRow("mlp", MultiLabelTask.name, MlpSettings, "mlp.MultiLabelMlpHead"),
    HeadRow("ridge", RegressionTask.name, RidgeSettings, "ridge.RidgeRegressionHead"),
)
HEADS = tuple(dict.fromkeys(row.name for row in ROWS))


def row_of(name: str | None, task: str, flag: str = "--head") -> HeadRow:
    """The row of a head; None is the task's default.

    Raises:
        UsageError: the task has no such head; names those it has.
    """
    rows = [row for row in ROWS if row.task == task]
    for row in rows:
        if name in (None, row.name):
            return row
    message = f"{flag} {name}: there is {', '.join(row.name for row in rows)} for {task}"
    raise UsageError(message)


def make_head(name: str | None, task: str = ONE_LABEL.name, **settings: Any) -> Any:
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
    row = row_of(name, task)
    head = row.make()
    unknown = sorted(set(given) - set(head.get_params()))
    if unknown:
        message = f"the {row.name} head has no setting {', '.join(unknown)}"
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
    made_for = getattr(head, "task", ONE_LABEL.name)
    if made_for != task:
        message = (
            f"{type(head).__name__} is a head for {made_for}, and these samples were extracted with --task {task}; "
            f"take --head {', '.join(row.name for row in ROWS if row.task == task)}, or make_head(None, {task!r})"
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
