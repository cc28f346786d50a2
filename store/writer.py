"""The writer of a cache directory: appends shards and replaces the sample table, under one lock."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format import atomic, calibration, hdf5, shard
from store.format.integrity import verify_files
from store.format.lock import writer_lock
from store.format.metadata import (
    BACKBONE,
    all_fingerprints,
    describe_sets,
    holds,
    ledger_bytes,
    meta_bytes,
    read_meta,
    shard_paths,
)
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage, staged

from .errors import BadDataError, CorruptCacheError, InputMissingError, OutputExistsError, StorageError
from .fingerprint import Fingerprint, require_same

log = logging.getLogger("penult.store")

FILES = ("samples.h5", "ledger.jsonl", "cache.json", calibration.NAME)  # beside backbone.onnx, the lock and the shards
SHARD_BYTES = 4 * 2**20  # commit at this size: memory stays flat, and one fsync a second is nothing on a GPU ..
SHARD_SECONDS = 30.0  # .. or after this long, so that a small data set does not lose everything to a kill


Block = tuple[NDArray[np.floating[Any]], Sequence[bytes], Sequence[bytes]]  # features, content digests, paths


@dataclass
class _FeatureSet:
    """The rows of one fingerprint: the keys of committed rows, and pending rows as they will be stored."""

    fingerprint: Fingerprint
    known: set[bytes] = field(default_factory=set)
    pending: list[Block] = field(default_factory=list)

    @property
    def storage(self) -> str:
        return str(self.fingerprint.fields.get("storage"))


class CacheWriter:
    """Appends features to a locked cache directory; made by `open_writer`.

    Attributes:
        path: the cache directory.
        known: content digests whose features are all stored, after `begin` was called.
        seconds: spent on writing shards so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[bytes] = set()
        self._sets: list[_FeatureSet] = []
        self._appended: list[bytes] = []
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._number = 0
        self.seconds = 0.0
        self._pool = ThreadPoolExecutor(1, "penult-write")
        self._writing: Future[None] | None = None

    @property
    def fresh(self) -> bool:
        """Whether the cache is still empty."""
        return not shard_paths(self.path) and not (self.path / "cache.json").exists()

    @cached_property
    def meta(self) -> dict[str, Any] | None:
        """The content of cache.json; None in a fresh cache."""
        return None if self.fresh else read_meta(self.path)

    def clear(self) -> None:
        """Empty the cache of penult's own files, the sample table first, because no reader opens a cache without it."""
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        atomic.fsync_directory(self.path)  # else a crash may leave the old table beside the new backbone
        for path in shard_paths(self.path):
            path.unlink()
        self.__dict__.pop("meta", None)
        self.__dict__.pop("samples", None)

    def begin(self, *fingerprints: Fingerprint, facts: dict[str, Any]) -> None:
        """Check the fingerprints and load the stored keys. Damaged shards are removed, to be computed again.

        Args:
            fingerprints: of every feature set to come.
            facts: information that does not decide features: library versions, where weights came from, batch size.

        Raises:
            FingerprintMismatchError: the cache was made differently; names the fields.
        """
        if self.meta is not None:
            stored = [Fingerprint(fields) for fields in all_fingerprints(self.meta)]
            require_same(stored, fingerprints, mine=str(self.path), theirs="this run")
        self._sets = [_FeatureSet(each) for each in fingerprints]
        damaged = verify_files(shard_paths(self.path))
        sound: dict[str, list[shard.Shard]] = {}
        paths = shard_paths(self.path)
        with Stage("opening the shards", len(paths), "shards") as stage:
            for path in stage.each(paths):
                self._number = max(self._number, int(path.name.partition("-")[0]) + 1)
                if path in damaged:
                    log.warning("%s; its images are computed again", damaged[path])
                    path.unlink()
                    continue
                index = shard.read_shard(path)
                sound.setdefault(index.fingerprint, []).append(index)
        for each in self._sets:
            indices = sound.get(each.fingerprint.canonical, [])
            for index in indices:
                each.known.update(index.digests())
            if sum(len(index.sha256) for index in indices) > len(each.known):
                without_copies(indices)
        # with one feature set they are one object: a set of a million digests is not kept twice
        self.known = self._sets[0].known if len(self._sets) == 1 else set.intersection(*(each.known for each in self._sets))
        self.write_meta(facts)

    def stored_paths(self) -> set[bytes]:
        """The paths of all images whose features are stored, as they were when they were extracted."""
        paths = set[bytes]()
        files = shard_paths(self.path)
        with Stage("looking for images of an unfinished run", len(files), "shards") as stage:
            for path in stage.each(files):
                with hdf5.open_checked(path, shard.ENCODING_TYPE) as (datasets, _):
                    paths.update(hdf5.unpack_strings(datasets, "path"))
        return paths

    def write_meta(self, facts: dict[str, Any]) -> None:
        """Replace cache.json, if it would change."""
        meta = describe_sets([each.fingerprint.fields for each in self._sets], facts)
        if not holds(self.path / "cache.json", meta_bytes(meta)):
            atomic.commit(self.path / "cache.json", meta_bytes(meta))
            self.meta = meta

    def append(self, features: Sequence[NDArray[np.float32]], sha256: Sequence[bytes], paths: Sequence[bytes]) -> None:
        """Add the rows ``(n, d)``, or ``(n, views, d)``, of every feature set to the shards in memory.

        Raises:
            BadDataError: NaN or infinity, with the count and a path.
        """
        if not self._pending_bytes:
            self._pending_since = time.monotonic()
        for X in features:
            bad = np.asarray(~np.isfinite(X.reshape(len(X), -1)).all(axis=1))
            if bad.any():
                first = Row(paths[int(np.flatnonzero(bad)[0])]).name
                message = f"the backbone gave NaN or infinity for {int(bad.sum())} of {len(bad)} images (such as {first})"
                raise BadDataError(message)
        for each, X in zip(self._sets, features, strict=True):
            # A run that died between the files of two feature sets left rows in one of them.
            new = np.array([digest not in each.known for digest in sha256], bool)
            vectors = X.reshape(-1, X.shape[-1])
            fits = shard.fits_float16(vectors) if each.storage == "auto" else np.zeros(len(vectors), bool)
            fp16 = fits.reshape(len(X), -1).all(axis=1)
            if X.ndim == 3 and each.storage == "auto" and not fp16.all():
                X = shard.as_stored(vectors, each.storage).reshape(X.shape)  # one view must not change how another is rounded
            for dtype, chosen in ((np.float16, np.flatnonzero(new & fp16)), (np.float32, np.flatnonzero(new & ~fp16))):
                if len(chosen):
                    rows: NDArray[np.floating[Any]] = X[chosen].astype(dtype)
                    places = chosen.tolist()
                    each.pending.append((rows, [sha256[i] for i in places], [paths[i] for i in places]))
            self._pending_bytes += X.nbytes
        self._appended += sha256

    @property
    def due(self) -> bool:
        """Whether the shards in memory are large or old enough to be committed."""
        if not self._pending_bytes:
            return False
        return self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._pending_since >= SHARD_SECONDS

    def commit(self) -> int:
        """Commit the shards in memory; return the number of images.

        A feature set gets one file, or two (rule 11 of store/FORMAT.md).
        """
        count = self.commit_behind()
        self.settle()
        return count

    def commit_behind(self) -> int:
        """`commit` in the background, so that a slow disk delays only the next commit; `settle` raises if it failed.

        Raises:
            StorageError: the previous commit failed.
        """
        self.settle()
        pending = [each.pending for each in self._sets]
        digests = self._appended
        for each in self._sets:
            each.pending = []
        self._appended, self._pending_bytes = [], 0
        self._writing = self._pool.submit(self._write, pending, digests)
        return len(digests)

    def settle(self) -> None:
        """Wait for the commit in progress.

        Raises:
            StorageError: it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for a commit in progress; its failure is ignored, `settle` raises it."""
        self._pool.shutdown()

    def _write(self, pending: Sequence[list[Block]], digests: Sequence[bytes]) -> None:
        begin = time.perf_counter()
        for each, blocks in zip(self._sets, pending, strict=True):
            total = sum(len(block[0]) for block in blocks)
            for dtype in (np.float16, np.float32):
                self._write_shard(each, [block for block in blocks if block[0].dtype == dtype], dtype, total)
            blocks.clear()
        self.known.update(digests)
        self.seconds += time.perf_counter() - begin

    def _write_shard(self, rows: _FeatureSet, blocks: list[Block], dtype: type[np.floating[Any]], total: int) -> None:
        if not blocks:
            return
        digests = [digest for block in blocks for digest in block[1]]
        paths = [path for block in blocks for path in block[2]]
        features = np.concatenate([block[0] for block in blocks])
        if dtype == np.float32 and rows.storage == "auto":
            log.warning("%d of %d rows do not fit float16 and are stored as float32", len(features), total)
        shard.write_shard(self.path / "shards", self._number, features, digests, paths, rows.fingerprint)
        self._number += 1
        rows.known.update(digests)

    @staged("writing the sample table")
    def finish(self, table: SampleTable) -> bool:
        """Replace the sample table and the ledger; False if nothing would change."""
        current = self.samples
        ledger = ledger_bytes(table)
        unchanged = current is not None and list(current.rows) == list(table.rows) and current.facts == table.facts
        unchanged = unchanged and current is not None and list(current.target_names) == list(table.target_names)
        if unchanged and holds(self.path / "ledger.jsonl", ledger):
            return False
        atomic.commit(self.path / "ledger.jsonl", ledger)
        atomic.commit(self.path / "samples.h5", table.to_bytes())
        self.samples = table
        return True

    @cached_property
    def samples(self) -> SampleTable | None:
        """The current sample table; None if it is missing or damaged (it can be made again)."""
        try:
            with Stage("reading the sample table"):
                return SampleTable.read(self.path / "samples.h5")
        except InputMissingError:
            return None
        except CorruptCacheError as error:
            log.warning("%s; it is made again", error)
            return None


