"""Atomic files and folders: written under a temporary name, made durable, then renamed (rule 4 of store/FORMAT.md)."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from store.errors import OutputError, OutputExistsError, PenultError, StorageError

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)  # what `temporary` makes


def temporary(path: Path) -> Path:
    """A new temporary name beside a file or folder, which it has until it is complete."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


def final_name(name: str) -> str:
    """The final name for a name made by `temporary`, even repeatedly; every other name stays as it is."""
    while match := TEMPORARY.fullmatch(name):
        name = match[1]
    return name


def leftovers(folder: Path, ours: Callable[[str], object]) -> list[Path]:
    """Unfinished files of killed processes in a folder: regular files with a name made by `temporary`, nothing else.

    Args:
        folder: of the files.
        ours: tells whether penult writes a file of a final name in this folder, and no other process does so now (see `lock`).
    """
    unfinished = [item for item in folder.iterdir() if final_name(item.name) != item.name and ours(final_name(item.name))]
    return [item for item in unfinished if item.is_file() and not item.is_symlink()]


def remove_leftovers(folder: Path, ours: Callable[[str], object]) -> None:
    """Delete `leftovers`."""
    for path in leftovers(folder, ours):
        with suppress(OSError):  # it may belong to another user
            path.unlink()


def commit(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write ``data`` so that after a crash at any moment ``path`` is either complete or as it was before (rule 4).

    Blocks are written as they come; if producing one raises, nothing is kept.

    Raises:
        OutputError: the folder does not exist or is not writable, or the path exists and is not a file.
        StorageError: disk full or any other I/O error; no partial file is left under the final name.
    """
    unfinished = temporary(path)
    try:
        require_replaceable(path)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:  # from here on, the file of this name is this call's to remove
            try:
                for block in (data,) if isinstance(data, bytes) else data:
                    view = memoryview(block)
                    while view:
                        view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            unfinished.rename(path)
            fsync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
    except OSError as error:
        if isinstance(error, PenultError):
            raise
        message = f"cannot write {path}: {error.strerror}"
        raise write_error(error)(message) from error


def require_free(path: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a file may be written at a path.

    Raises:
        OutputExistsError: the path exists and may not be replaced.
        OutputError: the folder does not exist or is not writable, or only another user may replace what is there.
    """
    if path.exists() and not overwrite:
        message = f"{path} exists; choose another name or pass --overwrite"
        raise OutputExistsError(message)
    if not path.absolute().parent.exists():
        message = f"cannot write {path}: there is no folder {path.parent}"
        raise OutputError(message)
    require_room(path)
    if path.exists():
        parent, owner = path.absolute().parent.stat(), path.lstat().st_uid
        if parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, parent.st_uid, owner):  # as in /tmp
            message = f"{path} belongs to another user (uid {owner}), who alone may replace it here; choose another name"
            raise OutputError(message)


def require_room(path: Path) -> None:
    """Check, before any work is done, that something can be created at a path: a file without a name is, in its folder.

    What the permissions say is not all: a file system may be read-only, or refuse for reasons of its own.

    Raises:
        OutputError, StorageError: nothing can be created in the folder, or in the nearest one that exists.
    """
    import tempfile

    nearest = next(each for each in path.absolute().parents if each.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        reason = f"not writable ({error.strerror})" if nearest.is_dir() else "not a folder"
        message = f"cannot create {path}: {nearest} is {reason}"
        raise write_error(error)(message) from error


def require_replaceable(path: Path) -> None:
    """Refuse a path that is not a file: a rename would replace a device such as /dev/null, or a pipe.

    Raises:
        OutputExistsError: the path exists and is not a file.
    """
    if path.exists() and not path.is_file():
        message = f"{path} exists and is not a file; choose another name"
        raise OutputExistsError(message)


def require_no_part_of(folder: Path, path: Path) -> None:
    """Refuse a result that would replace a file of the folder it is made from, even if files may be overwritten.

    Raises:
        OutputExistsError: it would.
    """
    if path.exists() and path.parent.resolve().is_relative_to(folder.resolve()):
        message = f"{path} is a part of {folder}, which is read; choose another name"
        raise OutputExistsError(message)


def write_error(error: OSError) -> type[OutputError | StorageError]:
    """The error class for a failed write: the path is wrong (exit 73), or the disk is full or failing (74)."""
    place = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
    return OutputError if error.errno in place else StorageError


def exchange(first: Path, second: Path) -> bool:
    """Swap two files or folders in one step, so that each name always has one of them; False if that is not possible here.

    Linux has it (renameat2 with RENAME_EXCHANGE), on most file systems.
    """
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and renameat2(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0  # -100: AT_FDCWD


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable; a rename alone may be lost in a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory of a cache and its missing parents, all durable, with anything that a killed run left in them.

    An existing name need not be durable: the process that created it may have died before its fsync.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in dict.fromkeys([path, path.parent, path.parent.parent, *(folder.parent for folder in missing)]):
        with suppress(PermissionError):  # a folder above the cache need not be readable
            fsync_directory(folder)
