"""The registry of backbones: torchvision's classification networks and their weights, one row each.

A backbone is data, not a class: its name, where its weights come from and the preprocessing that travels with them.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from store.errors import BadDataError, InputMissingError, UsageError, did_you_mean
from store.fingerprint import file_digest

from . import weights as weight_files
from .preprocess import Preprocess, require_sizes
from .weights import WeightsFile, read_state

# How torchvision's source declares a network, the weights it has, and which of them are the default
NETWORK = re.compile(r"^@register_model\(.*\)\n(?:@.*\n)*def (\w+)\([^)]*?weights: Optional\[(\w+)\]", re.MULTILINE)
ENUM = re.compile(r"^class (\w+)\(WeightsEnum\):\n((?:    .*\n|\n)*)", re.MULTILINE)
MEMBER = re.compile(r"^    (\w+) = (?:Weights\(|(\w+)$)", re.MULTILINE)
RANDOM = re.compile(r"random(?::(-?[0-9]+))?")  # weights, with a seed
WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
FILE_SUFFIXES = (".onnx", *WEIGHTS_SUFFIXES)


@dataclass(frozen=True)
class Backbone:
    """What to extract with; cheap to make, nothing is loaded.

    Attributes:
        name: a torchvision classification network (``resnet50``), or the path of an ONNX file made by ``penult export``.
        weights: None (torchvision's default), a torchvision weights name (``IMAGENET1K_V2``), the path of a ``.pth`` file
            with a state dict, or ``random``, ``random:SEED``.
        preset: the torchvision weights whose preprocessing a ``.pth`` file goes with. Needed where its content is not known:
            V1 and V2 presets differ by points of accuracy.
        resize, crop: replace the preset's sizes, pixels.
        layers: module names of a torchvision network (`layers.list_layers`), or tensor names of an ONNX file; the penultimate
            layer where there are none.
        pooling: ``average`` (the default), ``max`` or ``token``, for layers that are no vectors.
        mean, std, input_range, interpolation, channels, squash, layout: what somebody's ONNX file takes, see `stated`.
        pixel_path: how files become pixels, one of `preprocess.PIXEL_PATHS`; the reference where it is None.
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
        """The ``.pth`` file, where weights is one."""
        return Path(self.weights) if self.weights and self.weights.endswith(WEIGHTS_SUFFIXES) else None

    @property
    def seed(self) -> int | None:
        """The seed of random weights; None where they are not random."""
        found = RANDOM.fullmatch(self.weights or "")
        return int(found[1] or 0) if found else None

    @property
    def stated(self) -> dict[str, Any]:
        """What is said about pixels, all of which an ONNX file may need."""
        names = ("resize", "crop", "mean", "std", "input_range", "interpolation", "channels", "squash", "layout", "pixel_path")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Backbone:
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return cls(**given)


BACKBONE_FIELDS = [each.name for each in fields(Backbone)]


@cache
def listed() -> dict[str, list[str]]:
    """All torchvision classification networks with the names of their weights, the default first.

    Read from torchvision's source, for importing it takes seconds: a misspelt name is to be answered at once.
    """
    package: Any = find_spec("torchvision")
    folders = [Path(place, "models") for place in package.submodule_search_locations]
    sources = [path.read_text("utf-8") for folder in folders for path in folder.glob("*.py")]
    enums = {name: MEMBER.findall(body) for source in sources for name, body in ENUM.findall(source)}
    networks = {name: enums[enum] for source in sources for name, enum in NETWORK.findall(source)}
    found = {}
    for network, members in networks.items():
        default = [alias for name, alias in members if name == "DEFAULT"]
        found[network] = [*default, *(name for name, alias in members if not alias and name not in default)]
    return dict(sorted(found.items()))


def names() -> list[str]:
    """All torchvision classification networks, sorted."""
    return list(listed())


def choose_name(name: str, wanted: str | None, flag: str) -> str:
    """The name of one weights entry of a network; its default where nothing is asked for.

    Raises:
        UsageError: no such network, or no such weights; names the nearest, or those there are.
    """
    if name not in listed():
        hint = did_you_mean(name.lower().replace("-", ""), listed())
        message = f"no backbone {name!r}{hint} (`penult backbones` lists them all)"
        raise UsageError(message)
    entries = listed()[name]
    if wanted in (None, "DEFAULT"):
        return entries[0]
    for key in (wanted, f"IMAGENET1K_{wanted}"):  # V2 is short for IMAGENET1K_V2
        if key in entries:
            return key
    message = f"{flag} {wanted}: {name} has {', '.join(entries)}"
    raise UsageError(message)


def choose_weights(name: str, wanted: str | None, flag: str) -> Any:
    """Torchvision's entry for `choose_name`. Imports torchvision (seconds)."""
    return weights_of(name)[choose_name(name, wanted, flag)]


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
    """A field of `Backbone` as the command line has it."""
    return {"name": "--backbone", "layers": "--layer"}.get(name, f"--{name.replace('_', '-')}")


def check_request(backbone: Backbone, spell: Callable[[str], str] = as_flag) -> None:
    """Refuse what cannot be had, without opening a file: names, weights, presets, sizes, and what does not go together.

    Args:
        backbone: what is asked for.
        spell: what one of its fields is called where it was written.

    Raises:
        UsageError: names what is wrong.
        InputMissingError: a file is not there.
    """
    name, weights, file = backbone.name, backbone.weights, backbone.weights_file
    refused, why = {"weights", "preset"}, "has its weights inside"
    if not backbone.is_file:
        choose_name(name, None, "")
        refused, why = set(backbone.stated) - {"resize", "crop", "pixel_path"}, "has the preprocessing of its weights"
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


def row(name: str) -> dict[str, Any]:
    """What `penult backbones` shows of one network, as JSON: dim, weights with accuracy, input, parameters, GFLOPs, source."""
    entries = weights_of(name)
    state = skeleton(name).state_dict()
    classifier = next(state[key] for key in sorted(_classifier_keys(state)) if key.endswith("weight"))
    weights = {}
    for key, entry in entries.items():
        meta = entry.meta
        weights[key] = {
            **Preprocess.from_torchvision(entry.transforms()).facts(),
            "top1": meta["_metrics"]["ImageNet-1K"]["acc@1"],
            "parameters": meta["num_params"],
            "gflops": meta["_ops"],
            "source": entry.url,
            "licence": WeightsFile(name, entry).licence,
        }
    return {"name": name, "dim": int(classifier.shape[1]), "default": next(iter(weights)), "weights": weights}


def rows() -> Iterator[dict[str, Any]]:
    """`row` of every network."""
    return (row(name) for name in names())


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks as shapes alone, in no time and memory."""
    import torch
    from torchvision.models.regnet import BlockParams

    computed = BlockParams.from_init_params

    def on_cpu(*arguments: Any, **named: Any) -> Any:
        with torch.device("cpu"):  # RegNets compute their widths with tensors, which have no values on meta
            return computed(*arguments, **named)

    with mock.patch.object(BlockParams, "from_init_params", on_cpu), torch.device("meta"):
        yield


@contextmanager
def _loading(state: Mapping[str, Any]) -> Iterator[None]:
    """Let torchvision's builders load this state dict where they would download one.

    So the network is built exactly as torchvision builds it for these weights: GoogLeNet and Inception then transform their
    input and drop their auxiliary heads, without a table of such cases here.
    """
    from torchvision.models import WeightsEnum

    with mock.patch.object(WeightsEnum, "get_state_dict", return_value=state):
        yield


@dataclass(frozen=True)
class Loaded:
    """A network with its weights.

    Attributes:
        network: ``torch.nn.Module`` in eval mode, float32, on the CPU.
        preprocess: what its input must have gone through.
        weights_name: ``IMAGENET1K_V1``, a file's name, or ``random:0``.
        weights_digest: `digest` of its state dict.
        source: where the weights came from, for people.
    """

    network: Any
    preprocess: Preprocess
    weights_name: str
    weights_digest: str
    source: str = ""


def load(backbone: Backbone) -> Loaded:
    """Build a torchvision network with its weights.

    Raises:
        UsageError: unknown name, weights or preset.
        InputMissingError: the weights are not here and cannot be downloaded; says which file to bring and where it goes.
        BadDataError: the file is damaged or does not fit the network.
    """
    check_request(backbone)
    entry = choose_weights(backbone.name, _preset_name(backbone), "--preset")
    file = backbone.weights_file
    if backbone.seed is not None:
        side = backbone.crop or int(entry.transforms().crop_size[0])
        network, weights_name = _random(backbone.name, backbone.seed, side), f"random:{backbone.seed}"
        source = f"random numbers, seed {backbone.seed}"
    elif file is not None:
        network, weights_name = _build(backbone.name, entry, read_state(file), str(file)), file.name
        source = f"from {file.name} (sha256 {file_digest(file)}) given by --weights, preset {entry.name}"
    else:
        own = WeightsFile(backbone.name, entry)
        state, sha256 = weight_files.torchvision_state(own)
        network, weights_name = _build(backbone.name, entry, state, own.name), entry.name
        source = f"from {own.name} (sha256 {sha256}), torchvision's file"
    preprocess = Preprocess.from_torchvision(entry.transforms())
    if (backbone.resize, backbone.crop) != (None, None):
        resize, crop = backbone.resize, backbone.crop
        resize, crop = preprocess.resize if resize is None else resize, preprocess.crop if crop is None else crop
        require_sizes(resize, crop)
        preprocess = replace(preprocess, resize=resize, crop=crop)
    if backbone.pixel_path is not None:
        preprocess = replace(preprocess, pixel_path=backbone.pixel_path)
    return Loaded(network.eval(), preprocess, weights_name, digest(network.state_dict()), source)


def _build(name: str, entry: Any, state: Mapping[str, Any], file: str) -> Any:
    import torchvision

    with _loading(with_classifier(name, state)):
        try:
            return torchvision.models.get_model(name, weights=entry)
        except RuntimeError as error:
            message = f"{file} does not fit {name}: {weight_files.misfit(error)}. Is it the file of another network?"
            raise BadDataError(message) from error


def import_weights(path: Path) -> tuple[WeightsFile, Path, bool]:
    """Take one of torchvision's files, brought from elsewhere, to where `load` finds it.

    Nothing is copied before it was recognised by its digest, loaded safely and found to fit its network.

    Returns:
        Which file it is, where it is now, and whether it was copied (False where a sound one was there).

    Raises:
        PenultError: see `weights.recognise`, `weights.read_state` and `weights.install`.
    """
    file = weight_files.recognise(path)
    _build(file.network, file.entry, read_state(path), str(path))
    return file, *weight_files.install(path, file)


def _preset_name(backbone: Backbone) -> str | None:
    if backbone.weights_file is None:
        return backbone.preset if backbone.seed is not None else backbone.weights or backbone.preset
    if backbone.preset is not None:
        return backbone.preset
    file = backbone.weights_file
    entries = weights_of(backbone.name)
    sha256 = file_digest(file)
    for name, entry in entries.items():
        if sha256.startswith(WeightsFile(backbone.name, entry).prefix):
            return name
    weight_files.refuse_other_formats(file)  # what cannot be used at all needs no preset first
    message = (
        f"{file.name} is not one of torchvision's files for {backbone.name}, so its preprocessing is unknown. "
        f"State it with --preset {'|'.join(entries)}"
    )
    raise UsageError(message)


def _random(name: str, seed: int, side: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return untrained(name, side)


def untrained(name: str, side: int | None = None) -> Any:
    """A network as its constructor initialises it, without the warnings that some give about future defaults.

    Args:
        name: of a torchvision classification network.
        side: of its input, pixels, for those that have a parameter for every place in it.
    """
    import torchvision

    size = {"image_size": side} if side and name.startswith("vit_") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name, weights=None, **size)


def skeleton(name: str) -> Any:
    """A network with shapes and no numbers (torch's meta device)."""
    with on_meta():
        return untrained(name)


def with_classifier(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the last layer as the network expects it.

    The classifier is cut off anyway, so a checkpoint fine-tuned on other classes, or saved without its head, is as good.
    """
    import torch

    expected = skeleton(name).state_dict()
    fixed = dict(state)
    for key in _classifier_keys(expected):
        found = state.get(key)
        if found is None or found.shape != expected[key].shape:
            fixed[key] = torch.zeros(expected[key].shape)
    return fixed


def _classifier_keys(state: Mapping[str, Any]) -> set[str]:
    """The tensors of the last module: the classification layer in all of torchvision's networks."""
    last = list(state)[-1].rpartition(".")[0]
    return {key for key in state if key.rpartition(".")[0] == last}


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over the named tensors of a network but its last layer, hexadecimal; independent of the file they came from."""
    sha = hashlib.sha256()
    for name in sorted(set(state) - _classifier_keys(state)):
        array = state[name].detach().cpu().contiguous().numpy()
        sha.update(f"{name}\0{array.dtype.str}\0{','.join(map(str, array.shape))}\0".encode())
        sha.update(array.reshape(-1).data)
    return sha.hexdigest()
