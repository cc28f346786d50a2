"""The interface of a task (one label an image, several labels, or numbers), and the results of prediction and evaluation.

A task names the columns of a head's output and defines how they are scored, decided on, and shown. `registry` finds a task by
name; training, bundles, prediction and fusing are the same for all tasks.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError, display
from store.faces import html_table
from store.format.samples import Row, SampleTable
from store.tasks import TASKS

from .units import Units, images_in_words

Outputs = NDArray[np.floating[Any]]
SCORE_COLUMNS = ("metric", "value", "95 % interval")
FEW = 10  # with fewer images a score says little


@dataclass(frozen=True)
class Prediction:
    """A bundle's prediction for one file.

    Attributes:
        path: as passed to the predictor.
        label, probability: of the most probable class; None if the file cannot be used. Several labels are joined with ``|``
            and have no common probability; for a regression both are None.
        probabilities: ``(k,)`` in the order of the bundle's classes; for a regression, the numbers.
        code, message: why the file cannot be used.
        novelty: how unlike the training images it is; above 1 it is unusual. None if the bundle cannot tell.
        features: of the image ``(d,)``, where there is a ``novelty``.
    """

    path: bytes
    label: str | None = None
    probability: float | None = None
    probabilities: NDArray[np.float32] | None = None
    code: str | None = None
    message: str = ""
    novelty: float | None = None
    features: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return display(self.path)


class _Shown:
    """Scores on one set of images, with their JSON and notebook forms."""

    split: str
    n: int
    scores: dict[str, dict[str, Any]]
    groups: int | None

    def to_json(self) -> dict[str, Any]:
        """As read back from a JSON file: lists, no tuples."""
        return dict(json.loads(json.dumps(vars(self))))

    def __repr__(self) -> str:
        name, score = next(iter(self.scores.items()))
        headline = headline_of(score, name.replace("_", " "))
        return f"<{type(self).__name__}: {headline} on {images_of(vars(self))} of {self.split!r}>"

    def _repr_html_(self) -> str:
        return html_table(repr(self)[1:-1], score_cells(self.scores), SCORE_COLUMNS)


@dataclass(frozen=True, repr=False)
class Evaluation(_Shown):
    """Scores on one set of images.

    Attributes:
        split: the split it was measured on.
        n: number of images.
        groups: number of the groups that they are of; None if each image is independent of the others.
        correct: how many of them were classified right.
        accuracy, accuracy_interval: with the 95 % Wilson interval.
        macro_f1: mean of the per-class F1.
        log_loss: mean negative log-likelihood, nats.
        per_class: label, n, precision, recall, recall_interval, f1.
        confusion: ``confusion[i][j]`` images of class i were classified as class j.
        classes: labels in the order of the matrix.
        notes: why these scores may not be conclusive.
        failed: number of inputs that could not be used and are in no score.
        scores: by name (docs/metrics.md has them all) ``value``, its 95 % ``interval`` (None if resampling shows no
            spread) and the ``method`` of the interval.
        resamples: number of bootstrap resamples.
        temperature: of the head; scores called ``..._before`` are without it. None if it has none.
        sets: coverage and size of the head's prediction sets here, see `Conformal.measured`; None if it has none.
        novelty: how many images are unlike the training images, see `novel_share`; None if the bundle cannot tell.
        pixel_drift: as JSON, if pixels that differ from those of training were accepted, see `PixelDrift`.
        leaks: images that look like fitted ones, and the score without them, see docs/leaks.md; None if nothing was searched.
    """

    split: str
    n: int
    correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    log_loss: float
    per_class: list[dict[str, Any]]
    confusion: list[list[int]]
    classes: list[str]
    notes: list[str] = field(default_factory=list)
    failed: int = 0
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    resamples: int = 0
    temperature: float | None = None
    sets: dict[str, Any] | None = None
    novelty: dict[str, Any] | None = None
    pixel_drift: dict[str, Any] | None = None
    groups: int | None = None
    leaks: dict[str, Any] | None = None


@dataclass(frozen=True, repr=False)
class Measured(_Shown):
    """Scores of a head with several outputs that are scored one by one, on one set of images.

    Attributes:
        task: ``multi-label`` or ``regression``.
        split: the split it was measured on.
        n: number of images.
        scores: over all outputs, by name (docs/metrics.md has them all): ``value``, its 95 % ``interval`` (None if there is
            no spread) and the ``method`` of the interval; a value is None if it is not defined.
        per_output: for each label or target: ``name``, ``n`` (the images that count for it) and its own ``scores``.
        resamples: number of bootstrap resamples.
        notes: why these scores may not be conclusive.
        failed, novelty, pixel_drift, groups, leaks: as in `Evaluation`.
    """

    task: str
    split: str
    n: int
    scores: dict[str, dict[str, Any]]
    per_output: list[dict[str, Any]]
    resamples: int
    notes: list[str] = field(default_factory=list)
    failed: int = 0
    novelty: dict[str, Any] | None = None
    pixel_drift: dict[str, Any] | None = None
    groups: int | None = None
    leaks: dict[str, Any] | None = None


@dataclass(frozen=True)
class HeadTask(ABC):
    """One task, bound to the names of the outputs of one head.

    Attributes:
        names: names of the outputs: labels, or targets.
        conformal: calibration of prediction sets or intervals, as JSON; see `Conformal` and `regression.Intervals`.
        temperature: of the head, if it has one.
    """

    names: Sequence[str]
    conformal: dict[str, Any] | None = None
    temperature: float | None = None

    name = ""
    singular, plural = "", ""  # what the outputs are
    output = "probabilities"  # what they are called in ONNX
    metric = "accuracy"  # the main one of an evaluation's ``scores``
    ranked_by, in_percent = "", False  # that metric in a ranking
    exclusive = False  # whether an image has one label, so that there are mistakes to show and a confusion matrix
    intervals = False  # whether outputs have intervals, which a fused file keeps

    @property
    def targets(self) -> Sequence[str]:
        """Numeric columns that the samples to evaluate on must have."""
        return ()

    @abstractmethod
    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        """Refuse samples that a head cannot learn from.

        Args:
            table: the sample table.
            parts: rows to fit on, then to choose on, then held-out rows, each with the name of the split.

        Raises:
            BadDataError: names the label or target that is the reason.
        """

    @abstractmethod
    def score(self, truth: NDArray[Any], outputs: Outputs, split: str, units: Units | None = None) -> Evaluation | Measured:
        """Compare a head's outputs ``(n, k)`` with the truth of the same images, from `SampleTable.truth`.

        ``units`` says which of them belong together; by default none.

        Raises:
            BadDataError: there are no images, or an output is not finite.
        """

    @abstractmethod
    def headline(self, metrics: dict[str, Any]) -> str:
        """The main score of an evaluation, as JSON, with its interval, as text."""

    @abstractmethod
    def decide(self, outputs: NDArray[np.float32]) -> tuple[str | None, float | None]:
        """The label of one image from its outputs ``(k,)``, and its probability; None if the task has no such thing."""

    @abstractmethod
    def text(self, prediction: Prediction) -> str:
        """A prediction as one line of text."""

    @abstractmethod
    def require_labels(self, labels: Sequence[str], split: str) -> None:
        """Refuse labels that the head has no output for, as far as the labels alone show that.

        Raises:
            BadDataError: names the labels.
        """

    def indicators(self, truth: NDArray[Any]) -> NDArray[Any]:
        """Truth as numeric columns ``(n, k)``, for a regression on features."""
        return truth

    def columns(self) -> list[str]:
        """The last columns of a CSV file of predictions; ``p_`` keeps a class of any name apart from the other columns."""
        return [f"p_{name}" for name in self.names]

    def cells(self, outputs: NDArray[np.float32]) -> list[float]:
        """The values of one image, in the order of `columns`."""
        return [round(float(value), 6) for value in outputs]

    def facts(self, outputs: NDArray[np.float32] | None) -> dict[str, Any]:
        """What a JSON line of predictions holds for one image beside label and probability."""
        return {"probabilities": {} if outputs is None else dict(zip(self.names, self.cells(outputs), strict=True))}

    def spread(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        """Divisors ``(k,)`` that bring differences from expected outputs ``(n, k)`` to the scale of probabilities."""
        return np.ones(expected.shape[1])


def need_single_label(task: str, what: str) -> None:
    """Refuse a task other than one label an image.

    Raises:
        UsageError: says what needs one label an image.
    """
    if not TASKS[task].stratifies:
        message = f"{what} is for one label an image; this is --task {task}. See docs/heads.md for what supports it"
        raise UsageError(message)


def headline_of(score: dict[str, Any], what: str) -> str:
    """One score with its interval, as text."""
    bounds = score["interval"]
    value = "undefined" if score["value"] is None else f"{score['value']:.4f}"
    return f"{what} {value}" + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")


def score_cells(scores: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval of each score, as text, in the order of `SCORE_COLUMNS`."""
    numbers = [(name, [score["value"], *(score["interval"] or ())]) for name, score in scores.items()]
    shown = [(name, ["-" if value is None else f"{value:.4f}" for value in each]) for name, each in numbers]
    return [(name.replace("_", " "), value, " to ".join(bounds) or "-") for name, (value, *bounds) in shown]


def images_of(metrics: Mapping[str, Any]) -> str:
    """How many images an evaluation, as JSON, is on, and how many groups they are of, in words."""
    return images_in_words(metrics["n"], metrics.get("groups"))


def bootstrapped(value: float, drawn: NDArray[np.float64], units: Units) -> dict[str, Any]:
    """A score with its interval, from its values on resamples of the units; NaN is undefined, and is left out of these."""
    if np.isnan(value) or np.isnan(drawn).all():
        return {"value": None, "interval": None, "method": None}
    return {"value": value, "interval": units.bootstrap(value, drawn), "method": "bootstrap"}


def proportion(hits: NDArray[np.bool_], units: Units) -> dict[str, Any]:
    """The share of images that are hits ``(n,)``, with its interval; undefined without images."""
    if not len(hits):
        return {"value": None, "interval": None, "method": None}
    return {"value": int(hits.sum()) / len(hits), "interval": units.proportion(hits), "method": "modified wilson"}
