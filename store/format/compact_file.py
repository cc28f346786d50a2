"""The reader of compact files: one self-contained HDF5 file, opened as a cache of one shard; `compact` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from store.errors import CorruptCacheError, InputMissingError
from store.fingerprint import Fingerprint

from . import hdf5, shard
from .metadata import require_description

ENCODING_TYPE = "penult-compact"


def open_compact(path: Path) -> tuple[shard.Shard, dict[str, Any]]:
    """Open a compact file as one shard, with the content that cache.json would have.

    Raises:
        CorruptCacheError: its parts do not fit together.
    """
    with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, attrs):
        features, m = datasets["features"], int(attrs["feature-rows"])
        keys = datasets["sha256"][()][:m]
        fits = features.ndim == 2 and features.shape[0] == len(keys) == m and (features.shape[1] or not m)
        if not fits or keys.shape != (m, 32) or features.dtype not in (np.float16, np.float32):
            message = f"{path}: features {features.shape} of type {features.dtype} do not fit {m} rows"
            raise CorruptCacheError(message)
        fingerprint = Fingerprint.parse(str(attrs["fingerprint"])).single
        sha256 = np.ascontiguousarray(keys).view("S32").reshape(m)
        begin = hdf5.offset(features)
        state = shard.state_of(hdf5.descriptor(features))
        whole = shard.Shard(path, sha256, features.shape[1], features.dtype, fingerprint.canonical, begin, state, ENCODING_TYPE)
        meta = {"format": 1, "fingerprint": fingerprint.fields, "facts": json.loads(str(attrs["cache"]))}
        require_description(meta, str(path))
        return whole, meta


def read_backbone(path: Path) -> bytes:
    """The ONNX file inside a compact file.

    Raises:
        InputMissingError: it was too large to be included.
    """
    with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, _):
        data = bytes(datasets["backbone-onnx"][()].tobytes())
    if not data:
        message = f"{path} was written without its backbone, which is over 2 GB; use the cache folder that it was made from"
        raise InputMissingError(message)
    return data
