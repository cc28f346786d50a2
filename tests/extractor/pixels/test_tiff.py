"""TIFF headers that Pillow takes otherwise than they are meant, and strips that are not there."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import layout_files
from benchmarks.layout_files import Samples, Storage, tiff
from benchmarks.layouts import samples
from extractor.pixels.images import ImageError, decode
from extractor.pixels.tiff import Tiff

GREY, COLOUR = samples(8, 1), samples(8, 3)
STRIPS, ONE = Storage(), Storage(pieces="one strip")
Tags = dict[int, tuple[int, ...]]


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return caught.value.code, str(caught.value)


def test_a_negative_of_16_bits_is_inverted_in_both_byte_orders_and_turned() -> None:
    deep = np.linspace(0, 65535, GREY.size).astype(np.uint64).reshape(GREY.shape)
    for order in "<>":
        data = tiff(deep, 16, {262: (0,), 274: (6,)}, Storage(order))
        expected = np.rot90(255 - np.round(deep[..., 0] / 257), -1)
        np.testing.assert_array_equal(np.asarray(decode(data))[..., 1], expected)


def test_16_bit_planes_are_three_ramps_and_not_twelve() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint64), (64, 1))
    planes = np.stack([ramp, np.full_like(ramp, 0x40FF), ramp[:, ::-1]], axis=-1)
    pixels = np.asarray(decode(tiff(planes, 16, {262: (2,)}, Storage(planar=2)))).astype(int)
    assert (np.diff(pixels[..., 0], axis=1) > 0).all()
    assert (pixels[..., 1] == 64).all()
    assert (np.diff(pixels[..., 2], axis=1) < 0).all()


def test_grey_that_is_multiplied_by_its_alpha_is_on_white() -> None:
    pixels = np.full((8, 8, 2), (60, 128), np.uint64)
    assert (np.asarray(decode(tiff(pixels, 8, {262: (1,), 338: (1,)}, ONE))) == 60 + 255 - 128).all()


@pytest.mark.parametrize(
    ("values", "tags", "reason"),
    [
        (GREY, {}, "1 sample x 8 bits, .* does not say what 0 means"),
        (GREY, {262: (3,), 320: tuple(range(256)) * 3}, "palette is black, or of 8 bits"),
        (samples(8, 4), {262: (5,), 332: (2,)}, "4 samples x 8 bits, .* inks are others than CMYK"),
        (GREY, {262: (1,), 254: (1,)}, "small copy of another"),
        (GREY, {262: (1,), 339: (2,)}, "1 sample x 8 bits signed"),
        (GREY, {262: (1,), 339: (4,)}, "1 sample x 8 bits of unknown format"),
        (COLOUR, {262: (6,), 530: (2, 2)}, "YCbCr without compression"),
        (samples(8, 9), {262: (1,), 338: (0,) * 8}, "9 samples x 8 bits, photometric interpretation 1, compression 1"),
        (GREY, {262: (32803,)}, "photometric interpretation 32803"),
        (GREY, {262: (1,), 322: (16,), 323: (16,)}, "tiles are called strips"),
    ],
)
def test_what_a_header_means_otherwise_is_refused_by_name(values: Samples, tags: Tags, reason: str) -> None:
    with pytest.raises(ImageError, match=f"{reason}.*; convert it") as caught:
        decode(tiff(values, 8, tags, STRIPS))
    assert caught.value.code == "unsupported_mode"


@pytest.mark.parametrize(("tag", "values"), [(529, (0.2126, 0.7152, 0.0722)), (532, (16, 235, 128, 240, 128, 240))])
def test_ycbcr_of_another_range_or_weight_is_refused(
    tag: int, values: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tag has fractions, which the writer does not know: a SHORT is replaced by them."""
    plain = tiff(COLOUR, 8, {262: (6,), 530: (1, 1)}, ONE)
    decode(plain)
    data = tiff(COLOUR, 8, {262: (6,), 530: (1, 1), tag: (1,)}, ONE)
    entry = data.index(struct.pack("<HHI", tag, 3, 1))
    fractions = b"".join(struct.pack("<II", round(each * 10000), 10000) for each in values)
    data = data[:entry] + struct.pack("<HHII", tag, 5, len(values), len(data)) + data[entry + 12 :] + fractions
    assert refusal(data)[0] == "unsupported_mode"


