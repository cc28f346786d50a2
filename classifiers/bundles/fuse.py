"""Fusing a bundle into one ONNX file, from decoded pixels to probabilities, and the self-test of bundles and fused files.

Reading, resizing and cropping stay outside: images of many sizes do not form a batch, and on 25 photos 0.3 % of the pixels of
ONNX Runtime's Resize (with antialias) differed from Pillow's, by up to 5 levels, which is more than features tolerate.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.backbones.custom_onnx import load_data, require_domains
from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import PREFIX
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import cut
from extractor.graphs.normalisation import pixel_nodes
from extractor.graphs.reasons import reason
from extractor.precision.registry import precision_of
from store.errors import BadDataError
from store.format.atomic import require_no_part_of
from store.format.output import require_free
from store.format.shard import MAX_ROUNDING
from store.progress.stages import staged

from .bundle import Bundle, task_of_bundle
from .bundle_folder import BUNDLE_FILES
from .fused import GOLDEN, INPUT, LABEL, NO_LABEL, RECIPE, Fused, Golden, golden_images, is_fused
from .predictor import Predictor

log = logging.getLogger("penult.classifiers")

NO_NUMBERS = (np.nan, np.inf, -np.inf)
PARITY = 1e-5  # of probabilities, against the head on features of the same pixels, see docs/fuse.md


def fuse(bundle: str | Path | Bundle, out: str | Path, *, overwrite: bool = False) -> Fused:
    """Write a bundle as one ONNX file, after comparing the file with the bundle on the golden images.

    Args:
        bundle: a bundle or its path.
        out: the file; weights over 2 GB are in ``<name>-<random>.data`` beside it.
        overwrite: replace an existing file.

    Returns:
        The description in the file's metadata.

    Raises:
        OutputExistsError: the file exists, or is part of the bundle.
        BadDataError: backbone and head cannot be joined, or the file's outputs differ from the bundle's.
        LockedError: another run writes the file.
        OutputError, StorageError: it cannot be written.

    >>> import classifiers
    >>> classifiers.fuse("pets.head", "pets.onnx").classes
    ['cat', 'dog']
    """
    bundle, out = Bundle.opened(bundle), Path(out)
    require_free(out, overwrite=overwrite)
    if out.name in BUNDLE_FILES or out.suffix == ".data":
        require_no_part_of(bundle.path, out)
    with onnx_file.replacing(out) as new:
        require_free(out, overwrite=overwrite)  # another run may have made it meanwhile
        return _fuse(bundle, out, new)


@staged("making one file of the bundle")
def _fuse(bundle: Bundle, out: Path, new: Path) -> Fused:
    """Write ``new``, which becomes ``out``."""
    if bundle.views:
        log.warning(
            "%s averages over %d views of an image, but %s looks at it once: the bundle's scores do not apply to it",
            bundle.name,
            bundle.views.count,
            out,
        )
    images = golden_images(bundle.backbone.preprocess.crop)
    predictor = Predictor.of(bundle, device="cpu")
    expected = predictor.probabilities(images).astype(np.float64)
    if not np.isfinite(expected).any():
        message = f"{bundle.path} gives NaN or infinity for each of the {GOLDEN} golden images; its network cannot be used"
        raise BadDataError(message)
    spread = task_of_bundle(bundle).spread(np.nan_to_num(expected))
    model, features = _graph(bundle)
    probe_image = predictor.embedder.metadata.get(backbone_facts.PROBE_IMAGE)
    fused = Fused(
        classes=bundle.classes,
        task=bundle.task,
        kind=bundle.kind,
        head=bundle.head,
        preprocessing=bundle.backbone.preprocess.facts(),
        fingerprint=dict(bundle.fingerprint.single.fields),
        golden=Golden(RECIPE, _digest(images), _numbers(spread * np.round(expected / spread, 7))),
        weights_sha256=onnx_file.weights_digest(model, bundle.path),
        conformal=bundle.conformal if task_of_bundle(bundle).intervals else None,
        features=features,
        probe_image=json.loads(probe_image) if probe_image else None,
        graph_sha256=onnx_file.graph_digest(model),
    )
    for name, value in fused.metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + name, value
    onnx_file.save(model, new)
    del model  # may be large, and is on disk now
    difference = _largest_difference(Predictor.load(new, device="cpu").probabilities(images) / spread, expected / spread)
    if not difference <= PARITY:
        message = (
            f"the fused file's {fused.output} differ by up to {difference:.1e} from those of {bundle.path}; "
            f"{PARITY} is allowed. Nothing was written; predict with the bundle"
        )
        raise BadDataError(message)
    _require_no_label(new, fused)
    log.debug("the fused file differs from the bundle by at most %.1e", difference)
    return fused


def selftest(path: Path, **options: Any) -> str:
    """Check a fused classifier, or a bundle, against its digests, and run it on the golden images.

    A bundle has no saved outputs for them, so its outputs are only checked for NaN and infinity.

    Args:
        path: of the file or the bundle.
        options: of the `Predictor`.

    Returns:
        The result, as one sentence for users.

    Raises:
        BadDataError: it is not what was saved, or computes something else here.
        DeviceUnavailableError: the device cannot be used.
    """
    if not is_fused(path):
        bundle = Bundle.load(path)
        predictor = Predictor.of(bundle, **options)
        predictor.require_pixels()
        predictor.measure_pixels()
        outputs = predictor.probabilities(golden_images(bundle.backbone.preprocess.crop))
        if not np.isfinite(outputs).any():
            message = f"{path} gives NaN or infinity for each of the {GOLDEN} golden images; its network cannot be used"
            raise BadDataError(message)
        return f"{path}: all files as saved; {GOLDEN} golden images pass (only `penult fuse` saves their expected outputs)"
    fused = Fused.load(path)
    predictor = Predictor.fused(path, fused, **options)
    predictor.require_pixels()
    predictor.measure_pixels()
    images, expected = golden_images(fused.preprocess.crop), np.array(fused.golden.probabilities, np.float64)
    if fused.golden.recipe != RECIPE or fused.golden.pixels_sha256 != _digest(images):
        message = (
            f"{path} has golden vectors of other images ({fused.golden.recipe}) than this version of penult makes ({RECIPE}); "
            f"fuse the bundle again"
        )
        raise BadDataError(message)
    spread = predictor.task.spread(np.nan_to_num(expected))
    difference = _largest_difference(predictor.probabilities(images) / spread, expected / spread)
    allowed = precision_of(fused.precision).tolerance
    provider = predictor.embedder.provider
    if not difference <= allowed:
        message = (
            f"{path} computes something else here: on {provider}, its {fused.output} for the golden images differ by up to "
            f"{difference:.1e} from the saved ones; {allowed:g} is allowed. Its weights are as saved; try --device cpu, or "
            f"another version of onnxruntime"
        )
        raise BadDataError(message)
    _require_no_label(path, fused)
    return f"{path}: weights and metadata as saved; {GOLDEN} golden vectors agree to {difference:.1e} on {provider}"


def _require_no_label(path: Path, fused: Fused) -> None:
    """Check that features with NaN or infinity give NaN and no label; no image may lead to such features, so they are injected.

    Raises:
        BadDataError: they give numbers or a label, or change the outputs of other images.
    """
    from onnx import TensorProto, helper, utils

    if fused.features is None:
        return
    name, width = fused.features["tensor"], fused.features["width"]
    model = onnx_file.read_model(path)
    for field in ("sparse_initializer", "quantization_annotation"):  # of the backbone; onnx's Extractor supports neither
        model.graph.ClearField(field)
    extractor = utils.Extractor(model)
    extractor.value_infos[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
    outputs = [value.name for value in model.graph.output]
    behind = extractor.extract_model([name], outputs)
    load_data(behind, path)
    rows = np.random.default_rng(0).normal(0, 1, (2 * len(NO_NUMBERS), width)).astype(np.float32)
    broken = rows.copy()
    broken[::2, width // 2] = NO_NUMBERS
    try:
        session = cpu_session(behind.SerializeToString())
        sound, results = (dict(zip(outputs, session.run(outputs, {name: each}), strict=True)) for each in (rows, broken))
    except Exception as error:  # onnxruntime's exceptions have no common public base
        message = f"{path}: {name!r} of width {width} is not its features: {reason(error)}"
        raise BadDataError(message) from error
    right = np.isnan(results[fused.output][::2]).all() and all(
        (results[each][1::2] == sound[each][1::2]).all() for each in outputs
    )
    if not right or (results.get(LABEL, np.array([NO_LABEL]))[::2] != NO_LABEL).any():
        message = f"{path} gives {' and '.join(outputs)} for features that are not finite; fuse the bundle again"
        raise BadDataError(message)


def _graph(bundle: Bundle) -> tuple[Any, dict[str, Any]]:
    """The whole graph: prologue, backbone, rounding, head, label; and the tensor of the features in it."""
    from onnx import TensorProto, compose, helper

    model = onnx_file.read_model(bundle.path / "backbone.onnx")
    onnx_file.data_files(bundle.path / "backbone.onnx", model)
    require_domains(model, bundle.path / "backbone.onnx")
    load_data(model, bundle.path / "backbone.onnx")
    model, head = _at_one_opset(model, onnx_file.read_model(bundle.path / "head.onnx"))
    compose.add_prefix_graph(model.graph, "backbone/", inplace=True)
    output = head.graph.output[0].name
    compose.add_prefix_graph(head.graph, "head/", inplace=True)
    raw = head.graph.output[0].name
    features, rounded = f"backbone/{bundle.backbone.outputs[0]}", head.graph.input[0].name
    front, pixels = pixel_nodes(model.graph, bundle.backbone.preprocess, INPUT)
    if bundle.storage == "auto":
        rounding, constants = rounding_nodes(features, rounded, bundle.backbone.dim)
    else:
        rounding, constants = [helper.make_node("Identity", [features], [rounded])], []
    model.graph.initializer.extend([*constants, *head.graph.initializer])
    model.ir_version = max(model.ir_version, head.ir_version)
    ending, zeros = finite_nodes(features, raw, output, bundle.backbone.dim)
    model.graph.initializer.extend(zeros)
    cut(model, [([*rounding, *head.graph.node, *ending], output, len(bundle.classes))], front, [pixels])
    model.graph.name = "classifier"
    if task_of_bundle(bundle).exclusive:
        nodes, constants = label_nodes(output, len(bundle.classes))
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(constants)
        model.graph.output.append(helper.make_tensor_value_info(LABEL, TensorProto.INT64, ["batch"]))
    return model, {"tensor": features, "width": bundle.backbone.dim}


def _opset(model: Any) -> int:
    return max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=1)


def _at_one_opset(model: Any, head: Any) -> tuple[Any, Any]:
    """A backbone and a head at the same opset: the backbone's if the head can be converted to it, otherwise the head's.

    onnx converts some operators only to newer opsets. If it can convert neither, both are kept as they are, and the comparison
    on the golden images decides.
    """
    from onnx import version_converter

    if _opset(head) == _opset(model):
        return model, head
    try:
        return model, version_converter.convert_version(head, _opset(model))
    except Exception as error:  # RuntimeError, ConvertError
        log.debug("the head stays at opset %d: %s", _opset(head), error)
    try:
        return version_converter.convert_version(model, _opset(head)), head
    except Exception as error:
        log.debug("the backbone stays at opset %d: %s", _opset(model), error)
        return model, head


def rounding_nodes(features: str, rounded: str, dim: int) -> tuple[list[Any], list[Any]]:
    """`as_stored` in ONNX: each row of features ``(n, dim)`` is rounded to float16 unless that loses too much.

    A row of tiny values, whose squares vanish, is not below the bound and stays as it is.

    Args:
        features, rounded: names of the features before and after.
        dim: number of features.

    Returns:
        Nodes and constants.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants = {"ones": np.ones((dim, 1), np.float32), "bound": np.array(MAX_ROUNDING**2, np.float32)}

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
        names = {"features": features, "stored": rounded}
        placed = [names.get(name, f"stored/{name}") for name in (*inputs.split(), output)]
        return helper.make_node(kind, placed[:-1], placed[-1:], name=f"stored/{output}", **attributes)

    nodes = [
        node("Cast", "features", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "rounded", to=TensorProto.FLOAT),
        node("Sub", "rounded features", "error"),
        node("Mul", "error error", "squared_error"),
        node("Mul", "features features", "squared"),
        node("MatMul", "squared_error ones", "lost"),
        node("MatMul", "squared ones", "total"),
        node("Mul", "total bound", "allowed"),
        node("Less", "lost allowed", "fits"),
        node("Where", "fits rounded features", "stored"),
    ]
    return nodes, [numpy_helper.from_array(value, f"stored/{name}") for name, value in constants.items()]


