"""Preprocessing from RGB pixels to the network's input, bit for bit as in torchvision's presets for Pillow images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from store.errors import UsageError

from .images import Decoded, ImageError, decode, decode_at_least

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
PIXEL_PATHS = {  # by name, their names in a fingerprint: the number rises if a name gives other pixels
    "pillow": "pillow-1",
    "pillow-crop": "pillow-crop-1",
    "pillow-draft": "pillow-draft-1",
}
WIDEST = 3  # pixels of the result to each side of its place that a filter looks at, at most (lanczos)
DRAFT_OVER_RESIZED = 2  # a JPEG keeps this multiple of the needed size: libjpeg's own reduction is coarse
UNUSUAL = {"input_range": 1.0, "channels": "rgb", "squash": False}  # in a fingerprint only if they differ from this
MAX_SIDE = 4096  # pixels of --resize and --crop; no network takes a tenth of that many
MAX_RESIZED_PIXELS = 2**25  # a 1 x 20000 image of 157 bytes would become 256 x 5120000 pixels, 4.7 GB


@dataclass(frozen=True)
class Preprocess:
    """The steps between decoding and the network: resize, crop, normalise.

    Attributes:
        resize: length of the shorter side after resizing, pixels.
        crop: side of the centred square crop, pixels.
        interpolation: one of `FILTERS`; Pillow always filters over the whole footprint (antialias).
        mean, std: per channel, of values in [0, input_range].
        input_range: 1 (pixels / 255, as torch has it) or 255 (raw pixel values, as some Keras networks take them).
        channels: ``rgb``, or ``bgr`` for networks that were trained on OpenCV's or Caffe's order.
        squash: resize to the square, ignoring the aspect, instead of resizing the shorter side and cropping.
        pixel_path: one of `PIXEL_PATHS`. ``pillow`` is the reference, torchvision's own order; ``pillow-crop`` resizes only
            what the crop keeps; ``pillow-draft`` does so after decoding large JPEGs at a fraction of their size.

    Raises:
        UsageError: no such pixel path.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_range: float = 1.0
    channels: str = "rgb"
    squash: bool = False
    pixel_path: str = "pillow"

    def __post_init__(self) -> None:
        if self.pixel_path not in PIXEL_PATHS:
            message = f"no pixel path {self.pixel_path!r}; expected {', '.join(PIXEL_PATHS)}"
            raise UsageError(message)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Size after resizing, rounded down as torchvision does.

        Raises:
            ImageError: code ``bad_aspect`` if the longer side would become far too long.
        """
        if self.squash:
            return self.crop, self.crop
        short, long = sorted((width, height))
        scaled = int(self.resize * long / short)
        if scaled * self.resize > MAX_RESIZED_PIXELS:
            raise ImageError(
                code="bad_aspect", message=f"{width} x {height} pixels would be resized to {self.resize} x {scaled}"
            )
        return (self.resize, scaled) if width <= height else (scaled, self.resize)

    def read(self, data: bytes, *, crop: bool = True) -> NDArray[np.uint8]:
        """Pixels of a file's content on `pixel_path`: ``(height, width, 3)`` uint8, contiguous.

        Without the crop, for training that crops at random, every path resizes the whole image as the reference does.

        Raises:
            ImageError, MemoryError: as `images.decode`; code ``bad_aspect``.
        """
        decoded = decode_at_least(data, self._draft_size if self.pixel_path == "pillow-draft" else None)
        return self._crop(decoded) if crop else np.ascontiguousarray(self._scale(decoded))

    def scaled(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image, without the crop; on the reference path, `pixels` of it and of the original are the same."""
        return self._scale(_whole(image))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an RGB image: ``(crop, crop, 3)`` uint8.

        On the reference path equal to torchvision's preset before normalisation.
        """
        return self._crop(_whole(image))

    def _draft_size(self, width: int, height: int) -> tuple[int, int]:
        resized = self.resized(width, height)
        return DRAFT_OVER_RESIZED * resized[0], DRAFT_OVER_RESIZED * resized[1]

    def _scale(self, decoded: Decoded) -> Image.Image:
        image, size = decoded.image, self.resized(*decoded.size)
        return image if size == image.size else image.resize(size, FILTERS[self.interpolation], decoded.box)

    def _crop(self, decoded: Decoded) -> NDArray[np.uint8]:
        size = self.resized(*decoded.size)
        if self.pixel_path != "pillow" and min(size) >= self.crop and size != decoded.image.size:
            return np.asarray(self._crop_first(decoded, size))
        image, (width, height) = self._scale(decoded), size
        if width < self.crop or height < self.crop:
            left, top = max((self.crop - width) // 2, 0), max((self.crop - height) // 2, 0)  # as torchvision pads
            canvas = Image.new("RGB", (max(width, self.crop), max(height, self.crop)))
            canvas.paste(image, (left, top))
            image, (width, height) = canvas, canvas.size
        top, left = self._offset(height), self._offset(width)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

    def _crop_first(self, decoded: Decoded, size: tuple[int, int]) -> Image.Image:
        """The crop of an image resized to ``size``, resizing no more than the crop: rows first, then columns.

        Pillow 13 chooses that order by the shape, which differs between a crop and its image: with one call, one photo in ten
        had a fifth of its values off by one. With two it is 1 in 600, from weights that Pillow computes from a box of float32.
        """
        image, (left, top, right, bottom) = decoded.image, decoded.box
        resample = FILTERS[self.interpolation]
        across, down = (right - left) / size[0], (bottom - top) / size[1]
        left, top = left + self._offset(size[0]) * across, top + self._offset(size[1]) * down
        right, bottom = min(left + self.crop * across, image.width), min(top + self.crop * down, image.height)
        margin = WIDEST * max(down, 1) + 1
        first, last = max(int(top - margin), 0), min(int(bottom + margin) + 1, image.height)
        rows = image.crop((0, first, image.width, last))
        rows = rows.resize((self.crop, rows.height), resample, (left, 0, right, rows.height))
        return rows.resize((self.crop, self.crop), resample, (0, top - first, self.crop, bottom - first))

    def _offset(self, side: int) -> int:
        return round((side - self.crop) / 2.0)  # half to even, as torchvision rounds

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``(n, h, w, 3)`` uint8 to ``(n, 3, h, w)`` float32, with the operations and the order of torchvision."""
        planes = pixels.transpose(0, 3, 1, 2)
        batch = (planes[:, ::-1] if self.channels == "bgr" else planes).astype(np.float32)
        if self.input_range == 1:
            batch /= np.float32(255)
        batch -= np.array(self.mean, np.float32)[:, None, None]
        batch /= np.array(self.std, np.float32)[:, None, None]
        return np.ascontiguousarray(batch)

    def facts(self) -> dict[str, Any]:
        """As JSON, for ONNX metadata and bundles."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Preprocess:
        return cls(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})

    @classmethod
    def from_torchvision(cls, preset: Any) -> Preprocess:
        """Read torchvision's ``ImageClassification`` preset of a weights entry."""
        return cls(
            resize=int(preset.resize_size[0]),
            crop=int(preset.crop_size[0]),
            interpolation=str(preset.interpolation.value),
            mean=tuple(float(value) for value in preset.mean),
            std=tuple(float(value) for value in preset.std),
        )

    def fingerprint(self) -> dict[str, Any]:
        """The pixel path for the fingerprint, with the probe: a change of decoder or resampler changes the digest."""
        facts = {name: value for name, value in asdict(self).items() if value != UNUSUAL.get(name)}
        path = PIXEL_PATHS[facts.pop("pixel_path")]
        return {"path": path, **facts, "mean": list(self.mean), "std": list(self.std), "probe": probe(self)}


