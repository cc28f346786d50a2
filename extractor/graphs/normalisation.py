"""Normalisation as the first nodes of an ONNX graph, so that a session takes uint8 pixels: a quarter of the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from extractor.pixels.preprocess import Preprocess

from .graph import name_nodes
from .onnx_file import external_files, read_model

INPUT = "penult_pixels"


def takes_pixels(path: Path, preprocess: Preprocess) -> bytes | None:
    """A backbone, serialised, that takes ``(n, h, w, 3)`` uint8 pixels and normalises them itself.

    Returns:
        None if weights are in a second file, to which a graph in memory cannot refer, or if it takes uint8 pixels already.

    Raises:
        BadDataError, InputMissingError: not an ONNX file.
    """
    from onnx import TensorProto

    model = read_model(path)
    graph = model.graph
    target = _float_input(graph)
    if external_files(model) or target.type.tensor_type.elem_type == TensorProto.UINT8:
        return None
    nodes, pixels = pixel_nodes(graph, preprocess, INPUT)
    graph.input.remove(target)
    graph.input.append(pixels)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    name_nodes(graph)
    return bytes(model.SerializeToString())


def _float_input(graph: Any) -> Any:
    """The input of a backbone's graph that is not a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    return next(value for value in graph.input if value.name not in weights)


def pixel_nodes(graph: Any, preprocess: Preprocess, name: str) -> tuple[list[Any], Any]:
    """The nodes from uint8 pixels to the input of a backbone's graph, and the declaration of the pixel input.

    Their constants are added to the graph. The operations and their order are those of `Preprocess.normalise`, so the
    features are the same bits; multiplying by 1/std instead would save half of the time and change them by 3e-7.
    """
    from onnx import TensorProto, helper, numpy_helper

    target = _float_input(graph)
    n, _, height, width = target.type.tensor_type.shape.dim
    nodes: list[Any] = []

    def then(kind: str, *constants: Any, **attributes: Any) -> None:
        names = [f"{name}_constant_{len(nodes)}" for _ in constants]
        graph.initializer.extend(numpy_helper.from_array(value, key) for value, key in zip(constants, names, strict=True))
        before = nodes[-1].output[0] if nodes else name
        nodes.append(helper.make_node(kind, [before, *names], [f"{name}_{len(nodes)}"], **attributes))

    then("Transpose", perm=[0, 3, 1, 2])
    if preprocess.channels == "bgr":
        then("Gather", np.array([2, 1, 0], np.int64), axis=1)
    then("Cast", to=TensorProto.FLOAT)
    if preprocess.input_range == 1:
        then("Div", np.array(255, np.float32))
    then("Sub", np.array(preprocess.mean, np.float32).reshape(1, 3, 1, 1))
    then("Div", np.array(preprocess.std, np.float32).reshape(1, 3, 1, 1))
    nodes[-1].output[0] = target.name

    pixels = helper.make_tensor_value_info(name, TensorProto.UINT8, [None] * 4)
    for dim, size in zip(pixels.type.tensor_type.shape.dim, (n, height, width), strict=False):
        dim.CopyFrom(size)
    pixels.type.tensor_type.shape.dim[3].dim_value = 3
    return nodes, pixels
