"""The store of prepared backbones: finished ONNX files, each under the digest of the request that it answers.

``backbones`` in `store.environment.cache_folder` has a folder for each entry (`prepared_entry`), named by the SHA-256 of its
request. It has that name only when it is complete, so readers need no lock and no permission to write. What does not fit its
digest is removed and made again. The time of the last use is the modification time of ``entry.json``; beyond `limit`, the
entries that were used longest ago go.

Nothing depends on the store: without a place for it, or space, everything is made anew.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.prepared_entry import (
    ENTRY,
    Entry,
    copy_files,
    delete_unfinished,
    key_of,
    read_entry,
    remove_entry,
    write_entry,
)
from store.environment import cache_folder
from store.errors import BadDataError, LockedError, OutputError, PenultError, StorageError, UsageError
from store.format import atomic
from store.format.lock import lock_of, output_lock, tidy

log = logging.getLogger("penult.extractor")

FOLDER = "backbones"
LOCK = re.compile(r"\.([0-9a-f]{64})\.penult-lock")  # what `output_lock` makes
KEY = re.compile(r"[0-9a-f]{64}")
LIMIT_GIB = 4.0  # some forty networks of the size of a ResNet-50, or one of the largest with others beside it
LIMIT_VARIABLE = "PENULT_CACHE_GIB"
SPARE = 4  # times the size of an entry must be free: what a run writes itself comes first

_warned: set[str] = set()  # what this process has warned of: a sweep says each once


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
            others = copy_files(entry, files, new)
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


# --- writing -----------------------------------------------------------------------------------------------------------


def keep(request: Mapping[str, Any], path: Path, facts: BackboneFacts, others: Mapping[str, bytes] | None = None) -> None:
    """Put a copy of a finished model into the store, unless another run does so now; what cannot be kept is warned of once.

    Args:
        request: everything that decides the files, as JSON. ``name`` and ``weights``, if there, are those of the facts.
        path: the ONNX file, which was checked.
        facts: of the backbone, as the file has them.
        others: HDF5 files that belong to it, by name.

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
            if not os.path.lexists(place):  # else another run was faster
                files = (path, *onnx_file.data_files(path))
                _make_room(store, sum(file.stat().st_size for file in files) + sum(map(len, (others or {}).values())))
                write_entry(request, files, facts, others or {}, place)
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
            total -= sizes[place][1] if remove_entry(place) else 0
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
                if remove_entry(place):
                    count, size = count + 1, size + each
        except OSError as error:
            message = f"cannot remove {place}: {error.strerror or error}"
            raise atomic.write_error(error)(message) from error
    if store is not None:
        _remove_leftovers(store)
    return count, size


def _remove_leftovers(store: Path) -> None:
    """Remove what killed processes left: unfinished entries, those that were being removed, and lock files."""
    with suppress(OSError):
        for item in sorted(store.iterdir()):
            place = store / atomic.final_name(item.name)
            if KEY.fullmatch(place.name) and item != place:
                with suppress(LockedError, OSError), output_lock(place):
                    delete_unfinished(item)
            elif lock := LOCK.fullmatch(item.name):
                tidy(store / lock[1])


def _discard(place: Path, reason: str) -> None:
    """Remove a damaged entry, if that is possible, and say so."""
    removed = False
    with suppress(LockedError, OSError), output_lock(place):
        removed = remove_entry(place)
    then = (
        "it is made again"
        if removed
        else "it cannot be removed: until somebody does, the network is made again for every cache"
    )
    log.warning("the prepared backbone in %s is damaged (%s); %s", place, reason, then)


def _warn_once(what: str, text: str) -> None:
    if what not in _warned:
        _warned.add(what)
        log.warning("%s", text)
