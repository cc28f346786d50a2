"""Import of a custom ONNX file as a backbone: find its input and its features, and rewrite its graph in penult's form.

Whatever the file looks like (NCHW or NHWC, float or uint8, fixed batch), the result takes normalised float32 pixels
``(batch, 3, s, s)`` and gives ``(batch, d)``. It is compared with the custom file before it is used. What the file does not
say must be given by flags or in a TOML file of its name: a guess would silently cost accuracy.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, Layer
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import Graph, cut, keep_zero_padding, pooling_nodes, spatial_axes
from extractor.graphs.parity import PARITY, relative_l2
from extractor.runtime.session import MAX_DIM
from store.errors import BadDataError, UsageError, did_you_mean

from .onnx_input import Input, image_input, preprocessing, read_sidecar
from .registry import Backbone

log = logging.getLogger("penult.extractor")

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # operators that ONNX Runtime computes without custom code
BATCH = 3
PARITY_FLOAT16 = 2e-3  # relative L2 per row, for networks that compute in float16: fusing two operations rounds once less


def is_own(file: Path) -> bool:
    """Whether penult made an ONNX file, whose metadata then holds all facts.

    Raises:
        InputMissingError, BadDataError: as `onnx_file.read_model`.
    """
    return backbone_facts.facts_in(onnx_file.read_model(file)) is not None


def import_onnx(backbone: Backbone, target: Path) -> BackboneFacts:
    """Make a backbone file from a custom ONNX file; one that penult made is taken as it is.

    Raises:
        UsageError: a setting of the ONNX input is missing, superfluous or unknown; says which to give.
        BadDataError: the file is damaged, or not a network from one image to features.
        InputMissingError: the file, or its external data, is not there.
    """
    file = Path(backbone.name)
    model = onnx_file.read_model(file)
    digest = onnx_file.digest(file)  # also finds external data, before anything loads it
    facts = backbone_facts.facts_in(model)
    if facts is not None:
        return _own(backbone, facts, model, digest, target)
    require_domains(model, file)
    sidecar = read_sidecar(file)
    if sidecar:
        log.info("%s says how %s is used", file.with_suffix(".toml"), file.name)
    settings = {**sidecar, **backbone.onnx_input}
    layers = list(backbone.layers) or settings.pop("layer", [])
    pooling = backbone.pooling or settings.pop("pooling", "average")
    load_data(model, file)
    begin = image_input(model, file, settings.get("layout"))
    preprocess = preprocessing(begin, settings, file)
    graph = Graph(model)
    tensors = choose_tensors(graph, layers, file)
    pixels = np.random.default_rng(0).uniform(-1, 1, (BATCH, 3, preprocess.crop, preprocess.crop)).astype(np.float32)
    if preprocess.input_range == 255:
        pixels = np.rint((pixels + 1) * 127.5)
    expected = run_whole(model, tensors, begin, pixels, file)
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=1)
    ends, feature_sets = [], []
    outputs = backbone_facts.name_outputs(len(tensors))
    prefix = _free_names(model, outputs)
    begin = replace(begin, name=prefix + begin.name)
    for tensor, values, output in zip(tensors, expected, outputs, strict=True):
        nodes, kind, dim = pooling_nodes(prefix + tensor, values.shape, pooling, f"{output}_raw", opset)
        if not 0 < dim <= MAX_DIM:
            message = f"{file}: {tensor!r} gives {dim} features; expected at most {MAX_DIM}. Choose another with --layer"
            raise BadDataError(message)
        ends.append(([*nodes, _cast(f"{output}_raw", output, "float32")], output, dim))
        feature_sets.append(Layer(tensor, kind, dim, output))
    facts = BackboneFacts(
        "onnx",
        file.name,
        digest,
        tuple(feature_sets),
        preprocess,
        source=f"from {file.name}",
        zero_padded_pooling=keep_zero_padding(model),
    )
    with onnx_file.replacing(target) as new:
        return _write(model, begin, ends, facts, pixels, expected, new)


def _free_names(model: Any, outputs: Sequence[str]) -> str:
    """Prefix the graph's tensors if one has a name that penult uses, such as ``features``; return the prefix."""
    from onnx.compose import add_prefix_graph

    used = {name for node in model.graph.node for name in (*node.input, *node.output)}
    needed = {"pixels", *outputs, *(f"{output}_raw" for output in outputs)}
    if not needed & used and not any(name.startswith("penult_") for name in used):
        return ""
    prefix = "their_"
    add_prefix_graph(model.graph, prefix, inplace=True)
    return prefix


