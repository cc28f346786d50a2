"""The registry of backbones: torchvision's classification networks and their weights, one row each.

A backbone is data, not a class: its name, where its weights come from and the preprocessing that travels with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from extractor.pixels.preprocess import require_sizes
from store.errors import InputMissingError, UsageError, did_you_mean

# How torchvision's source declares a network, the weights it has, and which of them are the default
NETWORK = re.compile(r"^@register_model\(.*\)\n(?:@.*\n)*def (\w+)\([^)]*?weights: Optional\[(\w+)\]", re.MULTILINE)
ENUM = re.compile(r"^class (\w+)\(WeightsEnum\):\n((?:    .*\n|\n)*)", re.MULTILINE)
MEMBER = re.compile(r"^    (\w+) = (?:Weights\(|(\w+)$)", re.MULTILINE)
RANDOM = re.compile(r"random(?::(-?[0-9]+))?")  # weights, with a seed
WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
FILE_SUFFIXES = (".onnx", *WEIGHTS_SUFFIXES)


@dataclass(frozen=True)
class Backbone:
    """The choice of a backbone: network, weights, layers and preprocessing. Nothing is loaded.

    Attributes:
        name: a torchvision classification network (``resnet50``), or the path of an ONNX file.
        weights: None (torchvision's default), a torchvision weights name (``IMAGENET1K_V2``), the path of a ``.pth`` file
            with a state dict, or ``random``, ``random:SEED``.
        preset: the torchvision weights whose preprocessing a ``.pth`` file needs. Required if the file is not torchvision's:
            V1 and V2 presets differ by points of accuracy.
        resize, crop: replace the preset's sizes, pixels.
        layers: module names of a torchvision network (`layers.list_layers`), or tensor names of an ONNX file; the penultimate
            layer if empty.
        pooling: ``average`` (the default), ``max``, ``class``, ``patches`` or ``class+mean``, for layers that are not vectors.
        mean, std, input_range, interpolation, channels, squash, layout: the input of a custom ONNX file, see `onnx_input`.
        pixel_path: how files become pixels, one of `preprocess.PIXEL_PATHS`; None for the reference.

    >>> from extractor import Backbone
    >>> Backbone("resnet50", weights="IMAGENET1K_V1", layers=("layer3", "penultimate")).is_file
    False
    """

    name: str
    weights: str | None = None
    preset: str | None = None
    resize: int | None = None
    crop: int | None = None
    layers: tuple[str, ...] = ()
    pooling: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_range: float | None = None
    interpolation: str | None = None
    channels: str | None = None
    squash: bool | None = None
    layout: str | None = None
    pixel_path: str | None = None

    @property
    def is_file(self) -> bool:
        return self.name.lower().endswith(".onnx")

    @property
    def weights_file(self) -> Path | None:
        """The ``.pth`` file, if ``weights`` is one."""
        return Path(self.weights) if self.weights and self.weights.endswith(WEIGHTS_SUFFIXES) else None

    @property
    def seed(self) -> int | None:
        """The seed of random weights; None if they are not random."""
        match = RANDOM.fullmatch(self.weights or "")
        return int(match[1] or 0) if match else None

    @property
    def onnx_input(self) -> dict[str, Any]:
        """The fields about pixels that are set; a custom ONNX file may need all of them."""
        names = ("resize", "crop", "mean", "std", "input_range", "interpolation", "channels", "squash", "layout", "pixel_path")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Backbone:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return cls(**values)


BACKBONE_FIELDS = [each.name for each in fields(Backbone)]


@cache
def listed() -> dict[str, list[str]]:
    """All torchvision classification networks with the names of their weights, the default first.

    Read from torchvision's source, because importing it takes seconds and a misspelt name should be refused at once.
    """
    package: Any = find_spec("torchvision")
    folders = [Path(place, "models") for place in package.submodule_search_locations]
    sources = [path.read_text("utf-8") for folder in folders for path in folder.glob("*.py")]
    enums = {name: MEMBER.findall(body) for source in sources for name, body in ENUM.findall(source)}
    networks = {name: enums[enum] for source in sources for name, enum in NETWORK.findall(source)}
    weights = {}
    for network, members in networks.items():
        default = [alias for name, alias in members if name == "DEFAULT"]
        weights[network] = [*default, *(name for name, alias in members if not alias and name not in default)]
    return dict(sorted(weights.items()))


def names() -> list[str]:
    """All torchvision classification networks, sorted."""
    return list(listed())


def choose_name(name: str, weights: str | None, flag: str) -> str:
    """The name of one weights entry of a network; its default if ``weights`` is None.

    Raises:
        UsageError: no such network, or no such weights; names the nearest, or all there are.
    """
    if name not in listed():
        hint = did_you_mean(name.lower().replace("-", ""), listed())
        message = f"no backbone {name!r}{hint} (`penult backbones` lists them all)"
        raise UsageError(message)
    entries = listed()[name]
    if weights in (None, "DEFAULT"):
        return entries[0]
    for key in (weights, f"IMAGENET1K_{weights}"):  # V2 is short for IMAGENET1K_V2
        if key in entries:
            return key
    message = f"{flag} {weights}: {name} has {', '.join(entries)}"
    raise UsageError(message)


def choose_weights(name: str, weights: str | None, flag: str) -> Any:
    """Torchvision's entry for `choose_name`. Imports torchvision (seconds)."""
    return weights_of(name)[choose_name(name, weights, flag)]


def weights_of(name: str) -> dict[str, Any]:
    """The weights entries of a network by name, torchvision's default first. Imports torchvision (seconds).

    Raises:
        UsageError: no such network; names the nearest.
    """
    choose_name(name, None, "")
    import torchvision

    enum = torchvision.models.get_model_weights(name)
    return {key: enum[key] for key in listed()[name]}


def as_flag(name: str) -> str:
    """The flag that sets a field of `Backbone`."""
    return {"name": "--backbone", "layers": "--layer"}.get(name, f"--{name.replace('_', '-')}")


def check_request(backbone: Backbone, spell: Callable[[str], str] = as_flag) -> None:
    """Refuse a backbone that does not exist, without opening a file: names, weights, presets, sizes, contradictions.

    Args:
        backbone: the request.
        spell: gives the name of a field for messages: its flag, or its key.

    Raises:
        UsageError: names what is wrong.
        InputMissingError: a file is not there.
    """
    name, weights, file = backbone.name, backbone.weights, backbone.weights_file
    refused, why = {"weights", "preset"}, "has its weights inside"
    if not backbone.is_file:
        choose_name(name, None, "")
        refused, why = set(backbone.onnx_input) - {"resize", "crop", "pixel_path"}, "has the preprocessing of its weights"
    if superfluous := [spell(each) for each in BACKBONE_FIELDS if each in refused and getattr(backbone, each) is not None]:
        message = f"{name} {why}: leave {', '.join(superfluous)} out"
        raise UsageError(message)
    for field, path in (("name", Path(name) if backbone.is_file else None), ("weights", file)):
        if path and not path.exists():
            message = f"{spell(field)} {path}: there is no such file"
            raise InputMissingError(message)
    if weights and weights.startswith("random") and (backbone.seed is None or abs(backbone.seed) >= 2**63):
        message = f"{spell('weights')} {weights}: the seed must be an integer, as in random:7"
        raise UsageError(message)
    if not backbone.is_file and backbone.seed is None and not file:
        choose_name(name, weights, spell("weights"))
    if backbone.preset:
        choose_name(name, backbone.preset, spell("preset"))
    require_sizes(backbone.resize, backbone.crop, spell)
