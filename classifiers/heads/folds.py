"""Cross-validation folds: every class is in each training part, and no group is divided."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from classifiers.evaluation.probabilities import Float32
from classifiers.evaluation.units import Units
from store.errors import BadDataError
from store.format.lazy_features import LazyFeatures

Fold = tuple[NDArray[np.intp], NDArray[np.intp]]  # row numbers to fit on, and to judge on

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
    from sklearn.model_selection import StratifiedGroupKFold

    owners = _owners(len(targets), groups)
    classes = np.unique(targets)
    own = [np.unique(owners[targets == k]) for k in classes]
    n_splits = min(most, max(map(len, own)))
    alone = [each for each in own if len(each) == 1]
    fixed = np.isin(owners, np.concatenate(alone)) if alone else np.zeros(len(targets), bool)
    movable, always = np.flatnonzero(~fixed), np.flatnonzero(fixed)
    if n_splits < 2 or len(np.unique(targets[movable])) < 2:
        return []
    splitter = StratifiedGroupKFold(n_splits=n_splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = list(splitter.split(movable[:, None], targets[movable], owners[movable]))
    folds = [(np.sort(np.concatenate([movable[train], always])), movable[test]) for train, test in parts]
    # If groups span classes, a fold may take all of one class; if there are few of them, it may take none.
    return [(train, test) for train, test in folds if len(test) and len(np.unique(targets[train])) == len(classes)]


def group_folds(n: int, groups: Sequence[bytes] | None, count: int, seed: int) -> list[Fold]:
    """Folds for rows without a single class to balance; no group is divided. No folds if there is only one group."""
    from sklearn.model_selection import GroupKFold

    owners = _owners(n, groups)
    splits = min(count, len(np.unique(owners)))
    if splits < 2:
        return []
    return list(GroupKFold(splits, shuffle=True, random_state=seed).split(np.empty((n, 0)), groups=owners))


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