def _write(
    model: Any,
    begin: Input,
    ends: Sequence[tuple[list[Any], str, int]],
    facts: BackboneFacts,
    pixels: NDArray[np.float32],
    expected: Sequence[NDArray[Any]],
    new: Path,
) -> BackboneFacts:
    """Cut, save, compare: with a free batch size if the graph allows it, else with its own."""
    import onnx
    from onnx import TensorProto, helper

    kinds = {TensorProto.FLOAT16 if begin.dtype == "float16" else None, *(each.data_type for each in model.graph.initializer)}
    side, limit = facts.preprocess.crop, PARITY_FLOAT16 if TensorProto.FLOAT16 in kinds else PARITY
    front = _front(begin)
    cut(model, ends, front, [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, side, side])])
    for batch in (None, begin.batch) if begin.batch else (None,):
        facts = replace(facts, batch=batch)
        if batch:
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
            for output in model.graph.output:
                output.type.tensor_type.shape.dim[0].dim_value = batch
            del model.metadata_props[:]
        backbone_facts.write_facts(model, facts)
        if onnx_file.external_files(model):  # the first attempt has put them there
            load_data(model, new)
        onnx_file.remove(new)
        onnx_file.save(model, new)
        try:
            onnx.checker.check_model(str(new))
            features = _run_new(new, pixels, facts)
            worst = max(
                float(relative_l2(a, _pooled(b, layer)).max())
                for a, b, layer in zip(features, expected, facts.layers, strict=True)
            )
            alone = _run_new(new, pixels[:1], facts)  # in training mode, a normalisation mixes the images of a batch
            mixed = max(float(relative_l2(a, b[:1]).max()) for a, b in zip(alone, features, strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common public base
            worst, reason = np.inf, str(error).strip().splitlines()[0]
        else:
            reason = f"features differ by {worst:.1e} from the file's own; the limit is {limit}"
            if worst <= limit < mixed:
                worst = mixed
                reason = "features of an image depend on the others of its batch (training mode, or dynamic quantisation)"
        if worst <= limit:
            return facts
    message = f"{facts.weights} cannot be used as a backbone: {reason}"
    raise BadDataError(message)


def _pooled(values: NDArray[Any], layer: Layer) -> NDArray[np.float64]:
    """The expected output of the pooling nodes, computed with NumPy."""
    exact = values.astype(np.float64)
    if layer.pooling == "none":
        return exact
    if layer.pooling == "token":
        return np.asarray(exact[:, 0])
    axes, _ = spatial_axes(values.shape, layer.layer, layer.pooling)
    return np.asarray(exact.max(tuple(axes)) if layer.pooling == "max" else exact.mean(tuple(axes)))


def _run_new(path: Path, pixels: NDArray[np.float32], facts: BackboneFacts) -> list[NDArray[np.float32]]:
    session = cpu_session(path)
    step = facts.batch or len(pixels)
    parts = []
    for start in range(0, len(pixels), step):
        part = pixels[start : start + step]
        padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), np.float32)])
        outputs = session.run(facts.outputs, {"pixels": padded})
        parts.append([_rows(output, step, name)[: len(part)] for output, name in zip(outputs, facts.outputs, strict=True)])
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _own(backbone: Backbone, facts: BackboneFacts, model: Any, digest: str, target: Path) -> BackboneFacts:
    """Take a file that penult made; its metadata holds all facts."""
    file = Path(backbone.name)
    superfluous = [f"--{name.replace('_', '-')}" for name in backbone.onnx_input]
    superfluous += ["--layer"] if backbone.layers else []
    superfluous += ["--pooling"] if backbone.pooling else []
    if superfluous:
        message = f"{file} describes its own input and features: leave {', '.join(superfluous)} out"
        raise UsageError(message)
    load_data(model, file)
    padded = keep_zero_padding(model) or facts.zero_padded_pooling
    facts = replace(facts, weights_sha256=digest, zero_padded_pooling=padded)  # the digest in its metadata may be forged
    del model.metadata_props[:]
    backbone_facts.write_facts(model, facts)
    with onnx_file.replacing(target) as new:
        onnx_file.save(model, new)
    return facts


def require_domains(model: Any, file: Path) -> None:
    """Refuse a file with operators that are neither standard nor ONNX Runtime's own.

    Raises:
        BadDataError: names their domains.
    """
    foreign = sorted({node.domain for node in model.graph.node} - set(DOMAINS) - {each.domain for each in model.functions})
    if foreign:
        message = f"{file} needs operators of {', '.join(foreign)}, which run custom code; export it with standard operators"
        raise BadDataError(message)


def load_data(model: Any, file: Path) -> None:
    """Read a model's external data into memory.

    Raises:
        BadDataError: it is missing or does not fit the model.
    """
    from onnx.external_data_helper import load_external_data_for_model

    try:
        load_external_data_for_model(model, str(file.resolve().parent))
    except Exception as error:  # ValidationError, ValueError: a file shorter than the tensors in it
        message = f"{file}: its external data cannot be read: {error}"
        raise BadDataError(message) from error


