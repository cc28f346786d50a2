"""Scores of predicted probabilities for many weightings of the same images at once, as a bootstrap needs.

Each equals scikit-learn's score of the same name with ``sample_weight``; the tests compare them. Scikit-learn takes one
weighting at a time: minutes for a thousand resamples of 10,000 images of 100 classes; these take about two seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError

Probabilities = NDArray[np.floating[Any]]
Values = NDArray[np.float64]
Weights = NDArray[np.float32]

WORDS = {  # for the scores over all outputs; those of each output are SHORT
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
SHARES = {  # what single-label reports show, in percent
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy: every class counts the same",
    "top_3": "top-3: the true label is among the first three",
    "top_5": "top-5: the true label is among the first five",
}
SCALES = {  # and as numbers
    "precision_macro": "precision, mean over the classes",
    "f1_macro": "F1, mean over the classes",
    "roc_auc": "ROC-AUC: order by probability; 0.5 is chance",
    "pr_auc": "PR-AUC: the same, stricter if a class is rare",
    "log_loss": "log-loss: lower is better",
    "brier": "Brier score: lower is better",
    "ece": "ECE: how far confidence is from accuracy",
    "ece_classwise": "class-wise ECE: the same for the probability of each class",
}
BINS = 15  # of confidence, for the calibration error: the number of Guo et al. 2017


def require_finite(outputs: Probabilities, what: str = "the head") -> None:
    """Refuse outputs ``(n, k)`` that are not finite: ``argmax`` of a row with a NaN is the NaN, which would count as a class.

    Args:
        outputs: of n images.
        what: their source, for the message.

    Raises:
        BadDataError: says how many rows hold NaN or infinity.
    """
    bad = np.asarray(~np.isfinite(outputs).all(axis=1))
    if bad.any():
        message = (
            f"{what} gives NaN or infinity for {int(bad.sum())} of {len(bad)} images, the first of which is number "
            f"{int(bad.argmax()) + 1}; such outputs cannot be scored"
        )
        raise BadDataError(message)


def weighted_scores(
    truth: NDArray[np.intp], probabilities: Probabilities, weights: Weights, before: Probabilities | None = None
) -> dict[str, Values]:
    """Every score that is not a plain proportion, for each column of weights.

    Args:
        truth: class index of each image ``(n,)``.
        probabilities: ``(n, k)``.
        weights: how often each image counts, whole numbers, ``(n, b)``. Where a true class has no weight, a mean over the
            classes is over the others.
        before: probabilities ``(n, k)`` before temperature scaling, for ``log_loss_before`` and ``ece_before``.

    Returns:
        Scores ``(b,)`` by name. ROC-AUC and PR-AUC are missing if all images are of one class.
    """
    scores = decision_scores(truth, probabilities, weights) | _areas(truth, probabilities, weights)
    scores |= probability_scores(truth, probabilities, weights) | {"ece": _calibration_error(truth, probabilities, weights)}
    if before is not None:
        scores["log_loss_before"] = _mean(_surprise(truth, before), weights)
        scores["ece_before"] = _calibration_error(truth, before, weights)
    return scores


def probability_scores(truth: NDArray[np.intp], probabilities: Probabilities, weights: Weights) -> dict[str, Values]:
    """The scores of `weighted_scores` that are means over the images."""
    each = {"log_loss": _surprise(truth, probabilities), "brier": _squared_error(truth, probabilities)}
    return {name: _mean(values, weights) for name, values in each.items()}


def ranks(truth: NDArray[np.intp], probabilities: Probabilities) -> NDArray[np.intp]:
    """How many classes rank before the true one ``(n,)``; in a tie the first one wins, as in ``argmax``."""
    own = probabilities[np.arange(len(truth)), truth][:, None]
    earlier = np.arange(probabilities.shape[1]) < truth[:, None]
    return np.asarray((probabilities > own).sum(axis=1) + ((probabilities == own) & earlier).sum(axis=1))


def _sums(groups: NDArray[np.intp], count: int, rows: NDArray[np.intp], weights: Weights) -> Weights:
    """Sum of the weights of the rows of each group ``(count, b)``, exact below 2**24."""
    from scipy.sparse import csr_array

    pick = csr_array((np.ones(len(rows), np.float32), (groups, rows)), shape=(count, len(weights)))
    return np.asarray(pick @ weights)


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Values:
    """Quotients in float64; 0 where the divisor is 0."""
    return np.asarray(np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0, dtype=np.float64))


def _mean(values: Values, weights: Weights) -> Values:
    return np.asarray(values @ weights / weights.sum(axis=0, dtype=np.float64))


def decision_scores(truth: NDArray[np.intp], probabilities: Probabilities, weights: Weights) -> dict[str, Values]:
    """The scores of `weighted_scores` that depend on the most probable class alone."""
    guess, k, rows = probabilities.argmax(axis=1), probabilities.shape[1], np.arange(len(truth))
    right = rows[truth == guess]
    hits, support, taken = (
        _sums(truth[right], k, right, weights),
        _sums(truth, k, rows, weights),
        _sums(guess, k, rows, weights),
    )
    parts = {"precision": ratio(hits, taken), "recall": ratio(hits, support), "f1": ratio(2 * hits, support + taken)}
    true_here, drawn = np.isin(np.arange(k), truth)[:, None], support > 0
    present = true_here | np.isin(np.arange(k), guess)[:, None]  # as scikit-learn: classes that appear in truth or prediction
    scores = {"balanced_accuracy": mean_of(parts["recall"], drawn)}
    for name, values in parts.items():
        scores[f"{name}_macro"] = mean_of(values, present & (drawn | ~true_here))
        if name != "recall":  # whose mean by class size is the accuracy
            scores[f"{name}_weighted"] = (values * support).sum(axis=0) / support.sum(axis=0, dtype=np.float64)
    return scores


def mean_of(values: Values, counted: NDArray[np.bool_]) -> Values:
    """Means ``(b,)`` over those of the classes ``(k, b)`` that are counted; NaN where none is."""
    if counted[:, 0].any() and (counted == counted[:, :1]).all():
        return np.asarray(values[counted[:, 0]].mean(axis=0))
    number = counted.sum(axis=0)
    return np.where(number > 0, np.where(counted, values, 0).sum(axis=0) / np.maximum(number, 1), np.nan)


def _areas(truth: NDArray[np.intp], probabilities: Probabilities, weights: Weights) -> dict[str, Values]:
    """ROC-AUC and PR-AUC: of the second of two classes, otherwise the mean over the true classes, each against the rest."""
    classes = np.unique(truth)
    if len(classes) < 2:
        return {}
    if probabilities.shape[1] == 2:
        classes = classes[1:]
    with np.errstate(divide="ignore", invalid="ignore"):  # a class without a weight
        areas = [_area(truth == c, probabilities[:, c], weights) for c in classes]
    roc, pr = (mean_of(np.stack(values), ~np.isnan(values)) for values in zip(*areas, strict=True))
    return {"roc_auc": roc, "pr_auc": pr}


def _area(positive: NDArray[np.bool_], scores: Probabilities, weights: Weights) -> tuple[Values, Values]:
    """Area under the ROC curve (Mann and Whitney's statistic), and average precision, of one class against the rest.

    Both curves have corners only at the scores of positives, so it is enough to know how much of the rest lies between these
    scores, and how much on them.
    """
    corners = np.unique(scores[positive])
    m, rows = len(corners), np.arange(len(scores))
    place = np.searchsorted(corners, scores, "left") + np.searchsorted(corners, scores, "right")  # odd: on a corner
    own = _sums(place[positive] // 2, m, rows[positive], weights)
    rest = _sums(place[~positive], 2 * m + 1, rows[~positive], weights)
    total, others = own.sum(axis=0, dtype=np.float64), rest.sum(axis=0, dtype=np.float64)
    below = np.cumsum(rest, axis=0)
    passed = (own * (below[0:-1:2] + rest[1::2] / 2)).sum(axis=0, dtype=np.float64)
    above = others - below[0:-1:2]  # the rest at or above each corner
    reached = total - np.cumsum(own, axis=0) + own
    precision = ratio(reached, reached + above)
    return passed / (total * others), (own * precision).sum(axis=0) / total


def average_precision(positive: NDArray[np.bool_], scores: Probabilities, weights: Weights) -> Values:
    """Average precision of one label, for each column of weights ``(b,)``; NaN if no row with the label has a weight."""
    if not positive.any():
        return np.full(weights.shape[1], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _area(positive, scores, weights)[1]


def _surprise(truth: NDArray[np.intp], probabilities: Probabilities) -> Values:
    return surprise(probabilities[np.arange(len(truth)), truth])


def surprise(own: Probabilities) -> Values:
    """Minus the logarithm of the probability of what is true, in nats.

    Probabilities are kept from 0 and 1 by the precision of their type, as in scikit-learn's ``log_loss``: in float32 an image
    costs at most 15.9.
    """
    least = np.finfo(own.dtype).eps
    return np.asarray(-np.log(np.clip(own, least, 1 - least).astype(np.float64)))


def _squared_error(truth: NDArray[np.intp], probabilities: Probabilities) -> Values:
    """Brier's score of each image: 0 to 2, or 0 to 1 with two classes, whose two columns hold the same information."""
    own = probabilities[np.arange(len(truth)), truth].astype(np.float64)
    total = np.square(probabilities, dtype=np.float64).sum(axis=1) - own**2 + (1 - own) ** 2
    return np.asarray(total / 2 if probabilities.shape[1] == 2 else total)


def _calibration_error(truth: NDArray[np.intp], probabilities: Probabilities, weights: Weights) -> Values:
    """Expected calibration error of the winning class, in bins of equal width (Guo et al. 2017, equation 3)."""
    confidence, bins = confidence_bins(probabilities)
    gap = (probabilities.argmax(axis=1) == truth) - confidence
    per_bin = np.where(np.unique(bins)[:, None] == bins, gap, 0.0) @ weights
    return np.asarray(np.abs(per_bin).sum(axis=0) / weights.sum(axis=0, dtype=np.float64))


def classwise_calibration_error(truth: NDArray[np.intp], probabilities: Probabilities) -> float:
    """Mean over the classes of how far the probability of a class is from its frequency, in bins of equal width.

    The ``ece`` looks at the winning class alone, and a probability that is wrong for rare classes hides behind the others
    (Kull et al. 2019, "Beyond temperature scaling", equation 2).
    """
    n, k = probabilities.shape
    errors = []
    for column in range(k):
        own = probabilities[:, column].astype(np.float64)
        bins = np.clip(np.ceil(own * BINS).astype(np.intp) - 1, 0, BINS - 1)
        errors.append(np.abs(np.bincount(bins, (truth == column) - own, BINS)).sum() / n)
    return float(np.mean(errors))


def chance_calibration_errors(probabilities: Probabilities, count: int, seed: int = 0) -> Values:
    """Simulated calibration errors ``(count,)`` of a perfectly calibrated head with the same confidences.

    This is the "consistency resampling" of Bröcker & Smith 2007. On few images they are far from zero.
    """
    confidence, bins = confidence_bins(probabilities)
    rng, n = np.random.default_rng(seed), len(confidence)
    gaps = ((rng.random(n, np.float32) < confidence) - confidence for _ in range(count))
    return np.array([np.abs(np.bincount(bins, gap)).sum() / n for gap in gaps])


def confidence_bins(probabilities: Probabilities) -> tuple[Values, NDArray[np.intp]]:
    """Probability of the winning class ``(n,)``, and its bin."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    return confidence, np.clip(np.ceil(confidence * BINS).astype(np.intp) - 1, 0, BINS - 1)
