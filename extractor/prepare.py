"""Put a backbone into a cache, and say everything that decides its numbers."""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from store.cache import all_fingerprints
from store.errors import PenultError, UsageError
from store.fingerprint import Fingerprint, file_digest, require_same
from store.writer import CacheWriter

from .backbones import Backbone
from .export import export
from .half import halve
from .onnxfile import BackboneFacts, data_files, digest, install, read_facts, remove
from .progress import StopFlag
from .stated import read_sidecar

log = logging.getLogger("penult.extractor")

NOTES = ("request", "backbone_sha256", "weights", "source", "backbone_data")
LIBRARIES = ("penult", "torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "h5py", "numpy", "pillow")


def prepare_backbone(
    writer: CacheWriter, backbone: Backbone, *, overwrite: bool = False, stop: StopFlag | None = None, half: bool = False
) -> tuple[BackboneFacts, dict[str, Any]]:
    """Put ``backbone.onnx`` into a cache, or recognise that the one there is what is asked for, without importing torch.

    Returns:
        What the file says of itself, and notes for cache.json by which the next run recognises the request.
    """
    path = writer.path / "backbone.onnx"
    request = backbone.facts()
    if backbone.is_file and (superfluous := [name for name in ("weights", "preset") if request[name] is not None]):
        message = f"{backbone.name} has its weights inside: leave --{', --'.join(superfluous)} out"
        raise UsageError(message)
    file = Path(backbone.name) if backbone.is_file else backbone.weights_file
    if file is not None:
        request["file_sha256"] = digest(file) if backbone.is_file else file_digest(file)
        request["weights"] = None  # the content counts, not where it lies
        if backbone.is_file:
            request |= {"name": "onnx", "sidecar": read_sidecar(file)}
    elif backbone.seed is None:
        request["torchvision"] = version("torchvision")  # it decides what the default weights are
    if half:
        request["precision"] = "fp16"
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
    new = path.with_name(".backbone.onnx.tmp")
    try:
        facts = export(backbone, new, stop)
        if half and facts.precision == "fp32":
            facts = halve(new, new, facts)
        if overwrite:
            writer.clear()
        _require_match(writer, facts)
    except BaseException:
        remove(new)
        raise
    install(new, path)
    data = data_files(path)
    for stray in set(writer.path.glob("backbone-*.data")) - set(data):  # of an export that was killed
        stray.unlink()
    for layer in facts.layers:
        pooling = "" if layer.pooling == "none" else f" ({layer.pooling})"
        log.info("exported %s (%s), %d features: %s%s", facts.name, facts.weights, layer.dim, layer.layer, pooling)
    notes = {"request": request, "backbone_sha256": digest(path), "weights": facts.weights, "source": facts.source}
    return facts, {**notes, **({"backbone_data": [file.name for file in data]} if data else {})}


def _recorded_digest(path: Path, notes: dict[str, Any]) -> str | None:
    """`digest` of a cache's backbone, without looking into the file for the names of its external data."""
    try:
        return file_digest(path, *(path.with_name(name) for name in notes.get("backbone_data", [])))
    except PenultError:  # its external data is gone: it is made again
        return None


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


def fingerprints(facts: BackboneFacts, provider: str, storage: str, *, tf32: bool = False) -> list[Fingerprint]:
    """Everything that decides the numbers, for each feature set."""
    decided = {"precision": "fp32", "provider": provider, "tf32": tf32, "storage": storage}
    return [Fingerprint({**decided, **fields}) for fields in facts.fingerprints()]


def library_versions() -> dict[str, str]:
    """The versions that made something, for its record."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime has one of two names
            continue
    return found
