"""Cached views: each image and some seeded augmentations of it, so that heads are fitted on more than one crop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from store.errors import BadDataError, UsageError
from store.fingerprint import MAX_VIEWS

from .augment import Augmentation
from .preprocess import Preprocess, probe_image

PROBES = 16  # draws for the probe: a policy makes one or two of its changes in each


@dataclass(frozen=True)
class Views:
    """The number of views of an image, and how they are drawn.

    Attributes:
        count: of each image; the first one is the image as it is.
        seed: of all draws.
        augmentation: what is drawn.
    """

    count: int
    seed: int
    augmentation: Augmentation

    def pixels(self, image: Image.Image, digest: bytes, preprocess: Preprocess) -> NDArray[np.uint8]:
        """All views of an image: ``(count, crop, crop, 3)`` uint8.

        Each has a generator of its own, from seed, content and number, so that it does not depend on other draws.

        Args:
            image: at the size it has before cropping; of the reference pixel path (see `require_reference`).
            digest: SHA-256 of the bytes that it was decoded from.
            preprocess: what happens to pixels.
        """
        content = int.from_bytes(digest)
        rngs = (np.random.default_rng([self.seed, content, view]) for view in range(1, self.count))
        return np.stack([preprocess.pixels(image), *(self.augmentation.pixels(image, rng, preprocess) for rng in rngs)])

    def fingerprint(self, preprocess: Preprocess) -> dict[str, Any]:
        """What decides the views, with a probe: another version of Pillow or torchvision may draw or compute differently."""
        image = preprocess.scaled(probe_image())
        probed = Views(PROBES, self.seed, self.augmentation).pixels(image, b"", preprocess)
        return {**self.facts(), "probe": hashlib.sha256(probed.tobytes()).hexdigest()}

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"count": self.count, "seed": self.seed, "augmentation": self.augmentation.facts()}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Views:
        """Inverse of `facts`; the probe is ignored.

        Raises:
            BadDataError: the number of views is out of range.
        """
        if facts["count"] not in range(2, MAX_VIEWS + 1):
            message = f"{facts['count']!r} views of an image; expected 2 to {MAX_VIEWS}"
            raise BadDataError(message)
        return cls(facts["count"], facts["seed"], Augmentation.from_facts(facts["augmentation"]))


def require_reference(pixel_path: str | None) -> None:
    """Refuse the faster pixel paths, which decode and resize no more than their crop needs.

    The first view must have the bits of a cache without views, and the others need the whole image.

    Raises:
        UsageError: it is one of these.
    """
    if pixel_path not in (None, "pillow"):
        message = f"--views needs whole images, and --pixel-path {pixel_path} makes only the crop; leave one of them out"
        raise UsageError(message)
