"""The path of regularisation against scikit-learn's fits: never a worse objective, and certificates that say what is true."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from classifiers.evaluation.probabilities import log_loss
from classifiers.heads.logistic import CS
from classifiers.heads.solvers.softmax import Optimum, SoftmaxPath

Floats = NDArray[np.float32]


def features(n: int, d: int, shares: tuple[float, ...], spread: float, seed: int = 0) -> tuple[Floats, NDArray[np.intp]]:
    """What networks give: many correlated, skewed directions, a few of which tell the classes apart. Standardised."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(len(shares), n, p=shares)
    targets[: len(shares)] = range(len(shares))
    hidden = np.random.default_rng(7).normal(size=(len(shares), 32))[targets] * spread + rng.normal(size=(n, 32))
    mixed = hidden @ np.random.default_rng(8).normal(size=(32, d)) / 6 + 0.3 * rng.normal(size=(n, d))
    found = np.maximum(mixed, 0)
    return ((found - found.mean(axis=0)) / found.std(axis=0)).astype(np.float32), targets


SETS = {
    "two classes": (300, 64, (0.5, 0.5), 0.2),
    "fewer rows than features": (80, 200, (0.3, 0.3, 0.4), 0.5),
    "separable": (400, 64, (0.2,) * 5, 1.0),
    "imbalanced": (500, 48, (0.9, 0.07, 0.03), 0.3),
    "rows in several blocks": (9000, 12, (0.5, 0.25, 0.25), 0.3),
    "few rows of two classes": (12, 5, (0.5, 0.5), 2.0),
    "one row in 200": (1500, 32, (0.99, 0.005, 0.005), 0.3),
    "120 classes": (720, 24, (1 / 120,) * 120, 0.8),
}


def objective(
    X: Floats, targets: NDArray[np.intp], C: float, weight: NDArray[np.floating], bias: NDArray[np.floating]
) -> float:
    logits = X.astype(np.float64) @ weight.T.astype(np.float64) + bias
    if logits.shape[1] == 1:
        logits = np.concatenate([0 * logits, logits], axis=1)
    return log_loss(logits, targets) * len(X) + float((weight.astype(np.float64) ** 2).sum()) / (2 * C)


def steepest(X: Floats, targets: NDArray[np.intp], found: Optimum) -> float:
    """The certificate, in float64."""
    inputs, weight = X.astype(np.float64), found.weight.astype(np.float64)
    logits = inputs @ weight.T + found.bias
    if len(weight) == 1:
        residual = 1 / (1 + np.exp(-logits)) - targets[:, None]
    else:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        residual = shifted / shifted.sum(axis=1, keepdims=True)
        residual[np.arange(len(X)), targets] -= 1
    gradient = residual.T @ inputs + weight / found.C
    return float(max(np.abs(gradient).max(), np.abs(residual.sum(axis=0)).max())) / len(X)


