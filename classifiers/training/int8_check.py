"""A check of the accuracy that int8 features cost a head, against float features (docs/int8.md)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.intervals import RESAMPLES, Interval, bounds, signed
from classifiers.evaluation.paired_tests import difference_interval
from classifiers.evaluation.units import Units
from classifiers.heads.folds import Fold, stratified_folds
from store.cache import FeatureCache
from store.errors import BadDataError, PenultError
from store.format.calibration import read_calibration
from store.format.samples import Row
from store.progress.stages import staged
from store.splits import groups_of

if TYPE_CHECKING:
    from classifiers.heads.search import Head

log = logging.getLogger("penult.classifiers")

FOLDS = 5
FEWEST = 20  # images; with fewer, one error weighs too much to judge anything
MAX_LOSS = 0.005  # of accuracy


@staged("measuring what int8 costs")
def judge_rounding(cache: FeatureCache, head: Head, fitted: Sequence[Row]) -> dict[str, Any] | None:
    """Cross-validate a fitted head's settings on float and on int8 features of the same training images, with the same folds.

    Args:
        cache: the features; only an int8 cache is judged.
        head: a fitted one of `registry.rows`.
        fitted: the rows it was fitted on; only those that int8 was calibrated and judged on are used.

    Returns:
        ``fp32`` and ``int8`` accuracy, ``n``, the number of images, and ``change_interval``, the paired 95 % interval of the
        difference of the accuracies; None if there is nothing to judge.

    Raises:
        BadDataError: int8 costs more than half a point, and chance is no explanation: the whole interval is beyond.
    """
    if cache.fingerprint.fields.get("precision") != "int8":
        return None
    if not cache.samples.task.stratifies:
        log.warning("the accuracy that int8 costs is not measured: that needs a head for one label an image")
        return None
    try:
        kept = read_calibration(cache.path)
        if kept.calibration != cache.fingerprint.fields.get("calibration") or cache.layer not in kept.layers:
            message = f"{cache.path}/calibration.h5 belongs to another calibration"
            raise BadDataError(message)
    except PenultError as error:
        log.warning("the accuracy that int8 costs cannot be measured: %s", error)
        return None
    place = {digest: i for i, digest in enumerate(kept.sha256)}
    rows = list({row.sha256: row for row in fitted if row.sha256 in place}.values())
    classes, targets = np.unique([str(row.label) for row in rows], return_inverse=True)
    groups = groups_of(rows)
    folds = stratified_folds(targets, groups, FOLDS, seed=0)
    judged = np.concatenate([test for _, test in folds]) if folds else np.empty(0, np.intp)
    if len(judged) < FEWEST:
        log.warning("the accuracy that int8 costs cannot be measured: only %d training images have float features", len(judged))
        return None
    places = [place[row.sha256] for row in rows]
    layer = list(kept.layers).index(cache.layer)
    exact, rounded = (
        _correct(head, features[layer][places], classes[targets], folds) for features in (kept.exact, kept.rounded)
    )
    units = Units.of_groups([groups[i] for i in judged.tolist()])
    low, high = change_interval(exact, rounded, targets[judged], units)
    accuracies = {"fp32": round(float(exact.mean()), 6), "int8": round(float(rounded.mean()), 6)}
    on = f"cross-validated on {units.phrase.replace('image', 'training image')}"
    lost = f"{signed(float(rounded.mean() - exact.mean()))} points, {bounds((low, high))}"
    if high < -MAX_LOSS:
        message = (
            f"int8 costs this head too much: {on}, it is right on {rounded.sum()} with int8 features and on {exact.sum()} with "
            f"float ones ({lost}). Extract with --precision fp32 into another cache"
        )
        raise BadDataError(message)
    log.info("%s: accuracy %.4f with int8 features, %.4f with float (%s)", on, accuracies["int8"], accuracies["fp32"], lost)
    return {**accuracies, "n": len(judged), "change_interval": [round(low, 6), round(high, 6)]}


def change_interval(exact: NDArray[np.bool_], rounded: NDArray[np.bool_], targets: NDArray[np.intp], units: Units) -> Interval:
    """The paired 95 % interval of what rounding does to the accuracy.

    Args:
        exact, rounded: which images are classified correctly with float and with int8 features ``(n,)``.
        targets: their class indices.
        units: which of them belong together.
    """
    change = rounded.astype(np.int8) - exact.astype(np.int8)
    drawn = [change @ weights / weights.sum(axis=0) for weights in units.resampled(targets, RESAMPLES)]
    return difference_interval(change, np.concatenate(drawn).astype(np.float64), units)


def _correct(head: Head, X: NDArray[np.float32], labels: NDArray[Any], folds: Sequence[Fold]) -> NDArray[np.bool_]:
    """Which rows are classified correctly by heads that were fitted without their fold, in the order of the folds."""
    classes = np.unique(labels)
    return np.concatenate(
        [classes[head.refit(X[train], labels[train]).logits(X[test]).argmax(axis=1)] == labels[test] for train, test in folds]
    )
