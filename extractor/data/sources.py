"""Data sources: the dataset that DATA on the command line names, and the images of an existing cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from store.errors import InputMissingError, UsageError
from store.format.samples import SampleTable
from store.tasks import ONE_LABEL, Task

from .files import Files, FolderFiles
from .folders import ImageFolder, refuse_ours
from .manifest import SUFFIXES, Manifest
from .samples import Sample
from .tar_shards import COMPRESSED, TarFiles, TarShards, find_shards
from .tar_shards import ORIGIN as TAR
from .torchvision_datasets import PREFIX, TorchvisionDataset, open_files, parse

__all__ = ["ImageFolder", "Manifest", "Sample", "Source", "TarShards", "Task", "TorchvisionDataset", "open_source"]


class Source(Protocol):
    """A dataset: anything that can list samples below one root folder."""

    @property
    def root(self) -> Path:
        """The folder that the samples' paths are relative to."""
        ...

    @property
    def files(self) -> Files:
        """Access to the samples' bytes."""
        ...

    @property
    def task(self) -> Task:
        """The prediction task of the labels."""
        ...

    @property
    def origin(self) -> str | None:
        """What `files_of` needs besides the root to find the images again; None for plain files."""
        ...

    def samples(self) -> list[Sample]:
        """All inputs, ordered by path. Duplicated paths and paths that leave the root are errors."""
        ...


def open_source(
    data: str | Path,
    *,
    base: Path = Path(),
    root: Path | None = None,
    follow_symlinks: bool = False,
    group_by: str | None = None,
    task: str = ONE_LABEL.name,
    targets: Sequence[str] = (),
) -> Source:
    """Open the dataset that ``DATA`` on the command line names.

    Args:
        data: a folder, a manifest, a ``.tar`` file or ``torchvision:NAME@DIR``.
        base: what ``data`` is relative to.
        root: what the paths of a manifest are relative to.
        follow_symlinks: whether links are followed.
        group_by: a column of a manifest, or a regular expression over paths.
        task, targets: see `Task`.

    Raises:
        InputMissingError: it does not exist.
        UsageError: it is a file of an unknown kind, a cache or a bundle, or cannot serve the task.

    >>> import extractor
    >>> source = extractor.open_source("pets/")
    >>> [(sample.label, sample.path) for sample in source.samples()][:2]
    [('cat', b'cat/000.png'), ('cat', b'cat/001.png')]
    """
    labelling = Task.named(task, targets)
    source: Source
    if str(data).startswith(PREFIX):
        name, folder = parse(str(data))
        source = TorchvisionDataset(name, base / folder, group_by)
    else:
        path = base / data
        refuse_ours(path)
        suffix = path.suffix.lower()
        if path.is_dir():
            if find_shards(path, follow_symlinks=follow_symlinks):
                source = TarShards(path, group_by, follow_symlinks, labelling)
            else:
                source = ImageFolder(path, follow_symlinks=follow_symlinks, group_by=group_by)
        elif not path.exists():
            message = f"{path} does not exist"
            raise InputMissingError(message)
        elif suffix == ".tar":
            source = TarShards(path, group_by, follow_symlinks, labelling)
        elif suffix in SUFFIXES:
            source = Manifest(path, root or path.parent, group_by, follow_symlinks, labelling)
        else:
            hint = "; decompress it first, and name the .tar" if COMPRESSED.search(path.name) else ""
            message = f"{path} is neither a folder nor a CSV manifest, Parquet manifest or .tar file{hint}"
            raise UsageError(message)
    if root is not None and not isinstance(source, Manifest):
        message = f"--root {root} is only for a manifest; {data} needs none"
        raise UsageError(message)
    if source.task != labelling:
        message = f"--task {task}: {data} has one label for each image; list the images in a CSV with the columns you need"
        raise UsageError(message)
    return source


def files_of(table: SampleTable, root: Path | None = None) -> Files:
    """Access to the bytes of a table's samples.

    Args:
        table: of a cache, or of a survey.
        root: where the images are, if they moved since.

    Raises:
        UsageError: they come from a kind of dataset that this penult does not know.
        PenultError: a torchvision dataset is gone or damaged.
    """
    folder, origin = root or table.root, table.facts.get("source")
    if origin is None:
        return FolderFiles(folder)
    if origin == TAR:
        return TarFiles(folder)
    if origin.startswith(PREFIX):
        try:
            return open_files(origin, folder)
        except InputMissingError as error:
            error.add_note("If the images moved since the features were extracted, --root says where they are")
            raise
    message = f"the images come from {origin!r}, which this penult does not know; upgrade it"
    raise UsageError(message)
