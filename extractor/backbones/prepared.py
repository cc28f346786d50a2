"""The store of prepared backbones: finished ONNX files, each under the digest of the request that it answers.

``backbones`` in `store.environment.cache_folder` has a folder for each entry, named by the SHA-256 of its request: the model
with its external data, other files if the writer wants them beside it, and ``entry.json`` with the digest of every one. An
entry is written under a temporary name and renamed when it is complete, so readers need no lock and no permission to write.
Whatever is copied from it is compared with its digest on the way; what does not fit is removed and made again. The time of the
last use is the modification time of ``entry.json``; beyond `limit`, the entries that were used longest ago go.

Nothing depends on the store: without a place for it, or space, everything is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts
from store.environment import cache_folder
from store.errors import BadDataError, LockedError, OutputError, PenultError, StorageError, UsageError
from store.fingerprint import Fingerprint, file_digest
from store.format import atomic
from store.format.lock import lock_of, output_lock, tidy

log = logging.getLogger("penult.extractor")

FOLDER = "backbones"
MODEL, ENTRY = "backbone.onnx", "entry.json"
FORMAT = 1
LOCK = re.compile(r"\.([0-9a-f]{64})\.penult-lock")  # what `output_lock` makes
KEY = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[^/\0.][^/\0]*")  # of a file of an entry: inside its folder
LIMIT_GIB = 4.0  # some forty networks of the size of a ResNet-50, or one of the largest with others beside it
LIMIT_VARIABLE = "PENULT_CACHE_GIB"
SPARE = 4  # times the size of an entry must be free: what a run writes itself comes first
BLOCK = 1 << 20

_warned: set[str] = set()  # what this process has warned of: a sweep says each once


@dataclass(frozen=True)
class Entry:
    """One prepared backbone.

    Attributes:
        path: its folder.
        request: everything that decides its files, as JSON.
        facts: of the backbone.
        files: size in bytes and SHA-256 of each, by name.
        made, used: times.
    """

    path: Path
    request: Mapping[str, Any]
    facts: BackboneFacts
    files: Mapping[str, tuple[int, str]]
    made: datetime
    used: datetime

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """What `penult backbones --prepared` shows."""
        shown = {"name": self.facts.name, "weights": self.facts.weights, "layers": [each.layer for each in self.facts.layers]}
        times = {name: time.isoformat(timespec="seconds") for name, time in (("made", self.made), ("used", self.used))}
        place = {"path": str(self.path), "request": dict(self.request)}
        return {**shown, "precision": self.facts.precision, "bytes": self.bytes, **times, **place}


@dataclass(frozen=True)
class Taken:
    """A prepared backbone that was copied: its facts, and the content of the files beside the model."""

    facts: BackboneFacts
    others: Mapping[str, bytes]


def folder() -> Path | None:
    """Where prepared backbones are kept; None if there is no home folder, which is warned of, or they are switched off.

    Raises:
        UsageError: the limit in the environment is no number.
    """
    if not limit():
        return None
    try:
        return cache_folder() / FOLDER
    except RuntimeError:
        _warn_once(
            "home",
            "there is no home folder to keep prepared backbones in, so networks are exported for every cache; "
            "PENULT_CACHE=FOLDER in the environment chooses one",
        )
        return None


def limit() -> int:
    """How many bytes all prepared backbones may have; 0 switches them off.

    Raises:
        UsageError: the environment variable that changes it is no number.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GIB)
    try:
        gib = float(text)
        if 0 <= gib < 2**30:
            return int(gib * 2**30)
    except ValueError:
        pass
    message = f"the environment variable {LIMIT_VARIABLE} is {text!r}; expected a number of GiB, 0 or more"
    raise UsageError(message)


def key_of(request: Mapping[str, Any]) -> str:
    """The name of the entry of a request; another one in another format, so that no version removes what another can read."""
    return Fingerprint({"format": FORMAT, "request": request}).key


# --- reading -----------------------------------------------------------------------------------------------------------


def take(request: Mapping[str, Any], path: Path) -> Taken | None:
    """Copy the model of a request from the store, with its external data; a damaged entry is removed.

    Args:
        request: as it was kept.
        path: the ONNX file; an existing one is replaced when the new one is complete.

    Returns:
        None if there is no such entry, or it is damaged.

    Raises:
        LockedError, OutputError, StorageError: ``path`` cannot be written.
    """
    store = folder()
    if store is None or not os.path.lexists(place := store / key_of(request)):
        return None
    try:
        entry = read_entry(place)
        with ExitStack() as opened, onnx_file.replacing(path) as new:
            # All of them first: what is removed meanwhile, because it was used longest ago, stays readable.
            files = {name: opened.enter_context((place / name).open("rb")) for name in entry.files}
            others = _copy(entry, files, new)
    except (LockedError, OutputError, StorageError):
        raise
    except PermissionError as error:
        _warn_once("read", f"cannot read the prepared backbones in {store}: {error.strerror}")
        return None
    except (BadDataError, OSError) as error:
        if os.path.lexists(place):  # else it was removed just now
            _discard(place, str(error))
        return None
    with suppress(OSError):  # a store that is only read
        os.utime(place / ENTRY)
        if lock_of(place).exists():  # of a run that was killed when it had written the entry
            tidy(place)
    return Taken(entry.facts, others)


