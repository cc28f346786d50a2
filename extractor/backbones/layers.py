"""Layers of a torch network: their list and shapes, and hooks that return their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs.pooling import POOLINGS, pooled, pooling_of, spatial_axes
from store.cache import PENULTIMATE
from store.errors import BadDataError, UsageError, did_you_mean

from .networks import on_meta, untrained
from .registry import choose_weights

INERT = ("Dropout", "StochasticDepth", "Identity", "Permute")  # their output is that of the layer before them


def torch_penultimate(network: Any, example: Any) -> tuple[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
    """A function that computes a torch network's penultimate features, averaged if they are spatial.

    Returns:
        The name of the last Linear or Conv2d that runs, and a function from ``(n, 3, h, w)`` to its input ``(n, d)``.
    """
    import torch

    last, values = observe(network, [PENULTIMATE], example)
    kind, _ = pooling_of(values[PENULTIMATE].shape, PENULTIMATE, "average")

    def features(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            (penultimate,) = tapped(network, {PENULTIMATE: kind}, last)(torch.from_numpy(batch))[1:]
        return np.asarray(penultimate.numpy(), np.float32)

    return last, features


def last_weighted(network: Any, example: Any) -> str:
    """The name of the last Linear or Conv2d that runs: the classification layer of all of torchvision's networks."""
    return observe(network, (), example)[0]


def observe(network: Any, layers: Sequence[str], pixels: Any) -> tuple[str, dict[str, Any]]:
    """Run a network once: its `last_weighted`, and the outputs of layers, of `PENULTIMATE` the input of that last one.

    The outputs are copies, because what follows may work in place. Layers that do not run or give no tensor are left out.
    """
    import torch

    ran: list[str] = []
    values: dict[str, Any] = {}

    def note(layer: str, tensor: Any) -> None:
        values.pop(layer, None)
        if isinstance(tensor, torch.Tensor):
            values[layer] = tensor.clone()

    def before(name: str) -> Callable[[Any, Any], None]:
        def hook(_module: Any, inputs: Any) -> None:
            ran.append(name)
            if PENULTIMATE in layers:
                note(PENULTIMATE, inputs[0] if inputs else None)

        return hook

    def after(layer: str) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _inputs, output: note(layer, output)

    weighted = {n: m for n, m in network.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    hooks = [module.register_forward_pre_hook(before(name)) for name, module in weighted.items()]
    hooks += [network.get_submodule(each).register_forward_hook(after(each)) for each in layers if each != PENULTIMATE]
    try:
        with torch.inference_mode():
            network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1], values


def tapped(network: Any, kinds: Mapping[str, str], last: str, shapes: Mapping[str, Sequence[int]] | None = None) -> Any:
    """A module that returns the network's output and, pooled to ``(n, d)``, layers.

    A layer is the output of the last call of the module of that name; `PENULTIMATE` is the input of ``last``. It is copied
    when it appears, because what follows may work in place.

    Args:
        network: ``torch.nn.Module``.
        kinds: the layers, and how each is pooled, as `pooling.pooling_of` names it.
        last: see `last_weighted`.
        shapes: of the layers in any run, for an exporter that would take the use of the sizes of its own run for a computation.
    """
    import torch

    class Tapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: Any) -> Any:
            caught: dict[str, Any] = {}

            def before(_module: Any, inputs: Any) -> None:
                caught[PENULTIMATE] = inputs[0].clone()

            def after(name: str) -> Callable[[Any, Any, Any], None]:
                return lambda _module, _inputs, output: caught.__setitem__(name, output.clone())

            hooks = [
                self.network.get_submodule(last).register_forward_pre_hook(before)
                if name == PENULTIMATE
                else self.network.get_submodule(name).register_forward_hook(after(name))
                for name in kinds
            ]
            try:
                output = self.network(pixels)
            finally:
                for hook in hooks:
                    hook.remove()
            return (output, *(pooled(caught[name], kind, name, (shapes or {}).get(name)) for name, kind in kinds.items()))

    return Tapped().eval()


def prefix_of(network: Any, shape: Sequence[int]) -> int:
    """How many tokens stand before the patches in a layer: torchvision's vision transformers have a class token."""
    token = getattr(network, "class_token", None)
    return 0 if token is None or len(shape) != 3 else int(token.shape[1])


def list_layers(name: str) -> list[dict[str, Any]]:
    """The layers of a torchvision network that can give features, in the order of its modules; needs no weights.

    Returns:
        JSON for each: ``layer``, ``module`` (its class), ``shape`` (of one image), ``dim``, and ``pooling`` (``none`` or the
        default, ``average``).

    Raises:
        UsageError: no such network.
    """
    import torch

    entry = choose_weights(name, None, "--weights")
    side = entry.transforms().crop_size[0]
    with on_meta(), torch.inference_mode():
        network = untrained(name, side).eval()
        pixels = torch.empty(2, 3, side, side)  # two images: a layer that changes the batch size gives no features of an image
        candidates = [layer for layer, module in network.named_modules() if layer and type(module).__name__ not in INERT]
        last, values = observe(network, [PENULTIMATE, *candidates], pixels)
    shapes = {layer: tuple(tensor.shape) for layer, tensor in values.items() if tensor.shape[0] == 2}
    kinds = {layer: type(module).__name__ for layer, module in network.named_modules()}
    kinds[PENULTIMATE] = f"input of {last}"
    rows = []
    for layer in (PENULTIMATE, *(each for each in kinds if each != PENULTIMATE)):
        try:
            shape = shapes[layer]
            dim = shape[1] if len(shape) == 2 else spatial_axes(shape, layer, "average")[1]
        except (KeyError, BadDataError):  # it does not run, gives no tensor, or works on windows rather than on images
            continue
        pooling = "none" if len(shape) == 2 else "average"
        rows.append({"layer": layer, "module": kinds[layer], "shape": list(shape[1:]), "dim": int(dim), "pooling": pooling})
    return rows


def require_layers(network: Any, layers: Sequence[str], pooling: str | None) -> None:
    """Refuse layers that cannot be exported, before minutes of export.

    Raises:
        UsageError: no such layer, with the nearest names; a layer twice; an unknown pooling.
    """
    known = [PENULTIMATE, *(name for name, _ in network.named_modules() if name)]
    for layer in layers:
        if layer not in known:
            hint = did_you_mean(layer, known)
            message = f"--layer {layer}: there is no such layer{hint} (`penult backbones NAME --layers` lists them)"
            raise UsageError(message)
    if len(set(layers)) != len(layers):
        message = f"--layer {' --layer '.join(layers)}: one of them is named twice"
        raise UsageError(message)
    if pooling not in (None, *POOLINGS):
        message = f"--pooling {pooling}: expected {', '.join(POOLINGS)}"
        raise UsageError(message)
