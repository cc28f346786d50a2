"""Prediction tasks: one class per image, several labels, or numbers; and how each reads and stores its labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from .errors import BadDataError, UsageError, display

if TYPE_CHECKING:  # the settings of commands import this module, and must not import NumPy
    from numpy.typing import NDArray

LABEL_SEPARATOR = "|"
MISSING = math.nan  # one object for all, so that rows that lack the same target compare equal


class Labelled(Protocol):
    """The part of a sample table's row that a task reads."""

    @property
    def label(self) -> str | None: ...
    @property
    def targets(self) -> tuple[float, ...]: ...
    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Labelled)


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


@dataclass(frozen=True)
class Task(ABC):
    """A prediction task: chosen by the user, recorded with the samples, never guessed. `Task.named` returns one by its name.

    Attributes:
        name: its name on the command line, in jobs and in files.
        targets: the numeric columns of a regression.
        stratifies: whether an image has one class, so that every split gets its share of each.
        lacking: the phrase for images that cannot be trained on.
    """

    targets: tuple[str, ...] = ()

    name: ClassVar[str] = ""
    stratifies: ClassVar[bool] = False
    lacking: ClassVar[str] = "have no label"

    @staticmethod
    def named(name: str, targets: Sequence[str] = (), spell: Callable[[str], str] | None = None) -> Task:
        """A task by its name.

        Args:
            name: one of `TASKS`.
            targets: the numeric columns of a regression.
            spell: gives ``task`` and ``targets`` the spelling of their source, such as ``--task``.

        Raises:
            UsageError: there is none of this name, or the targets do not fit it.
        """
        message = None
        task, target = (spell("task"), spell("targets")) if spell else ("--task", "--target")
        if name not in TASKS:
            message = f"{task} {name}: expected {', '.join(TASKS)}"
        elif targets and TASKS[name] is not RegressionTask:
            message = f"{target} {targets[0]}: numeric targets are for {task} {RegressionTask.name}, this is {name}"
        elif TASKS[name] is RegressionTask and not targets:
            message = f"{task} {name} needs {target}: a column for each number to predict"
        elif len(set(targets)) < len(targets):
            message = f"{target} names a column twice: {', '.join(targets)}"
        if message:
            raise UsageError(message)
        return TASKS[name](tuple(targets))

    def label(self, value: object) -> str | None:
        """A label as it is stored; None for an empty one.

        Args:
            value: text or a whole number; for several labels text with ``|`` between them, or a list.

        Raises:
            ValueError: it is something else, or names a label twice.
        """
        return as_text(value) or None

    @staticmethod
    def number(value: object) -> float:
        """A target as it is stored; `MISSING` for an empty one.

        Raises:
            ValueError: it is not a finite number.
        """
        if value is None or (isinstance(value, str) and not value.strip()):
            return MISSING
        message = f"{value!r} is not a finite number"
        if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):  # float("1_0") is 10
            raise ValueError(message)
        try:
            target = float(value)
        except (ValueError, OverflowError):
            raise ValueError(message) from None
        if not math.isfinite(target):
            raise ValueError(message)
        return target

    def labels_of(self, row: Labelled) -> list[str]:
        """The labels of a row: none, one, or several if the task allows several."""
        return [] if row.label is None else [row.label]

    def can_be_trained_on(self, labels: Sequence[str | None]) -> bool:
        """Whether samples with these labels can be trained on, so that a split makes sense."""
        return all(label is not None for label in labels)

    def outputs(self, classes: Sequence[str]) -> list[str]:
        """The names of a head's outputs, from the classes in the data."""
        return list(classes)

    def incomplete(self, rows: Sequence[R], names: Sequence[str] | None = None) -> list[R]:
        """The rows that lack a label or a target.

        Args:
            rows: of one table.
            names: the targets that count; by default all.
        """
        return [row for row in rows if row.label is None]

    @abstractmethod
    def truth(self, rows: Sequence[Labelled], names: Sequence[str]) -> NDArray[Any]:
        """The ground truth of rows, none of them `incomplete`; with several names, a column for each.

        Raises:
            BadDataError: a label is not among the names, or there is no such target; names it.
        """


class SingleLabelTask(Task):
    """One class per image; truth is labels ``(n,)``."""

    name = "single-label"
    stratifies = True

    def truth(self, rows: Sequence[Labelled], names: Sequence[str]) -> NDArray[Any]:
        import numpy as np

        return np.array([row.label for row in rows], dtype=str)


class MultiLabelTask(Task):
    """Any number of labels per image, including none; truth is which of them each row has, ``(n, k)`` bool."""

    name = "multi-label"

    def label(self, value: object) -> str | None:
        parts = [as_text(part) for part in (value if isinstance(value, list) else as_text(value).split(LABEL_SEPARATOR))]
        if parts in ([], [""]):
            return None
        if "" in parts or len(set(parts)) < len(parts) or any(LABEL_SEPARATOR in part for part in parts):
            message = f"labels {value!r}; expected different names with {LABEL_SEPARATOR!r} between them"
            raise ValueError(message)
        return LABEL_SEPARATOR.join(parts)

    def labels_of(self, row: Labelled) -> list[str]:
        return [] if row.label is None else row.label.split(LABEL_SEPARATOR)

    def can_be_trained_on(self, labels: Sequence[str | None]) -> bool:
        return any(label is not None for label in labels)

    def incomplete(self, rows: Sequence[R], names: Sequence[str] | None = None) -> list[R]:
        return []

    def truth(self, rows: Sequence[Labelled], names: Sequence[str]) -> NDArray[Any]:
        import numpy as np

        index = {name: i for i, name in enumerate(names)}
        indicators = np.zeros((len(rows), len(index)), bool)
        for i, row in enumerate(rows):
            for label in self.labels_of(row):
                if label not in index:
                    message = f"{row.name} has the label {label!r}; expected some of {', '.join(map(repr, index))}"
                    raise BadDataError(message)
                indicators[i, index[label]] = True
        return indicators


class RegressionTask(Task):
    """One or more numbers per image; truth is targets ``(n, t)`` float64."""

    name = "regression"
    lacking = "lack a target"

    def can_be_trained_on(self, labels: Sequence[str | None]) -> bool:
        return True

    def outputs(self, classes: Sequence[str]) -> list[str]:
        return list(self.targets)

    def incomplete(self, rows: Sequence[R], names: Sequence[str] | None = None) -> list[R]:
        places = self._places(self.targets if names is None else names)
        return [row for row in rows if any(row.targets[i] != row.targets[i] for i in places)]

    def truth(self, rows: Sequence[Labelled], names: Sequence[str]) -> NDArray[Any]:
        import numpy as np

        places = self._places(names)
        return np.array([[row.targets[i] for i in places] for row in rows], np.float64).reshape(len(rows), len(places))

    def _places(self, names: Sequence[str]) -> list[int]:
        """The positions of these targets in a row."""
        missing = [name for name in names if name not in self.targets]
        if missing:
            have = ", ".join(map(repr, self.targets)) or "none"
            message = f"the samples have no target {missing[0]!r}; they have {have}"
            raise BadDataError(message)
        return [self.targets.index(name) for name in names]


TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (SingleLabelTask, MultiLabelTask, RegressionTask)}
ONE_LABEL = SingleLabelTask()
