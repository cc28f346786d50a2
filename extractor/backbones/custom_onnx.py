"""Import of a custom ONNX file as a backbone: find its input and its features, and rewrite its graph in penult's form.

Whatever the file looks like (NCHW or NHWC, float or uint8, fixed batch), the result takes normalised float32 pixels
``(batch, 3, s, s)`` and gives ``(batch, d)``. It is compared with the custom file before it is used. What the file does not
say must be given by flags or in a TOML file of its name: a guess would silently cost accuracy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, Layer
from extractor.graphs.classification_layer import Graph
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import cut, keep_zero_padding
from extractor.graphs.parity import PARITY, relative_l2
from extractor.graphs.pooling import axes_warning, count_prefix, pooled, pooling_nodes, pooling_of, prefix_warning, token_joins
from extractor.graphs.reasons import reason
from extractor.graphs.row_independence import over_the_batch, require_rows
from extractor.pixels.preprocess import Preprocess
from extractor.runtime.session import MAX_DIM
from store.errors import BadDataError, UsageError

from .feature_tensors import Choice, choose_tensors, class_counts, outputs_of, warnings_of
from .model_config import OPTIONS, ModelConfig, stated_by
from .onnx_input import Input, image_input, preprocessing
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
    load_data(model, file)
    model = _inlined(model)
    require_domains(model, file)  # also of its functions
    graph = Graph(model)
    stated = stated_by(file, backbone.onnx_input)
    layers = list(backbone.layers) or stated.settings.get("layer", [])
    pooling = backbone.pooling or stated.settings.get("pooling")
    begin, preprocess, choice, reading = _read(model, graph, stated, layers, file)
    tensors = choice.tensors
    dynamic = require_rows(graph, tensors, begin.batch, file)
    pixels = np.random.default_rng(0).uniform(-1, 1, (BATCH, 3, preprocess.crop, preprocess.crop)).astype(np.float32)
    if preprocess.input_range == 255:
        pixels = np.rint((pixels + 1) * 127.5)
    joins = token_joins(graph)
    with onnx_file.replacing(target) as new:
        values = run_whole(model, [*tensors, *choice.scores, *joins], begin, pixels, file, new)
        expected = [require_features(values, tensor, file) for tensor in tensors]
        feature_sets, prefixes = _feature_sets(tensors, expected, [values[name] for name in joins], pooling or "average", file)
        if prefixes:
            reading["prefix_tokens"] = prefixes
        if not pooling:
            shapes = {tensor: rows.shape for tensor, rows in zip(tensors, expected, strict=True)}
            reading["warnings"] += [prefix_warning(name, prefixes[name], shapes[name][1]) for name in prefixes]
            reading["warnings"] += filter(None, (axes_warning(name, shapes[name], prefixes.get(name, 0)) for name in shapes))
        doubts = warnings_of(graph, choice, [layer.dim for layer in feature_sets], file)
        reading["warnings"] += doubts.values()
        reading |= class_counts(choice, values) | ({"doubtful": list(doubts)} if doubts else {})
        facts = BackboneFacts(
            "onnx",
            file.name,
            digest,
            tuple(feature_sets),
            preprocess,
            source=f"from {file.name}",
            zero_padded_pooling=keep_zero_padding(model),
            reading=reading,
        )
        say_warnings(facts)
        return _write(model, begin, facts, pixels, expected, new, only_fixed=dynamic)


def _feature_sets(
    tensors: Sequence[str], values: Sequence[NDArray[Any]], joins: Sequence[NDArray[Any]], pooling: str, file: Path
) -> tuple[list[Layer], dict[str, int]]:
    """How each tensor becomes one vector per image, and the number of tokens before the patches where there are any.

    Raises:
        BadDataError, UsageError: it cannot; as `pooling_of`, or there are too many features.
    """
    layers, prefixes = [], {}
    for tensor, rows, output in zip(tensors, values, backbone_facts.name_outputs(len(tensors)), strict=True):
        if rows.ndim == 3 and (prefix := count_prefix(rows.shape[1], joins)):
            prefixes[tensor] = prefix
        kind, dim = pooling_of(rows.shape, tensor, pooling, prefixes.get(tensor, 0))
        if not 0 < dim <= MAX_DIM:
            message = f"{file}: {tensor!r} gives {dim} features; expected at most {MAX_DIM}. Choose another with --layer"
            raise BadDataError(message)
        layers.append(Layer(tensor, kind, dim, output))
    return layers, prefixes


def _inlined(model: Any) -> Any:
    """The model with its own functions written out where they are called, so that its operators can be seen."""
    from onnx import inliner

    return inliner.inline_local_functions(model) if model.functions else model


def _read(
    model: Any, graph: Graph, stated: ModelConfig, layers: Sequence[str], file: Path
) -> tuple[Input, Preprocess, Choice, dict[str, Any]]:
    """The input of a graph, its preprocessing and its features, and how they were found.

    Raises:
        UsageError: something must be stated; names all of it at once.
        BadDataError: it is not a network from one image to features, or it is not clear where the features are.
    """
    missing: list[str] = []
    assumed: list[str] = []
    begin = image_input(model, file, stated.settings.get("layout"), missing)
    preprocess = preprocessing(begin, stated, file, missing, assumed)
    try:
        choice = choose_tensors(graph, layers, file)
    except (BadDataError, UsageError) as error:
        if isinstance(error, BadDataError):
            require_rows(graph, outputs_of(graph), begin.batch, file)
        if not missing:
            raise
        missing.append(str(error))
    if missing:
        listing = " ".join(f"({i}) {each}" for i, each in enumerate(missing, 1))
        message = missing[0] if len(missing) == 1 else f"{len(missing)} things must be stated. {listing}"
        raise UsageError(message)
    assert preprocess is not None  # for mypy: nothing is missing
    sources = stated.sources | ({"crop": "the file"} if begin.side else {})
    sources |= {flag[2:].partition(" ")[0]: "assumed" for flag in assumed}
    reading: dict[str, Any] = {"features": dict(zip(choice.tensors, choice.how, strict=True)), "settings": sources}
    unsaid = f"{file.name} does not say how images are resized; using the usual {' '.join(assumed)}"
    reading["warnings"] = [unsaid] if assumed else []
    if begin.arithmetic and (set(preprocess.mean), set(preprocess.std)) != ({0.0}, {1.0}):
        reading["warnings"].append(
            f"{file.name} computes with its pixels before its first convolution ({', '.join(begin.arithmetic)}), and mean and "
            f"deviation are applied before that, too; if the file normalises its pixels itself, pass --mean 0 --std 1"
        )
    by_file = {source: [name for name, each in sources.items() if each == source] for source in dict.fromkeys(sources.values())}
    for source, names in by_file.items():
        if source not in (OPTIONS, "assumed", "the file"):
            log.info("%s: %s as %s beside it says", file.name, ", ".join(names), source)
    return begin, preprocess, choice, reading


def say_warnings(facts: BackboneFacts) -> None:
    """Log what the user should know about how a file was read, each time that it is used."""
    for warning in facts.reading.get("warnings", []):
        log.warning("%s", warning)


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
    facts: BackboneFacts,
    pixels: NDArray[np.float32],
    expected: Sequence[NDArray[Any]],
    new: Path,
    *,
    only_fixed: bool,
) -> BackboneFacts:
    """Cut, save, compare: with a free batch size if the graph allows it, else with its own."""
    import onnx
    from onnx import TensorProto, helper

    kinds = {TensorProto.FLOAT16 if begin.dtype == "float16" else None, *(each.data_type for each in model.graph.initializer)}
    side, limit = facts.preprocess.crop, PARITY_FLOAT16 if TensorProto.FLOAT16 in kinds else PARITY
    suspects = over_the_batch(Graph(model), [layer.layer for layer in facts.layers])
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=1)
    prefix = _free_names(model, facts.outputs)
    ends = []
    for layer, rows in zip(facts.layers, expected, strict=True):
        nodes = pooling_nodes(prefix + layer.layer, rows.shape, layer.pooling, f"{layer.output}_raw", opset)
        ends.append(([*nodes, _cast(f"{layer.output}_raw", layer.output, "float32")], layer.output, layer.dim))
    front = _front(replace(begin, name=prefix + begin.name))
    cut(model, ends, front, [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, side, side])])
    for batch in [size for size in (None, begin.batch) if size or not only_fixed][: 2 if begin.batch else 1]:
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
                float(relative_l2(a, pooled(b.astype(np.float64), layer.pooling, layer.layer)).max())
                for a, b, layer in zip(features, expected, facts.layers, strict=True)
            )
            mixed = _mixed(new, pixels, facts)
        except Exception as error:  # onnxruntime's exceptions have no common public base
            worst, why = np.inf, reason(error)
        else:
            why = f"features differ by {worst:.1e} from the file's own; the limit is {limit}"
            if worst <= limit < mixed:
                worst = mixed
                operators = f" ({', '.join(suspects)} along the first axis)" if suspects else ""
                why = f"features of an image depend on the others of its batch{operators}; is it in training mode?"
        if worst <= limit:
            return facts
    message = f"{facts.weights} cannot be used as a backbone: {why}"
    raise BadDataError(message)


def _mixed(path: Path, pixels: NDArray[np.float32], facts: BackboneFacts) -> float:
    """By how much the features of an image change with the others of its batch, which are all black and all white."""
    beside = pixels.copy()
    beside[1:] = np.array([pixels.min(), pixels.max()], np.float32).reshape(2, 1, 1, 1)
    pairs = zip(_run_new(path, pixels[:1], facts), _run_new(path, beside, facts), strict=True)
    return max(float(relative_l2(alone, rows[:1]).max()) for alone, rows in pairs)


def _run_new(path: Path, pixels: NDArray[np.float32], facts: BackboneFacts) -> list[NDArray[np.float32]]:
    session = cpu_session(path)
    step = facts.batch or len(pixels)
    parts = []
    for start in range(0, len(pixels), step):
        part = pixels[start : start + step]
        padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), np.float32)])
        parts.append([rows[: len(part)] for rows in session.run(facts.outputs, {"pixels": padded})])
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
    reading = {name: value for name, value in facts.reading.items() if name != "scores"}  # they are cut off
    # the digest in its metadata may be forged
    facts = replace(facts, weights_sha256=digest, zero_padded_pooling=padded, reading=reading)
    del model.metadata_props[:]
    backbone_facts.write_facts(model, facts)
    say_warnings(facts)
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
        message = f"{file}: its external data cannot be read: {reason(error)}"
        raise BadDataError(message) from error


def run_whole(
    model: Any, tensors: Sequence[str], begin: Input, pixels: NDArray[np.float32], file: Path, path: Path | None = None
) -> dict[str, NDArray[Any]]:
    """The values of tensors in the custom file's own graph, for normalised pixels ``(n, 3, s, s)``, one row per image.

    Args:
        model: the content of ``file``.
        tensors: their names.
        begin: its input.
        pixels: what it is run on.
        file: for messages.
        path: where ONNX Runtime reads the graph from; it may stay there.

    Raises:
        BadDataError: ONNX Runtime cannot run it.
    """
    from onnx import ModelProto, ValueInfoProto

    names = list(dict.fromkeys(tensors))
    whole = ModelProto()
    whole.CopyFrom(model)
    present = {value.name for value in whole.graph.output}
    whole.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in present)
    step = begin.batch or len(pixels)
    parts: dict[str, list[Any]] = {name: [] for name in names}
    if path is not None:
        onnx_file.save(whole, path)
    try:
        session = cpu_session(path or whole.SerializeToString(), optimised=False)  # what the graph says, unoptimised
        for start in range(0, len(pixels), step):
            part = pixels[start : start + step]
            padded = np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), np.float32)])
            for name, values in zip(names, session.run(names, {begin.name: begin.of(padded)}), strict=True):
                parts[name].append(values if np.shape(values)[:1] != (step,) else values[: len(part)])
    except Exception as error:  # onnxruntime's exceptions have no common public base
        message = f"{file} cannot be run: {reason(error)}"
        raise BadDataError(message) from error
    return {name: np.concatenate(each) if np.ndim(each[0]) else np.asarray(each[0]) for name, each in parts.items()}


def require_features(values: Mapping[str, NDArray[Any]], tensor: str, file: Path) -> NDArray[np.float32]:
    """The values of a tensor for a batch of `BATCH`, which must be finite floats, one row per image.

    Raises:
        BadDataError: says what they are.
    """
    rows = values[tensor]
    if rows.ndim == 0 or len(rows) != BATCH:
        message = f"{file}: {tensor!r} has shape {rows.shape} for {BATCH} images, not features of each"
        raise BadDataError(message)
    if rows.dtype.kind != "f":
        message = f"{file}: {tensor!r} is {rows.dtype} of shape {rows.shape}, not features; choose another with --layer"
        raise BadDataError(message)
    if not np.isfinite(rows).all():
        message = f"{file} gives NaN or infinity in {tensor!r} for ordinary pixels; it is damaged, or takes another range"
        raise BadDataError(message)
    return rows


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
