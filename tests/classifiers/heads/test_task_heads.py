"""Heads for several labels and for numbers, and their scores, against scikit-learn's."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    hamming_loss,
    log_loss,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)
from sklearn.utils.estimator_checks import parametrize_with_checks

from classifiers.evaluation import multi_label, regression
from classifiers.evaluation.registry import task_of
from classifiers.evaluation.regression import Intervals
from classifiers.heads.mlp import MultiLabelMlpHead
from classifiers.heads.multilabel_logistic import MultiLabelLogisticHead
from classifiers.heads.ridge import RidgeRegressionHead
from classifiers.heads.solvers.sigmoid import SigmoidProblem
from store.errors import BadDataError


def labelled(n: int, d: int, k: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features of many scales, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * rng.uniform(0.1, 5, d)
    logits = X / X.std(axis=0) @ rng.normal(size=(d, k)) * 3 / np.sqrt(d)
    return X.astype(np.float32), logits + rng.logistic(size=(n, k)) > 1


def numbered(n: int, d: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Features, and two numbers of other sizes that depend on them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)).astype(np.float32)
    return X, X @ rng.normal(size=(d, 2)) * [10, 0.1] + [1000, 0] + rng.normal(size=(n, 2)) * [5, 0.05]


# --- several labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(300, 40), (60, 200)])
@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_every_label_has_scikit_learns_optimum(n: int, d: int, C: float) -> None:
    X, truth = labelled(n, d, 3)
    problem = SigmoidProblem(X, truth, 1000)
    weight, bias, converged = problem.fit(C)
    assert converged
    inputs = ((X - problem.mean) / problem.scale).astype(np.float64)

    def objective(w: NDArray[np.float64], b: float, sign: NDArray[np.int64]) -> float:
        return float(np.logaddexp(0, -sign * (inputs @ w + b)).sum() + w @ w / 2 / C)

    for j in range(3):
        sign = np.where(truth[:, j], 1, -1)
        best = LogisticRegression(C=C, tol=1e-8, max_iter=20000).fit(inputs, truth[:, j])
        ours = objective(weight[j].astype(np.float64), float(bias[j]), sign)
        assert ours <= 1.0001 * objective(best.coef_[0], float(best.intercept_[0]), sign)


def test_the_chosen_value_has_the_least_log_loss_and_the_onnx_file_says_the_same() -> None:
    X, truth = labelled(400, 30, 4)
    head = MultiLabelLogisticHead().fit(X[:300], truth[:300])
    for j, C in enumerate(head.C_):
        assert min(head.path_, key=lambda point: float(point["log_losses"][j]))["C"] == C
        assert 1e-3 < C < 100
    probabilities = head.predict_proba(X[300:])
    session = onnxruntime.InferenceSession(head.fitted_.to_onnx(), providers=["CPUExecutionProvider"])
    assert session.run(["probabilities"], {"features": X[300:]})[0] == pytest.approx(probabilities, abs=1e-6)
    assert (head.predict(X[300:]) == truth[300:]).mean() > 0.75
    on_validation = MultiLabelLogisticHead().fit(X[:200], truth[:200], validation=(X[200:300], truth[200:300]))
    assert on_validation.fitted_.mean == pytest.approx(X[:300].mean(axis=0), abs=1e-5)  # both are fitted in the end
    assert MultiLabelLogisticHead(C=0.5).fit(X, truth).hyperparameters_["C"] == [0.5] * 4


def test_a_label_that_a_fold_lacks_stays_finite() -> None:
    X, truth = labelled(40, 10, 2)
    truth[:, 1] = False
    truth[3, 1] = True
    head = MultiLabelLogisticHead().fit(X, truth)
    assert all(np.isfinite(point["log_loss"]) for point in head.path_)
    assert np.abs(head.fitted_.layers[0][1]).max() < 20


def test_groups_are_not_divided_and_one_group_chooses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    X, truth = labelled(30, 5, 2)
    copies, twice = np.concatenate([X, X]), np.concatenate([truth, truth])
    groups = [bytes([i % 30]) for i in range(60)]
    with_groups = MultiLabelLogisticHead().fit(copies, twice, groups=groups)
    assert (with_groups.C_ < MultiLabelLogisticHead().fit(copies, twice).C_).all()  # which learns its copies by heart
    with caplog.at_level(logging.WARNING):
        assert MultiLabelLogisticHead().fit(X, truth, groups=[b"one"] * 30).C_.tolist() == [1.0, 1.0]
    assert "C cannot be chosen" in caplog.text


def test_an_mlp_learns_what_no_straight_line_can() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 4)).astype(np.float32)
    truth = np.stack([X[:, 0] * X[:, 1] > 0, X[:, 2] > 0], axis=1)
    head = MultiLabelMlpHead(hidden=(32,), lr=1e-2, dropout=0.0, max_epochs=30).fit(X[:400], truth[:400])
    right = (head.predict(X[400:]) == truth[400:]).mean(axis=0)
    assert (right > 0.85).all()
    straight = MultiLabelLogisticHead().fit(X[:400], truth[:400])
    assert (straight.predict(X[400:]) == truth[400:]).mean(axis=0)[0] < 0.65
    session = onnxruntime.InferenceSession(head.fitted_.to_onnx(), providers=["CPUExecutionProvider"])
    assert session.run(["probabilities"], {"features": X})[0] == pytest.approx(head.predict_proba(X), abs=1e-5)
    assert head.history_[head.best_epoch_ - 1]["val_loss"] == min(point["val_loss"] for point in head.history_)
    held = MultiLabelMlpHead(max_epochs=2).fit(X[:400], truth[:400], validation=(X[400:], truth[400:]))
    assert held.fitted_.mean == pytest.approx(X.mean(axis=0), abs=1e-5)


def test_scores_of_several_labels_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((60, 4)) < [0.5, 0.2, 0.05, 0.5]
    probabilities = np.clip(0.35 * truth + rng.normal(0.3, 0.2, truth.shape), 0.01, 0.99).round(2)
    weights = rng.integers(0, 3, (60, 5)).astype(np.float32)
    whole, each = multi_label.weighted_scores(truth, probabilities, weights)
    guess = probabilities >= 0.5
    for b in range(5):
        w = weights[:, b]
        counted = [j for j in range(4) if (w * truth[:, j]).any()]
        precise = [average_precision_score(truth[:, j], probabilities[:, j], sample_weight=w) for j in counted]
        assert each["average_precision"][counted, b] == pytest.approx(precise)
        assert np.isnan(np.delete(each["average_precision"][:, b], counted)).all()
        assert whole["mean_average_precision"][b] == pytest.approx(np.mean(precise))
        for kind in ("micro", "macro"):
            expected = f1_score(truth, guess, average=kind, sample_weight=w, zero_division=0)
            assert whole[f"f1_{kind}"][b] == pytest.approx(expected)
        assert whole["hamming_loss"][b] == pytest.approx(hamming_loss(truth, guess, sample_weight=w))
        losses = [log_loss(truth[:, j], probabilities[:, j], sample_weight=w, labels=[False, True]) for j in range(4)]
        assert whole["log_loss"][b] == pytest.approx(np.mean(losses))
    found = multi_label.measure(truth, probabilities, ["a", "b", "c", "d"])
    assert found.scores["subset_accuracy"]["value"] == (truth == guess).all(axis=1).mean()
    for score in (*found.scores.values(), *found.per_output[0]["scores"].values()):
        low, high = score["interval"]
        assert low <= score["value"] <= high
    assert "c (" in found.notes[0]


def test_a_label_that_no_image_has_is_undefined_and_not_zero() -> None:
    truth = np.array([[True, False], [False, False], [True, False]])
    found = multi_label.measure(truth, np.array([[0.9, 0.6], [0.2, 0.1], [0.8, 0.2]]), ["a", "b"])
    assert found.scores["mean_average_precision"]["value"] == 1.0
    b = found.per_output[1]["scores"]
    assert (b["average_precision"]["value"], b["recall"]["value"], b["precision"]["value"]) == (None, None, 0.0)
    assert found.to_json()["per_output"][1]["n"] == 0
    assert (b["f1"]["value"], found.scores["f1_macro"]["value"]) == (0.0, 0.5), "it is predicted where it is not"
    guess = np.array([[0.9, 0.4], [0.2, 0.1], [0.8, 0.2]])
    absent = multi_label.measure(truth, guess, ["a", "b"])
    assert absent.per_output[1]["scores"]["f1"] == {"value": None, "interval": None, "method": None}
    assert absent.scores["f1_macro"]["value"] == 1.0
    nowhere = multi_label.measure(truth[:, 1:], guess[:, 1:], ["b"])
    assert nowhere.scores["f1_macro"]["value"] is None
    certain = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.5]], np.float32)
    theirs = np.mean([log_loss(truth[:, k], certain[:, k], labels=[0, 1]) for k in range(2)])
    assert multi_label.measure(truth, certain, ["a", "b"]).scores["log_loss"]["value"] == pytest.approx(theirs, rel=1e-6)
    with pytest.raises(BadDataError, match="no images to evaluate on"):
        multi_label.measure(truth[:0], np.zeros((0, 2)), ["a", "b"])


# --- numbers -----------------------------------------------------------------------------------------------------------


@parametrize_with_checks([RidgeRegressionHead()])
def test_scikit_learns_law(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(("n", "d"), [(300, 40), (60, 200)])
def test_ridge_is_scikit_learns_in_the_units_of_the_numbers(n: int, d: int) -> None:
    X, numbers = numbered(n, d)
    head = RidgeRegressionHead().fit(X, numbers)
    assert head.chosen_by_ == "leave-one-out"
    inputs = (X - X.mean(axis=0)) / X.std(axis=0)
    centre, unit = numbers.mean(axis=0), numbers.std(axis=0)
    theirs = RidgeCV(alphas=head.alphas).fit(inputs.astype(np.float64), (numbers - centre) / unit)
    assert head.alpha_ == theirs.alpha_
    assert head.predict(X) / unit == pytest.approx((theirs.predict(inputs) * unit + centre) / unit, abs=2e-4)
    session = onnxruntime.InferenceSession(head.fitted_.to_onnx(), providers=["CPUExecutionProvider"])
    assert session.run(["values"], {"features": X})[0] == pytest.approx(head.predict(X), rel=1e-5, abs=1e-5)
    assert RidgeRegressionHead().fit(X, numbers[:, 0]).predict(X).shape == (n,)


def test_lambda_is_chosen_by_groups_or_on_validation() -> None:
    X, numbers = numbered(120, 60)
    alone = RidgeRegressionHead().fit(X, numbers)
    twice = np.concatenate([X, X]), np.concatenate([numbers, numbers])
    grouped = RidgeRegressionHead().fit(*twice, groups=[bytes([i % 120]) for i in range(240)])
    assert grouped.chosen_by_ == "folds"
    assert alone.alpha_ / 10 <= grouped.alpha_ <= 10 * alone.alpha_
    head = RidgeRegressionHead().fit(X[:80], numbers[:80], validation=(X[80:], numbers[80:]))
    assert (head.chosen_by_, len(head.history_)) == ("validation", 37)
    assert head.conformal_ is not None
    assert head.conformal_.n == 40
    assert head.fitted_.mean == pytest.approx(X.mean(axis=0), abs=1e-5)  # both are fitted in the end
    assert RidgeRegressionHead(alpha=3.0).fit(X, numbers).alpha_ == 3.0
    nothing = RidgeRegressionHead().fit(X, numbers, groups=[b"one"] * 120)
    assert (nothing.alpha_, nothing.chosen_by_, nothing.conformal_) == (1.0, None, None)


def test_scores_of_numbers_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 2)) * [1, 1000] + [5, 1e6]
    values = truth + rng.normal(size=(50, 2)) * [0.5, 800]
    weights = rng.integers(0, 3, (50, 4)).astype(np.float32)
    found = regression.weighted_scores(truth, values, weights)
    for b in range(4):
        w = weights[:, b]
        for name, theirs in (("r2", r2_score), ("mae", mean_absolute_error), ("rmse", root_mean_squared_error)):
            assert found[name][:, b] == pytest.approx(theirs(truth, values, sample_weight=w, multioutput="raw_values"))
    measured = regression.measure(truth, values, ["a", "b"], half_widths=np.tile([0.5, np.nan], (50, 1)))
    a, b = (entry["scores"] for entry in measured.per_output)
    assert a["coverage"]["value"] == (np.abs(values - truth)[:, 0] <= 0.5).mean()
    assert (b["coverage"]["value"], b["half_width"]["value"]) == (None, None)
    assert "coverage" not in regression.measure(truth, values, ["a", "b"]).per_output[0]["scores"]
    low, high = a["rmse"]["interval"]
    assert low < a["rmse"]["value"] < high
    constant = regression.measure(np.full((20, 1), 7.0), rng.normal(size=(20, 1)), ["c"])
    assert constant.scores["r2"] == {"value": None, "interval": None, "method": None}
    assert "undefined" in task_of("regression", ["c"]).headline(constant.to_json())


def test_intervals_hold_nine_of_ten_new_numbers() -> None:
    """Calibrated by leave-one-out on 200 rows; over draws, coverage is 90 % with about two points around it."""
    covered = []
    for seed in range(20):
        X, numbers = numbered(1200, 30, seed)
        head = RidgeRegressionHead().fit(X[:200], numbers[:200])
        assert head.conformal_ is not None
        far = np.abs(head.predict(X[200:]) - numbers[200:])
        covered.append((far <= head.conformal_.half_widths(head.predict(X[200:]))).mean(axis=0))
    assert np.mean(covered, axis=0) == pytest.approx([0.9, 0.9], abs=0.015)


def test_too_few_numbers_promise_nothing() -> None:
    residuals = np.arange(9.0)[:, None] - 4
    assert Intervals.fit(residuals[:8], residuals[:8]).half_width == [[None]]
    assert Intervals.fit(residuals, residuals).half_width == [[4.0]]
    task = task_of("regression", ["a"], Intervals.fit(residuals[:8], residuals[:8]).to_json())
    assert task.cells(np.array([1.5], np.float32)) == [1.5, "", ""]
    assert task.facts(np.array([1.5], np.float32)) == {"values": {"a": {"value": 1.5, "interval": None}}}


def test_intervals_are_as_wide_as_numbers_of_their_size_scatter() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 10, (500, 2))
    residuals = np.stack([values[:, 0] * rng.uniform(-1, 1, 500), rng.uniform(-1, 1, 500)], axis=1)
    fitted = Intervals.fit(values, residuals)
    assert [len(edges) for edges in fitted.edges] == [4, 4]
    assert fitted.half_width[0] == sorted(fitted.half_width[0])
    first, last = fitted.half_widths(np.array([[0.5, 0.5], [9.5, 9.5]]))
    assert last[0] > 4 * first[0]
    assert last[1] == pytest.approx(first[1], rel=0.1)
    assert Intervals.from_json(fitted.to_json()) == fitted
    facts = task_of("regression", ["a", "b"], fitted.to_json()).facts(np.array([9.5, 0.5], np.float32))["values"]
    assert facts["a"]["interval"] == pytest.approx([9.5 - last[0], 9.5 + last[0]])
    equal = Intervals.fit(np.repeat([[1.0], [2.0]], 250, axis=0), residuals[:, :1])
    assert [len(edges) for edges in equal.edges] == [1], "as many parts as different numbers make"
    constant = Intervals.fit(np.ones((500, 1)), residuals[:, :1])
    assert constant.edges == [[]]


def test_intervals_from_before_have_one_width() -> None:
    task = task_of("regression", ["a", "b"], {"coverage": 0.9, "n": 40, "half_width": [0.5, None]})
    values = task.facts(np.array([1.0, 2.0], np.float32))["values"]
    assert (values["a"]["interval"], values["b"]["interval"]) == ([0.5, 1.5], None)


def test_intervals_of_images_of_groups_count_groups_and_say_how_far_they_vary() -> None:
    rng, groups = np.random.default_rng(0), [b"%d" % (i // 20) for i in range(400)]
    X = rng.normal(size=(400, 5)).astype(np.float32)
    numbers = X[:, :1] + np.repeat(rng.normal(size=20), 20)[:, None]
    together, alone = (RidgeRegressionHead().fit(X, numbers, groups=each).conformal_ for each in (groups, None))
    assert 15 < together.effective < 100
    assert alone.effective is None
    task = task_of("regression", ["x"], together.to_json())
    note = task.score(numbers, X[:, :1], "test").notes[-1]
    assert note.startswith("the prediction intervals were calibrated on 400 images of groups, which count as ")
    held_out = [b"%d" % i for i in range(300)] + [b"of one group"] * 100
    validated = RidgeRegressionHead().fit(X[:300], numbers[:300], validation=(X[300:], numbers[300:]), groups=held_out)
    assert validated.conformal_.effective == pytest.approx(1), "the validation rows have their groups, too"