def choose_tensors(graph: Graph, layers: Sequence[str], file: Path) -> list[str]:
    """Names of the tensors that are the features: the requested ones, or the penultimate one.

    Raises:
        UsageError: unknown names, with the nearest; several outputs and none chosen.
        BadDataError: it is unclear whether there is a classification layer.
    """
    known = graph.tensors()
    if "penultimate" in layers and "penultimate" not in known:
        layers = [choose_tensors(graph, (), file)[0] if layer == "penultimate" else layer for layer in layers]
    if len(set(layers)) != len(layers):
        message = f"--layer {' --layer '.join(layers)}: one of them is named twice"
        raise UsageError(message)
    for layer in layers:
        if layer not in known:
            hint = did_you_mean(layer, known, f"its last ones are {', '.join(known[-4:])}")
            message = f"--layer {layer}: {file} has no such tensor{hint}"
            raise UsageError(message)
    if layers:
        return list(layers)
    outputs = [value.name for value in graph.graph.output]
    if len(outputs) != 1:
        listing = ", ".join(outputs)
        message = f"{file} has {len(outputs)} outputs ({listing}). Choose the features, such as --layer {outputs[0]}"
        raise UsageError(message)
    tensor = graph.classifier_input(outputs[0])
    if tensor is None:
        log.info("%s: no classification layer before the output %r, which is used as it is", file.name, outputs[0])
        return outputs
    log.info("%s: cut at %r, the input of its classification layer", file.name, tensor)
    return [tensor]


def run_whole(
    model: Any, tensors: Sequence[str], begin: Input, pixels: NDArray[np.float32], file: Path
) -> list[NDArray[np.float32]]:
    """The values of tensors in the custom file's own graph, for normalised pixels ``(n, 3, s, s)``.

    Raises:
        BadDataError: ONNX Runtime cannot run it, or a value is not a finite float.
    """
    from onnx import ModelProto, ValueInfoProto

    whole = ModelProto()
    whole.CopyFrom(model)
    present = {value.name for value in whole.graph.output}
    whole.graph.output.extend(ValueInfoProto(name=name) for name in tensors if name not in present)
    step = begin.batch or len(pixels)
    parts = []
    with tempfile.TemporaryDirectory(prefix="penult-") as folder:
        path = Path(folder) / "whole.onnx"
        onnx_file.save(whole, path)
        try:
            session = cpu_session(path, optimised=False)  # what the graph says, whatever an optimiser makes of it
            for start in range(0, len(pixels), step):
                part = pixels[start : start + step]
                padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), np.float32)])
                outputs = session.run(list(tensors), {begin.name: begin.of(padded)})
                parts.append([_rows(each, step, name)[: len(part)] for each, name in zip(outputs, tensors, strict=True)])
        except BadDataError as error:
            message = f"{file}: {error}"
            raise BadDataError(message) from error
        except Exception as error:  # onnxruntime's exceptions have no common public base
            message = f"{file} cannot be run: {str(error).strip().splitlines()[0]}"
            raise BadDataError(message) from error
    values = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    for tensor, value in zip(tensors, values, strict=True):
        if value.dtype.kind != "f":
            message = f"{file}: {tensor!r} is {value.dtype} of shape {value.shape}, not features; choose another with --layer"
            raise BadDataError(message)
        if not np.isfinite(value).all():
            message = f"{file} gives NaN or infinity in {tensor!r} for ordinary pixels; it is damaged, or takes another range"
            raise BadDataError(message)
    return values


def _rows(values: NDArray[Any], images: int, tensor: str) -> NDArray[Any]:
    """The values of a tensor for a batch, which must have one row per image."""
    if values.ndim == 0 or len(values) != images:
        message = f"{tensor!r} has shape {values.shape} for {images} images, not features of each"
        raise BadDataError(message)
    return values


def _front(begin: Input) -> list[Any]:
    """The nodes from normalised float32 ``pixels`` (batch, 3, s, s) to what the graph's own input takes."""
    from onnx import helper

    nodes, name = [], "pixels"
    if begin.dtype == "uint8":
        nodes.append(helper.make_node("Round", [name], ["penult_rounded"]))
        name = "penult_rounded"
    if begin.layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [name], ["penult_last"], perm=[0, 2, 3, 1]))
        name = "penult_last"
    return [*nodes, _cast(name, begin.name, begin.dtype)]


def _cast(name: str, result: str, dtype: str) -> Any:
    from onnx import TensorProto, helper

    return helper.make_node("Cast", [name], [result], to=getattr(TensorProto, {"float32": "FLOAT"}.get(dtype, dtype.upper())))
