"""Ridge, knn and centroid: scikit-learn's solutions, honest choices, the way to ONNX, and scikit-learn's law."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, LeaveOneOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from classifiers.evaluation.probabilities import fit_temperature, log_loss
from classifiers.heads import knn, ridge
from classifiers.heads.centroid import CentroidHead
from classifiers.heads.knn import KnnHead
from classifiers.heads.ridge import RidgeHead
from classifiers.heads.search import SearchHead
from classifiers.heads.solvers import spectrum
from classifiers.heads.solvers.cosines import nearest
from store.errors import BadDataError

Data = tuple[NDArray[np.float32], NDArray[np.str_]]
HEADS = [RidgeHead(), KnnHead(), CentroidHead()]


def blobs(n: int = 90, d: int = 12, k: int = 3, seed: int = 0, noise: float = 1.0) -> Data:
    """Gaussian classes around fixed centres, positive as features after a ReLU are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(k, d)) * 2
    targets = np.arange(n) % k
    X = np.maximum(centres[targets] + noise * rng.normal(size=(n, d)) + 1, 0)
    return X.astype(np.float32), np.array(["ant", "bee", "cat"])[targets]


def ids(head: SearchHead) -> str:
    return type(head).__name__


@parametrize_with_checks(HEADS)
def test_scikit_learns_law(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("head", HEADS, ids=ids)
def test_learns_and_is_calibrated_enough_to_beat_guessing(head: SearchHead) -> None:
    head = clone(head).fit(*blobs(noise=2))
    X, y = blobs(seed=1, n=300, noise=2)
    probabilities = head.predict_proba(X)
    assert np.mean(head.predict(X) == y) > 0.8
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert -np.log(probabilities[np.arange(300), np.searchsorted(head.classes_, y)]).mean() < 0.6


@pytest.mark.parametrize("head", HEADS, ids=ids)
@pytest.mark.parametrize("k", [2, 3])
def test_onnx_gives_the_same_probabilities(head: SearchHead, k: int) -> None:
    X, y = blobs(k=k, noise=2)
    head = clone(head).fit(X, y)
    session = onnxruntime.InferenceSession(head.fitted_.to_onnx(), providers=["CPUExecutionProvider"])
    others = np.concatenate([blobs(k=k, seed=1, noise=4)[0], np.zeros_like(X[:1])])  # a row without a direction too
    for rows in (X[:1], X, others):
        np.testing.assert_allclose(session.run(None, {"features": rows})[0], head.predict_proba(rows), atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(90, 12), (30, 64)], ids=["tall", "wide"])
@pytest.mark.parametrize("k", [2, 3])
def test_ridge_is_scikit_learns_solution(n: int, d: int, k: int) -> None:
    X, y = blobs(n, d, k, noise=3)
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    for alpha in (0.01, 1.0, 300.0):
        reference = RidgeClassifier(alpha=alpha).fit(Z, y)
        found = RidgeHead(alpha).fit(X, y).fitted_.layers[0]
        expected = np.atleast_2d(reference.coef_)
        np.testing.assert_allclose(found[0][-len(expected) :], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1][-len(expected) :], np.ravel(reference.intercept_), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(90, 12), (30, 64)], ids=["tall", "wide"])
def test_ridge_chooses_as_ridge_classifier_cv_does(n: int, d: int) -> None:
    X, y = blobs(n, d, noise=6)
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    alphas = np.logspace(-2, 6, 17)
    reference = RidgeClassifierCV(alphas, store_cv_results=True).fit(Z, y)
    head = RidgeHead(alphas=alphas).fit(X, y)
    assert head.alpha_ == reference.alpha_
    assert head.hyperparameters_["chosen_by"] == "leave-one-out"
    errors = [point["squared_error"] for point in head.history_]
    np.testing.assert_allclose(errors, reference.cv_results_.mean(axis=(0, 1)), rtol=1e-4)


def test_left_out_values_are_those_of_a_fit_without_the_row() -> None:
    X, y = blobs(n=40, d=9, noise=4)
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    fitted = spectrum.Spectrum(X, ridge._signs(np.searchsorted(["ant", "bee", "cat"], y), 3))
    [found] = fitted.left_out(np.arange(40), [5.0])
    expected = cross_val_predict(RidgeClassifier(alpha=5.0), Z, y, cv=LeaveOneOut(), method="decision_function")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(900, 40), (40, 300)], ids=["tall", "wide"])
