"""What files beside an ONNX file say of its input: its own TOML file, Hugging Face's and timm's configurations.

Hugging Face's image processors write ``preprocessor_config.json``, timm writes ``pretrained_cfg`` into ``config.json``, and
exporters put the model beside them or into a folder ``onnx`` there.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from store.errors import UsageError

PROCESSOR, CONFIG, OPTIONS = "preprocessor_config.json", "config.json", "options"
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers, which the processors write
SQUARE = ("ViT", "DeiT", "Deit", "Beit", "BEiT", "Siglip")  # processors that mean a square by one number of pixels
SHORTER = ("CLIP", "ConvNext", "ConvNeXT", "Bit", "Levit", "LeViT", "PoolFormer", "MobileViT")  # and by it the shorter side
WHOLE_FROM = 384  # from this size on, ConvNeXT's processor resizes to the square and does not crop
LEVIT = 256 / 224  # LeViT's processor resizes to this multiple of what its file says


@dataclass(frozen=True)
class ModelConfig:
    """What files beside a model say of it.

    Attributes:
        settings: of its input, see `settings.OnnxInputSettings`.
        sources: the name of the file that says each.
        unclear: how images are resized, if penult cannot do that; a sentence.
        classes: names of its classes; empty if they are not said.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unclear: str = ""
    classes: tuple[str, ...] = ()


def read_model_config(file: Path) -> ModelConfig:
    """What Hugging Face's or timm's files beside an ONNX file say of it.

    Raises:
        UsageError: one of them is damaged; names it.
    """
    config = _read(file, CONFIG)
    timm = config.get("pretrained_cfg")
    path, facts = (CONFIG, timm) if isinstance(timm, dict) else (PROCESSOR, _read(file, PROCESSOR))
    try:
        settings, unclear = _of_timm(facts) if path == CONFIG else _of_processor(facts)
        classes = _classes(config.get("id2label") or config.get("label_names"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{path} beside {file} describes no preprocessing of images ({type(error).__name__}: {error})"
        raise UsageError(message) from error
    sources = dict.fromkeys(settings, path)
    if "crop" not in settings and isinstance(config.get("image_size"), int):
        settings["crop"], sources["crop"] = config["image_size"], CONFIG
    return ModelConfig(settings, sources, unclear and f"{path} says {unclear}", classes)


def _read(file: Path, name: str) -> dict[str, Any]:
    """A JSON object beside a model, or above its folder ``onnx``; empty if there is none."""
    for folder in (file.parent, *([file.parent.parent] if file.absolute().parent.name == "onnx" else [])):
        path = folder / name
        if path.is_file():
            try:
                document = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                message = f"{path} is not JSON: {error}"
                raise UsageError(message) from error
            return document if isinstance(document, dict) else {}
    return {}


def _classes(names: Any) -> tuple[str, ...]:
    """The names of classes, without those that Hugging Face invents: LABEL_0, LABEL_1."""
    ordered = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names or []
    return () if all(str(name) == f"LABEL_{i}" for i, name in enumerate(ordered)) else tuple(map(str, ordered))


def _of_timm(facts: dict[str, Any]) -> tuple[dict[str, Any], str]:
    channels, *sides = facts["input_size"]
    if channels != 3 or len(set(sides)) != 1:
        message = f"an input of {facts['input_size']}, and not three channels of a square"
        raise ValueError(message)
    crop, share = int(sides[0]), float(facts.get("crop_pct", 1))
    settings: dict[str, Any] = {"crop": crop, "mean": _numbers(facts["mean"]), "std": _numbers(facts["std"])}
    if facts.get("interpolation") not in (None, "random"):
        settings["interpolation"] = str(facts["interpolation"])
    mode, resize = facts.get("crop_mode") or "center", math.floor(crop / share)
    if mode == "squash" and resize == crop:
        return settings | {"squash": True}, ""
    if mode != "center":
        return settings, f"images are resized to {resize} pixels in timm's mode {mode!r}"
    return settings | {"resize": resize}, ""


def _of_processor(facts: dict[str, Any]) -> tuple[dict[str, Any], str]:
    if not facts.keys() & {"image_mean", "do_normalize", "size", "crop_size"}:
        return {}, ""
    settings = dict(_normalisation(facts))
    if isinstance(facts.get("resample"), int):
        settings["interpolation"] = RESAMPLE[facts["resample"]]
    if facts.get("do_flip_channel_order"):
        settings["channels"] = "bgr"
    sizes, unclear = _sizes(facts)
    return settings | sizes, unclear


def _normalisation(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Mean, deviation and range, for pixels / 255 where the processor multiplies them with 1/255, else for raw values."""
    swaps = bool(facts.get("do_flip_channel_order"))  # MobileViT's processor, which does not normalise
    if not facts.get("do_normalize", not swaps):
        mean, std = [0.0], [1.0]
    elif "image_mean" in facts:
        mean, std = (_numbers(facts[name]) for name in ("image_mean", "image_std"))
    else:
        return
    factor = float(facts.get("rescale_factor", 1 / 255)) if facts.get("do_rescale", True) else 1.0
    if facts.get("rescale_offset"):  # one is subtracted after the multiplication
        mean = [value + 1 for value in mean]
    if facts.get("include_top"):  # EfficientNet's processor divides by the deviation twice
        std = [value * value for value in std]
    if math.isclose(factor * 255, 1, rel_tol=1e-3):
        factor = 1.0
    else:
        yield "input_range", 255.0
    yield "mean", tuple(value / factor for value in mean)
    yield "std", tuple(value / factor for value in std)


def _sizes(facts: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Resize, crop and squash; and in words what is none of these."""
    kind = str(facts.get("image_processor_type") or facts.get("feature_extractor_type") or "")
    size, cropped = facts.get("size"), facts.get("crop_size") if facts.get("do_center_crop", "crop_size" in facts) else None
    crop = cropped.get("height") if isinstance(cropped, dict) else cropped
    if isinstance(size, int) and kind.startswith((*SQUARE, *SHORTER)):
        size = {"shortest_edge": size} if kind.startswith(SHORTER) else {"height": size, "width": size}
    if not isinstance(size, dict) or not facts.get("do_resize", True):
        return ({"crop": int(crop)} if crop else {}), f"images are resized to {size}" if size else ""
    if "shortest_edge" in size and len(size) == 1:
        edge = int(size["shortest_edge"])
        if facts.get("crop_pct") is None:
            return {"crop": int(crop or edge), "resize": int(edge * LEVIT) if kind.startswith("Le") else edge}, ""
        if edge >= WHOLE_FROM and kind.startswith("ConvNe"):
            return {"crop": edge, "squash": True}, ""
        return {"crop": int(crop or edge), "resize": int(edge / float(facts["crop_pct"]))}, ""
    if "height" in size and size["height"] == size.get("width"):
        side = int(size["height"])
        if crop in (None, side):
            return {"crop": side, "squash": True}, ""
        return {"crop": int(crop)}, f"images are resized to the square of {side} pixels before {crop} are cropped"
    return ({"crop": int(crop)} if crop else {}), f"images are resized to {size}"


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, list | tuple) else [values])]


