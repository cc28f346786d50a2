"""A first look at a custom classifier: what it sees in the first photo of the dataset."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from PIL import Image

from extractor.backbones.class_names import top_classes
from extractor.backbones.registry import Backbone
from extractor.data.files import Files
from extractor.data.samples import Sample
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.pixels.decoder import Decoder
from extractor.pixels.images import ImageError

log = logging.getLogger("penult.extractor")

TRIED = 10  # files, of which the first that is an image is shown


def first_look(
    backbone: Backbone, facts: BackboneFacts, decoder: Decoder, files: Files, samples: Sequence[Sample]
) -> dict[str, Any]:
    """The classes that a custom file sees in the first image, which is also logged.

    Args:
        backbone: names the file.
        facts: of the backbone that was made from it.
        decoder: of the images; it may crop them or not.
        files: where they are.
        samples: the dataset.

    Returns:
        JSON: ``image`` and ``classes``, see `top_classes`; empty if there are no named classes, or no image.
    """
    for sample in samples[:TRIED] if backbone.is_file and facts.reading.get("scores") else ():
        try:
            pixels = decoder(files.read(sample.path)[0])
        except ImageError:  # the run itself records it
            continue
        if pixels.shape[:2] != (facts.preprocess.crop,) * 2:
            pixels = facts.preprocess.pixels(Image.fromarray(pixels))
        if classes := top_classes(backbone, facts, pixels):
            listing = ", ".join(f"{each['name']} {each['probability']:.0%}" for each in classes)
            log.info(
                "%s sees in %s: %s. If that is far off, the export or the preprocessing is wrong",
                facts.weights,
                sample.name,
                listing,
            )
            return {"image": sample.name, "classes": classes}
        break
    return {}
