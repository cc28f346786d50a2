"""Cross-validation folds: every class is in each training part, and no group is divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from classifiers.evaluation.probabilities import Float32
from classifiers.evaluation.units import Units
from store.errors import BadDataError
from store.format.lazy_features import LazyFeatures

Fold = tuple[NDArray[np.intp], NDArray[np.intp]]  # row numbers to fit on, and to judge on

CLOSE = (1e-8, 1e-5)  # absolute and relative difference of numbers that ``np.isclose`` takes for equal
NOTHING_TO_JUDGE = "fewer than two classes have two training samples or groups"  # then `stratified_folds` has no folds


def stratified_folds(targets: NDArray[np.intp], groups: Sequence[bytes] | None, most: int, seed: int) -> list[Fold]:
    """Folds with about the same share of each class.

    A class with fewer groups than there are folds is judged in some of them only. One with a single group cannot be judged,
    since a fit without that group would not know the class: all rows of the group are always fitted.

    Args:
        targets: class indices ``(n,)``, each from 0 to the last at least once.
        groups: the group of each row, which is never divided; None if each row is its own group.
        most: number of folds; fewer if every class has fewer groups.
        seed: of the shuffling.

    Returns:
        Folds; none if fewer than two classes can be judged.
    """
    owners = _owners(len(targets), groups)
    classes = np.unique(targets)
    own = [np.unique(owners[targets == k]) for k in classes]
    n_splits = min(most, max(map(len, own)))
    alone = [each for each in own if len(each) == 1]
    fixed = np.isin(owners, np.concatenate(alone)) if alone else np.zeros(len(targets), bool)
    movable, always = np.flatnonzero(~fixed), np.flatnonzero(fixed)
    if n_splits < 2 or len(np.unique(targets[movable])) < 2:
        return []
    places = _stratified_places(targets[movable], owners[movable], n_splits, seed)
    parts = [(movable[places != fold], movable[places == fold]) for fold in range(n_splits)]
    folds = [(np.sort(np.concatenate([train, always])), test) for train, test in parts]
    # If groups span classes, a fold may take all of one class; if there are few of them, it may take none.
    return [(train, test) for train, test in folds if len(test) and len(np.unique(targets[train])) == len(classes)]


def _stratified_places(targets: NDArray[np.intp], owners: NDArray[np.intp], count: int, seed: int) -> NDArray[np.intp]:
    """The fold of each row ``(n,)``, the same as scikit-learn's ``StratifiedGroupKFold`` with ``shuffle`` gives it.

    Groups come in random order, those with the most uneven classes first. Each joins the fold that leaves the shares of the
    classes most alike over the folds; of equal ones the smallest. scikit-learn measures all classes for each group and fold,
    which takes hours for 10,000 classes; only those of the group change. Every number here is rounded as it is there.
    """
    targets, owners = (np.unique(each, return_inverse=True)[1] for each in (targets, owners))
    totals = np.bincount(targets).astype(np.float64)
    shuffled = np.arange(owners.max() + 1)
    np.random.RandomState(seed).shuffle(shuffled)
    owners = np.argsort(shuffled)[owners]
    cells, counts = np.unique(owners * len(totals) + targets, return_counts=True)  # of each group and class
    begins = np.searchsorted(cells, np.arange(len(shuffled) + 1) * len(totals))
    uneven = np.empty(len(shuffled))
    for group in range(len(shuffled)):
        held = slice(begins[group], begins[group + 1])
        dense = np.zeros(len(totals))
        dense[cells[held] % len(totals)] = counts[held]
        uneven[group] = dense.std()
    sizes, have = np.zeros(count), np.zeros((count, len(totals)))
    spread = np.zeros(len(totals))  # of the shares of each class over the folds
    place = np.empty(len(shuffled), np.intp)
    for group in np.argsort(-uneven, kind="stable").tolist():
        held = slice(begins[group], begins[group + 1])
        own, more = cells[held] % len(totals), counts[held].astype(np.float64)
        tried = np.repeat(have[:, None, own], count, axis=1)  # fold, the fold that it would join, class
        tried[np.arange(count), np.arange(count)] += more
        changed = np.std((tried / totals[own]).reshape(count, -1), axis=0).reshape(count, -1)
        best, least, smallest = 0, np.inf, np.inf
        for fold in range(count):
            spread[own] = changed[fold]
            value, size = float(spread.mean()), float(sizes[fold])
            if value < least or (value - least <= CLOSE[0] + CLOSE[1] * least and size < smallest):
                best, least, smallest = fold, value, size
        spread[own] = changed[best]
        have[best, own] += more
        sizes[best] += more.sum()
        place[group] = best
    return place[owners]


def group_folds(n: int, groups: Sequence[bytes] | None, count: int, seed: int) -> list[Fold]:
    """Folds for rows without a single class to balance; no group is divided. No folds if there is only one group."""
    owners = _owners(n, groups)
    splits = min(count, len(np.unique(owners)))
    if splits < 2:
        return []
    shuffled = np.random.RandomState(seed).permutation(np.unique(owners))
    parts = [np.isin(owners, part) for part in np.array_split(shuffled, splits)]  # as scikit-learn's GroupKFold does
    return [(np.flatnonzero(~part), np.flatnonzero(part)) for part in parts]


def on_first_views(folds: Sequence[Fold], views: int) -> list[Fold]:
    """The same folds, with only the first of every ``views`` rows to judge on: the image itself, not its augmentations."""
    return [(train, test[test % views == 0]) if views > 1 else (train, test) for train, test in folds]


def _owners(n: int, groups: Sequence[bytes] | None) -> NDArray[np.intp]:
    """The number of the group of each of the first ``n`` rows; validation rows may follow."""
    return np.arange(n) if groups is None else np.unique(np.array(groups[:n], dtype=object), return_inverse=True)[1]


def units_of(groups: Sequence[bytes] | None, rows: NDArray[np.intp]) -> Units | None:
    """Which of some rows belong together; None if no groups are known. A row whose group is not named is alone."""
    if groups is None:
        return None
    return Units.of_groups([b"of " + groups[i] if i < len(groups) else b"%d" % i for i in rows.tolist()])


def class_indices(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The distinct labels, sorted, and the index of each row's label.

    Raises:
        ValueError: there is only one class (scikit-learn requires this type).
    """
    classes, targets = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        message = f"a classifier needs at least two classes; this data has one class, {str(classes[0])!r}"
        raise ValueError(message)
    return classes, targets