@pytest.mark.parametrize("name", SETS)
def test_every_point_is_at_least_as_good_as_scikit_learns(name: str) -> None:
    X, targets = features(*SETS[name])
    classes = len(SETS[name][2])
    path = list(SoftmaxPath(X, targets, classes).optima(CS, 5000))
    assert [point.C for point in path] == list(CS)
    for point in path[::4]:
        own = objective(X, targets, point.C, point.weight, point.bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs = LogisticRegression(C=point.C, max_iter=10_000).fit(X, targets)
        assert own <= 1.0001 * objective(X, targets, point.C, theirs.coef_, theirs.intercept_)


@pytest.mark.parametrize("name", [name for name in SETS if "120" not in name])
def test_what_is_asked_for_exactly_is_the_optimum(name: str) -> None:
    """Newton's method to the last digit says what that is; scikit-learn's default may stop at 50 times as much."""
    X, targets = features(*SETS[name])
    for point in list(SoftmaxPath(X, targets, len(SETS[name][2])).optima(CS, 5000, steep=0))[4::8]:
        exact = LogisticRegression(C=point.C, solver="newton-cholesky", tol=1e-9).fit(X.astype(np.float64), targets)
        own = objective(X, targets, point.C, point.weight, point.bias)
        bound = 1.001 if "one row" in name else 1.0001  # where weights are in the hundreds, the last steps gain little each
        assert own <= bound * objective(X, targets, point.C, exact.coef_, exact.intercept_)
        assert point.objective == pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize("name", SETS)
def test_certificates_are_true_and_small(name: str) -> None:
    X, targets = features(*SETS[name])
    for point in list(SoftmaxPath(X, targets, len(SETS[name][2])).optima(CS, 5000))[::3]:
        assert point.converged
        assert point.gradient == pytest.approx(steepest(X, targets, point), abs=2e-6)
        assert point.gradient <= 1e-3


def test_a_limit_of_evaluations_is_kept_and_said() -> None:
    X, targets = features(*SETS["separable"])
    found = list(SoftmaxPath(X, targets, 5).optima([1000.0], 3))
    assert (found[0].evaluations, found[0].converged) == (3, False)


@pytest.mark.parametrize("name", ["two classes", "fewer rows than features", "separable"])
def test_a_good_start_saves_most_steps_and_leads_to_the_same_place(name: str) -> None:
    X, targets = features(*SETS[name])
    path = SoftmaxPath(X, targets, len(SETS[name][2]))
    (cold,) = path.optima([1.0], 5000, steep=0)
    (half,) = SoftmaxPath(X[::2], targets[::2], len(SETS[name][2])).optima([1.0], 5000)
    (warm,) = path.optima([1.0], 5000, steep=0, start=(cold.weight, cold.bias))
    (near,) = path.optima([1.0], 5000, steep=0, start=(half.weight, half.bias))
    assert warm.evaluations < cold.evaluations / 2
    for found in (warm, near):
        assert found.objective == pytest.approx(cold.objective, rel=1e-5)
        np.testing.assert_allclose(found.weight, cold.weight, atol=2e-2 * np.abs(cold.weight).max())


def test_points_that_nobody_asks_for_are_not_computed() -> None:
    X, targets = features(*SETS["separable"])
    path = SoftmaxPath(X, targets, 5)
    asked = path.optima(CS, 5000)
    before = path.evaluations
    next(asked)
    some = path.evaluations
    list(asked)
    assert before == 0 < some < path.evaluations / 3


@pytest.mark.parametrize("d", [3, 8])
def test_features_that_say_nothing_leave_the_shares_of_the_classes(d: int) -> None:
    targets = np.array([0, 0, 0, 1])
    (found,) = SoftmaxPath(np.zeros((4, d), np.float32), targets, 2).optima([1.0], 100)
    assert 1 / (1 + np.exp(-found.bias[0])) == pytest.approx(0.25, abs=1e-4)
    np.testing.assert_array_equal(found.weight, 0)


def test_constant_columns_get_no_weight() -> None:
    X, targets = features(*SETS["two classes"])
    with_constants = np.insert(X, [0, 30], 0, axis=1)
    (found,) = SoftmaxPath(with_constants, targets, 2).optima([0.1], 1000)
    (without,) = SoftmaxPath(X, targets, 2).optima([0.1], 1000)
    np.testing.assert_allclose(found.weight[:, [0, 31]], 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(found.weight, [0, 31], axis=1), without.weight, atol=1e-3)


@pytest.mark.parametrize("name", ["two classes", "imbalanced"])
def test_a_row_of_weight_two_is_two_rows(name: str) -> None:
    X, targets = features(*SETS[name])
    times = np.arange(len(X)) % 3 + 1
    classes = len(SETS[name][2])
    (weighted,) = SoftmaxPath(X, targets, classes, times.astype(float)).optima([0.1], 1000)
    (repeated,) = SoftmaxPath(np.repeat(X, times, axis=0), np.repeat(targets, times), classes).optima([0.1], 1000)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-5)
    np.testing.assert_allclose(weighted.weight, repeated.weight, atol=2e-3)
    assert abs(weighted.gradient - repeated.gradient) < 1e-3
