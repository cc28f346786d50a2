"""File locks: one writer for each cache, job and output.

They are locks of the operating system (``flock``), so a killed process leaves no stale one. Where a file system has none,
nothing is written: a file whose mere existence is the lock would outlive a killed process, or let two in.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from store.errors import LockedError, StorageError

from .atomic import write_error

BUSY = (errno.EWOULDBLOCK, errno.EACCES)  # of flock; the second where NFS emulates it
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_ours: dict[Path, int] = {}  # the locks that this process holds, and the thread that took each


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Hold the exclusive lock of a cache directory.

    Raises:
        LockedError: another process holds it; there is no waiting.
        OutputError: the directory cannot be written to.
        StorageError: its file system has no locks.
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
    except OSError as error:
        return error.errno in BUSY
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
        StorageError: its file system has no locks.
    """
    descriptor = _acquire(path, what)
    _ours[path.absolute()] = threading.get_ident()
    try:
        yield
    finally:
        del _ours[path.absolute()]
        os.close(descriptor)


@contextmanager
def output_lock(path: Path) -> Iterator[None]:
    """Hold an output, a file or a folder, while it is made, so that every unfinished one of its name is a killed run's.

    The lock file beside it is gone afterwards. The thread that holds the lock may take it again.

    Raises:
        LockedError: another run makes it; there is no waiting.
        OutputError: nothing can be created in its folder.
        StorageError: its file system has no locks.
    """
    place = lock_of(path.absolute())
    if _ours.get(place) == threading.get_ident():
        yield
        return
    with file_lock(place, what=str(path)):
        try:
            yield
        finally:
            with suppress(OSError):  # another process that has opened it meanwhile sees that its name is gone, and starts over
                if not place.stat().st_size:
                    place.unlink()


def lock_of(path: Path) -> Path:
    """The lock file beside an output."""
    return path.with_name(f".{path.name}.penult-lock")


def tidy(path: Path) -> None:
    """Delete the lock file of a run that was killed after its output was there: another that is refused for that comes here."""
    with suppress(LockedError, OSError), output_lock(path):
        pass


def _acquire(path: Path, what: str) -> int:
    """The descriptor by which this process holds the lock on a file."""
    while True:
        created = not os.path.lexists(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            message = f"cannot lock {what} with {path}: {error.strerror}"
            raise write_error(error)(message) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):  # else its holder has removed it: nobody else sees it
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if created and error.errno in NO_LOCKS:  # so nobody holds it
                with suppress(OSError):
                    path.unlink()
            raise _refusal(error, path, what) from error
        os.close(descriptor)


def _refusal(error: OSError, path: Path, what: str) -> Exception:
    if error.errno in BUSY:
        return LockedError(f"{what} is in use by another run; try again when it has ended")
    if error.errno in NO_LOCKS:
        return StorageError(
            f"cannot lock {what}: the file system of {path.absolute().parent} has no file locks ({error.strerror}), and "
            f"without them two runs could write at once. Choose a folder on a local disk, or have locks switched on where this "
            f"one is mounted (NFS: its lock service; Lustre: -o flock)"
        )
    return write_error(error)(f"cannot lock {what} with {path}: {error.strerror}")
