"""Custom ONNX files: every shape they may have works, or is refused with the sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from extractor.backbones.custom_onnx import import_onnx
from extractor.backbones.export import export
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, read_facts
from extractor.graphs.parity import relative_l2
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.images import decode
from extractor.runtime.session import Embedder
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, PenultError, UsageError
from store.fingerprint import file_digest

SIDE, WIDTH, CLASSES = 16, 8, 5
HALF = {"mean": (0.5,), "std": (0.5,)}
Dims = list[Any]


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"conv.w": (WIDTH, 3, 3, 3), "conv.b": (WIDTH,), "fc.w": (WIDTH, CLASSES), "fc.b": (CLASSES,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def classifier(
    *,
    layout: str = "nchw",
    dtype: int = TensorProto.FLOAT,
    batch: int | str = "n",
    side: int | str = SIDE,
    tail: Callable[[], list[Any]] | None = None,
    outputs: tuple[str, ...] = ("probabilities",),
    opset: int = 17,
    frozen_reshape: bool = False,
    inputs: int = 1,
) -> Any:
    """A small classifier: convolution, ReLU, pooling, a linear layer, softmax."""
    shape: Dims = [batch, 3, side, side] if layout == "nchw" else [batch, side, side, 3]
    nodes, name = [], "image"
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT))
        name = "float"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [name], ["first"], perm=[0, 3, 1, 2]))
        name = "first"
    nodes += [
        helper.make_node("Conv", [name, "conv.w", "conv.b"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
    ]
    constants = weights()
    if frozen_reshape:  # as exporters write it when they trace one batch size
        constants["shape"] = np.array([batch, WIDTH], np.int64)
        nodes.append(helper.make_node("Reshape", ["pooled", "shape"], ["flat"]))
    else:
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes += (tail or usual_tail)()
    used = {each for node in nodes for each in node.input}
    made = {each for node in nodes for each in node.output}
    more = [helper.make_tensor_value_info(f"more{i + 1}", TensorProto.FLOAT, ["n"]) for i in range(inputs - 1)]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", dtype, shape), *more],
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in outputs],
        [numpy_helper.from_array(value, key) for key, value in constants.items() if key in used],
    )
    assert set(outputs) <= made
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def usual_tail() -> list[Any]:
    return [
        helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]


def put(model: Any, path: Path, **options: Any) -> Path:
    onnx.save(model, path, **options)
    return path


def features_of(facts: BackboneFacts, images: list[Any]) -> Any:
    """What the classifier's penultimate layer is, computed by NumPy from uint8 pixels."""
    w = weights()
    x = np.pad(facts.preprocess.normalise(np.stack(images)), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    conv = np.einsum("nchwij,ocij->nohw", windows, w["conv.w"]) + w["conv.b"][:, None, None]
    return np.maximum(conv, 0).mean(axis=(2, 3))


@pytest.fixture(scope="module")
def pixels() -> list[Any]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(5)]


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nchw": ({}, HALF),
    "nhwc": ({"layout": "nhwc"}, HALF),
    "fixed-batch-1": ({"batch": 1}, HALF),
    "fixed-batch-4": ({"batch": 4}, HALF),
    "frozen-batch-2": ({"batch": 2, "frozen_reshape": True}, HALF),
    "dynamic-size": ({"side": "s"}, {**HALF, "crop": SIDE}),
    "uint8": ({"dtype": TensorProto.UINT8}, {}),
    "uint8-nhwc": ({"dtype": TensorProto.UINT8, "layout": "nhwc"}, {}),
    "raw-range": ({}, {"input_range": 255.0}),
    "caffe": ({}, {"input_range": 255.0, "mean": (104.0, 117.0, 124.0), "std": (1.0,), "channels": "bgr"}),
    "opset-20": ({"opset": 20}, HALF),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_usual_form_gives_the_penultimate_features(tmp_path: Path, pixels: list[Any], variant: str) -> None:
    shape, stated = VARIANTS[variant]
    file = put(classifier(**shape), tmp_path / "net.onnx")
    facts = import_onnx(Backbone(str(file), **stated), tmp_path / "backbone.onnx")
    assert (facts.name, facts.layer, facts.pooling, facts.dim) == ("onnx", "flat", "none", WIDTH)
    assert facts.batch == (2 if variant == "frozen-batch-2" else None)
    assert (facts.preprocess.crop, facts.preprocess.resize) == (SIDE, round(SIDE * 256 / 224))
    assert read_facts(tmp_path / "backbone.onnx") == facts
    embed = Embedder(tmp_path / "backbone.onnx", batch_size=3)
    assert embed.batch_size == (facts.batch or 3)
    found = embed(facts.preprocess.normalise(np.stack(pixels)))
    assert found.dtype == np.float32
    assert relative_l2(found, features_of(facts, pixels)).max() < 1e-5