def test_float32_products_of_large_sets_change_next_to_nothing(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs(n, d, noise=5)
    exact = RidgeHead(alphas=(0.1, 10, 1000)).fit(*data)
    monkeypatch.setattr(spectrum, "PRECISE", 0)
    monkeypatch.setattr(spectrum, "BLOCK", 100)
    rounded = RidgeHead(alphas=(0.1, 10, 1000)).fit(*data)
    for one, other in zip(rounded.history_, exact.history_, strict=True):
        assert one["squared_error"] == pytest.approx(other["squared_error"], rel=1e-3)
    assert rounded.alpha_ == exact.alpha_
    np.testing.assert_allclose(rounded.fitted_.layers[0][0], exact.fitted_.layers[0][0], atol=1e-5)


def test_settings_are_chosen_on_validation_and_fitted_on_both() -> None:
    train, validation = blobs(n=30, noise=3.0, seed=0), blobs(n=300, noise=3.0, seed=1)
    head = RidgeHead().fit(*train, validation=validation)
    assert head.chosen_by_ == "validation"
    by_hand = {}
    for point in head.history_:
        model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=point["alpha"])).fit(*train)
        values, signs = model.decision_function(validation[0]), np.where(validation[1][:, None] == model.classes_, 1, -1)
        by_hand[point["alpha"]] = np.mean((values - signs) ** 2)
        assert point["squared_error"] == pytest.approx(by_hand[point["alpha"]], rel=1e-3)
    assert min(by_hand, key=by_hand.__getitem__) == head.alpha_
    both = RidgeHead(head.alpha_).fit(*(np.concatenate(pair) for pair in zip(train, validation, strict=True)))
    np.testing.assert_allclose(head.fitted_.layers[0][0], both.fitted_.layers[0][0], atol=1e-5)


