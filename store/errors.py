"""The exceptions that penult raises on purpose, each with the exit code that a scheduler sees.

::

    PenultError                        70
    |-- UsageError (ValueError)         2  flags that do not fit each other or the data
    |-- BadDataError (ValueError)      65  the data cannot give a trustworthy answer
    |   |-- CorruptCacheError              a file is damaged or hostile
    |   |   |-- NewerFormatError               a newer penult wrote it
    |   |-- FingerprintMismatchError       two things were made by different backbones
    |   |-- BudgetExceededError            more failed inputs than allowed
    |   |-- GateError                      a score is below the gate
    |-- InputMissingError (FileNotFoundError)  66
    |-- DeviceUnavailableError (RuntimeError)  69  the requested device is not available
    |-- OutputError (OSError)             73  an output cannot be created
    |   |-- OutputExistsError (FileExistsError)
    |-- StorageError (OSError)                 74  disk full, I/O error
    |-- LockedError (RuntimeError)             75  another run holds the cache
    |-- JobFileError (ValueError)              78
    |-- InterruptedRunError             128 + signal number; resumable

The codes are those of BSD's ``sysexits.h`` if it has one. Anything else that escapes is a bug and exits 70 with a
traceback.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterable, Mapping
from typing import Any

CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class PenultError(Exception):
    """Base class of everything that penult raises on purpose.

    Attributes:
        exit_code: exit status of the command that raised it.
        facts: JSON for machines: the results of the run up to the error.

    >>> import store
    >>> try:
    ...     store.FeatureCache("nowhere.cache")
    ... except store.PenultError as error:
    ...     print(f"{error.exit_code}: {error}")
    66: nowhere.cache does not exist or is not a cache directory
    """

    exit_code = 70

    def __init__(self, *arguments: object, facts: dict[str, Any] | None = None) -> None:
        super().__init__(*arguments)
        self.facts = facts or {}


class UsageError(PenultError, ValueError):
    exit_code = 2


class BadDataError(PenultError, ValueError):
    exit_code = 65


class CorruptCacheError(BadDataError):
    pass


class NewerFormatError(CorruptCacheError):
    pass


class FingerprintMismatchError(BadDataError):
    pass


class BudgetExceededError(BadDataError):
    pass


class GateError(BadDataError):
    pass


class InputMissingError(PenultError, FileNotFoundError):
    exit_code = 66


class DeviceUnavailableError(PenultError, RuntimeError):
    exit_code = 69


class OutputError(PenultError, OSError):
    exit_code = 73


class OutputExistsError(OutputError, FileExistsError):
    pass


class StorageError(PenultError, OSError):
    exit_code = 74


class LockedError(PenultError, RuntimeError):
    exit_code = 75


class JobFileError(PenultError, ValueError):
    exit_code = 78


class InterruptedRunError(PenultError):
    """A signal ended the run after all finished work was committed; ``then`` is what running the command again does."""

    def __init__(self, signum: int, then: str = "to continue") -> None:
        super().__init__(f"interrupted by signal {signum}; run the same command again {then}")
        self.exit_code = 128 + signum


def require_format(what: object, version: object, known: int) -> None:
    """Refuse a file that a newer penult wrote.

    Args:
        what: the file, for the message.
        version: of its format, as recorded in the file.
        known: the newest version that this penult reads.

    Raises:
        NewerFormatError: the version is not 1 to ``known``.
    """
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= known:
        message = f"{what} has format version {version}; this penult reads up to {known}. Upgrade penult."
        raise NewerFormatError(message)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: the nearest known names, or another hint.

    >>> did_you_mean("resnet5O", ["resnet18", "resnet50", "vgg16"])
    "; did you mean 'resnet50' or 'resnet18'?"
    """
    import difflib  # needed for error messages only

    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else otherwise and f"; {otherwise}"


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that an error ends, and the error in words, as the command says and records it."""
    if isinstance(error, PenultError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, str(InterruptedRunError(signal.SIGINT, "to start over"))
    if isinstance(error, SystemExit):  # SIGTERM, outside of a pipeline
        code = error.code if isinstance(error.code, int) else 70
        return code, str(InterruptedRunError(code - 128, "to start over")) if code > 128 else ""
    if isinstance(error, BrokenPipeError):
        return 141, "nobody reads the output any more"
    if isinstance(error, OSError):
        return 73 if error.errno in CANNOT_CREATE else 74, f"{error.filename or 'I/O'}: {error.strerror or error}"
    return PenultError.exit_code, f"{type(error).__name__}: {error}"


def answer_of(error: PenultError) -> dict[str, str]:
    """An error as JSON, as a child process reports it."""
    return {"error": type(error).__name__, "message": str(error)}


def raise_answered(answer: Mapping[str, Any], *others: type[PenultError]) -> None:
    """Raise the error that a child process reported, if it reported one.

    Args:
        answer: JSON from the child.
        others: error classes that are not defined in this module.
    """
    if "error" in answer:
        known = {kind.__name__: kind for kind in (*globals().values(), *others) if isinstance(kind, type)}
        kind = known.get(answer["error"], PenultError)
        raise (kind if issubclass(kind, PenultError) else PenultError)(answer["message"])


def display(path: bytes) -> str:
    """A path as printable text: bytes that are not UTF-8, and control characters, become ``\\xNN``; safe in a terminal."""
    return printable(path.decode("utf-8", "backslashreplace"))


def printable(text: str, keep: str = "") -> str:
    r"""Text that is safe in a terminal: control characters, and those that turn or hide text, are escaped, but for ``keep``.

    >>> print(printable("two\nlines, \x1b[31mred"))
    two\nlines, \x1b[31mred
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
