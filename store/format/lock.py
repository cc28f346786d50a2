"""File locks: one writer per cache, and no cleanup of a folder that is being written to.

They are locks of the operating system, so a killed process leaves no stale one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from store.errors import LockedError

from .atomic import write_error

_ours: set[Path] = set()  # the locks that this process holds


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the exclusive lock of a cache directory.

    Raises:
        LockedError: another process holds it; there is no waiting.
        OutputError: the directory cannot be written to.
    """
    with file_lock(directory / ".lock", what=str(directory)):
        yield


def is_locked(directory: Path) -> bool:
    """Whether another process holds the writer's lock of a cache directory.

    For readers that find an inconsistent cache: the check takes a shared lock for an instant and needs no permission to write.
    Without a lock file, nobody writes.
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
    """Hold an exclusive lock on a file, which is created if it is missing and stays afterwards.

    Args:
        path: the lock file.
        what: what the lock protects, for the message.

    Raises:
        LockedError: another process holds it; there is no waiting.
        OutputError: it cannot be created.
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
    """Lock a folder: shared with others to write in it, or ``alone`` to remove the leftovers of killed processes.

    The lock is on the folder itself and leaves no file in it. On a file system without such locks it is never held, so that
    nothing is removed.

    Yields:
        Whether it is held. With ``alone`` there is no waiting; writers wait until a cleanup is done.
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
