"""Put a backbone into a cache, and say everything that decides its numbers."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from store import hdf5
from store.errors import UsageError
from store.fingerprint import Fingerprint
from store.writer import CacheWriter

from .backbones import Backbone
from .export import export
from .onnxfile import BackboneFacts, read_facts
from .progress import StopFlag
from .weights import file_digest

log = logging.getLogger("penult.extractor")

LIBRARIES = ("penult", "torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "h5py", "numpy", "pillow")


def prepare_backbone(
    writer: CacheWriter, backbone: Backbone, *, overwrite: bool = False, stop: StopFlag | None = None
) -> tuple[BackboneFacts, dict[str, Any]]:
    """Put ``backbone.onnx`` into a cache, or recognise that the one there is what is asked for, without importing torch.

    Returns:
        What the file says of itself, and notes for cache.json by which the next run recognises the request.
    """
    path = writer.path / "backbone.onnx"
    request = backbone.facts()
    if backbone.is_file and any(request[name] is not None for name in ("weights", "preset", "resize", "crop")):
        message = (
            f"{backbone.name} has its weights and its preprocessing inside: leave --weights, --preset, --resize, --crop out"
        )
        raise UsageError(message)
    file = Path(backbone.name) if backbone.is_file else backbone.weights_file
    if file is not None:
        request["file_sha256"] = file_digest(file)
        request["weights"] = None  # the content counts, not where it lies
    elif backbone.seed is None:
        request["torchvision"] = version("torchvision")  # it decides what the default weights are
    before = {} if overwrite else (writer.meta or {}).get("facts", {})
    if path.is_file() and before.get("request") == request and before.get("backbone_sha256") == file_digest(path):
        log.info("using %s as exported before", path)
        facts = replace(read_facts(path), weights_sha256=(writer.meta or {})["fingerprint"]["weights"])
        return facts, {**{key: before[key] for key in ("request", "backbone_sha256", "weights")}, "source": facts.source}
    if backbone.seed is not None:
        log.warning(
            "RANDOM WEIGHTS (seed %d): %s is untrained, its features are a random projection", backbone.seed, backbone.name
        )
    # A cache keeps its file, and its features, until the new file is there and known to match or meant to replace them.
    new = path.with_name(".backbone.onnx.tmp")
    try:
        facts = _import_onnx(Path(backbone.name), new) if backbone.is_file else export(backbone, new, stop)
        if overwrite:
            writer.clear()
        _require_match(writer, facts)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    hdf5.fsync_directory(path.parent)
    log.info("exported %s (%s), %d features from the %s", facts.name, facts.weights, facts.dim, facts.layer)
    return facts, {"request": request, "backbone_sha256": file_digest(path), "weights": facts.weights, "source": facts.source}


def _import_onnx(file: Path, target: Path) -> BackboneFacts:
    facts, data = read_facts(file), file.read_bytes()
    hdf5.commit(target, data)
    return replace(facts, weights_sha256=hashlib.sha256(data).hexdigest())


def _require_match(writer: CacheWriter, facts: BackboneFacts) -> None:
    """Look before a new file goes into a cache that has features.

    Raises:
        FingerprintMismatchError: it gives other ones; the cache stays as it was.
    """
    if writer.meta is not None:
        there = Fingerprint(writer.meta["fingerprint"])
        there.require(Fingerprint({**there.fields, **facts.fingerprint()}), mine=str(writer.path), theirs="this run")


def fingerprint(facts: BackboneFacts, provider: str, storage: str) -> Fingerprint:
    """Everything that decides the numbers."""
    decided = {"precision": "fp32", "provider": provider, "tf32": False, "storage": storage}
    return Fingerprint({**facts.fingerprint(), **decided})


def library_versions() -> dict[str, str]:
    """The versions that made something, for its record."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime has one of two names
            continue
    return found
