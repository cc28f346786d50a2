"""A search of a cache, before training, for images on both sides of the split, images with two labels, and repeated scenes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from classifiers.near_copies import NearCopies, most_images, near_copies
from extractor.data.samples import in_words
from store.cache import FeatureCache
from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.splits import divided_groups, groups_of, merge_groups

from .roles import FOLDS, Roles

log = logging.getLogger("penult.classifiers")

SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """A held-out image that looks like a fitted one.

    Attributes:
        path: the held-out image, for people.
        fitted: the image it was taken from, or one of the same burst.
        ratio: distance to it as a share of the distance to what is not of their unit (`NearCopies`); 0 is the same features.
    """

    path: str
    fitted: str
    ratio: float


@dataclass(frozen=True)
class Repeats:
    """Images that look like near copies of others on their side of the split.

    Attributes:
        images: how many there are.
        groups: how many groups they are.
        grouped: whether each of these groups counts as one, or every image of it.
        examples: the first images of some groups.
    """

    images: int
    groups: int
    grouped: bool
    examples: list[list[str]]

    @property
    def sentence(self) -> str:
        same = ", ".join(" ~ ".join(names) for names in self.examples)
        counted = f"{self.groups} group{'s' * (self.groups != 1)}"
        what = f"{self.images} images look like near copies of others (versions of one image, or a burst): {counted}"
        then = "each counts as one" if self.grouped else "every image counts (--near-copies ignore)"
        return f"{what}, such as {same}; {then}"


@dataclass(frozen=True)
class LeakReport:
    """Leaks and contradictions among the samples.

    Attributes:
        copies: held-out (and validation) images whose exact bytes are among the fitted ones; they are left out.
        near: held-out images that look like fitted ones: recompressed, resized, cropped or mirrored, or taken in a burst.
        conflicts: images whose bytes have more than one label.
        searched: whether all images were searched for near copies.
        divided: groups that have fitted and held-out images, by a split of the user's own.
        images: with different bytes.
        images_searched: how many of these were searched for near copies.
        repeats: near copies on one side of the split, which are no leak; None if there are none.
        moved: validation images that are fitted only, because images of their unit are, or of the unit of most others.
        joined: how many groups the data has and how many are left, if near copies join some of them.
    """

    copies: list[str] = field(default_factory=list)
    near: list[Leak] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    searched: bool = True
    divided: list[str] = field(default_factory=list)
    images: int = 0
    images_searched: int = 0
    repeats: Repeats | None = None
    moved: list[str] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.copies or self.near or self.conflicts or self.divided)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """The findings in words, one sentence each."""
        sentences = []
        if self.copies:
            what = "held-out image(s) are exact copies of fitted ones and are left out"
            sentences.append(f"{len(self.copies)} {what}: {in_words(self.copies)}")
        if self.near:
            pairs = [f"{leak.path} ~ {leak.fitted}" for leak in self.near]
            sentences.append(f"{len(self.near)} held-out image(s) look like copies of fitted ones: {in_words(pairs)}")
        if self.conflicts:
            same = [" = ".join(paths) for paths in self.conflicts]
            sentences.append(f"{len(same)} image(s) have more than one label: {in_words(same)}")
        if self.divided:
            what = "group(s) have fitted and held-out images, so that the scores are too good"
            sentences.append(f"{len(self.divided)} {what}: {in_words(self.divided)}")
        return sentences

    def remarks(self) -> list[str]:
        """What else is to be said: no leak, and nothing to refuse."""
        remarks = [self.repeats.sentence] if self.repeats else []
        if self.joined:
            what = "near copies join groups that the data has: {} are {} now. If that is wrong, --near-copies ignore"
            remarks.append(what.format(*self.joined))
        if self.moved:
            what = "validation image(s) are fitted and choose no setting: they, or most of the others, are of a fitted group"
            remarks.append(f"{len(self.moved)} {what}: {in_words(self.moved)}")
        if not self.searched:
            some = (
                f"near copies were looked for among {self.images_searched} of {self.images} images, because all take too long"
            )
            none = "near copies were not looked for: the features do not fit in memory"
            remarks.append(some if self.images_searched else none)
        return remarks


def conflicting_labels(table: SampleTable) -> list[list[str]]:
    """Paths of each content that has more than one label, or set of labels, or other targets."""
    by_content: dict[bytes, list[Row]] = defaultdict(list)
    for row in table.rows:
        if row.ok:
            by_content[row.sha256].append(row)

    def labellings(rows: Sequence[Row]) -> set[Any]:
        return {(frozenset(table.task.labels_of(row)), row.targets) for row in rows}

    return [[row.name for row in same] for same in by_content.values() if len(labellings(same)) > 1]


def look(cache: FeatureCache, roles: Roles, *, group: bool = True, in_memory: bool = True) -> tuple[Roles, LeakReport]:
    """Look for leaks and repeated scenes, before anything is fitted.

    Args:
        cache: the features of these images.
        roles: what each image is for.
        group: whether near copies are a unit: they get a group in common, joined with their groups and exact copies.
        in_memory: whether all features fit in memory; near copies are searched only then.

    Returns:
        The same roles, with these groups; validation images whose group is fitted too are fitted only, since a setting that is
        chosen on them is chosen on images that the head knows. And what there is to say.
    """
    parts = {"fitted": [*roles.fit, *roles.choose], "held out": roles.report}
    contents = {row.sha256: row for rows in parts.values() for row in rows}
    count = most_images(len(contents), cache.dim) if in_memory else 0
    searched = [contents[digest] for digest in sorted(contents)[:count]]
    labels = [str(row.label) for row in searched] if cache.samples.task.stratifies else None
    copies = near_copies(cache.features([row.sha256 for row in searched]), labels) if searched else None
    near, repeats, units = _described(copies, searched, {row.sha256 for row in roles.report}, group=group)
    divided = list(divided_groups((row.group, part) for part, rows in parts.items() for row in rows))
    joined: list[int] = []
    if group and units:
        before, roles = roles, _grouped(roles, units)
        joined = _joined(before, roles)
    roles, moved = _whole(roles)
    if repeats:
        roles = replace(roles, facts={**roles.facts, "near_copies": asdict(repeats)})
    report = LeakReport(
        copies=[row.name for row in roles.copies],
        near=near,
        conflicts=conflicting_labels(cache.samples),
        searched=count == len(contents),
        divided=divided,
        images=len(contents),
        images_searched=count,
        repeats=repeats,
        moved=moved,
        joined=joined,
    )
    return roles, report


def _described(
    copies: NearCopies | None, rows: Sequence[Row], held_out: set[bytes], *, group: bool
) -> tuple[list[Leak], Repeats | None, dict[bytes, bytes]]:
    """Leaks, repeats, and of each image that has near copies the name of its unit."""
    if copies is None:
        return [], None, {}
    members: dict[int, list[int]] = defaultdict(list)
    for i in np.flatnonzero(copies.sizes > 1).tolist():
        members[int(copies.units[i])].append(i)
    near: list[Leak] = []
    repeated: list[list[str]] = []
    units: dict[bytes, bytes] = {}
    for unit in members.values():
        units |= {rows[i].sha256: rows[unit[0]].sha256 for i in unit}
        out = [i for i in unit if rows[i].sha256 in held_out]
        fitted = [i for i in unit if rows[i].sha256 not in held_out]
        for i in out if fitted else []:
            best, ratio = copies.nearest(i, np.array(fitted))
            near.append(Leak(rows[i].name, rows[best].name, round(ratio, 3)))
        repeated += [sorted(rows[i].name for i in side) for side in (out, fitted) if len(side) > 1]
    repeats = None
    if repeated:
        examples = [names[:SHOWN] for names in sorted(repeated)[:SHOWN]]
        repeats = Repeats(sum(map(len, repeated)), len(repeated), group, examples)
    return sorted(near, key=lambda leak: (leak.ratio, leak.path)), repeats, units


def grouped(rows: Sequence[Row], units: Mapping[bytes, bytes]) -> list[Row]:
    """The rows, with one group for each unit of contents, joined with the groups that they have."""
    names = groups_of(rows)
    joined = merge_groups(names, [units.get(row.sha256, row.sha256) for row in rows])
    return [row if name == new else replace(row, group=new) for row, name, new in zip(rows, names, joined, strict=True)]


def _grouped(roles: Roles, units: Mapping[bytes, bytes]) -> Roles:
    rows = grouped([*roles.fit, *roles.choose, *roles.report], units)
    a, b = len(roles.fit), len(roles.fit) + len(roles.choose)
    return replace(roles, fit=rows[:a], choose=rows[a:b], report=rows[b:])


def _joined(before: Roles, after: Roles) -> list[int]:
    """How many groups the data has, and how many are left of them, if near copies join some."""
    rows = [*before.fit, *before.choose, *before.report]
    names = zip(rows, groups_of(rows), groups_of([*after.fit, *after.choose, *after.report]), strict=True)
    pairs = [(old, new) for row, old, new in names if row.group]
    counts = [len(set(each)) for each in zip(*pairs, strict=True)]
    return counts if pairs and counts[1] < counts[0] else []


def _whole(roles: Roles) -> tuple[Roles, list[str]]:
    """The roles with no unit in both parts of what is fitted, and the validation images that are fitted only.

    If these are half of them or more, the others show too little to choose by: then choices are made by folds of all.
    """
    names = groups_of([*roles.fit, *roles.choose])
    fitted = set(names[: len(roles.fit)])
    within = [name in fitted for name in names[len(roles.fit) :]]
    moved = [row for row, inside in zip(roles.choose, within, strict=True) if inside]
    if not moved:
        return roles, []
    if 2 * len(moved) >= len(roles.choose):
        facts = {**roles.facts, "chosen_on": FOLDS}
        return replace(roles, fit=[*roles.fit, *roles.choose], choose=[], facts=facts), [row.name for row in roles.choose]
    choose = [row for row, inside in zip(roles.choose, within, strict=True) if not inside]
    return replace(roles, fit=[*roles.fit, *moved], choose=choose), [row.name for row in moved]


def guard(report: LeakReport, mode: str) -> None:
    """Warn about leaks, or refuse to go on.

    Args:
        report: the leaks.
        mode: ``warn``, ``refuse`` or ``allow`` (silence about leaks; the remarks are made in any case).

    Raises:
        BadDataError: mode is ``refuse`` and the report is not empty.
    """
    if mode == "refuse" and report:
        message = "; ".join(report.sentences()) + " (--leaks refuse)"
        raise BadDataError(message)
    for sentence in [*(report.sentences() if mode != "allow" else []), *report.remarks()]:
        log.warning("%s", sentence)
