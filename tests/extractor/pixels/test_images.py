"""From bytes to pixels: decoding with its limits and codes, and preprocessing bit for bit as torchvision does it."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extractor.backbones.model_config import ModelConfig
from extractor.backbones.networks import load
from extractor.backbones.onnx_input import Input, preprocessing
from extractor.backbones.registry import Backbone
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import MAX_PIXELS, ImageError, decode, decode_at_least
from extractor.pixels.preprocess import FILTERS, PIXEL_PATHS, Preprocess, probe
from store.errors import UsageError

REPO = Path(__file__).resolve().parents[3]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STANDARD = Preprocess(256, 224, "bilinear", MEAN, STD)


def noise(size: tuple[int, int] = (80, 60), seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def code_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert str(caught.value)
    return caught.value.code


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG from its chunks, so that its header may lie."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# --- equal to torchvision ----------------------------------------------------------------------------------------------

PRESETS = {
    "256/224 bilinear": (256, 224, "bilinear"),
    "232/224 bicubic": (232, 224, "bicubic"),
    "342/299 bilinear": (342, 299, "bilinear"),
    "224/224 bicubic": (224, 224, "bicubic"),
    "256/288 bilinear": (256, 288, "bilinear"),  # crops more than there is: padded with black
    "128/191 bilinear": (128, 191, "bilinear"),
}
SIZES = [
    (500, 375),
    (375, 500),
    (256, 256),
    (257, 300),
    (64, 48),
    (33, 90),
    (301, 299),
    (1000, 100),
    (224, 511),
    (1, 1),
    (9, 4),
]


@pytest.mark.parametrize("name", PRESETS)
def test_pixels_and_tensor_are_torchvisions_bit_for_bit(name: str) -> None:
    import torch
    from torchvision.transforms._presets import ImageClassification
    from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor
    from torchvision.transforms.functional import resize as resized

    resize, crop, interpolation = PRESETS[name]
    mode = InterpolationMode(interpolation)
    preset = ImageClassification(crop_size=crop, resize_size=resize, interpolation=mode)
    ours = Preprocess.from_torchvision(preset)
    assert ours == Preprocess(resize, crop, interpolation, MEAN, STD)
    for seed, size in enumerate(SIZES):
        image = noise(size, seed)
        pixels = ours.pixels(image)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (crop, crop, 3)
        before = center_crop(resized(image, [resize], interpolation=mode, antialias=True), [crop])
        np.testing.assert_array_equal(pixels, pil_to_tensor(before).permute(1, 2, 0).numpy(), err_msg=str(size))
        tensor = ours.normalise(pixels[None])[0]
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert torch.equal(torch.from_numpy(tensor), preset(image)), size


def test_normalising_does_not_depend_on_the_batch() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (5, 7, 6, 3), np.uint8)
    together = STANDARD.normalise(batch)
    assert together.shape == (5, 3, 7, 6)
    for i in range(5):
        np.testing.assert_array_equal(STANDARD.normalise(batch[i : i + 1])[0], together[i])


@pytest.mark.parametrize("architecture", ["inception_v3", "googlenet", "resnet50", "vit_b_16", "efficientnet_b0", "swin_t"])
def test_registry_presets_are_read_as_torchvision_states_them(architecture: str) -> None:
    import torchvision

    for entry in torchvision.models.get_model_weights(architecture):
        preset = entry.transforms()
        ours = Preprocess.from_torchvision(preset)
        image = noise((350, 417), 1)
        np.testing.assert_array_equal(ours.normalise(ours.pixels(image)[None])[0], preset(image).numpy(), err_msg=str(entry))


FAMILIES = ("alexnet", "vgg16", "vgg19", "googlenet", "inception_v3", "resnet50", "resnet101", "mobilenet_v2")


@pytest.mark.assets
def test_a_hundred_photos_are_preprocessed_as_torchvision_does_for_all_weights_of_eight_families(assets: Path) -> None:
    """Bit for bit in uint8 before normalisation, and in float32 after it, for V1 and V2 presets; through a decode worker."""
    import torch
    import torchvision
    from torchvision.transforms.functional import center_crop, pil_to_tensor
    from torchvision.transforms.functional import resize as resized

    entries = [entry for name in FAMILIES for entry in torchvision.models.get_model_weights(name)]
    assert {entry.name for entry in entries} == {"IMAGENET1K_V1", "IMAGENET1K_V2", "IMAGENET1K_FEATURES"}
    presets: dict[Preprocess, Any] = {}  # many weights have the same preset
    for entry in entries:
        preset = entry.transforms()
        ours = Preprocess.from_torchvision(preset)
        assert presets.setdefault(ours, preset).__dict__ == preset.__dict__
    assert {(ours.resize, ours.crop) for ours in presets} == {(256, 224), (232, 224), (342, 299)}
    photos = sorted((assets / "data/photos").rglob("*.*"))[:100]
    assert len(photos) == 100
    for ours, preset in presets.items():
        with Decoder(ours) as decoder:
            for photo in photos:
                pixels = decoder(photo.read_bytes())
                with Image.open(photo) as opened:
                    image = opened.convert("RGB")
                small = resized(image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias)
                expected = pil_to_tensor(center_crop(small, preset.crop_size)).permute(1, 2, 0).numpy()
                assert pixels.dtype == np.uint8
                np.testing.assert_array_equal(pixels, expected, err_msg=photo.name)
                assert torch.equal(torch.from_numpy(ours.normalise(pixels[None])[0]), preset(image)), photo.name


def test_facts_survive_json_and_the_fingerprint_knows_every_field() -> None:
    assert Preprocess.from_facts({**STANDARD.facts(), "mean": list(MEAN)}) == STANDARD
    base = STANDARD.fingerprint()
    assert base["resize"] == 256
    assert base["mean"] == list(MEAN)
    for change in ({"resize": 232}, {"crop": 192}, {"interpolation": "bicubic"}, {"mean": (0.5, 0.5, 0.5)}, {"std": (1, 1, 1)}):
        assert Preprocess.from_facts({**STANDARD.facts(), **change}).fingerprint() != base


def test_the_probe_is_the_hash_of_a_fixed_pictures_pixels() -> None:
    data = (REPO / "extractor/pixels/probe.jpg").read_bytes()
    assert probe(STANDARD) == hashlib.sha256(STANDARD.pixels(decode(data)).tobytes()).hexdigest()
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x0112] != 1  # so that the probe would show a change in orientation
    assert probe(STANDARD) != probe(Preprocess(256, 224, "bicubic", MEAN, STD))


# --- what pictures may look like ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_formats_give_the_very_pixels(fmt: str) -> None:
    image = noise().quantize(200).convert("RGB") if fmt == "GIF" else noise()
    found = decode(encoded(image, fmt, **({"lossless": True} if fmt == "WEBP" else {})))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("fmt", ["JPEG", "AVIF"])
def test_lossy_formats_are_decoded_by_pillow(fmt: str) -> None:
    data = encoded(noise(), fmt)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise((30, 20))
    found = np.asarray(decode(encoded(image, "PNG", exif=exif)))
    np.testing.assert_array_equal(found, turned[orientation](np.asarray(image)))
    upright = decode(encoded(noise((300, 200)), "JPEG", exif=exif))
    assert upright.size == ((200, 300) if orientation >= 5 else (300, 200))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x09\0"]
)
def test_a_broken_exif_tag_is_ignored(exif: bytes) -> None:
    image = noise((30, 20))
    assert decode(encoded(image, "JPEG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(noise(), "PNG", exif=exif))), np.asarray(noise()))


def pixel(data: bytes) -> list[int]:
    found = np.asarray(decode(data))
    assert (found == found[0, 0]).all()
    return [int(value) for value in found[0, 0]]


def test_transparency_is_composited_on_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (9, 9), (200, 100, 0, 0)), "PNG")) == [255, 255, 255]
    assert pixel(encoded(Image.new("RGBA", (9, 9), (200, 100, 0, 255)), "PNG")) == [200, 100, 0]
    assert pixel(encoded(Image.new("RGBA", (9, 9), (200, 100, 0, 51)), "PNG")) == [244, 224, 204]  # 0.2 c + 0.8 * 255
    assert pixel(encoded(Image.new("LA", (9, 9), (100, 51)), "PNG")) == [224, 224, 224]
    assert pixel(encoded(Image.new("LA", (9, 9), (100, 255)), "TIFF")) == [100, 100, 100]


def test_a_transparent_colour_without_an_alpha_channel_is_white_too() -> None:
    assert pixel(encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == [255, 255, 255]
    assert pixel(encoded(Image.new("RGB", (9, 9), (1, 2, 4)), "PNG", transparency=(1, 2, 3))) == [1, 2, 4]
    assert pixel(encoded(Image.new("L", (9, 9), 7), "PNG", transparency=7)) == [255, 255, 255]
    assert pixel(encoded(Image.new("L", (9, 9), 8), "PNG", transparency=7)) == [8, 8, 8]


def test_a_palette_is_resolved_and_its_transparent_colours_are_white() -> None:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    assert pixel(encoded(image, "PNG")) == [10, 20, 30]
    assert pixel(encoded(image, "PNG", transparency=1)) == [255, 255, 255]
    assert pixel(encoded(image, "PNG", transparency=2)) == [10, 20, 30]
    assert pixel(encoded(image, "PNG", transparency=bytes([255, 0]))) == [255, 255, 255]
    assert pixel(encoded(image, "GIF", transparency=1)) == [255, 255, 255]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_16_bit_grey_is_scaled_not_clipped(fmt: str, value: int) -> None:
    assert pixel(encoded(Image.fromarray(np.full((9, 9), value * 257, np.uint16)), fmt)) == [value] * 3


def test_16_bit_grey_is_rounded_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(decode(encoded(Image.fromarray(values), "PNG")))[..., 0]
    np.testing.assert_array_equal(found, np.round(values / 257.0).astype(np.uint8))


def test_big_endian_16_bit_grey_is_the_same() -> None:
    header = b"MM\0*\0\0\0\x08"
    tags = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1), (279, 4, 1, 32)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, n) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, n, v in tags[:5]
    )
    strip = struct.pack(">HHII", 273, 4, 1, 8 + 2 + 12 * 8 + 4)
    rest = struct.pack(">HHIHH", 277, 3, 1, 1, 0) + struct.pack(">HHII", 279, 4, 1, 32)
    data = header + struct.pack(">H", 8) + entries + strip + rest + bytes(4) + struct.pack(">16H", *[127 * 257] * 16)
    assert pixel(data) == [127, 127, 127]


def test_print_colours_and_single_bits_are_converted() -> None:
    assert pixel(encoded(Image.new("1", (9, 9), 1), "PNG")) == [255, 255, 255]
    assert pixel(encoded(Image.new("1", (9, 9), 0), "TIFF")) == [0, 0, 0]
    assert pixel(encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "TIFF")) == [255, 255, 255]
    assert pixel(encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF")) == [255, 0, 0]
    red = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[0] > 250
    assert max(red[1:]) < 5


@pytest.mark.parametrize("image", [Image.new("F", (9, 9), 0.5), Image.new("I", (9, 9), 70000)], ids=["float", "int32"])
def test_samples_without_a_known_range_are_refused(image: Image.Image) -> None:
    assert code_of(encoded(image, "TIFF")) == "unsupported_mode"


@pytest.mark.parametrize("maximum", [300, 1023, 4095, 65535])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_portable_maps_of_more_than_8_bits_are_scaled_by_their_maximum(maximum: int, share: float) -> None:
    """Pillow reads them as 32-bit integers, which in other formats have no known range."""
    samples = np.full(81, round(share * maximum), ">u2")
    assert pixel(b"P5 9 9 %d\n" % maximum + samples.tobytes()) == [round(int(samples[0]) / maximum * 255)] * 3


def test_a_picture_of_two_pictures_is_its_first() -> None:
    """MPO: what stereo cameras and phones with depth write; it begins like any JPEG."""
    first, second = noise((64, 48), 1), noise((64, 48), 2)
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(decode(encoded(first, "JPEG"))))


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(fmt: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert pixel(data) == [255, 0, 0]


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_heic_is_named_not_skipped(brand: bytes) -> None:
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200)
    with pytest.raises(ImageError, match="convert it to JPEG or PNG") as caught:
        decode(data)
    assert caught.value.code == "unsupported_format"


# --- damage ------------------------------------------------------------------------------------------------------------


def with_thumbnail() -> bytes:
    """A JPEG with a whole JPEG inside its EXIF block, as cameras write it: two start and two end markers."""
    thumbnail = encoded(noise((16, 12), 5), "JPEG")
    ifd0 = struct.pack("<HHHII", 1, 0x0112, 3, 1, 1) + struct.pack("<I", 26)
    ifd1 = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + ifd0 + ifd1 + thumbnail
    data = encoded(noise((120, 90)), "JPEG", exif=exif)
    assert data.count(b"\xff\xd8\xff") == 2
    return data


CUTTABLE = {
    "JPEG": lambda: encoded(noise((120, 90)), "JPEG"),
    "progressive JPEG": lambda: encoded(noise((120, 90)), "JPEG", progressive=True),
    "JPEG with thumbnail": with_thumbnail,
    "JPEG with restarts": lambda: encoded(noise((120, 90)), "JPEG", restart_marker_blocks=4),
    "grey JPEG": lambda: encoded(noise((120, 90)).convert("L"), "JPEG"),
    "PNG": lambda: encoded(noise((120, 90)), "PNG"),
    "flat PNG": lambda: encoded(Image.new("RGB", (300, 300)), "PNG"),
    "BMP": lambda: encoded(noise((32, 20)), "BMP"),
    "TIFF": lambda: encoded(noise((30, 20)), "TIFF", compression="tiff_lzw"),
    "WEBP": lambda: encoded(noise((30, 20)), "WEBP"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("name", CUTTABLE)
def test_a_cut_file_is_never_a_picture(name: str) -> None:
    data = CUTTABLE[name]()
    decode(data)
    places = [*np.linspace(1, len(data) - 2, 20).astype(int).tolist(), len(data) - 1]
    codes = {place: code_of(data[:place]) for place in places}
    assert set(codes.values()) <= {"truncated", "not_an_image"}, codes
    if "JPEG" in name or "PNG" in name:
        assert [codes[place] for place in places[-8:]] == ["truncated"] * 8, codes


@pytest.mark.parametrize("tail", [b"\0" * 10, b"\xff\xda junk", b"\xff\xd9", b"ftypmp42 \xff\xda\xff\xc0 \xff\xd8\xff\xda"])
def test_what_phones_append_to_a_jpeg_is_no_damage(tail: bytes) -> None:
    data = encoded(noise(), "JPEG")
    np.testing.assert_array_equal(np.asarray(decode(data + tail)), np.asarray(decode(data)))


def test_a_damaged_png_chunk_is_no_picture() -> None:
    data = bytearray(encoded(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert code_of(bytes(data)) in ("truncated", "not_an_image")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff\xd8",
        b"<!DOCTYPE html><html>404</html>",
        b"just text\n" * 100,
        bytes(1000),
        b"\xd0\xcf\x11\xe0Thumbs.db" * 9,
    ],
    ids=["empty", "one byte", "two bytes", "html", "text", "zeros", "Thumbs.db"],
)
def test_what_is_no_picture_is_said_to_be_none(data: bytes) -> None:
    assert code_of(data) == "not_an_image"
    with pytest.raises(ImageError, match="the file is empty" if not data else "begins with|syntax|truncated|marker"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
        encoded(Image.new("RGB", (9, 9)), "ICO"),
        encoded(Image.new("RGB", (9, 9)), "TGA"),
    ],
    ids=["EPS", "FITS", "ICO", "TGA"],
)
def test_formats_nobody_asked_for_are_not_tried(data: bytes) -> None:
    assert code_of(data) == "not_an_image"


# --- limits ------------------------------------------------------------------------------------------------------------


def test_a_thin_strip_is_refused_before_it_explodes() -> None:
    """157 bytes on disk, 4.7 GB after a naive resize."""
    strip = Image.new("RGB", (1, 20000))
    data = encoded(strip, "PNG")
    assert len(data) < 400
    for image in (decode(data), strip.transpose(Image.Transpose.ROTATE_90)):
        with pytest.raises(ImageError, match="20000") as caught:
            STANDARD.pixels(image)
        assert caught.value.code == "bad_aspect"


def test_long_but_bearable_pictures_are_taken() -> None:
    assert STANDARD.pixels(noise((20, 2000))).shape == (224, 224, 3)


@pytest.mark.parametrize(("width", "height"), [(65535, 65535), (20000, 8948), (MAX_PIXELS + 1, 1), (2**31 - 1, 2**31 - 1)])
def test_a_pixel_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    assert code_of(png(width, height)) == "too_large"


def test_a_pixel_bomb_is_refused_without_allocating() -> None:
    """In a child that may use 1 GB of address space more than it has; the declared picture would need 12."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(REPO)!r})