def rename(model: Any, old: str, new: str) -> Any:
    for names in [node.input for node in model.graph.node] + [node.output for node in model.graph.node]:
        names[:] = [new if name == old else name for name in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    return model


@pytest.mark.parametrize(
    ("old", "new"),
    [("image", "pixels"), ("relu", "pixels"), ("flat", "features"), ("relu", "features"), ("probabilities", "features")],
)
def test_a_tensor_may_have_one_of_our_names(tmp_path: Path, pixels: list[Any], old: str, new: str) -> None:
    file = put(rename(classifier(), old, new), tmp_path / "net.onnx")
    facts = import_onnx(Backbone(str(file), **HALF), tmp_path / "backbone.onnx")
    assert facts.layer == ("features" if old == "flat" else "flat")
    found = Embedder(tmp_path / "backbone.onnx")(facts.preprocess.normalise(np.stack(pixels)))
    assert relative_l2(found, features_of(facts, pixels)).max() < 1e-5


def test_weights_that_are_inputs_too(tmp_path: Path, pixels: list[Any]) -> None:
    """As every file was before IR version 4, those of the ONNX model zoo among them."""
    model = classifier(opset=9)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3
    facts = import_onnx(Backbone(str(put(model, tmp_path / "net.onnx")), **HALF), tmp_path / "backbone.onnx")
    found = Embedder(tmp_path / "backbone.onnx")(facts.preprocess.normalise(np.stack(pixels)))
    assert relative_l2(found, features_of(facts, pixels)).max() < 1e-5


def test_nodes_may_stand_in_any_order(tmp_path: Path) -> None:
    """ONNX Runtime takes them so, and its own conversion to float16 puts the cast of the input last."""
    model = classifier(dtype=TensorProto.FLOAT16)
    model.graph.node.append(model.graph.node.pop(0))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert import_onnx(Backbone(str(tmp_path / "net.onnx"), **HALF), tmp_path / "backbone.onnx").layer == "flat"


def test_a_batch_of_minus_one_is_any(tmp_path: Path) -> None:
    model = classifier()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert import_onnx(Backbone(str(tmp_path / "net.onnx"), **HALF), tmp_path / "backbone.onnx").batch is None


def mixing() -> list[Any]:
    """What a normalisation in training mode does: the mean is that of the batch."""
    return [
        helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["flat", "mean"], ["centred"]),
        helper.make_node("Relu", ["centred"], ["probabilities"]),
    ]


def transposed() -> list[Any]:
    return [
        helper.make_node("Transpose", ["flat"], ["turned"], perm=[1, 0]),
        helper.make_node("Relu", ["turned"], ["probabilities"]),
    ]