def without_copies(shards: Sequence[shard.Shard]) -> list[shard.Shard]:
    """Delete shards of one feature set whose rows all stand in the others too, and return these; the writer's lock is held.

    A killed `compact --prune` leaves such a shard: rows that it had copied from an older one, which still has all of its own.

    Raises:
        CorruptCacheError: there are copies, and a shard is damaged; nothing is deleted.
    """
    counts = Counter(digest for each in shards for digest in set(each.digests()))
    kept = list(shards)
    for each in reversed(shards):  # the copy is the younger one
        digests = set(each.digests())
        if all(counts[digest] > 1 for digest in digests):
            for other in kept:
                shard.require_sound(other)
            log.info("%s is removed: its %d rows stand in other shards too", each.path, len(digests))
            each.path.unlink()
            counts.subtract(digests)
            kept.remove(each)
    return kept


@contextmanager
def open_writer(path: Path) -> Iterator[CacheWriter]:
    """Create or continue a cache directory under its writer's lock.

    Raises:
        OutputExistsError: the path is taken by something that is not a cache.
        LockedError: another run writes it.
        OutputError: it cannot be created.
        StorageError: its file system has no locks.
    """
    created = not path.exists()
    require_place(path)
    try:
        atomic.make_directory(path / "shards")
    except OSError as error:
        message = f"cannot create {path}: {error.strerror}"
        raise atomic.write_error(error)(message) from error
    with ExitStack() as stack:
        if created:  # after the lock: NFS keeps a removed file under another name while it is open
            stack.callback(_remove_if_empty, path)
        try:
            stack.enter_context(writer_lock(path))
        except StorageError:  # no locks here
            if created:
                _remove_if_empty(path / "shards")
            raise
        _remove_leftovers(path)
        writer = CacheWriter(path)
        try:
            try:
                yield writer
            finally:
                writer.close()  # the lock is held until nothing is written any more
        except BaseException:
            if created:
                with suppress(OSError):
                    _remove_empty(path)
            raise


