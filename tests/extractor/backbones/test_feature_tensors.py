"""Which tensors of a custom ONNX file are its features, and what is said where they may be the wrong ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from extractor.backbones.custom_onnx import import_onnx
from extractor.backbones.registry import Backbone
from extractor.graphs.backbone_facts import read_facts
from extractor.graphs.parity import relative_l2
from extractor.runtime.session import Embedder
from store.errors import BadDataError, UsageError

SIDE, WIDTH = 16, 8
STATED: dict[str, Any] = {"mean": (0.5,), "std": (0.5,), "resize": 18, "interpolation": "bilinear"}
Tail = Sequence[tuple[Any, ...]]


def write(path: Path, tail: Tail, outputs: dict[str, Sequence[Any]], batch: int | str = "n") -> Path:
    """A convolution, ReLU and pooling to ``x``, with nodes after it; constants are arrays among the inputs."""
    rng = np.random.default_rng(0)
    constants = {"conv.w": rng.standard_normal((WIDTH, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "conv.w"], ["conv"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Relu", ["conv"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["x"]),
    ]
    for i, (op, inputs, results, *attributes) in enumerate(tail):
        names = [f"constant{i}.{j}" if isinstance(each, np.ndarray) else each for j, each in enumerate(inputs)]
        constants |= {name: each for name, each in zip(names, inputs, strict=True) if isinstance(each, np.ndarray)}
        nodes.append(helper.make_node(op, names, results.split(), **(attributes[0] if attributes else {})))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def linear(wide: int) -> Any:
    return np.random.default_rng(1).standard_normal((WIDTH, wide)).astype(np.float32)


def read(file: Path, *layers: str, **more: Any) -> Any:
    return import_onnx(Backbone(str(file), layers=layers, **{**STATED, **more}), file.with_name("backbone.onnx"))


# --- class scores ------------------------------------------------------------------------------------------------------


def test_an_output_that_may_be_class_scores_is_said_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tail = [("Gemm", ["x", linear(7)], "g"), ("Softplus", ["g"], "out")]
    file = write(tmp_path / "net.onnx", tail, {"out": ["n", 7]})
    facts = read(file)
    sentence = "net.onnx: its output 'out' has 7 values and may be class scores rather than features"
    (warning,) = facts.reading["warnings"]
    assert warning.startswith(sentence)
    assert "--layer x takes the input of the last layer with weights" in warning
    assert facts.description()["doubtful"] == ["out"]
    assert read_facts(tmp_path / "backbone.onnx").reading == facts.reading
    caplog.clear()
    import_onnx(Backbone(str(tmp_path / "backbone.onnx")), tmp_path / "again.onnx")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [warning]
    assert "doubtful" not in read(file, "out").reading


def test_a_named_output_of_a_classification_layer_is_said_too(tmp_path: Path) -> None:
    tail = [("Gemm", ["x", linear(7)], "logits"), ("Softmax", ["logits"], "out")]
    file = write(tmp_path / "net.onnx", tail, {"out": ["n", 7]})
    (warning,) = read(file, "out").reading["warnings"]
    assert "'out' is what a classification layer makes, class scores rather than features; --layer x" in warning
    facts = read(file)
    assert (facts.layer, facts.reading["warnings"]) == ("x", [])
    assert facts.reading["scores"] == {"output": "out", "count": 7}


def test_functions_of_the_file_are_looked_into(tmp_path: Path) -> None:
    """As torch exported modules until 2.5."""
    file = write(tmp_path / "net.onnx", [("Linear", ["x", linear(7)], "out", {"domain": "net"})], {"out": ["n", 7]})
    model = onnx.load(file)
    product = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    model.functions.append(helper.make_function("net", "Linear", ["a", "b"], ["c"], product, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("net", 1))
    onnx.save(model, file)
    assert read(file).layer == "x"


def export(network: Any, pixels: Any, file: Path, output: str) -> None:
    """By torch's older exporter, which takes a tenth of the time."""
    axes = {"image": {0: "n"}, output: {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (pixels,), file, input_names=["image"], output_names=[output], dynamic_axes=axes, dynamo=False
        )


class Distilled(torch.nn.Module):
    """Two heads, of one vector or of two tokens, as LeViT's and DeiT's after distillation."""

    def __init__(self, *, tokens: bool) -> None:
        super().__init__()
        self.body, self.tokens = torch.nn.Conv2d(3, WIDTH, 8, 8), tokens
        self.first = torch.nn.Sequential(torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, 5))
        self.second = torch.nn.Sequential(torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, 5))
        torch.nn.init.normal_(self.second[0].running_mean)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = torch.relu(self.body(pixels)).flatten(2).transpose(1, 2)
        a, b = (tokens[:, 0], tokens[:, 1]) if self.tokens else (tokens.mean(1), tokens.mean(1))
        return (self.first(a) + self.second(b)) / 2


