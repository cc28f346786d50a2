"""Pixel drift: how far this machine's pixels are from those that a network's features were computed from.

A new Pillow, or a new libjpeg in it, may decode or resize differently: one level here and there moves features, without any
other sign. The built-in test image shows it: a backbone's metadata hold its pixels on the machine that wrote the backbone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from store.errors import FingerprintMismatchError
from store.fingerprint import Fingerprint

from .preprocess import Preprocess, probe, probe_pixels

LIBRARIES = {"libjpeg-turbo": "libjpeg_turbo", "zlib": "zlib", "libwebp": "webp", "libtiff": "libtiff"}  # as Pillow names them


@dataclass(frozen=True)
class ProbeImage:
    """The built-in test image as one machine decodes it on one pixel path.

    Attributes:
        pixels: ``(crop, crop, 3)`` uint8, of each variant that the probe of a fingerprint covers.
        libraries: versions of Pillow and of what it decodes with.
    """

    pixels: tuple[NDArray[np.uint8], ...]
    libraries: Mapping[str, str]

    @classmethod
    def here(cls, preprocess: Preprocess) -> Self:
        """The test image as this machine decodes it."""
        return cls(probe_pixels(preprocess), libraries())

    @property
    def probe(self) -> str:
        """The digest of its pixels, as in a fingerprint."""
        return hashlib.sha256(b"".join(each.tobytes() for each in self.pixels)).hexdigest()

    def to_json(self) -> dict[str, Any]:
        packed = [base64.b85encode(zlib.compress(each.tobytes(), 9)).decode() for each in self.pixels]
        return {"shapes": [each.shape for each in self.pixels], "pixels": packed, "libraries": dict(self.libraries)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError, zlib.error: these are not facts of `to_json`.
        """
        raw = [zlib.decompressobj().decompress(base64.b85decode(text), 2**26) for text in facts["pixels"]]
        arrays = [np.frombuffer(data, np.uint8).reshape(shape) for data, shape in zip(raw, facts["shapes"], strict=True)]
        return cls(tuple(arrays), {str(name): str(value) for name, value in facts["libraries"].items()})

    @classmethod
    def parse(cls, text: str | None, made_from: str) -> Self | None:
        """Read it from a file's metadata; None if it is missing, or is not the one with the probe ``made_from``."""
        try:
            image = cls.from_json(json.loads(text or ""))
        except (ValueError, TypeError, KeyError, AttributeError, zlib.error):
            return None
        return image if image.probe == made_from else None


@dataclass(frozen=True)
class PixelOrigin:
    """The pixels that something was made from, which this machine must reproduce.

    Attributes:
        name: what was made from them, for messages.
        probe: digest of the test image then; empty if nothing is recorded.
        accept: continue if the pixels differ, and report by how much.
    """

    name: str
    probe: str
    accept: bool = False

    @classmethod
    def of(cls, name: str, fingerprint: Fingerprint, *, accept: bool = False) -> Self:
        """The origin that a fingerprint records."""
        return cls(name, str(fingerprint.leaves().get("pixels.probe", "")), accept)

    def differs(self, preprocess: Preprocess) -> bool:
        """Whether this machine makes different pixels."""
        return bool(self.probe) and self.probe != probe(preprocess)

    def require(self, preprocess: Preprocess, then: ProbeImage | None = None) -> None:
        """Refuse different pixels, unless they are accepted.

        Raises:
            FingerprintMismatchError: names the libraries that made them, if known, and says what to do.
        """
        if self.accept or not self.differs(preprocess):
            return
        versions = then_and_now(then.libraries if then else {}, libraries())
        message = (
            f"{self.name} was made from other pixels than this machine makes: the built-in test image is decoded "
            f"differently ({versions}). Install the earlier versions, or extract and train again with these; --accept-pixels "
            f"measures the difference and continues"
        )
        raise FingerprintMismatchError(message)


@dataclass(frozen=True)
class PixelDrift:
    """How far this machine's pixels are from those of the training, and what that changes.

    Attributes:
        then, now: versions of the libraries; ``then`` is empty if unknown, and the fields that need its pixels are None.
        levels: largest difference of a value of the test image, in levels of 255.
        share: share of its values that differ.
        features: relative L2 between its features; None if the network has no features.
        outputs: largest difference of its probabilities; of a regression, of its numbers.
        images: how many of the first images of the run were tried.
        images_outputs: largest difference of their outputs if their pixels moved as those of the test image did.
        images_decisions: how many of them would get another label; None without labels or images.
    """

    then: Mapping[str, str]
    now: Mapping[str, str]
    levels: int | None = None
    share: float | None = None
    features: float | None = None
    outputs: float | None = None
    images: int = 0
    images_outputs: float | None = None
    images_decisions: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, name: str) -> str:
        """The drift in words; ``name`` is what was made from the earlier pixels."""
        if self.levels is None:
            return (
                f"{name} was made from other pixels than this machine makes, which is accepted. How much they differ cannot be "
                f"measured: it does not hold the earlier test image"
            )
        moved = "" if self.features is None else f"its features by {self.features:.1e} (relative L2), "
        text = (
            f"{name} was made from other pixels than this machine makes ({then_and_now(self.then, self.now)}), which is "
            f"accepted. {self.share:.1%} of the values of the test image differ, by up to {self.levels} of 255 "
            f"levels; that moves {moved}its outputs by up to {self.outputs:.1e}"
        )
        if not self.images:
            return text
        labels = "" if self.images_decisions is None else f" and changes {self.images_decisions} of their labels"
        first = "the first image" if self.images == 1 else f"the first {self.images} images"
        return f"{text}. The same change in {first} moves outputs by up to {self.images_outputs:.1e}{labels}"


def libraries() -> dict[str, str]:
    """Versions of Pillow and of what it decodes with."""
    from importlib.metadata import version

    from PIL import features

    versions = {name: features.version(key) for name, key in LIBRARIES.items()}
    return {"pillow": version("pillow"), **{name: value for name, value in versions.items() if value}}


def then_and_now(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Library versions then and now, as text; of those that changed, if known."""
    changed = [name for name in now if then.get(name) != now[name]]
    if not then:
        return f"the earlier versions are not recorded; here they are {_listing(now, now)}"
    if not changed:
        return f"the same versions then and now, {_listing(now, now)}: built differently, or on another processor"
    return f"{_listing(then, changed)} then, {_listing(now, changed)} now"


def _listing(versions: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'none')}" for name in names)
