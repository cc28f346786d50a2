"""A float network as ONNX Runtime's quantiser takes it: observed on images, and rounded to int8 with chosen ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import WEIGHTED
from extractor.graphs.reasons import reason
from extractor.runtime.session import Embedder
from store.errors import BadDataError

from .ranges import Histogram, Observed

# Operators with integer kernels in ONNX Runtime, or that it passes integers through; the others stay float. Softmax,
# normalisations and the final average are more accurate, and no slower, in float.
OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool", "Concat")
# A transformer's residual sums are many times as wide as what its layers add to them, which would drown in int8: ViT-B/16 fell
# to a cosine of 0.80, and has 0.997 with float sums.
OF_TRANSFORMERS = ("Conv", "Gemm", "MatMul")
OPSET = 13  # the first with scales per channel
LEVELS = 127  # of a weight on either side of zero
QUANTISED = "quantize_onnx_initializer"  # ONNX Runtime's function that rounds a weight

Pixels = NDArray[np.uint8]
Features = list[NDArray[np.float32]]
Stop = Callable[[], None]


class Network:
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
        self.model, self._facts, self._folder = model, facts, folder
        self._constants = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        }
        self._scales: dict[str, Any] = {}  # of weights, by name
        self._weights: dict[Any, Any] = {}  # rounded
        transformer = any(node.op_type == "LayerNormalization" for node in model.graph.node)
        self.operators = OF_TRANSFORMERS if transformer else OPERATORS
        self.weighted = [
            node.name for node in model.graph.node if node.op_type in WEIGHTED and self._constants.keys() & set(node.input)
        ]
        self.last = [] if self._averaged(self.weighted[-1:]) else self.weighted[1:][-1:]
        if not self.weighted:
            message = f"{facts.name} has no layer that int8 could speed up; use --precision fp32"
            raise BadDataError(message)

    def _averaged(self, names: Sequence[str]) -> bool:
        """Whether the output of a layer has several places: averaged over them, its errors of rounding go down."""
        outputs = {node.output[0] for node in self.model.graph.node if node.name in names and node.op_type == "Conv"}
        shapes = [value.type.tensor_type.shape.dim for value in self.model.graph.value_info if value.name in outputs]
        return any(side.dim_value != 1 for shape in shapes for side in shape[2:])

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

        histograms = {name: Histogram() for name in selected}
        features: list[list[NDArray[np.float32]]] = []
        for arrays in runs(pixels):
            for name, values_of in zip(selected, arrays, strict=False):
                if not histograms[name].add(values_of):
                    message = f"{self._facts.name} gives values that are not finite; use --precision fp32"
                    raise BadDataError(message)
            features.append(arrays[len(selected) :])
        rows = [np.concatenate(column)[: len(pixels)] for column in zip(*features, strict=True)]
        return Observed(histograms, followers), rows

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
        from onnxruntime.quantization.base_quantizer import QuantizationParams
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

        weights, scales = self._constants, self._scales

        class Quantizer(QDQQuantizer):  # type: ignore[misc]
            """ONNX Runtime's, which takes most of its time for the scales of the weights, a channel at a time."""

            def _calc_initializer_quant_params(self) -> dict[str, Any]:
                tensors = dict(self.tensors_to_quantize)  # type: ignore[has-type]
                for name, each in tensors.items():
                    if name not in scales and each.axis is not None and name in weights:  # a float32 weight
                        zeros, widths = channel_scales(weights[name], each.axis)
                        scales[name] = QuantizationParams(
                            zero_point=zeros, scale=widths, quant_type=self.weight_qType, axis=each.axis % weights[name].ndim
                        )
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
        """ONNX Runtime's function that rounds a weight: called once for each weight and scale, and for all channels at once."""

        def remembered(weight: Any, kind: Any, zero_point: Any, scale: Any, axis: int | None = None, **named: Any) -> Any:
            key = (weight.name, kind, zero_point.tobytes(), scale.tobytes(), axis, *sorted(named.items()))
            if key not in self._weights:
                values = self._constants.get(weight.name)
                self._weights[key] = (
                    quantise_weight(weight, kind, zero_point, scale, axis, **named)
                    if values is None or axis is None or any(named.values())
                    else rounded(weight.name, values, scale, axis)
                )
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


def channel_scales(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Zero points and scales of a weight's channels, as ONNX Runtime computes them one by one."""
    largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis % weight.ndim), initial=0)
    scales = 2 * largest.astype(np.float64) / (2 * LEVELS)
    return np.zeros(len(scales), np.int8), np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def rounded(name: str, weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int) -> Any:
    """The int8 ``onnx.TensorProto`` of a weight with these scales of its channels, as ONNX Runtime rounds it."""
    import onnx

    shape = [-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)]
    values = (weight / scales.reshape(shape)).round().clip(-LEVELS - 1, LEVELS)
    return onnx.numpy_helper.from_array(values.astype(np.int8), f"{name}_quantized")
