"""Metrics with intervals, per class and confused with what; a number without an interval decides nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.cache import Subset
from store.errors import BadDataError
from store.samples import SINGLE_LABEL

from .conformal import Conformal
from .figures import chance_calibration_errors, ranks, require_finite, untempered, weighted_figures
from .intervals import Interval, bootstrap_interval, distance_interval, resampled, resamples_for, wilson

WIDE = 0.10  # an accuracy interval wider than ten points does not tell good from mediocre
FEW = 10  # with fewer images of a class its own figures say nothing
TOPS = (3, 5)  # top-k is given for these k, where there are more classes


@dataclass(frozen=True)
class Evaluation:
    """Figures on one set of images.

    Attributes:
        split: what it was measured on.
        n: number of images.
        correct: of these, classified right.
        accuracy, accuracy_interval: with the 95 % Wilson interval.
        macro_f1: mean of the per-class F1.
        log_loss: mean negative log-likelihood, nats.
        per_class: label, n, precision, recall, recall_interval, f1.
        confusion: ``confusion[i][j]`` images of class i were taken for class j.
        classes: labels in the order of the matrix.
        notes: what keeps these figures from being conclusive.
        failed: inputs that could not be used and are in no figure.
        figures: by name (docs/metrics.md has them all) ``value``, its 95 % ``interval`` (None where resampling shows no
            spread) and the ``method`` of that.
        resamples: of the bootstrap.
        temperature: of the head; figures called ``..._before`` are without it. None where it has none.
        sets: what the head's prediction sets are worth here, see `Conformal.measured`; None where it has none.
        novelty: how many images are unlike the training images, see `novel_share`; None where the bundle cannot tell.
        pixel_drift: as JSON, where pixels that differ from those of the training were accepted, see `PixelDrift`.
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
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    resamples: int = 0
    temperature: float | None = None
    sets: dict[str, Any] | None = None
    novelty: dict[str, Any] | None = None
    pixel_drift: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it reads back from a file: lists, no tuples."""
        return dict(json.loads(json.dumps(asdict(self))))


def evaluate(head: Any, subset: Subset) -> Evaluation:
    """Evaluate a fitted head (``classes_`` and ``predict_proba``) on cached features.

    Raises:
        UsageError: it is a head for several labels or for numbers; `tasks.HeadTask.score` takes the outputs of these.
    """
    from .tasks import need_single_label

    need_single_label(getattr(head, "task", SINGLE_LABEL), "classifiers.evaluate.evaluate")
    return score(
        subset.y,
        head.predict_proba(subset.X),
        [str(label) for label in head.classes_],
        subset.name,
        temperature=getattr(head, "temperature_", None),
        conformal=getattr(head, "conformal_", None),
    )


def score(
    labels: NDArray[np.str_],
    probabilities: NDArray[np.floating[Any]],
    classes: list[str],
    split: str = "",
    *,
    temperature: float | None = None,
    conformal: Conformal | None = None,
) -> Evaluation:
    """Compare predictions with the truth.

    Args:
        labels: true label of each image ``(n,)``.
        probabilities: ``(n, k)``.
        classes: label of each column.
        split: name for the report.
        temperature: that the logits behind the probabilities were divided by.
        conformal: what says which labels are in a prediction set.

    Raises:
        BadDataError: there are no images, one has a class that the head does not know, or a probability is no number.
    """
    if not len(labels):
        message = "no images to evaluate on"
        raise BadDataError(message)
    require_finite(probabilities)
    index = {label: i for i, label in enumerate(classes)}
    unknown = Counter(label for label in labels.tolist() if label not in index)
    if unknown:
        listing = ", ".join(f"{label!r} ({count})" for label, count in sorted(unknown.items()))
        known = ", ".join(map(repr, classes[:5])) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
        message = (
            f"{unknown.total()} of {len(labels)} images{f' of {split!r}' if split else ''} have a label that the head was not "
            f"trained on: {listing}; it knows {known}. Correct the labels, leave these images out, or train with them"
        )
        raise BadDataError(message)
    truth = np.array([index[label] for label in labels.tolist()])
    guess = probabilities.argmax(axis=1)
    k, n = len(classes), len(labels)
    confusion = np.bincount(truth * k + guess, minlength=k * k).reshape(k, k)
    correct = int(np.trace(confusion))
    hits, support, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = np.divide(hits, taken, out=np.zeros(k), where=taken > 0)
    recall = np.divide(hits, support, out=np.zeros(k), where=support > 0)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros(k), where=total > 0)
    resamples = resamples_for(n, k)
    figures = _proportions(truth, probabilities) | _bootstrapped(truth, probabilities, temperature, resamples)
    return Evaluation(
        split=split,
        n=n,
        correct=correct,
        accuracy=correct / n,
        accuracy_interval=wilson(correct, n),
        macro_f1=figures["f1_macro"]["value"],
        log_loss=figures["log_loss"]["value"],
        per_class=[
            {
                "label": classes[i],
                "n": int(support[i]),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "recall_interval": wilson(int(hits[i]), int(support[i])),
                "f1": float(f1[i]),
            }
            for i in range(k)
        ],
        confusion=confusion.tolist(),
        classes=list(classes),
        notes=_notes(correct, n, [(classes[i], int(support[i])) for i in range(k)]),
        figures=figures,
        resamples=resamples,
        temperature=temperature,
        sets=conformal.measured(probabilities, truth) if conformal else None,
    )


def _proportions(truth: NDArray[np.intp], probabilities: NDArray[np.floating[Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy under all its names, and top-k."""
    n, k, places = len(truth), probabilities.shape[1], ranks(truth, probabilities)

    def within(top: int) -> dict[str, Any]:
        found = int((places < top).sum())
        return {"value": found / n, "interval": wilson(found, n), "method": "wilson"}

    names = ("accuracy", "precision_micro", "recall_micro", "f1_micro", "recall_weighted")  # with one label an image
    return {name: within(1) for name in names} | {f"top_{top}": within(top) for top in TOPS if k > top}


def _bootstrapped(
    truth: NDArray[np.intp], probabilities: NDArray[np.floating[Any]], temperature: float | None, resamples: int
) -> dict[str, dict[str, Any]]:
    before = None if temperature is None else untempered(probabilities, temperature)
    once = weighted_figures(truth, probabilities, np.ones((len(truth), 1), np.float32), before)
    blocks = [weighted_figures(truth, probabilities, weights, before) for weights in resampled(truth, resamples)]
    figures: dict[str, dict[str, Any]] = {}
    for name, (value,) in once.items():
        values = np.concatenate([block[name] for block in blocks])
        found: Interval | None
        if name.startswith("ece"):
            chance = chance_calibration_errors(probabilities if name == "ece" or before is None else before, resamples)
            figures[f"{name}_by_chance"] = {"value": float(chance.mean()), "interval": None, "method": None}
            found = distance_interval(float(value), values, chance)
        else:
            found = bootstrap_interval(float(value), values)
        figures[name] = {"value": float(value), "interval": found, "method": "bootstrap"}
    return figures


def _notes(correct: int, n: int, support: list[tuple[str, int]]) -> list[str]:
    notes = []
    low, high = wilson(correct, n)
    if high - low > WIDE:
        without = " without an error" if correct == n else ""
        claim = f"at least {low:.0%}" if correct == n else f"between {low:.0%} and {high:.0%}"
        notes.append(f"too few to conclude: {n} images{without} only show an accuracy of {claim}")
    few = [f"{label} ({count})" for label, count in support if count < FEW]
    if few:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        notes.append(f"classes with fewer than {FEW} images here, whose own figures say little: {shown}")
    return notes