def test_mixed_bits_and_unknown_compressions_are_named() -> None:
    data = tiff(COLOUR, 8, {262: (2,)}, ONE)
    mixed = data.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 5, 6, 5))
    assert "3 samples x 5/6/5 bits" in refusal(mixed)[1]
    unknown = data.replace(struct.pack("<HHIHH", 259, 3, 1, 1, 0), struct.pack("<HHIHH", 259, 3, 1, 34712, 0))
    code, message = refusal(unknown)
    assert (code, "compression 34712" in message) == ("unsupported_mode", True)


def test_a_fax_without_a_photometric_interpretation_is_black_on_white() -> None:
    tags: dict[str, tuple[int, ...]] = {"compression": (4,)}
    header = Tiff(b"II*\0")
    assert header.photometric == -1
    header.tags = tags
    assert header.photometric == 0


class TestPieces:
    """Strips and tiles that are declared and are not there."""

    @staticmethod
    def without(change: str, compression: int, pieces: str) -> bytes:
        """A TIFF that lacks its last piece."""
        whole = tiff(COLOUR, 8, {262: (2,)}, Storage(compression=compression, pieces=pieces))
        places = Tiff(whole).tags[pieces]
        tag = 273 if pieces == "strips" else 324
        entry = whole.index(struct.pack("<HHI", tag, 4, len(places)))
        if change == "fewer":
            return whole[: entry + 4] + struct.pack("<I", len(places) - 1) + whole[entry + 8 :]
        (at,) = struct.unpack_from("<I", whole, entry + 8)
        at += 4 * (len(places) - 1)
        return whole[:at] + struct.pack("<I", {"none": 0, "beyond": 10**6}[change]) + whole[at + 4 :]

    @pytest.mark.parametrize("change", ["fewer", "none", "beyond"])
    @pytest.mark.parametrize("compression", [1, 5, 8, 32773])
    @pytest.mark.parametrize("pieces", ["strips", "tiles"])
    def test_a_missing_piece_is_no_black_one(self, change: str, compression: int, pieces: str) -> None:
        code, message = refusal(self.without(change, compression, pieces))
        assert code in ("truncated", "not_an_image")
        if change != "beyond":
            assert code == "truncated"
            assert "of the 4 pieces" in message or "of the 5 pieces" in message

    @pytest.mark.parametrize("compression", [1, 5, 8, 32773])
    def test_a_short_strip_does_not_go_on_in_the_next(self, compression: int, monkeypatch: pytest.MonkeyPatch) -> None:
        piece = layout_files.piece
        lengths = iter([5, 3, 5, 5])
        monkeypatch.setattr(layout_files, "piece", lambda block, bits, storage: piece(block[: next(lengths)], bits, storage))
        assert refusal(tiff(COLOUR, 8, {262: (2,)}, Storage(compression=compression)))[0] in ("truncated", "not_an_image")


@pytest.mark.parametrize("big", [False, True])
def test_a_hostile_directory_is_refused_or_read_but_never_a_crash(big: bool) -> None:
    whole = tiff(GREY, 8, {262: (1,)}, replace(ONE, big=big))
    start = len(whole) - 11 * (20 if big else 12) - (8 if big else 4) - 8
    rng = np.random.default_rng(0)
    codes = set()
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(start, len(whole), 3):
            data[at] = rng.choice([0, 1, 255, rng.integers(256)])
        try:
            decode(bytes(data))
        except ImageError as error:
            codes.add(error.code)
        Tiff(bytes(data)).layout()
    assert codes <= {"truncated", "not_an_image", "unsupported_mode", "too_large"}
    assert len(codes) > 1