@pytest.mark.usefixtures("one_torch_thread")
def test_two_heads_that_torch_exports(tmp_path: Path) -> None:
    for tokens in (True, False):
        network, pixels = Distilled(tokens=tokens).eval(), torch.rand(2, 3, SIDE, SIDE)
        export(network, pixels, tmp_path / f"{tokens}.onnx", "logits")
    with pytest.raises(BadDataError, match=r"True\.onnx: .* joins 2 classification layers with different inputs"):
        read(tmp_path / "True.onnx")
    facts = read(tmp_path / "False.onnx")
    with torch.inference_mode():
        expected = torch.relu(network.body(pixels)).mean((2, 3)).numpy()
    assert facts.dim == WIDTH
    assert relative_l2(Embedder(tmp_path / "backbone.onnx")(pixels.numpy()), expected).max() < 1e-5


# --- several outputs ---------------------------------------------------------------------------------------------------

TOKENS: Tail = [
    ("Reshape", ["map", np.array([0, WIDTH, 49], np.int64)], "flat"),
    ("Transpose", ["flat"], "last_hidden_state", {"perm": [0, 2, 1]}),
    ("LayerNormalization", ["x", np.ones(WIDTH, np.float32)], "pooler_output"),
]
SHAPES = {"last_hidden_state": ["n", 49, WIDTH], "pooler_output": ["n", WIDTH]}
HEAD: Tail = [("Gemm", ["x", linear(7)], "logits"), ("Softmax", ["logits"], "probabilities")]
OUTPUTS = {"logits": ["n", 7], "probabilities": ["n", 7], "map": ["n", WIDTH, 7, 7], "x": ["n", WIDTH]}


@pytest.mark.parametrize(
    ("tail", "names", "layer", "hint"),
    [
        (TOKENS, "last_hidden_state pooler_output", "pooler_output", "--layer pooler_output or --layer last_hidden_state"),
        (HEAD, "logits x", "x", "--layer x"),
        (HEAD, "probabilities map", "x", "--layer x or --layer map"),
    ],
)
def test_the_hint_leads_to_features_and_penultimate_means_them(
    tmp_path: Path, tail: Tail, names: str, layer: str, hint: str
) -> None:
    shapes = SHAPES | OUTPUTS
    file = write(tmp_path / "net.onnx", tail, {name: shapes[name] for name in names.split()})
    with pytest.raises(UsageError, match=rf"has 2 outputs .* Choose the features: {hint}$"):
        read(file)
    assert read(file, "penultimate").layer == layer
    assert read(file, *(["map"] if tail is HEAD else []), "penultimate").layers[-1].layer == layer


def test_outputs_that_all_classify_the_same_features_need_no_choice(tmp_path: Path) -> None:
    best = [*HEAD[:1], ("TopK", ["logits", np.array([3], np.int64)], "values indices")]
    for tail, names in ((HEAD, ("logits", "probabilities")), (best, ("values", "indices"))):
        file = write(tmp_path / "net.onnx", tail, {name: ["n", 7 if tail is HEAD else 3] for name in names})
        model = onnx.load(file)
        if tail is best:
            model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
            onnx.save(model, file)
        assert read(file).layer == "x"


# --- tokens ------------------------------------------------------------------------------------------------------------


