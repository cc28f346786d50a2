"""Metrics with intervals, per class and confused with what; a number without an interval decides nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.cache import Subset
from store.errors import BadDataError

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
WIDE = 0.10  # an accuracy interval wider than ten points does not tell good from mediocre
FEW = 10  # with fewer images of a class its own figures say nothing


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927). Unlike the normal one it is honest at 0 and at n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


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

    def to_json(self) -> dict[str, Any]:
        """As it reads back from a file: lists, no tuples."""
        return dict(json.loads(json.dumps(asdict(self))))


def evaluate(head: Any, subset: Subset) -> Evaluation:
    """Evaluate a fitted head (``classes_`` and ``predict_proba``) on cached features."""
    return score(subset.y, head.predict_proba(subset.X), [str(label) for label in head.classes_], subset.name)


def score(
    labels: NDArray[np.str_], probabilities: NDArray[np.floating[Any]], classes: list[str], split: str = ""
) -> Evaluation:
    """Compare predictions with the truth.

    Args:
        labels: true label of each image ``(n,)``.
        probabilities: ``(n, k)``.
        classes: label of each column.
        split: name for the report.

    Raises:
        BadDataError: there are no images, or they have a class that the head does not know; names it.
    """
    if not len(labels):
        message = "no images to evaluate on"
        raise BadDataError(message)
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
    present = (support > 0) | (taken > 0)  # as scikit-learn: classes that appear in truth or prediction
    chosen = probabilities[np.arange(n), truth].astype(np.float64)
    return Evaluation(
        split=split,
        n=n,
        correct=correct,
        accuracy=correct / n,
        accuracy_interval=wilson(correct, n),
        macro_f1=float(f1[present].mean()),
        log_loss=float(-np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).mean()),
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
    )


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