def with_validation(
    X: Float32, targets: NDArray[np.intp], validation: tuple[ArrayLike, ArrayLike], classes: NDArray[Any]
) -> tuple[Float32, NDArray[np.intp], list[Fold]]:
    """Training rows followed by validation rows, and the single fold that separates them.

    Raises:
        BadDataError: validation has a class that training lacks.
    """
    held = np.asarray(validation[0], np.float32)
    fold = np.arange(len(X)), len(X) + np.arange(len(held))
    return np.concatenate([X, held]), np.concatenate([targets, validation_targets(validation[1], classes)]), [fold]


def validation_targets(y: ArrayLike, classes: NDArray[Any]) -> NDArray[np.intp]:
    """The index of each label among the classes of training.

    Raises:
        BadDataError: a label is not among them.
    """
    labels = np.asarray(y)
    unknown = sorted(set(labels.tolist()) - set(classes.tolist()))
    if unknown:
        message = f"validation has classes that training lacks: {', '.join(map(str, unknown))}"
        raise BadDataError(message)
    return np.searchsorted(classes, labels)


def lazy_with_validation(
    X: LazyFeatures,
    targets: NDArray[np.intp],
    validation: tuple[LazyFeatures, Any],
    classes: NDArray[Any],
    views: int = 1,
) -> tuple[LazyFeatures, NDArray[np.intp], list[Fold], NDArray[np.intp]]:
    """`with_validation` for lazy features, in the order on disk, which comes last; the views of an image stay together."""
    held, labels = validation
    every = X.joined(held)
    order = every.order_of_runs(views)
    fold = np.flatnonzero(order < len(X)), np.flatnonzero(order >= len(X))
    return every[order], np.concatenate([targets, validation_targets(labels, classes)])[order], [fold], order
