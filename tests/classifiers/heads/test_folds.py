"""Folds: no group is divided, every class is in each training part, and a rare class costs the others nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from classifiers.heads.folds import group_folds, stratified_folds


@pytest.mark.parametrize("case", range(24))
def test_the_folds_are_scikit_learns(case: int) -> None:
    """Where no class is rare, and groups may span classes; to the last row, because a tie of two folds goes by rounding."""
    rng = np.random.default_rng(case)
    classes, count = 2 + case % 5 * 4, 2 + case % 9
    targets = np.concatenate([np.arange(classes).repeat(3), rng.integers(0, classes, 20 * classes) ** 2 // classes])
    rows = np.arange(len(targets))
    owners = (rows, rows // 2, rng.integers(0, len(rows) // 3, len(rows)))[case % 3]
    groups = [b"%05d" % owner for owner in owners]
    kept = min(count, *(len(np.unique(owners[targets == k])) for k in range(classes)))
    expected = list(StratifiedGroupKFold(kept, shuffle=True, random_state=case).split(targets[:, None], targets, owners))
    own = stratified_folds(targets, groups, kept, case)
    expected = [(train, test) for train, test in expected if len(np.unique(targets[train])) == classes]
    for (train, test), (own_train, own_test) in zip(expected, own, strict=True):
        np.testing.assert_array_equal(train, own_train)
        np.testing.assert_array_equal(test, own_test)
    expected = list(GroupKFold(count, shuffle=True, random_state=case).split(targets[:, None], groups=owners))
    for (train, test), (own_train, own_test) in zip(expected, group_folds(len(targets), groups, count, case), strict=True):
        np.testing.assert_array_equal(train, own_train)
        np.testing.assert_array_equal(test, own_test)


@pytest.mark.parametrize("rare", [1, 2, 3])
def test_a_rare_class_leaves_the_others_all_their_folds(rare: int) -> None:
    targets = np.repeat([0, 1, 2], [40, 30, rare])
    folds = stratified_folds(targets, None, 5, 0)
    assert len(folds) == 5
    assert all(set(targets[train]) == {0, 1, 2} and not set(train) & set(test) for train, test in folds)
    judged = np.sort(np.concatenate([test for _, test in folds]))
    np.testing.assert_array_equal(judged, np.arange(70 if rare == 1 else 70 + rare))
    for train, test in folds:
        assert len(train) == len(targets) - len(test), "what is not judged is fitted"


def test_the_only_group_of_a_class_is_always_fitted_whole() -> None:
    """The group also has images of another class."""
    targets = np.repeat([0, 1, 2], [20, 20, 3])
    groups = [b"lone" if i < 4 or i >= 40 else bytes([i]) for i in range(43)]
    folds = stratified_folds(targets, groups, 5, 0)
    lone = {0, 1, 2, 3, 40, 41, 42}
    assert len(folds) == 5
    assert all(lone <= set(train.tolist()) for train, _ in folds)


def test_a_fold_that_would_take_a_whole_class_is_left_out() -> None:
    """Groups that span classes: one patient has nearly all of the last class."""
    targets = np.arange(60) % 3
    groups = [b"big" if label == 2 and i < 57 else bytes([i]) for i, label in enumerate(targets)]
    folds = stratified_folds(targets, groups, 5, 0)
    assert folds
    assert all(set(targets[train]) == {0, 1, 2} for train, _ in folds)


def test_one_class_alone_cannot_be_judged() -> None:
    assert stratified_folds(np.array([0] * 9 + [1]), None, 5, 0) == []
    assert stratified_folds(np.array([0, 0, 1, 1]), [b"a", b"a", b"b", b"b"], 5, 0) == []
