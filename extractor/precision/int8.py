"""Static int8 quantisation of a backbone, calibrated on images; the candidate with features nearest to float is kept.

Weights are int8 with a scale per channel, activations uint8 with a scale per tensor (x86 runs only this
entirely in integers), as pairs of QuantizeLinear and DequantizeLinear that ONNX Runtime fuses into integer kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import WEIGHTED
from extractor.graphs.parity import cosines
from extractor.graphs.reasons import reason
from extractor.runtime.session import Embedder
from store.errors import BadDataError

from .ranges import BINS, METHODS, Observed, limits, ranges

log = logging.getLogger("penult.extractor")

# Operators with integer kernels in ONNX Runtime, or that it passes integers through; the others stay float. Softmax,
# normalisations and the final average are more accurate, and no slower, in float.
OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool", "Concat")
# A transformer's residual sums are many times as wide as what its layers add to them, which would drown in int8: ViT-B/16 fell
# to a cosine of 0.80, and has 0.997 with float sums.
OF_TRANSFORMERS = ("Conv", "Gemm", "MatMul")
OPSET = 13  # the first with scales per channel
HISTOGRAM_IMAGES, HISTOGRAM_VALUES = 64, 65536  # of each tensor, so that a large network takes seconds
FLOAT_LAYERS = (1, 2, 4, 8)  # numbers of layers at the input that are tried in float; errors there spread to all that follow
COMPARED = 64  # images that methods are compared on
BOUND = 0.99  # cosine of every row to float32, see docs/int8.md
PAYS = 0.9  # layers in float must bring the worst error down to this share
ENOUGH = 0.997  # cosine that is good enough: new images may do worse than the judged ones, but layers in float cost time

Pixels = NDArray[np.uint8]
Features = list[NDArray[np.float32]]
Stop = Callable[[], None]


@dataclass(frozen=True)
class Quantised:
    """The int8 candidate that was chosen.

    Attributes:
        facts: of the new file, calibration included.
        exact, rounded: float and int8 features of all images, of every feature set ``(n, d)``.
    """

    facts: BackboneFacts
    exact: Features
    rounded: Features


def quantise(
    source: Path, out: Path, facts: BackboneFacts, calibrate: Pixels, judge: Pixels, checkpoint: Stop = lambda: None
) -> Quantised:
    """Quantise a float backbone to int8, after trying calibration methods and layers kept in float.

    Methods are compared by the mean cosine between float and int8 features, which varies least from one set of images to the
    next. Then the last layer, and more and more layers at the input, stay in float if that helps, until every judged image is
    above `ENOUGH`.

    Args:
        source: the float ONNX file.
        out: the new one.
        facts: of the float file.
        calibrate: images that give the ranges, ``(n, h, w, 3)``.
        judge: other images.
        checkpoint: called between steps; may raise, to end the work.

    Raises:
        BadDataError: a judged row has a cosine below `BOUND`; names the cosines. Or the network cannot be quantised.
        StorageError: the file cannot be written.
    """
    import onnxruntime

    checkpoint()
    with tempfile.TemporaryDirectory(prefix="penult-", ignore_cleanup_errors=True) as folder, _no_root_messages():
        network = _Network(source, facts, Path(folder))
        pixels = np.concatenate([judge, calibrate])
        exact = embed(source, facts, pixels, checkpoint)
        observed = network.observe(calibrate, checkpoint)
        tried: list[dict[str, Any]] = []

        def attempt(method: str, floats: Sequence[str], images: int) -> dict[str, Any]:
            checkpoint()
            candidate = network.candidate(ranges(observed, method), floats)
            rounded = embed(candidate, facts, judge[:images], checkpoint)
            cosine = cosines([each[: len(rounded[0])] for each in exact], rounded)
            scores = {"method": method, "float_layers": list(floats), **summary(cosine)}
            tried.append(scores)
            log.debug("int8 by %(method)s, %(float_layers)s in float: cosine %(min).5f to float, mean %(mean).5f", scores)
            return scores

        compared = [attempt(method, (), COMPARED) for method in METHODS]
        method = max(compared, key=lambda scores: float(scores["mean"]))["method"]
        best = attempt(method, (), len(judge))
        fronts = [network.weighted[:n] for n in FLOAT_LAYERS if 2 * n < len(network.weighted)]
        last = network.weighted[1:][-1:]
        tail: list[str] = []
        for floats in [last, *fronts] if last else []:
            if best["min"] >= ENOUGH:
                break
            scores = attempt(method, [*floats, *tail], len(judge))
            if 1 - scores["min"] < PAYS * (1 - best["min"]):
                best = scores
                tail = last if floats is last else tail
        if best["min"] < BOUND:
            raise _refusal(facts, best, tried)
        settled = ranges(observed, method)
        decided = {
            "method": method,
            "float_layers": best["float_layers"],
            "ranges": {name: [float(low), float(high)] for name, (low, high) in sorted(settled.items())},
            "operators": network.operators,
        }
        calibration = {
            "sha256": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
            **{key: best[key] for key in ("method", "float_layers", "min", "p1", "mean")},
            "images": len(calibrate),
            "pixels_sha256": hashlib.sha256(calibrate.tobytes()).hexdigest(),
            "judged": len(judge),
            "tried": tried,
            "onnxruntime": onnxruntime.__version__,
        }
        facts = replace(facts, precision="int8", calibration=calibration)
        network.candidate(settled, best["float_layers"], out, facts)
        _say_speed(source, out, facts, pixels)
        return Quantised(facts, exact, embed(out, facts, pixels, checkpoint))


class _Network:
    """A float network prepared for quantisation: constants folded, batch norms merged, every node named, shapes known."""

    def __init__(self, source: Path, facts: BackboneFacts, folder: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx_file.read_model(source)
        if onnx_file.external_files(model):
            message = f"{facts.name} has weights over 2 GB, which int8 is not made for; use --precision fp32"
            raise BadDataError(message)
        if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
            message = f"{facts.name} is quantised already; use --precision fp32, which takes it as it is"
            raise BadDataError(message)
        optimised = folder / "optimised.onnx"
        basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            if model.opset_import[0].version < OPSET:
                model = onnx.version_converter.convert_version(model, OPSET)
            cpu_session(model.SerializeToString(), graph_optimization_level=basic, optimized_model_filepath=str(optimised))
            model = onnx.shape_inference.infer_shapes(onnx.load(optimised))
        except Exception as error:  # neither onnx nor onnxruntime has a public base of its exceptions
            message = f"{facts.name} cannot be prepared for int8 ({reason(error)}); use --precision fp32"
            raise BadDataError(message) from error
        for i in reversed(range(len(model.opset_import))):  # ONNX Runtime names every domain it knows
            if model.opset_import[i].domain not in {node.domain for node in model.graph.node}:
                del model.opset_import[i]
        del model.metadata_props[:]
        names = [node.name for node in model.graph.node]
        for i, node in enumerate(model.graph.node):
            if not node.name or names.count(node.name) > 1:
                node.name = f"{node.op_type}_{i}"
        constants = {tensor.name for tensor in model.graph.initializer}
        self.model, self._facts, self._folder = model, facts, folder
        transformer = any(node.op_type == "LayerNormalization" for node in model.graph.node)
        self.operators = OF_TRANSFORMERS if transformer else OPERATORS
        self.weighted = [
            node.name for node in model.graph.node if node.op_type in WEIGHTED and constants.intersection(node.input)
        ]
        if not self.weighted:
            message = f"{facts.name} has no layer that int8 could speed up; use --precision fp32"
            raise BadDataError(message)

    def observe(self, pixels: Pixels, checkpoint: Stop) -> Observed:
        """Run the float network, and record ranges and histograms of every tensor that may be quantised."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        constants = {tensor.name for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.op_type in self.operators]
        names = dict.fromkeys(
            name
            for node in nodes
            for name in (*node.input, *node.output)
            if name in values and name not in constants and values[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        )
        followers = self._followers()
        selected = [name for name in names if name not in followers]
        present = {value.name for value in graph.output}
        graph.output.extend(values[name] for name in selected if name not in present)
        session = cpu_session(model.SerializeToString())
        first = session.get_inputs()[0].name

        def runs(images: Pixels) -> Iterator[Iterator[tuple[str, NDArray[np.float32]]]]:
            size = self._facts.batch or 1
            for begin in range(0, len(images), size):
                checkpoint()
                batch = images[np.arange(begin, begin + size) % len(images)]  # repeated images change no range
                arrays = session.run(selected, {first: self._facts.preprocess.normalise(batch)})
                yield zip(selected, arrays, strict=True)

        low, high = dict.fromkeys(selected, np.inf), dict.fromkeys(selected, -np.inf)
        for tensors in runs(pixels):
            for name, values_of in tensors:
                low[name] = min(low[name], float(values_of.min()))
                high[name] = max(high[name], float(values_of.max()))
        counts = {name: np.zeros(BINS, np.int64) for name in selected}
        for tensors in runs(pixels[:HISTOGRAM_IMAGES]):
            for name, values_of in tensors:
                some = values_of.ravel()[:: -(-values_of.size // HISTOGRAM_VALUES)]
                counts[name] += np.histogram(some, BINS, range=limits(low[name], high[name]))[0]
        if not np.isfinite([*low.values(), *high.values()]).all():
            message = f"{self._facts.name} gives values that are not finite; use --precision fp32"
            raise BadDataError(message)
        return Observed(low, high, counts, followers)

    def _followers(self) -> dict[str, str]:
        users: dict[str, list[Any]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        outputs = {value.name for value in self.model.graph.output}
        return {
            name: used[0].output[0]
            for name, used in users.items()
            if len(used) == 1 and used[0].op_type in ("Relu", "Clip") and used[0].input[0] == name and name not in outputs
        }

    def candidate(
        self,
        tensor_ranges: Mapping[str, tuple[Any, Any]],
        floats: Sequence[str],
        out: Path | None = None,
        facts: BackboneFacts | None = None,
    ) -> Path:
        """Write an int8 file with these ranges, and with these layers in float."""
        from onnxruntime.quantization import QDQQuantizer, QuantType
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

        settings = {"WeightSymmetric": True, "ActivationSymmetric": False, "MatMulConstBOnly": True}
        data = TensorsData(CalibrationMethod.MinMax, dict(tensor_ranges))
        types = (QuantType.QInt8, QuantType.QUInt8)
        quantizer = QDQQuantizer(self.model, True, False, *types, data, [], list(floats), list(self.operators), settings)  # noqa: FBT003 - positional there
        model = quantizer.quantize_model()
        model.graph.ClearField("value_info")
        del model.metadata_props[:]
        model.producer_name, model.producer_version = "penult", ""
        backbone_facts.write_facts(model, facts or self._facts)
        path = out or self._folder / "candidate.onnx"
        onnx_file.save(model, path)
        return path


def embed(model: Path, facts: BackboneFacts, pixels: Pixels, checkpoint: Stop = lambda: None) -> Features:
    """Features of ``(n, h, w, 3)`` pixels on the CPU, of every feature set."""
    embedder = Embedder(model, facts.preprocess, outputs=facts.outputs)
    size = embedder.batch_size
    rows = []
    for future in [embedder.submit(pixels[begin : begin + size]) for begin in range(0, len(pixels), size)]:
        checkpoint()
        rows.append(future.result())
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def summary(cosine: NDArray[np.float64]) -> dict[str, float]:
    """Least, first percentile and mean of the cosines, as JSON."""
    values = {"min": cosine.min(), "p1": np.percentile(cosine, 1), "mean": cosine.mean()}
    return {name: round(float(value), 6) for name, value in values.items()}


def _refusal(facts: BackboneFacts, best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> BadDataError:
    message = (
        f"int8 is too coarse for {facts.name}: the cosine between int8 and float features is {best['min']:.4f} at worst and "
        f"{best['mean']:.4f} on average, and at least {BOUND} is required of every image. Use --precision fp32"
    )
    error = BadDataError(message)
    for each in tried:
        error.add_note(
            f"{each['method']}, {len(each['float_layers'])} layer(s) in float: min {each['min']:.4f}, "
            f"first percentile {each['p1']:.4f}, mean {each['mean']:.4f}"
        )
    return error


def _say_speed(source: Path, out: Path, facts: BackboneFacts, pixels: Pixels) -> None:
    """Log the speed of both networks here, measured in turn; nothing depends on it, as the next run would measure otherwise."""
    embedders = [Embedder(path, facts.preprocess, outputs=facts.outputs) for path in (source, out)]
    batch = pixels[: embedders[0].batch_size]
    seconds: list[list[float]] = [[], []]
    for _ in range(4):
        for embedder, taken in zip(embedders, seconds, strict=True):
            begin = time.perf_counter()
            embedder.embed(batch)
            taken.append(time.perf_counter() - begin)
    exact, rounded = (len(batch) / min(taken) for taken in seconds)
    log.info("int8 makes %.0f images/s here, float %.0f (backbone alone)", rounded, exact)
    if rounded < exact:
        log.warning("int8 is slower than float for %s on this machine: --precision fp32 is the better choice", facts.name)


@contextmanager
def _no_root_messages() -> Iterator[None]:
    """Keep ONNX Runtime's quantiser from installing a handler on the root logger, which would print everything twice."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
