"""The classes that a custom classifier sees in one photo, by name: a broken export shows at a glance."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import BackboneFacts

from .custom_onnx import load_data, run_whole
from .model_config import stated_by
from .onnx_input import image_input
from .registry import Backbone

SHOWN = 5
BACKGROUND = "background"  # the class that TensorFlow's networks have before those of ImageNet


@cache
def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes in their usual order.

    Read from torchvision's source, as `registry.listed`: importing it takes seconds.
    """
    package: Any = find_spec("torchvision")
    source = Path(package.submodule_search_locations[0], "models", "_meta.py").read_text("utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_IMAGENET_CATEGORIES":
            return tuple(ast.literal_eval(node.value))
    return ()


def names_of(count: int, stated: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names of a classifier's classes: those that a file beside it says, or ImageNet's; empty if neither has so many."""
    names = imagenet_names()
    return next((each for each in (stated, names, (BACKGROUND, *names)) if len(each) == count), ())


def top_classes(backbone: Backbone, facts: BackboneFacts, pixels: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """The likeliest classes of one image by a custom classifier, before it was cut.

    Args:
        backbone: names the file.
        facts: of the backbone that was made from it.
        pixels: of the image, ``(s, s, 3)``.

    Returns:
        JSON for each: ``name`` and ``probability``, the largest first; empty if the file gives no scores with known names, or
        has over 2 GB.

    Raises:
        BadDataError: the file cannot be run any more.
    """
    scores = facts.reading.get("scores")
    if not backbone.is_file or not scores:
        return []
    file = Path(backbone.name)
    stated = stated_by(file, backbone.onnx_input)
    names = names_of(scores["count"], stated.classes)
    if not names:
        return []
    model = onnx_file.read_model(file)
    onnx_file.data_files(file, model)  # refuses those that lie elsewhere
    load_data(model, file)
    if not onnx_file.fits_inline(model):
        return []
    begin = image_input(model, file, stated.settings.get("layout"), [])
    output = scores["output"]
    (row,) = run_whole(model, [output], begin, facts.preprocess.normalise(pixels[None]), file)[output].astype(np.float64)
    if row.min() < 0 or abs(row.sum() - 1) > 1e-2:  # no probabilities yet
        row = np.exp(row - row.max())
        row /= row.sum()
    best = np.argsort(-row, kind="stable")[:SHOWN]
    return [{"name": names[i], "probability": round(float(row[i]), 4)} for i in best]
