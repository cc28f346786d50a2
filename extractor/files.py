"""What a dataset's bytes are read from; paths are raw bytes, relative, with ``/``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from .images import ImageError

Stat = tuple[int, int, int]  # size, mtime_ns, inode: what tells an unchanged file without reading it


class Files(Protocol):
    """What a dataset's bytes are read from."""

    def stat(self, path: bytes) -> Stat | None:
        """Of a sample, without reading it; None where it is not there."""
        ...

    def read(self, path: bytes) -> tuple[bytes, Stat]:
        """Content and stat of a sample.

        Raises:
            ImageError: code ``not_found`` or ``unreadable``.
        """
        ...


class FolderFiles:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self._base = os.fsencode(root) + b"/"

    def stat(self, path: bytes) -> Stat | None:
        try:
            found = os.stat(self._base + path)  # noqa: PTH116 - a Path cannot hold every name
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def read(self, path: bytes) -> tuple[bytes, Stat]:
        return read_file(self._base + path)


def read_file(path: bytes | str) -> tuple[bytes, Stat]:
    """Content and (size, mtime_ns, inode) of a regular file.

    Raises:
        ImageError: code ``not_found`` or ``unreadable``.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            stat = os.fstat(file.fileno())
            return file.read(), (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except FileNotFoundError as error:
        raise ImageError(code="not_found", message="no such file") from error
    except OSError as error:
        raise ImageError(code="unreadable", message=error.strerror or str(error)) from error
