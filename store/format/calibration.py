"""The calibration file of an int8 cache: float and int8 features of the same training images, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.errors import CorruptCacheError

from . import atomic, hdf5, json_text

ENCODING_TYPE = "penult-calibration"
NAME = "calibration.h5"


@dataclass(frozen=True)
class Calibration:
    """Features of the images that an int8 backbone was calibrated and judged on, from both networks.

    Attributes:
        calibration: digest of the calibration, as in the fingerprint.
        layers: the layer of each feature set.
        sha256: content digest of each image, 32 bytes.
        exact, rounded: float32 features ``(n, d)`` of each feature set, by the float and by the int8 network.
    """

    calibration: str
    layers: Sequence[str]
    sha256: Sequence[bytes]
    exact: Sequence[NDArray[np.float32]]
    rounded: Sequence[NDArray[np.float32]]


def encode_calibration(calibration: Calibration) -> bytes:
    """The content of a calibration file."""
    datasets = {"sha256": np.frombuffer(b"".join(calibration.sha256), np.uint8).reshape(len(calibration.sha256), 32)}
    for i, (exact, rounded) in enumerate(zip(calibration.exact, calibration.rounded, strict=True)):
        datasets |= {f"fp32-{i}": np.ascontiguousarray(exact), f"int8-{i}": np.ascontiguousarray(rounded)}
    attrs: dict[str, str | int] = {"rows": len(calibration.sha256), "layers": json.dumps(list(calibration.layers))}
    return hdf5.build(ENCODING_TYPE, datasets, {**attrs, "calibration": calibration.calibration})[0]


def write_calibration(cache: Path, calibration: Calibration) -> None:
    """Write the calibration file of a cache.

    Raises:
        StorageError: the disk is full or failed.
    """
    atomic.commit(cache / NAME, encode_calibration(calibration))


def read_calibration(cache: Path) -> Calibration:
    """Read the calibration file of a cache.

    Raises:
        InputMissingError: there is none.
        CorruptCacheError: it is damaged.
    """
    path = cache / NAME
    with hdf5.open_checked(path, ENCODING_TYPE) as (datasets, attrs):
        arrays = {name: dataset[()] for name, dataset in datasets.items()}
        if hdf5.payload_sha256(arrays, attrs) != attrs.get("payload-sha256"):
            message = f"{path} is damaged: its payload is not what was written"
            raise CorruptCacheError(message)
        layers = json.loads(str(attrs["layers"]))
        raw = arrays["sha256"].tobytes()
        keys = [raw[i : i + 32] for i in range(0, len(raw), 32)]
        reason = json_text.misfit(layers, [str], "layers")
        if not reason and arrays["sha256"].shape != (len(keys), 32):
            reason = f"its digests have shape {arrays['sha256'].shape}"
        if reason:
            message = f"{path}: {reason}"
            raise CorruptCacheError(message)
        exact, rounded = ([arrays[f"{kind}-{i}"] for i in range(len(layers))] for kind in ("fp32", "int8"))
        for a, b in zip(exact, rounded, strict=True):
            if a.shape != b.shape or a.ndim != 2 or len(a) != len(keys) or not (np.isfinite(a) & np.isfinite(b)).all():
                message = f"{path}: features {a.shape} and {b.shape} are not finite, or do not fit {len(keys)} images"
                raise CorruptCacheError(message)
        return Calibration(str(attrs["calibration"]), layers, keys, exact, rounded)
