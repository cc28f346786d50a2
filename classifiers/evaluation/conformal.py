"""Split-conformal prediction sets, and abstention where a set is not exactly one label."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .units import Units

COVERAGE = 0.9
KINDS = ("marginal", "per_class")


@dataclass(frozen=True)
class Conformal:
    """The probability thresholds of prediction sets (Sadinle, Lei & Wasserman 2019; "LAC").

    Attributes:
        coverage: share of images whose set should contain the true label.
        n: number of images it was calibrated on.
        marginal: the threshold for ``coverage`` over all images.
        per_class: the threshold of each class, for ``coverage`` within each class; 0, so always in the set, if a class had too
            few images to guarantee the coverage (at 90 %: fewer than nine).
    """

    coverage: float
    n: int
    marginal: float
    per_class: list[float]

    @classmethod
    def fit(cls, probabilities: NDArray[np.floating[Any]], targets: NDArray[np.intp], coverage: float = COVERAGE) -> Self:
        """Calibrate on probabilities ``(n, k)`` of images that the head was not fitted on, and their class indices ``(n,)``."""
        own = probabilities[np.arange(len(targets)), targets].astype(np.float64)
        per_class = [_least(own[targets == k], coverage) for k in range(probabilities.shape[1])]
        return cls(coverage, len(targets), _least(own, coverage), per_class)

    @classmethod
    def from_json(cls, facts: dict[str, Any] | None) -> Self | None:
        """The inverse of `to_json`; None stays None."""
        return cls(**facts) if facts else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sets(self, probabilities: NDArray[np.floating[Any]], kind: str = "marginal") -> NDArray[np.bool_]:
        """Which labels ``(n, k)`` are in the set of each image; it may be empty."""
        return np.asarray(probabilities >= np.array(getattr(self, kind)))

    def measured(self, probabilities: NDArray[np.floating[Any]], truth: NDArray[np.intp], units: Units) -> dict[str, Any]:
        """Coverage and size of the sets on other images, and which of these belong together, as JSON.

        Returns:
            ``target``, ``calibrated_on``; for each kind (``marginal``, ``per_class``): ``coverage`` with ``coverage_interval``,
            ``mean_size``, ``decided`` (images whose set is one label; it abstains on the others), ``decided_right`` of these,
            and ``coverage_by_class`` (None for a class without images here).
        """
        facts: dict[str, Any] = {"target": self.coverage, "calibrated_on": self.n}
        rows = np.arange(len(truth))
        for kind in KINDS:
            sets = self.sets(probabilities, kind)
            covered, one = sets[rows, truth], sets.sum(axis=1) == 1
            facts[kind] = {
                "coverage": float(covered.mean()),
                "coverage_interval": units.proportion(covered),
                "mean_size": float(sets.sum(axis=1).mean()),
                "decided": int(one.sum()),
                "decided_right": int((covered & one).sum()),
                "coverage_by_class": [
                    float(covered[truth == k].mean()) if (truth == k).any() else None for k in range(sets.shape[1])
                ],
            }
        return facts


def _least(own: NDArray[np.float64], coverage: float) -> float:
    """The threshold that a share ``coverage`` of the true labels reaches, corrected for finite n."""
    beaten = len(own) - math.ceil((len(own) + 1) * coverage)
    return float(np.sort(own)[beaten]) if beaten >= 0 else 0.0
