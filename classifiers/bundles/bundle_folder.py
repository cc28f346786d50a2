"""The folder of a bundle: what may be replaced, how a finished one is put in place, what killed runs left."""

from __future__ import annotations

import json
import logging
import re
import secrets
from pathlib import Path

from extractor.graphs.onnx_file import DATA_NAME, is_marked
from store.errors import OutputExistsError
from store.format import atomic
from store.format.lock import folder_lock

log = logging.getLogger("penult.classifiers")


NOVELTY = "novelty.h5"
BUNDLE_FILES = {"backbone.onnx", "head.onnx", "head.json", NOVELTY, "predictions.h5", "report.html"}


def install(finished: Path, target: Path) -> None:
    """Put a finished bundle folder where another one may be, which is there until the new one is.

    Raises:
        OutputExistsError: what is there is not a bundle alone.
    """
    refuse_existing(target, overwrite=True)  # hours may have passed since it was looked at
    if target.exists():
        old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
        target.rename(old)
        finished.rename(target)
        remove_folder(old)
    else:
        finished.rename(target)
    atomic.fsync_directory(target.parent)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Look before any work is done.

    Raises:
        OutputExistsError: the path is taken and may not be replaced.
    """
    if path.is_symlink():
        message = f"{path} is a symbolic link, which is not overwritten; name what it points to, {path.resolve()}"
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
        message = f"{path} holds what is not a bundle's ({', '.join(foreign[:3])}); it is not overwritten"
        raise OutputExistsError(message)


def _is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, damaged or not: a file called head.json alone does not make one."""
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
    """Whether something in a folder is what a bundle has there, complete or not. Weights are those that head.json names, or
    begin with our mark."""
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
    """Delete what killed runs left beside a bundle, unless one writes there now; an old bundle only where a new one is."""
    old = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.old") if path.is_dir() else None
    with folder_lock(path.parent, alone=True) as alone:
        for left in list(path.parent.iterdir()) if alone else ():
            if atomic.final_name(left.name) == path.name != left.name or (old and old.fullmatch(left.name)):
                remove_folder(left)


def remove_folder(folder: Path) -> None:
    """Delete the files of a bundle from a folder with a temporary name, a job's bundle inside it, and what is then empty."""
    if folder.is_symlink() or not folder.is_dir():
        return
    try:
        parts = {item: _is_part(item) for item in folder.iterdir()}  # before head.json goes, which names some of them
        for item, is_part in parts.items():
            if is_part:
                item.unlink()
            elif atomic.final_name(item.name) == atomic.final_name(folder.name):
                remove_folder(item)
        folder.rmdir()
    except OSError as error:
        log.warning("%s is left: %s", folder, error.strerror)
