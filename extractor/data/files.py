"""Access to the files of a dataset by relative path: raw bytes, with ``/``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

from extractor.pixels.images import MAX_BYTES, ImageError
from store.errors import display

GONE = ("not_found", "unreadable")  # codes of files that cannot be read, as opposed to decoded
MOVED = "was it removed since the features were extracted? If the images moved, --root says where they are"

Stat = tuple[int, int, int]  # size, mtime_ns, inode: an unchanged file has the same, so it need not be read


class Files(Protocol):
    """Access to the bytes of a dataset's samples."""

    def stat(self, path: bytes) -> Stat | None:
        """Facts that differ if a sample changed since it was read; None if it does not exist."""
        ...

    def read(self, path: bytes) -> tuple[bytes, Stat]:
        """Content and stat of a sample.

        Raises:
            ImageError: code ``not_found`` or ``unreadable``.
        """
        ...


class FolderFiles:
    """Files below a folder; without a folder, paths are used as they are.

    Args:
        root: the folder.
        confined: refuse files outside the folder that symbolic links lead to.
    """

    def __init__(self, root: Path | None = None, *, confined: bool = False) -> None:
        self._base = b"" if root is None else os.fsencode(root) + b"/"
        self._real = os.path.realpath(self._base) if confined else None
        self._inside: dict[bytes, bool] = {}  # by folder, which is resolved once

    def stat(self, path: bytes) -> Stat | None:
        try:
            stat = os.stat(self._base + path)  # noqa: PTH116 - a Path cannot hold every name
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def read(self, path: bytes) -> tuple[bytes, Stat]:
        if self._real is not None and not self._is_inside(self._base + path):
            raise ImageError(code="unreadable", message="a symbolic link that leaves the root (--follow-symlinks follows it)")
        return read_file(self._base + path)

    def _is_inside(self, path: bytes) -> bool:
        folder = path.rpartition(b"/")[0]
        if folder not in self._inside:
            self._inside[folder] = self._holds(folder)
        return self._inside[folder] and (not os.path.islink(path) or self._holds(path))  # noqa: PTH114

    def _holds(self, path: bytes) -> bool:
        assert self._real is not None
        return os.path.commonpath([self._real, os.path.realpath(path)]) == self._real


@dataclass(frozen=True)
class Located:
    """One sample and the files it is read from; used in place of a `Path`."""

    files: Files
    path: bytes

    def read_bytes(self) -> bytes:
        """Its content; raises as `Files.read`."""
        return self.files.read(self.path)[0]

    def __str__(self) -> str:
        return display(self.path)


def read_file(path: bytes | str) -> tuple[bytes, Stat]:
    """Content and (size, mtime_ns, inode) of a regular file.

    Raises:
        ImageError: code ``not_found``, ``unreadable``, or ``too_large`` for more than a decoder accepts.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            stat = os.fstat(file.fileno())
            if not S_ISREG(stat.st_mode):  # a pipe or a device may give nothing, or never end
                raise ImageError(code="unreadable", message="not a regular file")
            if stat.st_size > MAX_BYTES:
                message = f"{stat.st_size / 2**20:.0f} MiB; the limit is {MAX_BYTES // 2**20} MiB"
                raise ImageError(code="too_large", message=message)
            return file.read(), (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except FileNotFoundError as error:
        raise ImageError(code="not_found", message="no such file") from error
    except OSError as error:
        raise ImageError(code="unreadable", message=error.strerror or str(error)) from error