def too_wide() -> list[Any]:
    repeats = helper.make_tensor("repeats", TensorProto.INT64, [2], [1, 65536 // WIDTH + 1])
    return [
        helper.make_node("Constant", [], ["repeats"], value=repeats),
        helper.make_node("Tile", ["flat", "repeats"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["probabilities"]),
    ]


def quantised() -> list[Any]:
    """What `onnxruntime.quantization` makes of a classifier by default ends so, but for the scales."""
    return [
        helper.make_node("DynamicQuantizeLinear", ["flat"], ["bytes", "scale", "zero"]),
        helper.make_node("Cast", ["fc.w"], ["fc.bytes"], to=TensorProto.INT8),
        helper.make_node("MatMulInteger", ["bytes", "fc.bytes"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]


@pytest.mark.parametrize(
    ("tail", "sentence"),
    [
        (mixing, "features of an image depend on the others of its batch"),
        (transposed, r"'probabilities' has shape \(8, 3\) for 3 images, not features of each"),
        (too_wide, "'probabilities' gives 65544 features; expected at most 65536"),
        (quantised, "DynamicQuantizeLinear quantises with a scale that is computed from the whole batch.*quantise statically"),
    ],
)
def test_what_is_no_feature_of_one_image_is_refused(tmp_path: Path, tail: Callable[[], list[Any]], sentence: str) -> None:
    file = put(classifier(tail=tail), tmp_path / "net.onnx")
    with pytest.raises(BadDataError, match=sentence):
        import_onnx(Backbone(str(file), **HALF), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_the_penultimate_layer_beside_another(tmp_path: Path) -> None:
    file = put(classifier(), tmp_path / "net.onnx")
    facts = import_onnx(Backbone(str(file), **HALF, layers=("relu", "penultimate")), tmp_path / "m.onnx")
    assert [layer.layer for layer in facts.layers] == ["relu", "flat"]


def test_external_data_comes_along_and_decides_the_digest(tmp_path: Path, pixels: list[Any]) -> None:
    inline = put(classifier(), tmp_path / "inline.onnx")
    beside = put(classifier(), tmp_path / "beside.onnx", save_as_external_data=True, location="beside.bin", size_threshold=0)
    a = import_onnx(Backbone(str(inline), **HALF), tmp_path / "a.onnx")
    b = import_onnx(Backbone(str(beside), **HALF), tmp_path / "b.onnx")
    batch = a.preprocess.normalise(np.stack(pixels))
    np.testing.assert_array_equal(Embedder(tmp_path / "a.onnx")(batch), Embedder(tmp_path / "b.onnx")(batch))
    data = bytearray((tmp_path / "beside.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "beside.bin").write_bytes(data)
    assert import_onnx(Backbone(str(beside), **HALF), tmp_path / "c.onnx").weights_sha256 != b.weights_sha256
    (tmp_path / "beside.bin").write_bytes(data[:-8])
    with pytest.raises(BadDataError, match="its external data cannot be read"):
        import_onnx(Backbone(str(beside), **HALF), tmp_path / "d.onnx")
    (tmp_path / "beside.bin").unlink()
    with pytest.raises(InputMissingError, match=r"keeps weights in beside.bin, which is not beside it"):
        import_onnx(Backbone(str(beside), **HALF), tmp_path / "d.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "beside.onnx", "c.onnx", "inline.onnx"]


def test_external_data_of_a_branch_is_found_too() -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "then", [], [])
    tensor = branch.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="inner.bin")
    model = classifier()
    model.graph.node.append(helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch))
    assert onnx_file.external_files(model) == ["inner.bin"]


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    model = classifier()
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "secret").write_bytes(bytes(10**4))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadDataError, match=r"keeps weights in \.\./secret, outside its own folder; refused"):
        import_onnx(Backbone(str(tmp_path / "in/net.onnx"), **HALF), tmp_path / "m.onnx")


def test_a_backbone_too_large_for_one_file_keeps_its_weights_beside_it(
    tmp_path: Path, pixels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered here; `make backbones` exports the two networks that really are over it."""
    whole = import_onnx(Backbone(str(put(classifier(), tmp_path / "net.onnx")), **HALF), tmp_path / "whole.onnx")
    monkeypatch.setattr(onnx_file, "MAX_INLINE", 0)
    model = onnx.load(tmp_path / "whole.onnx")
    weight = model.graph.initializer.add()
    weight.CopyFrom(numpy_helper.from_array(np.ones((64, 64), np.float32), "large"))  # onnx leaves small tensors inside
    model.graph.node.append(helper.make_node("Identity", ["large"], ["unused"]))

    def save() -> Path:
        with onnx_file.replacing(tmp_path / "m.onnx") as new:
            one = onnx.ModelProto()
            one.CopyFrom(model)
            onnx_file.save(one, new)
            if (tmp_path / "fail").exists():
                raise ZeroDivisionError
        return onnx_file.data_files(tmp_path / "m.onnx")[0]

    assert save() != save()  # the second takes the place of the first
    (data,) = onnx_file.data_files(tmp_path / "m.onnx")
    assert list(tmp_path.glob("*.data")) == [data]
    assert data.name.startswith("m-")
    assert data.stat().st_size >= 64 * 64 * 4
    (tmp_path / "fail").touch()
    with pytest.raises(ZeroDivisionError):
        save()
    (tmp_path / "fail").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [data.name, "m.onnx", "net.onnx", "whole.onnx"]
    assert onnx_file.digest(tmp_path / "m.onnx") != file_digest(tmp_path / "m.onnx")
    batch = whole.preprocess.normalise(np.stack(pixels))
    np.testing.assert_array_equal(Embedder(tmp_path / "m.onnx")(batch), Embedder(tmp_path / "whole.onnx")(batch))
    (tmp_path / "copy").mkdir()
    onnx_file.copy(tmp_path / "m.onnx", tmp_path / "copy/m.onnx")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [data.name, "m.onnx"]


# --- what is not known must be stated ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stated", "kind", "sentence"),
    [
        ({}, {}, UsageError, r"does not say how they were normalised.*--mean 0\.5 --std 0\.5.*net\.toml"),
        ({}, {"mean": (0.5,)}, UsageError, "does not say how they were normalised"),
        ({}, {"mean": (0.5, 0.5), "std": (0.5,)}, UsageError, r"--mean 0\.5,0\.5: expected one value, or three"),
        ({}, {"mean": (0.5,), "std": (0.0,)}, UsageError, "--std 0,0,0: it divides"),
        ({}, {"mean": (0.5,), "std": (-1.0,)}, UsageError, "--std -1,-1,-1: it divides"),
        ({}, {"mean": (float("nan"),), "std": (1.0,)}, UsageError, "--mean nan,nan,nan: expected numbers"),
        ({}, {"mean": (123.7,), "std": (58.4,)}, UsageError, r"is of pixels in 0\.\.255.*Pass --input-range 255"),
        ({}, {**HALF, "input_range": 255.0}, UsageError, r"are of pixels in 0\.\.1.*Leave --input-range out"),
        ({}, {**HALF, "resize": 0}, UsageError, "--resize is 0; expected 1 to 4096 pixels"),
        ({}, {**HALF, "resize": 10**9}, UsageError, "--resize is 1000000000; expected 1 to 4096 pixels"),
        ({}, {**HALF, "resize": 8}, UsageError, "--crop 16 is larger than --resize 8: every image would get black borders"),
        ({}, {**HALF, "resize": 20, "squash": True}, UsageError, "--squash resizes to the square of 16 pixels itself"),
        ({"side": "s"}, {**HALF, "crop": -5}, UsageError, "--crop is -5; expected 1 to 4096 pixels"),
        ({}, {**HALF, "layers": ("flat", "flat")}, UsageError, "--layer flat --layer flat: one of them is named twice"),
        ({}, {**HALF, "crop": 20}, UsageError, r"--crop 20: .* takes 16 x 16 pixels"),
        ({}, {**HALF, "interpolation": "magic"}, UsageError, "--interpolation magic: expected nearest, bilinear"),
        ({}, {**HALF, "input_range": 2.0}, UsageError, "--input-range 2: expected 1"),
        ({}, {**HALF, "layers": ("flatt",)}, UsageError, r"--layer flatt: .* has no such tensor; did you mean 'flat'"),
        ({"side": "s"}, HALF, UsageError, "takes images of any size. Pass the size it was trained on, such as --crop 224"),
        ({"dtype": TensorProto.UINT8}, HALF, UsageError, "takes raw bytes: leave --mean out"),
        (
            {"outputs": ("logits", "flat")},
            HALF,
            UsageError,
            r"2 outputs \(logits, flat\); .* Choose the features: --layer flat$",
        ),
        ({"inputs": 2}, HALF, BadDataError, r"takes 2 inputs \(image, more1\); a backbone takes images alone"),
        ({"dtype": TensorProto.INT32}, HALF, BadDataError, "takes image of type INT32; expected float or uint8"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, shape: dict[str, Any], stated: dict[str, Any], kind: type[PenultError], sentence: str
) -> None:
    file = put(classifier(**shape), tmp_path / "net.onnx")
    with pytest.raises(kind, match=sentence):
        import_onnx(Backbone(str(file), **stated), tmp_path / "backbone.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("dims", "sentence"),
    [
        (["n", 3, 16], r"of shape \(\?, 3, 16\); expected \(n, 3, h, w\) or \(n, h, w, 3\)"),
        (["n", 1, 16, 16], r"of shape \(\?, 1, 16, 16\): not three channels"),
        (["n", 3, 16, 24], "takes images of 16 x 24 pixels; only square inputs"),
        (["n", "c", "h", "w"], "Pass the size it was trained on"),  # its convolution says which axis has the channels
    ],
)
def test_an_input_that_is_no_square_rgb_image_is_refused(tmp_path: Path, dims: Dims, sentence: str) -> None:
    model = classifier()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, dims))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PenultError, match=sentence):
        import_onnx(Backbone(str(tmp_path / "net.onnx"), **HALF), tmp_path / "m.onnx")


def test_a_sidecar_says_what_the_file_does_not(tmp_path: Path) -> None:
    file = put(classifier(outputs=("logits", "flat")), tmp_path / "net.onnx")
    sidecar = tmp_path / "net.toml"
    sidecar.write_text('mean = [0.4, 0.5, 0.6]\nstd = 0.25\nresize = 20\ninterpolation = "bicubic"\nlayer = "flat"\n')
    facts = import_onnx(Backbone(str(file)), tmp_path / "m.onnx")
    assert (facts.preprocess.mean, facts.preprocess.std) == ((0.4, 0.5, 0.6), (0.25, 0.25, 0.25))
    assert (facts.preprocess.resize, facts.preprocess.interpolation, facts.layer) == (20, "bicubic", "flat")
    assert import_onnx(Backbone(str(file), resize=24), tmp_path / "m.onnx").preprocess.resize == 24  # a flag wins
    sidecar.write_text("maen = 0.5\n")
    with pytest.raises(UsageError, match=r"net.toml: there is no setting 'maen'; did you mean 'mean'"):
        import_onnx(Backbone(str(file)), tmp_path / "m.onnx")
    sidecar.write_text("mean = 'half'\n")
    with pytest.raises(UsageError, match=r'net.toml: mean is "half"; expected a number'):
        import_onnx(Backbone(str(file)), tmp_path / "m.onnx")
    sidecar.write_text("mean = \n")
    with pytest.raises(UsageError, match=r"net.toml: "):
        import_onnx(Backbone(str(file)), tmp_path / "m.onnx")


# --- where the features are --------------------------------------------------------------------------------------------


def headless() -> list[Any]:
    return [helper.make_node("Relu", ["flat"], ["probabilities"])]


def with_hidden() -> list[Any]:
    """A feature extractor that ends in a linear layer and an activation, as VGG without its classifier."""
    return [
        helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["probabilities"]),
    ]


@pytest.mark.parametrize(
    ("tail", "layer", "dim"), [(headless, "probabilities", WIDTH), (with_hidden, "probabilities", CLASSES)]
)
def test_a_feature_extractor_is_used_as_it_is(tmp_path: Path, tail: Any, layer: str, dim: int) -> None:
    file = put(classifier(tail=tail), tmp_path / "net.onnx")
    facts = import_onnx(Backbone(str(file), **HALF), tmp_path / "m.onnx")
    assert (facts.layer, facts.dim) == (layer, dim)


def test_a_convolutional_classifier_is_ambiguous_with_an_activation_only(tmp_path: Path) -> None:
    """SqueezeNet's classifier and a MobileNet without one end alike: 1x1 convolution, activation, pooling."""

    def model(*, activated: bool) -> Any:
        made = classifier()
        nodes = [node for node in made.graph.node if node.output[0] in ("conv", "relu")]
        end = "act" if activated else "one"
        nodes.append(helper.make_node("Conv", ["relu", "one.w"], ["one"], kernel_shape=[1, 1]))
        nodes += [helper.make_node("Relu", ["one"], ["act"])] if activated else []
        nodes += [
            helper.make_node("GlobalAveragePool", [end], ["gap"]),
            helper.make_node("Flatten", ["gap"], ["probabilities"]),
        ]
        del made.graph.node[:]
        made.graph.node.extend(nodes)
        made.graph.initializer.append(numpy_helper.from_array(np.ones((CLASSES, WIDTH, 1, 1), np.float32), "one.w"))
        return made

    file = put(model(activated=True), tmp_path / "net.onnx")
    with pytest.raises(BadDataError, match="Pass --layer probabilities to use the output as it is, or --layer relu for"):
        import_onnx(Backbone(str(file), **HALF), tmp_path / "m.onnx")
    chosen = import_onnx(Backbone(str(file), **HALF, layers=("relu",)), tmp_path / "m.onnx")
    assert (chosen.layer, chosen.pooling, chosen.dim) == ("relu", "average", WIDTH)
    plain = put(model(activated=False), tmp_path / "net.onnx")
    facts = import_onnx(Backbone(str(plain), **HALF), tmp_path / "m.onnx")
    assert (facts.layer, facts.reading["doubtful"]) == ("relu", ["relu"])
    assert (
        "may be a classification layer or belong to the network; --layer probabilities takes" in facts.reading["warnings"][-1]
    )


def test_several_layers_are_pooled_and_equal_their_single_runs(tmp_path: Path, pixels: list[Any]) -> None:
    file = put(classifier(), tmp_path / "net.onnx")
    both = import_onnx(Backbone(str(file), **HALF, layers=("relu", "flat"), pooling="max"), tmp_path / "both.onnx")
    assert [(each.layer, each.pooling, each.output) for each in both.layers] == [
        ("relu", "max", "features"),
        ("flat", "none", "features_1"),
    ]
    batch = both.preprocess.normalise(np.stack(pixels))
    together = Embedder(tmp_path / "both.onnx", outputs=both.outputs).embed(batch)
    for layer, found in zip(("relu", "flat"), together, strict=True):
        alone = import_onnx(Backbone(str(file), **HALF, layers=(layer,), pooling="max"), tmp_path / "one.onnx")
        np.testing.assert_array_equal(found, Embedder(tmp_path / "one.onnx")(batch))
        assert alone.fingerprints()[0] == both.only(layer).fingerprints()[0]


# --- damaged and hostile files -----------------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_found_different(tmp_path: Path) -> None:
    data = classifier().SerializeToString()
    file, out = tmp_path / "net.onnx", tmp_path / "m.onnx"
    file.write_bytes(data)
    sound = import_onnx(Backbone(str(file), **HALF), out).weights_sha256
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 8).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        out.unlink(missing_ok=True)
        try:
            digest = import_onnx(Backbone(str(file), **HALF), out).weights_sha256
        except (BadDataError, UsageError) as error:
            digest = str(error)
        assert digest != sound
        assert out.exists() != ("net.onnx" in digest)
    for cut in (0, 10, len(data) // 2):
        file.write_bytes(data[:cut])
        with pytest.raises(BadDataError, match=r"net\.onnx"):
            import_onnx(Backbone(str(file), **HALF), out)


def circle(model: Any) -> None:
    model.graph.node[0].input[0] = "relu"


def no_text(model: Any) -> None:
    model.graph.node[1].op_type = "Rel@"


def no_type(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 99


def short_weights(model: Any) -> None:
    model.graph.initializer[-1].raw_data = b"short"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (circle, "the graph has a circle of nodes"),
        (no_text, "a name in it is no text"),
        (no_type, "takes image of type number 99; expected float or uint8"),
        (short_weights, r"net\.onnx"),
    ],
)
def test_damage_that_a_flipped_bit_seldom_makes(tmp_path: Path, damage: Callable[[Any], None], sentence: str) -> None:
    model = classifier()
    damage(model)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString().replace(b"Rel@", b"Rel\xff"))
    with pytest.raises(BadDataError, match=sentence):
        import_onnx(Backbone(str(tmp_path / "net.onnx"), **HALF), tmp_path / "m.onnx")


def test_operators_that_run_somebodys_code_are_refused(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[1].domain = "evil.ops"
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadDataError, match=r"needs operators of evil\.ops, which run custom code"):
        import_onnx(Backbone(str(tmp_path / "net.onnx"), **HALF), tmp_path / "m.onnx")


def test_a_network_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    model = classifier()
    for tensor in model.graph.initializer:
        if tensor.name == "conv.b":
            tensor.CopyFrom(numpy_helper.from_array(np.full(WIDTH, np.nan, np.float32), "conv.b"))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadDataError, match="gives NaN or infinity in 'flat' for ordinary pixels"):
        import_onnx(Backbone(str(tmp_path / "net.onnx"), **HALF), tmp_path / "m.onnx")


def test_files_of_penults_own_say_everything_themselves(tmp_path: Path) -> None:
    own = tmp_path / "own.onnx"
    facts = import_onnx(Backbone(str(put(classifier(), tmp_path / "net.onnx")), **HALF), own)
    again = import_onnx(Backbone(str(own)), tmp_path / "again.onnx")
    assert again.layers == facts.layers
    assert again.weights_sha256 == onnx_file.digest(own)
    with pytest.raises(UsageError, match="describes its own input and features: leave --mean, --std, --layer out"):
        import_onnx(Backbone(str(own), **HALF, layers=("flat",)), tmp_path / "m.onnx")


# --- the whole way -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exports_here")
def test_two_feature_sets_in_one_cache(dataset: Callable[..., Path], tmp_path: Path) -> None:
    file = put(classifier(), tmp_path / "net.onnx")
    data = dataset(tmp_path / "data")
    options = Options(device="cpu", quiet=True, val_fraction=0, test_fraction=0)
    both = Backbone(str(file), **HALF, layers=("relu", "flat"))
    summary = run_extract(ImageFolder(data), both, tmp_path / "both", options)
    again = run_extract(ImageFolder(data), both, tmp_path / "both", options)
    assert (again.computed, again.inference_calls) == (0, 0)
    for layer in ("relu", "flat"):
        cache = FeatureCache(tmp_path / "both", layer)
        run_extract(ImageFolder(data), Backbone(str(file), **HALF, layers=(layer,)), tmp_path / layer, options)
        alone = FeatureCache(tmp_path / layer)
        assert cache.fingerprint == alone.fingerprint
        keys = [row.sha256 for row in cache.rows()]
        assert len(keys) == summary.ok
        np.testing.assert_array_equal(cache.features(keys), alone.features(keys))
    assert FeatureCache(tmp_path / "both").layers == ["relu", "flat"]
    with pytest.raises(UsageError, match="has no features of layer 'conv'; it has 'relu', 'flat'"):
        FeatureCache(tmp_path / "both", "conv")
    with pytest.raises(BadDataError, match="the backbone has no features of layer 'conv'; it has 'relu', 'flat'"):
        read_facts(tmp_path / "both/backbone.onnx").only("conv")
    with pytest.raises(PenultError, match="holds features of relu, flat, this run gives those of flat; use a new cache"):
        run_extract(ImageFolder(data), Backbone(str(file), **HALF, layers=("flat",)), tmp_path / "both", options)


def test_a_renamed_file_is_the_same_backbone(dataset: Callable[..., Path], tmp_path: Path) -> None:
    data, options = dataset(tmp_path / "data"), Options(device="cpu", quiet=True, val_fraction=0, test_fraction=0)
    file = put(classifier(), tmp_path / "net.onnx")
    run_extract(ImageFolder(data), Backbone(str(file), **HALF), tmp_path / "c", options)
    moved = file.rename(tmp_path / "other.onnx")
    assert run_extract(ImageFolder(data), Backbone(str(moved), **HALF), tmp_path / "c", options).computed == 0


@pytest.mark.assets
def test_the_shared_classifier_is_cut_at_its_1280_features(assets: Path, tmp_path: Path) -> None:
    file = assets / "weights/mobilenet_v2-classifier-same-padding.onnx"
    facts = export(Backbone(str(file), **HALF), tmp_path / "m.onnx")
    assert (facts.dim, facts.preprocess.crop) == (1280, 224)
    photo = next(path for path in sorted((assets / "data/photos").rglob("*")) if path.is_file())
    batch = facts.preprocess.normalise(facts.preprocess.pixels(decode(photo.read_bytes()))[None])
    whole = onnx.load(file)
    whole.graph.output.extend([helper.make_tensor_value_info(facts.layer, TensorProto.FLOAT, None)])
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([facts.layer], {"pixel_values": batch})
    assert relative_l2(Embedder(tmp_path / "m.onnx")(batch), expected).max() < 1e-5


def rewritten(model: Any, form: str) -> Any:
    """The shared classifier as other exporters would have written it."""
    graph = model.graph
    dims: dict[str, Dims] = {
        "nhwc": ["batch", 224, 224, 3],
        "fixed batch 1": [1, 3, 224, 224],
        "uint8": ["batch", 3, 224, 224],
        "external data": ["batch", 3, 224, 224],
    }
    kind = TensorProto.UINT8 if form == "uint8" else TensorProto.FLOAT
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image", kind, dims[form]))
    if form == "nhwc":
        front = [helper.make_node("Transpose", ["image"], ["pixel_values"], perm=[0, 3, 1, 2])]
    elif form == "uint8":  # raw bytes in, its own normalisation to -1..1 inside
        graph.initializer.append(numpy_helper.from_array(np.float32(127.5), "half"))
        front = [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["float", "half"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "one"], ["pixel_values"]),
        ]
        graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    else:
        front = [helper.make_node("Identity", ["image"], ["pixel_values"])]
    nodes = [*front, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@pytest.fixture(scope="module")
def shared(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Pixels of three photos, and their features by the shared classifier as it is."""
    path = tmp_path_factory.mktemp("shared") / "usual.onnx"
    file = assets / "weights/mobilenet_v2-classifier-same-padding.onnx"
    preprocess = import_onnx(Backbone(str(file), **HALF), path).preprocess
    photos = [path for path in sorted((assets / "data/photos").rglob("*")) if path.is_file()][:3]
    pixels = np.stack([preprocess.pixels(decode(path.read_bytes())) for path in photos])
    return pixels, Embedder(path)(preprocess.normalise(pixels))


@pytest.mark.assets
@pytest.mark.parametrize("form", ["nhwc", "fixed batch 1", "uint8", "external data"])
def test_the_shared_classifier_in_other_forms_gives_the_same_features(
    assets: Path, shared: tuple[Any, Any], tmp_path: Path, form: str
) -> None:
    file = assets / "weights/mobilenet_v2-classifier-same-padding.onnx"
    external = {"save_as_external_data": True, "location": "weights.bin"} if form == "external data" else {}
    other = put(rewritten(onnx.load(file), form), tmp_path / "other.onnx", **external)
    facts = import_onnx(Backbone(str(other), **({} if form == "uint8" else HALF)), tmp_path / "m.onnx")
    assert facts.dim == 1280
    pixels, expected = shared
    found = Embedder(tmp_path / "m.onnx")(facts.preprocess.normalise(pixels))
    assert relative_l2(found, expected).max() < 1e-5
