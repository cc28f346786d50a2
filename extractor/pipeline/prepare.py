"""Preparation of a cache's backbone: export, conversion, notes for the next run, and the fingerprints of its features."""

from __future__ import annotations

import json
import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from extractor.backbones.custom_onnx import say_warnings
from extractor.backbones.export import obtain
from extractor.backbones.model_config import stated_by
from extractor.backbones.registry import Backbone
from extractor.graphs.backbone_facts import BackboneFacts, read_facts
from extractor.graphs.graph import keep_zero_padding
from extractor.graphs.onnx_file import data_files, digest, install, read_model, remove, remove_unfinished
from extractor.machine import Clock, new_clock, timed, versions_of
from extractor.pixels.pixel_drift import libraries
from extractor.pixels.views import Views
from extractor.precision.calibration import without
from extractor.precision.registry import ROWS, Conversion, Precision
from extractor.signals import StopFlag
from store.errors import PenultError
from store.fingerprint import Fingerprint, file_digest, require_same
from store.format import atomic
from store.format.calibration import Calibration, write_calibration
from store.format.metadata import BACKBONE, all_fingerprints
from store.writer import CacheWriter

log = logging.getLogger("penult.extractor")

OBTAINING = {"exported": "export", "imported": "import", "store": "copy"}  # stages, by where the file is from
NOTES = ("request", "backbone_sha256", "weights", "source", "backbone_data", "calibration", "look")
LIBRARIES = ("penult", "torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "h5py", "numpy", "pillow")


def prepare_backbone(
    writer: CacheWriter,
    backbone: Backbone,
    *,
    overwrite: bool = False,
    stop: StopFlag | None = None,
    precision: Precision = ROWS[0],
    conversion: Conversion | None = None,
    clock: Clock | None = None,
) -> tuple[BackboneFacts, dict[str, Any], str]:
    """Put ``backbone.onnx`` into a cache; keep the one there, without importing torch, if it matches the request.

    Args:
        writer: of the cache.
        backbone: the request.
        overwrite: replace the backbone and features that are there.
        stop: ends an export.
        precision: of the features.
        conversion: makes it of a float32 file; called once in the life of a cache if the precision is made ``once``.
        clock: gets the seconds of the stages in `OBTAINING`, and ``convert``.

    Returns:
        The facts that the file records; notes for cache.json by which the next run recognises the request; and where the file
        is from: the ``cache``, or as `obtain` says.
    """
    path, clock = writer.path / BACKBONE, new_clock() if clock is None else clock
    remove_unfinished(path)
    request = backbone.facts()
    file = Path(backbone.name) if backbone.is_file else backbone.weights_file
    if file is not None:
        request["file_sha256"] = digest(file) if backbone.is_file else file_digest(file)
        request["weights"] = None  # the content counts, not the path
        if backbone.is_file:
            request |= {"name": "onnx", "sidecar": stated_by(file, {}).settings}
    elif backbone.seed is None:
        request["torchvision"] = version("torchvision")  # it decides what the default weights are
    if conversion:
        request["precision"] = precision.name
    request = json.loads(json.dumps(request))
    before = {} if overwrite else (writer.meta or {}).get("facts", {})
    same = path.is_file() and before.get("request") == request
    if (
        same
        and before.get("backbone_sha256") == _recorded_digest(path, before)
        and not _from_before_zero_padding(path, backbone)
    ):
        log.info("using %s as exported before", path)
        facts = read_facts(path)
        say_warnings(facts)
        return facts, {key: before[key] for key in NOTES if key in before}, "cache"
    if backbone.seed is not None:
        log.warning(
            "RANDOM WEIGHTS (seed %d): %s is untrained, its features are a random projection", backbone.seed, backbone.name
        )
    # A cache keeps its file and its features until the new file is complete, and matches them or is meant to replace them.
    new, converted = atomic.temporary(path), atomic.temporary(path)
    calibration: Calibration | None = None
    try:
        began = time.perf_counter()
        facts, origin = obtain(backbone, new, stop)
        clock[OBTAINING[origin]] += time.perf_counter() - began
        frozen = _frozen(path, before, facts, precision) if precision.once and not overwrite else None
        if conversion and not frozen and facts.precision == "fp32":
            if precision.once and not overwrite:
                _require_precision(writer, precision)
            with timed(clock, "convert"):
                facts, calibration = conversion(new, converted, facts)
            converted.replace(new)
        if overwrite:
            writer.clear()
        _require_match(writer, frozen or facts)
        if calibration:
            write_calibration(writer.path, calibration)
    except BaseException:
        remove_unfinished(path)
        raise
    if frozen:
        remove(new)
        facts = frozen
    else:
        install(new, path)
    for layer in facts.layers if origin != "store" else ():
        pooling = "" if layer.pooling == "none" else f" ({layer.pooling})"
        log.info("exported %s (%s), %d features: %s%s", facts.name, facts.weights, layer.dim, layer.layer, pooling)
    data = data_files(path)
    notes: dict[str, Any] = {
        "request": request,
        "backbone_sha256": file_digest(path, *data),
        "weights": facts.weights,
        "source": facts.source,
    }
    if data:
        notes["backbone_data"] = [file.name for file in data]
    if facts.calibration:
        notes["calibration"] = facts.calibration
    return facts, notes, origin


def _from_before_zero_padding(path: Path, backbone: Backbone) -> bool:
    """Whether a cache's custom network pads a max pooling with zeros, and was imported before that was kept."""
    return (
        backbone.is_file
        and not read_facts(path).zero_padded_pooling
        and keep_zero_padding(read_model(path))  # of a copy in memory
    )


def _recorded_digest(path: Path, notes: dict[str, Any]) -> str | None:
    """`digest` of a cache's backbone; the names of its external data come from the notes, not from the file."""
    try:
        return file_digest(path, *(path.with_name(name) for name in notes.get("backbone_data", [])))
    except PenultError:  # its external data is missing: the backbone is exported again
        return None


def _frozen(path: Path, notes: dict[str, Any], facts: BackboneFacts, precision: Precision) -> BackboneFacts | None:
    """The facts of the cache's converted file, if it was made from this float32 file: it is calibrated only once."""
    if not path.is_file() or notes.get("backbone_sha256") not in (None, _recorded_digest(path, notes)):
        return None
    try:
        facts_before = read_facts(path)
    except PenultError:  # damaged
        return None
    same = facts_before.precision == precision.name and without(facts_before).fingerprints() == facts.fingerprints()
    return facts_before if same else None


def _require_precision(writer: CacheWriter, precision: Precision) -> None:
    """Refuse a cache of another precision before a calibration, which takes a minute.

    Raises:
        FingerprintMismatchError: the cache holds features of another precision.
    """
    if writer.meta is not None:
        there = Fingerprint(writer.meta["fingerprint"])
        if there.fields.get("precision") != precision.name:
            now = Fingerprint({**there.fields, "precision": precision.name})
            require_same([there], [now], mine=str(writer.path), theirs="this run")


def _require_match(writer: CacheWriter, facts: BackboneFacts) -> None:
    """Refuse a backbone that does not give the features in the cache.

    Raises:
        FingerprintMismatchError: it gives other features; the cache stays as it was.
    """
    if writer.meta is not None:
        there = [Fingerprint(fields) for fields in all_fingerprints(writer.meta)]
        shared = {name: value for name, value in there[0].fields.items() if name != "calibration"} | {"precision": "fp32"}
        now = [Fingerprint({**shared, **fields}) for fields in facts.fingerprints()]
        require_same(there, now, mine=str(writer.path), theirs="this run")


def fingerprints(
    facts: BackboneFacts, provider: str, storage: str, *, tf32: bool = False, views: Views | None = None
) -> list[Fingerprint]:
    """The fingerprint of each feature set: everything that decides its numbers."""
    decided: dict[str, Any] = {"precision": "fp32", "provider": provider, "tf32": tf32, "storage": storage}
    decided |= {"views": views.fingerprint(facts.preprocess)} if views else {}
    return [Fingerprint({**decided, **fields}) for fields in facts.fingerprints()]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    return {**versions_of(LIBRARIES), **libraries()}
