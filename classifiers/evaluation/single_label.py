"""Single-label classification: scores with confidence intervals, per-class scores and the confusion matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.splits import untrained_labels
from store.tasks import ONE_LABEL

from .conformal import Conformal, spread_notes
from .intervals import Interval, distance_interval, resamples_for
from .probabilities import untempered
from .scores import chance_calibration_errors, classwise_calibration_error, ranks, require_finite, weighted_scores
from .task import FEW, Evaluation, HeadTask, Outputs, Prediction
from .units import Units

WIDE = 0.10  # an accuracy interval wider than ten points does not separate good from mediocre
TOPS = (3, 5)  # top-k accuracy is computed for these k, if there are more classes


def require_known(labels: Sequence[str], classes: Sequence[str], split: str = "") -> None:
    """Refuse labels that a head was not trained on.

    Raises:
        BadDataError: there are such labels; names and counts them.
    """
    trained = set(classes)
    unknown = Counter(label for label in labels if label not in trained)
    if unknown:
        listing = ", ".join(f"{label!r} ({count})" for label, count in sorted(unknown.items()))
        known = ", ".join(map(repr, classes[:5])) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
        message = (
            f"{unknown.total()} of {len(labels)} images{f' of {split!r}' if split else ''} have a label that the head was not "
            f"trained on: {listing}; it knows {known}. Correct the labels, leave these images out, or train with them"
        )
        raise BadDataError(message)


def score(
    labels: NDArray[np.str_],
    probabilities: NDArray[np.floating[Any]],
    classes: list[str],
    split: str = "",
    *,
    units: Units | None = None,
    temperature: float | None = None,
    conformal: Conformal | None = None,
) -> Evaluation:
    """Compare predicted probabilities with the true labels.

    Args:
        labels: true label of each image ``(n,)``.
        probabilities: ``(n, k)``.
        classes: label of each column.
        split: name of the split, for the report.
        units: which images belong together; by default none.
        temperature: what the logits behind the probabilities were divided by.
        conformal: decides which labels are in a prediction set.

    Raises:
        BadDataError: there are no images, one has a class that the head does not know, or a probability is not finite.
    """
    if not len(labels):
        message = "no images to evaluate on"
        raise BadDataError(message)
    require_finite(probabilities)
    require_known(labels.tolist(), classes, split)
    index = {label: i for i, label in enumerate(classes)}
    truth = np.array([index[label] for label in labels.tolist()])
    guess = probabilities.argmax(axis=1)
    k, n, units = len(classes), len(labels), units or Units.each(len(labels))
    confusion = np.bincount(truth * k + guess, minlength=k * k).reshape(k, k)
    correct = int(np.trace(confusion))
    hits, support, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = np.divide(hits, taken, out=np.zeros(k), where=taken > 0)
    recall = np.divide(hits, support, out=np.zeros(k), where=support > 0)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros(k), where=total > 0)
    resamples = resamples_for(n, k)
    scores = _proportions(truth, probabilities, units) | _bootstrapped(truth, probabilities, temperature, resamples, units)
    return Evaluation(
        split=split,
        n=n,
        groups=units.groups,
        correct=correct,
        accuracy=correct / n,
        accuracy_interval=scores["accuracy"]["interval"],
        macro_f1=scores["f1_macro"]["value"],
        log_loss=scores["log_loss"]["value"],
        per_class=[
            {
                "label": classes[i],
                "n": int(support[i]),
                "precision": float(precision[i]) if support[i] or taken[i] else None,
                "recall": float(recall[i]) if support[i] else None,
                "recall_interval": units.among(truth == i).proportion(guess[truth == i] == i) if support[i] else None,
                "f1": float(f1[i]) if support[i] else None,
            }
            for i in range(k)
        ],
        confusion=confusion.tolist(),
        classes=list(classes),
        notes=[
            *_notes(scores["accuracy"]["interval"], correct, units, [(classes[i], int(support[i])) for i in range(k)]),
            *(spread_notes("sets", conformal.coverage, conformal.n, conformal.effective) if conformal else []),
        ],
        scores=scores,
        resamples=resamples,
        temperature=temperature,
        sets=conformal.measured(probabilities, truth, units) if conformal else None,
    )


def _proportions(truth: NDArray[np.intp], probabilities: NDArray[np.floating[Any]], units: Units) -> dict[str, dict[str, Any]]:
    """Accuracy under all its names, and top-k accuracy."""
    n, k, places = len(truth), probabilities.shape[1], ranks(truth, probabilities)

    def within(top: int) -> dict[str, Any]:
        hits = places < top
        return {"value": int(hits.sum()) / n, "interval": units.proportion(hits), "method": "modified wilson"}

    names = ("accuracy", "precision_micro", "recall_micro", "f1_micro", "recall_weighted")  # with one label an image
    return {name: within(1) for name in names} | {f"top_{top}": within(top) for top in TOPS if k > top}


def _bootstrapped(
    truth: NDArray[np.intp],
    probabilities: NDArray[np.floating[Any]],
    temperature: float | None,
    resamples: int,
    units: Units,
) -> dict[str, dict[str, Any]]:
    before = None if temperature is None else untempered(probabilities, temperature)
    once = weighted_scores(truth, probabilities, np.ones((len(truth), 1), np.float32), before)
    blocks = [weighted_scores(truth, probabilities, weights, before) for weights in units.resampled(truth, resamples)]
    scores: dict[str, dict[str, Any]] = {}
    for name, (value,) in once.items():
        values = np.concatenate([block[name] for block in blocks])
        interval: Interval | None
        if name.startswith("ece"):
            chance = chance_calibration_errors(probabilities if name == "ece" or before is None else before, resamples)
            scores[f"{name}_by_chance"] = {"value": float(chance.mean()), "interval": None, "method": None}
            interval = distance_interval(float(value), values, chance, units.reach)
        else:
            interval = units.bootstrap(float(value), values)
        scores[name] = {"value": float(value), "interval": interval, "method": "bootstrap"}
    own = classwise_calibration_error(truth, probabilities)
    return scores | {"ece_classwise": {"value": own, "interval": None, "method": None}}


def _notes(bounds: Interval, correct: int, units: Units, support: list[tuple[str, int]]) -> list[str]:
    notes = units.notes
    low, high = bounds
    if high - low > WIDE and not notes:
        sure = correct == len(units.of)
        without = " without an error" if sure else ""
        claim = f"at least {low:.0%}" if sure else f"between {low:.0%} and {high:.0%}"
        notes.append(f"too few to conclude: {units.phrase}{without} only show an accuracy of {claim}")
    if units.scarce:
        scores = "macro precision, log-loss and areas under curves"
        notes.append(f"with {units.count} groups, intervals of {scores} hold in about 90 % of cases, others in 92 to 97")
    few = [f"{label} ({count})" for label, count in support if count < FEW]
    if few:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        notes.append(f"classes with fewer than {FEW} images here, whose own scores say little: {shown}")
    return notes


class SingleLabel(HeadTask):
    """The task of predicting one label an image; two classes are a case of this, with two probabilities."""

    name, singular, plural = ONE_LABEL.name, "class", "classes"
    ranked_by, in_percent, exclusive = "accuracy", True, True

    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        labels = {row.label for row in parts[0][0]}
        unknown = untrained_labels([(row.label, name) for part, name in parts for row in part])
        if unknown:
            message = f"{'; '.join(unknown)}: give it training images, or leave it out"
            raise BadDataError(message)
        if len(labels) < 2:
            message = f"a classifier needs at least two classes; the training split has one, {labels.pop()!r}"
            raise BadDataError(message)

    def score(self, truth: NDArray[Any], outputs: Outputs, split: str, units: Units | None = None) -> Evaluation:
        conformal, names = Conformal.from_json(self.conformal), list(self.names)
        return score(truth, outputs, names, split, units=units, temperature=self.temperature, conformal=conformal)

    def require_labels(self, labels: Sequence[str], split: str) -> None:
        require_known(labels, self.names, split)

    def indicators(self, truth: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(truth[:, None] == np.unique(truth))

    def headline(self, metrics: dict[str, Any]) -> str:
        low, high = metrics["accuracy_interval"]
        return f"accuracy {metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}]"

    def decide(self, outputs: NDArray[np.float32]) -> tuple[str, float]:
        best = int(outputs.argmax())
        return self.names[best], float(outputs[best])

    def text(self, prediction: Prediction) -> str:
        return f"{prediction.label}\t{prediction.probability:.4f}"
