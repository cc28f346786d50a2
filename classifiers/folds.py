"""Folds that hold every class and divide no group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Fold = tuple[NDArray[np.intp], NDArray[np.intp]]  # row numbers to fit on, and to judge on


def stratified_folds(targets: NDArray[np.intp], groups: Sequence[bytes] | None, most: int, seed: int) -> list[Fold]:
    """Divide rows, each class alike.

    Args:
        targets: class indices ``(n,)``, each from 0 to the last at least once.
        groups: what must not be divided, one per row; None where each row is its own.
        most: number of folds; fewer where a class has fewer groups.
        seed: of the shuffling.

    Returns:
        Folds; none where a class has a single group, for what is fitted without it could not know it.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    owners = np.arange(len(targets)) if groups is None else np.unique(np.array(groups, dtype=object), return_inverse=True)[1]
    classes = np.unique(targets)
    n_splits = min(most, *(len(np.unique(owners[targets == k])) for k in classes))
    if n_splits < 2:
        return []
    splitter = StratifiedGroupKFold(n_splits=n_splits, shuffle=True, random_state=seed)
    # Where groups span classes, a fold may take all of one class.
    found = splitter.split(targets[:, None], targets, owners)
    return [(train, test) for train, test in found if len(np.unique(targets[train])) == len(classes)]
