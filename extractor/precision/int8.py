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
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

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

from .ranges import BINS, METHODS, Observed, histogram, ranges, reach_of

log = logging.getLogger("penult.extractor")

# Operators with integer kernels in ONNX Runtime, or that it passes integers through; the others stay float. Softmax,
# normalisations and the final average are more accurate, and no slower, in float.
OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool", "Concat")
# A transformer's residual sums are many times as wide as what its layers add to them, which would drown in int8: ViT-B/16 fell
# to a cosine of 0.80, and has 0.997 with float sums.
OF_TRANSFORMERS = ("Conv", "Gemm", "MatMul")
OPSET = 13  # the first with scales per channel
HISTOGRAM_IMAGES, HISTOGRAM_VALUES = 64, 65536  # of each tensor and image, so that a large network takes seconds
FLOAT_LAYERS = (2, 4, 8)  # numbers of layers at the input that are tried in float; errors there spread to all that follow
FIRST, SECOND = 32, 64  # images that all methods are compared on, and the best two
HARDEST = 16  # images that layers in float are tried on
QUANTISED = "quantize_onnx_initializer"  # ONNX Runtime's function that rounds a weight
BOUND = 0.99  # cosine of every row to float32, see docs/int8.md
PAYS = 0.9  # layers in float must bring the worst error, or the mean one, down to this share
ENOUGH = 0.997  # cosine that is good enough: new images may do worse than the judged ones, but layers in float cost time

Pixels = NDArray[np.uint8]
Features = list[NDArray[np.float32]]
Stop = Callable[[], None]


@dataclass(frozen=True)
class Quantised:
    """The int8 candidate that was chosen.

    Attributes:
        facts: of the new file, calibration included.
        exact, rounded: float and int8 features of the judging and then the calibrating images, of every feature set ``(n, d)``.
        rates: images in a core-second by the float and by the int8 network.
    """

    facts: BackboneFacts
    exact: Features
    rounded: Features
    rates: tuple[float, float]


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
    checkpoint()
    with tempfile.TemporaryDirectory(prefix="penult-", ignore_cleanup_errors=True) as folder, _no_root_messages():
        network = _Network(source, facts, Path(folder))
        exact, exact_rate = _timed(Embedder(source, facts.preprocess, outputs=facts.outputs), judge, checkpoint)
        observed, others = network.observe(calibrate, checkpoint)
        search = _Search(network, observed, exact, judge, checkpoint)
        best = search.best()
        if best.scores["min"] < BOUND:
            raise _refusal(facts, best.scores, search.tried)
        facts = replace(facts, precision="int8", calibration=_record(search, best, calibrate))
        network.write(best.model, out, facts)
        more, rate = _timed(best.embedder, calibrate, checkpoint)
        _say_speed(facts, exact_rate, rate)
        exact = [np.concatenate(pair) for pair in zip(exact, others, strict=True)]
        rounded = [np.concatenate(pair) for pair in zip(best.rounded, more, strict=True)]
        return Quantised(facts, exact, rounded, (exact_rate, rate))


def _timed(embedder: Embedder, pixels: Pixels, checkpoint: Stop) -> tuple[Features, float]:
    """`embed`, and the images in a core-second: other processes on the machine count less there than in seconds."""
    embedder.embed(pixels[: embedder.batch_size])  # the first call is slower
    begin = time.process_time()
    features = embed(embedder, pixels, checkpoint)
    return features, len(pixels) / max(time.process_time() - begin, 1e-9)


def _record(search: _Search, best: _Candidate, calibrate: Pixels) -> dict[str, Any]:
    """What the facts say of a calibration; its digest is over all that decides the features."""
    import onnxruntime

    decided = {
        "method": best.scores["method"],
        "float_layers": best.scores["float_layers"],
        "ranges": {name: [float(low), float(high)] for name, (low, high) in sorted(best.ranges.items())},
        "operators": search.network.operators,
    }
    return {
        "sha256": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
        **{key: best.scores[key] for key in ("method", "float_layers", "min", "p1", "mean")},
        "images": len(calibrate),
        "pixels_sha256": hashlib.sha256(calibrate.tobytes()).hexdigest(),
        "judged": len(search.judge),
        "tried": search.tried,
        "onnxruntime": onnxruntime.__version__,
    }


@dataclass
class _Candidate:
    """An int8 network and how near its features are to float.

    Attributes:
        model: ``onnx.ModelProto``.
        embedder: runs it.
        ranges: of its tensors.
        scores: ``method``, ``float_layers``, ``judged`` (how many images) and the `summary` of their cosines.
        rounded: its features of the images that it was judged on.
    """

    model: Any
    embedder: Embedder
    ranges: Mapping[str, tuple[Any, Any]]
    scores: dict[str, Any]
    rounded: Features


