"""Regression: scores of predicted numbers, and split-conformal prediction intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.tasks import RegressionTask

from .conformal import COVERAGE, bound, effective, spread_notes
from .intervals import resamples_for
from .scores import Values, Weights, require_finite
from .task import FEW, HeadTask, Measured, Outputs, Prediction, bootstrapped, headline_of, proportion
from .units import Units

PARTS = 5  # of predicted values, that have intervals of their own
LEAST = 50  # images in each: then a coverage of 90 % is met to four points


@dataclass(frozen=True)
class Intervals:
    """Split-conformal prediction intervals (Vovk et al. 2005; Lei et al. 2018), as wide as images with like predictions need.

    Numbers often scatter more where they are larger. So images are parted by their predicted value, with equally many in each
    part, and each part has a width of its own (Mondrian conformal: Boström & Johansson 2020). Few images have one part.

    Attributes:
        coverage: share of images whose interval should contain the true number, in each part.
        n: number of images it was calibrated on.
        half_width: of each part, for each target, in its unit; None if there were too few images to promise the coverage.
        edges: the predicted values between the parts, for each target.
        effective: as how many independent images these images of groups count, for the target where these are fewest; None if
            they are independent.
    """

    coverage: float
    n: int
    half_width: list[list[float | None]]
    edges: list[list[float]]
    effective: float | None = None

    @classmethod
    def fit(
        cls,
        values: NDArray[np.floating[Any]],
        residuals: NDArray[np.floating[Any]],
        coverage: float = COVERAGE,
        units: Units | None = None,
    ) -> Self:
        """Calibrate on the predicted numbers ``(n, t)`` of images that the head was not fitted on, and on their errors.

        ``units`` says which of these images belong together; by default none.
        """
        units = units or Units.each(len(values))
        half_width, edges, effects = [], [], []
        for predicted, far in zip(values.T, np.abs(residuals).T.astype(np.float64), strict=True):
            whole, effect = bound(far, coverage, units)
            inner, own = next(_parted(predicted, far, coverage, units), ([], [whole]))
            half_width.append([value if math.isfinite(value) else None for value in own])
            edges.append(inner)
            effects.append(effect)
        return cls(coverage, len(values), half_width, edges, effective(units, max(effects)))

    @classmethod
    def from_json(cls, facts: dict[str, Any] | None) -> Self | None:
        """The inverse of `to_json`; None stays None. Bundles from before have one width for each target."""
        if facts and "edges" not in facts:
            widths = facts["half_width"]
            facts = {**facts, "half_width": [[value] for value in widths], "edges": [[] for _ in widths]}
        return cls(**facts) if facts else None

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        return facts if self.effective is not None else {name: facts[name] for name in facts if name != "effective"}

    @property
    def notes(self) -> list[str]:
        """For which images they do not hold, where that is known."""
        if all(self.edges) or None in (own[0] for own in self.half_width):
            return []
        few = f"calibrated on {self.n} images, prediction intervals are as wide for every number"
        return [f"{few}: they hold for {100 * self.coverage:.0f} % of all images, and for fewer of those that scatter more"]

    def half_widths(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Of the interval of each predicted number ``(n, t)``; NaN where nothing can be promised."""
        columns = zip(self.half_width, self.edges, values.T, strict=True)
        widths = [np.array(own, np.float64)[np.searchsorted(inner, column, side="right")] for own, inner, column in columns]
        return np.stack(widths, axis=1)


