"""One writer per cache, and no tidying where somebody writes. The locks are the operating system's: a killed holder leaves
nothing stale."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from store.errors import LockedError

from .atomic import write_error

_ours: set[Path] = set()  # what this process holds


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the exclusive lock of a cache directory.

    Raises:
        LockedError: another process holds it; nothing was waited for.
        OutputError: the directory cannot be written to.
    """
    with file_lock(directory / ".lock", what=str(directory)):
        yield


def is_locked(directory: Path) -> bool:
    """Whether another process holds the writer's lock of a cache directory. For readers that found something odd: asking
    takes a shared lock for an instant and needs no right to write; where there is no lock file, nobody writes.
    """
    if directory.absolute() / ".lock" in _ours:
        return False
    try:
        descriptor = os.open(directory / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def file_lock(path: Path, *, what: str) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made where it is missing and stays.

    Args:
        path: the lock file.
        what: what it stands for, for the message.

    Raises:
        LockedError: another process holds it; nothing was waited for.
        OutputError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"{what} is in use by another run; try again when it has ended"
        raise LockedError(message) from error
    except OSError as error:
        message = f"cannot lock {what} with {path}: {error.strerror or error}"
        raise write_error(error)(message) from error
    _ours.add(path.absolute())
    try:
        yield
    finally:
        _ours.discard(path.absolute())
        lock.release()


@contextmanager
def folder_lock(folder: Path, *, alone: bool = False) -> Iterator[bool]:
    """Stand for writing something in a folder, beside others who do, or be ``alone`` there to remove what killed ones left.

    The lock is on the folder itself and leaves no file in it. Where a file system has no such locks nobody is ever alone, so
    that nothing is removed.

    Yields:
        Whether it is held. To be alone nothing is waited for; writers wait until the tidying is done.
    """
    descriptor, held = None, False
    try:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
            held = True
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)
