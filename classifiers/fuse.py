"""A bundle as one ONNX file, from decoded pixels to probabilities, and the test that either still gives what it gave.

Reading, resizing and cropping stay outside: photos of many sizes make no batch, and ONNX Runtime's Resize (with antialias) gave
0.3 % of the pixel values of 25 photos otherwise than Pillow's, by up to 5 levels, which is beyond what the features may move.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor import onnxfile
from extractor.foreign import load_data, require_domains
from extractor.graph import cut
from extractor.onnxfile import PREFIX
from extractor.prologue import pixel_nodes
from store.errors import BadDataError, OutputExistsError
from store.samples import REGRESSION, SINGLE_LABEL
from store.shard import MAX_ROUNDING

from .bundle import Bundle
from .fused import GOLDEN, INPUT, LABEL, RECIPE, TOLERANCE, Fused, Golden, golden_pictures, is_fused
from .predict import Predictor
from .tasks import task_of_bundle

log = logging.getLogger("penult.classifiers")

PARITY = 1e-5  # on probabilities, CONTRACTS: "fused ONNX vs head on cached features, same pixels"


def fuse(bundle: Bundle, out: Path, *, overwrite: bool = False) -> Fused:
    """Write a bundle as one ONNX file, after comparing it with the bundle on the golden pictures.

    Args:
        bundle: what to fuse.
        out: the file; weights over 2 GB lie in ``<name>-<random>.data`` beside it.
        overwrite: replace an existing file.

    Returns:
        What the file says of itself.

    Raises:
        OutputExistsError: the file exists.
        BadDataError: the two parts do not go together, or the file does not give what the bundle gives.
        OutputError, StorageError: it cannot be written.
    """
    if out.is_dir() or (out.exists() and not overwrite):
        message = f"{out} exists; choose another name" + ("" if out.is_dir() else " or pass --overwrite")
        raise OutputExistsError(message)
    onnxfile.require_writable(out)
    if bundle.views:
        log.warning(
            "%s averages over %d views of an image and %s looks at it once: the bundle's figures are not its own",
            bundle.name,
            bundle.views.count,
            out,
        )
    pictures = golden_pictures(bundle.backbone.preprocess.crop)
    expected = Predictor.of(bundle, device="cpu").probabilities(pictures).astype(np.float64)
    spread = task_of_bundle(bundle).spread(expected)
    model = _graph(bundle)
    fused = Fused(
        classes=bundle.classes,
        task=bundle.task,
        kind=bundle.kind,
        head=bundle.head,
        preprocessing=bundle.backbone.preprocess.facts(),
        fingerprint=dict(bundle.fingerprint.single.fields),
        golden=Golden(RECIPE, _digest(pictures), (spread * np.round(expected / spread, 7)).tolist()),
        weights_sha256=onnxfile.weights_digest(model, bundle.path),
        conformal=bundle.conformal if bundle.task == REGRESSION else None,
    )
    for name, value in fused.metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = PREFIX + name, value
    with onnxfile.replacing(out) as new:
        onnxfile.save(model, new)
        del model  # of a large network, it lies on the disk now
        moved = _farthest(Predictor.load(new, device="cpu").probabilities(pictures) / spread, expected / spread)
        if not moved <= PARITY:
            message = (
                f"the fused file's {fused.output} are up to {moved:.1e} from those of {bundle.path}; {PARITY} is allowed. "
                f"Nothing was written; predict with the bundle"
            )
            raise BadDataError(message)
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
        found = Predictor.of(bundle, **options).probabilities(golden_pictures(bundle.backbone.preprocess.crop))
        if not np.isfinite(found).all():
            bad = GOLDEN - np.isfinite(found).all(axis=1).sum()
            message = f"{path} gives what is no number for {bad} of {GOLDEN} pictures"
            raise BadDataError(message)
        return f"{path}: all files as saved; {GOLDEN} pictures pass (what they must give is saved by `penult fuse`)"
    fused = Fused.load(path)
    predictor = Predictor.fused(path, fused, **options)
    pictures, expected = golden_pictures(fused.preprocess.crop), np.array(fused.golden.probabilities)
    if fused.golden.recipe != RECIPE or fused.golden.pixels_sha256 != _digest(pictures):
        message = f"{path} has golden vectors of other pictures ({fused.golden.recipe}) than this penult makes ({RECIPE})"
        raise BadDataError(message)
    spread = predictor.task.spread(expected)
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
    return f"{path}: weights and metadata as saved; {GOLDEN} golden vectors agree to {moved:.1e} on {provider}"


def _graph(bundle: Bundle) -> Any:
    """The whole graph: prologue, backbone, rounding, head, label."""
    from onnx import TensorProto, compose, helper

    model = onnxfile.read_model(bundle.path / "backbone.onnx")
    onnxfile.data_files(bundle.path / "backbone.onnx", model)
    require_domains(model, bundle.path / "backbone.onnx")
    load_data(model, bundle.path / "backbone.onnx")
    head = _at_opset(onnxfile.read_model(bundle.path / "head.onnx"), _opset(model))
    compose.add_prefix_graph(model.graph, "backbone/", inplace=True)
    compose.add_prefix_graph(head.graph, "head/", rename_outputs=False, inplace=True)
    features, taken = f"backbone/{bundle.backbone.outputs[0]}", head.graph.input[0].name
    front, pixels = pixel_nodes(model.graph, bundle.backbone.preprocess, INPUT)
    if bundle.storage == "auto":
        rounding, constants = rounding_nodes(features, taken, bundle.backbone.dim)
    else:
        rounding, constants = [helper.make_node("Identity", [features], [taken])], []
    model.graph.initializer.extend([*constants, *head.graph.initializer])
    model.ir_version = max(model.ir_version, head.ir_version)
    output = head.graph.output[0].name
    cut(model, [([*rounding, *head.graph.node], output, len(bundle.classes))], front, [pixels])
    model.graph.name = "classifier"
    if bundle.task == SINGLE_LABEL:
        model.graph.node.append(helper.make_node("ArgMax", [output], [LABEL], axis=1, keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(LABEL, TensorProto.INT64, ["batch"]))
    return model


def _opset(model: Any) -> int:
    return max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=1)


def _at_opset(head: Any, version: int) -> Any:
    """A head with the operators of its backbone's opset. onnx cannot convert some of them to an older one, though they mean
    the same there; they are taken as they are, and the comparison on the golden pictures tells."""
    from onnx import version_converter

    if _opset(head) == version:
        return head
    try:
        return version_converter.convert_version(head, version)
    except Exception as error:  # RuntimeError, ConvertError
        log.debug("the head's operators are taken as they are: %s", error)
        return head


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


def _farthest(found: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> float:
    """Largest difference; infinity where something is no number or there are other numbers of classes."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max())


def _digest(pictures: NDArray[np.uint8]) -> str:
    return hashlib.sha256(pictures.tobytes()).hexdigest()
