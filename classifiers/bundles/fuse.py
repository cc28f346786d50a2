"""A bundle as one ONNX file, from decoded pixels to probabilities, and the test that either still gives what it gave.

Reading, resizing and cropping stay outside: photos of many sizes make no batch, and ONNX Runtime's Resize (with antialias) gave
0.3 % of the pixel values of 25 photos otherwise than Pillow's, by up to 5 levels, which is beyond what the features may move.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
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
from store.errors import BadDataError
from store.format.atomic import require_free, require_no_part_of, require_replaceable
from store.format.shard import MAX_ROUNDING

from .bundle import Bundle, task_of_bundle
from .bundle_folder import BUNDLE_FILES
from .fused import GOLDEN, INPUT, LABEL, NO_LABEL, RECIPE, TOLERANCE, Fused, Golden, golden_pictures, is_fused
from .predictor import Predictor

log = logging.getLogger("penult.classifiers")

NO_NUMBERS = (np.nan, np.inf, -np.inf)
PARITY = 1e-5  # on probabilities, CONTRACTS: "fused ONNX vs head on cached features, same pixels"


def fuse(bundle: str | Path | Bundle, out: str | Path, *, overwrite: bool = False) -> Fused:
    """Write a bundle as one ONNX file, after comparing it with the bundle on the golden pictures.

    Args:
        bundle: what to fuse, loaded or not.
        out: the file; weights over 2 GB lie in ``<name>-<random>.data`` beside it.
        overwrite: replace an existing file.

    Returns:
        What the file says of itself.

    Raises:
        OutputExistsError: the file exists, or is a part of the bundle.
        BadDataError: the two parts do not go together, or the file does not give what the bundle gives.
        OutputError, StorageError: it cannot be written.

    >>> import classifiers
    >>> classifiers.fuse("pets.head", "pets.onnx").classes
    ['cat', 'dog']
    """
    bundle, out = Bundle.opened(bundle), Path(out)
    require_replaceable(out)
    require_free(out, overwrite=overwrite)
    if out.name in BUNDLE_FILES or out.suffix == ".data":
        require_no_part_of(bundle.path, out)
    onnx_file.require_writable(out)
    if bundle.views:
        log.warning(
            "%s averages over %d views of an image and %s looks at it once: the bundle's scores are not its own",
            bundle.name,
            bundle.views.count,
            out,
        )
    pictures = golden_pictures(bundle.backbone.preprocess.crop)
    apart = Predictor.of(bundle, device="cpu")
    expected = apart.probabilities(pictures).astype(np.float64)
    if not np.isfinite(expected).any():
        message = f"{bundle.path} gives NaN or infinity for each of {GOLDEN} pictures; there is nothing to fuse"
        raise BadDataError(message)
    spread = task_of_bundle(bundle).spread(np.nan_to_num(expected))
    model, features = _graph(bundle)
    image = apart.embedder.metadata.get(backbone_facts.PROBE_IMAGE)
    fused = Fused(
        classes=bundle.classes,
        task=bundle.task,
        kind=bundle.kind,
        head=bundle.head,
        preprocessing=bundle.backbone.preprocess.facts(),
        fingerprint=dict(bundle.fingerprint.single.fields),
        golden=Golden(RECIPE, _digest(pictures), _numbers(spread * np.round(expected / spread, 7))),
        weights_sha256=onnx_file.weights_digest(model, bundle.path),
        conformal=bundle.conformal if task_of_bundle(bundle).intervals else None,
        features=features,
        probe_image=json.loads(image) if image else None,
    )
    for name, value in fused.metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + name, value
    with onnx_file.replacing(out) as new:
        onnx_file.save(model, new)
        del model  # of a large network, it lies on the disk now
        moved = _farthest(Predictor.load(new, device="cpu").probabilities(pictures) / spread, expected / spread)
        if not moved <= PARITY:
            message = (
                f"the fused file's {fused.output} are up to {moved:.1e} from those of {bundle.path}; {PARITY} is allowed. "
                f"Nothing was written; predict with the bundle"
            )
            raise BadDataError(message)
        _require_no_label(new, fused)
    log.debug("fused and apart, probabilities differ by %.1e at most", moved)
    return fused


def selftest(path: Path, **options: Any) -> str:
    """Check a fused classifier, or a bundle, against its digests, and let it judge the golden pictures.

    A bundle says of no picture what it gave, so there the answers are only looked at for whether they are probabilities.

    Args:
        path: of either.
        options: of the `Predictor`.

    Returns:
        What was found, for people.

    Raises:
        BadDataError: it is not what was saved, or computes something else here.
        DeviceUnavailableError: the device is not really there.
    """
    if not is_fused(path):
        bundle = Bundle.load(path)
        predictor = Predictor.of(bundle, **options)
        predictor.require_pixels()
        predictor.measure_pixels()
        found = predictor.probabilities(golden_pictures(bundle.backbone.preprocess.crop))
        if not np.isfinite(found).any():
            message = f"{path} gives NaN or infinity for each of {GOLDEN} pictures"
            raise BadDataError(message)
        return f"{path}: all files as saved; {GOLDEN} pictures pass (what they must give is saved by `penult fuse`)"
    fused = Fused.load(path)
    predictor = Predictor.fused(path, fused, **options)
    predictor.require_pixels()
    predictor.measure_pixels()
    pictures, expected = golden_pictures(fused.preprocess.crop), np.array(fused.golden.probabilities, np.float64)
    if fused.golden.recipe != RECIPE or fused.golden.pixels_sha256 != _digest(pictures):
        message = f"{path} has golden vectors of other pictures ({fused.golden.recipe}) than this penult makes ({RECIPE})"
        raise BadDataError(message)
    spread = predictor.task.spread(np.nan_to_num(expected))
    moved = _farthest(predictor.probabilities(pictures) / spread, expected / spread)
    allowed = TOLERANCE.get(fused.precision, TOLERANCE["fp32"])
    provider = predictor.embedder.provider
    if not moved <= allowed:
        message = (
            f"{path} computes something else here: on {provider}, its {fused.output} for the golden pictures are up to "
            f"{moved:.1e} from the saved ones; {allowed:g} is allowed. Its weights are as saved; try --device cpu, or another "
            f"version of onnxruntime"
        )
        raise BadDataError(message)
    _require_no_label(path, fused)
    return f"{path}: weights and metadata as saved; {GOLDEN} golden vectors agree to {moved:.1e} on {provider}"


def _require_no_label(path: Path, fused: Fused) -> None:
    """Give the part of a fused file behind its features some that are no numbers, which no picture may bring about.

    Raises:
        BadDataError: it makes numbers, or a label, of them; or what it says of other images depends on them.
    """
    from onnx import TensorProto, helper, utils

    if fused.features is None:
        return
    name, width = fused.features["tensor"], fused.features["width"]
    model = onnx_file.read_model(path)
    for field in ("sparse_initializer", "quantization_annotation"):  # of the backbone; the extractor takes neither
        model.graph.ClearField(field)
    extractor = utils.Extractor(model)
    extractor.value_infos[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
    outputs = [value.name for value in model.graph.output]
    behind = extractor.extract_model([name], outputs)
    load_data(behind, path)
    rows = np.random.default_rng(0).normal(0, 1, (2 * len(NO_NUMBERS), width)).astype(np.float32)
    broken = rows.copy()
    broken[::2, width // 2] = NO_NUMBERS
    with tempfile.TemporaryDirectory(prefix="penult-") as folder:
        onnx_file.save(behind, Path(folder) / "behind.onnx")
        session = cpu_session(Path(folder) / "behind.onnx")
        sound, found = (dict(zip(outputs, session.run(outputs, {name: each}), strict=True)) for each in (rows, broken))
    right = np.isnan(found[fused.output][::2]).all() and all((found[each][1::2] == sound[each][1::2]).all() for each in outputs)
    if not right or (found.get(LABEL, np.array([NO_LABEL]))[::2] != NO_LABEL).any():
        message = f"{path} makes {' and '.join(outputs)} of features that are no numbers; fuse the bundle again"
        raise BadDataError(message)


def _graph(bundle: Bundle) -> tuple[Any, dict[str, Any]]:
    """The whole graph: prologue, backbone, rounding, head, label; and where the features are in it."""
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
    features, taken = f"backbone/{bundle.backbone.outputs[0]}", head.graph.input[0].name
    front, pixels = pixel_nodes(model.graph, bundle.backbone.preprocess, INPUT)
    if bundle.storage == "auto":
        rounding, constants = rounding_nodes(features, taken, bundle.backbone.dim)
    else:
        rounding, constants = [helper.make_node("Identity", [features], [taken])], []
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
    """A backbone and a head with operators of one opset: the backbone's if the head can be converted to it, else the head's.

    onnx converts some operators only to newer opsets. Where it converts neither, both are taken as they are, and the comparison
    on the golden pictures tells.
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


