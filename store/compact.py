"""A cache as one self-contained HDF5 file, for MATLAB, HDFView and archives; and the removal of unused features."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from store.format import atomic, hdf5, output, shard
from store.format.compact_file import ENCODING_TYPE
from store.format.metadata import shard_paths
from store.format.samples import SampleTable
from store.progress.stages import Stage, staged

from .cache import FeatureCache
from .errors import BadDataError
from .writer import open_writer, without_copies

log = logging.getLogger("penult.store")


@staged("writing the compact file")
def write_compact(cache: FeatureCache, out: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> int:
    """Write a cache as one file, which every reading command accepts in place of the folder.

    Removed images are left out, and all views but the first, so that features and labels match row by row.

    Args:
        cache: the cache; the file is built in memory, which takes about three times its size in ``dtype``.
        out: the file.
        dtype: ``float32``, which MATLAB and HDFView read, or ``float16``.
        overwrite: replace an existing file.

    Returns:
        Number of rows of ``features``.

    Raises:
        OutputExistsError: the file exists, or is a part of the cache.
        BadDataError: float16 cannot hold the values.
        CorruptCacheError: the cache's backbone is not the one that made its features.
        LockedError: another run has replaced the cache meanwhile, or writes the file.
        StorageError: it cannot be written.

    >>> import store
    >>> store.write_compact(store.FeatureCache("pets.cache"), "pets.h5")
    30
    >>> store.FeatureCache("pets.h5")
    <FeatureCache pets.h5: 30 images, labels cat, dog, features of 'last'>
    """
    out = Path(out)
    if cache.path.is_dir():
        atomic.require_no_part_of(cache.path, out)
    with output.written(out, overwrite=overwrite):
        data, rows = _compacted(cache, out, dtype)
        atomic.commit(out, data)
    return rows


def _compacted(cache: FeatureCache, out: Path, dtype: str) -> tuple[bytes, int]:
    """The content of the compact file ``out``, and its number of rows of ``features``."""
    good = cache.rows()
    features = cache.features([row.sha256 for row in good]).astype(np.float32)
    if dtype == "float16" and not (fits := shard.fits_float16(features)).all():
        message = f"float16 would not hold {int((~fits).sum())} of {len(fits)} rows; use --dtype float32"
        raise BadDataError(message)
    if cache.views > 1:
        log.info("%s has the first of %d views of each image, the one without augmentation", out, cache.views)
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
    return hdf5.build(ENCODING_TYPE, datasets, attrs)[0], len(good)


def prune(path: Path) -> tuple[int, int]:
    """Remove the features of images that are no longer in the sample table, under the writer's lock.

    New shards are committed before old ones are removed, so a crash in between loses nothing, and the next writer finds what it
    leaves twice.

    Returns:
        Rows removed, and rows kept.

    Raises:
        LockedError: another run writes the cache.
        CorruptCacheError: a shard is damaged; nothing of it is removed.
    """
    with open_writer(path):
        cache = FeatureCache(path)
        referenced = {row.sha256 for row in cache.rows()}
        removed = kept = 0
        number = max((int(p.name.partition("-")[0]) for p in shard_paths(path)), default=-1) + 1
        sets = [(without_copies(each.shards), each.fingerprint) for each in map(cache.with_layer, cache.layers)]
        every = [(old, fingerprint) for shards, fingerprint in sets for old in shards]
        with Stage("removing unused features", len(every), "shards") as stage:
            for old, fingerprint in stage.each(every):
                digests = old.digests()
                keep = np.array([digest in referenced for digest in digests], bool)
                kept += int(keep.sum())
                removed += int((~keep).sum())
                if keep.all():
                    continue
                shard.require_sound(old)
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
        atomic.fsync_directory(path / "shards")
    return removed, kept