from extractor.pixels.images import ImageError, decode
from extractor.pixels.preprocess import Preprocess
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

before = peak()
try:
    decode(sys.stdin.buffer.read())
except ImageError as error:
    assert "memory" not in str(error), error
    print(error.code, peak() - before < 2**25)
"""
    done = subprocess.run([sys.executable, "-c", code], input=png(65000, 65000), capture_output=True, check=False)
    assert done.stdout.split() == [b"too_large", b"True"], done.stderr.decode()


def test_a_png_that_inflates_without_end_stays_small() -> None:
    """The header declares 10 x 10 pixels, the data inflates to 64 MB: only what the header needs is read."""
    found = decode(png(10, 10, bytes(64 * 2**20)))
    assert found.size == (10, 10)


# --- the other pixel paths ---------------------------------------------------------------------------------------------

CROP_FIRST, DRAFT = (replace(STANDARD, pixel_path=name) for name in ("pillow-crop", "pillow-draft"))


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return noise((9, 7), seed).resize(size, Image.Resampling.BICUBIC)


def ramp(size: tuple[int, int]) -> Image.Image:
    """Red grows with the column, green with the row, both over the whole image: a shift of it is a difference in level."""
    width, height = size
    across = np.broadcast_to(np.linspace(20, 235, width), (height, width))
    down = np.broadcast_to(np.linspace(20, 235, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, across], axis=2).round().astype(np.uint8))


def test_the_reference_keeps_the_fingerprint_it_always_had() -> None:
    expected = {"resize": 256, "crop": 224, "interpolation": "bilinear", "mean": list(MEAN), "std": list(STD)}
    assert STANDARD.fingerprint() == {"path": "pillow-1", **expected, "probe": probe(STANDARD)}
    facts = STANDARD.facts()
    assert facts.pop("pixel_path") == "pillow"
    assert Preprocess.from_facts(facts) == STANDARD, "what was written before paths had names"


def test_every_path_has_its_own_fingerprint_and_probe() -> None:
    found = {name: replace(STANDARD, pixel_path=name).fingerprint() for name in PIXEL_PATHS}
    assert [each["path"] for each in found.values()] == list(PIXEL_PATHS.values())
    data = (REPO / "extractor/pixels/probe.jpg").read_bytes()
    assert found["pillow-crop"]["probe"] == hashlib.sha256(CROP_FIRST.read(data).tobytes()).hexdigest()
    assert drafted(data, resize=32) == (79, 106), "smaller than the image, so that the probe would show a change in libjpeg"
    small = replace(DRAFT, resize=32, crop=28).read(data)
    assert found["pillow-draft"]["probe"] == hashlib.sha256(DRAFT.read(data).tobytes() + small.tobytes()).hexdigest()
    for name in PIXEL_PATHS:
        preprocess = replace(STANDARD, pixel_path=name)
        assert Preprocess.from_facts(preprocess.facts()) == preprocess
    with pytest.raises(UsageError, match="no pixel path 'opencv'; expected pillow, pillow-crop, pillow-draft"):
        replace(STANDARD, pixel_path="opencv")


def test_a_path_is_stated_with_the_backbone() -> None:
    chosen = Backbone("squeezenet1_1", "random:0", resize=40, crop=32, pixel_path="pillow-crop")
    assert Backbone.from_facts(chosen.facts()) == chosen
    preprocess = load(chosen).preprocess
    assert (preprocess.resize, preprocess.pixel_path) == (40, "pillow-crop")
    assert load(replace(chosen, pixel_path=None)).preprocess == replace(preprocess, pixel_path="pillow")
    theirs = {"mean": (0.5,), "std": (0.5,), "resize": 40, "interpolation": "bilinear", "pixel_path": "pillow-draft"}
    stated = preprocessing(Input("x", "float32", "nchw", 32, None), ModelConfig(theirs), Path("theirs.onnx"), [], [])
    assert stated is not None
    assert stated.pixel_path == "pillow-draft"


@pytest.mark.parametrize("interpolation", FILTERS)
def test_cropping_first_differs_by_a_level_or_two_here_and_there(interpolation: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [(500, 375), (341, 500), (333, 500), (226, 300), (1000, 226), (240, 900), *rng.integers(226, 700, (12, 2)).tolist()]
    for seed, size in enumerate(sizes):
        image = smooth(tuple(size), seed)
        expected, found = (replace(each, interpolation=interpolation).pixels(image) for each in (STANDARD, CROP_FIRST))
        assert (found.shape, found.dtype) == ((224, 224, 3), np.uint8)
        difference = np.abs(found.astype(int) - expected)
        if interpolation == "nearest":  # takes the neighbour on the other side where the place is between two
            assert difference.mean() < 1, size
        else:
            assert difference.max() <= (1 if interpolation == "bilinear" else 2), size
            assert (difference > 0).mean() < 0.15, size


@pytest.mark.parametrize("size", [(1, 1), (9, 4), (3, 700), (700, 3), (224, 224), (256, 256), (100, 90), (225, 2000)])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("path", ["pillow-crop", "pillow-draft"])
def test_extreme_sizes_are_right_on_every_path(path: str, size: tuple[int, int], squash: bool) -> None:
    for resize, crop in ((256, 224), (224, 224), (256, 288), (9, 8)):
        reference = Preprocess(resize, crop, "bilinear", MEAN, STD, squash=squash)
        data = encoded(smooth(size), "PNG")
        difference = replace(reference, pixel_path=path).read(data).astype(int) - reference.read(data)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("path", ["pillow-crop", "pillow-draft"])
def test_a_thin_strip_explodes_on_no_path(path: str) -> None:
    with pytest.raises(ImageError, match="20000") as caught:
        replace(STANDARD, pixel_path=path).read(encoded(Image.new("RGB", (1, 20000)), "PNG"))
    assert caught.value.code == "bad_aspect"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1600, 1200), (1207, 901), (601, 803)])
def test_a_draft_is_the_same_picture_at_the_same_place(size: tuple[int, int], orientation: int) -> None:
    """Also where libjpeg's smaller image has parts of pixels at its end, which turning brings to the front."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(ramp(size), "JPEG", quality=98, exif=exif)
    for resize, crop in ((64, 56), (40, 40), (280, 240)):
        reference = Preprocess(resize, crop, "bilinear", MEAN, STD)
        expected, found = (replace(reference, pixel_path=path).read(data) for path in ("pillow", "pillow-draft"))
        difference = found.astype(float) - expected
        assert abs(difference[..., :2].mean(axis=(0, 1))).max() < 0.2  # one pixel of the result is two levels and more
        assert np.abs(difference).max() <= 3


