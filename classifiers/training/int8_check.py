"""A check of the accuracy that int8 features cost a head, against float features (docs/int8.md)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from store.cache import FeatureCache
from store.errors import BadDataError, PenultError
from store.format.calibration import read_calibration
from store.format.samples import Row
from store.splits import groups_of

if TYPE_CHECKING:
    from classifiers.heads.search import Head

log = logging.getLogger("penult.classifiers")

FOLDS = 5
FEWEST = 20  # images; with fewer, one error weighs too much to judge anything
MAX_LOSS = 0.005  # of accuracy; one image is always allowed


def judge_rounding(cache: FeatureCache, head: Head, fitted: Sequence[Row]) -> dict[str, Any] | None:
    """Cross-validate a fitted head's settings on float and on int8 features of the same training images, with the same folds.

    Args:
        cache: the features; only an int8 cache is judged.
        head: a fitted one of `registry.rows`.
        fitted: the rows it was fitted on; only those that int8 was calibrated and judged on are used.

    Returns:
        ``fp32`` and ``int8`` accuracy and ``n``, the number of images; None if there is nothing to judge.

    Raises:
        BadDataError: int8 costs more than half a point and more than one image.
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
    several = {label for label, count in Counter(row.label for row in rows).items() if count > 1}
    rows = [row for row in rows if row.label in several]
    if len(several) < 2 or len(rows) < FEWEST:
        log.warning("the accuracy that int8 costs cannot be measured: only %d training images have float features", len(rows))
        return None
    classes, targets = np.unique([str(row.label) for row in rows], return_inverse=True)
    owners = np.unique(np.array(groups_of(rows), dtype=object), return_inverse=True)[1]
    places = [place[row.sha256] for row in rows]
    layer = list(kept.layers).index(cache.layer)
    right = {
        name: _correct(head, features[layer][places], targets, owners, classes)
        for name, features in (("fp32", kept.exact), ("int8", kept.rounded))
    }
    scores = {**{name: round(count / len(rows), 6) for name, count in right.items()}, "n": len(rows)}
    lost = right["fp32"] - right["int8"]
    if lost > 1 and lost > MAX_LOSS * len(rows):
        message = (
            f"int8 costs this head too much: cross-validated on {len(rows)} training images it is right on {right['int8']} "
            f"with int8 features and on {right['fp32']} with float ones. Extract with --precision fp32 into another cache"
        )
        raise BadDataError(message)
    log.info("on %(n)d training images, cross-validated: accuracy %(int8).4f with int8 features, %(fp32).4f with float", scores)
    return scores


def _correct(
    head: Head, X: NDArray[np.float32], targets: NDArray[np.intp], owners: NDArray[np.intp], classes: NDArray[Any]
) -> int:
    """How many rows are classified correctly by heads that were fitted without their fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    fewest = min(len(np.unique(owners[targets == k])) for k in range(len(classes)))
    splitter = StratifiedGroupKFold(n_splits=max(min(FOLDS, fewest), 2), shuffle=True, random_state=0)
    right = 0
    for train, test in splitter.split(X, targets, owners):
        present = np.unique(targets[train])  # leaving out a group may leave out a whole class
        if len(present) > 1:
            logits = head.refit(X[train], classes[targets[train]]).logits(X[test])
            right += int((present[logits.argmax(axis=1)] == targets[test]).sum())
    return right