class _Search:
    """The search for the candidate whose features are nearest to float.

    All methods are compared on the `FIRST` images, the best two on the `SECOND`, and the better one is judged on all. Layers in
    float are tried on the `HARDEST` of these, and the candidate that is chosen is judged on all of them, too.
    """

    def __init__(self, network: _Network, observed: Observed, exact: Features, judge: Pixels, checkpoint: Stop) -> None:
        self.network, self.judge, self.tried = network, judge, list[dict[str, Any]]()
        self._observed, self._exact, self._checkpoint = observed, exact, checkpoint

    def best(self) -> _Candidate:
        """The candidate to use, judged on all images."""
        compared = [
            self._attempt(method, ranges(self._observed, method), (), np.arange(len(self.judge))[:FIRST]) for method in METHODS
        ]
        compared = [self._judge_more(each, SECOND) for each in sorted(compared, key=_by_mean)[-2:]]
        plain = self._judge_more(max(compared, key=_by_mean))
        method, chosen = plain.scores["method"], plain.ranges
        cosine = self._cosines(plain.rounded)
        hardest = np.argsort(cosine)[:HARDEST]
        errors, weighted, best = _errors(summary(cosine[hardest])), self.network.weighted, plain
        last, tail = weighted[1:][-1:], list[str]()
        for floats in [last, *(weighted[:n] for n in FLOAT_LAYERS if 2 * n < len(weighted))] if last else []:
            if best.scores["min"] >= ENOUGH:
                break
            candidate = self._attempt(method, chosen, [*floats, *tail], hardest)
            smaller = _errors(candidate.scores)
            if (smaller < PAYS * errors).any():
                best, errors = candidate, smaller
                tail = last if floats is last else tail
        return best if best is plain else self._judge_more(replace(best, rounded=[each[:0] for each in best.rounded]))

    def _attempt(
        self, method: str, chosen: Mapping[str, tuple[Any, Any]], floats: Sequence[str], rows: NDArray[np.intp]
    ) -> _Candidate:
        self._checkpoint()
        model = self.network.quantised(chosen, floats)
        embedder = self.network.open(model)
        rounded = embed(embedder, self.judge[rows], self._checkpoint)
        candidate = _Candidate(model, embedder, chosen, {"method": method, "float_layers": list(floats)}, rounded)
        self._note(candidate, rows)
        return candidate

    def _judge_more(self, candidate: _Candidate, count: int | None = None) -> _Candidate:
        """Judge a candidate on more images than the first ones, of which it has features."""
        done = len(candidate.rounded[0])
        more = self.judge[done:count]
        if not len(more):
            return candidate
        rounded = embed(candidate.embedder, more, self._checkpoint)
        rounded = [np.concatenate(pair) for pair in zip(candidate.rounded, rounded, strict=True)]
        judged = replace(candidate, rounded=rounded, scores=dict(candidate.scores))
        self._note(judged, np.arange(len(rounded[0])))
        return judged

    def _cosines(self, rounded: Features, rows: NDArray[np.intp] | None = None) -> NDArray[np.float64]:
        return cosines([each if rows is None else each[rows] for each in self._exact], rounded)

    def _note(self, candidate: _Candidate, rows: NDArray[np.intp]) -> None:
        candidate.scores |= {"judged": len(rows), **summary(self._cosines(candidate.rounded, rows))}
        self.tried.append(candidate.scores)
        log.debug("int8 by %(method)s, %(float_layers)s in float: cosine %(min).5f to float, mean %(mean).5f", candidate.scores)


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
        self._scales: dict[str, Any] = {}  # of weights, by name
        self._weights: dict[Any, Any] = {}  # rounded
        transformer = any(node.op_type == "LayerNormalization" for node in model.graph.node)
        self.operators = OF_TRANSFORMERS if transformer else OPERATORS
        self.weighted = [
            node.name for node in model.graph.node if node.op_type in WEIGHTED and constants.intersection(node.input)
        ]
        if not self.weighted:
            message = f"{facts.name} has no layer that int8 could speed up; use --precision fp32"
            raise BadDataError(message)

    def observe(self, pixels: Pixels, checkpoint: Stop) -> tuple[Observed, Features]:
        """Run the float network: ranges and histograms of every tensor that may be quantised, and its features of the images.

        It runs one image at a time: with larger batches, the tensors that it returns no longer fit the processor's caches.
        """
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
        first, names_of_all = session.get_inputs()[0].name, [*selected, *self._facts.outputs]
        size = self._facts.batch or 1

        def runs(images: Pixels) -> Iterator[list[NDArray[np.float32]]]:
            for begin in range(0, len(images), size):
                checkpoint()
                batch = images[np.arange(begin, begin + size) % len(images)]  # repeated images change no range
                yield session.run(names_of_all, {first: self._facts.preprocess.normalise(batch)})

        low, high = dict.fromkeys(selected, np.inf), dict.fromkeys(selected, -np.inf)
        features: list[list[NDArray[np.float32]]] = []
        for arrays in runs(pixels):
            for name, values_of in zip(selected, arrays, strict=False):
                low[name] = min(low[name], float(values_of.min()))
                high[name] = max(high[name], float(values_of.max()))
            features.append(arrays[len(selected) :])
        if not np.isfinite([*low.values(), *high.values()]).all():
            message = f"{self._facts.name} gives values that are not finite; use --precision fp32"
            raise BadDataError(message)
        counts = {name: np.zeros(BINS, np.int64) for name in selected}
        for arrays in runs(pixels[:HISTOGRAM_IMAGES]):
            for name, values_of in zip(selected, arrays, strict=False):
                some = values_of.ravel()[:: -(-values_of.size // HISTOGRAM_VALUES)]
                counts[name] += histogram(some, reach_of(low[name], high[name]))
        rows = [np.concatenate(column)[: len(pixels)] for column in zip(*features, strict=True)]
        return Observed(low, high, counts, followers), rows

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

    def quantised(self, tensor_ranges: Mapping[str, tuple[Any, Any]], floats: Sequence[str]) -> Any:
        """The int8 ``onnx.ModelProto`` with these ranges, and with these layers in float."""
        from onnxruntime.quantization import QDQQuantizer, QuantType, qdq_quantizer
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

        scales = self._scales

        class Quantizer(QDQQuantizer):  # type: ignore[misc]
            """ONNX Runtime's, which takes most of its time for the scales of the weights: the same for every candidate."""

            def _calc_initializer_quant_params(self) -> dict[str, Any]:
                tensors = dict(self.tensors_to_quantize)  # type: ignore[has-type]
                for name in scales:
                    self.tensors_to_quantize.pop(name, None)  # type: ignore[has-type]
                scales.update(super()._calc_initializer_quant_params())
                self.tensors_to_quantize = tensors
                return {name: deepcopy(scales[name]) for name in tensors if name in scales}

        settings = {"WeightSymmetric": True, "ActivationSymmetric": False, "MatMulConstBOnly": True}
        data = TensorsData(CalibrationMethod.MinMax, dict(tensor_ranges))
        types = (QuantType.QInt8, QuantType.QUInt8)
        quantizer = Quantizer(self.model, True, False, *types, data, [], list(floats), list(self.operators), settings)  # noqa: FBT003 - positional there
        with mock.patch.object(
            qdq_quantizer, QUANTISED, self._remembering(getattr(qdq_quantizer, QUANTISED, None)), create=True
        ):
            model = quantizer.quantize_model()
        model.graph.ClearField("value_info")
        model.producer_name, model.producer_version = "penult", ""
        return model

    def _remembering(self, quantise_weight: Any) -> Callable[..., Any]:
        """ONNX Runtime's function that rounds a weight, which is called once for each weight and scale."""

        def remembered(weight: Any, kind: Any, zero_point: Any, scale: Any, *others: Any, **named: Any) -> Any:
            key = (weight.name, kind, zero_point.tobytes(), scale.tobytes(), *others, *sorted(named.items()))
            if key not in self._weights:
                self._weights[key] = quantise_weight(weight, kind, zero_point, scale, *others, **named)
            return self._weights[key]

        return remembered

    def open(self, model: Any) -> Embedder:
        """A session of an int8 network."""
        path = self._folder / "candidate.onnx"
        self.write(model, path, self._facts)
        return Embedder(path, self._facts.preprocess, outputs=self._facts.outputs)

    def write(self, model: Any, path: Path, facts: BackboneFacts) -> None:
        """Write an int8 network with its facts."""
        del model.metadata_props[:]
        backbone_facts.write_facts(model, facts)
        onnx_file.save(model, path)


def embed(embedder: Embedder, pixels: Pixels, checkpoint: Stop = lambda: None) -> Features:
    """Features of ``(n, h, w, 3)`` pixels, of every feature set."""
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


def _say_speed(facts: BackboneFacts, exact: float, rounded: float) -> None:
    log.info("int8 computes %.0f images in a core-second here, float %.0f (backbone alone)", rounded, exact)
    if rounded < exact:
        log.warning("int8 is slower than float for %s on this machine: --precision fp32 is the better choice", facts.name)


def _errors(scores: Mapping[str, Any]) -> NDArray[np.float64]:
    """The worst and the mean error of cosines."""
    return np.array([1 - scores["min"], 1 - scores["mean"]])


def _by_mean(candidate: _Candidate) -> float:
    return float(candidate.scores["mean"])


@contextmanager
def _no_root_messages() -> Iterator[None]:
    """Keep ONNX Runtime's quantiser from installing a handler on the root logger, which would print everything twice."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
