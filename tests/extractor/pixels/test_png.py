"""PNG files with less pixels than they declare, and their one transparent colour."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from benchmarks import layout_files, layouts
from benchmarks.layout_files import chunk
from extractor.pixels.images import ImageError, decode
from extractor.pixels.png import START, Png

NOISE = np.random.default_rng(0).integers(1, 256, (24, 32, 3), np.uint8)


def png(
    body: bytes,
    *,
    size: tuple[int, int] = (32, 24),
    kind: tuple[int, int, int] = (8, 2, 0),
    pieces: int = 1,
    extra: bytes = b"",
) -> bytes:
    """``kind`` is the depth, the colour type, and whether it is interlaced."""
    depth, colour, interlaced = kind
    length = -(-len(body) // pieces)
    parts = b"".join(chunk(b"IDAT", body[i : i + length]) for i in range(0, len(body), length))
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    return START + chunk(b"IHDR", header) + extra + parts + chunk(b"IEND", b"")


def rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def code_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return caught.value.code


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("count", [1, 12, 23])
def test_missing_rows_are_not_black(count: int, pieces: int) -> None:
    assert code_of(png(zlib.compress(rows(NOISE[:count])), pieces=pieces)) == "truncated"
    np.testing.assert_array_equal(np.asarray(decode(png(zlib.compress(rows(NOISE)), pieces=pieces))), NOISE)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_rows_that_are_there_are_read(value: int, level: int) -> None:
    """Of data that compress well, the last rows are unpacked after all of the input was taken."""
    pixels = np.full((600, 500, 3), value, np.uint8)
    pixels[:100] = 7
    data = png(zlib.compress(rows(pixels), level), size=(500, 600))
    np.testing.assert_array_equal(np.asarray(decode(data)), pixels)


@pytest.mark.parametrize("cell", [cell for cell in layouts.png_cells() if "IDAT in 5" in cell.storage], ids=str)
def test_missing_rows_of_every_layout(cell: layouts.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = zlib.compress
    monkeypatch.setattr(layout_files.zlib, "compress", lambda data: compress(data[: len(data) * 9 // 10]))
    data = cell.write()
    monkeypatch.undo()
    assert code_of(data) == "truncated"


@pytest.mark.parametrize("lengths", [(0,), (1,), (3, 0, 0), (2, 2, 1, 0)])
def test_the_end_of_the_data_may_be_in_any_chunk(lengths: tuple[int, ...]) -> None:
    body = zlib.compress(rows(NOISE))
    parts = [body[: len(body) - sum(lengths)]]
    for length in lengths:
        at = sum(map(len, parts))
        parts.append(body[at : at + length])
    assert b"".join(parts) == body
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, 8, 2, 0, 0, 0))
    data = START + header + b"".join(chunk(b"IDAT", part) for part in parts) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(decode(data)), NOISE)


def test_pixels_are_those_that_pillow_reads_of_the_whole_file() -> None:
    for save in ({}, {"optimize": True}, {"compress_level": 0}):
        buffer = io.BytesIO()
        Image.fromarray(NOISE).save(buffer, "PNG", **save)
        assert len(Png(buffer.getvalue()).decoded()) == len(buffer.getvalue()) - 1
        np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), NOISE)


@pytest.mark.parametrize("palettes", [b"", chunk(b"PLTE", b""), chunk(b"PLTE", bytes(7)), chunk(b"PLTE", bytes(6)) * 2])
def test_a_palette_that_is_missing_or_damaged_is_no_black_one(palettes: bytes) -> None:
    body = zlib.compress(rows(np.zeros((24, 32), np.uint8)))
    assert code_of(png(body, kind=(8, 3, 0), extra=palettes)) == "truncated"
    decode(png(body, kind=(8, 3, 0), extra=chunk(b"PLTE", bytes(6))))


def test_of_a_transparent_colour_only_the_bits_of_the_depth_count() -> None:
    body = zlib.compress(rows(np.full((24, 16), 0x52, np.uint8)))  # 5 and 2 in turn
    pixels = np.asarray(decode(png(body, kind=(4, 0, 0), extra=chunk(b"tRNS", struct.pack(">H", 0xFF05)))))
    assert pixels[0, :4, 0].tolist() == [255, 34, 255, 34]


def test_a_transparent_colour_of_16_bits_is_turned_with_its_image() -> None:
    deep = np.full((24, 32, 3), 0x0102, ">u2")
    deep[0, 0] = 0x0103  # another colour with the same high byte
    exif = Image.Exif()
    exif[0x0112] = 3
    extra = chunk(b"tRNS", struct.pack(">3H", *[0x0102] * 3)) + chunk(b"eXIf", exif.tobytes()[6:])
    pixels = np.asarray(decode(png(zlib.compress(rows(deep)), kind=(16, 2, 0), extra=extra)))
    assert pixels[-1, -1].tolist() == [1, 1, 1]
    assert (pixels.reshape(-1, 3)[:-1] == 255).all()
