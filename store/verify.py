"""Verification of a cache: damaged files, a changed backbone, missing features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from store.format import calibration
from store.format.integrity import verify_files
from store.format.lock import is_locked
from store.format.metadata import BACKBONE, holds, ledger_bytes, meta_bytes, shard_paths
from store.progress.stages import staged

from .cache import FeatureCache
from .errors import CorruptCacheError, InputMissingError, LockedError, PenultError, StorageError


@dataclass(frozen=True)
class Finding:
    """One damaged file.

    Attributes:
        file: relative to the cache.
        problem: what is wrong with it.
    """

    file: str
    problem: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@staged("verifying")
def verify_cache(cache: str | Path) -> list[Finding]:
    """List everything that is wrong with a cache: damaged files, a changed backbone, missing features.

    Raises:
        InputMissingError: there is no cache.
        LockedError: another run is replacing it.

    >>> import store
    >>> store.verify_cache("pets.cache")
    []
    """
    cache = Path(cache)
    if cache.is_file():
        return [Finding(cache.name, problem) for problem in verify_files([cache]).values()]
    shards = shard_paths(cache)
    try:
        findings = _damaged(cache)
    except (InputMissingError, StorageError, FileNotFoundError) as error:
        if is_locked(cache) or not all(path.exists() for path in shards):  # another run has removed a file
            message = f"{cache} is being changed by another run; try again when that has ended"
            raise LockedError(message) from error
        raise
    if findings:
        return findings
    try:
        opened = FeatureCache(cache)
    except LockedError:
        raise
    except PenultError as error:
        return [Finding("", str(error))]
    return [*_derived(opened), *_backbone(opened), *_missing(opened)]


def _damaged(cache: Path) -> list[Finding]:
    shards, table = shard_paths(cache), cache / "samples.h5"
    if not shards and not table.exists():
        message = f"{cache} is not a penult cache"
        raise InputMissingError(message)
    files = [*shards, *(path for path in (table, cache / calibration.NAME) if path.exists())]
    return [Finding(str(path.relative_to(cache)), problem) for path, problem in verify_files(files).items()]


def _derived(cache: FeatureCache) -> Iterator[Finding]:
    for name, data in (("cache.json", meta_bytes(cache.meta)), ("ledger.jsonl", ledger_bytes(cache.samples))):
        if not holds(cache.path / name, data):
            yield Finding(name, "is missing or damaged; the same extract command makes it again from the rest")


def _backbone(cache: FeatureCache) -> Iterator[Finding]:
    if not cache.meta["facts"] and (cache.path / BACKBONE).is_file():
        return  # cache.json is lost, which is a finding of its own, and the expected digest is unknown
    try:
        cache.require_backbone()
    except (CorruptCacheError, InputMissingError) as error:
        yield Finding(BACKBONE, str(error))


def _missing(cache: FeatureCache) -> Iterator[Finding]:
    for layer in cache.layers:
        stored = {digest for s in cache.with_layer(layer).shards for digest in s.digests()}
        missing = [row for row in cache.rows() if row.sha256 not in stored]
        if missing:
            of_layer = f" of {layer}" if len(cache.layers) > 1 else ""
            yield Finding(
                "shards", f"{len(missing)} images have no features{of_layer} (such as {missing[0].name}): a shard is missing"
            )
