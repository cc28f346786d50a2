"""Labels: what a dataset takes for the label of an image, in words and in numbers."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from store.errors import display

from .folders import ImageFolder, is_note
from .manifest import Manifest
from .samples import Sample, in_words
from .sources import Source
from .tar_shards import TarShards

log = logging.getLogger("penult.extractor")

SHOWN_CLASSES = 3  # with the folders in them


@dataclass(frozen=True)
class Labels:
    """What was taken for the labels of a dataset.

    Attributes:
        counts: images by label, in order of the labels; an image with several labels counts for each.
        subfolders: names of the folders with images in a class folder, by class; only of classes that have some.
        nested: whether no class folder has images of its own, so that the folders in them may be the classes.
    """

    counts: dict[str, int]
    subfolders: dict[str, list[str]] = field(default_factory=dict)
    nested: bool = False

    @property
    def subfolder_counts(self) -> dict[str, int]:
        return {label: len(names) for label, names in self.subfolders.items()}


def labels_of(source: Source, listed: Sequence[Sample], used: Sequence[Sample]) -> Labels:
    """What was taken for the labels.

    Args:
        source: the dataset.
        listed: all its samples, which show the folders in each class folder.
        used: the samples of this run, which are counted.
    """
    counts = Counter(label for sample in used for label in source.task.labels_of(sample))
    ordered = {label: counts[label] for label in sorted(counts)}
    if not isinstance(source, ImageFolder):
        return Labels(ordered)
    below: dict[str, set[bytes]] = {}
    nested = True
    for sample in listed:
        _, *deeper = sample.path.split(b"/")[1 if sample.split else 0 :]
        if sample.label is not None and len(deeper) > 1:
            below.setdefault(sample.label, set()).add(deeper[0])
        elif not is_note(sample.path.rpartition(b"/")[2]):
            nested = False
    subfolders = {label: [display(name) for name in sorted(below[label])] for label in sorted(below)}
    return Labels(ordered, subfolders, nested and bool(subfolders))


def say_labels(source: Source, labels: Labels, used: Sequence[Sample]) -> None:
    """Log what was taken for the labels; a warning if the folders below may be the classes."""
    if source.task.targets and not labels.counts:
        return
    if not labels.counts:
        log.info("the images of %s have no labels", _name(source))
        return
    counts = in_words([f"{label} ({count})" for label, count in labels.counts.items()])
    without = sum(sample.label is None for sample in used)
    log.info("labels are %s: %s%s", _where(source, used), counts, f"; without a label: {without}" if without else "")
    if labels.nested:
        log.warning(
            "the labels are %s, and these folders hold only folders (%s). If the classes are below, move each class into a "
            "folder directly in %s, or list the images in a CSV with the columns path, label",
            in_words(list(labels.counts)),
            _below(labels),
            "its split's folder" if used[0].split else source.root,
        )
    elif labels.subfolders:
        log.info("images in deeper folders have the label of their class folder (%s)", _below(labels))


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