def _parted(
    predicted: NDArray[np.floating[Any]], far: NDArray[np.float64], coverage: float, units: Units
) -> Iterator[tuple[list[float], list[float]]]:
    """The edges and the bounds of as many parts as there are enough images for, then of fewer."""
    for parts in range(min(len(far) // LEAST, PARTS), 1, -1):
        inner = np.quantile(predicted, np.arange(1, parts) / parts).tolist()
        part = np.searchsorted(inner, predicted, side="right")
        own = [bound(far[part == p], coverage, units.among(part == p))[0] for p in range(parts)]
        if np.bincount(part, minlength=parts).min() >= LEAST // 2 and np.isfinite(own).all():  # not if many are equal
            yield inner, own


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

    def half_widths(self, outputs: Outputs) -> NDArray[np.float64]:
        """Of the interval of each predicted number ``(n, t)``; NaN where there is none."""
        intervals = Intervals.from_json(self.conformal)
        return intervals.half_widths(outputs) if intervals else np.full(outputs.shape, np.nan)

    def require(self, table: SampleTable, parts: Sequence[tuple[Sequence[Row], str]]) -> None:
        for name, column in zip(table.outputs, table.truth(parts[0][0]).T, strict=True):
            if len(np.unique(column)) < 2:
                message = f"target {name!r} is {column[0]:g} for every training image; there is nothing to learn"
                raise BadDataError(message)

    def score(self, truth: NDArray[Any], outputs: Outputs, split: str, units: Units | None = None) -> Measured:
        measured = measure(np.asarray(truth, np.float64), outputs, self.names, split, self.half_widths(outputs), units)
        fit = Intervals.from_json(self.conformal)
        notes = [*spread_notes("intervals", fit.coverage, fit.n, fit.effective), *fit.notes] if fit else []
        return replace(measured, notes=[*measured.notes, *notes])

    def require_labels(self, labels: Sequence[str], split: str) -> None:
        """Regression has no labels to check."""

    def headline(self, metrics: dict[str, Any]) -> str:
        return headline_of(metrics["scores"]["r2"], "R2" if len(self.names) == 1 else "mean R2")

    def decide(self, outputs: NDArray[np.float32]) -> tuple[None, None]:
        return None, None

    def text(self, prediction: Prediction) -> str:
        assert prediction.probabilities is not None
        parts = []
        for name, value, half in self._with_half_widths(prediction.probabilities):
            parts.append(f"{name} {value:.6g}" + ("" if np.isnan(half) else f" [{value - half:.6g}, {value + half:.6g}]"))
        return ", ".join(parts)

    def columns(self) -> list[str]:
        return [f"{part}_{name}" for name in self.names for part in ("value", "low", "high")]

    def cells(self, outputs: NDArray[np.float32]) -> list[Any]:
        return [cell for value in self._values(outputs).values() for cell in (value["value"], *(value["interval"] or ("", "")))]

    def facts(self, outputs: NDArray[np.float32] | None) -> dict[str, Any]:
        return {"values": {} if outputs is None else self._values(outputs)}

    def _with_half_widths(self, outputs: NDArray[np.float32]) -> Iterator[tuple[str, float, float]]:
        return zip(self.names, outputs.tolist(), self.half_widths(outputs[None])[0].tolist(), strict=True)

    def _values(self, outputs: NDArray[np.float32]) -> dict[str, dict[str, Any]]:
        facts = {}
        for name, value, half in self._with_half_widths(outputs):
            bounds = None if np.isnan(half) else [_short(value - half), _short(value + half)]
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
    half_widths: NDArray[np.float64] | None = None,
    units: Units | None = None,
) -> Measured:
    """Compare predicted numbers ``(n, t)`` with the true ones; see docs/metrics.md.

    Args:
        truth, values: ``(n, t)``.
        names: of the targets.
        split: name of the split, for the report.
        half_widths: of the prediction intervals ``(n, t)``, see `Intervals.half_widths`; NaN or None where there are none.
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
        if half_widths is not None and not np.isnan(half_widths).all():
            known = ~np.isnan(half_widths[:, j])
            half = half_widths[known, j]
            own["coverage"] = proportion(np.abs(values[known, j] - truth[known, j]) <= half, units.among(known))
            own["half_width"] = {"value": float(half.mean()) if known.any() else None, "interval": None, "method": None}
        per_output.append({"name": name, "n": n, "scores": own})
    scores = {"r2": bootstrapped(float(once["r2"][:, 0].mean()), drawn["r2"].mean(axis=0), units)}
    notes = units.notes or ([f"too few to conclude: {n} images"] if n < FEW else [])
    return Measured(RegressionTask.name, split, n, scores, per_output, resamples, notes, groups=units.groups)
