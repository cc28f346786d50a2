"""The same sums from the processor, from blocks side by side, and from a device of torch."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from classifiers.heads.logistic import LogisticHead
from classifiers.heads.solvers import row_sums
from classifiers.heads.solvers.row_sums import GpuSums, RowSums, gpu_for
from classifiers.heads.solvers.softmax import SoftmaxPath
from classifiers.heads.solvers.threads import side_by_side
from store.errors import DeviceUnavailableError

N, D = 700, 12


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sums, "ROWS", 64)
    monkeypatch.setattr(row_sums, "GPU_ROWS", 96)


def problem(k: int, count: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(k)
    rows = rng.normal(size=(N, D)).astype(np.float32)
    width = count * (1 if k == 2 else k)
    weights, biases = rng.normal(size=(D, width)), rng.normal(size=width)
    return rows, rng.integers(0, k, N), rng.random(N) + 0.5, weights, biases


def directly(
    rows: np.ndarray, targets: np.ndarray, counts: np.ndarray, weights: np.ndarray, biases: np.ndarray, count: int
) -> list:
    """From the definitions, model by model."""
    losses, curvatures, residuals, products = [], [], [], []
    for w, b in zip(np.split(weights, count, axis=1), np.split(biases, count), strict=True):
        logits = rows.astype(float) @ w + b
        full = np.concatenate([0 * logits, logits], axis=1) if w.shape[1] == 1 else logits
        p = np.exp(full) / np.exp(full).sum(axis=1, keepdims=True)
        losses.append(-(counts * np.log(p[np.arange(N), targets])).sum())
        wrong = (p - np.eye(p.shape[1])[targets])[:, -w.shape[1] :]
        kept = p[:, -w.shape[1] :]
        curvatures += (counts @ (kept * (1 - kept))).tolist()
        residuals += (counts @ wrong).tolist()
        products += ((wrong * counts[:, None]).T @ rows).tolist()
    return [losses, curvatures, residuals, products]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("k", "count"), [(2, 1), (2, 3), (5, 1), (5, 4)])
def test_sums_are_what_they_are_said_to_be(k: int, count: int, dtype: type) -> None:
    rows, targets, counts, weights, biases = problem(k, count)
    expected = directly(rows, targets, counts, weights.astype(dtype), biases.astype(dtype), count)
    asked = weights.astype(dtype), biases.astype(dtype), count
    with threadpool_limits(1):
        alone = RowSums(rows, targets, counts)(*asked)
    with threadpool_limits(2):
        together = RowSums(rows, targets, counts)(*asked)
    with_torch = GpuSums(rows, targets, counts, "cpu")(*asked)
    tolerance = 2e-4 if dtype == np.float32 else 1e-9
    for found in (alone, together, with_torch):
        for name, mine, true in zip(found._fields, found, expected, strict=True):
            assert mine.dtype == np.float64, name
            np.testing.assert_allclose(mine, true, rtol=tolerance, atol=tolerance, err_msg=name)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)  # whatever the number of threads


def test_blocks_come_in_order_and_errors_come_through() -> None:
    with threadpool_limits(3):
        assert list(side_by_side(lambda i: i * i, range(100))) == [i * i for i in range(100)]
        with pytest.raises(ZeroDivisionError):
            list(side_by_side(lambda i: 1 / (50 - i), range(100)))


@pytest.mark.parametrize("k", [2, 4])
def test_a_path_on_a_device_is_the_path(k: int) -> None:
    """torch's processor stands for its GPU: the same operations, to the same optimum."""
    rows, targets, counts, _, _ = problem(k, 1)
    Cs = (0.01, 1.0, 100.0)
    here = list(SoftmaxPath(rows, targets, k, counts).optima(Cs, 500, steep=0))
    there = list(SoftmaxPath(rows, targets, k, counts, device="cpu").optima(Cs, 500, steep=0))
    for one, other in zip(here, there, strict=True):
        assert other.converged
        assert other.objective == pytest.approx(one.objective, rel=1e-5)
        np.testing.assert_allclose(other.weight, one.weight, atol=5e-3)


def test_a_gpu_is_taken_where_there_is_one_and_never_pretended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    caplog.set_level(logging.INFO, "penult")
    assert gpu_for("cpu", 2**40) is None
    monkeypatch.setattr(row_sums, "nvidia_driver_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_for("auto", 2**30) is None
    assert "finds no GPU here: training on the CPU" in caplog.text
    with pytest.raises(DeviceUnavailableError, match="finds no GPU; try 'cpu'"):
        LogisticHead(device="cuda").fit(*problem(2, 1)[:2])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    assert gpu_for("auto", 2**20) is None  # not worth the way
    assert gpu_for("auto", 2**30) == "cuda"
    assert gpu_for("cuda:1", 2**40) == "cuda:1"
    assert gpu_for("auto", 2**31) is None
    assert "do not fit on the GPU, where 8.6 GB are free" in caplog.text


@pytest.mark.gpu
def test_a_head_from_the_gpu_is_that_of_the_processor() -> None:
    rows, targets, counts, _, _ = problem(4, 1)
    here, there = (LogisticHead(C=1.0, cv=2, device=device).fit(rows, targets, counts) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(here.predict_proba(rows), there.predict_proba(rows), atol=1e-4)
