"""From RGB pixels to the network's input, bit for bit as torchvision's presets for Pillow images do it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from store.errors import UsageError

from .images import PIXEL_PATH, ImageError, decode

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
UNUSUAL = {"input_range": 1.0, "channels": "rgb", "squash": False}  # named in a fingerprint only where they differ from this
MAX_SIDE = 4096  # pixels of --resize and --crop; no network takes a tenth of that many
MAX_RESIZED_PIXELS = 2**25  # a 1 x 20000 image of 157 bytes would become 256 x 5120000 pixels, 4.7 GB


@dataclass(frozen=True)
class Preprocess:
    """What happens between decoding and the network.

    Attributes:
        resize: length of the shorter side after resizing, pixels.
        crop: side of the centred square crop, pixels.
        interpolation: one of `FILTERS`; Pillow always filters over the whole footprint (antialias).
        mean, std: per channel, of values in [0, input_range].
        input_range: 1 (pixels / 255, as torch has it) or 255 (raw pixel values, as some Keras networks take them).
        channels: ``rgb``, or ``bgr`` for networks that were trained on OpenCV's or Caffe's order.
        squash: resize to the square itself, whatever the aspect, instead of the shorter side and a crop.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_range: float = 1.0
    channels: str = "rgb"
    squash: bool = False

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Size after resizing, rounded down as torchvision does.

        Raises:
            ImageError: code ``bad_aspect`` where the longer side would explode.
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

    def scaled(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image, without the crop; `pixels` of it and of the original are the same."""
        size = self.resized(*image.size)
        return image if size == image.size else image.resize(size, FILTERS[self.interpolation])

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an RGB image: ``(crop, crop, 3)`` uint8, equal to torchvision's preset before normalisation."""
        image = self.scaled(image)
        width, height = image.size
        # int(round(..)) is torchvision's rounding, half to even; a crop larger than the image is padded with zeros
        if width < self.crop or height < self.crop:
            left, top = max((self.crop - width) // 2, 0), max((self.crop - height) // 2, 0)
            canvas = Image.new("RGB", (max(width, self.crop), max(height, self.crop)))
            canvas.paste(image, (left, top))
            image, (width, height) = canvas, canvas.size
        top, left = round((height - self.crop) / 2.0), round((width - self.crop) / 2.0)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

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
        return {"path": PIXEL_PATH, **facts, "mean": list(self.mean), "std": list(self.std), "probe": probe(self)}


def require_sizes(resize: int, crop: int) -> None:
    """Refuse sizes that somebody stated and that make no sense.

    Raises:
        UsageError: beyond the limits, or a crop with black borders around the image.
    """
    for flag, side in (("--crop", crop), ("--resize", resize)):
        if not 1 <= side <= MAX_SIDE:
            message = f"{flag} {side}: expected 1 to {MAX_SIDE} pixels"
            raise UsageError(message)
    if crop > resize:
        message = (
            f"--crop {crop} is larger than --resize {resize}: every image would get black borders. "
            f"State a --resize of at least {crop}"
        )
        raise UsageError(message)


@cache
def probe(preprocess: Preprocess) -> str:
    """SHA-256 of the preprocessed pixels of the built-in test image (JPEG with an EXIF orientation), hexadecimal."""
    from importlib.resources import files

    image = decode((files(__package__) / "probe.jpg").read_bytes())
    return hashlib.sha256(preprocess.pixels(image).tobytes()).hexdigest()
