"""Softmax and sigmoid of logits, log-loss, and temperature scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scores import Probabilities

Float32 = NDArray[np.float32]

MORE_THAN_CERTAIN = 1.001  # sums of float32 may exceed 1 a little


def averaged(outputs: NDArray[np.float32], views: int) -> NDArray[np.float32]:
    """The mean over its views of each image's outputs: ``(n * views, k)`` to ``(n, k)``."""
    return outputs if views == 1 else outputs.reshape(-1, views, outputs.shape[1]).mean(axis=1)


def why_no_probabilities(outputs: NDArray[np.floating[Any]], *, exclusive: bool) -> str:
    """Why outputs ``(n, k)`` cannot be probabilities, in words; empty if they can. Rows with NaN or infinity do not count.

    ``exclusive``: whether an image has one label, so that those of an image add up to 1.
    """
    known = outputs[np.isfinite(outputs).all(axis=1)]
    odd = known[(known < 0) | (known > MORE_THAN_CERTAIN)]
    if odd.size:
        return f"{odd[0]:g} as a probability; expected numbers between 0 and 1"
    sums = known.sum(axis=1, dtype=np.float64) if exclusive else np.ones(1)
    worst = float(sums[np.abs(sums - 1).argmax()]) if len(sums) else 1.0
    if abs(worst - 1) > MORE_THAN_CERTAIN - 1:
        return f"probabilities that add up to {worst:g}; those of one label add up to 1"
    return ""


def softmax(logits: NDArray[np.floating[Any]]) -> Float32:
    """Row-wise softmax of ``(n, k)``, in float32."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)


def sigmoid(logits: NDArray[np.floating[Any]]) -> Float32:
    """The logistic function of each number, in float32."""
    from scipy.special import expit

    return np.asarray(expit(logits), np.float32)


def log_loss(logits: NDArray[np.floating[Any]], targets: NDArray[np.intp], weights: NDArray[np.float64] | None = None) -> float:
    """Mean negative log-likelihood of ``(n, k)`` logits, weighted if rows have weights, in float64, without clipping."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float(np.average(total - wide[np.arange(len(targets)), targets], weights=weights))


def fit_temperature(
    logits: NDArray[np.floating[Any]],
    targets: NDArray[np.intp],
    *,
    weights: NDArray[np.float64] | None = None,
    unscaled: bool = False,
) -> float:
    """The temperature in [0.05, 20] with the least log-loss.

    Without a single error it would run to the lower end, where every probability is 1; a dataset that small does not prove such
    certainty, so the temperature then stays at 1 or above.

    Args:
        logits: ``(n, k)``.
        targets: ``(n,)`` class indices.
        weights: of the rows ``(n,)``; None is 1 for each.
        unscaled: the logits are scores of arbitrary scale, such as cosines: the range is [0.01, 1000], and instead of the
            bound at 1, one more sample is counted that belongs equally to every class (Laplace's rule of succession).
    """
    from scipy.optimize import minimize_scalar

    share = 1 / (len(targets) + 1) if unscaled else 0.0
    margin = float(np.mean(logits[np.arange(len(targets)), targets] - logits.mean(axis=1)))  # of the true class
    least, most = (0.01, 1000.0) if unscaled else (0.05, 20.0)

    def loss(log_t: float) -> float:
        scaled = 1 / float(np.exp(log_t))
        return log_loss(logits * scaled, targets, weights) + share * margin * scaled

    result = minimize_scalar(loss, bounds=(np.log(least), np.log(most)), method="bounded")
    temperature = float(np.exp(result.x))
    if not unscaled and (logits.argmax(axis=1) == targets).all():
        return max(temperature, 1.0)
    return temperature


def untempered(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Probabilities ``(n, k)`` as they were before their logits were divided by a temperature."""
    with np.errstate(divide="ignore"):
        logits = temperature * np.log(probabilities.astype(np.float64))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
