"""Regression: scores of predicted numbers, and split-conformal prediction intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.tasks import RegressionTask

from .conformal import COVERAGE
from .intervals import resamples_for
from .scores import Values, Weights, require_finite
from .task import FEW, HeadTask, Measured, Outputs, Prediction, bootstrapped, headline_of, proportion
from .units import Units


@dataclass(frozen=True)
class Intervals:
    """Split-conformal prediction intervals of constant width (Vovk et al. 2005; Lei et al. 2018).

    Attributes:
        coverage: share of images whose interval should contain the true number.
        n: number of images it was calibrated on.
        half_width: for each target, in its unit; None if there were too few images to guarantee the coverage.
    """

    coverage: float
    n: int
    half_width: list[float | None]

    @classmethod
    def fit(cls, residuals: NDArray[np.floating[Any]], coverage: float = COVERAGE) -> Self:
        """Calibrate on the residuals ``(n, t)`` of images that the head was not fitted on."""
        n = len(residuals)
        place = math.ceil((n + 1) * coverage)  # one more than n for the image to come
        far = np.sort(np.abs(residuals), axis=0)
        return cls(coverage, n, [float(far[place - 1, j]) if place <= n else None for j in range(residuals.shape[1])])

    @classmethod
    def from_json(cls, facts: dict[str, Any] | None) -> Self | None:
        """The inverse of `to_json`; None stays None."""
        return cls(**facts) if facts else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Regression(HeadTask):
    """The task of predicting one number an image, or several."""

    name, singular, plural = RegressionTask.name, "target", "targets"
    output, metric, ranked_by, intervals = "values", "r2", "R2", True

    @property
    def targets(self) -> Sequence[str]:
        return self.names

    def indicators(self, truth: NDArray[Any]) -> NDArray[Any]:
        deviation = truth.std(axis=0)
        return np.asarray((truth - truth.mean(axis=0)) / np.where(deviation > 0, deviation, 1))

    @property
    def half_widths(self) -> list[float | None]:
        """Half-width of each target's interval."""
        intervals = Intervals.from_json(self.conformal)
        return intervals.half_width if intervals else [None] * len(self.names)

    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        for name, column in zip(table.outputs, table.truth(parts[0][0]).T, strict=True):
            if len(np.unique(column)) < 2:
                message = f"target {name!r} is {column[0]:g} for every training image; there is nothing to learn"
                raise BadDataError(message)

    def score(self, truth: NDArray[Any], outputs: Outputs, split: str, units: Units | None = None) -> Measured:
        return measure(np.asarray(truth, np.float64), outputs, self.names, split, self.half_widths, units)

    def require_labels(self, labels: Sequence[str], split: str) -> None:
        """Regression has no labels to check."""

    def headline(self, metrics: dict[str, Any]) -> str:
        return headline_of(metrics["scores"]["r2"], "R2" if len(self.names) == 1 else "mean R2")

    def decide(self, outputs: NDArray[np.float32]) -> tuple[None, None]:
        return None, None

    def text(self, prediction: Prediction) -> str:
        assert prediction.probabilities is not None
        parts = []
        for name, value, half in zip(self.names, prediction.probabilities.tolist(), self.half_widths, strict=True):
            parts.append(f"{name} {value:.6g}" + ("" if half is None else f" [{value - half:.6g}, {value + half:.6g}]"))
        return ", ".join(parts)

    def columns(self) -> list[str]:
        return [f"{part}_{name}" for name in self.names for part in ("value", "low", "high")]

    def cells(self, outputs: NDArray[np.float32]) -> list[Any]:
        return [cell for value in self._values(outputs).values() for cell in (value["value"], *(value["interval"] or ("", "")))]

    def facts(self, outputs: NDArray[np.float32] | None) -> dict[str, Any]:
        return {"values": {} if outputs is None else self._values(outputs)}

    def _values(self, outputs: NDArray[np.float32]) -> dict[str, dict[str, Any]]:
        facts = {}
        for name, value, half in zip(self.names, outputs.tolist(), self.half_widths, strict=True):
            bounds = None if half is None else [_short(value - half), _short(value + half)]
            facts[name] = {"value": _short(value), "interval": bounds}
        return facts

    def spread(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.maximum(np.abs(expected).max(axis=0), np.finfo(np.float32).tiny))


def _short(value: float) -> float:
    """A number rounded to the digits that a float32 has."""
    return float(f"{value:.8g}")


def weighted_scores(truth: NDArray[np.float64], values: Outputs, weights: Weights) -> dict[str, Values]:
    """R2, MAE and RMSE ``(t, b)`` of numbers ``(n, t)`` for each column of weights ``(n, b)``, as scikit-learn's with
    ``sample_weight``; R2 is NaN if all true numbers are the same.
    """
    wide, total = weights.astype(np.float64), weights.sum(axis=0, dtype=np.float64)
    wrong, centred = values - truth, truth - truth.mean(axis=0)
    squared = (wrong**2).T @ wide
    around = (centred**2).T @ wide - (centred.T @ wide) ** 2 / total
    known = around > 1e-12 * np.maximum((centred**2).sum(axis=0)[:, None], np.finfo(np.float64).tiny)
    left = np.divide(squared, around, out=np.full(squared.shape, np.nan), where=known)
    return {"r2": 1 - left, "mae": np.abs(wrong).T @ wide / total, "rmse": np.sqrt(squared / total)}


def measure(
    truth: NDArray[np.float64],
    values: Outputs,
    names: Sequence[str],
    split: str = "",
    half_widths: Sequence[float | None] = (),
    units: Units | None = None,
) -> Measured:
    """Compare predicted numbers ``(n, t)`` with the true ones; see docs/metrics.md.

    Args:
        truth, values: ``(n, t)``.
        names: of the targets.
        split: name of the split, for the report.
        half_widths: of the prediction intervals, see `Intervals`.
        units: which images belong together; by default none.

    Raises:
        BadDataError: there are no images, or an output is not finite.
    """
    n, t = truth.shape
    if not n:
        message = "no images to evaluate on"
        raise BadDataError(message)
    require_finite(values)
    resamples, units = resamples_for(n, t), units or Units.each(n)
    once = weighted_scores(truth, values, np.ones((n, 1), np.float32))
    blocks = [weighted_scores(truth, values, weights) for weights in units.resampled(np.zeros(n, np.intp), resamples)]
    drawn = {name: np.concatenate([block[name] for block in blocks], axis=1) for name in once}
    per_output = []
    for j, name in enumerate(names):
        own = {score: bootstrapped(float(estimates[j, 0]), drawn[score][j], units) for score, estimates in once.items()}
        half = half_widths[j] if half_widths else None
        if half is not None:
            own["coverage"] = proportion(np.abs(values[:, j] - truth[:, j]) <= half, units)
            own["half_width"] = {"value": half, "interval": None, "method": None}
        per_output.append({"name": name, "n": n, "scores": own})
    scores = {"r2": bootstrapped(float(once["r2"][:, 0].mean()), drawn["r2"].mean(axis=0), units)}
    notes = units.notes or ([f"too few to conclude: {n} images"] if n < FEW else [])
    return Measured(RegressionTask.name, split, n, scores, per_output, resamples, notes, groups=units.groups)
