"""The metadata of a cache directory: ``cache.json``, the names of the shards, the ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from store.errors import CorruptCacheError, require_format
from store.fingerprint import MAX_VIEWS, VIEWS, Fingerprint

from . import json_text, shard
from .samples import SampleTable

FORMAT_VERSION = 1
BACKBONE = "backbone.onnx"
PER_SET = {"layer": None, "pooling": None}  # fields that may differ between the feature sets of one cache
FINGERPRINT = {
    "layer?": str,
    "storage?": str,
    "precision?": str,
    "calibration?": str,
    "pixels?": dict,
    f"{VIEWS}?": {"count": int},
}
FACTS = {
    "backbone_sha256?": str,
    "backbone_data?": [str],
    "weights?": str,
    "source?": (str, None),
    "calibration?": dict,
    "request?": dict,
}
SHAPE = {"fingerprint": FINGERPRINT, "more?": [FINGERPRINT], "facts": FACTS}  # what is read of cache.json


def shard_paths(cache: Path) -> list[Path]:
    """Complete shards, in the order of writing."""
    return sorted(path for path in (cache / "shards").glob("*.h5") if shard.NAME.fullmatch(path.name))


def read_meta(cache: Path) -> dict[str, Any]:
    """The content of ``cache.json``, rebuilt from the shards if it is lost.

    Raises:
        CorruptCacheError: neither has a fingerprint, or the format is newer than this penult.
    """
    try:
        meta = json.loads((cache / "cache.json").read_bytes())
        if isinstance(meta, dict) and meta.pop("sha256", None) not in (None, _meta_sha256(meta)):
            message = "the content is not what was written"
            raise ValueError(message)
    except (OSError, ValueError, RecursionError):
        fingerprints = set()
        for path in shard_paths(cache):
            with suppress(CorruptCacheError):  # the other shards have it too
                fingerprints.add(shard.read_shard(path).fingerprint)
        sets = [Fingerprint.parse(text).fields for text in sorted(fingerprints)]
        if not sets or len({json.dumps({**fields, **PER_SET}, sort_keys=True) for fields in sets}) != 1:
            message = f"{cache}: cache.json is lost and the shards have {len(sets)} different fingerprints"
            raise CorruptCacheError(message) from None
        meta = describe_sets(sets, {})
    if not isinstance(meta, dict):
        message = f"{cache}/cache.json is not a cache description"
        raise CorruptCacheError(message)
    require_format(cache, meta.get("format"), FORMAT_VERSION)
    require_description(meta, f"{cache}/cache.json")
    return meta


def require_description(meta: Mapping[str, Any], file: str) -> None:
    """Refuse a description of a cache whose parts are not what its readers rely on.

    Args:
        meta: the content of ``cache.json``.
        file: where it was read, for the message.

    Raises:
        CorruptCacheError: names the field.
    """
    reason = json_text.misfit(meta, SHAPE)
    counts = [] if reason else [fields[VIEWS]["count"] for fields in all_fingerprints(meta) if VIEWS in fields]
    wrong = [count for count in counts if not 2 <= count <= MAX_VIEWS]
    if wrong:
        reason = f"{wrong[0]} views of an image; expected 2 to {MAX_VIEWS}"
    if reason:
        message = f"{file} is not a cache description: {reason}"
        raise CorruptCacheError(message)


def describe_sets(fingerprints: Sequence[Mapping[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The content of ``cache.json``: the fingerprint of the first feature set, and those of the others, if any."""
    first, *more = map(dict, fingerprints)
    return {"format": FORMAT_VERSION, "fingerprint": first, **({"more": more} if more else {}), "facts": facts}


def all_fingerprints(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of every feature set that ``cache.json`` describes."""
    return [meta["fingerprint"], *meta.get("more", [])]


def _meta_sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def meta_bytes(meta: dict[str, Any]) -> bytes:
    """The bytes of ``cache.json``, with a checksum of its other fields."""
    return (json.dumps({**meta, "sha256": _meta_sha256(meta)}, indent=2, sort_keys=True) + "\n").encode()


def ledger_bytes(table: SampleTable) -> bytes:
    """The bytes of ``ledger.jsonl``: a line for each failed input."""
    failed = [{"path": row.name, "code": row.code, "message": row.message} for row in table.rows if not row.ok]
    return "".join(json.dumps(entry) + "\n" for entry in failed).encode()


def holds(path: Path, data: bytes) -> bool:
    """Whether a file exists with exactly this content."""
    try:
        return path.read_bytes() == data
    except OSError:
        return False
