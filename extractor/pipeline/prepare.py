"""Put a backbone into a cache, and say everything that decides its numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from extractor.backbones.export import export
from extractor.backbones.onnx_input import read_sidecar
from extractor.backbones.registry import Backbone
from extractor.graphs.backbone_facts import BackboneFacts, read_facts
from extractor.graphs.onnx_file import data_files, digest, install, remove, remove_unfinished
from extractor.pixels.pixel_drift import libraries
from extractor.pixels.views import Views
from extractor.precision.calibration import without
from extractor.precision.float16 import halve
from extractor.progress import StopFlag
from store.errors import PenultError
from store.fingerprint import Fingerprint, file_digest, require_same
from store.format import atomic
from store.format.calibration import Calibration, write_calibration
from store.format.metadata import BACKBONE, all_fingerprints
from store.writer import CacheWriter

log = logging.getLogger("penult.extractor")

NOTES = ("request", "backbone_sha256", "weights", "source", "backbone_data", "calibration")
Quantise = Callable[[Path, Path, BackboneFacts], tuple[BackboneFacts, Calibration]]
LIBRARIES = ("penult", "torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "h5py", "numpy", "pillow")


def prepare_backbone(
    writer: CacheWriter,
    backbone: Backbone,
    *,
    overwrite: bool = False,
    stop: StopFlag | None = None,
    quantise: Quantise | None = None,
    half: bool = False,
) -> tuple[BackboneFacts, dict[str, Any]]:
    """Put ``backbone.onnx`` into a cache, or recognise that the one there is what is asked for, without importing torch.

    Args:
        writer: of the cache.
        backbone: what is asked for.
        overwrite: whatever is there goes.
        stop: ends an export.
        quantise: makes the int8 form of a float file (`calibration.Calibrator`); asked for once in the life of a cache.
        half: convert the float file to float16.

    Returns:
        What the file says of itself, and notes for cache.json by which the next run recognises the request.
    """
    path = writer.path / BACKBONE
    remove_unfinished(path)
    request = backbone.facts()
    file = Path(backbone.name) if backbone.is_file else backbone.weights_file
    if file is not None:
        request["file_sha256"] = digest(file) if backbone.is_file else file_digest(file)
        request["weights"] = None  # the content counts, not where it lies
        if backbone.is_file:
            request |= {"name": "onnx", "sidecar": read_sidecar(file)}
    elif backbone.seed is None:
        request["torchvision"] = version("torchvision")  # it decides what the default weights are
    if quantise or half:
        request["precision"] = "int8" if quantise else "fp16"
    request = json.loads(json.dumps(request))
    before = {} if overwrite else (writer.meta or {}).get("facts", {})
    if path.is_file() and before.get("request") == request and before.get("backbone_sha256") == _recorded_digest(path, before):
        log.info("using %s as exported before", path)
        return read_facts(path), {key: before[key] for key in NOTES if key in before}
    if backbone.seed is not None:
        log.warning(
            "RANDOM WEIGHTS (seed %d): %s is untrained, its features are a random projection", backbone.seed, backbone.name
        )
    # A cache keeps its file, and its features, until the new file is there and known to match or meant to replace them.
    new, int8 = atomic.temporary(path), atomic.temporary(path)
    calibration: Calibration | None = None
    try:
        facts = export(backbone, new, stop)
        if half and facts.precision == "fp32":
            facts = halve(new, new, facts)
        frozen = None if overwrite or not quantise else _frozen(path, before, facts)
        if quantise and not frozen and facts.precision == "fp32":
            _require_int8(writer, overwrite=overwrite)
            facts, calibration = quantise(new, int8, facts)
            int8.replace(new)
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
    for layer in facts.layers:
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
    return facts, notes


def _recorded_digest(path: Path, notes: dict[str, Any]) -> str | None:
    """`digest` of a cache's backbone, without looking into the file for the names of its external data."""
    try:
        return file_digest(path, *(path.with_name(name) for name in notes.get("backbone_data", [])))
    except PenultError:  # its external data is gone: it is made again
        return None


def _frozen(path: Path, notes: dict[str, Any], facts: BackboneFacts) -> BackboneFacts | None:
    """The facts of the int8 file that is there, if it was made of this float one: it is calibrated once."""
    if not path.is_file() or notes.get("backbone_sha256") not in (None, _recorded_digest(path, notes)):
        return None
    try:
        there = read_facts(path)
    except PenultError:  # damaged
        return None
    same = there.precision == "int8" and without(there).fingerprints() == facts.fingerprints()
    return there if same else None


def _require_int8(writer: CacheWriter, *, overwrite: bool) -> None:
    """Refuse another precision before the minute that a calibration takes.

    Raises:
        FingerprintMismatchError: the cache holds float features.
    """
    if writer.meta is not None and not overwrite:
        there = Fingerprint(writer.meta["fingerprint"])
        if there.fields.get("precision") != "int8":
            asked = Fingerprint({**there.fields, "precision": "int8"})
            require_same([there], [asked], mine=str(writer.path), theirs="this run")


def _require_match(writer: CacheWriter, facts: BackboneFacts) -> None:
    """Look before a new file goes into a cache that has features.

    Raises:
        FingerprintMismatchError: it gives other ones; the cache stays as it was.
    """
    if writer.meta is not None:
        there = [Fingerprint(fields) for fields in all_fingerprints(writer.meta)]
        shared = {name: value for name, value in there[0].fields.items() if name != "calibration"} | {"precision": "fp32"}
        now = [Fingerprint({**shared, **fields}) for fields in facts.fingerprints()]
        require_same(there, now, mine=str(writer.path), theirs="this run")


def fingerprints(
    facts: BackboneFacts, provider: str, storage: str, *, tf32: bool = False, views: Views | None = None
) -> list[Fingerprint]:
    """Everything that decides the numbers, for each feature set."""
    decided: dict[str, Any] = {"precision": "fp32", "provider": provider, "tf32": tf32, "storage": storage}
    decided |= {"views": views.fingerprint(facts.preprocess)} if views else {}
    return [Fingerprint({**decided, **fields}) for fields in facts.fingerprints()]


def library_versions() -> dict[str, str]:
    """The versions that made something, for its record."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime has one of two names
            continue
    return {**found, **libraries()}