def require_place(path: Path) -> None:
    """Check, before any work is done, that a cache may be written at a path.

    Raises:
        OutputExistsError: it is taken by something that is not a cache.
        OutputError: nothing can be created there.
    """
    if path.exists() and not _is_ours(path):
        message = f"{path} exists and is not a penult cache; choose another name"
        raise OutputExistsError(message)
    for place in (path / "samples.h5", path / "shards" / "new") if path.exists() else (path,):
        atomic.require_room(place)


def _is_ours(path: Path) -> bool:
    """Whether a folder is a cache, an unfinished one, or empty, so that a writer may remove and replace files in it.

    A folder `shards` proves nothing: datasets use that name for their tar files.
    """
    shards = path / "shards"
    if not path.is_dir() or shards.is_symlink():
        return False
    if _is_description(path / "cache.json") or shard_paths(path):
        return True
    names, unfinished = {item.name for item in path.iterdir()}, {".lock", "shards"}  # a run that was killed early left these
    if {*unfinished, BACKBONE} <= names:
        return True
    foreign = [item for item in shards.iterdir() if not _is_shard(atomic.final_name(item.name))] if shards.is_dir() else []
    return (names <= unfinished or unfinished <= names) and not foreign


def _is_description(path: Path) -> bool:
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and {"format", "fingerprint"} <= meta.keys()


def _is_shard(name: str) -> bool:
    return shard.NAME.fullmatch(name) is not None


def _remove_leftovers(path: Path) -> None:
    """Delete the unfinished files of killed runs, except the backbone's; the writer's lock is held."""
    atomic.remove_leftovers(path, FILES.__contains__)
    atomic.remove_leftovers(path / "shards", _is_shard)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove_empty(path: Path) -> None:
    """Delete a cache that this run created and left empty, so that a mistyped option leaves no folder behind."""
    _remove_leftovers(path)
    if {item.name for item in path.iterdir()} == {".lock", "shards"} and not any((path / "shards").iterdir()):
        (path / "shards").rmdir()
        (path / ".lock").unlink()
        path.rmdir()
