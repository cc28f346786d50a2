"""Which optimiser passes of ONNX Runtime change an answer: each graph as it is written against the same graph optimised.

A wrong pass belongs into `cpu_session.WRONG_FUSIONS`, with a test. The graphs: random ones of the operators that exporters
write around convolutions, classifiers in the styles of several exporters (channels last, padded poolings, QDQ, float16), and
torchvision's networks, one of each family, with random weights and statistics. Where an optimised graph differs, each pass is
switched off alone, and those without which it does not differ are named.

Run it for a new version of ONNX Runtime: `python benchmarks/optimisers.py`, about half an hour. It exits with 1 if a session of
penult gives a wrong answer.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from extractor.graphs.cpu_session import WRONG_FUSIONS  # noqa: E402
from extractor.graphs.parity import relative_l2  # noqa: E402

LAST_BITS, AMPLIFIED = 1e-7, 30
ROUNDING = 1e-5  # relative L2 of a row; beyond it something else than the order of sums changed
GRAPHS = 3000  # random ones
SIDE, BATCH = 12, 3
FAMILIES = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t
vgg11_bn vit_b_32 wide_resnet50_2 maxvit_t"""
AS_WRITTEN, ALL = "ORT_DISABLE_ALL", "ORT_ENABLE_ALL"
LEVELS = {"basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": ALL}
# The names that ONNX Runtime 1.31 gives its passes for the CPU: core/optimizer/graph_transformer_utils.cc and the headers there
PASSES = """EliminateIdentity EliminateSlice UnsqueezeElimination EliminateDropout ExpandElimination CastElimination
CastChainElimination PreShapeNodeElimination NoopElimination DivMulFusion FuseReluClip GemmSumFusion GemmTransposeFusion
NotWhereFusion ConvAddFusion ConvMulFusion ConvBNFusion Pad_Fusion MatMul_BatchNormalization_Fusion LabelEncoderFusion
ClipQuantRewrite ReluQuantRewrite DoubleQDQPairsRemover ConstantSharing CommonSubexpressionElimination ConstantFolding
MatMulAddFusion ReshapeFusion FreeDimensionOverrideTransformer GeluFusionL1 GeluFusionL2 LayerNormFusionL1 LayerNormFusionL2
SimplifiedLayerNormFusion QDQPropagationTransformer WeightBiasQuantization EnsureUniqueDQForNodeUnit TransposeOptimizer
QDQS8ToU8Transformer QDQSelectorActionTransformer QDQFinalCleanupTransformer GemmActivationFusion MatMulIntegerToFloatFusion
DynamicQuantizeMatMulFusion ConvActivationFusion ConvAddActivationFusion AttentionFusion EmbedLayerNormFusion
GatherSliceToSplitFusion GatherToSliceFusion SliceConcatToSpaceToDepthFusion BiasDropoutFusion MatmulTransposeFusion
BiasGeluFusion SkipLayerNormFusion BiasSkipLayerNormFusion FastGeluFusion QuickGeluFusion BiasSoftmaxFusion
MatMulScaleFusion MatMulActivationFusion DQMatMulNBitsFusion MatMulNBitsMlpFusion MatMulNBitsQkvFusion
GroupQueryAttentionFusion NchwcTransformer NhwcTransformer Avx2WeightS8ToU8Transformer RemoveDuplicateCastTransformer
IdenticalChildrenConsolidation"""


@dataclass(frozen=True)
class Case:
    """A graph and its inputs.

    Attributes:
        name: of the graph.
        model: serialised.
        limit: relative L2 of a row that is rounding.
    """

    name: str
    model: bytes
    limit: float = ROUNDING


