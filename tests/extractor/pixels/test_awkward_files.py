"""Awkward files as cameras, scanners, web servers and attackers make them: each ends in its pixels or in its code."""

from __future__ import annotations

import io
import os
import struct
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, features

from benchmarks.layout_files import Storage, tiff
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.manifest import Manifest
from extractor.graphs.backbone_facts import read_facts
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels import decoder as decoding
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import MEMORY, ImageError, decode
from extractor.pixels.preprocess import PIXEL_PATHS, Preprocess
from extractor.runtime.session import Embedder
from store.cache import FeatureCache

Pixels = NDArray[np.uint8]
SIDE = 32  # the shorter side of every picture here, so that resizing to it changes nothing
AS_IT_IS = Preprocess(SIDE, SIDE, "bilinear", (0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class Animal:
    """A file and what becomes of it: pixels (and by how many levels they may differ), or a code."""

    data: bytes
    pixels: Pixels | None = None
    within: int = 0
    code: str = ""


# --- what pictures are made of -----------------------------------------------------------------------------------------


def photo() -> Pixels:
    """48 x 32, smooth, and different under every turn and mirror."""
    y, x = np.mgrid[0:SIDE, 0 : SIDE * 3 // 2]
    return np.stack([40 + 4 * x, 20 + 6 * y, 230 - 2 * x - 2 * y], axis=-1).astype(np.uint8)


PHOTO = photo()
GREY = PHOTO[..., 0]
DEEP = np.linspace(0, 65535, GREY.size).astype(np.uint16).reshape(GREY.shape)


def encoded(image: Image.Image | NDArray[Any], fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


def rgb(grey: NDArray[Any]) -> Pixels:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def flat(*colour: int) -> Pixels:
    return np.full((SIDE, SIDE, 3), colour, np.uint8)


def on_white(pixels: NDArray[Any], alpha: NDArray[Any]) -> Pixels:
    share = alpha[..., None] / 255
    return np.round(pixels * share + 255 * (1 - share)).astype(np.uint8)


def jpeg(pixels: Any = PHOTO, **options: Any) -> bytes:
    return encoded(pixels, "JPEG", **({"quality": 95} | options))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = b"".join(chunk(*one) for one in ((b"IHDR", header), *chunks, (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def rows(pixels: NDArray[Any]) -> bytes:
    """PNG scan lines without a filter."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def adam7(pixels: Pixels) -> bytes:
    steps = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    data = b"".join(rows(np.ascontiguousarray(pixels[y::dy, x::dx])) for y, dy, x, dx in steps)
    return png(pixels.shape[1], pixels.shape[0], (b"IDAT", zlib.compress(data)), interlaced=1)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def arithmetic_jpeg() -> bytes:
    """Four blocks of one grey, coded arithmetically, DC only: what libjpeg decodes and no encoder here writes."""
    tables = segment(0xDB, b"\0" + bytes([16] + [1] * 63))
    frame = segment(0xCA, struct.pack(">BHHB", 8, 16, 16, 1) + bytes([1, 0x11, 0]))
    scan = segment(0xDA, bytes([1, 1, 0, 0, 0, 0]))
    return b"\xff\xd8" + tables + frame + scan + bytes([210, 102]) + b"\xff\xd9"


def ycck_jpeg() -> bytes:
    """Y, Cb, Cr and K of 100, 128, 178 and 255 under Adobe's marker for YCCK: R, G, B of 170, 64, 100 as ink, no black."""
    data = bytearray(jpeg(Image.new("CMYK", (SIDE, SIDE), (255 - 100, 255 - 128, 255 - 178, 0)), quality=100))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    return bytes(data)


def bmp(pixel_data: bytes, bits: int, *, compression: int = 0, after: bytes = b"", top_down: bool = False) -> bytes:
    header = struct.pack(
        "<IiiHHIIiiII", 40, SIDE, -SIDE if top_down else SIDE, 1, bits, compression, len(pixel_data), 0, 0, 0, 0
    )
    start = 14 + len(header) + len(after)
    return struct.pack("<2sIHHI", b"BM", start + len(pixel_data), 0, 0, start) + header + after + pixel_data


def half_a_gif() -> bytes:
    """The upper half of a picture under a header and a frame of its whole height."""
    data = bytearray(encoded(Image.fromarray(PHOTO[: SIDE // 2]).quantize(16), "GIF"))
    frame = data.index(b"," + struct.pack("<4H", 0, 0, 48, SIDE // 2))
    struct.pack_into("<H", data, 8, SIDE)
    struct.pack_into("<H", data, frame + 7, SIDE)
    return bytes(data)


def holed_webp(**options: Any) -> bytes:
    """A WebP without a part of its data, whose sizes are right again."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    data = encoded(noise, "WEBP", **options)
    data = data[: len(data) // 2] + data[len(data) // 2 + 500 :]
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:16] + struct.pack("<I", len(data) - 20) + data[20:]


def strip(length: int) -> bytes:
    """One pixel wide: a resize of the shorter side would multiply the longer one."""
    return png(1, length, (b"IDAT", zlib.compress(bytes(length * 4), 9)))


def endless_webp() -> bytes:
    """A flat WebP of 38 bytes that says 10000 x 10000 of itself: true, and more than 1 GiB to decode."""
    data = bytearray(encoded(Image.new("RGB", (16, 16), (9, 9, 9)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    (word,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, (word & 0xF0000000) | 9999 | 9999 << 14)
    return bytes(data)


def with_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def begins(head: bytes) -> bytes:
    return head + bytes(500)


# --- the zoo -----------------------------------------------------------------------------------------------------------


def good() -> Iterator[tuple[str | bytes, bytes, Pixels, int]]:
    yield "baseline.jpg", jpeg(subsampling=0), PHOTO, 4
    yield "progressive.jpg", jpeg(subsampling=0, progressive=True), PHOTO, 4
    yield "grey.jpg", jpeg(GREY), rgb(GREY), 2
    ink = np.concatenate([255 - PHOTO, np.zeros_like(PHOTO[..., :1])], axis=-1)
    yield "cmyk.jpg", jpeg(Image.frombytes("CMYK", (48, 32), ink.tobytes())), PHOTO, 6
    yield "ycck.jpg", ycck_jpeg(), flat(255 - 170, 255 - 64, 255 - 100), 1
    yield "arithmetic.jpg", arithmetic_jpeg(), flat(210, 210, 210), 0
    yield "trailing garbage.jpg", jpeg(subsampling=0) + b"\0garbage\xff\xda" * 9, PHOTO, 4
    yield "broken exif.jpg", jpeg(subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), PHOTO, 4
    yield "UPPER CASE.JPG", encoded(PHOTO, "TIFF"), PHOTO, 0
    yield "no extension", encoded(PHOTO, "BMP"), PHOTO, 0
    yield "a png called.jpg", encoded(PHOTO, "PNG"), PHOTO, 0
    yield "a jpeg called.gif", jpeg(quality=96, subsampling=0), PHOTO, 4

    turned = {1: PHOTO, 2: PHOTO[:, ::-1], 3: PHOTO[::-1, ::-1], 4: PHOTO[::-1], 5: PHOTO.transpose(1, 0, 2)}
    turned |= {6: np.rot90(PHOTO, -1), 7: PHOTO.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(PHOTO)}
    for orientation, pixels in turned.items():
        yield f"turned {orientation}.png", encoded(PHOTO, "PNG", exif=with_exif(orientation)), pixels, 0
    yield "turned.jpg", jpeg(subsampling=0, exif=with_exif(6)), turned[6], 4
    yield "turned 9.png", encoded(PHOTO, "PNG", exif=with_exif(9)), PHOTO, 0

    palette = Image.fromarray(PHOTO).quantize(16)
    resolved = np.asarray(palette.convert("RGB"))
    yield "palette.png", encoded(palette, "PNG"), resolved, 0
    index = int(np.asarray(palette)[0, 0])
    seen = np.where((np.asarray(palette) == index)[..., None], np.uint8(255), resolved)
    yield "transparent palette.png", encoded(palette, "PNG", transparency=index), seen, 0
    yield "1 bit.png", encoded(Image.fromarray(GREY > 127), "PNG"), rgb((GREY > 127) * 255), 0
    alpha = PHOTO[..., 1]
    yield "grey alpha.png", encoded(np.dstack([GREY, alpha]), "PNG"), on_white(rgb(GREY), alpha), 1
    yield "alpha.png", encoded(np.dstack([PHOTO, alpha]), "PNG"), on_white(PHOTO, alpha), 1
    yield "transparent colour.png", encoded(np.full_like(PHOTO, 9), "PNG", transparency=(9, 9, 9)), rgb(GREY * 0 + 255), 0
    yield "16 bit.png", encoded(DEEP, "PNG"), rgb(np.round(DEEP / 257)), 0
    yield "16 bit.tif", encoded(DEEP, "TIFF"), rgb(np.round(DEEP / 257)), 0
    yield "16 bit.pgm", b"P5 48 32 65535\n" + DEEP.astype(">u2").tobytes(), rgb(np.round(DEEP / 257)), 0
    yield "10 bit.pgm", b"P5 48 32 1023\n" + (DEEP >> 6).astype(">u2").tobytes(), rgb(np.round((DEEP >> 6) / 1023 * 255)), 1
    deep = np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    data = zlib.compress(rows(deep.astype(">u2")))
    yield "16 bit colour.png", png(48, 32, (b"IDAT", data), depth=16), (deep >> 8).astype(np.uint8), 0
    yield "interlaced.png", adam7(PHOTO), PHOTO, 0
    yield "trailing garbage.png", encoded(PHOTO, "PNG") + b"garbage", PHOTO, 0
    yield "one pixel.png", encoded(np.full((1, 1, 3), (1, 2, 3), np.uint8), "PNG"), flat(1, 2, 3), 0
    yield "inflates without end.png", png(SIDE, SIDE, (b"IDAT", zlib.compress(bytes(2**24)))), flat(0, 0, 0), 0

    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    for fmt, options in {"GIF": {}, "WEBP": {"lossless": True}, "TIFF": {}, "PNG": {}}.items():
        data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
        yield f"frames.{fmt.lower()}", data, flat(255, 0, 0), 0
    yield "two pictures.mpo", encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), flat(255, 0, 0), 2
    yield "lossy.webp", encoded(PHOTO, "WEBP", quality=95), PHOTO, 16
    yield "lossy.avif", encoded(PHOTO, "AVIF", quality=95), PHOTO, 16

    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"{compression}.tif", encoded(PHOTO, "TIFF", compression=compression), PHOTO, 0
    yield "jpeg.tif", encoded(PHOTO, "TIFF", compression="jpeg", quality=95), PHOTO, 16
    yield "cmyk.tif", encoded(Image.frombytes("CMYK", (48, 32), ink.tobytes()), "TIFF"), PHOTO, 0

    tall = DEEP[..., None].astype(np.uint64)
    for order in "<>":
        negative = tiff(tall, 16, {262: (0,)}, Storage(order))
        yield f"0 is white, 16 bits {'II' if order == '<' else 'MM'}.tif", negative, 255 - rgb(np.round(DEEP / 257)), 0
    yield "12 bit.tif", tiff(tall >> np.uint64(4), 12, {262: (1,)}, Storage()), rgb(np.round((DEEP >> 4) / 4095 * 255)), 0
    yield "16 bit planes.tif", tiff(deep.astype(np.uint64), 16, {262: (2,)}, Storage(planar=2)), (deep >> 8).astype(np.uint8), 0
    ink = np.dstack([GREY * (alpha / 255), alpha]).astype(np.uint64)
    yield "premultiplied grey.tif", tiff(ink, 8, {262: (1,), 338: (1,)}, Storage()), rgb(ink[..., 0] + 255 - ink[..., 1]), 0

    square = np.ascontiguousarray(PHOTO[:, :SIDE])
    yield "palette.bmp", encoded(palette, "BMP"), resolved, 0
    yield "1 bit.bmp", encoded(Image.fromarray(GREY > 127), "BMP"), rgb((GREY > 127) * 255), 0
    yield "upside down.bmp", bmp(square[..., ::-1].tobytes(), 24, top_down=True), square, 0
    yield "32 bit.bmp", bmp(np.dstack([square[::-1, :, ::-1], square[..., :1]]).tobytes(), 32), square, 0
    high = (square >> 3).astype(np.uint16)
    words = (high[..., 0] << 10 | high[..., 1] << 5 | high[..., 2])[::-1].astype("<u2")
    yield "15 bit.bmp", bmp(words.tobytes(), 16), square, 8
    colours = b"".join(bytes([i, 2 * i, 3 * i, 0]) for i in range(64)) + bytes(192 * 4)  # blue, green, red
    runs = b"".join(bytes([SIDE, y, 0, 0]) for y in range(SIDE)) + b"\0\1"  # the lowest line first
    ramp = np.repeat(np.arange(SIDE, dtype=np.uint8)[::-1, None, None], SIDE, axis=1) * np.array([3, 2, 1], np.uint8)
    yield "run lengths.bmp", bmp(runs, 8, compression=1, after=colours), ramp, 0

    names = [
        b"new\nline.png",
        b"\xff\xfe not utf-8.png",
        b"\x1b[31mred.png",
        *(unicodedata.normalize(form, "caf\u00e9.png").encode() for form in ("NFC", "NFD")),
    ]
    for i, name in enumerate(names):
        yield name, encoded(PHOTO + np.uint8(i), "PNG"), PHOTO + np.uint8(i), 0


def bad() -> Iterator[tuple[str | bytes, bytes, str]]:
    whole, lossless = jpeg(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)), encoded(PHOTO, "PNG")
    for share in (3, 10, 25, 50, 75, 90, 99):
        yield f"cut at {share}%.jpg", whole[: len(whole) * share // 100], "truncated"
        yield f"cut at {share}%.png", lossless[: max(len(lossless) * share // 100, 9)], "truncated"
    yield "last byte missing.jpg", whole[:-1], "truncated"
    yield "last byte missing.png", lossless[:-1], "truncated"
    yield "quarter missing.jpg", whole[: len(whole) // 2] + whole[3 * len(whole) // 4 :], "truncated"
    yield "cut, then an end marker.jpg", whole[: len(whole) // 2] + b"\xff\xd9", "truncated"
    yield "half the rows.png", png(48, 32, (b"IDAT", zlib.compress(rows(PHOTO[:16])))), "truncated"
    yield "half the rows.gif", half_a_gif(), "truncated"
    yield "half the rows.ppm", b"P6 48 32 255\n" + PHOTO[:16].tobytes(), "truncated"
    yield (
        "half the lines.bmp",
        bmp(b"".join(bytes([SIDE, y, 0, 0]) for y in range(16)) + b"\0\1", 8, compression=1, after=bytes(1024)),
        "truncated",
    )
    yield "hole.webp", holed_webp(quality=90), "not_an_image"
    yield "hole in a lossless.webp", holed_webp(lossless=True), "not_an_image"
    yield "cut.gif", encoded(Image.fromarray(PHOTO).quantize(16), "GIF")[:-20], "truncated"
    yield "cut.webp", encoded(PHOTO, "WEBP")[:-20], "truncated"
    yield "cut.tif", encoded(PHOTO, "TIFF")[:-20], "truncated"
    yield "cut.avif", encoded(PHOTO, "AVIF")[:60], "truncated"
    yield "cut.bmp", encoded(PHOTO, "BMP")[:-20], "truncated"
    yield "wrong checksum.png", damaged(lossless, len(lossless) - 13), "truncated"
    yield "wrong checksum of the header.png", damaged(lossless, 30), "truncated"
    yield "69 bytes, no palette.png", png(1, 1, (b"PLTE", b""), (b"IDAT", b""), colour=3), "truncated"
    yield "69 bytes, no zlib.png", png(16, 16, (b"IDAT", b"\x78\x9c" + b"\xff" * 10)), "not_an_image"
    yield "empty.jpg", b"", "not_an_image"
    yield "zeros.jpg", bytes(1000), "not_an_image"
    yield "404.jpg", b"<!DOCTYPE html><html>404 <svg></svg></html>", "not_an_image"
    yield "text.jpg", b"just text\n" * 100, "not_an_image"
    yield "Thumbs.db", begins(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), "not_an_image"
    yield "._x.jpg", begins(b"\0\5\x16\7\0\2\0\0Mac OS X        "), "not_an_image"
    yield "film.jpg", begins(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"), "not_an_image"
    yield "float.tif", encoded(GREY.astype(np.float32) / 255, "TIFF"), "unsupported_mode"
    yield "32 bit.tif", encoded(DEEP.astype(np.int32) * 9, "TIFF"), "unsupported_mode"
    bands = np.dstack([DEEP] * 5).astype(np.uint64)
    yield "5 bands of 16 bits.tif", tiff(bands, 16, {262: (1,), 338: (0,) * 4}, Storage()), "unsupported_mode"
    yield "signed.tif", tiff(bands[..., :1] >> np.uint64(8), 8, {262: (1,), 339: (2,)}, Storage()), "unsupported_mode"
    yield "4444.bmp", bmp(struct.pack("<3I", 0xF00, 0xF0, 0xF) + bytes(2 * SIDE * SIDE), 16, compression=3), "unsupported_mode"
    yield "phone.heic", begins(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "unsupported_format"
    yield "bare.jxl", begins(b"\xff\x0a"), "unsupported_format"
    yield "boxed.jxl", begins(b"\0\0\0\x0cJXL \r\n\x87\n"), "unsupported_format"
    yield "scan.jp2", encoded(PHOTO, "JPEG2000"), "unsupported_format"
    yield "scan.j2k", encoded(PHOTO, "JPEG2000", no_jp2=True), "unsupported_format"
    yield "layers.psd", begins(b"8BPS\0\1"), "unsupported_format"
    yield "paper.pdf", encoded(PHOTO, "PDF"), "unsupported_format"
    yield "logo.svg", b'<?xml version="1.0"?>\n<!-- a logo -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_format"
    yield "pixel bomb.png", png(65535, 65535, (b"IDAT", b"")), "too_large"
    yield "endless.webp", endless_webp(), "too_large"
    yield "strip.png", strip(60000), "bad_aspect"


ZOO = {os.fsencode(name): Animal(data, pixels, within) for name, data, pixels, within in good()}
ZOO |= {os.fsencode(name): Animal(data, code=code) for name, data, code in bad()}


@pytest.fixture(scope="module", params=PIXEL_PATHS)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    with Decoder(replace(AS_IT_IS, pixel_path=request.param), crop=False) as decoder:
        yield decoder


@pytest.mark.parametrize("name", ZOO, ids=lambda name: name.decode("utf-8", "backslashreplace"))
def test_each_ends_in_its_pixels_or_its_code(name: bytes, decoder: Decoder) -> None:
    animal = ZOO[name]
    if animal.pixels is None:
        with pytest.raises(ImageError) as caught:
            decoder(animal.data)
        assert caught.value.code == animal.code, caught.value
        return
    found = decoder(animal.data)
    assert found.dtype == np.uint8
    assert found.shape == animal.pixels.shape
    difference = np.abs(found.astype(int) - animal.pixels)
    assert difference.max() <= animal.within


def test_a_strip_of_157_bytes_is_refused_before_it_becomes_4_gigabytes() -> None:
    data = strip(20000)
    assert len(data) <= 157
    with Decoder(Preprocess(256, 224, "bilinear", (0.5,) * 3, (0.5,) * 3)) as decoder:
        with pytest.raises(ImageError, match="1 x 20000 pixels would be resized to 256 x 5120000") as caught:
            decoder(data)
        assert caught.value.code == "bad_aspect"


@pytest.mark.parametrize("brand", [b"avif", b"avis"])
def test_avif_without_its_codec_is_named_not_skipped(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(PHOTO, "AVIF").replace(b"ftypavif", b"ftyp" + brand)
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    with pytest.warns(UserWarning, match="AVIF support not installed"), pytest.raises(ImageError, match="convert it") as caught:
        decode(data)
    assert caught.value.code == "unsupported_format"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_the_whole_zoo_in_one_run(backbone: Backbone, tmp_path: Path) -> None:
    """Totals reconcile, each failure has its code, and no good picture's features depend on its neighbours."""
    home = tmp_path / "data/zoo"
    home.mkdir(parents=True)
    for name, animal in ZOO.items():
        with open(os.fsencode(home) + b"/" + name, "wb") as file:  # noqa: PTH123 - a Path cannot hold every name
            file.write(animal.data)
    (home / "a folder.jpg").mkdir()
    os.mkfifo(home / "a pipe.jpg")
    chosen = Options(device="cpu", batch_size=4, workers=3, storage="float32", max_failures="100%", quiet=True)
    summary = run_extract(ImageFolder(tmp_path / "data"), backbone, tmp_path / "c", chosen)
    codes = {name: animal.code for name, animal in ZOO.items() if animal.code} | {b"a pipe.jpg": "unreadable"}
    assert summary.inputs == len(ZOO) + 1 == summary.ok + summary.duplicates + summary.failed
    assert (summary.failed, summary.duplicates, summary.codes) == (len(codes), 1, Counter(codes.values()))
    cache = FeatureCache(tmp_path / "c")
    assert {row.path.removeprefix(b"zoo/"): row.code for row in cache.samples.rows if not row.ok} == codes

    facts = read_facts(cache.path / "backbone.onnx")
    embedder = Embedder(cache.path / "backbone.onnx", batch_size=4)
    found = cache.rows()
    for row, features_found in zip(found, cache.features([row.sha256 for row in found]), strict=True):
        pixels = facts.preprocess.pixels(decode(ZOO[row.path.removeprefix(b"zoo/")].data))
        (alone,) = embedder(facts.preprocess.normalise(pixels[None]))
        assert np.linalg.norm(features_found - alone) <= 1e-6 * np.linalg.norm(alone), row.name


def test_what_is_no_file_is_recorded_where_a_list_names_it(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(encoded(PHOTO, "PNG"))
    (tmp_path / "a folder.jpg").mkdir()
    os.mkfifo(tmp_path / "a pipe.jpg")
    writer = os.open(tmp_path / "a pipe.jpg", os.O_RDWR)  # a pipe that somebody may yet write to
    (tmp_path / "list.csv").write_text("path\none.png\na folder.jpg\na pipe.jpg\nnowhere.jpg\n")
    source = Manifest(tmp_path / "list.csv", tmp_path)
    summary = run_extract(source, backbone, tmp_path / "c", Options(device="cpu", quiet=True))
    os.close(writer)
    assert (summary.ok, summary.codes) == (1, {"unreadable": 2, "not_found": 1})


def test_a_worker_stays_below_one_gigabyte_over_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    asks_itself = """
import resource
import extractor.pixels.decoder as worker
from extractor.pixels.images import ImageError
read = worker.Preprocess.read

def answer(preprocess, data, **options):
    if data == b"how much?":
        # ru_maxrss begins with what the parent had when it forked; VmHWM begins anew with the program
        if sys.platform == "darwin":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        else:
            peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        raise ImageError(code="bytes", message=f"{peak} {limit}")
    return read(preprocess, data, **options)

worker.Preprocess.read = answer
worker.serve()
"""
    monkeypatch.setattr(decoding, "START", asks_itself)
    with Decoder(AS_IT_IS, crop=False) as decoder:
        for animal in ZOO.values():
            with suppress(ImageError):
                decoder(animal.data)
        with pytest.raises(ImageError) as caught:
            decoder(b"how much?")
    assert caught.value.code == "bytes", caught.value
    peak, limit = map(int, str(caught.value).split())
    assert peak < MEMORY
    assert limit == MEMORY or sys.platform == "darwin"
