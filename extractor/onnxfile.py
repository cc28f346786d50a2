"""ONNX files: cut a classifier at its penultimate tensor, and carry the facts about a backbone in its metadata."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from store.errors import BadDataError, InputMissingError

from .preprocess import Preprocess

PREFIX = "penult."
PASS_THROUGH = ("Identity", "Transpose", "Cast", "DequantizeLinear", "Reshape")


@dataclass(frozen=True)
class BackboneFacts:
    """What a backbone file says of itself.

    Attributes:
        name: the architecture.
        weights: name of the weights, for people.
        weights_sha256: digest of the tensors, or of the file where the architecture is not ours.
        layer: what the features are, such as ``input of fc``.
        pooling: ``none``, or ``average`` where the penultimate tensor is spatial.
        dim: length of a feature vector.
        preprocess: what its input must have gone through.
        source: where the weights came from, for people.
    """

    name: str
    weights: str
    weights_sha256: str
    layer: str
    pooling: str
    dim: int
    preprocess: Preprocess
    source: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BackboneFacts:
        facts = json.loads(text)
        return cls(**{**facts, "preprocess": Preprocess.from_facts(facts["preprocess"])})

    def fingerprint(self) -> dict[str, Any]:
        """Its part of the fingerprint; the weights' name is for people and decides nothing."""
        return {
            "backbone": self.name,
            "weights": self.weights_sha256,
            "layer": self.layer,
            "pooling": self.pooling,
            "pixels": self.preprocess.fingerprint(),
        }


def penultimate(model: Any) -> str:
    """Name of the tensor that feeds the last layer with weights before the output: the last Gemm, MatMul or Conv.

    Raises:
        BadDataError: there is no such layer.
    """
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}

    def is_constant(name: str) -> bool:
        while name not in constants:
            node = made_by.get(name)
            if node is None or node.op_type not in PASS_THROUGH:
                return False
            name = node.input[0]
        return True

    pending = deque([graph.output[0].name])
    seen = set()
    while pending:
        node = made_by.get(pending.popleft())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type in ("Gemm", "MatMul", "Conv") and is_constant(node.input[1]):
            return str(node.input[0])
        pending.extend(node.input)
    message = "no Gemm, MatMul or Conv with constant weights stands before the network's output; nothing to cut at"
    raise BadDataError(message)


def cut(model: Any, tensor: str) -> tuple[Any, str, int]:
    """A model that ends at a tensor, pooled to a vector where it is spatial.

    Args:
        model: ``onnx.ModelProto``.
        tensor: name of an inner tensor of shape (n, d) or (n, d, h, w).

    Returns:
        The new model with one output ``features`` (n, d), the pooling (``none`` or ``average``), and d.

    Raises:
        BadDataError: the tensor has another rank, or d is not fixed.
    """
    import onnx
    from onnx import TensorProto, helper

    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape for value in [*inferred.value_info, *inferred.input, *inferred.output]}
    dims = shapes[tensor].dim if tensor in shapes else []
    if len(dims) not in (2, 4) or not dims[1].dim_value:
        shape = [dim.dim_value or dim.dim_param or "?" for dim in dims]
        message = f"the tensor {tensor!r} before the classifier has shape {shape}; expected (n, d) or (n, d, h, w)"
        raise BadDataError(message)
    width = int(dims[1].dim_value)

    made_by = {name: node for node in model.graph.node for name in node.output}
    keep, pending = set(), [tensor]
    while pending:
        node = made_by.get(pending.pop())
        if node is not None and id(node) not in keep:
            keep.add(id(node))
            pending.extend(node.input)
    nodes = [node for node in model.graph.node if id(node) in keep]
    if len(dims) == 4:
        nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["penult_pooled"]))
        nodes.append(helper.make_node("Flatten", ["penult_pooled"], ["features"], axis=1))
    else:
        nodes.append(helper.make_node("Identity", [tensor], ["features"]))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "backbone",
        [value for value in model.graph.input if value.name in used],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", width])],
        [value for value in model.graph.initializer if value.name in used],
    )
    result = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="penult")
    return result, "average" if len(dims) == 4 else "none", width


def write_facts(model: Any, facts: BackboneFacts) -> None:
    """Put the facts into the model's metadata, one entry per field."""
    for name, value in asdict(facts).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + name, json.dumps(value)


def read_facts(path: Path) -> BackboneFacts:
    """Read them back.

    Raises:
        InputMissingError: no such file.
        BadDataError: not an ONNX file, or one without penult's metadata.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputMissingError(message) from error
    except Exception as error:  # protobuf's DecodeError is not public
        message = f"{path} is not an ONNX file: {error}"
        raise BadDataError(message) from error
    found = {entry.key.removeprefix(PREFIX): entry.value for entry in model.metadata_props if entry.key.startswith(PREFIX)}
    if "preprocess" not in found:
        message = (
            f"{path} says nothing about its preprocessing, and guessing it costs accuracy silently. "
            f"Only files made by `penult export` are accepted"
        )
        raise BadDataError(message)
    return BackboneFacts.from_json(json.dumps({name: json.loads(value) for name, value in found.items()}))