def finite_nodes(features: str, raw: str, output: str, dim: int) -> tuple[list[Any], list[Any]]:
    """A head's outputs, replaced by NaN for rows with a feature that is not finite: a sigmoid turns infinity into 1.

    Args:
        features: name of the backbone's features ``(n, dim)``.
        raw, output: names of the head's outputs before and after.
        dim: number of features.

    Returns:
        Nodes and constants.
    """
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Mul", [features, "finite/zero"], ["finite/nothing"], name="finite/nothing"),  # NaN or 0
        helper.make_node("MatMul", ["finite/nothing", "finite/ones"], ["finite/added"], name="finite/added"),
        helper.make_node("Add", [raw, "finite/added"], [output], name=f"finite/{output}"),
    ]
    constants = {"finite/zero": np.array(0, np.float32), "finite/ones": np.ones((dim, 1), np.float32)}
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def label_nodes(output: str, classes: int) -> tuple[list[Any], list[Any]]:
    """The index of the most probable class ``(n,)``, or `NO_LABEL` for rows with a probability that is not finite.

    It uses only operators that accept integers at opset 7: (best + 1) times whether it is known, less 1.
    """
    from onnx import TensorProto, helper, numpy_helper

    def node(kind: str, inputs: str, result: str, **attributes: Any) -> Any:
        names = {"output": output, LABEL: LABEL}
        placed = [names.get(name, f"label/{name}") for name in (*inputs.split(), result)]
        return helper.make_node(kind, placed[:-1], placed[-1:], name=f"label/{result}", **attributes)

    nodes = [
        node("Mul", "output zero", "nothing"),
        node("MatMul", "nothing ones", "sum"),
        node("Less", "sum half", "is_known"),
        node("Cast", "is_known", "known", to=TensorProto.INT64),
        node("ArgMax", "output", "best", axis=1, keepdims=1),
        node("Sub", "best none", "counted"),
        node("Mul", "counted known", "kept"),
        node("Add", "kept none", "index"),
        node("Reshape", "index shape", LABEL),
    ]
    constants: dict[str, NDArray[Any]] = {
        "zero": np.array(0, np.float32),
        "ones": np.ones((classes, 1), np.float32),
        "half": np.array(0.5, np.float32),
        "none": np.array(NO_LABEL, np.int64),
        "shape": np.array([-1], np.int64),
    }
    return nodes, [numpy_helper.from_array(value, f"label/{name}") for name, value in constants.items()]


def _largest_difference(outputs: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> float:
    """Largest absolute difference; infinity if only one of two values is finite, or the shapes differ."""
    if outputs.shape != expected.shape or (np.isfinite(outputs) != np.isfinite(expected)).any():
        return float("inf")
    return float(np.abs(outputs - expected)[np.isfinite(expected)].max(initial=0))


def _numbers(values: NDArray[np.float64]) -> list[list[float | None]]:
    """Rows of numbers as JSON, with None for NaN and infinity."""
    return [[value if np.isfinite(value) else None for value in row] for row in values.tolist()]


def _digest(images: NDArray[np.uint8]) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()
