"""BMP files whose palette or alpha Pillow mistakes."""

from __future__ import annotations

from PIL import ImageFile

from .header import Header, raw_mode, replace_raw_modes

START = b"BM"
OS2, INFO, WITH_ALPHA, OS2_2 = 12, 40, 56, 64  # sizes of headers, which are their first field
SIZES = (OS2, 16, INFO, 52, WITH_ALPHA, OS2_2, 108, 124)
BITS = (1, 2, 4, 8, 16, 24, 32, 64)  # of a pixel
RUN_LENGTHS, BIT_FIELDS = (1, 2), 3
END_OF_IMAGE, SKIP = 1, 2  # after a run of no pixels
COMPRESSIONS = ("", ", run lengths", ", run lengths", ", bit fields", ", JPEG", ", PNG", ", bit fields")


class Bmp(Header):
    """A BMP by its header; all numbers are 0 if that is cut.

    Attributes:
        size: of the header.
        depth: bits of a pixel.
        compression: place in `COMPRESSIONS`.
        alpha: which bits of a pixel of bit fields are its alpha, as a mask.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = self._number(14, 4)
        self.depth = self._number(24 if self.size == OS2 else 28, 2)
        self.compression = self._number(30, 4) if self.size >= INFO else 0
        self.alpha = self._number(66, 4) if self.size >= WITH_ALPHA and self.size != OS2_2 else 0

    def _number(self, at: int, length: int) -> int:
        return int.from_bytes(self.data[at : at + length], "little")

    def layout(self) -> str:
        if self.size not in SIZES or self.depth not in BITS or self.compression >= len(COMPRESSIONS):
            return ""
        how = ", run lengths" if self.size == OS2_2 and self.compression else COMPRESSIONS[self.compression]
        return f"BMP of {self.depth} bits{how}"

    def unread(self, image: ImageFile.ImageFile) -> str:
        if raw_mode(image.tile[0]) in ("1", "L") and self.depth == 4:
            return "its palette of greys is taken for that of other bits"
        if self.depth == 16 and self.compression == BIT_FIELDS and self.alpha:
            return "its alpha is ignored"
        return ""

    def damage(self) -> str:
        """Pixels one by one among run lengths that do not fit their line: Pillow shifts what follows."""
        at, x, width = self._number(10, 4), 0, self._number(18, 4)
        while self.compression in RUN_LENGTHS and at + 1 < len(self.data):
            count, value = self.data[at : at + 2]
            at += 2
            if count:
                x = min(x + count, width)
            elif value == SKIP:
                x, at = x + self._number(at, 1), at + 2
            elif value > SKIP:
                x, at = x + value, at + (value * self.depth + 15) // 16 * 2  # whole words
            elif value == END_OF_IMAGE:
                return ""
            else:
                x = 0
            if x > width:
                return "has run lengths beyond the end of a line"
        return ""

    def before(self, image: ImageFile.ImageFile) -> None:
        """A palette of black and white makes Pillow read bits where there are bytes."""
        if self.depth == 8:
            replace_raw_modes(image, {"1": "1;8"})
