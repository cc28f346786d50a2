"""Tar shards in WebDataset's layout: images with their ``.cls`` or ``.json``, read in place, never unpacked."""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from extractor.pixels.images import MAX_BYTES, ImageError
from store.errors import BadDataError, InputMissingError, display
from store.tasks import ONE_LABEL, Task

from .files import Files, Stat
from .samples import SPLITS, Sample, as_group, as_label, as_split, finished, in_words, leaves_root

log = logging.getLogger("penult.extractor")

ORIGIN = "tar"
KEY = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # WebDataset's rule: up to the first dot of the base name
IMAGES = {b"jpg", b"jpeg", b"png", b"webp", b"gif", b"bmp", b"tif", b"tiff", b"ppm", b"pgm", b"pbm", b"pnm", b"avif"}
IGNORED = {b"txt", b"cls", b"json"}  # beside an image: its labels, or, as .txt, a caption
INSIDE = re.compile(rb"(.*?\.tar)/(.*)", re.DOTALL | re.IGNORECASE)
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
SPLIT_NAME = re.compile(rf"({'|'.join(sorted(SPLITS, reverse=True))})(?![a-z])", re.IGNORECASE)
LABELS = (None, "label", "class", "cls")  # the first of them that is present; None: the .cls
KEYS = ("label", "class", "cls", "split", "group")  # of a .json; their case does not matter
MAX_FACTS = 2**20  # bytes of a .cls or .json; a few dozen are usual


@dataclass(frozen=True, slots=True)
class Index:
    """The regular files of one shard: name to (offset, size), valid while the stat of the shard is ``stamp``."""

    stamp: Stat
    members: dict[bytes, tuple[int, int]]
    others: int


@dataclass(frozen=True)
class _LeftOut:
    """What is no part of a sample: members of shards, and keys of ``.json`` files, in the order in which they were read."""

    members: Counter[bytes] = field(default_factory=Counter)
    keys: dict[str, None] = field(default_factory=dict)


def read_index(shard: Path) -> Index:
    """Read the headers of a shard.

    Raises:
        InputMissingError: it cannot be read.
        BadDataError: it is damaged, cut, compressed, or has a name that leaves the archive.
    """

    def refuse(what: str, cause: Exception | None = None) -> NoReturn:
        message = f"{shard} {what}"
        raise BadDataError(message) from cause

    members: dict[bytes, tuple[int, int]] = {}
    others = 0
    try:
        with shard.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            if file.read(6).startswith(COMPRESSED_MAGIC):
                refuse(_decompress(shard))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                end = -1
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    name = member.name.encode("utf-8", "surrogateescape").removeprefix(b"./")
                    if member.offset <= end or member.size < 0:  # a header that points back would be read for ever
                        refuse(f"is damaged at {display(name)}")
                    end = member.offset
                    if leaves_root(name):
                        refuse(f"holds {display(name)}, a name that leaves the archive; refused")
                    if not member.isreg() or member.issparse():
                        others += not member.isdir()
                        continue
                    if name in members:
                        refuse(f"holds {display(name)} twice")
                    members[name] = (member.offset_data, member.size)
                # tarfile takes a header that it cannot read as the end
                rest = os.pread(file.fileno(), 2**20, tar.offset)
    except tarfile.TarError as error:
        refuse(f"is not a valid tar file: {error}", error)
    except OSError as error:
        message = f"cannot read {shard}: {error.strerror or error}"
        raise InputMissingError(message) from error
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        refuse("does not end as a tar file does: it was cut, damaged, or joined from several. Create it again")
    return Index(stamp, members, others)


