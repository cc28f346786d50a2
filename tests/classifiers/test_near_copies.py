"""Copies are found in features of any dimension, however many there are; what is no copy is left in peace."""

from __future__ import annotations

import numpy as np
import pytest

from classifiers.near_copies import FURTHEST, most_images, near_copies

Labels = list[str]


def classes(rng: np.random.Generator, n: int) -> Labels:
    return [str(label) for label in rng.integers(0, 2, n)]


@pytest.mark.parametrize("d", [8, 128, 512])
def test_no_alarm_without_copies(d: int) -> None:
    """About one data set of 500 has one; benchmarks/leaks.py counts."""
    rng = np.random.default_rng(d)
    alarms = [near_copies(rng.normal(size=(200, d)), classes(rng, 200)).sizes.max() > 1 for _ in range(20)]
    assert sum(alarms) <= 1


@pytest.mark.parametrize("length", [1, 2, 5, 10, 14, 20, 30])
def test_a_burst_of_any_length_is_one_unit(length: int) -> None:
    rng = np.random.default_rng(length)
    X = rng.normal(size=(245, 64))
    burst = X[:1] + 0.3 * rng.normal(size=(length, 64))
    copies = near_copies(np.concatenate([X, burst]), classes(rng, 245 + length))
    together = [0, *range(245, 245 + length)]
    assert np.flatnonzero(copies.units == copies.units[0]).tolist() == together
    assert (np.delete(copies.sizes, together) == 1).all()
    which, ratio = copies.nearest(0, np.arange(245, 245 + length))
    assert which >= 245
    assert ratio < FURTHEST


def test_where_every_image_has_copies_the_dimension_is_learned_further_out() -> None:
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.normal(size=(40, 64)), 10, axis=0)
    copies = near_copies(scenes + 0.3 * rng.normal(size=scenes.shape), [str(i // 10 % 2) for i in range(400)])
    assert (copies.units == np.repeat(copies.units[::10], 10)).all()
    assert len(set(copies.units.tolist())) == 40


def test_features_that_are_all_alike_raise_no_alarm() -> None:
    """Untrained networks give any two images a cosine near 1, and broken ones the same features for all images."""
    rng = np.random.default_rng(2)
    X = 10 + rng.normal(size=(300, 64))
    assert (X[0] @ X[1]) / np.linalg.norm(X[0]) / np.linalg.norm(X[1]) > 0.98
    assert near_copies(X).sizes.max() == 1
    assert near_copies(np.ones((100, 8))).sizes.max() == 1
    assert len(near_copies(np.empty((0, 8))).units) == 0


def test_a_class_is_no_burst_and_in_small_classes_nothing_is_seen() -> None:
    rng = np.random.default_rng(3)
    of = np.repeat(np.arange(20), 20)
    X = 3 * rng.normal(size=(20, 64))[of] + rng.normal(size=(400, 64))
    assert near_copies(X, of.astype(str).tolist()).sizes.max() == 1
    assert near_copies(X, (of % 2).astype(str).tolist()).sizes.min() == 20  # of two classes they are scenes
    small = rng.normal(size=(60, 64))
    small[1] = small[0] + 0.1
    assert near_copies(small, [str(i // 10) for i in range(60)]).sizes.max() == 1
    assert near_copies(small, [str(i // 30) for i in range(60)]).sizes.tolist()[:3] == [2, 2, 1]


def test_a_class_of_fewer_dimensions_is_no_burst() -> None:
    rng = np.random.default_rng(4)
    sheet = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 64)) + 0.02 * rng.normal(size=(40, 64))
    units = near_copies(np.concatenate([rng.normal(size=(200, 64)), sheet]), ["a"] * 200 + ["b"] * 40).units
    assert np.bincount(units[200:]).max() <= 20


def test_the_number_of_images_is_bounded() -> None:
    assert most_images(50_000, 1280) == 50_000
    assert most_images(10**6, 1280) == 55_901
    assert most_images(10, 0) == 10
