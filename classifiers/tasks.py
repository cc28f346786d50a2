"""What a head is for: one label an image, several labels, or numbers; and all that differs between these.

A task is asked by name (`task_of`), knows what the columns of a head's output are called, and says how they are judged, decided
on, and shown. Training, bundles, prediction and fusing are the same for all.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError, UsageError
from store.samples import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TASKS, Row, SampleTable
from store.splits import untrained_labels

from .conformal import Conformal
from .evaluate import Evaluation, score
from .intervals import bootstrap_interval, wilson

if TYPE_CHECKING:
    from .bundle import Bundle
    from .predict import Prediction

Outputs = NDArray[np.floating[Any]]
FEW = 10  # with fewer images a figure says nothing
WORDS = {  # for the figures over all outputs, and what is said of each output
    "mean_average_precision": "mean average precision: order by probability; the share of a label is chance",
    "f1_micro": "F1 of all decisions on all labels",
    "f1_macro": "F1, mean over the labels",
    "subset_accuracy": "images whose labels are all right",
    "hamming_loss": "Hamming loss: share of wrong decisions",
    "log_loss": "log-loss, mean over the labels: lower is better",
    "r2": "R2, mean over the targets: 1 is perfect, 0 is always the mean",
}
SHORT = {
    "average_precision": "average precision",
    "f1": "F1",
    "r2": "R2",
    "mae": "MAE",
    "rmse": "RMSE",
    "half_width": "90 % within ±",
}
IN_UNITS = ("mae", "rmse", "half_width")  # of the target


@dataclass(frozen=True)
class Measured:
    """Figures of a head with several outputs that are judged one by one, on one set of images.

    Attributes:
        task: ``multi-label`` or ``regression``.
        split: what it was measured on.
        n: number of images.
        figures: over all outputs, by name (docs/metrics.md has them all): ``value``, its 95 % ``interval`` (None where there is
            no spread) and the ``method`` of that; a value is None where it is not defined.
        per_output: for each label or target: ``name``, ``n`` (the images that count for it) and its own ``figures``.
        resamples: of the bootstrap.
        notes: what keeps these figures from being conclusive.
        failed, novelty, pixel_drift: as in `Evaluation`.
    """

    task: str
    split: str
    n: int
    figures: dict[str, dict[str, Any]]
    per_output: list[dict[str, Any]]
    resamples: int
    notes: list[str] = field(default_factory=list)
    failed: int = 0
    novelty: dict[str, Any] | None = None
    pixel_drift: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it reads back from a file: lists, no tuples."""
        return dict(json.loads(json.dumps(asdict(self))))


