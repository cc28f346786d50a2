"""What is in a dataset: folder per class, split folders, flat folder, or a manifest, to samples with relative paths."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

from store.errors import BadDataError, InputMissingError, UsageError
from store.samples import display

from .files import Files, FolderFiles

log = logging.getLogger("penult.extractor")

SPLIT_FOLDERS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
SYSTEM_FILES = {b".DS_Store", b"desktop.ini", b".gitkeep", b".gitignore", b".directory"}  # written by file managers and git
SYSTEM_FOLDERS = {b"__MACOSX"}
COLUMNS = ("path", "label", "split", "group")


@dataclass(frozen=True, slots=True)
class Sample:
    """One input as the dataset declares it; ``path`` is relative to the root, as raw bytes, with ``/``."""

    path: bytes
    label: str | None = None
    split: str | None = None
    group: bytes = b""


class Source(Protocol):
    """Anything that can list samples below one root folder."""

    @property
    def root(self) -> Path:
        """What the samples' paths are relative to."""
        ...

    @property
    def files(self) -> Files:
        """What the samples' bytes are read from."""
        ...

    def samples(self) -> list[Sample]:
        """All inputs, ordered by path. Duplicated paths and paths that leave the root are errors."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """A folder per class, ``train|val|test`` folders of these, or a flat folder without labels.

    Every regular file in a class folder is an input, whatever its name: an unreadable one is recorded, not skipped.
    The label is the first folder below the root (or below the split folder); deeper folders belong to it.

    Args:
        root: the folder.
        follow_symlinks: whether links are followed. By default they are left out, and counted in a warning.
        group_by: a regular expression over the relative path; its first group (or the whole match) names the sample's group.
    """

    root: Path
    follow_symlinks: bool = False
    group_by: str | None = None

    @property
    def files(self) -> Files:
        return FolderFiles(self.root)

    def samples(self) -> list[Sample]:
        root = Path(self.root)
        if not root.is_dir():
            message = f"{root} is not a folder"
            raise InputMissingError(message)
        base = os.fsencode(root)
        links = [0]
        top_files, folders = _scan(base, follow=self.follow_symlinks, links=links)
        splits = self._split_folders(base, folders)
        found: list[Sample] = []
        if not folders:
            found = [Sample(name) for name in top_files]
        elif top_files:
            log.warning("%d file(s) beside the class folders of %s are not samples", len(top_files), root)
        for folder in folders:
            split = SPLIT_FOLDERS[os.fsdecode(folder).lower()] if splits else None
            before = len(found)
            names: dict[bytes, str] = {}
            for path in self._walk(base, folder, folders, links):
                parts = path.split(b"/")
                label = parts[1] if splits else parts[0]
                if splits and len(parts) < 3:
                    message = f"{display(path)} lies in a split folder but in no class folder"
                    raise BadDataError(message)
                if label not in names:
                    names[label] = display(label)
                found.append(Sample(path, names[label], split))
            if len(found) == before:
                log.warning("the folder %s in %s is empty", display(folder), root)
        if links[0]:
            log.warning("%d symbolic link(s) in %s were not followed (--follow-symlinks follows them)", links[0], root)
        return _finish(found, root, self.group_by)

    def _split_folders(self, base: bytes, folders: list[bytes]) -> bool:
        """Whether the top folders are splits: they have such names, and hold folders.

        A class may be called ``train``, of a set of vehicles; so it is what is inside that decides.

        Raises:
            BadDataError: some look like splits and others do not; names them.
        """

        def is_split(name: bytes) -> bool:
            if os.fsdecode(name).lower() not in SPLIT_FOLDERS:
                return False
            return bool(_scan(base + b"/" + name, follow=self.follow_symlinks, links=[0])[1])

        splits = [name for name in folders if is_split(name)]
        others = [name for name in folders if name not in splits]
        if splits and others:
            message = (
                f"{', '.join(map(display, splits))} in {self.root} look like splits (folders of class folders), and "
                f"{', '.join(map(display, others[:3]))} beside them do not. Move the latter away, or list the images in a CSV"
            )
            raise BadDataError(message)
        return bool(splits)

    def everything(self) -> list[Sample]:
        """All files below the root without labels, whatever the folders mean."""
        base, links = os.fsencode(self.root), [0]
        files, folders = _scan(base, follow=self.follow_symlinks, links=links)
        below = [path for folder in folders for path in self._walk(base, folder, folders, links)]
        return _finish([Sample(path) for path in [*files, *below]], Path(self.root), None)

    def _walk(self, base: bytes, top: bytes, tops: list[bytes], links: list[int]) -> Iterator[bytes]:
        """Relative paths of the regular files below a folder; with links followed, each real folder is visited once."""
        # A link back to the root, or to another class, must not bring that class's files in under this label.
        pending, seen = [top], {os.path.realpath(base), *(os.path.realpath(base + b"/" + folder) for folder in tops)}
        while pending:
            folder = pending.pop()
            files, folders = _scan(base + b"/" + folder, follow=self.follow_symlinks, links=links)
            for name in files:
                yield folder + b"/" + name
            for name in folders:
                real = os.path.realpath(b"/".join((base, folder, name)))
                if real not in seen:
                    seen.add(real)
                    pending.append(folder + b"/" + name)


@dataclass(frozen=True)
class Manifest:
    """A CSV file with a header: ``path``, and optionally ``label``, ``split``, ``group``; other columns are left alone.

    Args:
        path: the file, UTF-8 with or without a byte-order mark. Bytes that are not UTF-8 survive in paths.
        root: the folder that paths are relative to; by default the one the manifest lies in.
        group_by: a column, or a regular expression over the path.
    """

    path: Path
    root: Path
    group_by: str | None = None

    @property
    def files(self) -> Files:
        return FolderFiles(self.root)

    def samples(self) -> list[Sample]:
        try:
            text = Path(self.path).read_bytes().decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            message = f"cannot read {self.path}: {error.strerror}"
            raise InputMissingError(message) from error
        if not Path(self.root).is_dir():
            message = f"the root {self.root} is not a folder"
            raise InputMissingError(message)
        # Neither str.splitlines nor universal newlines: names may hold U+2028 or, in quotes, a carriage return.
        delimiter = "\t" if Path(self.path).suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = reader.fieldnames or []
        except csv.Error as error:
            message = f"{self.path}, line 1: {error}"
            raise BadDataError(message) from error
        if "path" not in header:
            message = f"{self.path}: no column 'path' in its first line (found: {', '.join(header) or 'nothing'})"
            raise BadDataError(message)
        column = self.group_by if self.group_by and self.group_by in header else "group"
        found: list[Sample] = []
        try:
            lines: dict[bytes, int] = {}
            for record in reader:
                sample = self._sample(record, reader.line_num, column)
                first = lines.setdefault(sample.path, reader.line_num)
                if first != reader.line_num:
                    message = f"{self.path}, line {reader.line_num}: {display(sample.path)} stands in line {first} already"
                    raise BadDataError(message)
                found.append(sample)
        except csv.Error as error:
            message = f"{self.path}, line {reader.reader.line_num}: {error}"
            raise BadDataError(message) from error
        missing = [sample for sample in found if sample.split is None]
        if missing and len(missing) < len(found):
            message = f"{self.path}: {len(missing)} of {len(found)} rows have no split (such as {display(missing[0].path)})"
            raise BadDataError(message)
        return _finish(found, self.path, None if self.group_by in header else self.group_by)

    def _sample(self, record: dict[str, str], line: int, group_column: str) -> Sample:
        def refuse(what: str) -> NoReturn:
            message = f"{self.path}, line {line}: {what}"
            raise BadDataError(message)

        if None in record:
            refuse("more fields than the header has")
        if any(record.get(name) is None for name in (*COLUMNS, group_column) if name in record):
            refuse("fewer fields than the header has")
        path = os.fsencode(record["path"])
        while path.startswith(b"./"):
            path = path[2:]
        if not path.strip():
            refuse("empty path")
        if path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
            refuse(f"{display(path)} leaves the root; paths are relative to {self.root} (see --root)")
        split = (record.get("split") or "").strip().lower() or None
        if split is not None and split not in SPLIT_FOLDERS:
            refuse(f"split {split!r}; expected train, val or test")
        return Sample(
            path=path,
            label=display((record.get("label") or "").strip().encode("utf-8", "surrogateescape")) or None,
            split=SPLIT_FOLDERS[split] if split else None,
            group=(record.get(group_column) or "").strip().encode("utf-8", "surrogateescape"),
        )


def open_source(
    data: str | Path, *, root: Path | None = None, follow_symlinks: bool = False, group_by: str | None = None
) -> Source:
    """The source that ``DATA`` on the command line means.

    Raises:
        InputMissingError: it does not exist.
        UsageError: it is a file of an unknown kind.
    """
    path = Path(data)
    if path.is_dir():
        return ImageFolder(path, follow_symlinks=follow_symlinks, group_by=group_by)
    if not path.exists():
        message = f"{path} does not exist"
        raise InputMissingError(message)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return Manifest(path, root or path.parent, group_by=group_by)
    message = f"{path} is neither a folder nor a CSV manifest"
    raise UsageError(message)


def _scan(folder: bytes, *, follow: bool, links: list[int]) -> tuple[list[bytes], list[bytes]]:
    """Names of the regular files and of the folders in a folder, sorted; links are counted where they are not followed."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not follow:
                    links[0] += 1
                elif entry.is_dir():
                    hidden = entry.name.startswith(b".") or entry.name in SYSTEM_FOLDERS
                    folders += [] if hidden else [entry.name]
                    if hidden:
                        log.warning("the folder %s in %s is left out", display(entry.name), display(folder))
                elif entry.name not in SYSTEM_FILES:
                    files.append(entry.name)
    except OSError as error:
        message = f"cannot read the folder {display(folder)}: {error.strerror}"
        raise InputMissingError(message) from error
    return sorted(files), sorted(folders)


def _finish(samples: list[Sample], origin: Path, group_by: str | None) -> list[Sample]:
    if not samples:
        message = f"no files in {origin}"
        raise InputMissingError(message)
    samples.sort(key=lambda sample: sample.path)
    for before, after in itertools.pairwise(samples):
        if before.path == after.path:
            message = f"{origin} names {display(after.path)} twice"
            raise BadDataError(message)
    if group_by is None:
        return samples
    try:
        pattern = re.compile(os.fsencode(group_by))
    except re.error as error:
        message = f"--group-by {group_by!r} is neither a column nor a regular expression: {error}"
        raise UsageError(message) from error
    grouped = []
    for sample in samples:
        match = pattern.search(sample.path)
        if match is None:
            message = f"--group-by {group_by!r} does not match {display(sample.path)}"
            raise UsageError(message)
        grouped.append(replace(sample, group=(match.group(1) or b"") if pattern.groups else match.group()))
    return grouped
