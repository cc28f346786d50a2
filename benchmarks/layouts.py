"""The matrix of layouts: the ways in which PNG, TIFF and BMP store samples, and what each must become.

`layout_files` writes them and knows nothing of any decoder, so that a fault of one cannot hide there. Run by ``make soak``:
every cell is read, and compared with what it was written from; so is what a second decoder, OpenImageIO, makes of it, which
shows that the files are what they claim to be. The exit status is 1 if anything differs. docs/images.md has the table of
`summary`.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from benchmarks.layout_files import (  # noqa: E402
    COMPRESSIONS,
    HEIGHT,
    WIDTH,
    Samples,
    Storage,
    bmp,
    chunk,
    packed,
    png,
    run_lengths,
    tiff,
)

Pixels = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One way to store samples.

    Attributes:
        format: PNG, TIFF or BMP.
        layout: what the samples are.
        bits: of a sample, in words.
        storage: how the file stores them.
        write: returns the file.
        pixels: ``(height, width, 3)`` in levels from 0 to 255, not rounded.
        within: by how many levels what is read may differ; 0 where the file must be refused as ``unsupported_mode``.
        refusal: what the message must say of a refused one.
        second: whether OpenImageIO reads it as it is meant, or not at all.
    """

    format: str
    layout: str
    bits: str
    storage: str
    write: Callable[[], bytes]
    pixels: Pixels
    within: int
    refusal: str
    second: bool = True

    def __str__(self) -> str:
        return f"{self.format}: {self.layout}, {self.bits} bits; {self.storage}"


def samples(bits: int, count: int, seed: int = 0) -> Samples:
    """Random samples ``(HEIGHT, WIDTH, count)``; whole numbers of so many bits."""
    return np.random.default_rng((bits, count, seed)).integers(0, 2**bits, (HEIGHT, WIDTH, count), np.uint64)


def levels(values: Samples, bits: int) -> Pixels:
    return values.astype(np.float64) / (2**bits - 1) * 255


def rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey, 3, axis=-1)


def on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    """Colour and alpha in levels; the colour not multiplied by alpha."""
    return colour * alpha / 255 + 255 - alpha


# --- PNG ---------------------------------------------------------------------------------------------------------------

COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGB and alpha"}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png_cells() -> Iterator[Cell]:
    for colour, depths in DEPTHS.items():
        for depth, transparent in itertools.product(depths, (False, True)):
            if transparent and colour in (4, 6):
                continue
            values = samples(depth, CHANNELS[colour])
            top, extra = 2**depth - 1, b""
            key = np.maximum(values[HEIGHT // 2, WIDTH // 2], 1)
            if transparent and colour != 3:
                values[3:9, 2:15] = key
                values[9:12, 2:15] = key ^ np.uint64(1)  # next to it: of 16 bits, another colour with the same high byte
                extra = chunk(b"tRNS", key.astype(">u2").tobytes())
            if colour == 3:
                rng = np.random.default_rng(depth)
                entries, alpha = rng.integers(0, 256, (top + 1, 3)), rng.integers(0, 256, top + 1)
                extra = chunk(b"PLTE", entries.astype(np.uint8).tobytes())
                extra += chunk(b"tRNS", alpha.astype(np.uint8).tobytes()) if transparent else b""
                index = values[..., 0].astype(int)
                pixels = entries[index].astype(np.float64)
                pixels = on_white(pixels, alpha[index][..., None]) if transparent else pixels
            else:
                grey = colour in (0, 4)
                pixels = levels(values[..., : 1 if grey else 3], depth)
                pixels = rgb(pixels) if grey else pixels
                if colour >= 4:
                    pixels = on_white(pixels, levels(values[..., -1:], depth))
                if transparent:
                    pixels = np.where((values == key).all(axis=-1, keepdims=True), 255.0, pixels)
            layout = COLOURS[colour] + (" with tRNS" if transparent else "")
            ways = itertools.product((False, True), ((0,), (4,), (1, 2, 3, 4, 0)), (1, 5))
            for interlaced, filters, pieces in ways:
                storage = f"{'interlaced' if interlaced else 'in order'}, filters {filters}, IDAT in {pieces}"
                write = partial(png, values, (depth, colour, interlaced), filters, pieces, extra)
                yield Cell("PNG", layout, str(depth), storage, write, pixels, 2 if depth == 16 and colour >= 4 else 1, "")


# --- TIFF --------------------------------------------------------------------------------------------------------------

PHOTOMETRICS = {0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
COLOUR_SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
FORMATS = {1: "", 2: " signed", 3: " float"}
EXTRAS = {
    (): "",
    (0,): " and an unspecified sample",
    (1,): " and premultiplied alpha",
    (2,): " and alpha",
    (0, 0): " and two unspecified samples",
    (2, 0): " and alpha and an unspecified sample",
}


def lab_levels(values: Samples) -> Pixels:
    """CIELab of D50, 8 bits, to sRGB: CIE 15, with Bradford's adaptation to D65 in the matrix (IEC 61966-2-1)."""
    L = values[..., 0] / 255 * 100
    a, b = (values[..., i].astype(np.uint8).astype(np.int8).astype(np.float64) for i in (1, 2))
    fy = (L + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([0.9642, 1, 0.8249])
    matrix = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


def tiff_pixels(values: Samples, bits: int, photometric: int, extras: tuple[int, ...], entries: Samples | None) -> Pixels:
    """What unsigned samples show."""
    colour = levels(values[..., : COLOUR_SAMPLES[photometric]], bits)
    if photometric in (0, 1):
        pixels = rgb(255 - colour if photometric == 0 else colour)
    elif photometric == 3:
        assert entries is not None
        pixels = levels(entries, 16)[values[..., 0].astype(int)]
    elif photometric == 5:
        pixels = (255 - colour[..., :3]) * (255 - colour[..., 3:]) / 255
    elif photometric == 6:
        y, blue, red = (colour[..., i] - (128 if i else 0) for i in range(3))
        pixels = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], -1).clip(0, 255)
    elif photometric == 8:
        pixels = lab_levels(values[..., :3])
    else:
        pixels = colour
    if extras[:1] == (2,):
        return on_white(pixels, levels(values[..., -len(extras)][..., None], bits))
    if extras[:1] == (1,):
        return pixels + 255 - levels(values[..., -len(extras)][..., None], bits)
    return pixels


def tiff_samples(bits: int, photometric: int, sample_format: int, extras: tuple[int, ...]) -> Samples:
    values = samples(bits, COLOUR_SAMPLES[photometric] + len(extras), photometric)
    if photometric == 8 and bits == 8:
        rng = np.random.default_rng(8)
        values[..., 0] = rng.integers(110, 150, values.shape[:2])
        values[..., 1:3] = rng.integers(-10, 10, (*values.shape[:2], 2)) & 255
    if extras[:1] == (1,):  # a premultiplied colour is at most its alpha
        colour, alpha = values[..., : -len(extras)], values[..., -len(extras)][..., None]
        values[..., : -len(extras)] = (colour * alpha) >> np.uint64(bits)
    return values / 2.0**bits if sample_format == 3 else values


def storages(bits: int, count: int) -> Iterator[Storage]:
    orders = ("<", ">")
    for order, planar in itertools.product(orders, (1, 2) if count > 1 else (1,)):
        for pieces, compression in itertools.product(("strips", "one strip", "tiles"), COMPRESSIONS):
            yield Storage(order, planar, pieces, compression)
        for pieces in ("strips", "tiles"):
            if bits in (8, 16):
                yield Storage(order, planar, pieces, 8, predictor=2)
                yield Storage(order, planar, pieces, 5, predictor=2)
        yield Storage(order, planar, "strips", 1, fill_order=2)
        yield Storage(order, planar, "one strip", 1, big=True)


def tiff_layouts() -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Photometric interpretation, bits, sample format and extra samples."""
    for photometric in (0, 1):
        for bits in (1, 2, 4, 8, 12, 16, 32, 64):
            yield photometric, bits, 1, ()
        for bits, sample_format in ((8, 2), (16, 2), (32, 2), (32, 3), (64, 3)):
            yield photometric, bits, sample_format, ()
        for bits, extras in itertools.product((8, 16), EXTRAS):
            if extras:
                yield photometric, bits, 1, extras
    for bits, extras in itertools.product((8, 16), EXTRAS):
        yield 2, bits, 1, extras
    for bits, sample_format in ((1, 1), (4, 1), (12, 1), (32, 1), (8, 2), (16, 2), (32, 3)):
        yield 2, bits, sample_format, ()
    for bits in (1, 2, 4, 8, 16):
        yield 3, bits, 1, ()
    yield from ((3, 8, 1, (0,)), (3, 8, 1, (2,)))
    for bits, extras in itertools.product((8, 16), ((), (0,), (2,), (0, 0))):
        yield 5, bits, 1, extras
    yield from ((6, 8, 1, ()), (6, 16, 1, ()), (8, 8, 1, ()), (8, 16, 1, ()), (1, 16, 1, (0, 0, 0, 0)), (1, 8, 1, (0,) * 9))


# Bits and extra samples that are read of each photometric interpretation: with samples together, and in planes of their own.
TOGETHER = {
    0: {(1, ()), (2, ()), (4, ()), (8, ()), (12, ()), (16, ())},
    1: {(1, ()), (2, ()), (4, ()), (8, ()), (12, ()), (16, ()), (8, (0,)), (8, (1,)), (8, (2,))},
    2: {*itertools.product((8,), EXTRAS), *itertools.product((16,), ((), (0,), (1,), (2,)))},
    3: {(1, ()), (2, ()), (4, ()), (8, ()), (8, (0,)), (8, (2,))},
    5: {(8, ()), (8, (0,)), (8, (0, 0)), (16, ())},
    6: {(8, ())},
    8: {(8, ())},
}
PLANES = {0: (8, 16), 1: (8, 16), 2: (8, 16), 5: (8, 16), 6: (8,), 3: (8,)}
REVERSED_BITS = {0: (1, 2, 4, 16), 1: (1, 2, 4, 8, 16), 2: (8,), 3: (8,)}


def is_read(photometric: int, bits: int, extras: tuple[int, ...], storage: Storage) -> bool:
    """Whether unsigned samples are read; otherwise the file must be refused."""
    if (storage.big and storage.order == ">") or (bits == 12 and storage.order == ">"):
        return False
    if storage.fill_order == 2:
        return (
            storage.planar == 1
            and not extras
            and bits in REVERSED_BITS.get(photometric, ())
            and (bits < 16 or storage.order == "<")
        )
    if storage.planar == 1:
        return (bits, extras) in TOGETHER[photometric]
    if bits not in PLANES.get(photometric, ()):
        return False
    if storage.compression == 1:
        return (photometric == 2 and extras in ((), (2,))) or (photometric, bits, extras) == (5, 8, ())
    return not any(extras) or (photometric == 2 and extras in ((1,), (2,)))


def within(photometric: int, bits: int, extras: tuple[int, ...]) -> int:
    """By how many levels Pillow may be off: each of two roundings, and of high bytes taken for 16 bits, may add one."""
    if bits == 16 and (photometric == 5 or extras[:1] == (1,)):
        return 3
    return 2 if photometric == 8 or (any(extras) and (bits == 16 or photometric == 3)) else 1


def tiff_cells() -> Iterator[Cell]:
    for photometric, bits, sample_format, extras in tiff_layouts():
        values = tiff_samples(bits, photometric, sample_format, extras)
        count = values.shape[-1]
        tags: dict[int, tuple[int, ...]] = {262: (photometric,)}
        tags |= ({338: extras} if extras else {}) | ({339: (sample_format,) * count} if sample_format != 1 else {})
        tags |= {530: (1, 1)} if photometric == 6 else {}
        entries = None
        if photometric == 3:
            entries = np.random.default_rng(bits).integers(0, 65536, (2**bits, 3))
            tags[320] = tuple(entries.T.reshape(-1).tolist())
        layout = PHOTOMETRICS[photometric] + EXTRAS.get(extras, f" and {len(extras)} unspecified samples")
        pixels = tiff_pixels(values, bits, photometric, extras, entries)
        named = f"{bits}{FORMATS[sample_format]}"
        refusal = f"{count} sample{'s' * (count > 1)} x {bits} bits{FORMATS[sample_format]}"
        second = sample_format == 1 and not (
            (photometric == 0 and (bits > 8 or any(extras))) or photometric == 8 or (photometric in (3, 5) and extras)
        )
        for storage in storages(bits, count):
            read = sample_format == 1 and is_read(photometric, bits, extras, storage)
            levels_off = within(photometric, bits, extras) if read else 0
            write = partial(tiff, values, bits, tags, storage)
            yield Cell("TIFF", layout, named, str(storage), write, pixels, levels_off, refusal, second)


# --- BMP ---------------------------------------------------------------------------------------------------------------

HEADERS = {
    12: "OS/2 1",
    16: "OS/2 2 short",
    64: "OS/2 2",
    40: "version 3",
    52: "version 3 with masks",
    56: "with 4 masks",
    108: "version 4",
    124: "version 5",
}
MASKS = {  # bits: red, green, blue, alpha
    16: ((0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0), (0xF00, 0xF0, 0xF, 0), (0x7C00, 0x3E0, 0x1F, 0x8000)),
    32: (
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF, 0xFF00, 0xFF0000, 0),
        (0x3FF00000, 0xFFC00, 0x3FF, 0),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    ),
}


SECOND_READS = ("bit fields F800 7E0 1F", "bit fields 7C00 3E0 1F", "bit fields F00 F0 F", "bit fields FF0000 FF00 FF FF000000")
READ_MASKS = (*MASKS[16][:2], *MASKS[32][:2], *MASKS[32][4:])


def palettes(bits: int) -> Iterator[tuple[str, Samples]]:
    rng, top = np.random.default_rng(bits), 2**bits
    yield "", rng.integers(0, 256, (top, 3))
    yield " of black and white", np.array([[0] * 3, [255] * 3])
    yield " of white and black", np.array([[255] * 3, [0] * 3])
    yield " of greys", np.repeat(np.linspace(0, 255, top).astype(int)[:, None], 3, axis=1)
    if bits > 1:
        yield " of the first greys", np.repeat(np.arange(top - 3)[:, None], 3, axis=1)
        yield " of fewer colours", rng.integers(0, 256, (top - 3, 3))


def is_bmp_read(header: int, bits: int, palette: str = "") -> bool:
    confused = bits == 4 and palette in (" of black and white", " of the first greys") and header != 12
    return header != 16 and bits != 2 and not confused


def palette_cells(bits: int, header: int, *, top_down: bool) -> Iterator[tuple[str, Callable[[], bytes], Pixels, bool]]:
    """Layout, file, pixels, and whether it is read."""
    for named, entries in palettes(bits):
        index = samples(bits, 1)[..., 0].astype(int) % len(entries)
        index[:, 4:9] = index[:, 4:5]
        write = partial(bmp, packed(index, bits), bits, header, top_down=top_down, entries=entries)
        yield f"palette{named}", write, entries[index].astype(float), is_bmp_read(header, bits, named)
        if bits >= 4 and header not in (12, 16) and not top_down:
            index[HEIGHT - 1 - 5] = 0
            runs = [run_lengths(index, bits)]
            write = partial(bmp, runs, bits, header, compression=1 if bits == 8 else 2, entries=entries)
            yield f"palette{named}, run lengths", write, entries[index].astype(float), True


def direct_cells(bits: int, header: int, *, top_down: bool) -> Iterator[tuple[str, Callable[[], bytes], Pixels, bool]]:
    """As `palette_cells`, of 16 bits and more."""
    if bits == 16:
        words = samples(15, 1)[..., 0]
        rows, pixels = packed(words, 16, "<"), fields(words, MASKS[16][1])
    else:
        values = samples(8, bits // 8)
        rows = packed(values[..., [2, 1, 0, 3][: bits // 8]].reshape(HEIGHT, -1), 8)
        pixels = values[..., :3].astype(float)
    yield "RGB", partial(bmp, rows, bits, header, top_down=top_down), pixels, is_bmp_read(header, bits)
    for masks in MASKS.get(bits, ()):
        if header < 40 or header == 64 or (masks[3] and header < 56):
            continue
        words = samples(bits, 1)[..., 0]
        write = partial(bmp, packed(words, bits, "<"), bits, header, compression=3, top_down=top_down, masks=masks)
        layout = "bit fields " + " ".join(f"{each:X}" for each in masks if each)
        yield layout, write, fields(words, masks), masks in READ_MASKS


def bmp_cells() -> Iterator[Cell]:
    for bits, header, top_down in itertools.product((1, 2, 4, 8, 16, 24, 32), HEADERS, (False, True)):
        if top_down and header in (12, 16):
            continue
        storage = f"{HEADERS[header]}{', top down' if top_down else ''}"
        for layout, write, pixels, read in (palette_cells if bits <= 8 else direct_cells)(bits, header, top_down=top_down):
            second = header not in (16, 64) and not (layout.startswith("bit") and layout not in SECOND_READS)
            yield Cell("BMP", layout, str(bits), storage, write, pixels, int(read), f"{bits} bits", second)


def fields(words: Samples, masks: tuple[int, ...]) -> Pixels:
    """Words that have their colour, and alpha, in bits."""
    parts = []
    for mask in filter(None, masks):
        low = (mask & -mask).bit_length() - 1
        parts.append(((words.astype(np.uint64) & np.uint64(mask)) >> np.uint64(low)) / (mask >> low) * 255)
    colour = np.stack(parts[:3], axis=-1)
    return on_white(colour, parts[3][..., None]) if len(parts) > 3 else colour


# --- all of them -------------------------------------------------------------------------------------------------------


def cells() -> Iterator[Cell]:
    """The matrix."""
    yield from png_cells()
    yield from tiff_cells()
    yield from bmp_cells()


def summary() -> list[tuple[str, ...]]:
    """The rows of the table in docs/images.md: how many of the ways to store a layout are read, by its bits."""
    total: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells():
        total.setdefault((cell.format, cell.layout), {}).setdefault(cell.bits, []).append(cell)
    rows = [("format", "samples", "bits: read, of so many ways to store them", "levels")]
    for (fmt, layout), by_bits in total.items():
        ordered = sorted(by_bits.items(), key=lambda item: (item[0].split()[1:], int(item[0].split()[0])))
        counts = ", ".join(f"{bits}: {sum(cell.within > 0 for cell in some)}/{len(some)}" for bits, some in ordered)
        off = max(cell.within for some in by_bits.values() for cell in some)
        rows.append((fmt, layout, counts, str(off) if off else "refused"))
    return rows


def ours(cell: Cell) -> str:
    """What penult makes of a cell that it should not; empty if all is well."""
    from extractor.pixels.images import ImageError, decode

    try:
        found = np.asarray(decode(cell.write()))
    except ImageError as error:
        expected = not cell.within and error.code == "unsupported_mode" and cell.refusal in str(error)
        return "" if expected else f"{error.code}: {error}"
    return difference(found, cell) if cell.within else "is read"


def difference(found: NDArray[Any], cell: Cell) -> str:
    if found.shape != cell.pixels.shape:
        return f"is {found.shape}"
    off = np.abs(found - cell.pixels.clip(0, 255)).max()
    return f"differs by {off:.1f} levels" if off > max(cell.within, 1) else ""


def theirs(cell: Cell, folder: Path) -> str | None:
    """What OpenImageIO makes of a cell that it should not; None if it does not read it."""
    import OpenImageIO

    path = folder / f"cell.{cell.format.lower()}"
    path.write_bytes(cell.write())
    plain = OpenImageIO.ImageSpec()
    plain.attribute("oiio:UnassociatedAlpha", 1)
    file = OpenImageIO.ImageInput.open(str(path), plain)
    read = file and file.read_image("float")
    if read is None:
        OpenImageIO.geterror()
        return None
    image = np.atleast_3d(read).astype(np.float64) * 255
    grey = cell.layout.startswith(("grey", "WhiteIsZero", "BlackIsZero"))
    colour, rest = (image[..., :1], image[..., 1:2]) if grey else (image[..., :3], image[..., 3:4])
    if rest.size and "premultiplied" in cell.layout:
        colour = colour + 255 - rest
    elif rest.size and ("alpha" in cell.layout or "tRNS" in cell.layout or cell.layout in SECOND_READS[-1:]):
        colour = on_white(colour, rest)
    return difference(np.broadcast_to(colour, (*colour.shape[:2], 3)), cell)


def main() -> None:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells():
            counts["read" if cell.within else "refused"] += 1
            faults = {"penult": ours(cell), "OpenImageIO": theirs(cell, Path(folder)) if cell.second else None}
            counts["confirmed"] += faults["OpenImageIO"] == "" and cell.within > 0
            for name, fault in faults.items():
                if fault:
                    counts["wrong"] += 1
                    print(f"{cell}: {name}: {fault}")
    text = "{total} cells: {read} read, {refused} refused, {wrong} wrong; a second decoder confirms {confirmed} of those read"
    names = ("read", "refused", "wrong", "confirmed")
    print(text.format(total=counts["read"] + counts["refused"], **{name: counts[name] for name in names}))
    sys.exit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
