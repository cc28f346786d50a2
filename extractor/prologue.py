"""Normalisation as the first nodes of a graph: a session then takes pixels as they are decoded, a quarter of the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .onnxfile import external_files, read_model
from .preprocess import Preprocess

INPUT = "penult_pixels"


def takes_pixels(path: Path, preprocess: Preprocess) -> bytes | None:
    """A backbone, serialised, with an input of ``(n, h, w, 3)`` uint8 pixels before the one it has.

    The operations and their order are those of `Preprocess.normalise`, so the features are the same bits; multiplying by
    1/std instead would save half of the time and move them by 3e-7.

    Returns:
        None where weights lie in a second file: a graph in memory cannot refer to it.

    Raises:
        BadDataError, InputMissingError: not an ONNX file.
    """
    from onnx import TensorProto, helper, numpy_helper

    model = read_model(path)
    graph = model.graph
    if external_files(model):
        return None
    weights = {tensor.name for tensor in graph.initializer}
    target = next(value for value in graph.input if value.name not in weights)
    n, _, height, width = target.type.tensor_type.shape.dim

    nodes: list[Any] = []

    def then(kind: str, *constants: Any, **attributes: Any) -> None:
        names = [f"{INPUT}_constant_{len(nodes)}" for _ in constants]
        graph.initializer.extend(numpy_helper.from_array(value, name) for value, name in zip(constants, names, strict=True))
        before = nodes[-1].output[0] if nodes else INPUT
        nodes.append(helper.make_node(kind, [before, *names], [f"{INPUT}_{len(nodes)}"], **attributes))

    then("Transpose", perm=[0, 3, 1, 2])
    if preprocess.channels == "bgr":
        then("Gather", np.array([2, 1, 0], np.int64), axis=1)
    then("Cast", to=TensorProto.FLOAT)
    if preprocess.input_range == 1:
        then("Div", np.array(255, np.float32))
    then("Sub", np.array(preprocess.mean, np.float32).reshape(1, 3, 1, 1))
    then("Div", np.array(preprocess.std, np.float32).reshape(1, 3, 1, 1))
    nodes[-1].output[0] = target.name

    graph.input.remove(target)
    pixels = graph.input.add()
    pixels.CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [None] * 4))
    for dim, size in zip(pixels.type.tensor_type.shape.dim, (n, height, width), strict=False):
        dim.CopyFrom(size)
    pixels.type.tensor_type.shape.dim[3].dim_value = 3
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return bytes(model.SerializeToString())
