"""Intervals hold what they promise, scores are scikit-learn's, prediction sets cover, and a temperature calibrates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import betabinom, binom
from sklearn import metrics
from sklearn.base import clone
from sklearn.datasets import load_digits

from classifiers.evaluation.conformal import Conformal
from classifiers.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    distance_interval,
    modified_wilson,
    resampled,
    resamples_for,
    wilson,
)
from classifiers.evaluation.probabilities import softmax, untempered
from classifiers.evaluation.scores import BINS, chance_calibration_errors, weighted_scores
from classifiers.evaluation.single_label import score
from classifiers.evaluation.task import Evaluation
from classifiers.heads.logistic import LogisticHead
from classifiers.heads.mlp import MlpHead

Drawn = tuple[NDArray[np.intp], NDArray[np.float32]]


def draw(n: int, k: int = 4, sharpness: float = 1.0, seed: int = 0) -> Drawn:
    """Classes, and probabilities that know them exactly as well as they say; sharpened, they claim more."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, k))
    truth = (softmax(logits).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=k - 1)
    return truth, softmax(sharpness * logits)


def evaluated(drawn: Drawn, temperature: float | None = None) -> Evaluation:
    truth, probabilities = drawn
    classes = [f"c{k}" for k in range(probabilities.shape[1])]
    return score(np.array(classes)[truth], probabilities, classes, "test", temperature=temperature)


@pytest.mark.parametrize("n", [20, 153, 1000])
def test_intervals_of_shares_cover_near_one_too(n: int) -> None:
    """The exact coverage, over a grid of true shares; Wilson's own is 84 % at its worst."""
    shares = 1 - np.geomspace(0.001, 0.5, 400)
    law = binom.pmf(np.arange(n + 1)[:, None], n, shares)

    def covered(interval: Callable[[float, float], Interval]) -> NDArray[np.float64]:
        low, high = np.array([interval(s, n) for s in range(n + 1)]).T
        return np.asarray((law * ((low[:, None] <= shares) & (shares <= high[:, None]))).sum(axis=0))

    assert covered(modified_wilson).min() > 0.925
    assert np.mean(covered(modified_wilson) < 0.93) < 0.015
    if n < 300:
        assert covered(wilson).min() < 0.85


@pytest.mark.parametrize("k", [2, 5])
def test_weighted_scores_are_scikit_learns(k: int) -> None:
    truth, probabilities = draw(300, k)
    probabilities = np.round(probabilities, 2)  # many equal scores
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    weights = np.concatenate([np.ones((300, 1), np.float32), *resampled(truth, 3)], axis=1)
    found = weighted_scores(truth, probabilities, weights)
    guess, labels = probabilities.argmax(axis=1), range(k)
    for column, w in enumerate(weights.T):
        expected = {
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, guess, sample_weight=w),
            "log_loss": metrics.log_loss(truth, probabilities, sample_weight=w, labels=labels),
            "brier": metrics.brier_score_loss(truth, probabilities if k > 2 else probabilities[:, 1], sample_weight=w),
        }
        for average in ("macro", "weighted"):
            three = metrics.precision_recall_fscore_support(truth, guess, average=average, sample_weight=w, zero_division=0)
            expected |= {f"{name}_{average}": value for name, value in zip(("precision", "recall", "f1"), three, strict=False)}
        del expected["recall_weighted"]  # the accuracy
        judged = labels if k > 2 else [1]
        areas = [metrics.average_precision_score(truth == c, probabilities[:, c], sample_weight=w) for c in judged]
        expected["pr_auc"] = np.mean(areas)
        scores = probabilities if k > 2 else probabilities[:, 1]
        expected["roc_auc"] = metrics.roc_auc_score(truth, scores, multi_class="ovr", sample_weight=w)
        assert set(found) == {*expected, "ece"}
        for name, value in expected.items():
            assert found[name][column] == pytest.approx(value, abs=1e-6), name  # scikit-learn computes in float32


def test_log_loss_of_certain_mistakes_is_scikit_learns() -> None:
    truth = np.array([0, 1, 1, 0])
    sure = np.array([[1, 0], [1, 0], [1e-9, 1 - 1e-9], [0.5, 0.5]])
    for dtype in (np.float32, np.float64):
        found = weighted_scores(truth, sure.astype(dtype), np.ones((4, 1), np.float32))["log_loss"]
        assert found[0] == pytest.approx(metrics.log_loss(truth, sure.astype(dtype)), rel=1e-6)


