"""JPEG files that lost data in the middle and end as they should."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extractor.pixels.images import ImageError, decode, decode_at_least
from extractor.pixels.jpeg import MARKER, Jpeg


def photo(size: tuple[int, int] = (320, 240), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 200, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(coarse) + rng.integers(0, 50, (size[1], size[0], 3), np.uint8))


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


KINDS = {
    "4:4:4": jpeg(subsampling=0),
    "4:2:0": jpeg(subsampling=2),
    "own tables": jpeg(optimize=True),
    "grey": jpeg(photo().convert("L")),
    "CMYK": jpeg(photo().convert("CMYK")),
    "restarts": jpeg(restart_marker_rows=1),
    "progressive": jpeg(progressive=True),
    "odd size": jpeg(photo((317, 233))),
}


def code_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return caught.value.code


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_one_is_what_pillow_reads(name: str) -> None:
    with Image.open(io.BytesIO(KINDS[name])) as image:
        np.testing.assert_array_equal(np.asarray(decode(KINDS[name])), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "progressive"])
def test_an_end_marker_after_a_cut_does_not_make_it_whole(name: str, share: float) -> None:
    data = KINDS[name]
    assert code_of(data[: int(len(data) * share)].rstrip(b"\xff") + b"\xff\xd9") == "truncated"


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("restarts", "progressive")])
def test_a_quarter_missing_from_the_middle_is_not_grey(name: str) -> None:
    data = KINDS[name]
    assert code_of(data[: len(data) // 2] + data[3 * len(data) // 4 :]) in ("truncated", "not_an_image")


def test_the_hole_shows_at_a_fraction_of_the_size_too() -> None:
    data = KINDS["4:2:0"]
    with pytest.raises(ImageError, match="truncated"):
        decode_at_least(data[: len(data) // 2] + data[3 * len(data) // 4 :], lambda *_: (40, 30))


def test_a_progressive_one_needs_all_its_scans() -> None:
    data = KINDS["progressive"]
    scans = [marker.start() for marker in MARKER.finditer(data) if marker[1] == b"\xda"]
    for last in scans[1:]:
        with pytest.raises(ImageError, match=r"lacks scans: \d+ of its coefficients"):
            decode(data[:last] + b"\xff\xd9")
    assert len(scans) == len(Jpeg(data).scans) > 5
    assert Jpeg(data).damage() == ""


def test_a_damaged_scan_header_is_no_fault_of_ours() -> None:
    data = KINDS["progressive"]
    at = data.index(b"\xff\xda")
    assert isinstance(Jpeg(data[: at + 4] + b"\xff\xd9").damage(), str)


@pytest.mark.parametrize(
    ("frame", "precision", "layout"),
    [(0xC1, 12, "JPEG of 3 samples x 12 bits is not read"), (0xC3, 16, "JPEG of 3 samples x 16 bits, process C3 is not read")],
)
def test_what_pillow_does_not_know_is_named(frame: int, precision: int, layout: str) -> None:
    data = KINDS["4:4:4"]
    at = data.index(b"\xff\xc0")
    with pytest.raises(ImageError, match=layout) as caught:
        decode(data[: at + 1] + bytes([frame]) + data[at + 2 : at + 4] + bytes([precision]) + data[at + 5 :])
    assert caught.value.code == "unsupported_mode"


@pytest.mark.assets
def test_no_whole_photo_is_refused_and_none_is_changed(assets: Path) -> None:
    files = sorted(path for path in (assets / "data").rglob("*.*") if path.suffix.lower() in (".jpg", ".jpeg"))[::4]
    assert len(files) > 100
    for path in files:
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(decode(path.read_bytes())), np.asarray(image.convert("RGB")), path.name)
