"""The image input of a custom ONNX file, read from the file and completed by flags or by files beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.pixels.preprocess import FILTERS, Preprocess, require_sizes
from store.errors import BadDataError, UsageError

from .model_config import CONFIG, OPTIONS, PROCESSOR, ModelConfig

RESIZE_OVER_CROP = 256 / 224  # the usual ratio of torchvision's presets
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
SHAPED_AS_STORED = ("DequantizeLinear", "Cast", "Identity")  # what weights may go through
# What may stand between an input and the first convolution, and neither moves axes nor channels
ONE_TO_ONE = (
    "Cast",
    "Identity",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Clip",
    "Pad",
    "BatchNormalization",
    "QuantizeLinear",
    "DequantizeLinear",
)


@dataclass(frozen=True)
class Input:
    """The image input of a custom ONNX file.

    Attributes:
        name: of the tensor.
        dtype: ``float32``, ``float16`` or ``uint8``.
        layout: ``nchw`` or ``nhwc``.
        side: height and width, pixels; None if it is dynamic.
        batch: images per call; None if it is dynamic.
        arithmetic: operators by which the graph normalises the pixels itself.
    """

    name: str
    dtype: str
    layout: str
    side: int | None
    batch: int | None
    arithmetic: tuple[str, ...] = ()

    def of(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        """Normalised ``(n, 3, s, s)`` float32 in the type and layout of this input."""
        values = np.rint(pixels) if self.dtype == "uint8" else pixels
        return np.ascontiguousarray((values.transpose(0, 2, 3, 1) if self.layout == "nhwc" else values).astype(self.dtype))


def image_input(model: Any, file: Path, layout: str | None, missing: list[str]) -> Input:
    """The one input of a graph, which must be images.

    Args:
        model: with its weights: what its first convolution takes says what its shape leaves open.
        file: its name, for messages.
        layout: as stated; None if it is not.
        missing: gets a sentence if the layout must be stated.

    Raises:
        BadDataError: there are other inputs, or this one is not a batch of RGB images.
    """
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        message = f"{file} takes {len(inputs)} inputs ({names}); a backbone takes images alone"
        raise BadDataError(message)
    tensor = inputs[0].type.tensor_type
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]  # -1 is how Paddle writes 'any'
    shown = f"({', '.join(str(dim or '?') for dim in dims)})"
    if len(dims) != 4:
        message = f"{file} takes {inputs[0].name} of shape {shown}; expected (n, 3, h, w) or (n, h, w, 3)"
        raise BadDataError(message)
    kinds = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}
    if tensor.elem_type not in kinds:
        of_number = {number: name for name, number in TensorProto.DataType.items()}
        kind = of_number.get(tensor.elem_type, f"number {tensor.elem_type}")
        message = f"{file} takes {inputs[0].name} of type {kind}; expected float or uint8"
        raise BadDataError(message)
    can = {"nchw": dims[1] in (3, None), "nhwc": dims[3] in (3, None)}
    certain = {"nchw": dims[1] == 3 and dims[3] != 3, "nhwc": dims[3] == 3 and dims[1] != 3}
    begin = beginning_of(model.graph, inputs[0].name)
    channels = begin.channels
    axes = layout or next((name for name, sure in certain.items() if sure), None) or begin.layout
    if channels not in (None, 3) and dims[1 if axes == "nchw" else 3] is None:
        message = f"{file} takes images of {channels} channel(s), as its first convolution says; expected three channels (RGB)"
        raise BadDataError(message)
    if not any(can.values()) or (axes and not can[axes]):
        message = f"{file} takes {inputs[0].name} of shape {shown}: not three channels (RGB){' in ' + layout if layout else ''}"
        raise BadDataError(message)
    if axes is None:
        missing.append(f"{file} takes {inputs[0].name} of shape {shown}. Pass --layout nchw or --layout nhwc")
        axes = "nchw"
    height, width = dims[2:] if axes == "nchw" else dims[1:3]
    if height != width:
        message = f"{file} takes images of {height or '?'} x {width or '?'} pixels; only square inputs can be used"
        raise BadDataError(message)
    return Input(inputs[0].name, kinds[tensor.elem_type], axes, height, dims[0], begin.arithmetic)


@dataclass(frozen=True)
class Beginning:
    """What a graph does with its input up to the first convolution; nothing is known if that is not clear.

    Attributes:
        layout, channels: as the convolution takes them.
        arithmetic: operators with constants before it, by which a graph normalises its pixels itself.
    """

    layout: str | None = None
    channels: int | None = None
    arithmetic: tuple[str, ...] = ()


def beginning_of(graph: Any, name: str) -> Beginning:
    """Follow the input of a graph to its first convolution."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    layout, arithmetic = "nchw", list[str]()
    for _ in graph.node:
        consumers = [node for node in graph.node if name in node.input and node.op_type not in ("Shape", "Size")]
        if len(consumers) != 1 or not consumers[0].output:
            break
        (node,) = consumers
        if node.op_type == "Conv" and len(node.input) > 1:
            weight = node.input[1]
            if weight not in shapes and weight in made_by and made_by[weight].op_type in SHAPED_AS_STORED:
                weight = made_by[weight].input[0]
            groups = next((each.i for each in node.attribute if each.name == "group"), 1)
            channels = shapes[weight][1] * groups if len(shapes.get(weight, [])) == 4 else None
            return Beginning(layout, channels, tuple(arithmetic))
        if node.op_type == "Transpose":
            if [list(each.ints) for each in node.attribute if each.name == "perm"] != [[0, 3, 1, 2]] or layout != "nchw":
                break
            layout = "nhwc"
        elif node.op_type not in ONE_TO_ONE:
            break
        arithmetic += [node.op_type] if node.op_type in ARITHMETIC else []
        name = node.output[0]
    return Beginning()


