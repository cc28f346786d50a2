"""Torch networks as ONNX graphs, by either of torch's exporters: by tracing, which costs a tenth, where both are alike.

`traced` runs the network once and writes down what it computed: 0.4 core-seconds for MobileNetV2, where the newer exporter, in
`exported`, takes 6.5. Its graph is used only if all of its operators are in `ALIKE`, which both write alike. It is rewritten as
the newer one would have written it: batch norms are folded into the convolutions before them with the same arithmetic, to the
last bit, and a global average is a mean. So the features, and the fingerprint of a cache, do not depend on which of them made
the file. benchmarks/backbones.py compares the features bit by bit for each of torchvision's networks, see docs/backbones.md.
Convolutional networks are alike. ShuffleNets, transformers and ConvNeXts are not: they compute with shapes.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError

from .onnx_file import MAX_INLINE
from .reasons import reason

OPSET = 20
EXAMPLES = 2  # images of the batch that exporters see; both treat one as a special case
LOGITS = "logits"  # the first output of what they export; the layers are `layer_output`
DEFAULT_EPSILON = 1e-5  # of BatchNormalization in ONNX
ALIKE = frozenset(
    (
        *("Conv", "BatchNormalization", "Gemm", "Add", "Mul", "Concat", "Flatten"),
        *("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceMax"),
        *("Constant", "Identity"),
    )
)
DEPRECATIONS = ("You are using the legacy TorchScript-based ONNX export", "The feature will be removed")

Exporter = Callable[[Any, int, int], Any]


def layer_output(number: int) -> str:
    """The name of the output with a layer's features."""
    return f"tapped_{number}"


def traced(network: Any, side: int, layers: int) -> Any:
    """The ``onnx.ModelProto`` of a network by torch's older exporter, rewritten as the newer one writes it.

    Args:
        network: ``torch.nn.Module`` in evaluation mode; gives a tuple of logits and ``layers`` features.
        side: of its input, pixels.
        layers: how many outputs follow the logits.

    Raises:
        BadDataError: it cannot be traced; the trace would hold for other images or batch sizes only by chance; or the newer
            exporter may write it differently.
    """
    import onnx
    import torch
    from torch.jit import TracerWarning  # type: ignore[attr-defined]

    if any(isinstance(module, torch.nn.LayerNorm) for module in network.modules()):
        message = "layer normalisation is written differently by torch's exporters"
        raise BadDataError(message)
    if sum(parameter.nbytes for parameter in network.parameters()) > MAX_INLINE:
        message = "torch's older exporter writes weights of at most 2 GB"
        raise BadDataError(message)
    outputs = _outputs(layers)
    content: Any = io.BytesIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints the graph where it fails
            for text in DEPRECATIONS:
                warnings.filterwarnings("ignore", text, DeprecationWarning)
            warnings.simplefilter("error", TracerWarning)  # a value of this run would become a constant
            torch.onnx.export(
                network,
                (_example(side),),
                content,
                dynamo=False,
                dynamic_axes={name: {0: "batch"} for name in ("pixels", *outputs)},
                input_names=["pixels"],
                output_names=outputs,
                opset_version=OPSET,
                training=torch.onnx.TrainingMode.PRESERVE,  # torch's own folding of batch norms rounds differently
                do_constant_folding=False,
                verbose=False,
            )
        model = onnx.load_model_from_string(content.getvalue())
    except Exception as error:  # torch has no public base of its exceptions; a release without this exporter gives others
        message = f"torch's older exporter cannot write it ({reason(error)})"
        raise BadDataError(message) from error
    if others := sorted({node.op_type for node in model.graph.node} - ALIKE):
        message = f"torch's exporters may write {', '.join(others)} differently"
        raise BadDataError(message)
    rewrite(model.graph)
    return model


def exported(network: Any, side: int, layers: int) -> Any:
    """As `traced`, by torch's newer exporter.

    Raises:
        BadDataError: it exports nothing.
    """
    import torch

    program = torch.onnx.export(
        network,
        (_example(side),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixels"],
        output_names=_outputs(layers),
        opset_version=OPSET,
        verbose=False,
    )
    if program is None:
        message = "torch exported nothing"
        raise BadDataError(message)
    return program.model_proto


EXPORTERS: tuple[Exporter, ...] = (traced, exported)


def _outputs(layers: int) -> list[str]:
    return [LOGITS, *map(layer_output, range(layers))]


def _example(side: int) -> Any:
    import torch

    return torch.randn(EXAMPLES, 3, side, side, generator=torch.Generator().manual_seed(0))


def rewrite(graph: Any) -> None:
    """Rewrite a traced graph in place as the newer exporter writes it; inputs, outputs and weights keep their names."""
    from onnx import TensorProto, helper, numpy_helper

    _drop_copies(graph)
    _fold_batch_norms(graph)
    zeros = {tensor.name for tensor in graph.initializer if not numpy_helper.to_array(tensor).any()}
    nodes = []
    for node in graph.node:
        if node.op_type == "GlobalAveragePool":
            axes = f"{node.output[0]}_axes"
            graph.initializer.append(helper.make_tensor(axes, TensorProto.INT64, [2], [-1, -2]))
            nodes.append(helper.make_node("ReduceMean", [node.input[0], axes], node.output, name=node.name, keepdims=1))
            continue
        if node.op_type in ("Conv", "Gemm") and zeros.intersection(node.input[2:]):
            del node.input[2:]
        nodes.append(_copy(node))
    _replace_nodes(graph, nodes)


def _drop_copies(graph: Any) -> None:
    """Make constants tensors of the graph, and use what an Identity copies, unless it makes an output."""
    outputs = {value.name for value in graph.output}
    source: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        node.input[:] = [source.get(name, name) for name in node.input]
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        elif node.op_type == "Identity" and node.output[0] not in outputs:
            source[node.output[0]] = node.input[0]
        else:
            nodes.append(_copy(node))
    _replace_nodes(graph, nodes)


def _fold_batch_norms(graph: Any) -> None:
    """Fold batch norms into the convolutions before them as onnxscript's FuseBatchNormIntoConv does, in float32."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input) + Counter(value.name for value in graph.output)
    made_by = {name: node for node in graph.node for name in node.output}
    folded: dict[str, Any] = {}  # by the name of the batch norm's output, which is theirs now
    dropped = set()
    for node in graph.node:
        conv = made_by.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or uses[node.input[0]] > 1 or uses[conv.input[1]] > 1:
            continue
        arrays: list[NDArray[Any]] = [numpy_helper.to_array(tensors[name]) for name in (*node.input[1:], *conv.input[1:])]
        scale, shift, mean, variance, weight, *biases = arrays
        epsilon = next((each.f for each in node.attribute if each.name == "epsilon"), DEFAULT_EPSILON)
        factor = scale / np.sqrt(variance + epsilon)
        bias = ((biases[0] if biases else np.zeros_like(mean)) - mean) * factor + shift
        names = [conv.input[1], f"{conv.input[1]}_bias"]
        for name, values in zip(names, (weight * factor.reshape(-1, 1, 1, 1), bias), strict=True):
            if name not in tensors:
                tensors[name] = graph.initializer.add()
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))
        new = _copy(conv)
        new.input[:], new.output[:] = [conv.input[0], *names], node.output
        folded[node.output[0]] = new
        dropped.add(node.input[0])
    kept = [node for node in graph.node if not dropped.intersection(node.output)]
    _replace_nodes(graph, [folded.get(node.output[0]) or _copy(node) for node in kept])


def _copy(node: Any) -> Any:
    from onnx import NodeProto

    new = NodeProto()
    new.CopyFrom(node)
    return new


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
