"""Split-conformal prediction sets, and abstention where a set is not exactly one label.

The bound is the quantile of the scores of calibration images with one more to come (Vovk et al. 2005). Images of one group are
alike, so the one to come counts as many as count as one there: the design effect of being inside the bound (Kish 1965, see
`units`). Where images are independent that is one. Exact for groups are only bounds that count whole groups (Lee, Barber &
Willett 2023, "Distribution-free inference with hierarchical data"), which hold 97 to 99 % with 10 groups.
"""

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
        effective: as how many independent images these images of groups count; None if they are independent.
    """

    coverage: float
    n: int
    marginal: float
    per_class: list[float]
    effective: float | None = None

    @classmethod
    def fit(
        cls,
        probabilities: NDArray[np.floating[Any]],
        targets: NDArray[np.intp],
        coverage: float = COVERAGE,
        units: Units | None = None,
    ) -> Self:
        """Calibrate on images that the head was not fitted on.

        Args:
            probabilities: ``(n, k)``.
            targets: class indices ``(n,)``.
            coverage: as in `Conformal`.
            units: which images belong together; by default none.
        """
        n, units = len(targets), units or Units.each(len(targets))
        far = -probabilities[np.arange(n), targets].astype(np.float64)
        per_class = [bound(far[targets == k], coverage, units.among(targets == k))[0] for k in range(probabilities.shape[1])]
        marginal, effect = bound(far, coverage, units)
        least, *each = (max(-value, 0.0) for value in (marginal, *per_class))
        return cls(coverage, n, least, each, effective(units, effect))

    @classmethod
    def from_json(cls, facts: dict[str, Any] | None) -> Self | None:
        """The inverse of `to_json`; None stays None."""
        return cls(**facts) if facts else None

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        return facts if self.effective is not None else {name: facts[name] for name in facts if name != "effective"}

    def sets(self, probabilities: NDArray[np.floating[Any]], kind: str = "marginal") -> NDArray[np.bool_]:
        """Which labels ``(n, k)`` are in the set of each image; it may be empty."""
        return np.asarray(probabilities >= np.array(getattr(self, kind)))

    def measured(self, probabilities: NDArray[np.floating[Any]], truth: NDArray[np.intp], units: Units) -> dict[str, Any]:
        """Coverage and size of the sets on other images, and which of these belong together, as JSON.

        Returns:
            ``target``, ``calibrated_on``; ``spread`` if these are of groups, see `spread`; for each kind (``marginal``,
            ``per_class``): ``coverage`` with ``coverage_interval``, ``mean_size``, ``decided`` (images whose set is one label;
            it abstains on the others), ``decided_right`` of these, and ``coverage_by_class`` (None for a class without images
            here).
        """
        facts: dict[str, Any] = {"target": self.coverage, "calibrated_on": self.n}
        if self.effective is not None:
            facts["spread"] = spread(self.coverage, self.effective)
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


def bound(scores: NDArray[np.float64], coverage: float, units: Units) -> tuple[float, float]:
    """The bound that the score of one more image stays within with some probability, and how many of these count as one.

    Args:
        scores: ``(n,)``, of images that the head was not fitted on; larger is worse.
        coverage: that probability.
        units: which of these images belong together.

    Returns:
        The bound, infinite if there are too few images to promise the coverage; and the design effect.

    >>> import numpy as np
    >>> from classifiers.evaluation.conformal import bound
    >>> from classifiers.evaluation.units import Units
    >>> bound(np.arange(1.0, 20), 0.9, Units.each(19))
    (18.0, 1.0)
    """
    n = len(scores)
    if not n:
        return math.inf, 1.0
    ordered = np.sort(scores)
    effect, _ = units.design(scores <= ordered[math.ceil(n * coverage) - 1])
    place = math.ceil((n + effect) * coverage)
    return (float(ordered[place - 1]) if place <= n else math.inf), effect


def effective(units: Units, effect: float) -> float | None:
    """As how many independent images these count, with a design effect; None if they are independent.

    Too few groups do not show the effect, and then count as one image each.
    """
    if units.single:
        return None
    n = len(units.of) / effect
    return min(n, float(units.count)) if units.few else n


def spread_notes(what: str, coverage: float, n: int, effective: float | None) -> list[str]:
    """What is to be said of sets or intervals that were calibrated on images of groups, which count as fewer."""
    if effective is None:
        return []
    covers = f"{100 * coverage:.0f} ± {100 * spread(coverage, effective):.0f} % (one standard error)"
    calibrated = f"the prediction {what} were calibrated on {n} images of groups, which count as {effective:.0f} images"
    return [f"{calibrated}: they hold for {covers} of images of other groups"]


def spread(coverage: float, n: float) -> float:
    """How far the coverage that a calibration on ``n`` images gives is from what was asked for: one standard error."""
    return math.sqrt(coverage * (1 - coverage) / n)
