"""Analysis and editing of ONNX graphs: find the classification layer, cut before it, pool a layer to vectors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from graphlib import TopologicalSorter
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

from store.errors import BadDataError

PASS_THROUGH = ("Identity", "Transpose", "Cast", "DequantizeLinear", "Reshape", "Unsqueeze", "Squeeze")
WEIGHTED = ("Gemm", "MatMul", "Conv")
# What may stand between a classification layer and the output: probabilities, biases, temperatures, shapes, pooling.
TAIL = (*PASS_THROUGH, "Softmax", "LogSoftmax", "Sigmoid", "Flatten", "Add", "Sub", "Mul", "Div", "QuantizeLinear", "Dropout")
# Operators whose weights are not inspected: quantised layers, ONNX Runtime's own layers, branches.
QUANTISED = ("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "MatMulNBits")
OPAQUE = (*QUANTISED, "FusedMatMul", "FusedGemm", "FusedConv", "Einsum", "If", "Loop", "Scan")
POOLING = ("GlobalAveragePool", "AveragePool", "ReduceMean")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Gelu", "HardSwish", "Tanh")


class Graph:
    """A model's graph, searched backwards from its outputs."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self._constants = {tensor.name for tensor in model.graph.initializer}
        self._constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a weight, perhaps transposed or dequantised."""
        while name not in self._constants:
            node = self.made_by.get(name)
            if node is None or node.op_type not in PASS_THROUGH:
                return False
            name = node.input[0]
        return True

    def is_weighted(self, node: Any) -> bool:
        return node.op_type in WEIGHTED and self.is_constant(node.input[1])

    def penultimate(self, output: str) -> str:
        """Name of the tensor that feeds the last layer with weights before an output: the last Gemm, MatMul or Conv.

        Raises:
            BadDataError: there is no such layer.
        """
        pending, visited = deque([output]), set()
        while pending:
            node = self.made_by.get(pending.popleft())
            if node is None or id(node) in visited:
                continue
            visited.add(id(node))
            if self.is_weighted(node):
                return str(node.input[0])
            pending.extend(node.input)
        message = "no Gemm, MatMul or Conv with constant weights stands before the network's output; nothing to cut at"
        raise BadDataError(message)

    def classifier_input(self, output: str) -> str | None:
        """The tensor that feeds the classification layer before an output; None if the output is the features.

        A classification layer is a Gemm, a MatMul or a 1x1 Conv followed by nothing but `TAIL`. The result of an
        activation, a residual sum or a normalisation is already features.

        Raises:
            BadDataError: it may be either, as in SqueezeNet's classifier and a headless MobileNet.
        """
        name, activated, pooled = output, False, False
        while (node := self.made_by.get(name)) is not None:
            if self.is_weighted(node):
                if node.op_type == "Conv" and any(side != 1 for side in _kernel(node)):
                    return None
                if not activated:
                    return str(node.input[0])
                if node.op_type == "Conv" and pooled:
                    message = (
                        f"the last layer before the output {output!r} is a 1x1 convolution followed by an activation and a "
                        f"pooling, which may be a classification layer or features. Pass --layer {output} to use the "
                        f"output as it is, or --layer {node.input[0]} for the input of that layer"
                    )
                    raise BadDataError(message)
                return None
            if node.op_type in OPAQUE or node.op_type.startswith("QLinear"):
                message = (
                    f"{node.op_type} stands before the output {output!r} and may be a classification layer (quantised, or in a "
                    f"branch). Pass --layer NAME for the tensor with the features, or --layer {output} to use the output"
                )
                raise BadDataError(message)
            data = [each for each in node.input if each and not self.is_constant(each)]
            if len(data) != 1 or node.op_type not in (*TAIL, *POOLING, *ACTIVATIONS):
                return None
            activated |= node.op_type in ACTIVATIONS
            pooled |= node.op_type in POOLING
            name = data[0]
        return None

    def tensors(self) -> list[str]:
        """Names of all inner tensors and outputs, in the order of computation."""
        return [name for node in self.graph.node for name in node.output if name and not self.is_constant(name)]


def _kernel(node: Any) -> list[int]:
    return [side for attribute in node.attribute if attribute.name == "kernel_shape" for side in attribute.ints]


def pooling_nodes(tensor: str, shape: Sequence[int], pooling: str, output: str, opset: int) -> tuple[list[Any], str, int]:
    """The nodes that pool a tensor to one vector per image.

    Args:
        tensor: its name.
        shape: of one run with any batch: (n, d), (n, tokens, d), (n, d, h, w) or (n, h, w, d).
        pooling: ``average``, ``max`` or ``token``, if it is not a vector.
        output: name of the result ``(n, d)``.
        opset: of the model; up to 17, the axes of a reduction are an attribute.

    Returns:
        Nodes, the pooling as the facts name it, and d.

    Raises:
        BadDataError: a tensor of this shape cannot be pooled this way.
    """
    from onnx import helper

    if len(shape) == 2:
        return [helper.make_node("Identity", [tensor], [output])], "none", int(shape[1])
    axes, width = spatial_axes(shape, tensor, pooling)
    inner = f"penult_{output}"
    if pooling == "token":
        index = helper.make_tensor(f"{inner}_first", 7, [], [0])  # INT64
        nodes = [
            helper.make_node("Constant", [], [f"{inner}_index"], value=index),
            helper.make_node("Gather", [tensor, f"{inner}_index"], [output], axis=1),
        ]
        return nodes, pooling, width
    if len(axes) == 2 and axes[0] == 2:
        op = "GlobalMaxPool" if pooling == "max" else "GlobalAveragePool"
        pooled = helper.make_node(op, [tensor], [inner])
        return [pooled, helper.make_node("Flatten", [inner], [output], axis=1)], pooling, width
    op = "ReduceMax" if pooling == "max" else "ReduceMean"
    if opset < 18:
        return [helper.make_node(op, [tensor], [output], keepdims=0, axes=axes)], pooling, width
    constant = helper.make_tensor(f"{inner}_values", 7, [len(axes)], axes)
    nodes = [
        helper.make_node("Constant", [], [f"{inner}_axes"], value=constant),
        helper.make_node(op, [tensor, f"{inner}_axes"], [output], keepdims=0),
    ]
    return nodes, pooling, width


def spatial_axes(shape: Sequence[int], name: str, pooling: str) -> tuple[list[int], int]:
    """The axes to pool over, and the number of features.

    Square inputs give square feature maps, which distinguishes channels first from channels last.

    Raises:
        BadDataError: it is neither tokens nor a square map, or has no class token.
    """
    if len(shape) == 3:
        return [1], int(shape[2])
    if len(shape) == 4 and pooling != "token":
        if shape[2] == shape[3]:
            return [2, 3], int(shape[1])
        if shape[1] == shape[2]:
            return [1, 2], int(shape[3])
    expected = "tokens (n, t, d)" if pooling == "token" else "(n, d), (n, t, d), (n, d, h, h) or (n, h, h, d)"
    message = f"the layer {name!r} has shape {tuple(shape)}; expected {expected}"
    raise BadDataError(message)


def cut(model: Any, ends: Sequence[tuple[list[Any], str, int]], front: Sequence[Any] = (), inputs: Sequence[Any] = ()) -> None:
    """Cut a model so that it ends with the given nodes; nodes and weights that they do not need are removed.

    In place, because the weights may be gigabytes.

    Args:
        model: ``onnx.ModelProto``.
        ends: for each output, the nodes that make it (`pooling_nodes`), its name and its width.
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
    """Keep the zeros that pad the input of a max pooling; return whether there are any.

    ONNX Runtime's Pad_Fusion makes them minus infinity, which is something else if the values before may all be negative. So
    the padding becomes a zero that is computed from the batch size, which no optimiser knows. In a graph of an opset before
    11 the padding is an attribute and stays; `cpu_session.WRONG_FUSIONS` are off in any case.
    """
    from onnx import TensorProto, helper

    made_by = {name: node for node in model.graph.node for name in node.output}
    pads = [made_by[node.input[0]] for node in model.graph.node if node.op_type == "MaxPool" and node.input[0] in made_by]
    pads = [node for node in pads if node.op_type == "Pad" and _is_zero_padding(model.graph, node)]
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
    return bool(pads)


def _is_zero_padding(graph: Any, pad: Any) -> bool:
    """Whether a Pad fills with a constant zero, the one case that Pad_Fusion takes."""
    from onnx import numpy_helper

    attributes = {each.name: each for each in pad.attribute}
    if "mode" in attributes and attributes["mode"].s != b"constant":
        return False
    if "value" in attributes:  # before opset 11
        return float(attributes["value"].f) == 0
    if len(pad.input) < 3 or not pad.input[2]:
        return True
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    return pad.input[2] in constants and not numpy_helper.to_array(constants[pad.input[2]]).any()


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
    """Nodes in topological order, which ONNX requires and float16 converters break; otherwise their order is kept."""
    place = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = {i: {place[name] for name in (*node.input, *free_names(node)) if name in place} for i, node in enumerate(nodes)}
    sorter = TopologicalSorter(needs)
    sorter.prepare()
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
