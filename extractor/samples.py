"""One input as a data set declares it, and what every kind of data set checks."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from store.errors import BadDataError, InputMissingError, UsageError
from store.samples import LABEL_SEPARATOR, MISSING, MULTI_LABEL, REGRESSION, SINGLE_LABEL, TASKS, display

SPLITS = {  # what a split may be called, as a folder, in a column or at the beginning of a shard's name
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One input as the dataset declares it; ``path`` is relative to the root, as raw bytes, with ``/``.

    ``targets`` has one number for each of its `Task.targets`, `MISSING` where there is none.
    """

    path: bytes
    label: str | None = None
    split: str | None = None
    group: bytes = b""
    targets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Task:
    """What the labels are for: said by the user, recorded with the samples, never guessed.

    Args:
        name: ``single-label``, ``multi-label`` (labels separated by ``|``) or ``regression``.
        targets: regression: the numeric columns.

    Raises:
        UsageError: the two do not fit each other.
    """

    name: str = SINGLE_LABEL
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        message = None
        if self.name not in TASKS:
            message = f"--task {self.name}: there is {', '.join(TASKS)}"
        elif self.targets and self.name != REGRESSION:
            message = f"--target {self.targets[0]}: numeric targets are for --task {REGRESSION}, this is {self.name}"
        elif self.name == REGRESSION and not self.targets:
            message = f"--task {REGRESSION} needs a --target COLUMN for each number to predict"
        elif len(set(self.targets)) < len(self.targets):
            message = f"--target names a column twice: {', '.join(self.targets)}"
        if message:
            raise UsageError(message)

    def label(self, value: object) -> str | None:
        """A label as it is stored; None for an empty one.

        Args:
            value: text or a whole number; for several labels text with ``|`` between them, or a list.

        Raises:
            ValueError: it is something else, or names a label twice.
        """
        if self.name != MULTI_LABEL:
            return as_text(value) or None
        parts = [as_text(part) for part in (value if isinstance(value, list) else as_text(value).split(LABEL_SEPARATOR))]
        if parts in ([], [""]):
            return None
        if "" in parts or len(set(parts)) < len(parts) or any(LABEL_SEPARATOR in part for part in parts):
            message = f"labels {value!r}; expected different names with {LABEL_SEPARATOR!r} between them"
            raise ValueError(message)
        return LABEL_SEPARATOR.join(parts)

    @staticmethod
    def number(value: object) -> float:
        """A target as it is stored; `MISSING` for an empty one.

        Raises:
            ValueError: it is no finite number.
        """
        if value is None or (isinstance(value, str) and not value.strip()):
            return MISSING
        message = f"{value!r} is not a finite number"
        if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):  # float("1_0") is 10
            raise ValueError(message)
        try:
            found = float(value)
        except (ValueError, OverflowError):
            raise ValueError(message) from None
        if not math.isfinite(found):
            raise ValueError(message)
        return found


ONE_LABEL = Task()


def as_text(value: object) -> str:
    """A label, split or group as text that can be stored and shown; empty for None.

    Raises:
        ValueError: it is neither text nor a whole number.
    """
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes):
        return display(value.strip())
    message = f"{value!r} is neither text nor a whole number"
    raise ValueError(message)


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


def leaves_root(path: bytes) -> bool:
    """Whether a path is not one below the root."""
    return path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/")


def finished(samples: list[Sample], origin: Path, group_by: str | None) -> list[Sample]:
    """The samples in order of path, with groups from a pattern where there is one.

    Raises:
        InputMissingError: there are none.
        BadDataError: two have one path, or only some have a split.
        UsageError: the pattern is none, or does not match a path.
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
    return samples if group_by is None else _grouped(samples, group_by)


def _grouped(samples: Sequence[Sample], group_by: str) -> list[Sample]:
    try:
        pattern = re.compile(os.fsencode(group_by))
    except re.error as error:
        message = f"--group-by {group_by!r} is neither a column nor a regular expression: {error}"
        raise UsageError(message) from error
    grouped = []
    for sample in samples:
        match = pattern.search(sample.path)
        if match is None:
            message = f"--group-by {group_by!r} does not match {display(sample.path)}"
            raise UsageError(message)
        grouped.append(replace(sample, group=(match.group(1) or b"") if pattern.groups else match.group()))
    return grouped
