"""An entry of the store of prepared backbones: a folder with a finished model, and the digest of every file in it.

The model, ``backbone.onnx``, may have external data, and HDF5 files beside it; ``entry.json`` has the request that all of it
answers, the facts of the backbone, and sizes and digests. An entry is written under a temporary name and renamed when it is
complete. Whatever is copied from it is compared with its digest on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from store.errors import BadDataError
from store.fingerprint import Fingerprint, file_digest
from store.format import atomic

from . import backbone_facts, onnx_file
from .backbone_facts import BackboneFacts

MODEL, ENTRY = "backbone.onnx", "entry.json"
FORMAT = 1
FILE = re.compile(r"entry\.json|backbone\.onnx|backbone-[0-9a-f]{8}\.data|[a-z]+\.h5")  # of an entry; nothing else is deleted
BLOCK = 1 << 20


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


def key_of(request: Mapping[str, Any]) -> str:
    """The name of the entry of a request; another one in another format, so that no version removes what another can read."""
    return Fingerprint({"format": FORMAT, "request": request}).key


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
    if not fits or key_of(request) != place.name or MODEL not in files or not all(map(FILE.fullmatch, files)):
        message = "it is not what its name says"
        raise BadDataError(message)
    return Entry(place, request, facts, files, made, last)


def copy_files(entry: Entry, files: Mapping[str, IO[bytes]], new: Path) -> dict[str, bytes]:
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


def write_entry(
    request: Mapping[str, Any], files: Sequence[Path], facts: BackboneFacts, others: Mapping[str, bytes], place: Path
) -> None:
    """Write a new entry; it has its name when it is complete.

    Args:
        request: everything that decides the files, as JSON.
        files: the ONNX file, and its external data.
        facts: of the backbone, as the file has them.
        others: HDF5 files that belong to it, by name.
        place: its folder, which is held.

    Raises:
        OSError, PenultError: it cannot be written; nothing is left.
    """
    path, *data = files
    unfinished = atomic.temporary(place)
    unfinished.mkdir()
    try:
        if data:
            with ExitStack() as opened:
                blocks = {file.name: _blocks(opened.enter_context(file.open("rb"))) for file in data}
                onnx_file.save_beside(onnx_file.read_model(path), unfinished / MODEL, blocks)
        else:
            atomic.commit(unfinished / MODEL, path.read_bytes())
        for name, other in others.items():
            atomic.commit(unfinished / name, other)
        atomic.commit(unfinished / ENTRY, _record(request, facts, unfinished))
        unfinished.rename(place)
        atomic.fsync_directory(place.parent)
    except BaseException:
        delete_unfinished(unfinished)
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


def remove_entry(place: Path) -> bool:
    """Remove an entry, which is held, if it is ours; return whether. It is gone under its name before its first file is."""
    ours = _is_ours(place)
    if ours:
        unfinished = atomic.temporary(place)
        place.rename(unfinished)
        delete_unfinished(unfinished)
    return ours


def delete_unfinished(place: Path) -> None:
    """Delete the folder of an entry, finished or not, if it is ours."""
    with suppress(OSError):
        if _is_ours(place):
            for file in place.iterdir():
                file.unlink()
            place.rmdir()


def _is_ours(place: Path) -> bool:
    """Whether this is a folder, its name apart, in which there is nothing but files as penult writes them."""
    if place.is_symlink() or not place.is_dir():
        return False
    return all(FILE.fullmatch(atomic.final_name(file.name)) and stat.S_ISREG(file.lstat().st_mode) for file in place.iterdir())