def test_top_k_is_scikit_learns_and_given_where_there_are_more_classes() -> None:
    truth, probabilities = draw(200, 6)
    found = evaluated((truth, probabilities)).scores
    for k in (3, 5):
        assert found[f"top_{k}"]["value"] == metrics.top_k_accuracy_score(truth, probabilities, k=k)
    assert [name for name in evaluated(draw(50, 4)).scores if name.startswith("top")] == ["top_3"]


def test_calibration_error_is_its_definition() -> None:
    truth, probabilities = draw(400, 3, sharpness=2.0)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    expected = 0.0
    for i in range(BINS):
        here = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if here.any():
            expected += here.mean() * abs(right[here].mean() - confidence[here].mean())
    assert evaluated((truth, probabilities)).scores["ece"]["value"] == pytest.approx(expected)


def test_classes_that_do_not_occur_are_in_no_area() -> None:
    truth, probabilities = draw(100, 3)
    keep = truth != 2
    found = evaluated((truth[keep], probabilities[keep])).scores
    expected = [metrics.roc_auc_score(truth[keep] == c, probabilities[keep, c]) for c in (0, 1)]
    assert found["roc_auc"]["value"] == pytest.approx(np.mean(expected))
    assert "roc_auc" not in evaluated((truth[truth == 1], probabilities[truth == 1])).scores


def test_resamples_keep_the_size_of_each_class() -> None:
    truth = np.repeat([0, 1, 2], [50, 1, 7])
    weights = np.concatenate([*resampled(truth, 40)], axis=1)
    for k, size in enumerate((50, 1, 7)):
        np.testing.assert_array_equal(weights[truth == k].sum(axis=0), np.full(40, size))
    assert len(np.unique(weights, axis=1).T) == 40
    assert resamples_for(10_000, 100) == 1000
    assert 200 < resamples_for(100_000, 2) < 1000
    assert resamples_for(1_000_000, 1000) == 200


def test_without_an_error_there_is_no_bootstrap_interval() -> None:
    found = evaluated((np.arange(28) % 2, np.eye(2, dtype=np.float32)[np.arange(28) % 2])).scores
    assert found["balanced_accuracy"] == {"value": 1.0, "interval": None, "method": "bootstrap"}
    assert found["accuracy"]["interval"] == wilson(28, 28)


def test_bootstrap_intervals_of_a_mean_cover() -> None:
    """The coverage of each score is measured by benchmarks/coverage.py; this is the mechanism, on an average of 60 numbers."""
    rng, strata, held = np.random.default_rng(0), np.arange(60) % 2, []
    for seed in range(300):
        values = rng.exponential(size=60)
        means = np.concatenate([values @ weights for weights in resampled(strata, 400, seed)]) / 60
        low, high = bootstrap_interval(values.mean(), means) or (0.0, 0.0)
        held.append(low <= 1 <= high)
    assert 0.89 <= np.mean(held) <= 0.98


def test_calibration_error_of_perfect_confidence_is_explained_by_chance() -> None:
    calibrated, sharpened = (evaluated(draw(500, sharpness=sharpness)).scores for sharpness in (1.0, 3.0))
    assert calibrated["ece"]["interval"][0] == 0
    assert calibrated["ece"]["value"] == pytest.approx(calibrated["ece_by_chance"]["value"], rel=0.6)
    assert sharpened["ece"]["interval"][0] > 0.1
    _, probabilities = draw(500)
    assert distance_interval(0.0, np.array([0.01, 0.02]), chance_calibration_errors(probabilities, 50))[0] == 0


def test_scores_before_the_temperature() -> None:
    truth, sharp = draw(4000, sharpness=2.0)
    calibrated = untempered(sharp, 0.5)  # as if a temperature of 2 had been applied
    np.testing.assert_allclose(untempered(calibrated, 2.0), sharp, atol=1e-6)
    found = evaluated((truth, calibrated), temperature=2.0).scores
    alone = evaluated((truth, sharp)).scores
    assert found["ece_before"]["value"] == pytest.approx(alone["ece"]["value"], abs=1e-6)
    assert found["log_loss_before"]["value"] == pytest.approx(alone["log_loss"]["value"], abs=1e-6)
    assert found["ece"]["value"] < found["ece_before"]["value"] / 3


