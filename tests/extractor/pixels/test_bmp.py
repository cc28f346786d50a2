"""BMP files that Pillow takes for others."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.layout_files import HEIGHT, WIDTH, bmp, packed
from extractor.pixels.bmp import Bmp
from extractor.pixels.images import ImageError, decode

COLOURS = np.random.default_rng(0).integers(0, 256, (16, 3))


def lines(line: bytes) -> bytes:
    return (line + b"\0\0") * HEIGHT + b"\0\1"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_may_end_beyond_its_line_as_old_encoders_write_it(bits: int) -> None:
    data = bmp(
        [lines(bytes([WIDTH + 3, 0x11 if bits == 4 else 1]))], bits, 40, compression=1 if bits == 8 else 2, entries=COLOURS
    )
    assert (np.asarray(decode(data)) == COLOURS[1]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_pixels_beyond_the_end_of_a_line_do_not_shift_the_next(bits: int) -> None:
    literal = packed(np.ones((1, WIDTH + 1), np.uint64), bits)[0]
    line = bytes([0, WIDTH + 1]) + literal + bytes(len(literal) % 2)
    with pytest.raises(ImageError, match="beyond the end of a line") as caught:
        decode(bmp([lines(line)], bits, 40, compression=1 if bits == 8 else 2, entries=COLOURS))
    assert caught.value.code == "truncated"


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_cut_header_is_no_crash(cut: int) -> None:
    data = bmp(packed(np.zeros((HEIGHT, WIDTH), np.uint64), 8), 8, 40, entries=COLOURS)[:cut]
    with pytest.raises(ImageError):
        decode(data)
    assert Bmp(data).layout() in ("", "BMP of 8 bits")


@pytest.mark.parametrize(("compression", "words"), [(4, "JPEG"), (5, "PNG"), (6, "bit fields")])
def test_what_is_not_read_is_named(compression: int, words: str) -> None:
    data = bmp([bytes(4 * WIDTH)] * HEIGHT, 32, 40, compression=compression)
    with pytest.raises(ImageError, match=f"BMP of 32 bits, {words} is not read; convert it") as caught:
        decode(data)
    assert caught.value.code == "unsupported_mode"
