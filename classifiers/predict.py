"""Images to labels: decode, backbone, head, in a stream with bounded memory."""

from __future__ import annotations

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

from extractor.cuda import DEFAULTS, Cuda
from extractor.decoder import Decoder
from extractor.files import Files, FolderFiles
from extractor.images import ImageError
from extractor.preprocess import Preprocess
from extractor.progress import StopFlag
from extractor.reading import Crew, ahead
from extractor.session import Embedder, resolve_device
from extractor.sources import ImageFolder, refuse_ours
from store.errors import InputMissingError, UsageError
from store.samples import display
from store.shard import as_stored

from .bundle import Bundle, head_function

_Read = tuple[bytes, NDArray[np.uint8] | ImageError]  # a path, and what came of it


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of one file.

    Attributes:
        path: as it was given.
        label, probability: of the most probable class; None where the file cannot be used.
        probabilities: ``(k,)`` in the order of the bundle's classes.
        code, message: why the file cannot be used.
    """

    path: bytes
    label: str | None = None
    probability: float | None = None
    probabilities: NDArray[np.float32] | None = None
    code: str | None = None
    message: str = ""

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
        cuda: how a GPU computes; as it did for the cache.
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
        cuda: Cuda = DEFAULTS,
    ) -> None:
        self.classes = list(classes)
        self._backbone, self._preprocess, self._head, self._storage = backbone, preprocess, head, storage
        self._device, self._batch_size, self._output = device, batch_size, output
        self._workers, self._cuda = workers, cuda

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """Open a bundle; see `Bundle.load` for what is refused."""
        return cls.of(Bundle.load(path), **options)

    @classmethod
    def of(cls, bundle: Bundle, **options: Any) -> Self:
        """The predictor of a bundle that was loaded before."""
        if bundle.backbone.precision == "int8" and options.get("device", "auto") == "auto":
            options["device"] = "cpu"  # which int8 was calibrated for; a GPU computes such a graph in float
        return cls(
            bundle.path / "backbone.onnx",
            bundle.backbone.preprocess,
            head_function(bundle.path / "head.onnx"),
            bundle.classes,
            storage=bundle.storage,
            output=bundle.backbone.outputs[0],
            cuda=Cuda(tf32=bool(bundle.fingerprint.fields.get("tf32")), half=bundle.backbone.precision == "fp16"),
            **options,
        )

    def predict(self, paths: Iterable[str | bytes | Path], files: Files | None = None) -> Iterator[Prediction]:
        """One prediction per file, in order; a bad file costs its own prediction and no other.

        Args:
            paths: what to read.
            files: what it is read from; by default the file system.
        """
        size, decoder = self.embedder.batch_size, Decoder(self._preprocess)
        read = partial(self._pixels, files or FolderFiles(), decoder)
        flying: deque[tuple[list[_Read], Future[list[NDArray[np.float32]]] | None]] = deque()
        crew = Crew(self._workers, self.embedder.provider)
        for batch in _batches(ahead(read, map(os.fsencode, paths), crew, StopFlag(), decoder), size):
            good = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
            flying.append((batch, self.embedder.submit(np.stack(good)) if good else None))
            if len(flying) > self.embedder.lanes:
                yield from self._decided(*flying.popleft())
        while flying:
            yield from self._decided(*flying.popleft())

    def _decided(self, batch: list[_Read], features: Future[list[NDArray[np.float32]]] | None) -> Iterator[Prediction]:
        rows = iter(self._head(as_stored(features.result()[0], self._storage)) if features else ())
        for path, pixels in batch:
            if isinstance(pixels, ImageError):
                yield Prediction(path, code=pixels.code, message=str(pixels))
                continue
            row: NDArray[np.float32] = next(rows)
            best = int(row.argmax())
            yield Prediction(path, self.classes[best], float(row[best]), row)

    @cached_property
    def embedder(self) -> Embedder:
        """The backbone's session, opened on first use."""
        return Embedder(
            self._backbone,
            self._preprocess,
            device=resolve_device(self._device),
            batch_size=self._batch_size,
            outputs=[self._output],
            cuda=self._cuda,
        )

    def _pixels(self, files: Files, decoder: Decoder, path: bytes) -> _Read:
        try:
            return path, decoder(files.read(path)[0])
        except ImageError as error:
            return path, error


def list_images(inputs: Sequence[str | Path]) -> list[bytes]:
    """The files that the arguments of `penult predict` mean: files as they are, folders with everything below them.

    Raises:
        InputMissingError: none of them exists, or a folder is empty. One that is missing is a prediction with a code.
        UsageError: one is a tar archive.
        UsageError: one is a cache or a bundle.
    """
    found = []
    for item in map(Path, inputs):
        refuse_ours(item)
        if item.is_dir():
            found += [os.fsencode(item) + b"/" + sample.path for sample in ImageFolder(item).everything()]
        elif item.suffix == ".tar":
            message = f"{item}: `penult predict` takes images and folders of them; `penult evaluate` takes tar shards"
            raise UsageError(message)
        else:
            found.append(os.fsencode(item))
    if not any(Path(os.fsdecode(path)).exists() for path in found):
        message = f"{', '.join(map(str, inputs[:3]))}: no such file"
        raise InputMissingError(message)
    return found


def _batches(items: Iterator[_Read], size: int) -> Iterator[list[_Read]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
