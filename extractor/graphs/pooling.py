"""Pooling of a layer to one vector per image: over space, or over the tokens of a transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError, UsageError

from .classification_layer import Graph

POOLINGS = ("average", "max", "class", "patches", "class+mean", "token")  # token: what class was called before
NEED_CLASS_TOKEN = ("token", "class+mean")
AFTER = " after "  # between a pooling of patches and the number of tokens before them, as the facts name it
INT64 = 7  # TensorProto.INT64
LAST = 2**31 - 1  # the end of an axis


def pooling_of(shape: Sequence[int], name: str, pooling: str, prefix: int | None = None) -> tuple[str, int]:
    """The pooling of a layer as the facts name it, and the number of features.

    Args:
        shape: of one run with any batch: (n, d), (n, tokens, d), (n, d, h, w) or (n, h, w, d).
        name: of the layer, for messages.
        pooling: one of `POOLINGS`, if it is not a vector.
        prefix: how many of the tokens stand before the patches; the first is the class token. None: unknown.

    Raises:
        BadDataError: a tensor of this shape cannot be pooled this way.
        UsageError: it has no class token.
    """
    if len(shape) == 2:
        return "none", int(shape[1])
    kind = "token" if pooling == "class" else pooling
    _, width = spatial_axes(shape, name, kind)
    if kind in NEED_CLASS_TOKEN and prefix == 0:
        message = (
            f"--pooling {pooling}: the layer {name!r} has no class token; all of its {shape[1]} tokens are patches. "
            f"Pass --pooling average or max"
        )
        raise UsageError(message)
    if kind == "patches" and not prefix:
        return "average", width
    after = f"{AFTER}{prefix}" if kind in ("patches", "class+mean") else ""
    return kind + after, 2 * width if kind == "class+mean" else width


def spatial_axes(shape: Sequence[int], name: str, pooling: str) -> tuple[list[int], int]:
    """The axes to pool over, and the length of the vectors that are pooled.

    Square inputs give square feature maps, which distinguishes channels first from channels last.

    Raises:
        BadDataError: it is neither tokens nor a square map, or has no class token.
    """
    if len(shape) == 3:
        return [1], int(shape[2])
    tokens = pooling in NEED_CLASS_TOKEN
    if len(shape) == 4 and not tokens:
        if shape[2] == shape[3]:
            return [2, 3], int(shape[1])
        if shape[1] == shape[2]:
            return [1, 2], int(shape[3])
    expected = "tokens (n, t, d)" if tokens else "(n, d), (n, t, d), (n, d, h, h) or (n, h, h, d)"
    message = f"the layer {name!r} has shape {tuple(shape)}; expected {expected}"
    raise BadDataError(message)


def pooled(values: Any, kind: str, name: str = "", shape: Sequence[int] | None = None) -> Any:
    """Pool values of NumPy or torch as `pooling_nodes` does.

    Args:
        values: of a layer.
        kind: as `pooling_of` names it.
        name: of the layer, for messages.
        shape: of the values in any run, if not their own.
    """
    operation, _, prefix = kind.partition(AFTER)
    if operation == "none":
        return values
    if operation == "token":
        return values[:, 0]
    axes, _ = spatial_axes(shape or values.shape, name, operation)
    if operation == "max":
        return values.max(tuple(axes)) if isinstance(values, np.ndarray) else values.amax(dim=axes)
    mean = values[:, int(prefix) :].mean(1) if prefix else values.mean(tuple(axes))
    if operation != "class+mean":
        return mean
    if isinstance(values, np.ndarray):
        return np.concatenate([values[:, 0], mean], axis=1)
    import torch

    return torch.cat([values[:, 0], mean], dim=1)


def pooling_nodes(tensor: str, shape: Sequence[int], kind: str, output: str, opset: int) -> list[Any]:
    """The nodes that pool a tensor to one vector per image.

    Args:
        tensor: its name.
        shape: of one run with any batch.
        kind: as `pooling_of` names it.
        output: name of the result ``(n, d)``.
        opset: of the model; up to 17, the axes of a reduction are an attribute, and up to 9 all that a slice needs.
    """
    from onnx import helper

    inner = f"penult_{output}"
    nodes: list[Any] = []

    def constant(name: str, values: list[int], dims: list[int] | None = None) -> str:
        value = helper.make_tensor(f"{inner}_{name}_values", INT64, [len(values)] if dims is None else dims, values)
        nodes.append(helper.make_node("Constant", [], [f"{inner}_{name}"], value=value))
        return f"{inner}_{name}"

    def reduce(op: str, source: str, axes: list[int], result: str) -> None:
        if opset < 18:
            nodes.append(helper.make_node(op, [source], [result], keepdims=0, axes=axes))
        else:
            nodes.append(helper.make_node(op, [source, constant("axes", axes)], [result], keepdims=0))

    operation, _, prefix = kind.partition(AFTER)
    if operation == "none":
        return [helper.make_node("Identity", [tensor], [output])]
    axes, _ = spatial_axes(shape, tensor, operation)
    source, first, mean = tensor, output, output
    if operation == "class+mean":
        first, mean = f"{inner}_class", f"{inner}_mean"
    if operation in NEED_CLASS_TOKEN:
        nodes.append(helper.make_node("Gather", [tensor, constant("index", [0], [])], [first], axis=1))
    if operation == "token":
        return nodes
    if prefix:
        source, begin = f"{inner}_patches", int(prefix)
        if opset < 10:
            nodes.append(helper.make_node("Slice", [tensor], [source], axes=[1], starts=[begin], ends=[LAST]))
        else:
            bounds = [constant("start", [begin]), constant("end", [LAST]), constant("axis", [1])]
            nodes.append(helper.make_node("Slice", [tensor, *bounds], [source]))
    if axes == [2, 3]:
        op = "GlobalMaxPool" if operation == "max" else "GlobalAveragePool"
        return [helper.make_node(op, [tensor], [inner]), helper.make_node("Flatten", [inner], [output], axis=1)]
    reduce("ReduceMax" if operation == "max" else "ReduceMean", source, axes, mean)
    if operation == "class+mean":
        nodes.append(helper.make_node("Concat", [first, mean], [output], axis=1))
    return nodes


def axes_warning(layer: str, shape: Sequence[int], prefix: int) -> str:
    """A warning if the axes of ``(n, t, d)`` may be the other way round: places make a square, features seldom; else none."""
    if len(shape) != 3 or math.isqrt(shape[2]) ** 2 != shape[2] or math.isqrt(shape[1] - prefix) ** 2 == shape[1] - prefix:
        return ""
    return (
        f"{layer!r} was taken as {shape[1]} tokens of {shape[2]} features. If it is {shape[2]} places of {shape[1]} features, "
        f"pass --layer for the tensor before it was reshaped"
    )


def token_joins(graph: Graph) -> list[str]:
    """The tensors that put tokens of the image beside tokens that are the same for all images: class tokens, registers."""

    def names() -> Iterator[str]:
        for node in graph.graph.node:
            axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
            fixed = [graph.is_constant(name) for name in node.input]
            if node.op_type == "Concat" and axis in (1, 2, -1, -2) and any(fixed) and not all(fixed):
                yield node.output[0]

    return list(names())


def count_prefix(tokens: int, joins: Sequence[NDArray[Any]]) -> int:
    """How many tokens stand before the patches.

    Args:
        tokens: how many the features have.
        joins: values of `token_joins` for a few images that differ everywhere; those of other lengths do not count.
    """
    counts = [0]
    for values in joins:
        if values.ndim == 3 and values.dtype.kind == "f" and tokens in values.shape[1:]:
            by_token = values if values.shape[1] == tokens else values.transpose(0, 2, 1)
            differs = ~np.isclose(by_token, by_token[:1], rtol=1e-3, atol=1e-6).all(axis=(0, 2))
            counts.append(int(differs.argmax()) if differs.any() else 0)
    return max(counts)


def prefix_warning(layer: str, prefix: int, tokens: int) -> str:
    """The warning that an average over all tokens counts those before the patches too."""
    count = "1 token that is" if prefix == 1 else f"{prefix} tokens that are"
    return (
        f"{layer!r} has {count} not of the image (a class token, registers) before its {tokens - prefix} patches, and the "
        f"features are the average of all {tokens}. Pass --pooling class, patches or class+mean for other features, or "
        f"--pooling average for these without this warning"
    )
