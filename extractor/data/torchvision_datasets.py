"""Torchvision's datasets, read from files on disk (``torchvision:CIFAR10@DIR``); nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.pixels.images import ImageError
from store.errors import BadDataError, InputMissingError, UsageError, did_you_mean, display
from store.tasks import ONE_LABEL, Task

from .files import Files, FolderFiles, Stat
from .samples import Sample, finished

log = logging.getLogger("penult.extractor")

PREFIX = "torchvision:"
CANDIDATES = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}
PATH_ATTRIBUTES = ("_images", "_image_files", "_samples", "samples", "imgs", "data")
LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
BELONGS = {  # where torchvision looks for it below DIR
    **{name: f"{name}/raw" for name in ("MNIST", "FashionMNIST", "KMNIST")},
    **{"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python", "STL10": "stl10_binary", "SVHN": "train_32x32.mat"},
    **{"OxfordIIITPet": "oxford-iiit-pet", "Flowers102": "flowers-102", "Food101": "food-101", "DTD": "dtd/dtd"},
    **{"EuroSAT": "eurosat/2750", "FGVCAircraft": "fgvc-aircraft-2013b", "GTSRB": "gtsrb", "SUN397": "SUN397"},
    **{"Imagenette": "imagenette2", "Country211": "country211", "StanfordCars": "stanford_cars"},
    **{"RenderedSST2": "rendered-sst2", "USPS": "usps.bz2", "SEMEION": "semeion.data"},
}


@dataclass(frozen=True)
class Part:
    """One split of a dataset: its images as paths below DIR or as pixels ``(n, h, w)`` or ``(n, h, w, 3)``, and its labels."""

    split: str | None
    images: list[bytes] | NDArray[np.uint8]
    labels: list[str | None]


def parse(data: str) -> tuple[str, Path]:
    """Name and folder of ``torchvision:NAME@DIR``.

    Raises:
        UsageError: it is written differently.
    """
    name, at, folder = data.removeprefix(PREFIX).partition("@")
    if not (name and at and folder):
        message = f"{data}: expected {PREFIX}NAME@DIR, such as {PREFIX}CIFAR10@data"
        raise UsageError(message)
    return name, Path(folder).expanduser()


def load(name: str, root: Path) -> list[Part]:
    """Load the splits of a dataset that are on disk.

    Raises:
        UsageError: torchvision has no such dataset, or it is not one of labelled images.
        InputMissingError: its files are not there.
        BadDataError: they are damaged.
    """
    kind = _class(name)
    parts: list[Part] = []
    problems: list[Exception] = []
    for split, variants in _variants(name, kind).items():
        for arguments in variants:
            try:
                dataset = kind(str(root), **arguments)
            except ValueError as error:
                if not arguments or "argument split" not in str(error):
                    raise _damaged(name, root, error) from error
                continue  # this dataset has no split of that name
            except (RuntimeError, OSError) as error:
                problems.append(error)
            except Exception as error:  # its parser may raise anything
                raise _damaged(name, root, error) from error
            else:
                parts.append(_part(name, root, split, dataset))
            break
    if not parts and not problems:
        message = f"{PREFIX}{name}: its splits are not train, val or test; write a CSV manifest for the images you need"
        raise UsageError(message)
    if not parts:
        place = root / BELONGS.get(name, "")
        message = (
            f"{name} is not, or not completely, in {root} ({problems[0]}). penult downloads nothing: its files belong in "
            f"{place}, as torchvision.datasets.{name}({str(root)!r}, download=True) lays them out"
        )
        raise InputMissingError(message) from problems[0]
    if problems:
        have = ", ".join(str(part.split) for part in parts)
        log.warning("%s: only %s is in %s (%s)", name, have, root, problems[0])
    return parts


def _damaged(name: str, root: Path, error: Exception) -> BadDataError:
    message = f"torchvision cannot read {name} in {root}: {type(error).__name__}: {error}"
    return BadDataError(message)


def _class(name: str) -> Any:
    import torchvision

    names = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if name in names:
        return getattr(torchvision.datasets, name)
    lower = {n.lower(): n for n in names}
    same = lower.get(name.lower())
    hint = f"; did you mean {same!r}?" if same else did_you_mean(name, names, "see torchvision.datasets")
    message = f"torchvision has no dataset {name!r}{hint}"
    raise UsageError(message)


def _variants(name: str, kind: Any) -> dict[str | None, list[dict[str, Any]]]:
    """Constructor arguments by split; of several the first that the dataset knows."""
    parameters = inspect.signature(kind).parameters
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("root", "split")
    ]
    if "root" not in parameters or needed:
        message = f"{PREFIX}{name}: it takes {', '.join(parameters)}, not just a folder; write a CSV manifest for it"
        raise UsageError(message)
    if "train" in parameters:
        return {"train": [{"train": True}], "test": [{"train": False}]}
    if "split" in parameters:
        return {split: [{"split": each} for each in names] for split, names in CANDIDATES.items()}
    return {None: [{}]}


def _part(name: str, root: Path, split: str | None, dataset: Any) -> Part:
    paths = _paths(root, dataset)
    images = _pixels(name, getattr(dataset, "data", None)) if paths is None else paths
    return Part(split, images, _labels(name, dataset, len(images)))


def _paths(root: Path, dataset: Any) -> list[bytes] | None:
    """The image files of a dataset, relative to the root; None for a dataset of arrays."""
    for attribute in PATH_ATTRIBUTES:
        entries = getattr(dataset, attribute, None)
        if not isinstance(entries, list) or not entries or len(entries) != len(dataset):
            continue
        paths = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
        if all(isinstance(path, str | os.PathLike) for path in paths) and os.path.isfile(paths[0]):  # noqa: PTH113
            return [os.path.relpath(os.fsencode(path), os.fsencode(root)) for path in paths]
    return None


def _pixels(name: str, data: Any) -> NDArray[np.uint8]:
    array: NDArray[Any] = np.asarray(data)
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or not (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)):
        what = "nothing of the kind" if data is None else f"{array.dtype} of shape {array.shape}"
        message = (
            f"{PREFIX}{name}: its images are neither files nor 8-bit arrays of n x h x w or n x h x w x 3 (found {what}); "
            f"write a CSV manifest for them"
        )
        raise UsageError(message)
    return array


def _labels(name: str, dataset: Any, count: int) -> list[str | None]:
    labels = next((value for a in LABEL_ATTRIBUTES if (value := getattr(dataset, a, None)) is not None), None)
    if labels is None:
        labels = [pair[1] for pair in getattr(dataset, "_samples", ()) if isinstance(pair, tuple)]
    targets = np.asarray(labels)
    if targets.shape != (count,) or targets.dtype.kind not in "iu":
        message = f"{PREFIX}{name}: {count} images, and labels of shape {targets.shape}; expected one class for each image"
        raise UsageError(message)
    names = _class_names(getattr(dataset, "classes", None))
    return [None if i < 0 else names[i] if i < len(names) else str(i) for i in targets.tolist()]


def _class_names(classes: Any) -> list[str]:
    """ImageNet's and Imagenette's classes are tuples of synonyms, the first of which is the name."""
    return [str(each[0] if isinstance(each, tuple) else each) for each in classes or ()]


class ArrayFiles:
    """Images that a dataset holds as arrays, each as the bytes of a netpbm file, which do not depend on a library."""

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self._arrays = {prefix(name, part).encode(): part.images for part in parts}

    def stat(self, path: bytes) -> Stat | None:
        # There is no file with a modification time: the beginning of the digest takes its place.
        try:
            return self.read(path)[1]
        except ImageError:
            return None

    def read(self, path: bytes) -> tuple[bytes, Stat]:
        folder, _, number = path.rpartition(b"/")
        try:
            pixels: Any = self._arrays[folder][int(number)]
        except (KeyError, ValueError, IndexError) as error:
            raise ImageError(code="not_found", message="no such image in the dataset") from error
        height, width = pixels.shape[:2]
        data = b"P%d\n%d %d\n255\n" % (5 if pixels.ndim == 2 else 6, width, height) + pixels.tobytes()
        return data, (len(data), int.from_bytes(hashlib.sha256(data).digest()[:7]), 0)


def prefix(name: str, part: Part) -> str:
    """The beginning of the path of an image in an array."""
    return f"{name}/{part.split}" if part.split else name


def open_files(origin: str, root: Path) -> Files:
    """The images of a dataset of arrays, as a sample table refers to them.

    Raises:
        PenultError: as `load`.
    """
    name = origin.removeprefix(PREFIX)
    return ArrayFiles(name, load(name, root))


@dataclass(frozen=True)
class TorchvisionDataset:
    """A torchvision dataset whose files are in ``root``, with the splits it comes with.

    Args:
        name: as in ``torchvision.datasets``.
        root: the ``root`` of torchvision's constructor.
        group_by: a regular expression over the path.
    """

    name: str
    root: Path
    group_by: str | None = None

    @property
    def task(self) -> Task:
        return ONE_LABEL

    @cached_property
    def _parts(self) -> list[Part]:
        if not self.root.is_dir():
            message = f"{self.root} is not a folder; {self.name} belongs in {self.root / BELONGS.get(self.name, '')}"
            _class(self.name)
            raise InputMissingError(message)
        return load(self.name, self.root)

    @property
    def origin(self) -> str | None:
        return None if isinstance(self._parts[0].images, list) else PREFIX + self.name

    @cached_property
    def files(self) -> Files:
        return FolderFiles(self.root) if self.origin is None else ArrayFiles(self.name, self._parts)

    def samples(self) -> list[Sample]:
        samples = []
        for part in self._parts:
            paths = part.images if isinstance(part.images, list) else self._numbered(part)
            samples += [Sample(path, label, part.split) for path, label in zip(paths, part.labels, strict=True)]
        outside = next((sample.path for sample in samples if sample.path.startswith(b"../")), None)
        if outside is not None:
            message = f"{self.name}: {display(outside)} lies outside {self.root}"
            raise BadDataError(message)
        return finished(samples, self.root, self.group_by)

    def _numbered(self, part: Part) -> list[bytes]:
        return [f"{prefix(self.name, part)}/{i:05d}".encode() for i in range(len(part.images))]