def rounding_nodes(given: str, taken: str, dim: int) -> tuple[list[Any], list[Any]]:
    """What `as_stored` does to features ``(n, dim)``: each row goes through float16 and back unless that loses too much.

    A row of tiny values, whose squares vanish, is not below the bound and stays as it is.

    Args:
        given, taken: names of the features before and after.
        dim: their number.

    Returns:
        Nodes and constants.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants = {"ones": np.ones((dim, 1), np.float32), "bound": np.array(MAX_ROUNDING**2, np.float32)}

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
        names = {"features": given, "stored": taken}
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
    """A head's outputs as they are, and NaN where a feature is no number: a sigmoid makes 1 of infinity.

    Args:
        features: of the backbone ``(n, dim)``.
        raw, output: names of the head's outputs before and after.
        dim: number of features.

    Returns:
        Nodes and constants.
    """
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Mul", [features, "finite/zero"], ["finite/nothing"], name="finite/nothing"),  # NaN where it is none
        helper.make_node("MatMul", ["finite/nothing", "finite/ones"], ["finite/added"], name="finite/added"),
        helper.make_node("Add", [raw, "finite/added"], [output], name=f"finite/{output}"),
    ]
    constants = {"finite/zero": np.array(0, np.float32), "finite/ones": np.ones((dim, 1), np.float32)}
    return nodes, [numpy_helper.from_array(value, name) for name, value in constants.items()]


def label_nodes(output: str, classes: int) -> tuple[list[Any], list[Any]]:
    """The index of the most probable class ``(n,)``, and `NO_LABEL` where a probability is no number.

    Operators of opset 7 that take whole numbers: (best + 1) times whether it is known, less 1.
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


def _farthest(found: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> float:
    """Largest difference; infinity where only one of two is a number, or there are other numbers of classes."""
    if found.shape != expected.shape or (np.isfinite(found) != np.isfinite(expected)).any():
        return float("inf")
    return float(np.abs(found - expected)[np.isfinite(expected)].max(initial=0))


def _numbers(values: NDArray[np.float64]) -> list[list[float | None]]:
    """As JSON, which has no NaN."""
    return [[value if np.isfinite(value) else None for value in row] for row in values.tolist()]


def _digest(pictures: NDArray[np.uint8]) -> str:
    return hashlib.sha256(pictures.tobytes()).hexdigest()
