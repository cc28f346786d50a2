"""Images to labels: decode, backbone, head, in a stream with bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extractor.decoder import Decoder
from extractor.files import Files, FolderFiles
from extractor.images import ImageError
from extractor.preprocess import Preprocess
from extractor.progress import StopFlag
from extractor.reading import Crew, ahead
from extractor.session import Embedder, resolve_device
from extractor.sources import ImageFolder, refuse_ours
from extractor.views import Views
from store.errors import InputMissingError, UsageError
from store.fingerprint import Fingerprint
from store.samples import SINGLE_LABEL, display
from store.shard import as_stored

from .bundle import Bundle, averaged, head_function
from .fused import Fused, is_fused, precision_of
from .novelty import Novelty
from .tasks import HeadTask, task_of, task_of_bundle

_Read = tuple[bytes, NDArray[np.uint8] | ImageError]  # a path, and what came of it: its views (views, crop, crop, 3)


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of one file.

    Attributes:
        path: as it was given.
        label, probability: of the most probable class; None where the file cannot be used. Several labels have ``|`` between
            them and no probability in common; of a regression both are None.
        probabilities: ``(k,)`` in the order of the bundle's classes; of a regression, its numbers.
        code, message: why the file cannot be used.
        novelty: how unlike the training images it is; above 1 it is so. None where the bundle cannot tell.
    """

    path: bytes
    label: str | None = None
    probability: float | None = None
    probabilities: NDArray[np.float32] | None = None
    code: str | None = None
    message: str = ""
    novelty: float | None = None

    @property
    def name(self) -> str:
        return display(self.path)