def run(case: Case, level: str, off: Sequence[str] = (), noise: float = 0) -> list[NDArray[np.float32]]:
    """The outputs of a graph at a level of optimisation without some passes, for two batches, whose last bits may be noise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        case.model, options, providers=["CPUExecutionProvider"], enable_fallback=0, disabled_optimizers=list(off)
    )
    (tensor,) = session.get_inputs()
    shape = [BATCH, *(size if isinstance(size, int) else SIDE for size in tensor.shape[1:])]
    rng = np.random.default_rng(0)
    inputs = (rng.normal(0, 1, shape), rng.uniform(0, 1, shape) - 1.5)
    inputs = tuple(each * (1 + noise * rng.normal(0, 1, shape)) for each in inputs)
    return [session.run(None, {tensor.name: each.astype(np.float32)})[0] for each in inputs]


def distance(case: Case, level: str, expected: Sequence[NDArray[Any]], off: Sequence[str] = ()) -> float:
    """How far an optimised graph is from the graph as it is written; infinity if it cannot be run any more."""
    try:
        rows = run(case, level, off)
    except Exception:  # onnxruntime's exceptions have no common public base
        return float("inf")
    return apart(rows, expected)


def apart(rows: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """The largest relative L2 of a row; infinity where the shapes differ."""
    if [each.shape for each in rows] != [each.shape for each in expected]:
        return float("inf")
    pairs = [(a.reshape(len(a), -1), b.reshape(len(b), -1)) for a, b in zip(rows, expected, strict=True)]
    return max(float(relative_l2(a, b).max()) for a, b in pairs)


# --- random graphs -----------------------------------------------------------------------------------------------------


class Builder:
    """A graph that grows by one random operator after the other; the tensor at its end is ``(n, *shape)``."""

    def __init__(self, seed: int, opset: int) -> None:
        self.rng, self.opset = np.random.default_rng(seed), opset
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.name, self.shape = "image", [3, SIDE, SIDE]

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def numbers(self, *sides: int, scale: float = 1.0) -> str:
        return self.constant(self.rng.normal(0, scale, sides))

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n{len(self.nodes)}", domain=domain, **attributes))
        return names[0]

    def then(self, op: str, *inputs: str, **attributes: Any) -> None:
        self.name = self.node(op, self.name, *inputs, **attributes)

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def model(self) -> bytes:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])
        out = helper.make_tensor_value_info(self.name, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "random", [image], [out], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return bytes(made.SerializeToString())


def convolution(b: Builder) -> None:
    c, h, _ = b.shape
    side, group = b.pick(1, 3) if h >= 3 else 1, b.pick(1, c)
    out = c if group > 1 else b.pick(4, 8)
    pads = b.pick([0] * 4, [side // 2] * 4, [0, 0, side // 2, side // 2])
    weights = [
        b.numbers(out, c // group, side, side, scale=(c / group * side * side) ** -0.5),
        *([b.numbers(out)] if b.pick(0, 1) else []),
    ]
    b.then("Conv", *weights, kernel_shape=[side] * 2, pads=pads, group=group)
    b.shape = [out, h + pads[0] + pads[2] - side + 1, b.shape[2] + pads[1] + pads[3] - side + 1]


def transposed_convolution(b: Builder) -> None:
    b.then("ConvTranspose", b.numbers(b.shape[0], 4, 2, 2, scale=0.5), kernel_shape=[2, 2])
    b.shape = [4, b.shape[1] + 1, b.shape[2] + 1]


def padding(b: Builder) -> None:
    before, after = int(b.rng.integers(0, 2)), int(b.rng.integers(0, 2))
    mode, value = b.pick("constant", "constant", "reflect", "edge"), b.pick(None, 0.0, -1.0, 2.0)
    channels = b.pick(0, 0, 1) if mode == "constant" else 0
    values = [b.constant(value)] if mode == "constant" and value is not None else []
    b.then("Pad", b.constant([0, 0, before, before, 0, channels, after, after], np.int64), *values, mode=mode)
    b.shape = [b.shape[0] + channels, b.shape[1] + before + after, b.shape[2] + before + after]


def pooling(b: Builder) -> None:
    if b.shape[1] < 4:
        return
    op, ceil, pads = b.pick("MaxPool", "AveragePool", "LpPool"), b.pick(0, 1), b.pick([0] * 4, [1] * 4)
    attributes = {"count_include_pad": b.pick(0, 1)} if op == "AveragePool" else {}
    attributes |= {"ceil_mode": ceil} if op != "LpPool" or b.opset >= 18 else {}
    b.then(op, kernel_shape=[3, 3], strides=[2, 2], pads=pads, **attributes)
    total, rounded = b.shape[1] + 2 * pads[0] - 3, bool(attributes.get("ceil_mode"))
    side = (total + rounded) // 2 + 1
    if rounded and (side - 1) * 2 >= b.shape[1] + pads[0]:  # no window begins in the padding at the end
        side -= 1
    b.shape = [b.shape[0], side, side]


def padded_layer(b: Builder) -> None:
    """A padding that one of the passes may move into the layer after it."""
    value = b.pick(None, 0.0, 0.0, -1.0)
    values = [b.constant(value)] if value is not None else []
    b.then("Pad", b.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), *values, mode=b.pick("constant", "constant", "edge"))
    b.shape = [b.shape[0], b.shape[1] + 2, b.shape[2] + 2]
    b.pick(convolution, pooling)(b)


def batch_normalisation(b: Builder) -> None:
    c = b.shape[0]
    values = [b.numbers(c), b.numbers(c), b.numbers(c), b.constant(b.rng.uniform(0.2, 3, c))]
    b.then("BatchNormalization", *values, epsilon=float(b.pick(1e-5, 1e-3)))


def scaling(b: Builder) -> None:
    sides = b.pick([], [1], [b.shape[0], 1, 1], [1, b.shape[0], 1, 1], [b.shape[2]], b.shape)
    b.then(b.pick("Add", "Sub", "Mul", "Div", "Max", "Min"), b.constant(b.rng.uniform(0.5, 2, sides) * b.pick(1, -1)))


def reversed_scaling(b: Builder) -> None:
    b.name = b.node(b.pick("Add", "Sub", "Mul"), b.numbers(*b.pick([], [b.shape[0], 1, 1])), b.name)


def activation(b: Builder) -> None:
    op = b.pick("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Elu", "Clip", "Clip", "PRelu", "HardSwish", "Softplus")
    if op == "Clip":
        low, high = b.pick((0, 6), (-1, 1), (0.5, 2), (-3, 0.2))
        return b.then("Clip", b.pick(b.constant(low), ""), b.constant(high))
    return b.then(op, *([b.numbers(b.shape[0], 1, 1)] if op == "PRelu" else []))


def written_out_activation(b: Builder) -> None:
    kind, x = b.pick("swish", "quick", "erf", "tanh", "hardswish"), b.name
    if kind in ("swish", "quick"):
        scaled = b.node("Mul", x, b.constant(b.pick(1.702, 1.5, -1))) if kind == "quick" else x
        b.name = b.node("Mul", x, b.node("Sigmoid", scaled))
    elif kind == "erf":
        inner = b.node("Add", b.node("Erf", b.node("Div", x, b.constant(b.pick(2**0.5, 1.3)))), b.constant(b.pick(1, 1, 2)))
        b.name = b.pick(
            lambda: b.node("Mul", b.node("Mul", x, inner), b.constant(b.pick(0.5, 0.4))),
            lambda: b.node("Mul", x, b.node("Mul", inner, b.constant(0.5))),
        )()
    elif kind == "tanh":
        cube = b.node("Mul", b.node("Pow", x, b.constant(3)), b.constant(b.pick(0.044715, 0.05)))
        inner = b.node("Tanh", b.node("Mul", b.node("Add", x, cube), b.constant(0.7978845)))
        b.name = b.node("Mul", b.node("Mul", x, b.constant(0.5)), b.node("Add", inner, b.constant(1)))
    else:
        limited = b.node("Clip", b.node("Add", x, b.constant(3)), b.constant(0), b.constant(6))
        b.name = b.node("Div", b.node("Mul", x, limited), b.constant(6))


def there_and_back(b: Builder) -> None:
    """Operations between two transpositions, as of channels last, or between two shapes."""
    kind = b.pick("transpose", "transpose", "reshape", "unsqueeze", "float16")
    if kind == "transpose":
        b.then("Transpose", perm=[0, 2, 3, 1])
        for _ in range(int(b.rng.integers(0, 3))):
            c = b.shape[0]
            choice = b.pick("bias", "softmax", "mean", "pad", "layer", "slice")
            if choice == "bias":
                b.then("Add", b.numbers(c))
            elif choice == "softmax":
                b.then("Softmax", axis=b.pick(-1, 1, 3))
            elif choice == "mean":
                b.name = b.node("Sub", b.name, reduce(b, "ReduceMean", [3], keepdims=1))
            elif choice == "pad":
                b.then("Pad", b.constant([0, 0, 0, 0, 0, 1, 1, 0], np.int64), b.constant(b.pick(0.0, 1.5)))
                b.shape = [c, b.shape[1] + 1, b.shape[2] + 1]
            elif choice == "layer":
                b.then("LayerNormalization", b.numbers(c), b.numbers(c), axis=-1)
            elif b.shape[1] > 3:
                b.then("Slice", *(b.constant([each], np.int64) for each in (1, 2**31 - 1, 1)))
                b.shape = [c, b.shape[1] - 1, b.shape[2]]
        return b.then("Transpose", perm=[0, 3, 1, 2])
    if kind == "reshape":
        b.then("Reshape", b.constant([0, b.shape[0], -1], np.int64))
        b.then(b.pick("Relu", "Identity", "Tanh"))
        return b.then("Reshape", b.constant([0, *b.shape], np.int64))
    if kind == "unsqueeze":
        axis = b.constant([b.pick(1, 2, -1)], np.int64)
        b.then("Unsqueeze", axis)
        b.then(b.pick("Relu", "Neg"))
        return b.then("Squeeze", axis)
    b.then("Cast", to=TensorProto.FLOAT16)
    return b.then("Cast", to=TensorProto.FLOAT)


def reduce(b: Builder, op: str, axes: list[int], keepdims: int) -> str:
    if b.opset >= 18:
        return b.node(op, b.name, b.constant(axes, np.int64), keepdims=keepdims)
    return b.node(op, b.name, axes=axes, keepdims=keepdims)


def branches(b: Builder) -> None:
    """Two branches that are joined: a residual sum, a gate, or channels side by side."""
    x, shape = b.name, list(b.shape)
    for grow in (b.pick(activation, batch_normalisation, scaling, written_out_activation),):
        grow(b)
    kind = b.pick("Add", "Mul", "Concat", "gate")
    if kind == "gate":
        mean = b.node("GlobalAveragePool", b.name)
        b.name = b.node("Mul", x, b.node(b.pick("Sigmoid", "HardSigmoid"), mean))
    elif kind == "Concat":
        b.name = b.node("Concat", x, b.name, axis=1)
        b.shape[0] = shape[0] + b.shape[0]
    else:
        b.name = b.node(kind, *b.pick((x, b.name), (b.name, x)))


def slices(b: Builder) -> None:
    c, h, _ = b.shape
    if b.pick(0, 1) and h % 2 == 0:  # as YOLO's first layer, space to depth
        parts = []
        for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
            first = [b.constant([value], np.int64) for value in (row, 2**31 - 1, 2, 2)]
            second = [b.constant([value], np.int64) for value in (column, 2**31 - 1, 3, 2)]
            parts.append(b.node("Slice", b.node("Slice", b.name, *first), *second))
        b.name = b.node("Concat", *(parts if b.pick(0, 1) else parts[::-1]), axis=1)
        b.shape = [4 * c, h // 2, b.shape[2] // 2]
    elif c >= 4:
        half = [
            b.node("Slice", b.name, *(b.constant([v], np.int64) for v in bounds)) for bounds in ((0, c // 2, 1), (c // 2, c, 1))
        ]
        b.name = b.node("Concat", *(half if b.pick(0, 1) else half[::-1]), axis=1)


def tokens(b: Builder) -> None:
    """Attention and a layer normalisation, written out or not, on ``(n, h w, c)``."""
    c, h, w = b.shape
    b.then("Reshape", b.constant([0, c, h * w], np.int64))
    b.then("Transpose", perm=[0, 2, 1])
    x = b.name
    if b.pick(0, 1):
        b.then("LayerNormalization", b.numbers(c), b.numbers(c), axis=-1, epsilon=1e-6)
    else:
        centred = b.node("Sub", x, reduce(b, "ReduceMean", [-1], keepdims=1))
        b.name = b.node("Pow", centred, b.constant(2))
        variance = b.node("Add", reduce(b, "ReduceMean", [-1], keepdims=1), b.constant(b.pick(1e-5, 0.1)))
        b.name = b.node("Add", b.node("Mul", b.node("Div", centred, b.node("Sqrt", variance)), b.numbers(c)), b.numbers(c))
    q, k, v = (b.node("Add", b.node("MatMul", b.name, b.numbers(c, c, scale=c**-0.5)), b.numbers(c)) for _ in range(3))
    scores = b.node("MatMul", b.pick(q, b.node("Mul", q, b.constant(0.5))), b.node("Transpose", k, perm=[0, 2, 1]))
    scores = b.node(b.pick("Mul", "Div"), scores, b.constant(b.pick(0.3, 3.0)))
    b.name = b.node("MatMul", b.node("Softmax", scores, axis=-1), v)
    b.name = b.node("Add", x, b.name)
    b.then("Transpose", perm=[0, 2, 1])
    b.then("Reshape", b.constant([0, c, h, w], np.int64))


def end(b: Builder) -> None:
    """Pooled or flattened, and perhaps a linear layer or two."""
    if b.pick(0, 1):
        b.then(b.pick("GlobalAveragePool", "GlobalMaxPool"))
        b.shape = [b.shape[0], 1, 1]
    b.then("Flatten")
    width = int(np.prod(b.shape))
    for _ in range(b.pick(0, 1, 2)):
        kind = b.pick("Gemm", "MatMul", "Gemm transposed")
        if kind == "Gemm":
            b.then(
                "Gemm",
                b.numbers(width, 6, scale=width**-0.5),
                b.numbers(6),
                alpha=float(b.pick(1, 0.5)),
                beta=float(b.pick(1, 2)),
            )
        elif kind == "MatMul":
            b.then("MatMul", b.numbers(width, 6, scale=width**-0.5))
            b.then(b.pick("Add", "Mul"), b.numbers(6))
        else:
            b.then("Gemm", b.numbers(6, width, scale=width**-0.5), transB=1)
        width = 6
        if b.pick(0, 1):
            b.then("BatchNormalization", *(b.numbers(6) for _ in range(3)), b.constant(b.rng.uniform(0.2, 3, 6)))
        b.then(b.pick("Relu", "Identity", "LeakyRelu", "Softmax", "Dropout"))


STEPS: list[Callable[[Builder], None]] = [
    *(
        convolution,
        convolution,
        convolution,
        padded_layer,
        padding,
        padding,
        pooling,
        pooling,
        batch_normalisation,
        batch_normalisation,
    ),
    *(scaling, reversed_scaling, activation, activation, written_out_activation, there_and_back, there_and_back, branches),
    *(slices, tokens, transposed_convolution),
]


def random_graph(seed: int) -> Case:
    builder = Builder(seed, opset=(17, 18, 20)[seed % 3])
    for _ in range(int(builder.rng.integers(3, 9))):
        builder.pick(*STEPS)(builder)
    end(builder)
    float16 = any(node.op_type == "Cast" for node in builder.nodes)  # where rounding may fall to the other side
    return Case(f"random graph {seed}", builder.model(), 1e-3 if float16 else ROUNDING)


# --- classifiers in the styles of exporters ----------------------------------------------------------------------------


def styles() -> Iterator[Case]:
    yield replace(_classifier(padded=True), name="padded max pooling (BiT)")
    yield replace(_classifier(last=True), name="channels last (Keras)")
    yield replace(_classifier(last=True, padded=True), name="channels last, padded max pooling (Keras ResNetV2)")
    yield from _quantised()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load_from_string(_classifier().model), keep_io_types=True)
    yield Case("float16", bytes(model.SerializeToString()), 5e-3)


def _classifier(*, last: bool = False, padded: bool = False) -> Case:
    """Three blocks of convolution, batch normalisation and ReLU, as Keras or PyTorch writes them, and a linear layer."""
    b = Builder(7, 17)
    for i in range(3):
        if last:
            b.then("Transpose", perm=[0, 2, 3, 1])
            b.then("Pad", b.constant([0, 0, 0, 0, 0, 1, 1, 0], np.int64))
            b.then("Transpose", perm=[0, 3, 1, 2])
            b.shape = [b.shape[0], b.shape[1] + 1, b.shape[2] + 1]
        c = b.shape[0]
        b.then("Conv", b.numbers(8, c, 3, 3, scale=(9 * c) ** -0.5), kernel_shape=[3, 3], pads=[1] * 4)
        b.shape[0] = 8
        batch_normalisation(b)
        if padded and i == 0:
            b.then("Pad", b.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
            b.then("MaxPool", kernel_shape=[3, 3], strides=[2, 2])
        b.then("Relu" if i else "LeakyRelu")
    b.then("GlobalAveragePool")
    b.then("Flatten")
    b.then("Gemm", b.numbers(8, 5), b.numbers(5))
    return Case("classifier", b.model())


def _quantised() -> Iterator[Case]:
    """Statically quantised; integer sums and the order of rounding differ by design, so only gross errors count."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self.batches = iter([{"image": rng.normal(-0.5, 1, (8, 3, SIDE, SIDE)).astype(np.float32)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    for kind in (QuantType.QUInt8, QuantType.QInt8):
        for padded in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                plain, quantised = Path(folder, "plain.onnx"), Path(folder, "quantised.onnx")
                plain.write_bytes(_classifier(padded=padded).model)
                quantize_static(
                    plain, quantised, Reader(), quant_format=QuantFormat.QDQ, activation_type=kind, weight_type=QuantType.QInt8
                )
                yield Case(f"QDQ, {kind}{', padded max pooling' if padded else ''}", quantised.read_bytes(), 0.05)


