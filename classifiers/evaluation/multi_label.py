"""Multi-label classification: scores of labels that are decided independently, each by its own probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.tasks import LABEL_SEPARATOR, MultiLabelTask

from .intervals import resamples_for
from .scores import Values, Weights, average_precision, mean_of, ratio, require_finite, surprise
from .task import FEW, HeadTask, Measured, Outputs, Prediction, bootstrapped, headline_of, proportion
from .units import Units

THRESHOLD = 0.5  # an image has a label if its probability is at least this


class MultiLabel(HeadTask):
    """The task of predicting which of several labels an image has; it may be all of them, or none."""

    name, singular, plural = MultiLabelTask.name, "label", "labels"
    metric, ranked_by = "mean_average_precision", "mean average precision"

    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        counts = table.truth(parts[0][0]).sum(axis=0)
        n = len(parts[0][0])
        if not len(counts):
            message = "no image has a label; there is nothing to learn"
            raise BadDataError(message)
        for name, count in zip(table.outputs, counts.tolist(), strict=True):
            if count in (0, n):
                message = (
                    f"label {name!r} is on {count} of {n} training images; a head needs some with and some without it. "
                    f"Give it such images, or leave the label out"
                )
                raise BadDataError(message)

    def score(self, truth: NDArray[Any], outputs: Outputs, split: str, units: Units | None = None) -> Measured:
        return measure(np.asarray(truth, bool), outputs, self.names, split, units)

    def require_labels(self, labels: Sequence[str], split: str) -> None:
        known = set(self.names)
        if unknown := sorted({each for label in labels for each in label.split(LABEL_SEPARATOR)} - known):
            message = (
                f"there are labels that the head was not trained on: {', '.join(map(repr, unknown[:FEW]))}; "
                f"it knows {', '.join(map(repr, self.names[:FEW]))}"
            )
            raise BadDataError(message)

    def headline(self, metrics: dict[str, Any]) -> str:
        return headline_of(metrics["scores"]["mean_average_precision"], "mean average precision")

    def decide(self, outputs: NDArray[np.float32]) -> tuple[str, None]:
        return LABEL_SEPARATOR.join(name for name, value in zip(self.names, outputs, strict=True) if value >= THRESHOLD), None

    def text(self, prediction: Prediction) -> str:
        assert prediction.probabilities is not None
        pairs = zip(self.names, prediction.probabilities.tolist(), strict=True)
        return ", ".join(f"{name} {value:.4f}" for name, value in pairs if value >= THRESHOLD) or "(no label)"


def weighted_scores(
    truth: NDArray[np.bool_], probabilities: Outputs, weights: Weights
) -> tuple[dict[str, Values], dict[str, Values]]:
    """Every score for each column of weights, as scikit-learn's of the same name with ``sample_weight``.

    Args:
        truth: which labels each image has ``(n, k)``.
        probabilities: ``(n, k)``.
        weights: how often each image counts ``(n, b)``.

    Returns:
        Scores over all labels ``(b,)``, and of each label ``(k, b)``. Average precision is NaN if no image has the label, F1 if
        none is predicted to have it either; means are over the other labels.
    """
    guess = probabilities >= THRESHOLD
    hits, support, taken = ((mask.T.astype(np.float32) @ weights) for mask in (truth & guess, truth, guess))
    columns = range(truth.shape[1])
    precise = np.stack([average_precision(truth[:, k], probabilities[:, k], weights) for k in columns])
    present = support + taken > 0
    each = {"average_precision": precise, "f1": np.where(present, ratio(2 * hits, support + taken), np.nan)}
    total = weights.sum(axis=0, dtype=np.float64)
    own = np.where(truth, probabilities, 1 - probabilities)
    whole = {
        "mean_average_precision": mean_of(precise, ~np.isnan(precise)),
        "f1_micro": ratio(2 * hits.sum(axis=0), (support + taken).sum(axis=0)),
        "f1_macro": mean_of(each["f1"], present),
        "hamming_loss": (truth != guess).mean(axis=1) @ weights / total,
        "log_loss": surprise(own).mean(axis=1) @ weights / total,
    }
    return whole, each


def measure(
    truth: NDArray[np.bool_], probabilities: Outputs, names: Sequence[str], split: str = "", units: Units | None = None
) -> Measured:
    """Compare probabilities ``(n, k)`` with the labels that images have ``(n, k)``; see docs/metrics.md.

    ``units`` says which images belong together; by default none.

    Raises:
        BadDataError: there are no images, or an output is not finite.
    """
    n, k = truth.shape
    if not n:
        message = "no images to evaluate on"
        raise BadDataError(message)
    require_finite(probabilities)
    guess = probabilities >= THRESHOLD
    resamples, units = resamples_for(n, k), units or Units.each(n)
    once, once_each = weighted_scores(truth, probabilities, np.ones((n, 1), np.float32))
    blocks = [weighted_scores(truth, probabilities, w) for w in units.resampled(np.zeros(n, np.intp), resamples)]
    scores = {
        name: bootstrapped(float(value), np.concatenate([block[0][name] for block in blocks]), units)
        for name, (value,) in once.items()
    } | {"subset_accuracy": proportion((truth == guess).all(axis=1), units)}
    per_output = []
    for j, name in enumerate(names):
        true, taken = truth[:, j], guess[:, j]
        own = {
            score: bootstrapped(float(values[j, 0]), np.concatenate([block[1][score][j] for block in blocks]), units)
            for score, values in once_each.items()
        }
        own["precision"] = proportion(true[taken], units.among(taken))
        own["recall"] = proportion(taken[true], units.among(true))
        per_output.append({"name": name, "n": int(true.sum()), "scores": own})
    notes = [*units.notes, *_notes(per_output, n)]
    return Measured(MultiLabelTask.name, split, n, scores, per_output, resamples, notes, groups=units.groups)


def _notes(per_output: Sequence[dict[str, Any]], n: int) -> list[str]:
    fewest = {entry["name"]: min(entry["n"], n - entry["n"]) for entry in per_output}
    few = [f"{name} ({count})" for name, count in fewest.items() if count < FEW]
    if not few:
        return []
    shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
    return [f"labels with fewer than {FEW} images here that have them, or that do not, whose scores say little: {shown}"]
