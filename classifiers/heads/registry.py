"""The registry of heads: a row with name, task and settings for each, and any scikit-learn classifier by its dotted name.

Nothing here imports NumPy, because the command line and job files read the rows before anything is computed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points, packages_distributions
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from extractor.settings import Settings, as_tuple, setting
from store.errors import UsageError
from store.tasks import ONE_LABEL, MultiLabelTask, RegressionTask


class PenaltySettings(Settings):
    """The settings of every logistic head."""

    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: logistic"

    C: float | None = setting(None, "Inverse of the penalty.", ge=1e-15, le=1e15, metavar="X", shown="searched")


class LogisticSettings(PenaltySettings):
    class_weight: Literal["balanced"] | None = setting(None, "Weigh images as if all classes had the same number.")
    select: Literal["log-loss", "accuracy"] = setting("log-loss", "What C is chosen by.")
    l1_ratio: float = setting(0.0, "Elastic net (slow): the share of |w| in its penalty.", ge=0, le=1, metavar="SHARE")


Width = Annotated[int, Field(ge=1, le=65536)]  # of a hidden layer


class MlpSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: mlp"

    hidden: Annotated[tuple[Width, ...], BeforeValidator(as_tuple)] | None = setting(
        None, "Width of each hidden layer.", min_length=1, metavar="N,N", shown="searched"
    )
    lr: float | None = setting(None, "Learning rate.", gt=0, le=1e30, metavar="RATE", shown="searched")
    schedule: Literal["constant", "cosine"] = setting("constant", "How the learning rate falls.")
    dropout: float | None = setting(None, "Share of hidden units dropped in training.", ge=0, lt=1, metavar="P", shown="0.3")
    weight_decay: float | None = setting(None, "Weight decay of AdamW.", ge=0, le=1e6, metavar="X", shown="0.01")


class RidgeSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: ridge"

    alpha: float | None = setting(None, "Penalty, lambda.", ge=1e-15, le=1e15, metavar="X", shown="searched")


class KnnSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: knn"

    k: int | None = setting(None, "How many neighbours vote.", ge=1, metavar="N", shown="searched")


@dataclass(frozen=True)
class Search:
    """The search over one setting that the history of a head records, for its report.

    Attributes:
        setting: the setting that was varied.
        label: its label on the axis of a plot.
        loss: the key of the history that is least at the best value.
        text: makes one sentence about the search from the hyperparameters.
    """

    setting: str
    label: str
    loss: str
    text: Callable[[Mapping[str, Any]], str]


def _by_penalty(chosen: Mapping[str, Any]) -> str:
    by = " by accuracy" if chosen.get("select") == "accuracy" else ""
    value = f"C = {chosen['C']:.4g} was chosen{by}"
    return f"Log-loss and accuracy, out of fold or on validation, for each value of C; {value}."


def _by_penalty_of_each(_: Mapping[str, Any]) -> str:
    return "Log-loss out of fold or on validation for each value of C, mean over the labels; each label has its own best C."


def _by_lambda(chosen: Mapping[str, Any]) -> str:
    return f"Squared error out of fold or on validation for each value of lambda; {chosen['alpha']:.4g} was chosen."


def _by_neighbours(chosen: Mapping[str, Any]) -> str:
    value = f"k = {chosen['k']}, tau = {chosen['tau']:.4g}"
    return f"Log-loss out of fold or on validation by number of neighbours; {value} was chosen."


@dataclass(frozen=True)
class HeadRow:
    """One head of the registry.

    Attributes:
        name: on the command line, in jobs and in bundles.
        task: its task; the first row of a task is its default.
        settings: the settings of this head only.
        place: ``module:class``, a subclass of `search.Head`.
        search: the search that its history records; None if the history is of epochs, or empty.
    """

    name: str
    task: str
    settings: type[Settings]
    place: str
    search: Search | None = None

    def make(self) -> Any:
        """The unfitted head with its defaults."""
        module, _, kind = self.place.partition(":")
        return getattr(importlib.import_module(module), kind)()


C = "C", "C (inverse regularisation)", "log_loss"
LAMBDA = Search("alpha", "lambda (regularisation)", "squared_error", _by_lambda)
ROWS = (
    HeadRow("logistic", ONE_LABEL.name, LogisticSettings, "classifiers.heads.logistic:LogisticHead", Search(*C, _by_penalty)),
    HeadRow("mlp", ONE_LABEL.name, MlpSettings, "classifiers.heads.mlp:MlpHead"),
    HeadRow("ridge", ONE_LABEL.name, RidgeSettings, "classifiers.heads.ridge:RidgeHead", LAMBDA),
    HeadRow(
        *("knn", ONE_LABEL.name, KnnSettings, "classifiers.heads.knn:KnnHead"),
        Search("k", "k (neighbours)", "log_loss", _by_neighbours),
    ),
    HeadRow("centroid", ONE_LABEL.name, Settings, "classifiers.heads.centroid:CentroidHead"),
    HeadRow(
        *("logistic", MultiLabelTask.name, PenaltySettings, "classifiers.heads.multilabel_logistic:MultiLabelLogisticHead"),
        Search(*C, _by_penalty_of_each),
    ),
    HeadRow("mlp", MultiLabelTask.name, MlpSettings, "classifiers.heads.mlp:MultiLabelMlpHead"),
    HeadRow("ridge", RegressionTask.name, RidgeSettings, "classifiers.heads.ridge:RidgeRegressionHead", LAMBDA),
)
ENTRY_POINTS = "penult.heads"  # where an installed package registers a `HeadRow` of its own


@cache
def rows() -> tuple[HeadRow, ...]:
    """Every head: those of this package, and those of other installed packages."""
    return (*ROWS, *(each.load() for each in entry_points(group=ENTRY_POINTS)))


def head_names() -> tuple[str, ...]:
    """The possible values of ``--head``."""
    return tuple(dict.fromkeys(row.name for row in rows()))


def row_of(name: str | None, task: str, flag: str = "--head") -> HeadRow:
    """The row of a head; None is the task's default.

    Raises:
        UsageError: the task has no such head; names those that it has.
    """
    candidates = [row for row in rows() if row.task == task]
    for row in candidates:
        if name in (None, row.name):
            return row
    message = f"{flag} {name}: expected {', '.join(row.name for row in candidates)} for {task}"
    raise UsageError(message)


def make_head(name: str | None, task: str = ONE_LABEL.name, **settings: Any) -> Any:
    """An unfitted head by name; settings that are None keep its defaults.

    Args:
        name: one of `head_names` (None is the task's default), or the dotted name of a scikit-learn classifier in an installed
            package, such as ``sklearn.svm.SVC``. Such a classifier is fitted and evaluated like the others, but cannot be
            saved.
        task: the task that the samples were extracted for.
        settings: arguments of its ``__init__``; ``seed`` is left out for a head that is not random.

    Raises:
        UsageError: there is no such head, or it has no such setting.
    """
    chosen = {key: value for key, value in settings.items() if value is not None}
    if name is not None and "." in name:
        return _estimator(name, chosen)
    row = row_of(name, task)
    head = row.make()
    unknown = sorted(set(chosen) - set(head.get_params()) - {"seed"})
    if unknown:
        message = f"the {row.name} head has no setting {', '.join(unknown)}"
        raise UsageError(message)
    return head.set_params(**{key: value for key, value in chosen.items() if key in head.get_params()})


def name_of(head: Any) -> str:
    """The name of a head in a bundle."""
    from .search import Head

    return head.name if isinstance(head, Head) else type(head).__name__.lower()


def settings_of(head: Any) -> dict[str, Any]:
    """The settings of a head that differ from its defaults, as JSON and as arguments of `make_head`."""
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
        estimator = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        message = f"{name}: {error}; expected a module and a class, such as sklearn.svm.SVC"
        raise UsageError(message) from error
    if not (inspect.isclass(estimator) and issubclass(estimator, BaseEstimator)):
        message = f"{name} is not a scikit-learn estimator; expected a class, such as sklearn.svm.SVC"
        raise UsageError(message)
    try:
        head = estimator(**settings)
    except TypeError as error:
        message = f"{name}: {error}"
        raise UsageError(message) from error
    if not is_classifier(head) or not hasattr(head, "predict_proba"):
        message = (
            f"{name} is not a classifier with predict_proba, and a head must give probabilities; "
            f"sklearn.calibration.CalibratedClassifierCV(estimator=...) adds them to a classifier without"
        )
        raise UsageError(message)
    return head


def need_task(head: Any, task: str) -> None:
    """Refuse a head for another task than that of the samples.

    Raises:
        UsageError: the head is for another task; names the heads for this one.
    """
    from .search import Head

    made_for = head.task if isinstance(head, Head) else ONE_LABEL.name
    if made_for != task:
        message = (
            f"{type(head).__name__} is a head for {made_for}, and these samples were extracted with --task {task}; "
            f"use --head {', '.join(row.name for row in rows() if row.task == task)}, or make_head(None, {task!r})"
        )
        raise UsageError(message)


def need_saveable(head: Any) -> None:
    """Refuse a head that could only be saved as a pickle.

    Raises:
        UsageError: it is not a `search.Head`.
    """
    from .search import Head

    if not isinstance(head, Head):
        message = (
            f"{type(head).__name__} cannot be saved: a bundle holds ONNX and JSON, never a pickle. Evaluate it here with "
            f"classifiers.evaluate(head, subset), or train one of {', '.join(head_names())}"
        )
        raise UsageError(message)