class Predictor:
    """A backbone file and a head, ready to predict.

    Args:
        backbone: the ONNX file from pixels to features.
        preprocess: what its input must have gone through.
        head: features ``(n, d)`` float32 to probabilities ``(n, k)``.
        classes: label of each column.
        storage: how features were rounded in the cache that the head was trained on.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        batch_size: images per call of the backbone; None for the device's default.
        workers: decoding threads; None for as many as are needed.
        output: of the backbone's graph, where it has several.
        tf32: whether a GPU rounds the products of float32; as it did for the cache.
        novelty: what tells images that are unlike the training images.
        task: what the columns are, and how one decides by them; by default classes, one of which an image has.
        views: what the head's outputs for an image are averaged over; None for the image as it is.
    """

    def __init__(
        self,
        backbone: Path,
        preprocess: Preprocess,
        head: Callable[[NDArray[np.float32]], NDArray[np.float32]],
        classes: Sequence[str],
        *,
        storage: str = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        output: str = "features",
        tf32: bool = False,
        novelty: Novelty | None = None,
        task: HeadTask | None = None,
        views: Views | None = None,
    ) -> None:
        self.task, self.novelty = task or task_of(SINGLE_LABEL, list(classes)), novelty
        self._backbone, self._preprocess, self._head, self._storage = backbone, preprocess, head, storage
        self._device, self._batch_size, self._output = device, batch_size, output
        self._workers, self._tf32, self._views = workers, tf32, views

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """Open a bundle or a fused classifier; see `Bundle.load` and `Fused.load` for what is refused."""
        path = Path(path)
        return cls.fused(path, Fused.load(path), **options) if is_fused(path) else cls.of(Bundle.load(path), **options)

    @classmethod
    def fused(cls, path: Path, fused: Fused, **options: Any) -> Self:
        """The predictor of a fused classifier: its graph is backbone and head, and takes pixels itself."""
        return cls(
            path,
            fused.preprocess,
            lambda probabilities: probabilities,
            fused.classes,
            storage="float32",
            output=fused.output,
            task=fused.bound_task,
            **_computing(Fingerprint(fused.fingerprint), options),
        )

    @classmethod
    def of(cls, bundle: Bundle, **options: Any) -> Self:
        """The predictor of a bundle that was loaded before."""
        return cls(
            bundle.path / "backbone.onnx",
            bundle.backbone.preprocess,
            head_function(bundle.path / "head.onnx"),
            bundle.classes,
            storage=bundle.storage,
            output=bundle.backbone.outputs[0],
            novelty=bundle.novelty(),
            task=task_of_bundle(bundle),
            views=bundle.views,
            **_computing(bundle.fingerprint, options),
        )

    def predict(self, paths: Iterable[str | bytes | Path], files: Files | None = None) -> Iterator[Prediction]:
        """One prediction per file, in order; a bad file costs its own prediction and no other.

        Args:
            paths: what to read.
            files: what it is read from; by default the file system.
        """
        size = max(self.embedder.batch_size // self._count, 1)
        decoder = Decoder(self._preprocess, crop=self._views is None)
        read = partial(self._pixels, files or FolderFiles(), decoder)
        flying: deque[tuple[list[_Read], Future[list[NDArray[np.float32]]] | None]] = deque()
        crew = Crew(self._workers, self.embedder.provider)
        for batch in _batches(ahead(read, map(os.fsencode, paths), crew, StopFlag(), decoder), size):
            good = [pixels for _, pixels in batch if not isinstance(pixels, ImageError)]
            pictures = np.concatenate(good) if good else None
            flying.append((batch, None if pictures is None else self.embedder.submit(pictures)))
            if len(flying) > self.embedder.lanes:
                yield from self._decided(*flying.popleft())
        while flying:
            yield from self._decided(*flying.popleft())

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities ``(n, k)`` of images that are decoded, resized and cropped: ``(n, crop, crop, 3)``, RGB."""
        return self._head(as_stored(self.embedder.embed(pixels)[0], self._storage))

    def _decided(self, batch: list[_Read], features: Future[list[NDArray[np.float32]]] | None) -> Iterator[Prediction]:
        rows = self._judged(as_stored(features.result()[0], self._storage)) if features else iter(())
        for path, pixels in batch:
            if isinstance(pixels, ImageError):
                yield Prediction(path, code=pixels.code, message=str(pixels))
                continue
            row, novelty = next(rows)
            yield Prediction(path, *self.task.decide(row), row, novelty=novelty)

    def _judged(self, features: NDArray[Any]) -> Iterator[tuple[NDArray[np.float32], float | None]]:
        first = features[:: self._count]
        novelty = [None] * len(first) if self.novelty is None else self.novelty.scores(first).tolist()
        return zip(averaged(self._head(features), self._count), novelty, strict=True)

    @property
    def _count(self) -> int:
        return self._views.count if self._views else 1

    @property
    def classes(self) -> Sequence[str]:
        """What the columns of its probabilities are called."""
        return self.task.names

    @cached_property
    def embedder(self) -> Embedder:
        """The backbone's session, opened on first use."""
        return Embedder(
            self._backbone,
            self._preprocess,
            device=resolve_device(self._device),
            batch_size=self._batch_size,
            outputs=[self._output],
            tf32=self._tf32,
        )

    def _pixels(self, files: Files, decoder: Decoder, path: bytes) -> _Read:
        try:
            data = files.read(path)[0]
            pixels = decoder(data)
            if self._views is None:
                return path, pixels[None]
            return path, self._views.pixels(Image.fromarray(pixels), hashlib.sha256(data).digest(), self._preprocess)
        except ImageError as error:
            return path, error


def _computing(fingerprint: Fingerprint, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and how a GPU is to compute what these features were computed with."""
    if precision_of(fingerprint) == "int8" and options.get("device", "auto") == "auto":
        options = {**options, "device": "cpu"}  # which int8 was calibrated for; a GPU computes such a graph in float
    return {"tf32": bool(fingerprint.fields.get("tf32")), **options}


def list_images(inputs: Sequence[str | Path]) -> Iterator[bytes]:
    """The files that the arguments of `penult predict` mean: files as they are, folders with everything below them.

    Folders are read as they are reached, so that no list of millions of names is ever held.

    Raises:
        InputMissingError: none of them exists, a folder is empty, or one cannot be read. A file that is missing is a prediction
            with a code.
        UsageError: one is a tar archive, a cache or a bundle.
    """
    paths = list(map(Path, inputs))
    for path in paths:
        refuse_ours(path)
        if path.suffix == ".tar" and not path.is_dir():
            message = f"{path}: `penult predict` takes images and folders of them; `penult evaluate` takes tar shards"
            raise UsageError(message)
        if path.is_dir() and next(ImageFolder(path).everything(), None) is None:
            message = f"no files in {path}"
            raise InputMissingError(message)
    if not any(path.exists() for path in paths):
        message = f"{', '.join(map(str, inputs[:3]))}: no such file"
        raise InputMissingError(message)
    return _files_of(paths)


def _files_of(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        if path.is_dir():
            yield from (os.fsencode(path) + b"/" + name for name in ImageFolder(path).everything())
        else:
            yield os.fsencode(path)


def _batches(items: Iterator[_Read], size: int) -> Iterator[list[_Read]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
