"""A finished cache, opened for reading: features by content and by split, the sample table, and the backbone."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format import atomic, compact_file, shard
from store.format.lazy_features import LazyFeatures
from store.format.lock import is_locked
from store.format.metadata import BACKBONE, all_fingerprints, read_meta, shard_paths
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage

from .errors import BadDataError, CorruptCacheError, InputMissingError, LockedError, PenultError, UsageError
from .faces import html_table
from .fingerprint import Fingerprint, file_digest, short
from .splits import assign_splits, groups_of, version_of

PENULTIMATE = "penultimate"  # how --layer names the default
SHOWN = 5  # labels in a line


@dataclass(frozen=True, repr=False)
class Subset:
    """Some samples of a cache with their features.

    Attributes:
        X: features ``(n, d)``, float32, or float16 if all rows are stored so; an array, or lazy (see `FeatureCache.of_rows`).
        y: labels ``(n,)`` of dtype str; for other tasks as `SampleTable.truth` returns it.
        sha256: content digest of each sample, 32 bytes.
        paths: relative path of each sample.
        groups: the group of each sample, which stays in one split; by default the content digest.
        name: the split it came from.

    >>> from store import FeatureCache
    >>> train = FeatureCache("pets.cache").subset("train")
    >>> train
    <Subset 'train': 18 images, 16 float16 features>
    >>> train.X.shape, train.y[:2].tolist()
    ((18, 16), ['cat', 'cat'])
    """

    X: NDArray[np.floating[Any]] | LazyFeatures
    y: NDArray[Any]
    sha256: Sequence[bytes]
    paths: Sequence[bytes]
    groups: Sequence[bytes]
    name: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"<Subset {self.name!r}: {len(self)} images, {self.X.shape[1]} {self.X.dtype} features>"

    def _repr_html_(self) -> str:
        several = self.y.ndim > 1
        labels = [] if several else zip(*np.unique(self.y, return_counts=True), strict=True)
        return html_table(repr(self)[1:-1], labels, [] if several else ["label", "images"])


class FeatureCache:
    """A finished cache, opened for reading. It takes no lock and writes nothing.

    Args:
        path: the cache directory, or the one file that `penult compact` made of it.
        layer: the layer of the feature set to read, as in its fingerprint; by default the first.

    Raises:
        InputMissingError: there is no cache, or it was never finished.
        CorruptCacheError: its files are damaged or of a newer format.
        LockedError: another run is replacing it.
        UsageError: it has no features of that layer; names those it has.

    >>> from store import FeatureCache
    >>> cache = FeatureCache("pets.cache")
    >>> cache
    <FeatureCache pets.cache: 30 images, labels cat, dog, features of 'last'>
    >>> cache.subset("test").X.dtype
    dtype('float16')
    """

    def __init__(self, path: str | Path, layer: str | None = None) -> None:
        self.path = Path(path)
        self._sound: set[int] = set()  # shards whose payload was checked
        self._opened_as = self._state()
        self._listed = shard_paths(self.path)
        if self.path.is_file():
            self._open_compact(layer)
            return
        if not self.path.is_dir():
            message = f"{self.path} does not exist or is not a cache directory"
            raise InputMissingError(message)
        if not (self.path / "samples.h5").is_file():
            kind = "an unfinished cache; run the same extract command again to continue it"
            kind = kind if (self.path / "shards").is_dir() else "not a penult cache (it has no samples.h5)"
            message = f"{self.path} is {kind}"
            raise self.blamed(InputMissingError(message))
        try:
            self.meta = read_meta(self.path)
            with Stage("reading the sample table"):
                self.samples = SampleTable.read(self.path / "samples.h5")
        except (CorruptCacheError, InputMissingError) as error:
            raise self.blamed(error) from error
        if self._state() != self._opened_as:  # the table may be of another cache than the description
            message = f"{self.path} changed while it was opened"
            raise self.blamed(CorruptCacheError(message))
        self.fingerprint = self._choose(layer)

    def __repr__(self) -> str:
        names = self.samples.outputs
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        what = f", {'targets' if self.samples.target_names else 'labels'} {shown}" if names else ""
        return f"<FeatureCache {self.path}: {self.samples.counts['ok']} images{what}, features of {self.layer!r}>"

    def _repr_html_(self) -> str:
        facts = self.describe()
        splits, counts = facts["splits"], facts["counts"]
        title = f"{self.path}: {facts['rows']} rows of {facts['dim']} {facts['dtype']} features of {self.layer}"
        rows = [(label, *(per.get(split, 0) for split in splits)) for label, per in facts["labels"].items()]
        failed = [("failed", counts["failed"])] if counts["failed"] else []
        return html_table(title, [*rows, *failed], ["label", *splits])

    def _open_compact(self, layer: str | None) -> None:
        with Stage("reading the compact file"):
            self.samples = SampleTable.read(self.path, compact_file.ENCODING_TYPE)
            whole, self.meta = compact_file.open_compact(self.path)
        if self._state() != self._opened_as:
            message = f"{self.path} changed while it was opened"
            raise self.blamed(CorruptCacheError(message))
        self.fingerprint = self._choose(layer)
        self.shards = [whole]

    def _state(self) -> object:
        """The identity of the cache on disk: inode, size and time of its one file, or of its table, with cache.json."""
        try:
            if self.path.is_file():
                return shard.state_of(self.path)
            return shard.state_of(self.path / "samples.h5"), (self.path / "cache.json").read_bytes()
        except OSError:
            return None

    def blamed(self, error: PenultError) -> PenultError:
        """The error to raise for a file that is missing or not what was written.

        `LockedError` if another run replaces or repairs the cache, or has done so since this one was opened; else the error
        itself.
        """
        pruned = not all(path.exists() for path in self._listed)
        if self._state() == self._opened_as and not pruned and not is_locked(self.path):
            return error
        message = (
            f"{self.path} is being changed, or was replaced, by another run while it was read; try again when that has ended"
        )
        return LockedError(message)

    @property
    def fingerprints(self) -> list[Fingerprint]:
        """The fingerprint of every feature set, in the order in which the layers were requested."""
        return [Fingerprint(fields) for fields in all_fingerprints(self.meta)]

    @property
    def layers(self) -> list[str]:
        """The layer of every feature set."""
        return [str(each.fields.get("layer", "")) for each in self.fingerprints]

    @property
    def layer(self) -> str:
        """The layer of the features that are read."""
        return str(self.fingerprint.fields.get("layer", ""))

    def _choose(self, layer: str | None) -> Fingerprint:
        if layer is None:
            return self.fingerprints[0]
        if layer == PENULTIMATE:  # the name on the command line; what is stored is, for example, ``input of fc``
            layer = next((name for name in self.layers if name.startswith("input of ")), layer)
        if layer not in self.layers:
            message = f"{self.path} has no features of layer {layer!r}; it has {', '.join(map(repr, self.layers))}"
            raise UsageError(message)
        return self.fingerprints[self.layers.index(layer)]

    def with_layer(self, layer: str) -> FeatureCache:
        """The same cache with another of its feature sets.

        Raises:
            UsageError: it has no features of that layer.
        """
        return self if layer == self.layer else FeatureCache(self.path, layer)

    def read_backbone(self) -> bytes:
        """The ONNX file that made the features; without its external data, if it has any.

        Raises:
            InputMissingError: it is missing.
            CorruptCacheError: it is not the file that made the features; `penult extract` makes it again.
            LockedError: another run has replaced the cache.
        """
        if self.path.is_file():
            data = compact_file.read_backbone(self.path)
            self._require_backbone(hashlib.sha256(data).hexdigest())
            return data
        try:
            data = (self.path / BACKBONE).read_bytes()
        except OSError as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            message = f"{self.path / BACKBONE} {why}; the same extract command makes it again"
            raise self.blamed(InputMissingError(message)) from error
        if not self._backbone_data:
            self._require_backbone(hashlib.sha256(data).hexdigest())
        return data

    def copy_backbone(self, target: Path) -> None:
        """Copy the ONNX file that made the features, and its external data beside it.

        The copy is what is compared with the recorded digest, since another run may replace the file at any time.

        Raises:
            InputMissingError, CorruptCacheError, LockedError: as `read_backbone`.
            StorageError, OutputError: it cannot be written.
        """
        atomic.commit(target, self.read_backbone())
        if not self._backbone_data:
            return
        copies = [target.with_name(name) for name in self._backbone_data]
        for copy in copies:
            try:
                shutil.copyfile(self.path / copy.name, copy)
            except FileNotFoundError as error:
                message = f"{self.path / copy.name} is missing; the same extract command makes it again"
                raise self.blamed(InputMissingError(message)) from error
            except OSError as error:
                message = f"cannot write {copy}: {error.strerror}"
                raise atomic.write_error(error)(message) from error
        self._require_backbone(file_digest(target, *copies))

    def require_backbone(self) -> None:
        """Check, before any work is done, that the ONNX file is the one that made the features.

        Raises:
            InputMissingError, CorruptCacheError, LockedError: as `read_backbone`.
        """
        if self._backbone_data:
            self._require_backbone(file_digest(*(self.path / name for name in (BACKBONE, *self._backbone_data))))
        else:
            self.read_backbone()

    @property
    def _backbone_data(self) -> list[str]:
        """Names of the files with the backbone's external data."""
        if self.path.is_file():
            return []  # `compact` leaves such a backbone out
        names = [str(name) for name in self.meta["facts"].get("backbone_data", [])]
        if any(Path(name).name != name for name in names):
            message = f"{self.path}/cache.json names files outside the cache; refused"
            raise CorruptCacheError(message)
        return names

    def _require_backbone(self, digest: str) -> None:
        recorded = self.meta["facts"].get("backbone_sha256")
        if digest != recorded:
            what = f"its SHA-256 is {short(digest)}, recorded is {short(recorded)}" if recorded else "cache.json is lost"
            file = self.path if self.path.is_file() else self.path / BACKBONE
            message = f"{file}: this is not the backbone that made the features ({what}); the same extract command repairs it"
            raise self.blamed(CorruptCacheError(message))

    @property
    def root(self) -> Path:
        """The folder that the samples' paths are relative to, when they were last extracted."""
        return self.samples.root

    @cached_property
    def shards(self) -> list[shard.Shard]:
        """The shards of this cache's fingerprint, in the order of writing."""
        try:
            paths = shard_paths(self.path)
            with Stage("opening the shards", len(paths), "shards") as stage:
                shards = [shard.read_shard(path) for path in stage.each(paths)]
        except (CorruptCacheError, InputMissingError) as error:
            raise self.blamed(error) from error
        mine = [s for s in shards if s.fingerprint == self.fingerprint.canonical]
        odd = next((each for each in mine if each.dim != mine[0].dim), None)
        if odd is not None:
            message = f"{odd.path} has features of width {odd.dim}, and {mine[0].path.name} of width {mine[0].dim}"
            raise self.blamed(CorruptCacheError(message))
        if not mine and self.samples.counts["ok"]:  # all are gone: another run has replaced them, or every one is missing
            gone = self.blamed(CorruptCacheError(""))
            if isinstance(gone, LockedError):
                raise gone
        return mine

    @cached_property
    def _index(self) -> tuple[NDArray[np.bytes_], NDArray[np.int32], NDArray[np.int32]]:
        """Sorted keys, and the shard and the row of each."""
        sizes = [len(s.sha256) for s in self.shards]
        keys = np.concatenate([s.sha256 for s in self.shards]) if self.shards else np.empty(0, "S32")
        owner = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]) if sizes else np.empty(0, np.int32)
        order = np.argsort(keys, kind="stable")
        return keys[order], owner[order], row[order]

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.shards[0].dim if self.shards else 0

    @property
    def views(self) -> int:
        """Number of feature vectors of each image; the first is that of the image without augmentation."""
        return self.fingerprint.views

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 if every row is stored so, else float32."""
        kinds = {s.dtype for s in self.shards}
        return np.dtype(np.float16) if kinds == {np.dtype(np.float16)} else np.dtype(np.float32)

    def features(self, sha256: Sequence[bytes], *, views: bool = False) -> NDArray[np.floating[Any]]:
        """Features by content digest, ``(n, dim)`` in `dtype`; with ``views`` those of all views, ``(n, self.views, dim)``.

        Each shard is checked completely when it is first read.

        Raises:
            CorruptCacheError: some are missing, or a shard is damaged; names it.
        """
        vectors = _read(self.lazy(sha256, views=views))
        return vectors.reshape(len(sha256), self.views, -1) if views else vectors

    def lazy(self, sha256: Sequence[bytes], *, views: bool = False) -> LazyFeatures:
        """Lazy `features`; with ``views`` those of one image follow each other, ``(n * self.views, dim)``.

        Raises:
            CorruptCacheError: some are missing.
        """
        keys, owner, row = self._index
        digests = np.frombuffer(b"".join(sha256), "S32")
        place = np.searchsorted(keys, digests)
        present = place < len(keys)
        present[present] = keys[place[present]] == digests[present]
        if not present.all():
            missing = int((~present).sum())
            message = (
                f"{self.path} lacks the features of {missing} of {len(digests)} samples: a shard is missing. "
                f"Run the same extract command again; it computes what is missing"
            )
            raise self.blamed(CorruptCacheError(message))
        numbers = np.arange(self.views if views else 1, dtype=np.int32)
        vectors = (row[place, None] * np.int32(self.views) + numbers).ravel()
        return LazyFeatures(self.shards, np.repeat(owner[place], len(numbers)), vectors, self.dtype, self._sound, self.blamed)

    def describe(self) -> dict[str, Any]:
        """The facts that `penult info` shows, as JSON."""
        splits = self.samples.splits()
        labels: dict[str, dict[str, int]] = {}
        once = {row.sha256: row for row in reversed(self.rows())}  # of duplicates the first
        for row in reversed(once.values()):
            for label in self.samples.task.labels_of(row) or ["(no label)"]:
                per = labels.setdefault(label, {})
                per[row.split or "(none)"] = per.get(row.split or "(none)", 0) + 1
        return {
            "path": str(self.path),
            "format": self.meta["format"],
            "rows": len(np.unique(self._index[0])),  # a killed `compact --prune` may have left some twice
            "dim": self.dim,
            "views": self.views,
            "dtype": str(self.dtype),
            "shards": len(self.shards),
            "counts": self.samples.counts,
            "splits": splits,
            "split_rule": self.samples.facts.get("split"),
            "group_by": self.samples.facts.get("group_by"),
            "task": self.samples.task.name,
            "targets": self._targets(),
            "labels": dict(sorted(labels.items())),
            "failures": [
                {"path": row.name, "code": row.code, "message": row.message} for row in self.samples.rows if not row.ok
            ],
            "root": os.fsencode(self.root).decode("utf-8", "backslashreplace"),
            "layers": self.layers,
            "fingerprint": dict(self.fingerprint.fields),
            "facts": self.meta["facts"],
        }

    def _targets(self) -> dict[str, dict[str, float | None]]:
        """How many samples have each numeric target, and its range."""
        rows = self.rows()
        values = np.array([row.targets for row in rows], np.float64).reshape(len(rows), len(self.samples.target_names))
        ranges = {}
        for name, column in zip(self.samples.target_names, values.T, strict=True):
            numbers = column[~np.isnan(column)]
            least, most = (float(numbers.min()), float(numbers.max())) if len(numbers) else (None, None)
            ranges[name] = {"given": len(numbers), "min": least, "max": most}
        return ranges

    def rows(self, split: str | None = None) -> list[Row]:
        """The ok rows of a split, or all of them.

        Raises:
            BadDataError: there is no such split; names the existing ones.
        """
        rows = [row for row in self.samples.rows if row.ok and (split is None or row.split == split)]
        if not rows and split is not None:
            have = ", ".join(self.samples.splits()) or "no splits at all"
            message = f"{self.path} has no samples in split {split!r}; it has {have}"
            raise BadDataError(message)
        return rows

    def subset(self, split: str | None = None) -> Subset:
        """Features and labels of a split as `extract` stored it, or of everything.

        Raises:
            BadDataError: no such split, or samples without a label.
        """
        return self.of_rows(self.rows(split), split or "all")

    def split(self, *, test: float = 0.2, val: float = 0.0, seed: int = 0) -> tuple[Subset, ...]:
        """Split the cache again by hash rank, ignoring its stored split: ``(train, test)``, or ``(train, val, test)``.

        Raises:
            BadDataError: a class is too small for the requested splits.
        """
        rows = self.rows()
        version, stratify = version_of(self.samples.facts.get("split")), self.samples.task.stratifies
        names = assign_splits(rows, val=val, test=test, seed=seed, stratify=stratify, version=version)
        splits = ["train", *(["val"] if val else []), *(["test"] if test else [])]
        return tuple(
            self.of_rows([row for row, name in zip(rows, names, strict=True) if name == split], split) for split in splits
        )

    def of_rows(self, rows: Sequence[Row], name: str, *, lazy: bool = False, views: bool = False) -> Subset:
        """Features and labels of some of this cache's ok rows.

        Args:
            rows: the rows.
            name: of the subset.
            lazy: leave their features on disk, and order them as on disk.
            views: all views of each image, one after the other, each with the label, path and group of the image.

        Raises:
            BadDataError: there are none, or some have no label or lack a target.
        """
        unlabelled = self.samples.task.incomplete(rows)
        if unlabelled or not rows:
            what = f"{len(unlabelled)} of {len(rows)} samples"
            message = (
                f"{self.path}: {what} {self.samples.task.lacking} (such as {unlabelled[0].name})"
                if rows
                else f"{self.path} has no usable samples"
            )
            raise BadDataError(message)
        digests = [row.sha256 for row in rows]
        located, each = self.lazy(digests, views=views), self.views if views else 1
        rows = [row for row in rows for _ in range(each)]
        if lazy:
            order = located.order_of_runs(each)
            located, rows = located[order], [rows[i] for i in order.tolist()]
        return Subset(
            X=located if lazy else _read(located),
            y=self.samples.truth(rows),
            sha256=[row.sha256 for row in rows],
            paths=[row.path for row in rows],
            groups=groups_of(rows),
            name=name,
        )


def _read(located: LazyFeatures) -> NDArray[np.floating[Any]]:
    with Stage("reading features", len(located), "rows") as stage:
        return located.read(advance=stage.step)


def is_cache(path: str | Path) -> bool:
    """Whether a path is a cache (a folder or one file) rather than a dataset; opening it fails if it is unfinished."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".h5"
    return (path / "samples.h5").is_file() or ((path / ".lock").is_file() and (path / "shards").is_dir())
