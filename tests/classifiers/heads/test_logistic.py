"""The logistic head's settings: weights of rows and classes, elastic net, what it chooses by; and scikit-learn's law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from classifiers.bundles.bundle import Bundle
from classifiers.heads.logistic import LogisticHead
from classifiers.heads.solvers.elastic import STEEPEST, ElasticPath
from classifiers.heads.solvers.softmax import SoftmaxPath

Data = tuple[NDArray[np.float32], NDArray[np.str_]]


EXACT = {"check_sample_weight_equivalence_on_dense_data": "it asks for 1e-7, which probabilities in float32 do not tell apart"}


def rare(n: int = 300, d: int = 10, seed: int = 0) -> Data:
    """Three overlapping classes, one of them rare."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(5).normal(size=(3, d))
    targets = rng.choice(3, n, p=(0.6, 0.34, 0.06))
    targets[:3] = range(3)
    return (centres[targets] + 1.5 * rng.normal(size=(n, d))).astype(np.float32), np.array(["ant", "bee", "cat"])[targets]


@parametrize_with_checks(
    [LogisticHead(C=1.0, cv=1), LogisticHead(Cs=(0.1, 1.0), cv=2), LogisticHead(C=1.0, l1_ratio=0.5, cv=1)],
    expected_failed_checks=lambda _: EXACT,
)
def test_scikit_learns_law(estimator: Any, check: Any) -> None:
    check(estimator)


def test_a_row_that_counts_twice_is_two_rows() -> None:
    X, y = rare()
    times = np.arange(len(X)) % 3
    splits = [(np.arange(len(X)) % 5 != k, np.arange(len(X)) % 5 == k) for k in range(5)]
    again = np.repeat(np.arange(len(X)), times)
    weighted = LogisticHead(cv=[tuple(map(np.flatnonzero, pair)) for pair in splits]).fit(X, y, times)
    repeated = LogisticHead(cv=[tuple(np.flatnonzero(part[again]) for part in pair) for pair in splits]).fit(X[again], y[again])
    assert weighted.C_ == repeated.C_
    assert weighted.temperature_ == pytest.approx(repeated.temperature_, rel=1e-2)
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=2e-3)


@pytest.mark.parametrize("class_weight", ["balanced", {"cat": 8, "ant": 0.5}])
def test_weights_of_classes_are_scikit_learns(class_weight: Any) -> None:
    X, y = rare()
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    reference = LogisticRegression(C=0.3, class_weight=class_weight, tol=1e-8, max_iter=10_000).fit(Z, y)
    head = LogisticHead(C=0.3, class_weight=class_weight).fit(X, y)
    logits = head.fitted_.logits(X)
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, reference.predict_log_proba(Z), atol=1e-2)
    assert head.hyperparameters_["class_weight"] == class_weight


def test_balanced_classes_find_the_rare_one() -> None:
    (X, y), test = rare(), rare(n=2000, seed=1)
    plain, balanced = LogisticHead().fit(X, y), LogisticHead(class_weight="balanced").fit(X, y)
    found = [balanced_accuracy_score(test[1], head.predict(test[0])) for head in (plain, balanced)]
    assert found[1] > found[0] + 0.05


def test_c_is_chosen_by_accuracy_where_that_is_asked_for() -> None:
    X, y = rare(n=120)
    head = LogisticHead(select="accuracy").fit(X, y)
    best = max(point["accuracy"] for point in head.path_)
    tied = {point["C"]: point["log_loss"] for point in head.path_ if point["accuracy"] == best}
    assert min(tied, key=tied.__getitem__) == head.C_
    assert head.C_ != LogisticHead().fit(X, y).C_


def test_an_elastic_net_leaves_features_out_and_stands_at_its_optimum() -> None:
    X, y = rare()
    noisy = np.concatenate([X, np.random.default_rng(1).normal(size=(len(X), 30))], axis=1)
    head = LogisticHead(l1_ratio=0.7, Cs=(0.01, 0.1, 1.0)).fit(noisy, y)
    weight = head.fitted_.layers[0][0]
    assert (weight[:, :10] == 0).mean() < 0.6 < (weight[:, 10:] == 0).mean()
    assert [point["C"] for point in head.path_] == [0.01, 0.1, 1.0]
    assert [point["converged"] for point in head.path_] == [point["gradient"] <= STEEPEST for point in head.path_]
    assert [point["converged"] for point in head.path_] == [False, True, True]  # all weights are 0 in the first


