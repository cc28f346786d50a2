"""Child processes: started to find modules where this one does, and what they raise is raised here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from . import errors
from .errors import PenultError


def python(code: str, *arguments: object) -> list[str]:
    """A command that runs ``code`` in a Python of its own; ``sys.argv[1:]`` there are the arguments, as text.

    Nothing in the folder that it is started in, and no module beside a script, can take the place of one of ours.
    """
    start = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    return [sys.executable, "-P", "-c", start + code, json.dumps(sys.path), *map(str, arguments)]


def answer_of(error: PenultError) -> dict[str, str]:
    """An error as a child answers it, in JSON."""
    return {"error": type(error).__name__, "message": str(error)}


def raise_answered(answer: Mapping[str, Any], *others: type[PenultError]) -> None:
    """Raise what a child has answered, if that is an error.

    Args:
        answer: of the child.
        others: kinds of errors that do not stand in `errors`.
    """
    if "error" in answer:
        known = {kind.__name__: kind for kind in (*vars(errors).values(), *others) if isinstance(kind, type)}
        kind = known.get(answer["error"], PenultError)
        raise (kind if issubclass(kind, PenultError) else PenultError)(answer["message"])