def read_entry(place: Path) -> Entry:
    """What is known of an entry; its other files are not opened.

    Raises:
        BadDataError: it is damaged, or is not what its name says.
        OSError: it cannot be read.
    """
    with (place / ENTRY).open("rb") as file:
        data, used = file.read(), os.fstat(file.fileno()).st_mtime
    try:
        record = json.loads(data)
        content = record["content"]
        if record["format"] != FORMAT or Fingerprint(content).key != record["sha256"]:
            message = "its digest is another"
            raise ValueError(message)
        facts = BackboneFacts.from_json(json.dumps(content["facts"]))
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in content["files"].items()}
        made, last = datetime.fromisoformat(content["made"]), datetime.fromtimestamp(used, UTC)
        request = dict(content["request"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        message = f"{ENTRY} cannot be read ({error})"
        raise BadDataError(message) from error
    fits = all(request.get(name, value) == value for name, value in (("name", facts.name), ("weights", facts.weights)))
    if not fits or key_of(request) != place.name or MODEL not in files or not all(map(NAME.fullmatch, files)):
        message = "it is not what its name says"
        raise BadDataError(message)
    return Entry(place, request, facts, files, made, last)


def _copy(entry: Entry, files: Mapping[str, IO[bytes]], new: Path) -> dict[str, bytes]:
    """Copy the model of an entry, with its external data; return the content of the other files.

    Raises:
        BadDataError: a file is not what was kept.
        OutputError, StorageError: it cannot be written.
    """
    content = b"".join(_checked(files[MODEL], MODEL, entry))
    model = onnx_file.read_model(entry.path / MODEL, content)
    if backbone_facts.facts_in(model) != entry.facts:
        message = f"{MODEL} says something else of itself than {ENTRY}"
        raise BadDataError(message)
    data = onnx_file.external_files(model)
    if not set(data) < set(entry.files):
        message = f"{MODEL} names files that are not of the entry"
        raise BadDataError(message)
    renewed = backbone_facts.renew_probe_image(model, entry.facts)
    if data:
        onnx_file.save_beside(model, new, {name: _checked(files[name], name, entry) for name in data})
    else:
        atomic.commit(new, model.SerializeToString() if renewed else content)
    others = set(entry.files) - {MODEL, *data}
    return {name: b"".join(_checked(files[name], name, entry)) for name in others}


def entries() -> tuple[list[Entry], list[Path]]:
    """All prepared backbones, the last used first, and the folders of damaged ones.

    Raises:
        UsageError: as `folder`.
    """
    sound, damaged = [], []
    for place in _places(folder()):
        try:
            sound.append(read_entry(place))
        except (BadDataError, OSError):
            if os.path.lexists(place):
                damaged.append(place)
    return sorted(sound, key=lambda entry: entry.used, reverse=True), damaged


def _places(store: Path | None) -> list[Path]:
    """The folders of all entries of a store."""
    with suppress(OSError):
        return sorted(place for place in store.iterdir() if KEY.fullmatch(place.name)) if store else []
    return []


def _checked(file: IO[bytes], name: str, entry: Entry) -> Iterator[bytes]:
    """The content of an opened file of an entry in blocks, compared with its digest at the end."""
    sha = hashlib.sha256()
    try:
        while block := file.read(BLOCK):
            sha.update(block)
            yield block
    except OSError as error:
        message = f"{name} cannot be read: {error.strerror}"
        raise BadDataError(message) from error
    if sha.hexdigest() != entry.files[name][1]:
        message = f"{name} has another digest"
        raise BadDataError(message)


# --- writing -----------------------------------------------------------------------------------------------------------


def keep(request: Mapping[str, Any], path: Path, facts: BackboneFacts, others: Mapping[str, bytes] | None = None) -> None:
    """Put a copy of a finished model into the store, unless another run does so now; what cannot be kept is warned of once.

    Args:
        request: everything that decides the files, as JSON. ``name`` and ``weights``, if there, are those of the facts.
        path: the ONNX file, which was checked.
        facts: of the backbone, as the file has them.
        others: files that belong to it, by name.

    Raises:
        UsageError: as `folder`.
    """
    store = folder()
    if store is None:
        return
    place = store / key_of(request)
    try:
        _make_folder(store)
        with output_lock(place):
            _remove_leftovers(store)
            if not place.exists():  # else another run was faster
                _write(request, path, facts, others or {}, place)
    except LockedError:
        log.debug("%s is kept by another run", place)
    except (PenultError, OSError) as error:
        reason = error if isinstance(error, PenultError) else error.strerror
        _warn_once("keep", f"prepared backbones cannot be kept in {store}, so the next run makes them again: {reason}")


def _make_folder(store: Path) -> None:
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass
    except OSError as error:
        message = f"it is not writable ({error.strerror})"
        raise StorageError(message) from error


def _write(request: Mapping[str, Any], path: Path, facts: BackboneFacts, others: Mapping[str, bytes], place: Path) -> None:
    """Write a new entry and make room for it.

    Raises:
        OSError, PenultError: it cannot be written; nothing is left.
    """
    content = path.read_bytes()
    model = onnx_file.read_model(path, content)
    data = onnx_file.data_files(path, model)
    size = sum(file.stat().st_size for file in (path, *data)) + sum(map(len, others.values()))
    _make_room(place.parent, size)
    unfinished = atomic.temporary(place)
    unfinished.mkdir()
    try:
        if data:
            with ExitStack() as opened:
                files = {file.name: opened.enter_context(file.open("rb")) for file in data}
                onnx_file.save_beside(model, unfinished / MODEL, {name: _blocks(file) for name, file in files.items()})
        else:
            atomic.commit(unfinished / MODEL, content)
        for name, other in others.items():
            atomic.commit(unfinished / name, other)
        atomic.commit(unfinished / ENTRY, _record(request, facts, unfinished))
        unfinished.rename(place)
        atomic.fsync_directory(place.parent)
    except BaseException:
        _delete(unfinished)
        raise


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _record(request: Mapping[str, Any], facts: BackboneFacts, place: Path) -> bytes:
    files = {file.name: (file.stat().st_size, file_digest(file)) for file in sorted(place.iterdir())}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"request": dict(request), "facts": json.loads(facts.to_json()), "files": files, "made": made}
    record = {"format": FORMAT, "sha256": Fingerprint(content).key, "content": content}
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _make_room(store: Path, size: int) -> None:
    """Remove the entries that were used longest ago until there is room for a new one.

    Raises:
        StorageError: the new one alone is too large, or the disk is nearly full.
    """
    most = limit()
    if size > most:
        message = f"this one has {size / 2**20:.0f} MiB, and {LIMIT_VARIABLE} allows {most / 2**30:g} GiB for all of them"
        raise StorageError(message)
    sizes = {place: (_used(place), _size(place)) for place in _places(store)}
    total = sum(each for _, each in sizes.values())
    for place in sorted(sizes, key=sizes.__getitem__):
        if total + size <= most:
            break
        with suppress(LockedError, OSError), output_lock(place):
            _remove(place)
            total -= sizes[place][1]
    free = shutil.disk_usage(store).free
    if free < SPARE * size:
        message = f"{free / 2**20:.0f} MiB are free on its disk, and this one has {size / 2**20:.0f} MiB"
        raise StorageError(message)


def _used(place: Path) -> float:
    with suppress(OSError):
        return (place / ENTRY).stat().st_mtime
    return 0.0


def _size(place: Path) -> int:
    with suppress(OSError):
        return sum(file.lstat().st_size for file in place.iterdir())
    return 0


# --- removing ----------------------------------------------------------------------------------------------------------


def prune() -> tuple[int, int]:
    """Remove all prepared backbones, also damaged and unfinished ones, but for what another run writes now.

    Returns:
        How many were removed, and their bytes.

    Raises:
        OutputError, StorageError: one cannot be removed.
    """
    store, count, size = folder(), 0, 0
    for place in _places(store):
        each = _size(place)
        try:
            with suppress(LockedError), output_lock(place):
                _remove(place)
                count, size = count + 1, size + each
        except OSError as error:
            message = f"cannot remove {place}: {error.strerror or error}"
            raise atomic.write_error(error)(message) from error
    if store is not None:
        _remove_leftovers(store)
    return count, size


def _remove(place: Path) -> None:
    """Remove an entry, which is held: it is gone under its name before its first file is."""
    unfinished = atomic.temporary(place)
    place.rename(unfinished)
    _delete(unfinished)


def _delete(item: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def _remove_leftovers(store: Path) -> None:
    """Remove what killed processes left: unfinished entries, those that were being removed, and lock files."""
    with suppress(OSError):
        for item in sorted(store.iterdir()):
            place = store / atomic.final_name(item.name)
            if KEY.fullmatch(place.name) and item != place:
                with suppress(LockedError, OSError), output_lock(place):
                    _delete(item)
            elif lock := LOCK.fullmatch(item.name):
                tidy(store / lock[1])


def _discard(place: Path, reason: str) -> None:
    """Remove a damaged entry, if that is possible, and say so."""
    log.warning("the prepared backbone in %s is damaged and is made again: %s", place, reason)
    with suppress(LockedError, PenultError, OSError), output_lock(place):
        _remove(place)


def _warn_once(what: str, text: str) -> None:
    if what not in _warned:
        _warned.add(what)
        log.warning("%s", text)
