"""Heads on features: they learn, choose on what they may look at, survive the way to ONNX and keep scikit-learn's law."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from classifiers.evaluation.probabilities import fit_temperature, log_loss, softmax
from classifiers.heads.fitted import DenseHead
from classifiers.heads.logistic import CS, LogisticHead
from classifiers.heads.mlp import MlpHead
from classifiers.heads.solvers.standardise import standardisation
from store.errors import BadDataError

Data = tuple[NDArray[np.float32], NDArray[np.str_]]


def blobs(n: int = 90, d: int = 12, k: int = 3, seed: int = 0, noise: float = 1.0) -> Data:
    """Gaussian classes around fixed centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(k, d)) * 2
    targets = np.arange(n) % k
    X = centres[targets] + noise * rng.normal(size=(n, d))
    return X.astype(np.float32), np.array(["ant", "bee", "cat"])[targets]


@parametrize_with_checks([MlpHead((16,), lr=1e-2, max_epochs=20)])
def test_scikit_learns_law(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("head", [LogisticHead(), MlpHead(max_epochs=60, lr=3e-3)], ids=["logistic", "mlp"])
def test_learns_and_generalises(head: LogisticHead | MlpHead) -> None:
    head = clone(head).fit(*blobs(seed=0))
    X, y = blobs(seed=1)
    assert np.mean(head.predict(X) == y) > 0.9
    assert list(head.classes_) == ["ant", "bee", "cat"]
    np.testing.assert_allclose(head.predict_proba(X).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("k", [2, 3])
def test_one_value_of_c_is_scikit_learns_solution(k: int) -> None:
    X, y = blobs(k=k)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    reference = LogisticRegression(C=0.5, tol=1e-8, max_iter=10_000).fit(Z.astype(np.float64), y)
    head = LogisticHead(C=0.5).fit(X, y)
    expected = reference.predict_log_proba(Z.astype(np.float64))
    logits = head.fitted_.logits(X)
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_c_is_chosen_by_the_least_log_loss_on_validation_and_refitted_on_both() -> None:
    train, validation = blobs(n=30, noise=3.0, seed=0), blobs(n=300, noise=3.0, seed=1)
    head = LogisticHead().fit(*train, validation=validation)
    by_hand = {}
    for C in [point["C"] for point in head.path_]:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000)).fit(*train)
        logits = model.decision_function(validation[0])
        by_hand[C] = log_loss(logits, np.searchsorted(model.classes_, validation[1]))
        assert next(p for p in head.path_ if p["C"] == C)["log_loss"] == pytest.approx(by_hand[C], rel=0.02)
    assert min(by_hand, key=by_hand.__getitem__) == head.C_
    both = LogisticHead(C=head.C_).fit(np.concatenate([train[0], validation[0]]), np.concatenate([train[1], validation[1]]))
    np.testing.assert_allclose(head.fitted_.layers[0][0], both.fitted_.layers[0][0], atol=5e-3)


