"""``SHA256SUMS``: the digest of every file of a bundle, one line each, as ``sha256sum -c SHA256SUMS`` reads them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from store.errors import BadDataError

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0\r\n]+)")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path) -> bytes:
    """The content of ``SHA256SUMS`` for all other files of a folder, in the order of their names."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names).encode()


def read_sums(folder: Path) -> dict[str, str] | None:
    """The digest of each file, by name; None if there is no ``SHA256SUMS``, as in bundles of earlier versions.

    Raises:
        BadDataError: a line is none.
    """
    try:
        text = (folder / SUMS).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    lines = [LINE.fullmatch(line) for line in text.splitlines()]
    if None in lines:
        message = f"{folder / SUMS}: line {lines.index(None) + 1} is not a digest and the name of a file"
        raise BadDataError(message)
    return {match[2]: match[1] for match in lines if match}
