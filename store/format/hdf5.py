"""Untrusted HDF5 files: built in memory, checked before any data is read (rules 4 and 6 to 9 of FORMAT.md)."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from store.errors import CorruptCacheError, InputMissingError, PenultError, require_format

Array = NDArray[Any]
ENCODING_VERSION = 1
BLOCK = 16 * 2**20  # bytes of a dataset that are read at once for its digest: a compact file may be larger than the memory


def payload_sha256(datasets: Mapping[str, Any], attrs: Mapping[str, str | int]) -> str:
    """Digest of a file's whole content, independent of how HDF5 lays it out (rule 8).

    Args:
        datasets: by name, arrays or those of an open file, which are read block by block.
        attrs: all attributes of the file.
    """
    digest = hashlib.sha256()
    for name in sorted(datasets):
        data = datasets[name]
        shape = ",".join(map(str, data.shape))
        digest.update(f"{name}\0{data.dtype.str}\0{shape}\0".encode())
        rows = max(BLOCK // max(data.dtype.itemsize * math.prod(data.shape[1:]), 1), 1)
        length = len(data) if data.shape and data.size else 0
        for block in (data[i : i + rows] for i in range(0, length, rows)) if data.shape else [data[()]]:
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    for name in sorted(set(attrs) - {"payload-sha256"}):
        digest.update(f"{name}\0{attrs[name]}\0".encode())
    return digest.hexdigest()


def build(encoding_type: str, datasets: Mapping[str, Array], attrs: Mapping[str, str | int]) -> tuple[bytes, str]:
    """A complete HDF5 file as bytes, with its payload digest; nothing touches the disk.

    So an I/O error comes from ``os.write`` with its errno, not from the HDF5 library, which can die with SIGSEGV on a full
    disk.
    """
    full: dict[str, str | int] = {"encoding-type": encoding_type, "encoding-version": ENCODING_VERSION, **attrs}
    digest = payload_sha256(datasets, full)
    full["payload-sha256"] = digest
    nbytes = sum(array.nbytes for array in datasets.values())
    with h5py.File(
        f"{os.urandom(8).hex()}.h5", "w", driver="core", backing_store=False, block_size=max(nbytes, 1 << 16)
    ) as file:
        for name, array in datasets.items():
            file.create_dataset(name, data=array)
        for name, value in full.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)
        file.flush()
        return file.id.get_file_image(), digest


def _refusal(dataset: Any) -> str | None:
    """Why rule 6 forbids reading this dataset, or None."""
    plist = dataset.id.get_create_plist()
    layout = plist.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        return "is virtual (it reads other files)"
    if plist.get_external_count():
        return "has external storage (it reads other files)"
    if plist.get_nfilters() or layout == h5py.h5d.CHUNKED:
        return "is chunked or filtered"
    if dataset.dtype.kind not in "iuf" or dataset.dtype.byteorder == ">":
        return f"has type {dataset.dtype}"
    if dataset.shape is None:
        return "has no shape"
    stored = dataset.id.get_storage_size()
    declared = dataset.dtype.itemsize * int(np.prod(dataset.shape, dtype=object))
    if declared != stored:
        return f"declares {declared} bytes and stores {stored}"
    return None


def offset(dataset: Any) -> int:
    """The position in its file of the bytes of a dataset from `open_checked`; 0 if it has none."""
    return dataset.id.get_offset() or 0


def descriptor(dataset: Any) -> int:
    """The file descriptor that a dataset from `open_checked` is read by: its file may have another name by now, or none."""
    return int(dataset.file.id.get_vfd_handle())


@contextmanager
def open_checked(path: Path, encoding_type: str) -> Iterator[tuple[dict[str, Any], dict[str, str | int]]]:
    """Open a file of the cache for reading after checking that it cannot read other files.

    Yields:
        Its datasets by name (``h5py.Dataset``, unread) and its attributes. Both are valid until the context ends.

    Raises:
        InputMissingError: there is no such file.
        CorruptCacheError: it is not HDF5, is damaged, breaks rule 6 or 7, or is of a newer format.
    """
    if not path.is_file():
        message = f"{path} does not exist"
        raise InputMissingError(message)
    try:
        # Without HDF5's own file locks: they fail on read-only and some network file systems, and a shard never changes.
        with h5py.File(path, "r", locking=False) as file:
            attrs = {name: _attribute(file, name) for name in file.attrs}
            if attrs.get("encoding-type") != encoding_type:
                message = f"{path} is not a {encoding_type} file (encoding-type: {attrs.get('encoding-type')!r})"
                raise CorruptCacheError(message)
            require_format(path, attrs.get("encoding-version"), ENCODING_VERSION)
            datasets = {}
            for name in file:
                if type(file.get(name, getlink=True)) is not h5py.HardLink:
                    message = f"{path}: {name!r} is a link to another object or file; refused"
                    raise CorruptCacheError(message)
                item = file[name]
                if isinstance(item, h5py.Dataset):
                    reason = _refusal(item)
                    if reason:
                        message = f"{path}: dataset {name!r} {reason}; refused"
                        raise CorruptCacheError(message)
                    datasets[name] = item
            yield datasets, attrs
    except PenultError:
        raise
    except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message = f"{path} is damaged: {error}"
        raise CorruptCacheError(message) from error


def _attribute(file: Any, name: str) -> str | int:
    kind = file.attrs.get_id(name)
    if kind.shape != () or kind.dtype.kind not in "Siu":
        message = f"attribute {name!r} has type {kind.dtype} and shape {kind.shape}"
        raise TypeError(message)
    value = file.attrs[name]
    return value.decode() if isinstance(value, bytes) else int(value)


def verify(path: Path, encoding_type: str) -> None:
    """Read a file completely and compare its payload digest.

    Raises:
        CorruptCacheError: the content is not what was written.
    """
    with open_checked(path, encoding_type) as (datasets, attrs):
        digest = payload_sha256(datasets, attrs)
        if digest != attrs.get("payload-sha256"):
            recorded = str(attrs.get("payload-sha256"))
            message = f"{path} is damaged: its payload is {digest[:12]}.., it was written as {recorded[:12]}.."
            raise CorruptCacheError(message)


def pack_strings(name: str, strings: Sequence[bytes]) -> dict[str, Array]:
    """A list of byte strings as the two datasets of rule 9."""
    offsets = np.zeros(len(strings) + 1, np.int64)
    np.cumsum([len(s) for s in strings], out=offsets[1:])
    return {name: np.frombuffer(b"".join(strings), np.uint8), f"{name}-offsets": offsets}


def unpack_strings(datasets: Mapping[str, Any], name: str) -> list[bytes]:
    """Inverse of `pack_strings`.

    Raises:
        CorruptCacheError: the offsets do not describe the blob.
    """
    blob = datasets[name][()].tobytes()
    offsets = datasets[f"{name}-offsets"][()]
    if offsets.ndim != 1 or offsets.size < 1 or offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) < 0).any():
        message = f"the offsets of {name!r} do not fit its {len(blob)} bytes"
        raise CorruptCacheError(message)
    bounds = offsets.tolist()
    return [blob[a:b] for a, b in itertools.pairwise(bounds)]
