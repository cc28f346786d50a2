"""Training batches for fine-tuning: decoded once, augmented per epoch, and prepared ahead by threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extractor.data.files import GONE, MOVED, Located
from extractor.futures import in_flight
from extractor.machine import cores
from extractor.pixels.augment import NONE
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import ImageError
from store.errors import BadDataError, InputMissingError

if TYPE_CHECKING:
    from .settings import FineTuneOptions

Item = tuple[Path | Located, int]

MAX_HELD = 2**29  # bytes of decoded images kept in memory; the others are decoded again in every epoch


class Batches:
    """Batches of normalised pixels ``(n, 3, crop, crop)`` and labels, prepared ahead by threads.

    A last batch of one image joins the one before it: batch normalisation has no statistics of one. The decoder must not crop.
    With several processes, each takes its ``share`` of every batch: its rank, and the number of processes.
    """

    def __init__(
        self,
        items: Sequence[Item],
        decoder: Decoder,
        options: FineTuneOptions,
        *,
        train: bool,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._items, self._decoder, self._options, self._train = items, decoder, options, train
        self._augmentation = options.augmentation if train else NONE
        self._workers = options.workers or cores()
        self._preprocess = decoder.preprocess
        self._starts = list(range(0, len(items), options.batch_size))
        self._share = share
        if 0 < len(items) % options.batch_size < 2 * share[1] and len(self._starts) > 1:
            self._starts.pop()
        self._epoch = 0
        self._images: dict[int, Image.Image] = {}
        self._free, self._lock = MAX_HELD, Lock()

    def __len__(self) -> int:
        return len(self._starts)

    def skip(self, epochs: int) -> None:
        """Continue as after this many epochs."""
        self._epoch = epochs

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        self._epoch += 1
        order = np.arange(len(self._items))
        if self._train:
            np.random.default_rng([self._options.seed, self._epoch]).shuffle(order)
        rank, processes = self._share
        parts = [part[rank::processes] for part in np.split(order, self._starts[1:])]
        with ThreadPoolExecutor(self._workers, "penult-augment") as pool:
            for future in in_flight((pool.submit(self._batch, part) for part in parts), self._workers):
                yield future.result()

    def _batch(self, part: NDArray[np.int64]) -> tuple[Any, Any]:
        import torch

        pixels = self._preprocess.normalise(np.stack([self._pixels(int(index)) for index in part]))
        return torch.from_numpy(pixels), torch.tensor([self._items[index][1] for index in part])

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        image = self._image(index)
        if not self._augmentation:
            return self._preprocess.pixels(image)
        # One generator per image and epoch: the same numbers whatever the order and the number of threads.
        rng = np.random.default_rng([self._options.seed, self._epoch, index])
        return self._augmentation.pixels(image, rng, self._preprocess)

    def _image(self, index: int) -> Image.Image:
        """The image at the size it has before cropping; `Preprocess.pixels` of it and of the original are the same."""
        image = self._images.get(index)
        if image is None:
            image = read_resized(self._items[index][0], self._decoder)
            size = image.width * image.height * 3
            with self._lock:
                if size <= self._free:
                    self._free -= size
                    self._images[index] = image
        return image


def read_resized(path: Path | Located, decoder: Decoder) -> Image.Image:
    """Decode and resize as for extraction, with a decoder that does not crop.

    Raises:
        InputMissingError: it cannot be read.
        BadDataError: it cannot be decoded.
    """
    try:
        return Image.fromarray(decoder(path.read_bytes()))
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; {MOVED}"
        raise InputMissingError(message) from error
    except ImageError as error:
        if error.code in GONE:
            message = f"cannot read {path}: {error}; {MOVED}"
            raise InputMissingError(message) from error
        message = f"{path}: {error.code}: {error}; has it changed since the features were extracted?"
        raise BadDataError(message) from error