def require_sizes(resize: int | None, crop: int | None, spell: Callable[[str], str] = "--{}".format) -> None:
    """Refuse sizes that make no sense; None is a size that is not set.

    Args:
        resize, crop: pixels.
        spell: returns the name of each as it was written.

    Raises:
        UsageError: beyond the limits, or a crop with black borders around the image.
    """
    for name, side in (("crop", crop), ("resize", resize)):
        if side is not None and not 1 <= side <= MAX_SIDE:
            message = f"{spell(name)} is {side}; expected 1 to {MAX_SIDE} pixels"
            raise UsageError(message)
    if crop and resize and crop > resize:
        message = (
            f"{spell('crop')} {crop} is larger than {spell('resize')} {resize}: every image would get black borders. "
            f"Use a {spell('resize')} of at least {crop}"
        )
        raise UsageError(message)


def _whole(image: Image.Image) -> Decoded:
    return Decoded(image, image.size, (0, 0, *image.size))


@cache
def probe(preprocess: Preprocess) -> str:
    """SHA-256 of the preprocessed pixels of the built-in test image (JPEG with an EXIF orientation), hexadecimal."""
    return hashlib.sha256(b"".join(pixels.tobytes() for pixels in probe_pixels(preprocess))).hexdigest()


def probe_pixels(preprocess: Preprocess) -> tuple[NDArray[np.uint8], ...]:
    """The preprocessed pixels of the built-in test image ``(crop, crop, 3)``, for ``pillow-draft`` also small ones."""
    data = _probe_data()
    small = replace(preprocess, resize=32, crop=28)
    variants = (preprocess, small) if preprocess.pixel_path == "pillow-draft" else (preprocess,)  # draft needs a larger image
    return tuple(each.read(data) for each in variants)


def probe_image() -> Image.Image:
    """The built-in test image."""
    return decode(_probe_data())


def _probe_data() -> bytes:
    from importlib.resources import files

    return (files(__package__) / "probe.jpg").read_bytes()
