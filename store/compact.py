"""One self-contained HDF5 file of a cache, for MATLAB, HDFView and the archive; and pruning what no sample refers to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import hdf5, shard
from .errors import BadDataError, CorruptCacheError, InputMissingError, OutputExistsError
from .fingerprint import Fingerprint
from .samples import SampleTable

if TYPE_CHECKING:
    from .cache import FeatureCache

log = logging.getLogger("penult.store")

ENCODING_TYPE = "penult-compact"
DTYPES = ("float32", "float16")


def write_compact(cache: FeatureCache, out: Path, *, dtype: str = "float32", overwrite: bool = False) -> int:
    """Write a cache as one file; every reading command takes it in place of the folder. Removed images are left out, and all
    views but the first: row by row, features and labels go together.

    Args:
        cache: the cache; it is built in memory, about three times its size in ``dtype``.
        out: the file.
        dtype: ``float32``, which MATLAB and HDFView read, or ``float16``.
        overwrite: replace an existing file.

    Returns:
        Number of rows of ``features``.

    Raises:
        OutputExistsError: the file exists.
        BadDataError: float16 would not hold the values.
        CorruptCacheError: the cache's backbone is not the one that made its features.
        LockedError: another run has replaced the cache meanwhile.
        StorageError: it cannot be written.
    """
    if out.exists() and (not overwrite or not out.is_file()):
        message = f"{out} exists; choose another name or pass --overwrite"
        raise OutputExistsError(message)
    good = cache.rows()
    features = cache.features([row.sha256 for row in good]).astype(np.float32)
    if dtype == "float16" and not (fits := shard.fits_float16(features)).all():
        message = f"float16 would not hold {int((~fits).sum())} of {len(fits)} rows; use --dtype float32"
        raise BadDataError(message)
    if cache.views > 1:
        log.info("%s has the first of %d views of each image, the image as it is", out, cache.views)
    failed = [row for row in cache.samples.rows if not row.ok]
    whole = "backbone_data" not in cache.meta["facts"]
    onnx = np.frombuffer(cache.read_backbone() if whole else b"", np.uint8)
    if not whole:
        log.warning(
            "the backbone of %s is over 2 GB and is left out of %s: heads trained on it cannot be saved", cache.path, out
        )
    table = SampleTable([*good, *failed], cache.samples.facts, cache.samples.target_names)
    datasets = {**table.datasets(), "features": features.astype(dtype), "backbone-onnx": onnx}
    attrs: dict[str, str | int] = {
        "rows": len(table.rows),
        "feature-rows": len(good),
        "facts": json.dumps(table.facts, sort_keys=True),
        "fingerprint": cache.fingerprint.single.canonical,
        "cache": json.dumps(cache.meta["facts"], sort_keys=True),
    }
    hdf5.commit(out, hdf5.build(ENCODING_TYPE, datasets, attrs)[0])
    return len(good)


def open_compact(path: Path) -> tuple[shard.Shard, dict[str, Any]]:
    """A compact file as one shard, and what cache.json would say.

    Raises:
        CorruptCacheError: its parts do not fit together.
    """
    with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, attrs):
        features, m = datasets["features"], int(attrs["feature-rows"])
        keys = datasets["sha256"][()][:m]
        if features.ndim != 2 or features.shape[0] != m or len(keys) != m or features.dtype not in (np.float16, np.float32):
            message = f"{path}: features {features.shape} of type {features.dtype} do not fit {m} rows"
            raise CorruptCacheError(message)
        fingerprint = Fingerprint.parse(str(attrs["fingerprint"])).single
        sha256 = np.ascontiguousarray(keys).view("S32").reshape(m)
        begin = hdf5.offset(features)
        whole = shard.Shard(path, sha256, features.shape[1], features.dtype, fingerprint.canonical, begin, ENCODING_TYPE)
        return whole, {"format": 1, "fingerprint": fingerprint.fields, "facts": json.loads(str(attrs["cache"]))}


def read_backbone(path: Path) -> bytes:
    """The ONNX file inside a compact file.

    Raises:
        InputMissingError: it was too large to be put there.
    """
    with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, _):
        data = bytes(datasets["backbone-onnx"][()].tobytes())
    if not data:
        message = f"{path} was written without its backbone, which is over 2 GB; use the cache folder that it was made from"
        raise InputMissingError(message)
    return data


def prune(path: Path) -> tuple[int, int]:
    """Remove the features of images that are no longer in the sample table, under the writer's lock.

    New shards are committed before old ones are removed, so a crash in between leaves duplicates and no loss.

    Returns:
        Rows removed, and rows kept.

    Raises:
        LockedError: another run writes the cache.
        CorruptCacheError: a shard is damaged; nothing of it is removed.
    """
    from .cache import FeatureCache, shard_paths
    from .writer import open_writer

    with open_writer(path):
        cache = FeatureCache(path)
        wanted = {row.sha256 for row in cache.rows()}
        removed = kept = 0
        number = max((int(p.name.partition("-")[0]) for p in shard_paths(path)), default=-1) + 1
        for old, fingerprint in [(s, each.fingerprint) for each in map(cache.with_layer, cache.layers) for s in each.shards]:
            digests = old.digests()
            keep = np.array([digest in wanted for digest in digests], bool)
            kept += int(keep.sum())
            removed += int((~keep).sum())
            if keep.all():
                continue
            hdf5.verify(old.path, shard.ENCODING_TYPE)
            if keep.any():
                with hdf5.open_checked(old.path, shard.ENCODING_TYPE) as (datasets, _):
                    names = hdf5.unpack_strings(datasets, "path")
                places = np.flatnonzero(keep)
                features = shard.read_rows(old, old.vectors(places))
                features = features.reshape(len(places), old.views, -1) if old.views > 1 else features
                chosen = places.tolist()
                parts = ([digests[i] for i in chosen], [names[i] for i in chosen])
                shard.write_shard(path / "shards", number, features, *parts, fingerprint)
                number += 1
            old.path.unlink()
        hdf5.fsync_directory(path / "shards")
    return removed, kept