@dataclass(frozen=True)
class HeadTask(ABC):
    """One task, with the names of the outputs of one head.

    Attributes:
        names: of the outputs: labels, or targets.
        conformal: what the head keeps to say how sure it is, as JSON; see `Conformal` and `regression.Intervals`.
        temperature: of the head, where it has one.
    """

    names: Sequence[str]
    conformal: dict[str, Any] | None = None
    temperature: float | None = None

    name = ""
    plural = ""  # what the outputs are
    output = "probabilities"  # what they are called in ONNX

    @abstractmethod
    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        """Refuse samples that cannot be learnt from.

        Args:
            table: of the samples.
            parts: what is fitted, then what choices are made on, then what is held out, each with its name.

        Raises:
            BadDataError: says which.
        """

    @abstractmethod
    def score(self, truth: NDArray[Any], outputs: Outputs, split: str) -> Evaluation | Measured:
        """Compare a head's outputs ``(n, k)`` with what `SampleTable.truth` says of the same images.

        Raises:
            BadDataError: there are none, or an output is no number.
        """

    @abstractmethod
    def headline(self, metrics: dict[str, Any]) -> str:
        """The figure that says most, with its interval, of an evaluation as JSON."""

    @abstractmethod
    def decide(self, outputs: NDArray[np.float32]) -> tuple[str | None, float | None]:
        """The label of one image by the outputs ``(k,)``, and its probability; None where there is no such thing."""

    @abstractmethod
    def text(self, prediction: Prediction) -> str:
        """What is predicted, on one line."""

    def columns(self) -> list[str]:
        """Of a CSV file of predictions, after path, label, probability, code, message and novelty."""
        return list(self.names)

    def cells(self, outputs: NDArray[np.float32]) -> list[float]:
        """Of one image, in the order of `columns`."""
        return [round(float(value), 6) for value in outputs]

    def facts(self, outputs: NDArray[np.float32] | None) -> dict[str, Any]:
        """What JSON lines say of one image beyond label and probability."""
        return {"probabilities": {} if outputs is None else dict(zip(self.names, self.cells(outputs), strict=True))}

    def spread(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        """What differences to expected outputs ``(n, k)`` are to be divided by, to be like those of probabilities."""
        return np.ones(expected.shape[1])


class SingleLabel(HeadTask):
    """One label an image; two classes are a case of this, with two probabilities."""

    name, plural = SINGLE_LABEL, "classes"

    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        labels = {row.label for row in parts[0][0]}
        unknown = untrained_labels([(row.label, name) for part, name in parts for row in part])
        if unknown:
            message = f"{'; '.join(unknown)}: give it training images, or leave it out"
            raise BadDataError(message)
        if len(labels) < 2:
            message = f"a classifier needs at least two classes; the training split has one, {labels.pop()!r}"
            raise BadDataError(message)

    def score(self, truth: NDArray[Any], outputs: Outputs, split: str) -> Evaluation:
        conformal = Conformal.from_json(self.conformal)
        return score(truth, outputs, list(self.names), split, temperature=self.temperature, conformal=conformal)

    def headline(self, metrics: dict[str, Any]) -> str:
        low, high = metrics["accuracy_interval"]
        return f"accuracy {metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}]"

    def decide(self, outputs: NDArray[np.float32]) -> tuple[str, float]:
        best = int(outputs.argmax())
        return self.names[best], float(outputs[best])

    def text(self, prediction: Prediction) -> str:
        return f"{prediction.label}\t{prediction.probability:.4f}"


def task_of(
    name: str, names: Sequence[str], conformal: dict[str, Any] | None = None, temperature: float | None = None
) -> HeadTask:
    """A task by name; the arguments are its attributes.

    Raises:
        BadDataError: there is none of this name.
    """
    if name not in TASKS:
        message = f"the task {name!r} is none of {', '.join(TASKS)}; a newer penult may know it"
        raise BadDataError(message)
    if name == MULTI_LABEL:
        from .multilabel import MultiLabel

        return MultiLabel(names, conformal, temperature)
    if name == REGRESSION:
        from .regression import Regression

        return Regression(names, conformal, temperature)
    return SingleLabel(names, conformal, temperature)


def task_of_bundle(bundle: Bundle) -> HeadTask:
    """A bundle's task, with the names of its outputs."""
    return task_of(bundle.task, bundle.classes, bundle.conformal, bundle.hyperparameters.get("temperature"))


def need_single_label(task: str, what: str) -> None:
    """Refuse another task, where only one label an image makes sense.

    Raises:
        UsageError: names what asked.
    """
    if task != SINGLE_LABEL:
        message = f"{what} is for one label an image; this is --task {task}. See docs/heads.md for what there is for it"
        raise UsageError(message)


def headline_of(figure: dict[str, Any], what: str) -> str:
    """One figure with its interval, as text."""
    bounds = figure["interval"]
    value = "undefined" if figure["value"] is None else f"{figure['value']:.4f}"
    return f"{what} {value}" + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")


def whole_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Figure, value and 95 % interval, of `Measured` as JSON."""
    rows = []
    for name, figure in metrics["figures"].items():
        bounds = figure["interval"]
        rows.append((WORDS[name], _number(name, figure["value"]), " to ".join(_number(name, b) for b in bounds or ()) or "-"))
    return rows


def output_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, one for each label or target, of `Measured` as JSON."""
    names = list(metrics["per_output"][0]["figures"])
    columns = ["label" if metrics["task"] == MULTI_LABEL else "target", "images", *(SHORT.get(name, name) for name in names)]
    return columns, [
        [entry["name"], str(entry["n"]), *(_with_interval(name, entry["figures"][name]) for name in names)]
        for entry in metrics["per_output"]
    ]


def _with_interval(name: str, figure: dict[str, Any]) -> str:
    bounds = figure["interval"]
    value = _number(name, figure["value"])
    return f"{value} [{_number(name, bounds[0])}, {_number(name, bounds[1])}]" if bounds else value


def _number(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if name in IN_UNITS else f"{value:.3f}"


def bootstrapped(value: float, drawn: NDArray[np.float64]) -> dict[str, Any]:
    """A figure with its interval, by its values on resamples. NaN is what is not defined; such resamples say nothing."""
    known = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(known):
        return {"value": None, "interval": None, "method": None}
    return {"value": value, "interval": bootstrap_interval(value, known), "method": "bootstrap"}


def proportion(part: int, whole: int) -> dict[str, Any]:
    """A share with its interval; undefined of nothing."""
    if not whole:
        return {"value": None, "interval": None, "method": None}
    return {"value": part / whole, "interval": wilson(part, whole), "method": "wilson"}