def networks(names: Sequence[str]) -> Iterator[Case]:
    """Torchvision's networks as penult exports them, with random weights and random statistics of their normalisations."""
    import torch

    from extractor.backbones.export import to_onnx
    from extractor.backbones.networks import load
    from extractor.backbones.registry import Backbone

    for name in names:
        loaded = load(Backbone(name, "random:0"))
        with torch.no_grad():
            for module in loaded.network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 2)
                    module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.2)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder, "network.onnx")
            to_onnx(loaded, name, path)
            yield Case(name, path.read_bytes())


@dataclass(frozen=True)
class Verdict:
    """What `judge` says of a graph."""

    case: Case
    distances: dict[str, float]
    culprits: list[str]
    ours: float


def judge(case: Case) -> Verdict:
    """Distances by level, the passes without which the largest goes, and the distance in a session like penult's.

    A graph that amplifies a change of the last bits of its input amplifies rounding as much: its limit is higher.
    """
    expected = run(case, AS_WRITTEN)
    distances = {name: distance(case, level, expected) for name, level in LEVELS.items()}
    ours = distance(case, ALL, expected, WRONG_FUSIONS)
    culprits: list[str] = []
    if max(*distances.values(), ours) > case.limit:
        case = replace(case, limit=max(case.limit, AMPLIFIED * apart(run(case, AS_WRITTEN, noise=LAST_BITS), expected)))
    if max(distances.values()) > case.limit:
        level = LEVELS[max(distances, key=distances.__getitem__)]
        culprits = [name for name in PASSES.split() if distance(case, level, expected, [name]) <= case.limit]
    return Verdict(replace(case, model=b""), distances, culprits, ours)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graphs", type=int, default=GRAPHS, help="random graphs")
    parser.add_argument("--networks", nargs="*", default=FAMILIES.split(), help="torchvision's networks")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # of the quantiser
    import onnxruntime

    wrong, counts, skipped = 0, 0, 0
    largest: dict[str, float] = {}
    print(f"ONNX Runtime {onnxruntime.__version__}; off in penult: {', '.join(WRONG_FUSIONS)}")
    cases = ((random_graph, seed) for seed in range(arguments.graphs))
    for case in (*(make(seed) for make, seed in cases), *styles()):
        try:
            verdict = judge(case)
        except Exception:  # as it is written: a random graph whose shapes do not fit
            skipped += 1
            continue
        counts += 1
        wrong += _say(verdict, largest)
    for case in networks(arguments.networks):
        counts += 1
        wrong += _say(judge(case), largest, always=True)
    print(f"{counts} graphs, {skipped} more not run, {wrong} wrong in penult's sessions")
    print("largest distance of those that are right:", ", ".join(f"{name} {value:.1e}" for name, value in largest.items()))
    return min(wrong, 1)


def _say(verdict: Verdict, largest: dict[str, float], *, always: bool = False) -> bool:
    """Print what is wrong, or everything; return whether a session like penult's is."""
    case, worst = verdict.case, max(verdict.distances.values())
    for name, value in {**verdict.distances, "penult": verdict.ours}.items():
        if value <= case.limit == ROUNDING:
            largest[name] = max(largest.get(name, 0), value)
    if always or worst > case.limit:
        listed = ", ".join(f"{name} {value:.1e}" for name, value in verdict.distances.items())
        why = f"; right without {', '.join(verdict.culprits) or 'no single pass'}" if worst > case.limit else ""
        print(f"{case.name}: {listed}, penult {verdict.ours:.1e}{why}", flush=True)
    return verdict.ours > case.limit


if __name__ == "__main__":
    raise SystemExit(main())
