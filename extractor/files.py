"""What a dataset's bytes are read from; paths are raw bytes, relative, with ``/``."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

from .images import MAX_BYTES, ImageError

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
        ImageError: code ``not_found``, ``unreadable``, or ``too_large`` for what no decoder takes.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            stat = os.fstat(file.fileno())
            if not S_ISREG(stat.st_mode):  # a pipe or a device may give nothing, or never end
                raise ImageError(code="unreadable", message="not a regular file")
            if stat.st_size > MAX_BYTES:
                message = f"{stat.st_size / 2**20:.0f} MiB; a file may have {MAX_BYTES // 2**20}"
                raise ImageError(code="too_large", message=message)
            return file.read(), (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except FileNotFoundError as error:
        raise ImageError(code="not_found", message="no such file") from error
    except OSError as error:
        raise ImageError(code="unreadable", message=error.strerror or str(error)) from error
