"""A search of a cache, before training, for images on both sides of the split and images with two labels."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from classifiers.heads.solvers.cosines import nearest, unit_rows
from store.cache import Subset
from store.errors import BadDataError, display
from store.format.samples import Row, SampleTable

log = logging.getLogger("penult.classifiers")

NEIGHBOURS = 10
NEAR = 0.65  # unrelated photos with MobileNetV2: 0.73 and above; docs/leaks.md has the table
MOST_PRODUCTS = 4e12  # multiplications, about a minute on two cores; beyond, only exact copies are searched
SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """A held-out image that looks like a fitted one.

    Attributes:
        path: the held-out image, for people.
        fitted: the image it was taken from.
        ratio: distance to it over the distance to the tenth nearest; small is suspicious, 0 is the same features.
    """

    path: str
    fitted: str
    ratio: float


@dataclass(frozen=True)
class LeakReport:
    """Leaks and contradictions among the samples.

    Attributes:
        copies: held-out (and validation) images whose exact bytes are among the fitted ones; they are left out.
        near: held-out images that look like fitted ones: recompressed, resized, cropped or mirrored, or taken in a burst.
        conflicts: images whose bytes have more than one label.
        divided: groups that have fitted and held-out images, by a split of the user's own.
        searched: False if there were too many images to search for near copies.
    """

    copies: list[str] = field(default_factory=list)
    near: list[Leak] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    searched: bool = True
    divided: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.copies or self.near or self.conflicts or self.divided)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """The findings in words, one sentence each."""
        sentences = []
        if self.copies:
            what = "held-out image(s) are exact copies of fitted ones and are left out"
            sentences.append(f"{len(self.copies)} {what}: {_few(self.copies)}")
        if self.near:
            pairs = [f"{leak.path} ~ {leak.fitted}" for leak in self.near]
            sentences.append(f"{len(self.near)} held-out image(s) look like copies of fitted ones: {_few(pairs)}")
        if self.conflicts:
            same = [" = ".join(paths) for paths in self.conflicts]
            sentences.append(f"{len(same)} image(s) have more than one label: {_few(same)}")
        if self.divided:
            what = "group(s) have fitted and held-out images, so that the scores are too good"
            sentences.append(f"{len(self.divided)} {what}: {_few(self.divided)}")
        if not self.searched:
            sentences.append("too many images to look for near copies between fitted and held-out ones")
        return sentences


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def conflicting_labels(table: SampleTable) -> list[list[str]]:
    """Paths of each content that has more than one label, or set of labels, or other targets."""
    by_content: dict[bytes, list[Row]] = defaultdict(list)
    for row in table.rows:
        if row.ok:
            by_content[row.sha256].append(row)

    def labellings(rows: Sequence[Row]) -> set[Any]:
        return {(frozenset(table.task.labels_of(row)), row.targets) for row in rows}

    return [[row.name for row in same] for same in by_content.values() if len(labellings(same)) > 1]


def near_copies(fitted: Subset, held_out: Subset) -> tuple[list[Leak], bool]:
    """Held-out images whose nearest fitted image is far nearer than all others.

    The ratio test of Lowe 2004 ("Distinctive Image Features from Scale-Invariant Keypoints", section 7.1), on unit-length
    features, against the tenth neighbour, so that a burst of copies does not hide itself. It needs no threshold of its own
    for each backbone, as a bound on the cosine would: untrained and ReLU features have cosines near 1 for any pair.

    Returns:
        The leaks, the most suspicious first, and whether they were searched at all (`MOST_PRODUCTS`, and features in memory).
    """
    n, m = len(fitted), len(held_out)
    if n < 3 or m == 0:
        return [], True
    if not isinstance(fitted.X, np.ndarray) or not isinstance(held_out.X, np.ndarray):
        return [], False
    if float(n) * m * fitted.X.shape[1] > MOST_PRODUCTS:
        return [], False
    cosines, which = nearest(held_out.X, unit_rows(fitted.X), min(NEIGHBOURS, n))
    least, far = (np.sqrt(np.maximum(2 - 2 * cosines[:, place], 0)) for place in (0, -1))
    ratio = np.divide(least, far, out=np.ones_like(least), where=far > 0)
    leaks = [
        Leak(display(held_out.paths[i]), display(fitted.paths[which[i, 0]]), round(float(ratio[i]), 3))
        for i in np.flatnonzero(ratio < NEAR).tolist()
    ]
    return sorted(leaks, key=lambda leak: leak.ratio), True


def guard(report: LeakReport, mode: str) -> None:
    """Warn about leaks, or refuse to go on.

    Args:
        report: the leaks.
        mode: ``warn``, ``refuse`` or ``allow`` (silence).

    Raises:
        BadDataError: mode is ``refuse`` and the report is not empty.
    """
    if mode == "refuse" and report:
        message = "; ".join(report.sentences()) + " (--leaks refuse)"
        raise BadDataError(message)
    if mode != "allow":
        for sentence in report.sentences():
            log.warning("%s", sentence)
