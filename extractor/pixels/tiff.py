"""The layout of samples that a TIFF declares: Pillow reads some as others, and many not at all.

A layout is refused by its name where Pillow cannot be trusted with it. benchmarks/layouts.py writes every layout and compares
the pixels. Tags and their values are those of TIFF 6.0.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from math import ceil

from PIL import ImageFile

from .header import Header, replace_raw_modes

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")  # BigTIFF has +; the last two are not allowed, but read
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6  # photometric interpretations
UNCOMPRESSED, JPEG, FAX = 1, 7, (2, 3, 4)
OPTIONAL = (6, 34925, 50000, 50001)  # compressions that not every libtiff has, or not whole: old JPEG, LZMA, Zstandard, WebP
UNSIGNED = 1
REDUCED = 1  # bit of the subfile type: a copy of another image of the file at a lower resolution
SAMPLE_FORMATS = {UNSIGNED: "", 2: " signed", 3: " float"}
BT601, FULL_RANGE = (0.299, 0.587, 0.114), (0, 255, 128, 255, 128, 255)  # weights, and black and white of YCbCr in JPEG
TAGS = {
    254: "subfile",
    256: "width",
    257: "height",
    258: "bits",
    259: "compression",
    262: "photometric",
    266: "fill_order",
    273: "strips",
    277: "samples",
    278: "strip_height",
    279: "strip_bytes",
    284: "planar",
    320: "colours",
    322: "tile_width",
    323: "tile_height",
    324: "tiles",
    332: "inks",
    338: "extra",
    339: "sample_format",
    529: "weights",
    530: "subsampling",
    532: "range",
}
FRACTION = 5
KINDS = {1: "B", 3: "H", 4: "I", FRACTION: "I", 16: "Q"}  # of values, as in `struct`; a fraction has two
MOST_TAGS = 4096  # libtiff's limit


class Tiff(Header):
    """The first directory of a TIFF.

    Attributes:
        tags: values of `TAGS` by name, fractions as pairs; those before what is damaged.
        order: of bytes, as in `struct`.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.order = "<" if data[:2] == b"II" else ">"
        self.tags: dict[str, tuple[int, ...]] = {}
        self._photometric = (0, "H")  # where it stands, and how
        self._whole = False
        with suppress(struct.error, OverflowError):
            self._read_tags()
            self._whole = True

    def _read_tags(self) -> None:
        word, room, counter = ("Q", 8, "Q") if b"+" in self.data[2:4] else ("I", 4, "H")  # BigTIFF has longer numbers
        (start,) = self._numbers(word, room)
        (count,) = self._numbers(counter, start)
        start += struct.calcsize(f"={counter}")
        for at in range(start, start + min(count, MOST_TAGS) * (4 + 2 * room), 4 + 2 * room):
            (tag, kind), (length,), place = self._numbers("HH", at), self._numbers(word, at + 4), at + 4 + room
            if tag not in TAGS or kind not in KINDS:
                continue
            kinds = f"{length * (2 if kind == FRACTION else 1)}{KINDS[kind]}"
            if struct.calcsize(f"={kinds}") > room:
                (place,) = self._numbers(word, place)
            self.tags[TAGS[tag]] = self._numbers(kinds, place)
            if TAGS[tag] == "photometric":
                self._photometric = place, KINDS[kind]

    def _numbers(self, kinds: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + kinds, self.data, at)

    def _one(self, name: str, default: int) -> int:
        return (self.tags.get(name) or (default,))[0]

    @property
    def samples(self) -> int:
        return self._one("samples", 1)

    @property
    def photometric(self) -> int:
        """-1 where a file leaves it open; fax machines do, and 0 is white for them."""
        return self._one("photometric", WHITE_IS_ZERO if self._one("compression", UNCOMPRESSED) in FAX else -1)

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a sample; of the longest where they differ."""
        return max(self.tags.get("bits") or (1,))

    @property
    def separate(self) -> bool:
        """Whether each sample has a plane of its own."""
        return self._one("planar", 1) == 2 and self.samples > 1

    @property
    def negative(self) -> bool:  # type: ignore[override]
        """0 is white, of more than 8 bits: Pillow forgets to invert it, or reads it in one byte order alone."""
        return self.photometric == WHITE_IS_ZERO and self.bits > 8 and self._photometric[0] > 0

    def decoded(self) -> bytes:
        """A negative is declared as if 0 were black."""
        at, kind = self._photometric
        value = struct.pack(self.order + kind, BLACK_IS_ZERO)
        return self.data[:at] + value + self.data[at + len(value) :] if self.negative else self.data

    def layout(self) -> str:
        """Such as ``TIFF of 5 samples x 16 bits, photometric interpretation 1, compression 5``."""
        if not self._one("width", 0) or not self._one("height", 0) or self.damage():
            return ""
        bits = self.tags.get("bits") or (1,)
        text = "/".join(str(each) for each in (bits if len(set(bits)) > 1 else bits[:1]))
        formats = sorted({SAMPLE_FORMATS.get(each, " of unknown format") for each in self.tags.get("sample_format", (1,))})
        samples = f"{self.samples} sample{'s' * (self.samples > 1)} x {text} bits{'/'.join(formats)}"
        meaning = "missing" if self.photometric < 0 else str(self.photometric)
        code = self._one("compression", UNCOMPRESSED)
        return f"TIFF of {samples}, photometric interpretation {meaning}, compression {code}"

    def is_unknown(self, error: str) -> bool:
        return super().is_unknown(error) or ("decoder error" in error and self._one("compression", UNCOMPRESSED) in OPTIONAL)

    def damage(self) -> str:
        """Missing strips or tiles, which Pillow leaves black, and short ones, where it reads what comes next."""
        if not self._whole:
            return "has a directory that goes beyond its end"
        width, height = self._one("width", 0), self._one("height", 0)
        across, down = max(width, 1), max(min(self._one("strip_height", height), height), 1)
        if "strips" not in self.tags:
            across, down = max(self._one("tile_width", width), 1), max(self._one("tile_height", height), 1)
        plane = ceil(width / across) * ceil(height / down)
        needed = plane * (self.samples if self.separate else 1)
        places = (self.tags.get("strips") or self.tags.get("tiles") or ())[:needed]
        if not places:
            return ""
        if len(places) < needed or not all(places):
            return f"has {sum(map(bool, places))} of the {needed} pieces that its header declares"
        if self._one("compression", UNCOMPRESSED) != UNCOMPRESSED or self.photometric == YCBCR:
            return ""
        line = ceil(across * self.bits * (1 if self.separate else self.samples) / 8)
        sizes = self.tags.get("strip_bytes", ())[:needed]
        short = sum(0 < size < line * min(down, height - i % plane * down) for i, size in enumerate(sizes))
        return f"has {short} of {needed} strips that are shorter than its header declares" if short else ""

    def unread(self, image: ImageFile.ImageFile) -> str:
        uncompressed = self._one("compression", UNCOMPRESSED) == UNCOMPRESSED
        extra = self.tags.get("extra", ())
        if not self._whole:
            return ""
        if any(each != UNSIGNED for each in self.tags.get("sample_format", ())) or self.bits > 16:
            return "only whole numbers without a sign of up to 16 bits have a known range"
        if self._one("subfile", 0) & REDUCED:
            return "its first image is a small copy of another, as in a camera's raw file"
        if self.photometric < 0:
            return "the header does not say what 0 means"
        if self.photometric == PALETTE and max(self.tags.get("colours") or (0,)) < 256:
            return "its palette is black, or of 8 bits where the format has 16"
        if self.photometric == CMYK and self._one("inks", 1) != 1:
            return "its inks are others than CMYK"
        if self.photometric == YCBCR and uncompressed and not self._plain_ycbcr():
            return "YCbCr without compression is read only where it is sampled and weighted as in a JPEG of full colour"
        if "strips" in self.tags and "tile_width" in self.tags:
            return "its tiles are called strips"
        if self._one("compression", UNCOMPRESSED) == JPEG and self.bits > 12:
            return "JPEG of more than 12 bits is not read"
        if self.separate:
            if self.photometric == YCBCR and self.tags.get("subsampling") != (1, 1):
                return "planes of different sizes are not read"
            if self._one("fill_order", 1) != 1:
                return "planes with reversed bits are not read"
            if self.photometric > YCBCR or (any(extra) and (len(extra) > 1 or self.photometric != RGB)):
                return "planes are read of grey, RGB, RGB and alpha, CMYK and YCbCr alone"
        return ""

    def _plain_ycbcr(self) -> bool:
        """Whether uncompressed YCbCr is as in JPEG, which Pillow takes for granted: every pixel with three samples."""
        size = 3 * self._one("width", 1) * self._one("height", 1)
        whole = self.tags.get("subsampling", (1, 1) if sum(self.tags.get("strip_bytes", ())) == size else ()) == (1, 1)
        return whole and self._is("weights", BT601) and self._is("range", FULL_RANGE)

    def _is(self, name: str, usual: tuple[float, ...]) -> bool:
        """Whether fractions are the usual ones, or missing."""
        pairs = self.tags.get(name, ())
        return all(abs(a / (b or 1) - each) < 1e-3 for a, b, each in zip(pairs[::2], pairs[1::2], usual, strict=False))

    def before(self, image: ImageFile.ImageFile) -> None:
        """16-bit planes without compression are taken for 8 bits."""
        if self.separate and self.bits == 16:
            end = "16L" if self.order == "<" else "16B"
            replace_raw_modes(image, {band: f"{band};{end}" for band in "RGBACMYK"})
