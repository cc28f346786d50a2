"""The tasks by name."""

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
    """A task by name; the arguments are its attributes.

    Raises:
        BadDataError: there is none of this name.
    """
    if name not in KINDS:
        message = f"the task {name!r} is none of {', '.join(KINDS)}; a newer penult may know it"
        raise BadDataError(message)
    return KINDS[name](names, conformal, temperature)
