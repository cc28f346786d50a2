"""Editing of ONNX graphs: cut them, name and order nodes, keep zeros around a max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

from numpy.typing import NDArray

from store.errors import BadDataError

WEIGHTED = ("Gemm", "MatMul", "Conv")


def cut(model: Any, ends: Sequence[tuple[list[Any], str, int]], front: Sequence[Any] = (), inputs: Sequence[Any] = ()) -> None:
    """Cut a model so that it ends with the given nodes; nodes and weights that they do not need are removed.

    In place, because the weights may be gigabytes.

    Args:
        model: ``onnx.ModelProto``.
        ends: for each output, the nodes that make it (`pooling.pooling_nodes`), its name and its width.
        front: nodes before the graph.
        inputs: the new graph's inputs; by default the old ones.
    """
    from onnx import NodeProto, TensorProto, helper

    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    tails = [node for nodes, _, _ in ends for node in nodes]
    keep, pending = set(), [name for node in tails for name in node.input]
    while pending:
        node = made_by.get(pending.pop())
        if node is not None and id(node) not in keep:
            keep.add(id(node))
            pending += [*node.input, *free_names(node)]
    inner = in_order([node for node in graph.node if id(node) in keep])
    nodes = [*front, *(_copy(NodeProto(), node) for node in inner), *tails]
    used = {name for node in nodes for name in (*node.input, *free_names(node))}
    begin = list(inputs) or [value for value in graph.input if value.name in used]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for _, name, width in ends]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
    kept = helper.make_graph(nodes, "backbone", begin, outputs)
    for field in ("node", "input", "output", "value_info", "quantization_annotation"):
        graph.ClearField(field)
        getattr(graph, field).extend(getattr(kept, field))
    graph.name = "backbone"
    model.ir_version = max(model.ir_version, 4)  # before, weights had to be inputs too
    graph.ClearField("doc_string")
    del model.metadata_props[:]
    model.producer_name = "penult"


def name_nodes(graph: Any) -> None:
    """Give every node without a name a unique one, as ONNX Runtime requires."""
    taken = {node.name for node in graph.node}
    free = (name for name in map("penult_node_{}".format, count()) if name not in taken)
    for node in graph.node:
        node.name = node.name or next(free)


def keep_zero_padding(model: Any) -> bool:
    """Keep the zeros that pad the input of a max pooling; return whether there are any right before one.

    ONNX Runtime's Pad_Fusion makes them minus infinity, which is something else if the values before may all be negative; also
    where its TransposeOptimizer has moved a transposition from between them. So the padding becomes a zero that is computed
    from the batch size, which no optimiser knows. In a graph of an opset before 11 the padding is an attribute and stays;
    `cpu_session.WRONG_FUSIONS` are off in any case.
    """
    from onnx import TensorProto, helper

    made_by = {name: node for node in model.graph.node for name in node.output}
    direct = [made_by.get(node.input[0]) for node in model.graph.node if node.op_type == "MaxPool"]
    pads = []
    for node in direct:
        before = node
        while before is not None and before.op_type in ("Transpose", "Identity"):
            before = made_by.get(before.input[0])
        if before is not None and before.op_type == "Pad" and _is_zero_padding(model.graph, before):
            pads.append(before)
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=1)
    kind = TensorProto.FLOAT16 if in_float16(model.graph) else TensorProto.FLOAT
    for number, pad in enumerate({id(node): node for node in pads}.values() if opset >= 11 else ()):
        name, values = f"penult_zero{number}", pad.input[0]
        nodes = [
            helper.make_node("Shape", [values], [f"{name}_shape"]),
            helper.make_node("Constant", [], [f"{name}_index"], value=helper.make_tensor("", TensorProto.INT64, [], [0])),
            helper.make_node("Gather", [f"{name}_shape", f"{name}_index"], [f"{name}_batch"]),
            helper.make_node("Sub", [f"{name}_batch", f"{name}_batch"], [f"{name}_integer"]),
            helper.make_node("Cast", [f"{name}_integer"], [name], to=kind),
        ]
        place = next(i for i, node in enumerate(model.graph.node) if node is pad or list(node.output) == list(pad.output))
        for node in reversed(nodes):
            model.graph.node.insert(place, node)
        kept = model.graph.node[place + len(nodes)]
        del kept.input[2:3]
        kept.input.insert(2, name)
    return any(pad is node for pad in pads for node in direct)


def _is_zero_padding(graph: Any, pad: Any) -> bool:
    """Whether a Pad fills with a constant zero, the one case that Pad_Fusion takes."""
    attributes = {each.name: each for each in pad.attribute}
    if "mode" in attributes and attributes["mode"].s != b"constant":
        return False
    if "value" in attributes:  # before opset 11
        return float(attributes["value"].f) == 0
    if len(pad.input) < 3 or not pad.input[2]:
        return True
    value = constant(graph, pad.input[2])
    return value is not None and not value.any()


def constant(graph: Any, name: str) -> NDArray[Any] | None:
    """The values of a tensor that a graph stores; None if it is computed, or cannot be read."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    try:
        return numpy_helper.to_array(tensors[name]) if name in tensors else None
    except (TypeError, ValueError):  # bytes that do not fit its shape: no session takes it either
        return None


def in_float16(graph: Any) -> bool:
    """Whether the weights of all layers are float16."""
    from onnx import TensorProto

    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = (name for node in graph.node if node.op_type in WEIGHTED for name in node.input if name in kinds)
    return {kinds[name] for name in weights} == {TensorProto.FLOAT16}


def of_pixels(graph: Any) -> set[str]:
    """Names of the nodes that compute with the graph's input, rather than with its shape or with constants."""
    tensors = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    names = set()
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and tensors.intersection([*node.input, *free_names(node)]):
            names.add(node.name)
            tensors.update(node.output)
    return names


def in_order(nodes: Sequence[Any]) -> list[Any]:
    """Nodes in topological order, which ONNX requires and float16 converters break; otherwise their order is kept.

    Raises:
        BadDataError: they stand in a circle.
    """
    place = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = {i: {place[name] for name in (*node.input, *free_names(node)) if name in place} for i, node in enumerate(nodes)}
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        message = "the graph has a circle of nodes"
        raise BadDataError(message) from error
    ready, done = list(sorter.get_ready()), []
    heapify(ready)
    while ready:
        done.append(heappop(ready))
        sorter.done(done[-1])
        for i in sorter.get_ready():
            heappush(ready, i)
    return [nodes[i] for i in done]


def _copy(new: Any, old: Any) -> Any:
    """A node without the exporter's notes, which name files of the machine it ran on."""
    new.CopyFrom(old)
    new.ClearField("doc_string")
    del new.metadata_props[:]
    return new


def free_names(node: Any) -> list[str]:
    """Names of the outer tensors that the subgraphs of a node (If, Loop) use."""
    names = []
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                names += [*inner.input, *free_names(inner)]
    return names
