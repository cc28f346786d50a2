"""Where the features are in graphs that end as other people's classifiers and feature extractors do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from extractor.graphs.classification_layer import Graph
from store.errors import BadDataError

WIDTH, CLASSES = 8, 5
Node = tuple[str, str, str]  # operator, inputs, outputs


def network(*tail: Node | tuple[str, str, str, dict[str, Any]], outputs: str = "out") -> Graph:
    """A convolution, ReLU and pooling that give ``x``, and nodes after it: ``("Gemm", "x w", "out")``.

    Names with a size after a colon are constants: ``w:8x5``, or numbers: ``min=-6``.
    """
    constants = {"conv:8x3x3x3": np.ones((8, 3, 3, 3), np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "conv:8x3x3x3"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["x"]),
    ]
    for op, inputs, results, *attributes in tail:
        names = inputs.split()
        for name in names:
            if ":" in name:
                sides = [int(side) for side in name.partition(":")[2].split("x")]
                constants[name] = np.ones(sides, np.float32)
            if "=" in name:
                constants[name] = np.array(float(name.partition("=")[2]), np.float32)
        nodes.append(helper.make_node(op, names, results.split(), **(attributes[0] if attributes else {})))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return Graph(helper.make_model(graph))


GEMM = ("Gemm", "x w:8x5 b:5", "logits")
CLASSIFIERS: dict[str, list[Any]] = {
    "softmax": [GEMM, ("Softmax", "logits", "out")],
    "two heads, averaged": [("Gemm", "x w:8x5", "a"), ("Gemm", "x v:8x5", "b"), ("Add", "a b", "s"), ("Div", "s two=2", "out")],
    "two heads, each with its own normalisation": [
        ("BatchNormalization", "x g:8 h:8 m:8 v:8", "x1"),
        ("BatchNormalization", "x k:8 l:8 m:8 v:8", "x2"),
        ("Gemm", "x1 w:8x5", "a"),
        ("Gemm", "x2 v:8x5", "b"),
        ("Mean", "a b", "out"),
    ],
    "two heads, side by side": [("Gemm", "x w:8x5", "a"), ("MatMul", "x v:8x3", "b"), ("Concat", "a b", "out", {"axis": 1})],
    "two softmaxes, averaged": [
        ("Gemm", "x w:8x5", "a"),
        ("Gemm", "x v:8x5", "b"),
        ("Softmax", "a", "p"),
        ("Softmax", "b", "q"),
        ("Add", "p q", "out"),
    ],
    "a cosine of normalised weights": [
        ("ReduceL2", "w:5x8", "length"),
        ("Div", "w:5x8 length", "unit"),
        ("Transpose", "unit", "turned"),
        ("MatMul", "x turned", "cosine"),
        ("Mul", "cosine scale=30", "out"),
    ],
    "a cosine divided by the length of the features": [
        ("MatMul", "x w:8x5", "product"),
        ("ReduceL2", "x", "length"),
        ("Clip", "length eps=0.00000001", "positive"),
        ("Div", "product positive", "out"),
    ],
    "limited scores": [GEMM, ("Clip", "logits low=-6 high=6", "out")],
    "limited probabilities": [GEMM, ("Softmax", "logits", "p"), ("Clip", "p low=0 high=1", "out")],
    "the best classes": [GEMM, ("TopK", "logits k=3", "out indices")],
    "the best class": [GEMM, ("ArgMax", "logits", "out")],
    "probabilities without the background": [
        ("Gemm", "x w:8x6", "logits"),
        ("Softmax", "logits", "p"),
        ("Slice", "p from=1 to=6 axis=1", "out"),
    ],
    "a softmax written out": [
        GEMM,
        ("ReduceMax", "logits", "most"),
        ("Sub", "logits most", "shifted"),
        ("Exp", "shifted", "e"),
        ("ReduceSum", "e", "total"),
        ("Div", "e total", "out"),
    ],
    "a softmax of which a share is kept": [
        GEMM,
        ("Exp", "logits", "e"),
        ("ReduceSum", "e", "t"),
        ("Add", "t eps=1", "u"),
        ("Div", "e u", "out"),
    ],
    "the logarithm of a softmax written out": [GEMM, ("ReduceLogSumExp", "logits", "l"), ("Sub", "logits l", "out")],
    "a softmax after a batch normalisation": [
        GEMM,
        ("BatchNormalization", "logits g:5 h:5 m:5 v:5", "n"),
        ("Softmax", "n", "out"),
    ],
    "a shape that is computed": [
        GEMM,
        ("Shape", "logits", "shape"),
        ("Reshape", "logits shape", "out"),
    ],
}


@pytest.mark.parametrize("form", CLASSIFIERS)
def test_a_classifier_is_cut_at_the_input_of_its_classification_layer(form: str) -> None:
    assert network(*CLASSIFIERS[form]).classifier_input("out") == "x"


EXTRACTORS: dict[str, list[Any]] = {
    "an activation": [GEMM, ("Relu", "logits", "out")],
    "a Clip to six": [GEMM, ("Clip", "logits low=0 high=6", "out")],
    "a swish written out": [GEMM, ("Sigmoid", "logits", "s"), ("Mul", "logits s", "out")],
    "a mish written out": [
        GEMM,
        ("Exp", "logits", "e"),
        ("Add", "e one=1", "f"),
        ("Log", "f", "l"),
        ("Tanh", "l", "t"),
        ("Mul", "logits t", "out"),
    ],
    "a leaky ReLU written out": [GEMM, ("Mul", "logits slope=0.1", "small"), ("Max", "logits small", "out")],
    "a vector of length 1": [("Gemm", "x w:8x5", "e"), ("ReduceL2", "e", "l"), ("Div", "e l", "out")],
    "a vector of length 1 by its squares": [
        ("Gemm", "x w:8x5", "e"),
        ("Mul", "e e", "squares"),
        ("ReduceSum", "squares", "sum"),
        ("Sqrt", "sum", "l"),
        ("Div", "e l", "out"),
    ],
    "a residual sum": [("Gemm", "x w:8x8", "h"), ("Relu", "h", "r"), ("Gemm", "r v:8x8", "y"), ("Add", "x y", "out")],
    "a residual sum with a projection": [
        ("Gemm", "x w:8x8", "h"),
        ("Relu", "h", "r"),
        ("Gemm", "r v:8x5", "y"),
        ("Gemm", "x u:8x5", "z"),
        ("Add", "y z", "out"),
    ],
    "a gate": [("Gemm", "x w:8x5", "a"), ("Gemm", "x v:8x5", "b"), ("Sigmoid", "b", "s"), ("Mul", "a s", "out")],
    "a normalisation": [GEMM, ("LayerNormalization", "logits g:5 b:5", "out")],
    "convolutions that are joined": [
        ("Conv", "map w:8x8x1x1", "a", {"kernel_shape": [1, 1]}),
        ("Relu", "a", "ra"),
        ("Conv", "map v:8x8x3x3", "b", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("Concat", "ra b", "joined", {"axis": 1}),
        ("GlobalAveragePool", "joined", "out"),
    ],
    "attention over the places": [
        ("Conv", "map w:1x8x1x1", "a", {"kernel_shape": [1, 1]}),
        ("Softmax", "a", "weights"),
        ("Mul", "map weights", "weighted"),
        ("ReduceSum", "weighted", "out"),
    ],
    "half of a linear layer, as an encoder's mean": [("Gemm", "x w:8x10", "both"), ("Slice", "both from=0 to=5 axis=1", "out")],
}


@pytest.mark.parametrize("form", EXTRACTORS)
def test_a_feature_extractor_is_used_as_it_is(form: str) -> None:
    graph = network(*EXTRACTORS[form])
    assert graph.classifier_input("out") is None
    assert not graph.looks_like_scores("out", CLASSES)


DISTILLED = [
    ("LayerNormalization", "x g:8 b:8", "tokens"),
    ("Gather", "tokens zero=0", "first"),
    ("Gather", "tokens one=1", "second"),
    ("Gemm", "first w:8x5", "a"),
    ("Gemm", "second v:8x5", "b"),
]


def test_heads_with_different_inputs_are_refused_with_both() -> None:
    with pytest.raises(BadDataError, match=r"joins 2 classification layers .* Pass --layer first or --layer second"):
        network(*DISTILLED, ("Add", "a b", "out")).classifier_input("out")


@pytest.mark.parametrize(
    "tail",
    [
        [("Einsum", "x w:8x5", "e", {"equation": "nd,dc->nc"}), ("Softmax", "e", "out")],
        [("Mul", "x x", "squares"), ("Softmax", "squares", "out")],
    ],
)
def test_class_scores_of_an_unknown_layer_are_refused(tail: list[Any]) -> None:
    with pytest.raises(
        BadDataError, match=r"may be a classification layer|class scores, .* cannot be told .* Pass --layer NAME"
    ):
        network(*tail).classifier_input("out")


@pytest.mark.parametrize(
    ("tail", "width"),
    [
        ([("Relu", "x", "out")], 1000),
        ([("Gemm", "x w:8x5", "e"), ("Softplus", "e", "out")], CLASSES),
        ([("Unsqueeze", "x", "u"), ("Sub", "u w:5x8", "d"), ("ReduceL2", "d", "far"), ("Neg", "far", "out")], CLASSES),
        (
            [
                ("Unsqueeze", "x", "u"),
                ("Mul", "u w:5x8", "p"),
                ("ReduceSum", "p", "s"),
                ("ReduceL2", "x", "l"),
                ("Div", "s l", "out"),
            ],
            5,
        ),
    ],
    ids=["a usual number", "an operator that is not known", "distances", "a cosine without a product of matrices"],
)
def test_an_output_that_looks_like_class_scores(tail: list[Any], width: int) -> None:
    graph = network(*tail)
    assert graph.classifier_input("out") is None
    assert graph.looks_like_scores("out", width)


def test_an_embedding_does_not_look_like_class_scores() -> None:
    tokens = [("LayerNormalization", "x g:8 b:8", "n"), ("MatMul", "n w:8x8", "m"), ("Add", "m x", "out")]
    assert not network(*tokens).looks_like_scores("out", WIDTH)