class TarFiles:
    """Members of the shards in a folder; a path is the path of the shard, then the name of the member."""

    def __init__(self, root: Path) -> None:
        self._base = os.fsencode(root) + b"/"
        self._shards: dict[bytes, Index] = {}
        self._lock = Lock()

    def shard(self, name: bytes) -> Index:
        """The index of a shard, read once; raises as `read_index` does."""
        with self._lock:
            if name not in self._shards:
                self._shards[name] = read_index(Path(os.fsdecode(self._base + name)))
            return self._shards[name]

    def stat(self, path: bytes) -> Stat | None:
        try:
            shard, (_, size) = self._place(path)
            return size, *_stamp(os.stat(self._base + shard))[1:]  # noqa: PTH116 - a tenth of the time of a Path's
        except (ImageError, OSError):
            return None

    def read(self, path: bytes) -> tuple[bytes, Stat]:
        name, (offset, size) = self._place(path)
        if size > MAX_BYTES:
            message = f"{size / 2**20:.0f} MiB; the limit is {MAX_BYTES // 2**20} MiB"
            raise ImageError(code="too_large", message=message)
        try:
            file = os.open(self._base + name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                stamp = _stamp(os.fstat(file))
                data = _pread(file, size, offset)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise ImageError(code="not_found", message=f"{display(name)} is gone") from error
        except OSError as error:
            raise ImageError(code="unreadable", message=error.strerror or str(error)) from error
        if stamp != self.shard(name).stamp or len(data) != size:
            raise ImageError(code="changed", message=f"{display(name)} changed while it was read")
        return data, (size, *stamp[1:])

    def _place(self, path: bytes) -> tuple[bytes, tuple[int, int]]:
        inside = INSIDE.fullmatch(path)
        if inside is None:
            raise ImageError(code="not_found", message="not a path into a .tar file")
        try:
            place = self.shard(inside[1]).members.get(inside[2])
        except InputMissingError as error:
            raise ImageError(code="not_found", message=str(error)) from error
        if place is None:
            raise ImageError(code="not_found", message="no such member of the shard")
        return inside[1], place


@dataclass(frozen=True)
class TarShards:
    """A ``.tar`` file, or a folder of them, each holding images ``key.jpg`` with files of the same key.

    A key ends at the first dot of the base name, as in WebDataset; if that gives no image, at the last one.
    The label is the text of ``key.cls``, else ``label``, ``class`` or ``cls`` of ``key.json``; ``split``, ``group`` and
    numeric targets are in the ``.json``. Without a ``split`` the folder of the shard counts, or the beginning of its name
    (``train-0001.tar``).

    Args:
        path: the file or the folder.
        group_by: a regular expression over the path.
        follow_symlinks: whether shards may be symbolic links.
        task: what labels mean, and which keys of the ``.json`` are numeric targets.
    """

    path: Path
    group_by: str | None = None
    follow_symlinks: bool = False
    task: Task = ONE_LABEL

    @property
    def root(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def origin(self) -> str:
        return ORIGIN

    @property
    def files(self) -> Files:
        return self._tar

    @cached_property
    def _tar(self) -> TarFiles:
        return TarFiles(self.root)

    def samples(self) -> list[Sample]:
        names = find_shards(self.path, follow_symlinks=self.follow_symlinks) if self.path.is_dir() else [self.path.name]
        samples: list[Sample] = []
        left_out = _LeftOut()
        for name in names:
            try:
                samples += self._shard(os.fsencode(name), left_out)
            except BadDataError:
                raise
            except ValueError as error:
                message = f"{self.path}: {error}"
                raise BadDataError(message) from error
        self._warn(samples, left_out)
        for i, name in enumerate(self.task.targets):
            if samples and all(sample.targets[i] != sample.targets[i] for sample in samples):
                message = f"{self.path}: no .json has a number {name!r} for --target"
                raise BadDataError(message)
        return finished(samples, self.path, self.group_by, self.task)

    def _warn(self, samples: list[Sample], left_out: _LeftOut) -> None:
        if left_out.keys:
            log.warning("%s: these keys of its .json are not used: %s", self.path, in_words(list(map(repr, left_out.keys))))
        if left_out.members:
            example = display(next(iter(left_out.members)))
            log.warning(
                "%d member(s) in %s belong to no image and are left out (such as %s; a sample is KEY.jpg with KEY.cls or "
                "KEY.json)",
                left_out.members.total(),
                self.path,
                example,
            )
        unlabelled = sum(sample.label is None for sample in samples)
        if unlabelled and not self.task.targets:
            log.warning(
                "%d of %d images in %s have no label: no .cls, and none in a .json", unlabelled, len(samples), self.path
            )

    def _shard(self, shard: bytes, left_out: _LeftOut) -> Iterator[Sample]:
        index = self._tar.shard(shard)
        if index.others:
            left_out.members[shard + b"/(links, devices or sparse files)"] += index.others
        parts: dict[bytes, dict[bytes, bytes]] = {}
        for name in index.members:
            match = KEY.fullmatch(name)
            if match is None:
                left_out.members[shard + b"/" + name] += 1
            else:
                parts.setdefault(match[1], {})[match[2].lower()] = name
        for key in [key for key, members in parts.items() if not IMAGES & members.keys()]:
            for name in parts.pop(key).values():  # file names with dots of their own, such as F.pergan.28.jpg
                stem, _, extension = name.rpartition(b".")
                parts.setdefault(stem, {})[extension.lower()] = name
        split = _split_of(shard)
        for key, members in parts.items():
            images = [extension for extension in members if extension in IMAGES]
            if len(images) > 1:
                message = f"{display(shard)}: {display(key)} has {len(images)} images; expected one for each key"
                raise ValueError(message)
            for extension, name in members.items():
                if extension not in images and not (images and extension in IGNORED):
                    left_out.members[shard + b"/" + name] += 1
            if images:
                path = shard + b"/" + members[images[0]]
                facts = self._facts(shard, members)
                try:
                    yield self._sample(path, facts, split, left_out)
                except ValueError as error:
                    message = f"the labels of {display(path)}: {error}"
                    raise ValueError(message) from error

    def _sample(self, path: bytes, facts: dict[str | None, Any], split: str | None, left_out: _LeftOut) -> Sample:
        name = next((name for name in LABELS if facts.get(name) is not None), None)
        used = (name, "split", "group", *self.task.targets)
        left_out.keys.update(dict.fromkeys(key for key in facts if key is not None and key not in used))
        return Sample(
            path=path,
            label=as_label(facts.get(name), self.task),
            split=as_split(facts.get("split")) or split,
            group=as_group(facts.get("group")),
            targets=tuple(self.task.number(facts.get(name)) for name in self.task.targets),
        )

    def _facts(self, shard: bytes, members: dict[bytes, bytes]) -> dict[str | None, Any]:
        """The labels of an image: its ``.json``, and its ``.cls`` under a key that no ``.json`` has."""
        facts: dict[str | None, Any] = {}
        for extension in (b"json", b"cls"):
            if extension not in members:
                continue
            path = shard + b"/" + members[extension]
            try:
                if self._tar.shard(shard).members[members[extension]][1] > MAX_FACTS:
                    message = f"it is larger than {MAX_FACTS} bytes"
                    raise ValueError(message)
                text = self._tar.read(path)[0].decode("utf-8-sig")
                content = {None: text.strip()} if extension == b"cls" else json.loads(text)
                if not isinstance(content, dict):
                    message = f"expected an object, found {content!r:.40}"
                    raise ValueError(message)
            except (ImageError, ValueError, RecursionError) as error:
                message = f"{display(path)} is not usable {'JSON' if extension == b'json' else 'UTF-8'} text: {error}"
                raise ValueError(message) from error
            facts |= self._with_own_keys(content)
        return facts

    def _with_own_keys(self, content: dict[str | None, Any]) -> dict[str | None, Any]:
        """The content of a ``.json`` with our own keys in lower case, like the columns of a manifest.

        Raises:
            ValueError: two keys would be the same.
        """
        known: dict[str | None, Any] = {}
        for key, value in content.items():
            own = key.lower() if key and key.lower() in KEYS and key not in self.task.targets else key
            if own in known:
                message = f"it has two keys {own!r} that differ in case alone; rename or remove one of them"
                raise ValueError(message)
            known[own] = value
        return known


def find_shards(folder: Path, *, follow_symlinks: bool = False) -> list[str]:
    """The shards of a folder that is a tar dataset, relative to it; empty for any other folder.

    A tar dataset is a folder with ``.tar`` files and no folders, or with nothing but split folders of that kind.

    Raises:
        BadDataError: there are images beside them, or they are compressed.
    """

    def listing(place: Path) -> tuple[list[str], list[str], list[str]]:
        with os.scandir(place) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
        files = [e.name for e in visible if e.is_file(follow_symlinks=follow_symlinks)]
        shards = [name for name in files if name.lower().endswith(".tar")]
        return shards, [e.name for e in visible if e.is_dir()], [name for name in files if name not in shards]

    def below(place: Path) -> list[str]:
        shards, folders, others = listing(place)
        if folders:
            return []
        images = [name for name in others if os.fsencode(name).lower().rpartition(b".")[2] in IMAGES]
        packed = [name for name in others if COMPRESSED.search(name)]
        if packed and not images:
            message = f"{place / packed[0]} {_decompress(Path(packed[0]))}"
            raise BadDataError(message)
        if shards and images:
            message = f"{place} holds tar shards and images ({shards[0]}, {images[0]}); move one kind away"
            raise BadDataError(message)
        return shards

    try:
        shards, folders, _ = listing(folder)
        if not folders:
            return below(folder)
        if shards or any(name.lower() not in SPLITS for name in folders):
            return []
        nested = {name: below(folder / name) for name in folders}
    except OSError:  # reading it as a folder of images reports it
        return []
    return [f"{name}/{shard}" for name in folders for shard in nested[name]] if all(nested.values()) else []


def _split_of(shard: bytes) -> str | None:
    match = SPLIT_NAME.match(os.fsdecode(shard))
    return SPLITS[match[1].lower()] if match else None


def _decompress(shard: Path) -> str:
    return (
        f"is compressed, and images in it could only be read from its beginning. Decompress it (gunzip, bunzip2, unxz, "
        f"unzstd {shard.name}) and name the .tar; images hardly compress"
    )


def _stamp(stat: os.stat_result) -> Stat:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _pread(file: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes at an offset; fewer only at the end of the file."""
    parts = []
    while size and (part := os.pread(file, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
