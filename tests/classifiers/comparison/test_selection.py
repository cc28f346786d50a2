"""What a choice costs in truth, and how many images decide: the seeded short form of two tables of `make bench`."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from benchmarks.selection import Pair, Sweep, accuracy, decided, measured
from classifiers.comparison.selection import all_against_first, luck_of_best
from classifiers.evaluation.paired_tests import flip_test
from classifiers.evaluation.units import Units


def test_the_best_of_equal_ones_is_lucky_and_better_than_none() -> None:
    luck = measured(Sweep(12, n=150), draws=20)
    assert luck.own > 0.015
    assert luck.expected < luck.own / 2
    assert luck.expected_held >= max(luck.own_held, 0.9)
    assert luck.told <= 0.05
    assert luck.alone > 0.2


def test_a_better_one_keeps_its_lead() -> None:
    luck = measured(Sweep(3, 0.06, n=600), draws=10)
    assert abs(luck.expected) < 0.01
    assert luck.power > 0.9


def test_the_luck_of_a_choice_by_groups_is_that_of_the_groups() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((4, 20)).repeat(10, axis=1) < 0.7  # the images of a group are all right, or all wrong
    groups = Units(np.arange(200) // 10)
    weighted = [partial(accuracy, each.astype(np.float32)) for each in right]
    of_groups, of_images = (luck_of_best(weighted, units, 500) for units in (groups, Units.each(200)))
    assert of_groups > 1.5 * of_images > 0
    assert luck_of_best(weighted[:1], groups, 50) == 0
    assert luck_of_best(weighted, Units(np.zeros(200, np.intp)), 50) == 0  # nothing is ever left out
    of_few = Sweep(3, n=40, size=10).draw(rng)
    assert any(note.startswith("nothing can be told from 40 images of 4 groups") for note in of_few.notes())


def test_tests_of_all_pairs_are_those_of_each_by_holm() -> None:
    right = np.array([[1] * 30, [1] * 24 + [0] * 6, [1] * 10 + [0] * 20], bool)
    units = Units.each(30)
    each = {pair: flip_test((right[pair[0]].astype(int) - right[pair[1]]).astype(float)) for pair in ((0, 1), (0, 2), (1, 2))}
    assert sorted(each, key=each.get) == [(0, 2), (1, 2), (0, 1)]
    assert all_against_first(list(right), units) == pytest.approx([1, each[0, 1], 3 * each[0, 2]])


@pytest.mark.parametrize(
    ("pair", "draws"), [(Pair(0.12, 0.06), 150), (Pair(0.12, -0.02), 100), (Pair(0.12, 0.06, size=15), 100)], ids=str
)
def test_with_as_many_images_as_are_needed_the_verdict_comes_in_four_of_five_cases(pair: Pair, draws: int) -> None:
    worth, not_worth = decided(pair, pair.needed(), draws, resamples=200)
    assert 0.68 < (worth if pair.gain > 0 else not_worth) < 0.92
    assert (not_worth if pair.gain > 0 else worth) == 0
