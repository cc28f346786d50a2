"""A shard: one immutable HDF5 file of features, keyed by the SHA-256 of the image files they came from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import CorruptCacheError
from store.fingerprint import Fingerprint

from . import atomic, hdf5

ENCODING_TYPE = "penult-shard"
NAME = re.compile(r"(\d{5,})-[0-9a-f]{12}\.h5")
WIDEN = 128  # rows at once: intermediate results stay in the processor's cache
MAX_ROUNDING = 5e-4  # relative L2 of a row stored as float16, see docs/regression.md


@dataclass(frozen=True)
class Shard:
    """The index of a shard: all that is known of it without reading its features.

    Attributes:
        path: its file.
        sha256: keys of the rows, ``(n,)`` of dtype ``S32``.
        dim: length of a feature vector.
        views: feature vectors of each row, one after the other in the file.
        dtype: float16 or float32.
        fingerprint: canonical JSON.
        offset: where the features begin in the file, bytes; they are stored row by row, uncompressed.
        state: inode, size and time of the file when it was opened; rows of a replaced file are not read.
        encoding_type: of the file; a compact file is read like one shard.
    """

    path: Path
    sha256: NDArray[np.bytes_]
    dim: int
    dtype: np.dtype[Any]
    fingerprint: str
    offset: int
    state: tuple[int, int, int]
    encoding_type: str = ENCODING_TYPE
    views: int = 1

    def vectors(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """The numbers of all the vectors of some rows, as `read_rows` takes them."""
        return (rows[:, None] * self.views + np.arange(self.views, dtype=rows.dtype)).ravel()

    def digests(self) -> list[bytes]:
        """The keys as 32 bytes each (NumPy strips the zeros that end an ``S32``)."""
        raw = self.sha256.tobytes()
        return [raw[i : i + 32] for i in range(0, len(raw), 32)]


def fits_float16(features: NDArray[np.float32]) -> NDArray[np.bool_]:
    """For each row of ``(n, d)`` float32, whether float16 keeps it to a relative L2 error of `MAX_ROUNDING`.

    See rule 11 of store/FORMAT.md.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # infinity minus infinity is NaN, which does not fit
        rounded = features.astype(np.float16).astype(np.float32)
        error = np.linalg.norm((rounded - features).astype(np.float64), axis=1)
    norm = np.linalg.norm(features.astype(np.float64), axis=1)
    return np.asarray(np.isfinite(rounded).all(axis=1) & (error <= MAX_ROUNDING * norm))


def as_stored(features: NDArray[np.float32], storage: str) -> NDArray[np.float32]:
    """Features ``(n, d)`` rounded as a cache with this ``storage`` does, to compare features that were never cached."""
    if storage != "auto":
        return features
    fits = fits_float16(features)
    rounded = features.copy()
    rounded[fits] = features[fits].astype(np.float16)
    return rounded


def write_shard(
    directory: Path,
    number: int,
    features: NDArray[np.floating[Any]],
    sha256: Sequence[bytes],
    paths: Sequence[bytes],
    fingerprint: Fingerprint,
) -> Path:
    """Commit one shard.

    Args:
        directory: the cache's ``shards`` folder.
        number: its place in the order of writing.
        features: ``(n, d)``, or ``(n, views, d)``, float16 or float32, finite.
        sha256: n digests of 32 bytes.
        paths: n relative paths.
        fingerprint: of all rows.

    Raises:
        StorageError: the disk is full or failed; no partial shard is left.
    """
    datasets = {
        "features": np.ascontiguousarray(features),
        "sha256": np.frombuffer(b"".join(sha256), np.uint8).reshape(len(sha256), 32),
        **hdf5.pack_strings("path", paths),
    }
    data, digest = hdf5.build(ENCODING_TYPE, datasets, {"rows": len(sha256), "fingerprint": fingerprint.canonical})
    path = directory / f"{number:05d}-{digest[:12]}.h5"
    atomic.commit(path, data)
    return path