def drafted(data: bytes, *, resize: int) -> tuple[int, int]:
    """Size of what is decoded for a shorter side of ``resize``."""
    needed = replace(DRAFT, resize=resize, crop=resize)._draft_size
    return decode_at_least(data, needed).image.size


def test_a_draft_keeps_twice_the_pixels_that_are_needed() -> None:
    data = encoded(smooth((1601, 1203)), "JPEG")
    for resize, size in ((602, (1601, 1203)), (601, (1601, 1203)), (300, (801, 602)), (150, (401, 301)), (60, (201, 151))):
        found = drafted(data, resize=resize)
        assert found == size
        assert min(found) >= min(2 * resize, 1203)
    whole = decode_at_least(data, None)
    assert (whole.image.size, whole.size, whole.box) == ((1601, 1203), (1601, 1203), (0, 0, 1601, 1203))
    half = decode_at_least(data, lambda *_: (800, 600))
    assert (half.size, half.box) == ((1601, 1203), (0, 0, 800.5, 601.5))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_a_draft_of_any_jpeg(mode: str) -> None:
    data = encoded(smooth((800, 600)).convert(mode), "JPEG", quality=95)
    assert drafted(data, resize=100) == (400, 300)
    expected, found = (replace(each, resize=64, crop=56).read(data) for each in (STANDARD, DRAFT))
    assert np.abs(found.astype(int) - expected).mean() < 1.5