class Transformer(torch.nn.Module):
    """The tokens of a vision transformer: a class token, registers, and 4 patches that know of each other."""

    def __init__(self, special: int) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, WIDTH, 8, 8)
        self.special = torch.nn.Parameter(torch.randn(1, special, WIDTH)) if special else None
        self.attention = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        if self.special is not None:
            tokens = torch.cat([self.special.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None) -> dict[int, tuple[Path, Any, Any]]:
    """By the number of special tokens: the file, pixels and tokens."""
    made = {}
    for special in (0, 1, 5):
        network, pixels = Transformer(special).eval(), torch.rand(3, 3, SIDE, SIDE)
        file = tmp_path_factory.mktemp("tokens") / "vit.onnx"
        export(network, pixels, file, "tokens")
        with torch.inference_mode():
            made[special] = (file, pixels.numpy(), network(pixels).numpy())
    return made


@pytest.mark.parametrize("special", [1, 5])
def test_an_average_over_a_class_token_is_said_and_others_are_offered(transformers: Any, special: int) -> None:
    file, pixels, tokens = transformers[special]
    facts = read(file)
    count = "1 token that is" if special == 1 else "5 tokens that are"
    (warning,) = facts.reading["warnings"]
    assert f"has {count} not of the image (a class token, registers) before its 4 patches, and the features are" in warning
    assert f"the average of all {4 + special}. Pass --pooling class, patches or class+mean" in warning
    assert facts.reading["prefix_tokens"] == {"tokens": special}
    assert facts.fingerprints()[0]["pooling"] == "average"
    patches = tokens[:, special:].mean(1)
    expected = {
        "average": (tokens.mean(1), "average"),
        "class": (tokens[:, 0], "token"),
        "token": (tokens[:, 0], "token"),
        "patches": (patches, f"patches after {special}"),
        "class+mean": (np.concatenate([tokens[:, 0], patches], 1), f"class+mean after {special}"),
    }
    for pooling, (features, kind) in expected.items():
        facts = read(file, pooling=pooling)
        assert (facts.pooling, facts.reading["warnings"]) == (kind, [])
        assert relative_l2(Embedder(file.with_name("backbone.onnx"))(pixels), features).max() < 1e-5


def test_a_transformer_without_a_class_token_gives_none(transformers: Any) -> None:
    file, pixels, tokens = transformers[0]
    assert read(file).reading["warnings"] == []
    for pooling in ("class", "token", "class+mean"):
        with pytest.raises(UsageError, match="'tokens' has no class token; all of its 4 tokens are patches"):
            read(file, pooling=pooling)
    assert read(file, pooling="patches").pooling == "average"
    assert relative_l2(Embedder(file.with_name("backbone.onnx"))(pixels), tokens.mean(1)).max() < 1e-5


def test_features_before_their_places_are_doubted(tmp_path: Path) -> None:
    flat = [("Reshape", ["map", np.array([0, WIDTH, 49], np.int64)], "out")]
    file = write(tmp_path / "net.onnx", flat, {"out": ["n", WIDTH, 49]})
    (warning,) = read(file).reading["warnings"]
    assert "'out' was taken as 8 tokens of 49 features. If it is 49 places of 8 features, pass --layer" in warning
    assert read(file, pooling="average").reading["warnings"] == []
    assert read(write(tmp_path / "net.onnx", TOKENS[:2], {"last_hidden_state": ["n", 49, WIDTH]})).reading["warnings"] == []


# --- rows that depend on others ----------------------------------------------------------------------------------------

DYNAMIC: Tail = [
    ("DynamicQuantizeLinear", ["x"], "bytes scale zero"),
    ("MatMulInteger", ["bytes", np.ones((WIDTH, 7), np.int8), "zero"], "sums"),
    ("Cast", ["sums"], "numbers", {"to": TensorProto.FLOAT}),
    ("Mul", ["numbers", "scale"], "scaled"),
    ("Relu", ["scaled"], "out"),
]
TRAINING = {"epsilon": 1e-5, "training_mode": 1}
CHANNELS = [np.ones(WIDTH, np.float32)] * 4


@pytest.mark.parametrize(
    ("tail", "sentence"),
    [
        (DYNAMIC, "DynamicQuantizeLinear quantises with a scale .* use the float network"),
        (
            [("BatchNormalization", ["map", *CHANNELS], "b m v", TRAINING), ("GlobalAveragePool", ["b"], "out")],
            "in training mode",
        ),
        (
            [("Dropout", ["x", np.array(0.5, np.float32), np.array(True)], "d"), ("Relu", ["d"], "out")],
            "Dropout is in training mode",
        ),
        ([("RandomNormalLike", ["x"], "r"), ("Add", ["x", "r"], "s"), ("Relu", ["s"], "out")], "draws random numbers"),
        ([("Sigmoid", ["x"], "p"), ("Bernoulli", ["p"], "r"), ("Relu", ["r"], "out")], "Bernoulli draws random numbers"),
        (
            [("ReduceMax", ["x"], "m", {"axes": [0], "keepdims": 1}), ("Div", ["x", "m"], "d"), ("Relu", ["d"], "out")],
            r"depend on the others of its batch \(ReduceMax along the first axis\)",
        ),
        ([("LpNormalization", ["x"], "out", {"axis": 0})], r"\(LpNormalization along the first axis\)"),
    ],
    ids=["dynamic", "training", "dropout", "noise", "bernoulli", "maximum", "length"],
)
def test_an_image_whose_features_depend_on_others_or_on_chance_is_refused(tmp_path: Path, tail: Tail, sentence: str) -> None:
    file = write(tmp_path / "net.onnx", tail, {"out": ["n", None]})
    with pytest.raises(BadDataError, match=sentence):
        read(file)
    assert read(file, "map").layer == "map"


def test_a_scale_of_each_image_alone_is_kept(tmp_path: Path) -> None:
    """A file that takes one image at a time may compute its scales from it."""
    file = write(tmp_path / "net.onnx", DYNAMIC, {"out": [1, 7]}, batch=1)
    assert read(file).batch == 1
