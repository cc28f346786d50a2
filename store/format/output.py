"""Output files that a user names: written whole by one run at a time, or line by line; what killed runs left is removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from store.errors import OutputExistsError

from . import atomic
from .lock import output_lock, tidy


@contextmanager
def written(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold an output file from before the work until it is there; what killed runs left of it is removed.

    Raises:
        OutputExistsError: it exists and may not be replaced, or is not a file.
        OutputError: its folder is not there or is not writable.
        LockedError: another run writes it.
        StorageError: its file system has no locks.
    """
    require_free(path, overwrite=overwrite)
    with output_lock(path):
        atomic.require_free(path, overwrite=overwrite)
        atomic.remove_leftovers(path.parent, path.name.__eq__)
        yield


def require_free(path: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a file may be written at a path.

    Raises:
        OutputExistsError: it exists and may not be replaced, or is not a file.
        OutputError: its folder is not there or is not writable.
    """
    try:
        atomic.require_replaceable(path)
        atomic.require_free(path, overwrite=overwrite)
    except OutputExistsError:
        tidy(path)
        raise


def write_output(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write one output file.

    Raises:
        OutputExistsError: it exists and may not be replaced.
        LockedError: another run writes it.
        OutputError, StorageError: it cannot be written.
    """
    with written(path, overwrite=overwrite):
        atomic.commit(path, data)


def open_lines(path: Path) -> TextIO:
    """Open a file of lines to append to. A last line that a killed process cut off ends first, else it would spoil the next."""
    cut = b""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as before:
            before.seek(-1, os.SEEK_END)
            cut = before.read()
    file = path.open("a", encoding="utf-8")
    if cut not in (b"", b"\n"):
        file.write("\n")
    return file