def read_sidecar(file: Path) -> dict[str, Any]:
    """The settings in ``FILE.toml`` beside ``FILE.onnx``; empty if there is no such file.

    Raises:
        UsageError: it is not TOML, or has an unknown key or a wrong value; names it.
    """
    path = file.with_suffix(".toml")
    if not path.is_file():
        return {}
    from extractor.settings import Place

    from .settings import SidecarSettings

    try:
        document = tomllib.loads(path.read_text())
        if isinstance(document.get("layer"), str):
            document["layer"] = [document["layer"]]
        fields = {"layers" if key == "layer" else key: value for key, value in document.items()}
        settings = SidecarSettings.read(fields, Place(lambda _, name: "layer" if name == "layers" else name)).explicit()
    except (OSError, ValueError) as error:  # of the file, of TOML, or of a setting
        message = f"{path}: {error}"
        raise UsageError(message) from error
    if layers := settings.pop("layers", ()):
        settings["layer"] = list(layers)
    return settings


def stated_by(file: Path, options: dict[str, Any]) -> ModelConfig:
    """All that is said of an ONNX file's input: options win over its TOML file, and this over Hugging Face's and timm's files.

    Raises:
        UsageError: a file beside it is damaged; names it.
    """
    stated = read_model_config(file)
    for settings, source in ((read_sidecar(file), file.with_suffix(".toml").name), (options, OPTIONS)):
        sizes = {"resize", "squash"} & set(settings)
        before = {name: value for name, value in stated.settings.items() if not (sizes and name in ("resize", "squash"))}
        sources = {**stated.sources, **dict.fromkeys(settings, source)}
        stated = replace(stated, settings={**before, **settings}, sources=sources, unclear="" if sizes else stated.unclear)
    return stated
