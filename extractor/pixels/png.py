"""What Pillow does not say of a PNG: pixels that are damaged or missing, and one transparent colour of 2, 4 or 3 x 16 bits."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .header import COPIED, Header

START = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3  # colour types


class Png(Header):
    """A PNG by its chunks."""

    def _chunks(self) -> Iterator[tuple[bytes, int, int]]:
        """Kind, begin and end of the content of each chunk."""
        at = len(START)
        while at + 12 <= len(self.data):
            start, end = at + 8, at + 8 + int.from_bytes(self.data[at : at + 4])
            yield self.data[at + 4 : start], start, end
            at = end + 4

    def decoded(self) -> bytes:
        """The file without the last byte of its compressed pixels, a part of their checksum.

        Pillow takes the end of that data for the end of the image, however many rows are missing. Now it asks for more until
        all rows are there, and says so. (The checksum of each chunk is tested by `damage`; Pillow ignores it.)
        """
        for _, start, end in reversed([chunk for chunk in self._chunks() if chunk[0] == b"IDAT"]):
            if end > start and len(self.data) <= COPIED:
                length = (end - start - 1).to_bytes(4)
                return b"".join(
                    (self.data[: start - 8], length, self.data[start - 4 : end - 1], bytes(4), self.data[end + 4 :])
                )
        return self.data

    def damage(self) -> str:
        view, palettes = memoryview(self.data), list[int]()
        for kind, start, end in self._chunks():
            if kind == b"IEND":
                wrong = self.data[25] == PALETTE and (len(palettes) != 1 or not palettes[0] or palettes[0] % 3)
                return "has no palette, or a damaged one" if wrong else ""
            if kind == b"PLTE":
                palettes.append(end - start)
            if kind == b"IDAT" and zlib.crc32(view[start - 4 : end]) != int.from_bytes(self.data[end : end + 4]):
                return "is cut or damaged: the checksum of its pixels is wrong"
        return "has no end marker"

    def after(self, image: Image.Image) -> None:
        """Make the transparent colour white, or name it as the pixels have it."""
        depth, colour, key = self.data[24], self.data[25], image.info.get("transparency")
        if key is None or colour not in (GREY, RGB):
            return
        if 1 < depth < 8:
            top = 2**depth - 1
            image.info["transparency"] = (key & top) * 255 // top
        elif depth == 16 and colour == RGB:  # Pillow keeps the high bytes alone
            del image.info["transparency"]
            samples = np.asarray(image).astype(np.uint16) << 8 | self._low_bytes()
            image.paste("white", mask=Image.fromarray((samples == key).all(axis=-1)))

    def _low_bytes(self) -> NDArray[np.uint8]:
        """The other half of samples of 16 bits: read as if their byte order were the opposite."""
        image = Image.open(io.BytesIO(self.data), formats=("PNG",))
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(image)
