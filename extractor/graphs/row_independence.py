"""Operators that make the features of an image depend on the others of its batch, or on chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from store.errors import BadDataError

from .classification_layer import RANDOM, Graph
from .graph import constant

DYNAMIC = "DynamicQuantize"  # how the operators begin that compute a scale from all values of a batch
OVER_AN_AXIS = (
    "Softmax",
    "LogSoftmax",
    "Hardmax",
    "ArgMax",
    "ArgMin",
    "TopK",
    "CumSum",
    "LpNormalization",
    "LayerNormalization",
)


def require_rows(graph: Graph, tensors: Sequence[str], batch: int | None, file: Path) -> bool:
    """Refuse operators by which the features of an image depend on the others of its batch, or on chance.

    Args:
        graph: of the file.
        tensors: with the features.
        batch: images per call, if the file fixes that number.
        file: its name, for the message.

    Returns:
        Whether there are some that do no harm, because the file takes one image at a time.

    Raises:
        BadDataError: names them, and what to do.
    """
    reasons = mixing_operators(graph, tensors)
    dynamic = [op for op in reasons if op.startswith(DYNAMIC)]
    if batch == 1 and len(dynamic) == len(reasons):
        return bool(reasons)
    advice = "export the network in evaluation mode (in torch: model.eval())"
    if dynamic:
        advice = (
            "use the float network (--precision int8 makes an int8 one of it), quantise statically, with QDQ nodes (in ONNX "
            "Runtime: quantize_static), or pass --layer for a tensor before it"
        )
    if reasons:
        listing = "; ".join(f"{op} {why}" for op, why in reasons.items())
        message = (
            f"{file}: features of an image depend on the others of its batch, or on chance: {listing}. To use it, {advice}"
        )
        raise BadDataError(message)
    return False


def mixing_operators(graph: Graph, tensors: Sequence[str]) -> dict[str, str]:
    """Operators before some tensors that are sure to mix the images of a batch, or to be random: name and what it does."""
    reasons: dict[str, str] = {}
    for node in nodes_before(graph, tensors):
        for each in (node, *_inner(node)):
            if reason := _reason(graph, each):
                reasons.setdefault(each.op_type, reason)
    return reasons


def _reason(graph: Graph, node: Any) -> str:
    attributes = {each.name: each.i for each in node.attribute}
    if node.op_type.startswith(DYNAMIC):
        return "quantises with a scale that is computed from the whole batch"
    if node.op_type in RANDOM:
        return "draws random numbers"
    if node.op_type == "BatchNormalization" and (attributes.get("training_mode") or len([*filter(None, node.output)]) > 1):
        return "is in training mode: it normalises with the mean of the batch"
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        mode = constant(graph.graph, node.input[2])
        return "is in training mode: it sets random features to zero" if mode is not None and mode.any() else ""
    return ""


def over_the_batch(graph: Graph, tensors: Sequence[str]) -> list[str]:
    """Operators before some tensors that work along the first axis, where the images of a batch usually are."""
    return sorted({node.op_type for node in nodes_before(graph, tensors) if _is_over_the_batch(graph, node)})


def _is_over_the_batch(graph: Graph, node: Any) -> bool:
    attributes = {each.name: each for each in node.attribute}
    if node.op_type in OVER_AN_AXIS:
        return "axis" in attributes and attributes["axis"].i == 0
    if not node.op_type.startswith("Reduce") or graph.is_constant(node.input[0]):
        return False
    axes = list(attributes["axes"].ints) if "axes" in attributes else None
    if len(node.input) > 1 and node.input[1]:
        values = constant(graph.graph, node.input[1])
        axes = [] if values is None else values.reshape(-1).tolist()
    return 0 in axes if axes is not None else "noop_with_empty_axes" not in attributes


def nodes_before(graph: Graph, tensors: Sequence[str]) -> Iterator[Any]:
    """The nodes that some tensors need and that compute with pixels."""
    names = {id(node): node for tensor in tensors for node in graph.backwards(tensor)}
    return (node for node in names.values() if any(not graph.is_constant(name) for name in node.output if name))


def _inner(node: Any) -> Iterator[Any]:
    """The nodes in the branches of a node (If, Loop)."""
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                yield inner
                yield from _inner(inner)
