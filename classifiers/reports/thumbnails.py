"""Thumbnails of images, as data URIs for a page: read from where the images are now, by the decoder of extraction."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extractor.data.files import Files
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import ImageError
from extractor.pixels.preprocess import Preprocess
from store.errors import PenultError

SIDE = 160  # pixels: sharp at half that size on a screen of double density
QUALITY = 80  # of the JPEG; 5 KB each
SQUARE = Preprocess(SIDE, SIDE, "bilinear", (0.0,) * 3, (1.0,) * 3, pixel_path="pillow-draft")


def thumbnails(paths: Mapping[bytes, bytes], files: Files) -> tuple[dict[bytes, str], dict[bytes, str]]:
    """Upright square thumbnails of the middle of images.

    Args:
        paths: path of each image by the SHA-256 of its content; an image whose content changed is left out.
        files: where they are.

    Returns:
        Data URIs, and the reason for each missing one, both by SHA-256.
    """
    if not paths:
        return {}, {}
    with Decoder(SQUARE) as decoder:  # one process: a page has a few dozen thumbnails, and a second would cost more to start

        def one(item: tuple[bytes, bytes]) -> tuple[str, str]:
            digest, path = item
            try:
                data, _ = files.read(path)
                if hashlib.sha256(data).digest() != digest:
                    return "", "changed"
                return _data_uri(decoder(data)), ""
            except ImageError as error:
                return "", error.code
            except (PenultError, OSError) as error:
                return "", str(error)

        results = dict(zip(paths, map(one, paths.items()), strict=True))
    return {key: uri for key, (uri, _) in results.items() if uri}, {key: why for key, (uri, why) in results.items() if not uri}


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
