"""The unit of independence: the group of an image where one is known, and else the image.

Twenty photos of one patient are not twenty patients: they are right and wrong together, and an interval that counts each of
them is too narrow. So a proportion has the Wilson interval of its number of images over the design effect (Kish 1965: the
variance between units over that of independent images), with a quantile of t for as many units as carry it (Korn & Graubard
1998). Everything else is resampled by units, and reaches as much further as few units hide (Cameron, Gelbach & Miller 2008).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .intervals import Z95, Interval, bootstrap_interval, modified_wilson, resampled

FEWEST = 10  # with fewer groups an interval cannot be trusted, and nothing is concluded
MANY = 30  # with fewer groups resampling shows too little of some scores, as benchmarks/coverage.py measures


@dataclass(frozen=True, eq=False)
class Units:
    """Which images belong together.

    Attributes:
        of: number of the unit of each image ``(n,)``, from 0 without gaps.

    >>> from classifiers.evaluation.units import Units
    >>> Units.of_groups([b"ann", b"ann", b"bob"]).phrase
    '3 images of 2 groups'
    >>> Units.each(3).phrase
    '3 images'
    """

    of: NDArray[np.intp]

    @classmethod
    def each(cls, n: int) -> Self:
        """``n`` images that are independent of each other."""
        return cls(np.arange(n))

    @classmethod
    def of_groups(cls, groups: Sequence[bytes]) -> Self:
        """Images with these groups; one that is in none has a name that nobody else has (`store.splits.groups_of`)."""
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}  # whatever their names are
        return cls(np.array([numbers[group] for group in groups], np.intp))

    @cached_property
    def sizes(self) -> NDArray[np.intp]:
        """Images of each unit."""
        return np.bincount(self.of)

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def single(self) -> bool:
        """Whether each image is a unit of its own."""
        return self.count == len(self.of)

    @property
    def groups(self) -> int | None:
        """How many groups there are; None if each image is a unit of its own."""
        return None if self.single else self.count

    @property
    def few(self) -> bool:
        """Whether there are too few groups to conclude anything."""
        return not self.single and self.count < FEWEST

    @property
    def scarce(self) -> bool:
        """Whether something can be concluded, and there are too few groups for all intervals to hold as often as they say."""
        return not self.single and FEWEST <= self.count < MANY

    @property
    def phrase(self) -> str:
        """How many images and groups there are, in words."""
        return images_in_words(len(self.of), self.groups)

    @property
    def notes(self) -> list[str]:
        """What is to be said of every score on these images."""
        if not self.few:
            return []
        because = f"images of one group are right and wrong together, and no interval holds with fewer than {FEWEST} groups"
        return [f"nothing can be told from {self.phrase}: {because}"]

    @property
    def compared_notes(self) -> list[str]:
        """What is to be said of differences of scores on these images."""
        return [f"with {self.count} groups, intervals of differences hold in 94 to 98 % of cases"] if self.scarce else []

    def among(self, chosen: NDArray[np.bool_]) -> Units:
        """The units of some of the images."""
        return Units(np.unique(self.of[chosen], return_inverse=True)[1])

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum of the values ``(n,)`` of the images of each unit."""
        return np.bincount(self.of, values, minlength=self.count).astype(np.float64)

    def design(self, values: NDArray[Any]) -> tuple[float, float]:
        """How many images count as one where these values ``(n,)`` are averaged, and the quantile in place of 1.96.

        Values that are all the same show no variance between units: then a unit counts as one image.
        """
        if self.single:
            return 1.0, Z95
        from scipy.stats import t

        n, most = len(self.of), float((self.sizes**2).sum() / len(self.of))
        if self.count == 1:
            return most, math.inf
        centred = values - values.mean()
        alone, together = float(centred @ centred), float((self.sums(centred) ** 2).sum()) * self.count / (self.count - 1)
        if alone <= 1e-12 * n:
            return most, float(t.ppf(0.975, self.count - 1))
        effect = min(max(together / alone, 1.0), most)
        different, times = np.unique(values, return_counts=True)
        usual = values == different[times.argmax()]
        carrying = min(np.count_nonzero(self.sums(usual)), np.count_nonzero(self.sums(~usual)))
        return effect, Z95 if effect == 1 else float(t.ppf(0.975, min(self.count - 1, 2 * carrying)))

    def proportion(self, hits: NDArray[Any]) -> Interval:
        """The 95 % interval of the share of images that are hits ``(n,)``.

        A hit is a fraction if it is a mean of several. It then varies less than one that is 0 or 1, and counts for more.
        """
        effect, z = self.design(hits.astype(np.float64))
        if not math.isfinite(z):
            return 0.0, 1.0
        if hits.dtype != np.bool_ and hits.var() > 0:
            effect *= float(hits.var() / (hits.mean() * (1 - hits.mean())))
        n = len(hits) / effect
        return modified_wilson(min(float(hits.sum()) / effect, n), n, z)

    @property
    def reach(self) -> float:
        """The quantile in place of 1.96 for what is resampled by units.

        Resamples of G units have (G - 1) / G of the variance, which is estimated from G. Percentiles are skewed besides: t has
        half of the usual degrees of freedom, with which intervals of 10 units hold in benchmarks/coverage.py.
        """
        if self.single:
            return Z95
        from scipy.stats import t

        most = self.count - 1
        return float(t.ppf(0.975, most / 2)) * math.sqrt(self.count / most) if most else math.inf

    def resampled(self, strata: NDArray[np.intp], count: int, seed: int = 0) -> Iterator[NDArray[np.float32]]:
        """`intervals.resampled` by units: an image is drawn as often as its unit.

        A unit counts for the stratum that most of its images have.
        """
        if self.single:
            yield from resampled(strata, count, seed)
            return
        k = int(strata.max()) + 1
        pairs, votes = np.unique(self.of * k + strata, return_counts=True)
        pairs = pairs[np.lexsort((-votes, pairs // k))]
        own = pairs[np.unique(pairs // k, return_index=True)[1]] % k
        for weights in resampled(own, count, seed):
            yield weights[self.of]

    def bootstrap(self, estimate: float, values: NDArray[np.float64]) -> Interval | None:
        """`intervals.bootstrap_interval` of values on `resampled`; None too if there is one unit."""
        return bootstrap_interval(estimate, values, self.reach) if self.count > 1 or self.single else None


def images_in_words(n: int, groups: int | None) -> str:
    """A number of images, and of the groups that they are of; None if they are independent."""
    images = f"{n} image{'s' * (n != 1)}"
    return images if groups is None else f"{images} of {groups} group{'s' * (groups != 1)}"
