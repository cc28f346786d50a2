"""Image decoding: file bytes to upright RGB pixels, within limits; other files are refused with an error code.

On every pixel path:

- the format is detected from the content, never from the name, and only among `FORMATS`;
- EXIF orientation is applied; a broken tag is ignored;
- transparency is composited on white; palette, CMYK and YCbCr are converted by Pillow without a colour profile;
- grey of 16 bits is scaled to 8 (value / 257), not clipped; samples without a known range are refused;
- where Pillow reads other pixels than a header means, or none where there are some, `jpeg`, `png`, `tiff` and `bmp` know;
- the first frame of animations and multi-page files is used.

docs/images.md has the whole table. Extraction, prediction and fine-tuning decode in the child processes of `decoder`.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError, features

from . import bmp, jpeg, png, tiff
from .header import Header

# MPO opens as JPEG; naming it here would make Pillow fail with a KeyError on everything it does not know.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, 0.7 GB in its memory
MEMORY = 2**30  # bytes of address space that a decode worker may use
MAX_BYTES = MEMORY // 2  # of a file, which is in memory beside its pixels
HUNGRIEST = 12  # bytes per pixel that libjpeg (progressive) and libwebp use beside Pillow's own, at most
HEADERS: dict[bytes, type[Header]] = {
    jpeg.START: jpeg.Jpeg,
    png.START: png.Png,
    bmp.START: bmp.Bmp,
    **dict.fromkeys(tiff.STARTS, tiff.Tiff),
}
IMAGE_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavi[fs]|II[*+]\0|MM\0[*+]", re.DOTALL)
CONVERT = "convert it to JPEG or PNG first"
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1")
OTHERS = {  # image formats that are not decoded, by their first bytes
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
    "Photoshop (PSD)": (b"8BPS",),
    "PDF": (b"%PDF-",),
}

# Pillow warns from half its limit on; MAX_PIXELS is the limit here, and refusing is an error rather than a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An input that cannot be used.

    Attributes:
        code: one of the ledger's codes, such as ``truncated``.
    """

    def __init__(self, *, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        image: of mode RGB, upright.
        size: width and height of the file's own pixels, upright; the image may have fewer.
        box: the part of the image that these are: left, top, right, bottom. If libjpeg made the image smaller, its last
            column and row stand for parts of a pixel, and turning it may have brought them to the front.
    """

    image: Image.Image
    size: tuple[int, int]
    box: tuple[float, float, float, float]


def decode(data: bytes) -> Image.Image:
    """Decode an image to mode RGB, upright.

    Raises:
        ImageError: with code ``not_an_image``, ``truncated``, ``unsupported_format``, ``unsupported_mode`` or ``too_large``.
        MemoryError: there is not enough memory.
    """
    return decode_at_least(data, None).image


def decode_at_least(data: bytes, needed: Callable[[int, int], tuple[int, int]] | None) -> Decoded:
    """As `decode`, but a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which costs libjpeg less.

    Args:
        data: of the file.
        needed: least width and height, from those of the file (either way round); None for full size.

    Raises:
        ImageError, MemoryError: as `decode`, and what ``needed`` raises.
    """
    header = next((kind for start, kind in HEADERS.items() if data.startswith(start)), Header)(data)
    image = _open(header)
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(code="too_large", message=f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
    if reason := header.unread(image):
        raise ImageError(code="unsupported_mode", message=f"{header.layout() or image.format}: {reason}; {CONVERT}")
    if damage := header.damage():
        raise ImageError(code="truncated", message=f"the {image.format} data {damage}")
    header.before(image)
    size = image.size
    drafted = image.draft("RGB", needed(*size)) if needed else None
    _, (*_, width, height) = drafted or ("", (0, 0, *size))  # exact; image.size is rounded up
    try:
        image.load()
        header.after(image)
        upright = _upright(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error on damaged data
        message = f"{type(error).__name__}: {error}"
        if header.is_unknown(str(error)):
            raise ImageError(code="unsupported_mode", message=f"{header.layout()} is not read; {CONVERT}") from error
        if "truncated" in str(error).lower() or "not enough" in str(error):
            raise ImageError(code="truncated", message=f"less data than its header declares ({message})") from error
        if image.width * image.height * HUNGRIEST > MEMORY:  # a decoder without memory reports only that it failed
            message = f"{image.width} x {image.height} pixels probably need more than 1 GiB to decode ({message})"
            raise ImageError(code="too_large", message=message) from error
        raise ImageError(code="not_an_image", message=message) from error
    # Pillow widens 16-bit portable maps to 32-bit integers, and scales them to 65535 regardless of their own maximum.
    rgb = _scaled(upright) if (image.format, upright.mode) == ("PPM", "I") else to_rgb(upright, header.bits)
    rgb = ImageOps.invert(rgb) if header.negative else rgb
    orientation = 1 if upright is image else image.getexif()[ExifTags.Base.Orientation]
    if orientation >= 5:
        size, (width, height) = size[::-1], (height, width)
    left = rgb.width - width if orientation in (2, 3, 6, 7) else 0.0
    top = rgb.height - height if orientation in (3, 4, 7, 8) else 0.0
    return Decoded(rgb, size, (left, top, left + width, top + height))


def _open(header: Header) -> ImageFile.ImageFile:
    data = header.data
    if not data:
        raise ImageError(code="not_an_image", message="the file is empty")
    try:
        return Image.open(io.BytesIO(header.decoded()), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(code="too_large", message=str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # UnidentifiedImageError, or anything that a plugin raises on a damaged header
        if hint := _unsupported(data):
            raise ImageError(code="unsupported_format", message=hint) from error
        if layout := header.layout():
            raise ImageError(code="unsupported_mode", message=f"{layout} is not read; {CONVERT}") from error
        if IMAGE_START.match(data):
            message = f"cut or damaged in its header, or gigantic; {len(data)} bytes"
            raise ImageError(code="truncated", message=message) from error
        if not isinstance(error, UnidentifiedImageError):
            raise ImageError(code="not_an_image", message=f"{type(error).__name__}: {error}") from error
        raise ImageError(code="not_an_image", message=f"begins with {data[:8]!r}, none of {', '.join(FORMATS)}") from error


def _unsupported(data: bytes) -> str:
    """The name of a known format that is not decoded, and what to do; empty for other data."""
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"avif", b"avis") and not features.check("avif"):
            return f"AVIF, which this Pillow was built without; install Pillow's own wheel, or {CONVERT}"
        return f"HEIC/HEIF; {CONVERT}" if brand in HEIF_BRANDS else ""
    name = next((name for name, begins in OTHERS.items() if data.startswith(begins)), "")
    if data.lstrip().startswith((b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE svg")) and b"<svg" in data[:4096]:
        name = "SVG"
    return f"{name}; {CONVERT}" if name else ""


def _upright(image: Image.Image) -> Image.Image:
    try:
        # An upright image would be copied, which takes a fifth as long as decoding it.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # a broken tag says nothing about the pixels, which did load
        return image


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
    """Convert any mode to RGB as the module docstring describes.

    Args:
        bits: of grey samples of more than 8.

    Raises:
        ImageError: code ``unsupported_mode`` for 32-bit integer and float samples, and what Pillow cannot convert.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        return _scaled(image, bits)
    if image.mode in ("I", "F"):
        raise ImageError(
            code="unsupported_mode", message=f"samples of mode {image.mode!r} have no known range; convert to 8 or 16 bits"
        )
    if image.mode == "La":  # grey that is multiplied by its alpha, which Pillow does not convert to RGB
        grey, alpha = (channel.astype(np.uint16) for channel in np.moveaxis(np.asarray(image), -1, 0))
        return Image.fromarray(np.minimum(grey + 255 - alpha, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(code="unsupported_mode", message=f"mode {image.mode!r}: {error}") from error


def _scaled(image: Image.Image, bits: int = 16) -> Image.Image:
    """Grey of so many bits as RGB, rounded to the nearest of 256 levels; its transparent level is white."""
    grey, top = np.asarray(image).astype(np.uint32), 2**bits - 1
    scaled = ((grey * 255 + top // 2) // top).astype(np.uint8)
    if "transparency" in image.info:
        scaled[grey == image.info["transparency"]] = 255
    return Image.fromarray(scaled).convert("RGB")
