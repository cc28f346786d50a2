"""Labels: what a dataset takes for the label of an image, in words and in numbers."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from store.errors import display

from .folders import ImageFolder, is_note, kind_of_split
from .manifest import Manifest
from .samples import Sample, in_words
from .sources import Source
from .tar_shards import TarShards

log = logging.getLogger("penult.extractor")

SHOWN_CLASSES = 3  # with the folders in them
ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")  # as `store.errors.display` writes it
MAYBE_EMPTY = ("None", "NA", "N/A", "n/a", "#N/A", "NULL", "null")  # an empty cell of a table as text; or a class


@dataclass(frozen=True)
class Labels:
    """What was taken for the labels of a dataset.

    Attributes:
        counts: images by label, in order of the labels; an image with several labels counts for each.
        subfolders: names of the folders with images in a class folder, by class; only of classes that have some.
        nested: whether no class folder has images of its own, so that the folders in them may be the classes.
        unlabelled: images without a label.
    """

    counts: dict[str, int]
    subfolders: dict[str, list[str]] = field(default_factory=dict)
    nested: bool = False
    unlabelled: int = 0

    @property
    def subfolder_counts(self) -> dict[str, int]:
        return {label: len(names) for label, names in self.subfolders.items()}

    @property
    def splits_below(self) -> list[str]:
        """The names of the folders in class folders, if all of them are names of splits; else empty."""
        names = {name for names in self.subfolders.values() for name in names}
        return sorted(names) if all(map(kind_of_split, names)) else []


def labels_of(source: Source, listed: Sequence[Sample], used: Sequence[Sample]) -> Labels:
    """What was taken for the labels.

    Args:
        source: the dataset.
        listed: all its samples, which show the folders in each class folder.
        used: the samples of this run, which are counted.
    """
    counts = Counter(label for sample in used for label in source.task.labels_of(sample))
    ordered = {label: counts[label] for label in sorted(counts)}
    unlabelled = 0 if source.task.targets else sum(sample.label is None for sample in used)
    if not isinstance(source, ImageFolder):
        return Labels(ordered, unlabelled=unlabelled)
    below: dict[str, set[bytes]] = {}
    nested = True
    for sample in listed:
        _, *deeper = sample.path.split(b"/")[1 if sample.split else 0 :]
        if sample.label is not None and len(deeper) > 1:
            below.setdefault(sample.label, set()).add(deeper[0])
        elif not is_note(sample.path.rpartition(b"/")[2]):
            nested = False
    subfolders = {label: [display(name) for name in sorted(below[label])] for label in sorted(below)}
    return Labels(ordered, subfolders, nested and bool(subfolders), unlabelled)


def say_labels(source: Source, labels: Labels, used: Sequence[Sample]) -> None:
    """Log what was taken for the labels; a warning if the folders below may be the classes, or if some may be meant as one."""
    if source.task.targets and not labels.counts:
        return
    if not labels.counts:
        log.info("the images of %s have no labels", _name(source))
        return
    counts = in_words([f"{label} ({count})" for label, count in labels.counts.items()])
    without = f"; without a label: {labels.unlabelled}" if labels.unlabelled else ""
    log.info("labels are %s: %s%s", _where(source, used), counts, without)
    if not used[0].split and labels.splits_below:
        log.warning(
            "folders in class folders do not decide the split (%s): put them above the class folders (train/%s/...), or list "
            "the images in a CSV with the columns path, label, split",
            in_words(labels.splits_below),
            next(iter(labels.subfolders)),
        )
    elif labels.nested:
        log.warning(
            "the labels are %s, and these folders hold only folders (%s). If the classes are below, move each class into a "
            "folder directly in %s, or list the images in a CSV with the columns path, label",
            in_words(list(labels.counts)),
            _below(labels),
            "its split's folder" if used[0].split else source.root,
        )
    elif labels.subfolders:
        log.info("images in deeper folders have the label of their class folder (%s)", _below(labels))
    if same := alike(labels.counts):
        differ = "differ in case, blanks, hyphens or underscores alone, and may be meant as one"
        log.warning("these classes %s: %s", differ, in_words(same))
    if escaped := [name for name in labels.counts if ESCAPED.search(name)]:
        what = "are not UTF-8, or have characters that cannot be shown, and are kept as they are written here"
        log.warning("these classes %s: %s. Save the list as UTF-8, or rename the folders", what, in_words(escaped))
    if empty := [repr(name) for name in labels.counts if name in MAYBE_EMPTY]:
        log.warning("%s is a class here; if it stands for an empty cell, leave the cell empty", in_words(empty))


def alike(labels: Iterable[str]) -> list[str]:
    """The labels that differ in case, blanks, hyphens or underscores alone.

    >>> alike(["Cat", "cat", "hot dog", "hot-dog", "dog", "1", "-1"])
    ["'Cat' = 'cat'", "'hot dog' = 'hot-dog'"]
    """
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", label).strip().casefold(), []).append(label)
    return [" = ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]


def _below(labels: Labels) -> str:
    """The folders in the first class folders."""
    parts = [f"below {label}/: {in_words(names)}" for label, names in labels.subfolders.items()]
    more = len(parts) - SHOWN_CLASSES
    return "; ".join([*parts[:SHOWN_CLASSES], *([f"and in {more} more"] if more > 0 else [])])


def _name(source: Source) -> str:
    path = source.path if isinstance(source, Manifest | TarShards) else source.root
    return display(os.fsencode(path))


def _where(source: Source, used: Sequence[Sample]) -> str:
    """The place of the labels, in words."""
    if isinstance(source, Manifest):
        return f"in the column label of {_name(source)}"
    if not isinstance(source, ImageFolder):
        return f"those of {_name(source)}"
    splits = sorted({display(sample.path.partition(b"/")[0]) for sample in used if sample.split})
    if splits:
        return f"the folders below {in_words([f'{name}/' for name in splits])} in {_name(source)}"
    return f"the folders below {_name(source)}/"
