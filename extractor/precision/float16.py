"""Conversion of a backbone to float16, for tensor cores: half the bytes, and several times the speed on a GPU that has them.

Inputs and outputs stay float32, and pixels are normalised in float32 before. The error comes from rounding weights and
activations; sums are float32 inside cuDNN and cuBLAS. In some networks the first layers do not tolerate this (a depthwise
layer with a scale of 56 moved the features of one MobileNetV2 by 3 %): there, as many layers as necessary stay in float32.
This is decided on the CPU and fixed in the file. On a CPU, ONNX Runtime computes float16 in float32 and often does not round
between layers, while a GPU gives infinity beyond 65504; so the graph that is judged is float32 and rounds where a GPU does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import WEIGHTED, in_order, name_nodes
from extractor.graphs.parity import cosines, relative_l2
from extractor.graphs.reasons import reason
from extractor.pixels.preprocess import Preprocess
from extractor.runtime.session import Embedder
from store.errors import BadDataError

from .registry import Conversion, TrainingImages

log = logging.getLogger("penult.extractor")

BOUND, COSINE = 1e-2, 0.9995  # relative L2 and cosine of every row to float32, see docs/gpu.md
ENOUGH = 6e-3  # photos do worse than the noise images here, and a GPU sums in another order
FLOAT_LAYERS = (0, 1, 2, 4, 8, 16)  # numbers of layers at the input that are tried in float32
IMAGES, BATCH = 16, 4


def conversion(_images: TrainingImages) -> Conversion:
    """The `Conversion` to float16; it needs no images."""
    return lambda source, out, facts: (to_float16(source, out, facts), None)


def describe(calibration: dict[str, Any]) -> str:
    """The outcome in words."""
    floats = len(calibration["float_layers"])
    return f"float16, {floats} layer(s) in float32; features moved by {calibration['moved']:.1e} at most"


def to_float16(source: Path, out: Path, facts: BackboneFacts) -> BackboneFacts:
    """Convert a float32 backbone to float16, after measuring how far that moves its features.

    Args:
        source: the ONNX file.
        out: the new one.
        facts: of the file.

    Returns:
        The facts of the new file: ``precision`` is ``fp16``.

    Raises:
        BadDataError: the features move by more than `BOUND`, or overflow; or the network cannot be converted.
        StorageError: the file cannot be written.
    """
    model = onnx_file.read_model(source)
    if onnx_file.external_files(model):
        message = f"{facts.name} has weights over 2 GB, which --precision fp16 is not made for; use --precision fp32"
        raise BadDataError(message)
    name_nodes(model.graph)
    nodes = in_order(model.graph.node)
    places = [i for i, node in enumerate(nodes) if node.op_type in WEIGHTED]
    layers = [nodes[i].name for i in places]
    pixels = noise_images(facts.preprocess)
    exact = Embedder(source, facts.preprocess, outputs=facts.outputs).embed(pixels)
    worst, cosine = np.inf, -1.0
    for count in sorted({min(count, len(layers)) for count in FLOAT_LAYERS}):
        front = nodes[: places[count]] if count < len(places) else nodes  # activations too: they may overflow
        converted = _convert(model, [node.name for node in front] if count else [])
        worst, cosine = compare(embed_as_on_a_gpu(converted, facts, pixels), exact)
        log.debug("float16 with %d layers in float32: features move by %.1e, cosine %.6f", count, worst, cosine)
        if worst <= ENOUGH:
            break
    if not (worst <= BOUND and cosine >= COSINE):
        message = (
            f"float16 moves the features of {facts.name} by {worst:.1e} (cosine {cosine:.5f}), even with {count} layers in "
            f"float32; {BOUND} and {COSINE} are allowed. Use --precision fp32"
        )
        raise BadDataError(message)
    kept_text = f"{count} of {len(layers)} layers stay in float32" + (", so tensor cores stay off" if count else "")
    log.info("float16: %s; features move by %.1e at most", kept_text, worst)
    kept = layers[:count]
    calibration = {
        "sha256": hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
        "float_layers": kept,
        "moved": float(f"{worst:.2e}"),
        "cosine": round(cosine, 6),
    }
    facts = replace(facts, precision="fp16", calibration=calibration)
    del converted.metadata_props[:]
    for entry in model.metadata_props:  # entries that penult did not write
        if not entry.key.startswith(backbone_facts.PREFIX):
            converted.metadata_props.add().CopyFrom(entry)
    backbone_facts.write_facts(converted, facts)
    onnx_file.save(converted, out)
    return facts


def compare(rounded: Sequence[NDArray[np.float32]], exact: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """Largest relative L2 and smallest cosine of a row, over all feature sets; infinity and -1 if a value is not finite."""
    if not all(np.isfinite(rows).all() for rows in rounded):
        return float("inf"), -1.0
    distances = [relative_l2(a, b).max() for a, b in zip(rounded, exact, strict=True)]
    return float(max(distances)), float(cosines(exact, rounded).min())


def noise_images(preprocess: Preprocess) -> NDArray[np.uint8]:
    """Coloured noise ``(n, h, w, 3)``, from coarse to fine: shapes and textures of many sizes, the same each time."""
    from PIL import Image

    side, rng = preprocess.crop, np.random.default_rng(0)
    images = []
    for i in range(IMAGES):
        levels = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((side, side), 3), np.float64)
            for cells in (2, 4, 8, 16, 32, side)
        ]
        weights = np.array([2.0 ** (-k * i / IMAGES) for k in range(len(levels))])
        mixed = np.tensordot(weights / weights.sum(), levels, 1)
        spread = (mixed - mixed.mean()) * (60 / max(mixed.std(), 1e-9)) + rng.uniform(90, 150)
        images.append(np.clip(spread, 0, 255).astype(np.uint8))
    return np.stack(images)


def embed_as_on_a_gpu(model: Any, facts: BackboneFacts, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Features of a float16 graph as a GPU computes them, with every float16 tensor rounded; ``(n, d)`` for each feature set.

    Raises:
        BadDataError: they cannot be computed.
    """
    size = facts.batch or BATCH
    try:
        session = cpu_session(_rounding(model).SerializeToString(), optimised=False)
        name = session.get_inputs()[0].name
        outputs = []
        for begin in range(0, len(pixels), size):
            batch = pixels[np.arange(begin, begin + size) % len(pixels)]
            outputs.append(session.run(facts.outputs, {name: facts.preprocess.normalise(batch)}))
    except Exception as error:  # onnxruntime's exceptions have no common public base
        message = f"{facts.name} cannot be judged in float16: {reason(error)}; use --precision fp32"
        raise BadDataError(message) from error
    return [np.concatenate(parts)[: len(pixels)] for parts in zip(*outputs, strict=True)]


