"""Transferability scores, which estimate without training a head how well features suit a task: LogME and the H-score.

Both need one decomposition of the features. Everything is float64 from there, and any rank is allowed: n < d, constant or
repeated columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.task import HeadTask
from classifiers.heads.solvers.threads import threads_for
from store.errors import BadDataError
from store.progress.stages import staged

Float64 = NDArray[np.float64]

STARTS = 32  # values of t between the smallest and the largest eigenvalue; the iteration starts at the best one
STEPS = 1000  # of the fixed-point iteration, at most; usually tens are enough
SETTLED = 1e-9  # relative change of t that ends it
FARTHEST = 1e12  # t from the largest and the least eigenvalue: beyond, the evidence has reached its limit
NOISE = 1e-8  # of a target's mean square; otherwise features that determine the labels would have infinite evidence


@dataclass(frozen=True)
class _Spectrum:
    """Features F (n, d) in their principal axes, with targets (n, k).

    Attributes:
        n, d: rows and columns of F.
        values: squared singular values of F that are not zero ``(r,)``.
        squares: squared coordinates of each target along the left singular vectors ``(r, k)``.
        outside: squared length of the part of each target outside the span of F ``(k,)``; not below `NOISE` of the whole.
    """

    n: int
    d: int
    values: Float64
    squares: Float64
    outside: Float64


def _decompose(F: Float64, targets: Float64) -> _Spectrum:
    """Decompose features by the eigenvectors of F^T F or of F F^T, whichever is smaller."""
    n, d = F.shape
    tall = n >= d
    values, vectors = np.linalg.eigh(F.T @ F if tall else F @ F.T)
    kept = values > max(n, d) * np.finfo(np.float64).eps * values[-1]  # none for no features, or constant ones
    values, vectors = values[kept], vectors[:, kept]
    along = (vectors.T @ (F.T @ targets)) / np.sqrt(values)[:, None] if tall else vectors.T @ targets
    whole = (targets**2).sum(axis=0)
    return _Spectrum(n, d, values, along**2, np.maximum(whole - (along**2).sum(axis=0), NOISE * whole))


def log_maximum_evidence(X: NDArray[np.floating[Any]], targets: NDArray[Any]) -> float:
    """LogME: the largest log evidence of a Bayesian linear model, per row, mean over the targets.

    You et al. 2021, "LogME: Practical assessment of pre-trained models for transfer learning": a target is y = F w + noise,
    with w ~ N(0, 1/alpha) and noise ~ N(0, 1/beta). Alpha and beta are found by the fixed-point iteration over t = alpha / beta
    of the journal version (You et al. 2022, "Ranking and tuning pre-trained models"). It starts at the best of `STARTS`
    instead of at 1, so that the scale of the features does not matter and the largest of several maxima is found. (The
    maximum without any noise, which repeated rows would have, is excluded.)

    Args:
        X: features ``(n, d)``, as they are: neither centred nor scaled.
        targets: ``(n, k)``, one for each class (1 if the row is of it, else 0) or label, or numbers.

    Raises:
        BadDataError: every target is the same for all rows.
    """
    varying = np.asarray(targets, np.float64)
    varying = varying[:, (varying != varying[:1]).any(axis=0)]
    if not varying.shape[1]:
        message = "all images have the same label or number, so features cannot be scored"
        raise BadDataError(message)
    with threads_for(X.size):
        return float(_evidence(_decompose(np.asarray(X, np.float64), varying)).mean() / len(X))


def _evidence(spectrum: _Spectrum) -> Float64:
    """The largest log evidence of each target ``(k,)``."""
    n, values, squares = spectrum.n, spectrum.values[:, None], spectrum.squares
    if not len(values):
        return _evidence_at(spectrum, np.ones(squares.shape[1]))
    starts = np.geomspace(values.min(), values.max(), STARTS)
    best = np.argmax([_evidence_at(spectrum, np.full(squares.shape[1], start)) for start in starts], axis=0)
    t, least, most = starts[best], values.min() / FARTHEST, values.max() * FARTHEST
    for _ in range(STEPS):
        share = values / (values + t)  # share of each axis that the data determine, not the prior
        decided = share.sum(axis=0)
        length = (share**2 * squares / values).sum(axis=0)  # of the mean of w, squared
        missed = ((1 - share) ** 2 * squares).sum(axis=0) + spectrum.outside
        free = n - len(values) + (t / (values + t)).sum(axis=0)  # n - decided, without the difference
        with np.errstate(over="ignore"):  # a target unrelated to the features goes to the largest t
            reached = decided * missed / np.maximum(length * free, np.finfo(np.float64).tiny)
        before, t = t, np.clip(reached, least, most)
        if np.abs(t / before - 1).max() < SETTLED:
            break
    return _evidence_at(spectrum, t)


def _evidence_at(spectrum: _Spectrum, t: Float64) -> Float64:
    """The log evidence of each target ``(k,)`` at its t ``(k,)``, with the best beta for it.

    At t, y ~ N(0, M / beta) with M = 1 + F F^T / t; the best beta is n / q, with q = y^T M^-1 y.
    """
    n, values = spectrum.n, spectrum.values[:, None]
    q = (spectrum.squares * (t / (values + t))).sum(axis=0) + spectrum.outside
    return np.asarray(0.5 * (n * (np.log(n / q) - 1 - math.log(2 * math.pi)) - np.log1p(values / t).sum(axis=0)))


def h_scores(X: NDArray[np.floating[Any]], labels: NDArray[Any]) -> tuple[float, float]:
    """The H-score: how far apart the class means are, in units of the features' covariance; 0 to one less than the classes.

    Args:
        X: features ``(n, d)``.
        labels: ``(n,)``.

    Returns:
        tr(S^-1 B), where S is the covariance and B that of the class means (Bao et al. 2019, "An information-theoretic approach
        to transferability in task transfer learning"), with a pseudo-inverse: it is at its maximum for any n < d independent
        rows, and uninformative there. And (1 - a) tr(S_a^-1 B), where S_a is S shrunk by a towards its mean variance as Ledoit
        and Wolf 2004 do (Ibrahim et al. 2021, "Newer is not always better").
    """
    _, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    wide = np.array(X, np.float64)
    with threads_for(wide.size):
        wide -= wide.mean(axis=0)
        wide[:, (X[:1] == X).all(axis=0)] = 0  # the mean of equal numbers is not always that number
        spectrum = _decompose(wide, (members[:, None] == np.arange(len(counts))).astype(np.float64))
        keep = 1 - _shrinkage(spectrum, (wide**2).sum(axis=1))
    between = (spectrum.squares / counts).sum(axis=1)  # along each axis
    spread = spectrum.values.sum() / spectrum.d
    shrunk = keep * spectrum.values / (keep * spectrum.values + (1 - keep) * spread)
    return float(between.sum()), float(between @ shrunk)


def _shrinkage(spectrum: _Spectrum, lengths: Float64) -> float:
    """The shrinkage of Ledoit and Wolf, from the eigenvalues of n S and the squared lengths ``(n,)`` of the centred rows."""
    n, values = spectrum.n, spectrum.values
    apart = (values**2).sum() - values.sum() ** 2 / spectrum.d  # n^2 times the squared distance of S from its mean variance
    noise = (lengths**2).sum() - (values**2).sum() / n  # n^2 times the squared error of S
    return float(np.clip(noise / apart, 0, 1)) if apart > 0 else 0.0


@staged("measuring how good the features are")
def transferability(X: NDArray[np.floating[Any]], truth: NDArray[Any], task: HeadTask) -> dict[str, float | None]:
    """All scores of features by name, larger is better; the H-scores are None unless each row has one label.

    Args:
        X: features ``(n, d)``.
        truth: `SampleTable.truth` of the rows; numbers are standardised to mean 0 and variance 1.
        task: the task they are for.
    """
    plain, shrunk = h_scores(X, truth) if task.exclusive else (None, None)
    return {"logme": log_maximum_evidence(X, task.indicators(truth)), "h_score": plain, "h_score_shrunk": shrunk}
