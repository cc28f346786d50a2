"""The registry of tasks by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from store.errors import BadDataError

from .multi_label import MultiLabel
from .regression import Regression
from .single_label import SingleLabel
from .task import HeadTask

KINDS: dict[str, type[HeadTask]] = {kind.name: kind for kind in (SingleLabel, MultiLabel, Regression)}


def task_of(
    name: str, names: Sequence[str], conformal: dict[str, Any] | None = None, temperature: float | None = None
) -> HeadTask:
    """A task by name; the other arguments are its attributes.

    Raises:
        BadDataError: there is no such task.
    """
    if name not in KINDS:
        message = f"unknown task {name!r}; expected one of {', '.join(KINDS)}. A newer version of penult may know it"
        raise BadDataError(message)
    return KINDS[name](names, conformal, temperature)