@pytest.mark.parametrize("k", [2, 3])
def test_without_absolute_values_both_paths_meet(k: int) -> None:
    """What judges the elastic net is what judges the other path: same objective, same certificate of its own weights."""
    X, y = rare()
    Z = StandardScaler().fit_transform(X).astype(np.float32)
    targets = np.unique(y, return_inverse=True)[1] % k
    (exact,) = SoftmaxPath(Z, targets, k).optima([0.1], 1000)
    (saga,) = ElasticPath(Z, targets, k, None, l1=0.0, seed=0).optima([0.1], 1000)
    assert saga.objective == pytest.approx(exact.objective, rel=1e-4)
    assert max(saga.gradient, exact.gradient) < 1e-3
    np.testing.assert_allclose(saga.weight, exact.weight, atol=5e-3)


def test_an_elastic_net_that_was_stopped_says_so() -> None:
    head = LogisticHead(C=1e4, l1_ratio=0.5, max_iter=2).fit(*rare())
    assert not head.converged_
    assert head.path_[0]["gradient"] > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"select": "luck"}, "select is 'luck'; expected 'log-loss' or 'accuracy'"),
        ({"l1_ratio": 1.5}, "l1_ratio is 1.5; expected 0 to 1"),
        ({"class_weight": {"dog": 2}}, "labels that the data lacks: dog"),
        ({"class_weight": "heavy"}, "class_weight is 'heavy'; expected"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LogisticHead(**settings).fit(*rare(n=60))


def test_in_a_pipeline_and_a_grid_search() -> None:
    X, y = rare()
    search = GridSearchCV(make_pipeline(StandardScaler(), LogisticHead(cv=2)), {"logistichead__C": [1e-5, 0.1]}, cv=3)
    search.fit(X, y)
    assert search.best_params_ == {"logistichead__C": 0.1}
    assert search.score(*rare(seed=1)) > 0.6
    assert clone(LogisticHead(select="accuracy", l1_ratio=0.2)).get_params()["select"] == "accuracy"


def test_every_fold_goes_as_far_as_the_one_that_goes_farthest() -> None:
    """One fold can be told apart for ever, the others not: the best of all is looked for over the whole range."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(90, 2)).astype(np.float32)
    hard = np.arange(90) % 3 < 2
    y = np.where(hard, X[:, 0] + rng.normal(size=90) > 0, X[:, 0] > 0).astype(int)
    splits = [(np.flatnonzero(np.arange(90) % 3 != k), np.flatnonzero(np.arange(90) % 3 == k)) for k in range(3)]
    head, ends = LogisticHead(cv=splits).fit(X, y), []
    for split in splits:
        alone = LogisticHead(cv=[split]).fit(X, y)
        ends.append(alone.path_[-1]["C"])
    assert len(set(ends)) > 1
    assert head.path_[-1]["C"] == max(ends)


def test_settings_come_from_the_command_line_and_stay_in_the_bundle(
    penult: Callable[..., tuple[int, str, str]], dataset: Callable[..., Path], backbone_file: Path, tmp_path: Path
) -> None:
    cache, bundle = tmp_path / "p.cache", tmp_path / "p.head"
    photos = dataset(tmp_path / "photos", {"ants": 12, "bees": 6})
    assert penult("extract", photos, "-m", backbone_file, "-o", cache)[0] == 0
    flags = ("--class-weight", "balanced", "--select", "accuracy", "--l1-ratio", "0.5")
    code, _, err = penult("train", cache, "-o", bundle, *flags)
    assert code == 0, err
    saved = Bundle.load(bundle)
    wanted = {"class_weight": "balanced", "select": "accuracy", "l1_ratio": 0.5, "chosen": True}
    assert wanted.items() <= saved.hyperparameters.items()
    assert {"C", "log_loss", "accuracy", "gradient", "seconds"} <= set(saved.history[0])
    code, _, err = penult("train", cache, "--head", "mlp", "-o", tmp_path / "mlp.head", "--select", "accuracy")
    assert code == 2
    assert "--select is a setting of the logistic head, and this is mlp" in err