def test_folds_do_not_divide_groups() -> None:
    """Each image is there four times: folds that divide these copies find that hardly any regularisation is best."""
    X, y = blobs(n=60, d=40, noise=6.0)
    X4, y4 = np.repeat(X, 4, axis=0), np.repeat(y, 4)
    groups = [bytes([i // 4]) for i in range(len(X4))]
    leaking, honest = LogisticHead().fit(X4, y4), LogisticHead().fit(X4, y4, groups=groups)
    assert leaking.path_[-1]["accuracy"] > honest.path_[-1]["accuracy"] + 0.1
    assert honest.C_ < leaking.C_


def test_the_path_stops_where_nothing_can_win() -> None:
    head = LogisticHead().fit(*blobs(n=60, noise=4.0))
    losses = [point["log_loss"] for point in head.path_]
    assert len(losses) < len(CS) - 8
    assert losses[-1] > min(losses)


@pytest.mark.parametrize("head", [LogisticHead(), MlpHead(hidden=(16, 8), max_epochs=5)], ids=["logistic", "mlp"])
def test_onnx_gives_the_same_probabilities(head: LogisticHead | MlpHead) -> None:
    X, y = blobs()
    head = clone(head).fit(X, y)
    session = onnxruntime.InferenceSession(head.fitted_.to_onnx(), providers=["CPUExecutionProvider"])
    for n in (1, 7, 90):
        np.testing.assert_allclose(session.run(None, {"features": X[:n]})[0], head.predict_proba(X[:n]), atol=1e-6)


def test_mlp_is_reproducible_and_leaves_the_callers_random_state_alone() -> None:
    import torch

    X, y = blobs()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = MlpHead(max_epochs=5, seed=3).fit(X, y)
    assert torch.equal(torch.rand(1), expected)
    second, other = MlpHead(max_epochs=5, seed=3).fit(X, y), MlpHead(max_epochs=5, seed=4).fit(X, y)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))


def test_mlp_tries_what_is_left_open_and_keeps_what_was_best() -> None:
    head = MlpHead(max_epochs=8, patience=8).fit(*blobs(noise=3.0), validation=blobs(seed=1, noise=3.0))
    tried = [(each["hidden"], each["lr"]) for each in head.tried_]
    assert tried == [([128], 1e-3), ([128], 3e-3), ([512], 1e-3), ([512], 3e-3)]
    best = min(head.tried_, key=lambda each: float(each["val_loss"]))
    assert {**head.setting_, "hidden": list(head.setting_["hidden"])}.items() <= best.items()
    assert json.loads(json.dumps(head.hyperparameters_))["tried"] == head.tried_
    stated = MlpHead(hidden=(16,), lr=1e-2, max_epochs=3).fit(*blobs(noise=3.0))
    assert [(each["hidden"], each["lr"]) for each in stated.tried_] == [([16], 1e-2)]


@pytest.mark.parametrize("with_validation", [False, True])
def test_mlp_is_calibrated_on_every_row_out_of_fold(with_validation: bool) -> None:
    """Each row is there twice, in a group with itself: networks that know it would find that they are right about it."""
    X, y = blobs(n=60, d=40, noise=8.0)
    twice, labels, groups = np.repeat(X, 2, axis=0), np.repeat(y, 2), [bytes([i // 2]) for i in range(120)]
    validation = blobs(n=30, d=40, noise=8.0, seed=1) if with_validation else None
    head = MlpHead((32,), lr=1e-2, max_epochs=20)
    honest = clone(head).fit(twice, labels, groups=groups, validation=validation)
    leaking = clone(head).fit(twice, labels, validation=validation)
    assert honest.conformal_ is not None
    assert honest.conformal_.n == (150 if with_validation else 120)
    assert honest.temperature_ is not None
    assert min(point["val_loss"] for point in honest.history_) > 1.1 * min(point["val_loss"] for point in leaking.history_)
    held, truth = blobs(n=600, d=40, noise=8.0, seed=2)
    logits = honest.fitted_.logits(held)
    best = log_loss(logits / fit_temperature(logits, np.unique(truth, return_inverse=True)[1]), np.arange(600) % 3)
    assert log_loss(logits / honest.temperature_, np.arange(600) % 3) < 1.3 * best


def test_mlp_lowers_its_learning_rate_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    X, y = blobs()
    stated = MlpHead((8,), lr=0.1, batch_size=len(X), max_epochs=4, patience=4, schedule="cosine", validation_fraction=0)
    stated.fit(X, y, validation=(X, y))
    np.testing.assert_allclose(rates[:4], [0.1, 0.0853553, 0.05, 0.0146447], rtol=1e-5)
    with pytest.raises(ValueError, match="expected 'constant' or 'cosine'"):
        MlpHead(schedule="step").fit(X, y)


def test_mlp_stops_early_and_refits_for_the_best_number_of_epochs() -> None:
    head = MlpHead((64,), max_epochs=200, patience=3, lr=1e-2).fit(*blobs(noise=3.0), validation=blobs(seed=1, noise=3.0))
    losses = [point["val_loss"] for point in head.history_]
    assert len(losses) < 200
    assert head.best_epoch_ == int(np.argmin(losses)) + 1
    assert head.hyperparameters_["epochs"] == head.best_epoch_


def test_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)).astype(np.float32)
    truth = np.array([rng.choice(3, p=row / row.sum()) for row in softmax(logits).astype(np.float64)])
    assert fit_temperature(logits * 4, truth) == pytest.approx(4, rel=0.1)


def test_temperature_claims_no_certainty_without_errors() -> None:
    logits = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    assert fit_temperature(logits, np.arange(30) % 3) >= 1


def test_constant_features_do_not_divide_by_zero() -> None:
    X, y = blobs()
    X[:, 3] = 1e5
    mean, scale = standardisation(X)
    assert scale[3] == 1
    assert np.isfinite(LogisticHead(C=1.0).fit(X, y).predict_proba(X)).all()
    assert mean[3] == pytest.approx(1e5)


def test_one_class_and_unknown_validation_labels_are_refused() -> None:
    X, y = blobs()
    with pytest.raises(ValueError, match="one class, 'ant'"):
        LogisticHead().fit(X, np.repeat("ant", len(X)))
    with pytest.raises(BadDataError, match="training lacks: dog"):
        MlpHead().fit(X, y, validation=(X[:2], np.array(["ant", "dog"])))


def test_dense_head_is_two_layers_of_plain_arithmetic() -> None:
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=(5, 4)), rng.normal(size=5)), (rng.normal(size=(2, 5)), rng.normal(size=2))]
    narrow = [(w.astype(np.float32), b.astype(np.float32)) for w, b in layers]
    head = DenseHead(np.ones(4, np.float32), np.full(4, 2, np.float32), narrow, ["a", "b"], temperature=3.0)
    x = rng.normal(size=(1, 4)).astype(np.float32)
    hidden = np.maximum(layers[0][0] @ ((x[0] - 1) / 2) + layers[0][1], 0)
    logits = (layers[1][0] @ hidden + layers[1][1]) / 3
    np.testing.assert_allclose(head.probabilities(x)[0], np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)


def test_what_cannot_be_chosen_is_said(caplog: pytest.LogCaptureFixture) -> None:
    X, y = blobs(n=8, k=2)  # one bee cannot be judged, and to choose by ants alone would be to call everything an ant
    keep = np.flatnonzero((y != "bee") | (np.arange(8) == 1))
    head = LogisticHead().fit(X[keep], y[keep])
    assert (head.C_, head.path_) == (1.0, [])
    assert head.hyperparameters_["chosen"] is False
    assert "C cannot be chosen" in caplog.text
