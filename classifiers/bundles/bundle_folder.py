"""The folder of a bundle: when it may be replaced, how a finished one is put in place, and what killed runs left."""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from extractor.graphs.onnx_file import DATA_NAME, is_marked
from store.errors import LockedError, OutputError, OutputExistsError
from store.format import atomic
from store.format.lock import lock_of, output_lock, tidy

log = logging.getLogger("penult.classifiers")


NOVELTY = "novelty.h5"
BUNDLE_FILES = {"backbone.onnx", "head.onnx", "head.json", NOVELTY, "predictions.h5", "report.html", "SHA256SUMS"}


def install(finished: Path, target: Path) -> None:
    """Move a finished bundle folder to its place; the old or the new bundle is there at any time.

    The two are exchanged in one step if the kernel can. Elsewhere two renames do it, and `put_back` undoes a half of them. In a
    container, a folder of the image cannot be renamed at all; its files are then replaced one by one, and until the last one,
    ``head.json``, the digests refuse what is there.

    Raises:
        OutputExistsError: the target is not a bundle, or holds other files.
    """
    refuse_existing(target, overwrite=True)  # hours may have passed since the first check
    if not target.exists():
        finished.rename(target)
    elif atomic.exchange(finished, target):
        remove_folder(finished)  # the old one
    else:
        _replace(finished, target)
    atomic.fsync_directory(target.parent)


def _replace(finished: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.urandom(6).hex()}.old")
    try:
        target.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        before = [item for item in target.iterdir() if not (finished / item.name).exists()]
        for item in sorted(finished.iterdir(), key=lambda item: item.name == "head.json"):
            item.replace(target / item.name)
        for item in before:
            item.unlink()
        finished.rmdir()
        return
    try:
        finished.rename(target)
    except BaseException:
        with suppress(OSError):
            old.rename(target)
        raise
    remove_folder(old)


def put_back(path: Path) -> None:
    """Undo the first of two renames, if a run was killed between them and none is at work now."""
    if path.exists() or not _old(path):
        return
    with suppress(LockedError, OSError), output_lock(path):
        old = _old(path)
        if len(old) == 1 and not path.exists():
            old[0].rename(path)
            log.warning("%s is back: a run that would have replaced it was killed", path)


def _old(path: Path) -> list[Path]:
    """Bundles that were moved away from a path."""
    return [left for left in path.parent.glob(f".{glob.escape(path.name)}.*.old") if _is_old(left, path) and _is_bundle(left)]


def _is_old(item: Path, path: Path) -> bool:
    return re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.old", item.name) is not None


@contextmanager
def reserved(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold the place of a bundle from before the work until it is there; in a folder that is not there yet, it is held later.

    Raises:
        OutputExistsError, OutputError: as `refuse_existing`.
        LockedError: another run makes a bundle there.
        StorageError: its file system has no locks.
    """
    try:
        refuse_existing(path, overwrite=overwrite)
    except OutputExistsError:
        tidy(path)
        raise
    with output_lock(path) if path.absolute().parent.is_dir() else nullcontext():
        yield


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse an output path that exists and may not be replaced, before any work is done.

    Raises:
        OutputExistsError: it may not be replaced; says why.
        OutputError: nothing can be created there.
    """
    if path.is_symlink():
        message = f"{path} is a symbolic link, which is not overwritten; give its target instead: {path.resolve()}"
        raise OutputExistsError(message)
    atomic.require_room(path)
    if not path.exists():
        return
    atomic.require_free(path, overwrite=overwrite)
    if not _is_bundle(path):
        message = f"{path} exists and is not a bundle; it is not overwritten"
        raise OutputExistsError(message)
    foreign = sorted(item.name for item in path.iterdir() if not _is_part(item))
    if foreign:
        message = f"{path} holds items that are not part of a bundle ({', '.join(foreign[:3])}); it is not overwritten"
        raise OutputExistsError(message)
    if not os.access(path, os.W_OK | os.X_OK):
        message = f"{path} is read-only for this user, so its files could not be replaced; choose another name"
        raise OutputError(message)


def _is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, damaged or not; a file named head.json alone is not enough."""
    if not (path / "head.json").is_file():
        return False
    if (path / "head.onnx").is_file() and (path / "backbone.onnx").is_file():
        return True
    try:
        facts = json.loads((path / "head.json").read_bytes())
    except ValueError:
        return False
    return isinstance(facts, dict) and {"format", "fingerprint"} <= facts.keys()


def _is_part(item: Path) -> bool:
    """Whether an item of a folder is part of a bundle, complete or not.

    A weights file is one that head.json names, or that begins with the mark of this program.
    """
    if item.is_symlink() or not item.is_file():
        return False
    name = atomic.final_name(item.name)
    if name in BUNDLE_FILES:
        return True
    if not name.startswith("backbone-") or not DATA_NAME.fullmatch(name):
        return False
    try:
        saved = json.loads((item.parent / "head.json").read_bytes())["files"]
    except (OSError, ValueError, TypeError, KeyError):
        saved = {}
    return name in saved or is_marked(item)


def remove_leftovers(path: Path) -> None:
    """Delete what killed runs left beside a bundle, whose place is held; an old bundle only if a new one exists."""
    put_back(path)
    for left in list(path.parent.iterdir()):
        if atomic.final_name(left.name) == path.name != left.name or (path.is_dir() and _is_old(left, path)):
            remove_folder(left)


def remove_folder(folder: Path) -> None:
    """Delete the files of a bundle from a temporary folder, a job's bundle and its lock inside, and the folder if that is all.

    ``head.json`` goes last: it names some of them, also to the next process if this one is killed.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    try:
        with suppress(FileNotFoundError):
            lock = lock_of(folder / atomic.final_name(folder.name))
            if not lock.lstat().st_size:
                lock.unlink()
        for item in sorted(folder.iterdir(), key=lambda item: item.name == "head.json"):
            if _is_part(item):
                item.unlink()
            elif atomic.final_name(item.name) == atomic.final_name(folder.name):
                remove_folder(item)
        folder.rmdir()
    except OSError as error:
        log.warning("cannot delete %s: %s", folder, error.strerror)
