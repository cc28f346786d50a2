"""Prediction from images: decoder, backbone and head, as a stream with bounded memory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from classifiers.evaluation.probabilities import averaged
from classifiers.evaluation.task import HeadTask, Prediction
from extractor.data.files import Files, FolderFiles
from extractor.data.folders import ImageFolder, refuse_archive, refuse_ours
from extractor.data.reader import WorkerPool, ahead
from extractor.futures import in_flight
from extractor.graphs.backbone_facts import PROBE_IMAGE, facts_of, require_features
from extractor.graphs.graph import keep_zero_padding
from extractor.graphs.onnx_file import read_model
from extractor.graphs.parity import relative_l2
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import ImageError
from extractor.pixels.pixel_drift import PixelDrift, PixelOrigin, ProbeImage, libraries
from extractor.pixels.preprocess import Preprocess
from extractor.pixels.views import Views
from extractor.precision.registry import precision_of
from extractor.runtime.session import Embedder, resolve_device
from extractor.signals import StopFlag
from store.errors import BadDataError, FingerprintMismatchError, InputMissingError
from store.fingerprint import Fingerprint
from store.format.shard import as_stored

from .bundle import Bundle, task_of_bundle
from .fused import Fused, is_fused, precision_name
from .head_graph import require_outputs
from .novelty import Novelty

log = logging.getLogger("penult.classifiers")

NOT_FINITE = "the network gives NaN or infinity for this image"
FIRST = 16  # number of images on which a difference of pixels is measured

_Read = tuple[bytes, NDArray[np.uint8] | ImageError]  # a path, and its views (views, crop, crop, 3) or the error


@dataclass(frozen=True)
class Recipe:
    """A backbone and a head, and everything else that determines their prediction for an image.

    Attributes:
        backbone: the ONNX file from pixels to features.
        preprocess: the preprocessing of its input.
        head: features ``(n, d)`` float32 to outputs ``(n, k)``.
        task: names the columns of the outputs and decides on a label from them.
        storage: how features were rounded in the cache that the head was trained on.
        output: output of the backbone's graph, if it has several.
        tf32: whether a GPU rounds float32 products to TF32, as it did for the cache.
        novelty: measures how unlike the training images an image is.
        views: augmentations over which the head's outputs are averaged; None for the image as it is.
        origin: the pixels of training that this machine's pixels must match; None if nothing was trained on such pixels.
        require: checks the metadata of the loaded network, and refuses one that the head is not for.
    """

    backbone: Path
    preprocess: Preprocess
    head: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    task: HeadTask
    storage: str = "auto"
    output: str = "features"
    tf32: bool = False
    novelty: Novelty | None = None
    views: Views | None = None
    origin: PixelOrigin | None = None
    require: Callable[[Mapping[str, str]], None] | None = None


class Predictor:
    """A backbone and a head, ready to predict.

    Args:
        recipe: backbone, head and preprocessing.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        batch_size: images per call of the backbone; None for the device's default.
        workers: number of decode workers; None for as many as are needed.

    Attributes:
        pixel_drift: how far this machine's pixels are from those of training, if a difference was accepted and measured.

    >>> from classifiers import Predictor
    >>> for prediction in Predictor.load("pets.head", device="cpu").predict(["pets/cat/000.png", "pets/dog/000.png"]):
    ...     print(prediction.name, prediction.label)
    pets/cat/000.png cat
    pets/dog/000.png dog
    """

    pixel_drift: PixelDrift | None = None

    def __init__(
        self, recipe: Recipe, *, device: str = "auto", batch_size: int | None = None, workers: int | None = None
    ) -> None:
        self.recipe, self._device, self._batch_size, self._workers = recipe, device, batch_size, workers

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """Open a bundle or a fused classifier; see `Bundle.load` and `Fused.load` for what is refused.

        Options are ``device``, ``batch_size``, ``workers``, and ``accept_pixels``: go on if this machine decodes images to
        other pixels than in training, and measure the difference.
        """
        path = Path(path)
        return cls.fused(path, Fused.load(path), **options) if is_fused(path) else cls.of(Bundle.load(path), **options)

    @classmethod
    def fused(cls, path: Path, fused: Fused, *, accept_pixels: bool = False, **options: Any) -> Self:
        """The predictor of a fused classifier: its graph is backbone and head, and takes pixels itself."""
        fingerprint = Fingerprint(fused.fingerprint)
        recipe = Recipe(
            path,
            fused.preprocess,
            lambda outputs: outputs,
            fused.bound_task,
            storage="float32",
            output=fused.output,
            tf32=bool(fingerprint.fields.get("tf32")),
            origin=PixelOrigin.of(str(path), fingerprint, accept=accept_pixels),
            require=partial(fused.require_loaded, path),
        )
        return cls(recipe, **_on_its_device(fingerprint, options))

    @classmethod
    def of(cls, bundle: Bundle, *, accept_pixels: bool = False, **options: Any) -> Self:
        """The predictor of a loaded bundle."""

        def require(metadata: Mapping[str, str]) -> None:
            facts, file = facts_of(metadata), bundle.path / "backbone.onnx"
            if facts is None:
                message = f"{file} has no metadata of penult, so it is not the network that {bundle.name} was trained with"
                raise BadDataError(message)
            require_features(facts, bundle.fingerprint, mine=str(file), theirs=f"the head of {bundle.name}")
            if facts.name == "onnx" and not facts.zero_padded_pooling and keep_zero_padding(read_model(file)):
                message = (
                    f"{bundle.name} was trained on features that ONNX Runtime computed wrongly: its network pads a max pooling "
                    f"with zeros, which were taken for minus infinity (max_pool_padding). Extract and train again"
                )
                raise FingerprintMismatchError(message)

        recipe = Recipe(
            bundle.path / "backbone.onnx",
            bundle.backbone.preprocess,
            bundle.head_function(),
            task_of_bundle(bundle),
            storage=bundle.storage,
            output=bundle.backbone.outputs[0],
            tf32=bool(bundle.fingerprint.fields.get("tf32")),
            novelty=bundle.novelty(),
            views=bundle.views,
            origin=PixelOrigin.of(str(bundle.path), bundle.fingerprint, accept=accept_pixels),
            require=require,
        )
        return cls(recipe, **_on_its_device(bundle.fingerprint, options))

    @property
    def task(self) -> HeadTask:
        """The task, with the names of the outputs."""
        return self.recipe.task

    def predict(self, paths: Iterable[str | bytes | Path], files: Files | None = None) -> Iterator[Prediction]:
        """One prediction per file, in order; a bad file does not affect the predictions of others.

        Args:
            paths: the files.
            files: where they are read from; by default the file system.

        Raises:
            FingerprintMismatchError: this machine decodes images to other pixels than in training; before any file is read.
        """
        self.require_pixels()
        return self._predictions(map(os.fsencode, paths), files or FolderFiles())

    def require_pixels(self) -> None:
        """Refuse to go on if this machine decodes images to other pixels than in training, unless that is accepted.

        Raises:
            FingerprintMismatchError: says what differs and what to do.
        """
        if (origin := self._other_pixels) and not origin.accept:
            origin.require(self.recipe.preprocess, self._image_then())

    def measure_pixels(self, first: Sequence[bytes] = (), files: Files | None = None) -> None:
        """Measure and log how far this machine's pixels are from those of training, if they differ; see `pixel_drift`.

        Args:
            first: images to measure it on, beside the test image.
            files: where they are; by default the file system.
        """
        if origin := self._other_pixels:
            self.pixel_drift = self._measured(first, files or FolderFiles())
            log.warning("%s", self.pixel_drift.text(origin.name))

    @property
    def _other_pixels(self) -> PixelOrigin | None:
        """The pixels of training, if this machine's pixels differ."""
        origin = self.recipe.origin
        return origin if origin is not None and origin.differs(self.recipe.preprocess) else None

    def _predictions(self, paths: Iterator[bytes], files: Files) -> Iterator[Prediction]:
        if self._other_pixels:
            first = list(islice(paths, FIRST))
            self.measure_pixels(first, files)
            paths = chain(first, paths)
        size = max(self.embedder.batch_size // self._count, 1)
        decoder = Decoder(self.recipe.preprocess, crop=self.recipe.views is None)
        read = partial(self._pixels, files, decoder)
        workers = WorkerPool(self._workers, shares_cores=self.embedder.shares_cores)
        batches = _batches(ahead(read, paths, workers, StopFlag(), decoder), size)
        for batch, features in in_flight(map(self._submitted, batches), self.embedder.lanes):
            yield from self._decided(batch, features)

    def _submitted(self, batch: list[_Read]) -> tuple[list[_Read], Future[list[NDArray[np.float32]]] | None]:
        good = [pixels for _, pixels in batch if not isinstance(pixels, ImageError)]
        return batch, self.embedder.submit(np.concatenate(good)) if good else None

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities ``(n, k)`` of images that are decoded, resized and cropped: ``(n, crop, crop, 3)``, RGB."""
        return self._outputs(self.embedder.embed(pixels)[0])[0]

    def _outputs(self, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The head's outputs for features ``(n, d)``, and the features as rounded for the head.

        A row that is not finite gives NaN, even if the head would give a number, as a sigmoid of infinity is 1; the other rows
        do not depend on it.
        """
        stored = as_stored(features, self.recipe.storage)
        finite = np.asarray(np.isfinite(stored).all(axis=1))
        outputs = self.recipe.head(stored if finite.all() else np.where(finite[:, None], stored, np.float32(0)))
        outputs[~finite] = np.nan
        return require_outputs(outputs, len(stored), self.task, self.recipe.backbone), stored

    def _decided(self, batch: list[_Read], features: Future[list[NDArray[np.float32]]] | None) -> Iterator[Prediction]:
        rows = self._judged(features.result()[0]) if features else iter(())
        for path, pixels in batch:
            if isinstance(pixels, ImageError):
                yield Prediction(path, code=pixels.code, message=str(pixels))
                continue
            row, novelty, known = next(rows)
            if not np.isfinite(row).all():
                yield Prediction(path, code="not_finite", message=NOT_FINITE)
                continue
            yield Prediction(path, *self.task.decide(row), row, novelty=novelty, features=known)

    def _judged(self, features: NDArray[Any]) -> Iterator[tuple[NDArray[np.float32], float | None, NDArray[np.float32] | None]]:
        outputs, stored = self._outputs(features)
        rows = averaged(outputs, self._count)
        if self.recipe.novelty is None:
            return zip(rows, repeat(None), repeat(None), strict=False)
        first = np.nan_to_num(stored[:: self._count], nan=0, posinf=0, neginf=0)
        return zip(rows, self.recipe.novelty.scores(first).tolist(), first, strict=True)

    def _changed(self, outputs: NDArray[np.float32], others: NDArray[np.float32]) -> int | None:
        """How many images get another label from other outputs; None if there are no images, or the task has no labels."""
        labels, before = ([self.task.decide(row)[0] for row in rows] for rows in (outputs, others))
        return None if not labels or None in labels else sum(a != b for a, b in zip(labels, before, strict=True))

    def _image_then(self) -> ProbeImage | None:
        """The pixels of the test image when the network was made, if its metadata has them."""
        assert self.recipe.origin is not None
        return ProbeImage.parse(self.embedder.metadata.get(PROBE_IMAGE), self.recipe.origin.probe)

    def _measured(self, first: Sequence[bytes], files: Files) -> PixelDrift:
        """How far pixels are from those of training, on the test image and on the first images.

        The pixels of the first images in training are unknown; they are assumed to differ as those of the test image do.
        """
        then, now = self._image_then(), ProbeImage.here(self.recipe.preprocess)
        if then is None:
            return PixelDrift({}, libraries())
        moved = np.concatenate([(a.astype(int) - b).ravel() for a, b in zip(now.pixels, then.pixels, strict=True)])
        shift = now.pixels[0].astype(int) - then.pixels[0]
        with Decoder(self.recipe.preprocess) as decoder:
            good = []
            for path in first:
                with suppress(ImageError):
                    good.append(decoder(files.read(path)[0]))
        pixels = np.stack([now.pixels[0], *good])
        before = np.stack([then.pixels[0], *(np.clip(image - shift, 0, 255).astype(np.uint8) for image in good)])
        (features, outputs), (features_then, outputs_then) = (
            (rows, self._outputs(rows)[0]) for rows in (self.embedder.embed(each)[0] for each in (pixels, before))
        )
        differences = np.abs(outputs.astype(np.float64) - outputs_then).max(axis=1)
        sound = [i for i in range(1, len(pixels)) if np.isfinite(differences[i])]
        gives_features = self.recipe.output != self.task.output  # a fused classifier does not
        return PixelDrift(
            then.libraries,
            now.libraries,
            levels=int(np.abs(moved).max()),
            share=float((moved != 0).mean()),
            features=float(relative_l2(features[:1], features_then[:1])[0]) if gives_features else None,
            outputs=float(differences[0]),
            images=len(sound),
            images_outputs=float(differences[sound].max()) if sound else None,
            images_decisions=self._changed(outputs[sound], outputs_then[sound]),
        )

    @property
    def _count(self) -> int:
        return self.recipe.views.count if self.recipe.views else 1

    @property
    def classes(self) -> Sequence[str]:
        """The names of the columns of its probabilities."""
        return self.task.names

    @cached_property
    def embedder(self) -> Embedder:
        """The backbone's session, opened on first use.

        Raises:
            BadDataError: the loaded network is not the one that the head is for.
        """
        opened = Embedder(
            self.recipe.backbone,
            self.recipe.preprocess,
            device=resolve_device(self._device),
            batch_size=self._batch_size,
            outputs=[self.recipe.output],
            tf32=self.recipe.tf32,
        )
        if self.recipe.require is not None:
            self.recipe.require(opened.metadata)
        return opened

    def _pixels(self, files: Files, decoder: Decoder, path: bytes) -> _Read:
        try:
            data = files.read(path)[0]
            pixels = decoder(data)
            if self.recipe.views is None:
                return path, pixels[None]
            return path, self.recipe.views.pixels(
                Image.fromarray(pixels), hashlib.sha256(data).digest(), self.recipe.preprocess
            )
        except ImageError as error:
            return path, error


def _on_its_device(fingerprint: Fingerprint, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the CPU for int8: it was calibrated for the CPU, and a GPU computes such a graph in float."""
    needs_cpu = precision_of(precision_name(fingerprint)).device == "cpu" and options.get("device", "auto") == "auto"
    return {**options, "device": "cpu"} if needs_cpu else options


def list_images(inputs: Sequence[str | Path]) -> Iterator[bytes]:
    """The files for the arguments of `penult predict`: files as they are, folders with everything below them.

    Folders are read one after the other, so that no list of millions of names is held in memory.

    Raises:
        InputMissingError: none of them exists, a folder is empty, or one cannot be read. A single missing file becomes a
            prediction with a code.
        UsageError: one is a tar archive, a cache or a bundle.
    """
    paths = list(map(Path, inputs))
    for path in paths:
        refuse_ours(path)
        refuse_archive(path)
        if path.is_dir() and next(ImageFolder(path).everything(), None) is None:
            message = f"no files in {path}"
            raise InputMissingError(message)
    if not any(path.exists() for path in paths):
        message = f"{', '.join(map(str, inputs[:3]))}: no such file"
        raise InputMissingError(message)
    return _files_of(paths)


def count_images(inputs: Sequence[str | Path]) -> int:
    """How many files `list_images` gives; a walk through the folders, which takes far less time than the images in them."""
    return sum(1 for _ in _files_of(map(Path, inputs)))


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