@pytest.mark.parametrize("head", [RidgeHead(), KnnHead()], ids=ids)
def test_folds_do_not_divide_groups(head: SearchHead) -> None:
    """Each image is there four times: who finds its copies believes what it is told."""
    X, y = blobs(n=60, d=40, noise=6.0)
    X4, y4 = np.repeat(X, 4, axis=0) + np.float32(1e-3) * np.arange(240)[:, None] % 4, np.repeat(y, 4)
    groups = [bytes([i // 4]) for i in range(len(X4))]
    leaking, honest = clone(head).fit(X4, y4), clone(head).fit(X4, y4, groups=groups)
    assert honest.chosen_by_ == "folds"
    assert max(p["accuracy"] for p in leaking.history_) > max(p["accuracy"] for p in honest.history_) + 0.1


def test_knn_votes_are_the_formula() -> None:
    """Three references at cosines 1, 0.8 and 0.6 of the row; two of them vote."""
    references = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    found = nearest(np.array([[5, 0]], np.float32), references, 3)
    shares = np.exp(knn.vote(found, np.array([1, 0, 0]), 2, 0.5, 2))[0]
    votes = np.exp(np.array([0, -0.2, -0.4]) / 0.5)
    ant, bee = votes[1] - votes[2] + 0.025, votes[0] - votes[2] + 0.025
    np.testing.assert_allclose(shares, [ant / (ant + bee), bee / (ant + bee)], rtol=1e-5)


def test_knn_does_not_jump_where_neighbours_change_places() -> None:
    """The second and the third neighbour are of different classes, and a hair decides which one votes."""
    references = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32)
    head = knn.NeighbourHead(np.zeros(2, np.float32), references, np.array([0, 0, 1]), 2, 0.1, ["a", "b"])
    above, below = head.probabilities(np.array([[1, 1e-6], [1, -1e-6]], np.float32))
    np.testing.assert_allclose(above, below, atol=1e-4)


def test_knn_survives_more_copies_than_neighbours() -> None:
    X, y = blobs(noise=2)
    copies = np.concatenate([X, np.repeat(X[1:2], 30, axis=0)]), np.concatenate([y, np.repeat(y[1:2], 30)])
    head = KnnHead(k=3).fit(*copies)
    assert len(head.fitted_.references) == len(X)
    assert head.predict(X[1:2])[0] == y[1]
    assert head.predict_proba(X[1:2]).max() > 0.5


def test_knn_keeps_many_references_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(noise=2)
    exact = KnnHead(k=5).fit(X, y)
    assert exact.hyperparameters_["reference_dtype"] == "float32"
    monkeypatch.setattr(knn, "LARGE", 100)
    head = KnnHead(k=5).fit(X, y)
    facts = head.hyperparameters_
    assert (facts["references"], facts["reference_dtype"], facts["reference_mebibytes"]) == (90, "float16", 0.0)
    np.testing.assert_allclose(head.predict_proba(X), exact.predict_proba(X), atol=0.02)
    session = onnxruntime.InferenceSession(head.fitted_.to_onnx(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"features": X})[0], head.predict_proba(X), atol=1e-5)
    monkeypatch.setattr(knn, "MOST", 1000)
    with pytest.raises(BadDataError, match=r"90 training features.*logistic or ridge"):
        KnnHead().fit(X, y)


def test_the_centroid_is_the_mean_of_centred_unit_rows() -> None:
    X, y = blobs(n=80)  # one ant and one bee more than cats: the centre is that of the classes
    head = CentroidHead().fit(X, y)
    units = X / np.linalg.norm(X, axis=1, keepdims=True)
    centred = units - np.mean([units[y == label].mean(axis=0) for label in head.classes_], axis=0)
    rows = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    mean = rows[y == "bee"].mean(axis=0)
    np.testing.assert_allclose(head.fitted_.layers[0][0][1], mean / np.linalg.norm(mean), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(head.fitted_.logits(3 * X), rows @ head.fitted_.layers[0][0].T, atol=1e-5)


def test_one_image_a_class_is_enough_and_said_to_be_uncalibrated(caplog: pytest.LogCaptureFixture) -> None:
    X, y = blobs(n=3, noise=0.5)
    for head in HEADS:
        caplog.clear()
        fitted = clone(head).fit(X, y)
        assert np.mean(fitted.predict(blobs(seed=1, noise=0.5)[0]) == blobs(seed=1)[1]) > 0.9
        assert (fitted.history_, fitted.chosen_by_) == ([], None)
        assert "nothing can be chosen or calibrated" in caplog.text


def test_many_rows_are_judged_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs(n=600, noise=4)
    whole = RidgeHead().fit(*data)
    monkeypatch.setattr("classifiers.heads.search.JUDGED", 300)
    part = RidgeHead().fit(*data)
    assert part.history_[0]["squared_error"] != whole.history_[0]["squared_error"]
    assert part.history_[0]["squared_error"] == pytest.approx(whole.history_[0]["squared_error"], rel=0.2)
    assert abs(np.log10(part.alpha_ / whole.alpha_)) <= 1


def test_a_score_gets_its_scale_from_a_temperature() -> None:
    """Without an error the best temperature is 0; 99 samples say no more than a hundredth of a doubt."""
    truth = np.arange(99) % 3
    cosines = 0.2 * np.eye(3, dtype=np.float32)[truth]
    temperature = fit_temperature(cosines, truth, unscaled=True)
    assert np.exp(-log_loss(cosines / temperature, truth)) == pytest.approx(0.993, abs=0.002)


@pytest.mark.parametrize("head", HEADS, ids=ids)
def test_again_is_the_same_setting_on_other_rows(head: SearchHead) -> None:
    X, y = blobs(noise=4)
    fitted = clone(head).fit(X, y)
    rows = np.flatnonzero(y != "cat")[:20]
    classes, targets = np.unique(y[rows], return_inverse=True)
    again = fitted.refit(X[rows], classes[targets])
    settings = {key: value for key, value in fitted.setting_.items() if key in head.get_params()}
    one_tau = {"taus": [fitted.setting_["tau"]]} if "tau" in fitted.setting_ else {}
    expected = clone(head).set_params(**settings, **one_tau).fit(X[rows], y[rows]).fitted_
    np.testing.assert_allclose(again.logits(X), expected.logits(X), atol=1e-5)


@pytest.mark.parametrize("head", HEADS, ids=ids)
def test_pipeline_and_grid_search(head: SearchHead) -> None:
    X, y = blobs(noise=2)
    assert make_pipeline(StandardScaler(with_mean=False), clone(head)).fit(X, y).score(X, y) > 0.8
    search = GridSearchCV(clone(head), {"cv": [2, 3]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.7
