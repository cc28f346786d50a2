"""torchvision's networks: built, loaded with weights and described; and digests of state dicts."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from extractor.pixels.preprocess import Preprocess, require_sizes
from store.errors import BadDataError, UsageError
from store.fingerprint import file_digest

from . import weights as weight_files
from .registry import Backbone, check_request, choose_weights, names, weights_of
from .weights import WeightsFile, read_state

COMPILER = "torch._dynamo"


def import_without_compiler() -> None:
    """Import torchvision without torch's compiler, which takes 1 core-second; for a process that uses neither detection nor it.

    torchvision's ``ops.roi_align`` imports it for one function, which says whether a device can compile. While torchvision is
    imported, modules that hold this function alone take the compiler's place; when called, it asks the real one.
    """
    import torch  # noqa: F401 - with whatever it needs itself

    if COMPILER in sys.modules:
        return
    package, utils = ModuleType(COMPILER), ModuleType(f"{COMPILER}.utils")
    package.__path__ = []
    utils.is_compile_supported = lambda device: import_module(utils.__name__).is_compile_supported(device)  # type: ignore[attr-defined]
    sys.modules |= {module.__name__: module for module in (package, utils)}
    try:
        with suppress(ImportError):  # a release that needs more of the compiler; the next import is the usual one
            import torchvision  # noqa: F401
    finally:
        for module in (package, utils):
            del sys.modules[module.__name__]


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks on torch's meta device: shapes without values, at almost no cost.

    Their initialisation is left out: there are no values, and on this device it would import torch's compiler (1 core-second).
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torchvision.models.regnet import BlockParams

    fill, init = torch.Tensor, torch.nn.init
    fillers = {fill.normal_, fill.uniform_, fill.erfinv_, fill.mul_, fill.add_, fill.clamp_, fill.fill_, fill.zero_}
    fillers |= {init.normal_, init.uniform_, init.constant_, init.kaiming_uniform_}

    class WithoutValues(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            if function in fillers:
                return (named or {}).get("tensor", *arguments[:1])
            return function(*arguments, **(named or {}))

    computed = BlockParams.from_init_params

    def on_cpu(*arguments: Any, **named: Any) -> Any:
        with torch.device("cpu"):  # RegNets compute their widths with tensors, which have no values on meta
            return computed(*arguments, **named)

    with mock.patch.object(BlockParams, "from_init_params", on_cpu), torch.device("meta"), WithoutValues():
        yield


@contextmanager
def _loading(state: Mapping[str, Any]) -> Iterator[None]:
    """Let torchvision's builders load this state dict instead of downloading one.

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
        preprocess: how images become its input.
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
    """Copy one of torchvision's weight files from elsewhere to where `load` looks for it.

    It is copied only after its digest is recognised, it is loaded safely, and it fits its network.

    Returns:
        Which file it is, where it is now, and whether it was copied (False if a sound one was there).

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
    weight_files.refuse_other_formats(file)  # an unusable file is refused before a preset is required
    message = (
        f"{file.name} is not one of torchvision's files for {backbone.name}, so its preprocessing is unknown. "
        f"Pass --preset {'|'.join(entries)}"
    )
    raise UsageError(message)


def _random(name: str, seed: int, side: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return untrained(name, side)


def untrained(name: str, side: int | None = None) -> Any:
    """An untrained network, as its constructor initialises it, without warnings about future defaults.

    Args:
        name: of a torchvision classification network.
        side: of its input, pixels, for networks with a parameter for every position in it.
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
    """A state dict whose last layer has the shapes that the network expects.

    The classifier is cut off anyway, so a checkpoint fine-tuned on other classes, or saved without its head, works as well.
    """
    import torch

    expected = skeleton(name).state_dict()
    fixed = dict(state)
    for key in _classifier_keys(expected):
        tensor = state.get(key)
        if tensor is None or tensor.shape != expected[key].shape:
            fixed[key] = torch.zeros(expected[key].shape)
    return fixed


def _classifier_keys(state: Mapping[str, Any]) -> set[str]:
    """The tensors of the last module: the classification layer in all of torchvision's networks."""
    last = list(state)[-1].rpartition(".")[0]
    return {key for key in state if key.rpartition(".")[0] == last}


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over the named tensors of a network except its last layer, hexadecimal; independent of their file."""
    sha = hashlib.sha256()
    for name in sorted(set(state) - _classifier_keys(state)):
        array = state[name].detach().cpu().contiguous().numpy()
        sha.update(f"{name}\0{array.dtype.str}\0{','.join(map(str, array.shape))}\0".encode())
        sha.update(array.reshape(-1).data)
    return sha.hexdigest()


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