def test_what_is_no_jpeg_is_decoded_whole() -> None:
    for fmt in ("PNG", "WEBP", "TIFF", "BMP"):
        data = encoded(smooth((800, 600)), fmt)
        assert drafted(data, resize=64) == (800, 600)
        np.testing.assert_array_equal(DRAFT.read(data), CROP_FIRST.read(data))
    stereo = encoded(smooth((800, 600)), "MPO", save_all=True, append_images=[smooth((800, 600), 2)])
    np.testing.assert_array_equal(DRAFT.read(stereo), DRAFT.read(encoded(smooth((800, 600)), "JPEG")))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("name", [name for name in sorted(CUTTABLE) if "JPEG" in name])
def test_a_cut_jpeg_is_no_picture_for_a_draft_either(name: str) -> None:
    data, small = CUTTABLE[name](), replace(DRAFT, resize=16, crop=12)
    assert small.read(data).shape == (12, 12, 3)
    for place in [*np.linspace(1, len(data) - 2, 20).astype(int).tolist(), len(data) - 1]:
        with pytest.raises(ImageError) as caught:
            small.read(data[:place])
        assert caught.value.code == code_of(data[:place])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_tag_is_ignored_by_a_draft() -> None:
    plain, odd = (encoded(smooth((801, 603)), "JPEG", exif=exif) for exif in (b"", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"))
    small = replace(DRAFT, resize=64, crop=56)
    np.testing.assert_array_equal(small.read(plain), small.read(odd))


def test_the_named_path_reaches_the_decode_worker_and_without_the_crop_all_resize_alike() -> None:
    data = encoded(smooth((1207, 901)), "JPEG")
    for preprocess in (STANDARD, CROP_FIRST, DRAFT):
        with Decoder(preprocess) as cropped, Decoder(preprocess, crop=False) as whole:
            np.testing.assert_array_equal(cropped(data), preprocess.read(data))
            found = whole(data)
        assert found.shape == (256, int(256 * 1207 / 901), 3)
        assert np.abs(found.astype(int) - np.asarray(STANDARD.scaled(decode(data)))).max() <= (2 if preprocess == DRAFT else 0)