def read_shard(path: Path) -> Shard:
    """Read the index of a shard.

    Raises:
        CorruptCacheError: the file is damaged or refused.
    """
    with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, attrs):
        features, keys, text = datasets["features"], datasets["sha256"], str(attrs["fingerprint"])
        n, views = int(attrs["rows"]), Fingerprint.parse(text).views
        shape = (n,) if views == 1 else (n, views)
        fits = features.shape[:-1] == shape and (features.shape[-1] or not n)
        if views < 1 or not fits or keys.shape != (n, 32) or keys.dtype != np.uint8:
            each = f" of {views} views" if views != 1 else ""
            message = f"{path}: features {features.shape} and keys {keys.shape} do not fit {n} rows{each}"
            raise CorruptCacheError(message)
        if features.dtype not in (np.float16, np.float32):
            message = f"{path}: features have type {features.dtype}"
            raise CorruptCacheError(message)
        sha256 = keys[()].view("S32").reshape(n)
        state = state_of(hdf5.descriptor(features))
        return Shard(path, sha256, features.shape[-1], features.dtype, text, hdf5.offset(features), state, views=views)


def require_sound(shard: Shard, *, digest: bool = True) -> None:
    """Read a shard completely: it must be what was written, and hold neither NaN nor infinity.

    Args:
        shard: its index.
        digest: compare its payload digest; not needed where that was done.

    Raises:
        InputMissingError: it is gone.
        CorruptCacheError: it is damaged, or a number is not finite.
    """
    if digest:
        hdf5.verify(shard.path, shard.encoding_type)
    exponent = 0x7C00 if shard.dtype == np.float16 else 0x7F800000  # all its bits are set in NaN and infinity alone
    with hdf5.open_checked(shard.path, shard.encoding_type) as (datasets, _):
        features = datasets["features"]
        rows = max(hdf5.BLOCK // max(shard.views * shard.dim * shard.dtype.itemsize, 1), 1)
        for begin in range(0, len(features), rows):
            bits = features[begin : begin + rows].view(np.uint16 if shard.dtype == np.float16 else np.uint32)
            if ((bits & exponent) == exponent).any():
                message = f"{shard.path} has NaN or infinity among its features, which are finite in a sound shard"
                raise CorruptCacheError(message)


def state_of(file: Path | int) -> tuple[int, int, int]:
    """Inode, size and time of a file, by its path or descriptor; a replaced or changed file differs in them."""
    stat = os.stat(file)  # noqa: PTH116 - of a descriptor too
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_rows(shard: Shard, rows: NDArray[np.integer[Any]]) -> NDArray[np.floating[Any]]:
    """Read some feature vectors, ``(len(rows), d)`` in the shard's dtype and the order of ``rows``.

    With views, view v of row i is vector ``i * views + v``. The file is read directly: opening a shard with HDF5 takes several
    times as long as reading it, which matters if each step of a fit reads a million rows.

    Raises:
        CorruptCacheError: the file is gone, or was replaced since the shard was opened.
    """
    if not len(rows):
        return np.empty((0, shard.dim), shard.dtype)
    first, last, width = int(rows.min()), int(rows.max()), shard.dim * shard.dtype.itemsize
    try:
        with shard.path.open("rb", buffering=0) as file:
            if state_of(file.fileno()) != shard.state:
                message = "it was replaced or changed since it was opened"
                raise ValueError(message)
            if len(rows) * 4 > last - first + 1:
                file.seek(shard.offset + first * width)
                span = np.fromfile(file, shard.dtype, (last - first + 1) * shard.dim).reshape(-1, shard.dim)
                return span if len(span) == len(rows) and (np.diff(rows) == 1).all() else span[rows - first]
            out = np.empty((len(rows), shard.dim), shard.dtype)
            for i, row in enumerate(rows.tolist()):
                file.seek(shard.offset + row * width)
                out[i] = np.fromfile(file, shard.dtype, shard.dim)
            return out
    except (OSError, ValueError, IndexError) as error:
        message = f"{shard.path} cannot be read any more ({error}); the same extract command computes what is missing"
        raise CorruptCacheError(message) from error


def widen(features: NDArray[np.floating[Any]], out: NDArray[np.float32]) -> None:
    """Convert finite float16 or float32 to float32, exactly; float16 ten times as fast as NumPy, which goes number by number.

    A float16 shifted by 13 bits is a float32 whose exponent is 112 too small; the sign has been copied on the way.
    """
    if features.dtype != np.float16:
        out[:] = features
        return
    for begin in range(0, len(features), WIDEN):
        bits = features[begin : begin + WIDEN].view(np.int16).astype(np.int32)
        bits <<= 13
        bits &= ~0x70000000
        np.multiply(bits.view(np.float32), np.float32(2.0**112), out=out[begin : begin + WIDEN])