def preprocessing(begin: Input, stated: ModelConfig, file: Path, missing: list[str], assumed: list[str]) -> Preprocess | None:
    """The preprocessing of images for this input.

    Args:
        begin: the input.
        stated: what flags and files beside it say.
        file: its name, for messages.
        missing: gets a sentence for each setting that must be stated.
        assumed: gets the flags of settings that are not stated and have a usual value.

    Returns:
        None if a setting is missing.

    Raises:
        UsageError: a setting is wrong, or contradicts the file.
    """
    settings = stated.settings
    if begin.dtype == "uint8":
        raw = ("mean", "std", "input_range")
        settings = {
            name: each for name, each in settings.items() if name not in raw or stated.sources[name] not in (CONFIG, PROCESSOR)
        }
        for name in raw:
            if name in settings:
                message = f"{file} takes raw bytes: leave --{name.replace('_', '-')} out"
                raise UsageError(message)
        settings = {**settings, "input_range": 255.0}
    input_range = float(settings.get("input_range", 1.0))
    if input_range not in (1.0, 255.0):
        message = f"--input-range {input_range:g}: expected 1 (pixels / 255) or 255 (raw values)"
        raise UsageError(message)
    if "mean" not in settings and "std" not in settings and input_range == 255:
        settings = {"mean": (0.0,), "std": (1.0,), **settings}
    if normalised := "mean" in settings and "std" in settings:
        mean, std = (_three(settings[name], f"--{name}") for name in ("mean", "std"))
        _require_normalisation(mean, std, input_range)
    else:
        missing.append(
            f"{file} takes float pixels and does not say how they were normalised; a guess would cost accuracy silently. "
            f"Pass --mean and --std, of pixels in 0..1: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 (torchvision "
            f"and most of timm), --mean 0.5 --std 0.5 (-1..1), --mean 0 --std 1 (0..1), or --input-range 255 for raw values; "
            f"or write them into {file.with_suffix('.toml').name} beside it"
        )
    crop = begin.side or settings.get("crop")
    if crop is None:
        missing.append(f"{file} takes images of any size. Pass the size it was trained on, such as --crop 224")
    if settings.get("crop") not in (None, crop):
        origin = "" if (source := stated.sources.get("crop")) in (None, OPTIONS) else f" (from {source})"
        message = f"--crop {settings['crop']}{origin}: {file} takes {crop} x {crop} pixels"
        raise UsageError(message)
    if stated.unclear:
        missing.append(f"{stated.unclear}, which penult does not do. Pass --resize PIXELS or --squash, whichever is nearer")
    if crop is None or not normalised or missing:
        return None
    squash = bool(settings.get("squash"))
    if squash and settings.get("resize") not in (None, crop):
        message = f"--squash resizes to the square of {crop} pixels itself: leave --resize out"
        raise UsageError(message)
    resize = crop if squash else int(settings.get("resize", round(crop * RESIZE_OVER_CROP)))
    require_sizes(resize, crop)
    interpolation = str(settings.get("interpolation", "bilinear"))
    if interpolation not in FILTERS:
        message = f"--interpolation {interpolation}: expected {', '.join(FILTERS)}"
        raise UsageError(message)
    assumed += [f"--resize {resize}"] if not squash and "resize" not in settings else []
    assumed += ["--interpolation bilinear"] if "interpolation" not in settings else []
    channels, path = str(settings.get("channels", "rgb")), str(settings.get("pixel_path", "pillow"))
    return Preprocess(resize, crop, interpolation, mean, std, input_range, channels, squash, path)


def _require_normalisation(mean: Sequence[float], std: Sequence[float], input_range: float) -> None:
    """Refuse values that no network was trained with, above all those for the other input range."""
    shown = {name: ",".join(f"{value:g}" for value in values) for name, values in (("--mean", mean), ("--std", std))}
    if not all(value > 0 and math.isfinite(value) for value in std):
        message = f"--std {shown['--std']}: it divides, so all must be numbers above 0"
        raise UsageError(message)
    if not all(map(math.isfinite, mean)):
        message = f"--mean {shown['--mean']}: expected numbers"
        raise UsageError(message)
    if input_range == 1 and max(map(abs, mean)) > 1:
        message = (
            f"--mean {shown['--mean']} is of pixels in 0..255, and without --input-range 255 pixels are in 0..1. "
            f"Pass --input-range 255, or --mean and --std divided by 255"
        )
        raise UsageError(message)
    if input_range == 255 and all(0 < value < 1 for value in (*mean, *std)):
        message = (
            f"--mean {shown['--mean']} --std {shown['--std']} are of pixels in 0..1, and with --input-range 255 pixels are in "
            f"0..255. Leave --input-range out, or multiply both by 255"
        )
        raise UsageError(message)


def _three(values: Sequence[float], flag: str) -> tuple[float, ...]:
    if len(values) == 1:
        return (float(values[0]),) * 3
    if len(values) != 3:
        message = f"{flag} {','.join(map(str, values))}: expected one value, or three"
        raise UsageError(message)
    return tuple(map(float, values))
