"""Samples: one input as a dataset declares it, and the checks that all kinds of datasets share."""

from __future__ import annotations

import itertools
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from store.errors import BadDataError, InputMissingError, UsageError, display
from store.tasks import ONE_LABEL, Task, as_text

SPLITS = {  # names of the splits, as a folder, in a column or at the beginning of a shard's name
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
SHOWN = 5  # names in a message
EMPTY_CELLS = ("nan", "NaN", "NAN", "<NA>")  # as pandas and its like write them; Nan is a name
NAN_LABEL = "the label is nan, which pandas writes for an empty cell: leave the cell empty, or rename the class"
NAN_GROUP = "the group is nan, which pandas writes for an empty cell: leave the cell empty"


@dataclass(frozen=True, slots=True)
class Sample:
    """One input as the dataset declares it; ``path`` is relative to the root, as raw bytes, with ``/``.

    ``targets`` has one number for each of `store.tasks.Task.targets`, `MISSING` if there is none.
    """

    path: bytes
    label: str | None = None
    split: str | None = None
    group: bytes = b""
    targets: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The path as text."""
        return display(self.path)


def in_words(names: Sequence[str]) -> str:
    """The first names of several, and the number of the others.

    >>> in_words(["ants", "bees"]), in_words(list("abcdefg"))
    ('ants and bees', 'a, b, c, d, e and 2 more')
    """
    *first, last = names if len(names) <= SHOWN else [*names[:SHOWN], f"{len(names) - SHOWN} more"]
    return f"{', '.join(first)} and {last}" if first else last


def as_split(value: object) -> str | None:
    """``train``, ``val`` or ``test`` from any of their names; None for an empty value.

    Raises:
        ValueError: it is something else.
    """
    text = as_text(value)
    if text and text.lower() not in SPLITS:
        message = f"split {text!r}; expected train, val or test"
        raise ValueError(message)
    return SPLITS[text.lower()] if text else None


def is_empty_cell(value: object) -> bool:
    """Whether a value is what pandas makes of an empty cell: the number NaN, or its name as text."""
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and value.strip() in EMPTY_CELLS


def as_label(value: object, task: Task) -> str | None:
    """The label of a cell, which is a name or empty; where numbers are predicted it may be any text.

    Raises:
        ValueError: it is neither, or stands for an empty cell.
    """
    is_nan = isinstance(value, float) and math.isnan(value)
    label = None if is_nan else task.label(value)
    if is_nan or (not task.targets and any(map(is_empty_cell, task.labels_of(Sample(b"", label))))):
        raise ValueError(NAN_LABEL)
    return label


def as_bytes(value: object) -> bytes:
    """A path or a group: the bytes as they are.

    Raises:
        ValueError: it is neither text, bytes nor a whole number.
    """
    if isinstance(value, bytes):
        return value
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else as_text(value).encode()


def as_group(value: object) -> bytes:
    """A group; empty if there is none.

    Raises:
        ValueError: it is neither text nor a whole number, or stands for an empty cell.
    """
    if is_empty_cell(value):
        raise ValueError(NAN_GROUP)
    try:
        return as_bytes(value).strip()
    except ValueError as error:
        message = f"group {error}"
        raise ValueError(message) from None


def leaves_root(path: bytes) -> bool:
    """Whether a path leads out of the root."""
    return path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/")


def finished(samples: list[Sample], origin: Path, group_by: str | None, task: Task = ONE_LABEL) -> list[Sample]:
    """Check samples, order them by path, and assign groups by a pattern if there is one.

    Raises:
        InputMissingError: there are none.
        BadDataError: two have the same path, only some have a split, two classes only look the same, or one is called nan.
        UsageError: the pattern is invalid, or does not match a path.
    """
    if not samples:
        message = f"no files in {origin}"
        raise InputMissingError(message)
    samples.sort(key=lambda sample: sample.path)
    for before, after in itertools.pairwise(samples):
        if before.path == after.path:
            message = f"{origin} names {display(after.path)} twice"
            raise BadDataError(message)
    missing = [sample for sample in samples if sample.split is None]
    if missing and len(missing) < len(samples):
        message = f"{origin}: {len(missing)} of {len(samples)} rows have no split (such as {display(missing[0].path)})"
        raise BadDataError(message)
    _refuse_unclear_classes(samples, origin, task)
    return samples if group_by is None else _grouped(samples, group_by)


def _refuse_unclear_classes(samples: Sequence[Sample], origin: Path, task: Task) -> None:
    """Refuse two classes that no one can tell apart, and a class called nan.

    One character may be stored in two ways, NFC and NFD.
    """
    spellings: dict[str, str] = {}
    one_of_each = {sample.label: sample for sample in samples}.values()
    for label in sorted({label for sample in one_of_each for label in task.labels_of(sample)}):
        if not task.targets and is_empty_cell(label):
            message = f"{origin}: {NAN_LABEL}"
            raise BadDataError(message)
        normal = unicodedata.normalize("NFC", label)
        other = spellings.setdefault(normal, label)
        if other != label:
            message = (
                f"{origin}: the classes {other!a} and {label!a} both show as {normal} and differ in Unicode "
                f"normalisation (NFC, NFD) alone: give them one name"
            )
            raise BadDataError(message)


def _grouped(samples: Sequence[Sample], group_by: str) -> list[Sample]:
    try:
        pattern = re.compile(os.fsencode(group_by))
    except re.error as error:
        message = f"--group-by {group_by!r} is neither a column nor a regular expression: {error}"
        raise UsageError(message) from error
    grouped = []
    for sample in samples:
        match = pattern.search(sample.path)
        group = match and match.group(1 if pattern.groups else 0)
        if not group:  # no match, or a group of the pattern that takes no part in it
            message = f"--group-by {group_by!r} gives {display(sample.path)} no group"
            raise UsageError(message)
        grouped.append(replace(sample, group=group))
    return grouped
