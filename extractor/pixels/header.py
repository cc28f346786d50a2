"""What a file says of its pixels before they are decoded, beside what Pillow makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFile

COPIED = 2**27  # bytes of the largest file that is copied to find what is missing: memory is limited (`images.MEMORY`)


class Header:
    """The header of a file in whose format Pillow is right; `Jpeg`, `Png`, `Tiff` and `Bmp` know more of theirs.

    Attributes:
        data: the file.
        bits: of a sample of grey, where it has more than 8.
        negative: whether the pixels that `decoded` leads to must be inverted.
    """

    bits, negative = 16, False

    def __init__(self, data: bytes) -> None:
        self.data = data

    def decoded(self) -> bytes:
        """What Pillow is to decode instead of the file."""
        return self.data

    def layout(self) -> str:
        """Samples and bits, for messages; empty where Pillow opens every sound file, or this one is damaged."""
        return ""

    def unread(self, image: ImageFile.ImageFile) -> str:
        """Why Pillow, which opened it, would read other pixels than are meant; empty if it would not."""
        return ""

    def is_unknown(self, error: str) -> bool:
        """Whether Pillow, which failed with this error, lacks what a sound file of this layout needs."""
        return "unknown raw mode" in error

    def damage(self) -> str:
        """What the header shows to be missing or wrong, which Pillow would not say; empty if nothing."""
        return ""

    def before(self, image: ImageFile.ImageFile) -> None:
        """Correct an opened image whose pixels are not loaded."""

    def after(self, image: Image.Image) -> None:
        """Correct an image whose pixels are loaded."""


def raw_mode(tile: Any) -> str:
    """How samples lie in one part of an opened image's data, as Pillow names it; empty where they are compressed."""
    return str(tile.args[0]) if tile.codec_name == "raw" else ""


def replace_raw_modes(image: ImageFile.ImageFile, names: Mapping[str, str]) -> None:
    """Make Pillow unpack the samples of an opened image otherwise."""
    image.tile = [
        tile._replace(args=(names[raw_mode(tile)], *(tile.args or ())[1:])) if raw_mode(tile) in names else tile
        for tile in image.tile
    ]
