"""Image folders: one folder per class, split folders of these, or a flat folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from store.cache import is_cache
from store.errors import BadDataError, InputMissingError, UsageError, display
from store.tasks import ONE_LABEL, Task

from .files import Files, FolderFiles
from .samples import SPLITS, Sample, finished, in_words

log = logging.getLogger("penult.extractor")

SYSTEM_FILES = {b".DS_Store", b"desktop.ini", b".gitkeep", b".gitignore", b".directory"}  # written by file managers and git
SYSTEM_FOLDERS = {b"__MACOSX"}
# train2017, test1, val_images, training_set, seg_test, dev: names of splits that are not those in SPLITS
WORDS = "|".join(sorted([*SPLITS, "dev", "eval", "holdout"], key=len, reverse=True))
LIKE_SPLIT = re.compile(
    rf"(?:(?:.*[^a-z])?(?P<last>{WORDS})[0-9]*|(?P<first>{WORDS})(?:[^a-z].*|set|data|images))", re.IGNORECASE
)
NOTES = frozenset(b"txt md rst csv tsv json jsonl xml yaml yml html pdf db ini log".split())  # endings of files about images


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

    @property
    def task(self) -> Task:
        return ONE_LABEL

    @property
    def origin(self) -> None:
        return None

    def samples(self) -> list[Sample]:
        root = Path(self.root)
        if not root.is_dir():
            message = f"{root} is not a folder"
            raise InputMissingError(message)
        base = os.fsencode(root)
        links = [0]
        top_files, folders = _scan(base, follow=self.follow_symlinks, links=links)
        splits = self._split_folders(base, folders)
        samples: list[Sample] = []
        if not folders:
            samples = [Sample(name) for name in top_files]
        elif top_files:
            log.warning("%d file(s) beside the class folders of %s are not samples", len(top_files), root)
        others = self._others(base, folders)
        empty: list[bytes] = []
        for folder in folders:
            split = SPLITS[os.fsdecode(folder).lower()] if splits else None
            before = len(samples)
            names: dict[bytes, str] = {}
            for path in self._walk(base, folder, others, links):
                parts = path.split(b"/")
                label = parts[1] if splits else parts[0]
                if splits and len(parts) < 3:
                    message = f"{display(path)} lies in a split folder but in no class folder"
                    raise BadDataError(message)
                if label not in names:
                    names[label] = display(label)
                samples.append(Sample(path, names[label], split))
            if len(samples) == before:
                empty.append(folder)
            elif splits:
                classes = _scan(base + b"/" + folder, follow=self.follow_symlinks, links=[0])[1]
                empty += [folder + b"/" + name for name in classes if name not in names]
        if len(empty) == 1:
            log.warning("the folder %s in %s is empty", display(empty[0]), root)
        elif empty:
            log.warning("%d folders in %s are empty: %s", len(empty), root, in_words(list(map(display, empty))))
        if links[0]:
            log.warning("%d symbolic link(s) in %s were not followed (--follow-symlinks follows them)", links[0], root)
        if samples and folders and not splits:
            paths = [sample.path for sample in samples]
            with_images = sorted({path.partition(b"/")[0] for path in paths if not is_note(path.rpartition(b"/")[2])})
            self._refuse_flat_splits(with_images)
            self._refuse_outer(with_images, samples)
        return finished(samples, root, self.group_by)

    def _refuse_flat_splits(self, folders: list[bytes]) -> None:
        """Refuse folders that are splits and would be taken for the classes.

        Args:
            folders: those with images; `_split_folders` found no splits with class folders among them.

        Raises:
            BadDataError: every folder has the name of a split, or one like it (``train2017`` and ``val2017``).
        """
        if not folders:
            return
        names = [display(folder) for folder in folders]
        kinds = [kind_of_split(name) for name in names]
        here = in_words([f"{name}/" for name in names])
        if all(name.lower() in SPLITS for name in names):
            hold = "hold images and no class folders" if len(names) > 1 else "holds images and no class folders"
            example = next((name for name in names if SPLITS[name.lower()] == "train"), names[0])
            message = (
                f"{self.root}: {here} {hold}: move the images of each class into a folder of its own ({example}/cats/...), "
                f"or list them in a CSV with the columns path, label, split"
            )
            raise BadDataError(message)
        if None not in kinds and len(set(kinds)) > 1:
            message = (
                f"{self.root}: {here} look like splits, and would be taken for the classes: call them train, val or test, with "
                f"a folder for each class inside, or list the images in a CSV with the columns path, label, split"
            )
            raise BadDataError(message)

    def _refuse_outer(self, folders: list[bytes], samples: list[Sample]) -> None:
        """Refuse a folder around the dataset: its only folder would be the one class.

        Raises:
            BadDataError: the only folder holds folders alone; names the path to use.
        """
        inner, below = None, folders
        while len(below) == 1 and display(below[0]).lower() not in SPLITS:
            candidate = below[0] if inner is None else inner + b"/" + below[0]
            has_images, next_below = contents_of(candidate, samples)
            if has_images or not next_below:
                break
            inner, below = candidate, next_below
        if inner is not None:
            name = display(inner)
            path = f"{display(os.fsencode(self.root))}/{name}"
            holds = in_words([display(folder) for folder in below])
            message = f"the only folder with images in {self.root} is {name}, which holds {holds}: pass {path}"
            raise BadDataError(message)

    def _split_folders(self, base: bytes, folders: list[bytes]) -> bool:
        """Whether the top folders are splits: they have such names, and hold folders.

        A class may be called ``train``, in a dataset of vehicles, so what is inside the folders decides.

        Raises:
            BadDataError: some look like splits and others do not; names them.
        """

        def is_split(name: bytes) -> bool:
            if os.fsdecode(name).lower() not in SPLITS:
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

    def everything(self) -> Iterator[bytes]:
        """List the relative paths of all files below the root, lazily, without regard to classes and splits."""
        base, links = os.fsencode(self.root), [0]
        files, folders = _scan(base, follow=self.follow_symlinks, links=links)
        yield from files
        others = self._others(base, folders)
        for folder in folders:
            yield from self._walk(base, folder, others, links)

    def _others(self, base: bytes, tops: list[bytes]) -> frozenset[bytes]:
        """The real paths of the root and its folders, into which no link in one of them is followed.

        A link back to the root, or to another class, must not bring that class's files in under this label.
        """
        if not self.follow_symlinks:  # then every folder is met once
            return frozenset()
        return frozenset([os.path.realpath(base), *(os.path.realpath(base + b"/" + folder) for folder in tops)])

    def _walk(self, base: bytes, top: bytes, others: frozenset[bytes], links: list[int]) -> Iterator[bytes]:
        """Relative paths of the regular files below a folder; with links followed, each real folder is visited once.

        Args:
            base, top: the root, and the folder in it.
            others: from `_others`, which resolves them once for all folders.
            links: counts the links that are not followed.
        """
        pending, visited = [top], set[bytes]()
        while pending:
            folder = pending.pop()
            files, folders = _scan(base + b"/" + folder, follow=self.follow_symlinks, links=links)
            for name in files:
                yield folder + b"/" + name
            below = []
            for name in folders:
                if self.follow_symlinks:
                    real = os.path.realpath(b"/".join((base, folder, name)))
                    if real in others or real in visited:
                        continue
                    visited.add(real)
                below.append(folder + b"/" + name)
            pending += reversed(below)  # the last one is taken first


def refuse_ours(path: Path) -> None:
    """Refuse a cache or a bundle as a dataset: each of its ONNX and HDF5 files would be a failed image.

    Raises:
        UsageError: the path is one.
    """
    kind = None
    if is_cache(path) or ((path / "cache.json").is_file() and (path / "shards").is_dir()):
        kind = "a cache of features"
    elif (path / "head.json").is_file() and (path / "backbone.onnx").is_file():
        kind = "a bundle"
    if kind:
        message = f"{os.fspath(path)} is {kind}, not images; expected a folder, a manifest or tar shards (see docs/data.md)"
        raise UsageError(message)


def refuse_archive(path: Path) -> None:
    """Refuse a dataset in one file where single images are expected.

    Raises:
        UsageError: the path is one.
    """
    if path.suffix == ".tar" and not path.is_dir():
        message = f"{path}: `penult predict` takes images and folders of them; `penult evaluate` takes tar shards"
        raise UsageError(message)


def kind_of_split(name: str) -> str | None:
    """The split that a folder's name means, or may mean; None for any other name.

    >>> kind_of_split("train2017"), kind_of_split("seg_test"), kind_of_split("Dev"), kind_of_split("contest")
    ('train', 'test', 'dev', None)
    """
    match = LIKE_SPLIT.fullmatch(name)
    word = match and (match["last"] or match["first"]).lower()
    return SPLITS.get(word, word) if word else None


def is_note(name: bytes) -> bool:
    """Whether the name is that of a file about the images, such as a list or a README."""
    stem, _, ending = name.rpartition(b".")
    return ending.lower() in NOTES if stem else name.upper() in (b"README", b"LICENSE")


def contents_of(folder: bytes, samples: Iterable[Sample]) -> tuple[bool, list[bytes]]:
    """Whether a folder has images of its own, and the names of the folders with files in it, sorted."""
    has_images, below = False, set()
    for sample in samples:
        if sample.path.startswith(folder + b"/"):
            name, slash, _ = sample.path[len(folder) + 1 :].partition(b"/")
            if slash:
                below.add(name)
            elif not is_note(name):
                has_images = True
    return has_images, sorted(below)


def _scan(folder: bytes, *, follow: bool, links: list[int]) -> tuple[list[bytes], list[bytes]]:
    """Names of the regular files and of the folders in a folder, sorted; links are counted if they are not followed."""
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