def test_ten_thousand_images_of_a_hundred_classes_take_seconds() -> None:
    """What it costs is bounded by the number of resamples, which falls with the size of the data."""
    found = evaluated(draw(10_000, 100))
    assert found.resamples == 1000
    low, high = found.scores["roc_auc"]["interval"]
    assert low < found.scores["roc_auc"]["value"] < high
    assert high - low < 0.02


@pytest.mark.parametrize("kind", ["marginal", "per_class"])
def test_prediction_sets_cover_nine_of_ten(kind: str) -> None:
    """How many of m new images n calibration images make a set cover is beta-binomial (Vovk 2012)."""
    probabilities = draw(6000, sharpness=2.0)[1]
    rng = np.random.default_rng(1)
    truth = np.where(rng.random(6000) < 0.7, probabilities.argmax(axis=1), rng.integers(0, 4, 6000))
    conformal = Conformal.fit(probabilities[:2000], truth[:2000])
    covered = conformal.sets(probabilities[2000:], kind)[np.arange(4000), truth[2000:]]

    def within(n: int, m: int, found: int) -> bool:
        rank = int(np.ceil((n + 1) * 0.9))
        low, high = betabinom(m, rank, n + 1 - rank).ppf((0.005, 0.995))
        return bool(low <= found <= high)

    if kind == "marginal":
        assert within(2000, 4000, covered.sum())
    else:
        for k in range(4):
            old, new = truth[:2000] == k, truth[2000:] == k
            assert within(old.sum(), new.sum(), covered[new].sum()), k


def test_a_class_of_few_images_is_in_every_set_of_its_own_kind() -> None:
    truth, probabilities = draw(500)
    keep = (truth != 3) | (np.cumsum(truth == 3) <= 8)
    conformal = Conformal.fit(probabilities[keep], truth[keep])
    assert conformal.per_class[3] == 0
    assert min(conformal.per_class[:3]) > 0
    assert conformal.sets(probabilities, "per_class")[:, 3].all()
    assert Conformal.from_json(conformal.to_json()) == conformal


def digits(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.str_], NDArray[np.float32], NDArray[np.str_]]:
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    features, labels = X[order].astype(np.float32), y[order].astype(str)
    return features[:n], labels[:n], features[n:], labels[n:]


def test_temperature_calibrates_an_overconfident_mlp() -> None:
    before, after = [], []
    for seed in range(4):
        X, y, held, truth = digits(200, seed)
        head = MlpHead((256,), dropout=0.0, weight_decay=0.0, lr=3e-2, max_epochs=30, seed=seed).fit(X, y)
        found = score(truth, head.predict_proba(held), list(head.classes_), temperature=head.temperature_).scores
        assert head.temperature_ > 1
        assert head.conformal_ is not None
        assert head.conformal_.n == 200
        before.append(found["ece_before"]["value"])
        after.append(found["ece"]["value"])
    assert np.mean(before) > 0.05
    assert np.mean(after) < 0.75 * np.mean(before), (before, after)


@pytest.mark.parametrize(
    "head", [LogisticHead(Cs=(1e-3, 1e-2)), MlpHead((16,), lr=1e-2, max_epochs=15)], ids=["logistic", "mlp"]
)
def test_sets_calibrated_out_of_fold_cover_images_of_another_set(head: LogisticHead | MlpHead) -> None:
    X, y, held, truth = digits(400, 0)
    rng = np.random.default_rng(0)
    X, held = (part + 6 * rng.normal(size=part.shape).astype(np.float32) for part in (X, held))
    head = clone(head).fit(X, y)
    found = score(truth, head.predict_proba(held), list(head.classes_), conformal=head.conformal_).sets
    assert found is not None
    assert found["calibrated_on"] == 400
    assert 0.85 < found["marginal"]["coverage"] < 0.95
    assert found["marginal"]["mean_size"] > 1
    assert found["marginal"]["decided_right"] / found["marginal"]["decided"] > 0.8
