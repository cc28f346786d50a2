"""The short form of benchmarks/coverage.py: intervals and sets hold what they promise where images are of groups."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.coverage import (
    GROUPED,
    Grouped,
    curve_coverage,
    grouped_set_coverage,
    judged,
    judged_in_short,
    number_coverage,
)
from classifiers.comparison.verdict import WORTH
from classifiers.evaluation.units import Units

ALONE, TEN = GROUPED[0], Grouped(10, 30, 0.3)


@pytest.mark.parametrize("population", [ALONE, TEN], ids=str)
def test_intervals_of_accuracies_and_differences(population: Grouped) -> None:
    rng, held, worth = np.random.default_rng(0), [], []
    _, (truth, first), _ = ALONE.draw(rng, 20_000)
    accuracy = float((first.argmax(axis=1) == truth).mean())
    for number in range(60):
        groups, (truth, first), ((_, second),) = population.draw(rng, population.groups, heads=2)
        units = Units.of_groups(groups)
        result = judged_in_short(truth, (first, second), units)
        if not number:
            full = judged(truth, (first, second), units)
            assert (full.p, full.decision) == (result.p, result.decision)
            for name, interval in result.intervals.items():
                assert interval == pytest.approx(full.intervals[name])
        bounds = [(result.intervals[name] or (0.0, 1.0), true) for name, true in (("accuracy", accuracy), ("difference", 0.0))]
        held.append([low - 1e-9 <= true <= high + 1e-9 for (low, high), true in bounds])
        worth.append(result.decision == WORTH)
    assert np.mean(held, axis=0) == pytest.approx([0.95, 0.95], abs=0.07)
    assert np.mean(worth) <= 0.05


@pytest.mark.parametrize("population", [ALONE, TEN], ids=str)
def test_sets_and_their_spread(population: Grouped) -> None:
    found = grouped_set_coverage(population, 80)
    assert found["all marginal"] == pytest.approx(0.9, abs=0.02)
    assert 0.87 < found["least"] <= found["most"] < 0.94
    assert found["spread"] == pytest.approx(found["said"], rel=0.35)


@pytest.mark.parametrize("population", [ALONE, TEN], ids=str)
def test_prediction_intervals_of_quiet_and_noisy_numbers(population: Grouped) -> None:
    found = number_coverage(population, 40)
    assert [found[name] for name in ("all", "first", "last")] == pytest.approx([0.9] * 3, abs=0.03)
    assert min(found[name] for name in ("r2", "mae", "rmse")) > 0.85


def test_learning_curves() -> None:
    found = curve_coverage(TEN, 20)
    assert min(found.values()) >= 0.8
    assert np.mean(list(found.values())) < 1, "they are not too wide"