def _rounding(source: Any) -> Any:
    """The same graph in float32, in which every tensor that was float16 is rounded to it: cast there and back."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.shape_inference.infer_shapes(source)
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants = [*graph.initializer, *(each.t for node in graph.node for each in node.attribute)]
    for tensor in constants:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for each in node.attribute:
            if each.name == "to" and each.i == TensorProto.FLOAT16:
                each.i = TensorProto.FLOAT
        for i, name in enumerate(node.output):
            if name not in kinds:  # of an operator that is not ONNX's own
                kinds[name] = TensorProto.FLOAT16 if TensorProto.FLOAT16 in map(kinds.get, node.input) else 0
            if kinds[name] == TensorProto.FLOAT16:
                node.output[i] = f"{name}/exact"
                nodes.append(helper.make_node("Cast", [node.output[i]], [f"{name}/half"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}/half"], [name], to=TensorProto.FLOAT))
    rounded = [type(node).FromString(node.SerializeToString()) for node in nodes]  # the graph's own nodes end with its list
    del graph.node[:], graph.value_info[:]
    graph.node.extend(rounded)
    return model


def _convert(model: Any, in_float: Sequence[str]) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted = type(model)()
    converted.CopyFrom(model)
    try:
        converted = convert_float_to_float16(converted, keep_io_types=True, node_block_list=list(in_float))
    except Exception as error:  # a graph with types that its inference does not understand
        message = f"this network cannot be converted to float16: {reason(error)}; use --precision fp32"
        raise BadDataError(message) from error
    _tidy_casts(converted.graph)
    return converted


def _tidy_casts(graph: Any) -> None:
    """Remove what the converter leaves: the same cast for each consumer of a tensor, all casts at the end, types declared
    twice, and float16 between two nodes that stay in float32, where it would overflow."""
    made: dict[str, Any] = {}
    for node in graph.node:
        made.setdefault(node.output[0], node)
    exact = {}
    for name, node in made.items():
        before = made.get(node.input[0]) if node.op_type == "Cast" else None
        if before is not None and before.op_type == "Cast" and name.endswith("_cast_to_fp32"):
            exact[name] = before.input[0]
    nodes = [node for name, node in made.items() if name not in exact]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = exact.get(name, name)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    nodes = in_order([node for node in nodes if node.op_type != "Cast" or node.output[0] in used])
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
