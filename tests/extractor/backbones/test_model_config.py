"""What Hugging Face's and timm's files beside an ONNX file say of its input is taken, and said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from extractor.backbones.custom_onnx import import_onnx
from extractor.backbones.model_config import read_model_config, stated_by
from extractor.backbones.registry import Backbone
from extractor.graphs.backbone_facts import BackboneFacts
from store.errors import UsageError

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
TWICE = {"include_top": True, "size": {"height": 300, "width": 300}}


def write_network(path: Path, dims: list[Any], kind: int = TensorProto.FLOAT, channels: int = 3) -> Path:
    """A convolution, an activation and a pooling; channels last if the last of the dims is 3."""
    last = dims[-1] in (3, "c")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["first"], perm=[0, 3, 1, 2] if last else [0, 1, 2, 3]),
        helper.make_node("Conv", ["first" if last else "float", "w"], ["conv"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["out"]),
    ]
    weights = numpy_helper.from_array(np.ones((4, channels, 3, 3), np.float32), "w")
    image, out = (
        helper.make_tensor_value_info("image", kind, dims),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, None),
    )
    graph = helper.make_graph([node for node in nodes if last or node.op_type != "Transpose"], "net", [image], [out], [weights])
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write(folder: Path, **files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "net.onnx"


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViT": (
        {**HALF, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2, "size": {"height": 224, "width": 224}},
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": 224, "squash": True, "interpolation": "bilinear"},
    ),
    "ViT, before 2022": (
        {
            **HALF,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ViTFeatureExtractor",
            "resample": 2,
            "size": 384,
        },
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": 384, "squash": True, "interpolation": "bilinear"},
    ),
    "CLIP, before 2022": (
        {
            **HALF,
            "crop_size": 224,
            "do_center_crop": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "resample": 3,
            "size": 224,
        },
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": 224, "resize": 224, "interpolation": "bicubic"},
    ),
    "DINOv2": (
        {
            **IMAGENET,
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
            "size": {"shortest_edge": 256},
        },
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop": 224, "resize": 256, "interpolation": "bicubic"},
    ),
    "ConvNeXT": (
        {
            **HALF,
            "crop_pct": 0.875,
            "image_processor_type": "ConvNextImageProcessor",
            "resample": 3,
            "size": {"shortest_edge": 224},
        },
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": 224, "resize": 256, "interpolation": "bicubic"},
    ),
    "ConvNeXT, large": (
        {
            **HALF,
            "crop_pct": 0.875,
            "image_processor_type": "ConvNextImageProcessor",
            "resample": 3,
            "size": {"shortest_edge": 384},
        },
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": 384, "squash": True, "interpolation": "bicubic"},
    ),
    "LeViT": (
        {
            **HALF,
            "crop_size": {"height": 224, "width": 224},
            "image_processor_type": "LevitImageProcessor",
            "size": {"shortest_edge": 224},
        },
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop": 224, "resize": 256},
    ),
    "MobileViT": (
        {"crop_size": 256, "do_flip_channel_order": True, "feature_extractor_type": "MobileViTFeatureExtractor", "size": 288},
        {"mean": (0.0,), "std": (1.0,), "channels": "bgr", "crop": 256, "resize": 288},
    ),
    "EfficientNet": (
        {**HALF, **TWICE, "resample": 0},
        {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop": 300, "squash": True, "interpolation": "nearest"},
    ),
    "EfficientNet, -1 to 1 before it is normalised": (
        {"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"input_range": 255.0, "mean": (127.5,), "std": (127.5,)},
    ),
    "raw values": (
        {"image_mean": [127.5], "image_std": [127.5], "do_rescale": False, "size": {"shortest_edge": 64}},
        {"input_range": 255.0, "mean": (127.5,), "std": (127.5,), "crop": 64, "resize": 64},
    ),
    "of a text model": ({"tokenizer_class": "BertTokenizer"}, {}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processors_of_hugging_face(tmp_path: Path, name: str) -> None:
    content, settings = PROCESSORS[name]
    config = read_model_config(write(tmp_path, preprocessor_config=content))
    assert config.settings.keys() == settings.keys()
    for key, value in settings.items():
        assert config.settings[key] == (pytest.approx(value) if isinstance(value, tuple) else value), key
        assert config.sources[key] == "preprocessor_config.json"
    assert config.unclear == ""


TIMM = {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("more", "sizes"),
    [
        ({"crop_pct": 0.875, "crop_mode": "center"}, {"resize": 256}),
        ({"crop_pct": 0.9}, {"resize": 248}),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, {"squash": True}),
    ],
)
def test_configurations_of_timm(tmp_path: Path, more: dict[str, Any], sizes: dict[str, Any]) -> None:
    file = write(
        tmp_path,
        config={"architecture": "resnet18", "num_classes": 2, "label_names": ["a", "b"], "pretrained_cfg": TIMM | more},
    )
    config = read_model_config(file)
    assert config.settings == {"crop": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", **sizes}
    assert set(config.sources.values()) == {"config.json"}
    assert config.classes == ("a", "b")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "preprocessor_config",
            {**HALF, "size": {"height": 256, "width": 256}, "crop_size": 224},
            "to the square of 256 pixels before 224",
        ),
        ("preprocessor_config", {**HALF, "size": {"longest_edge": 256}}, r"resized to \{'longest_edge': 256\}"),
        ("preprocessor_config", {**HALF, "size": 256, "image_processor_type": "OtherImageProcessor"}, "resized to 256"),
        ("config", {"pretrained_cfg": TIMM | {"crop_mode": "border"}}, "resized to 224 pixels in timm's mode 'border'"),
    ],
)
def test_sizes_that_cannot_be_made_are_named_unless_others_are_stated(
    tmp_path: Path, file: str, content: dict[str, Any], sentence: str
) -> None:
    network = write_network(tmp_path / "net.onnx", ["n", 3, 16, 16])
    write(
        tmp_path,
        **{file: content if file != "config" else {"pretrained_cfg": content["pretrained_cfg"] | {"input_size": [3, 16, 16]}}},
    )
    (tmp_path / f"{file}.json").write_text((tmp_path / f"{file}.json").read_text().replace("224", "16"))
    with pytest.raises(
        UsageError, match=sentence.replace("224", "16") + ".*, which penult does not do. Pass --resize PIXELS or --squash"
    ):
        import_onnx(Backbone(str(network)), tmp_path / "m.onnx")
    assert import_onnx(Backbone(str(network), squash=True), tmp_path / "m.onnx").preprocess.squash


@pytest.mark.parametrize(
    "text", ["{", '{"size": {"shortest_edge": "large"}}', '{"image_mean": [0.5]}', '{"image_mean": "half", "image_std": 1}']
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        read_model_config(tmp_path / "net.onnx")


def test_options_win_over_the_toml_file_and_this_over_the_json_files(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        preprocessor_config=PROCESSORS["DINOv2"][0],
        config={"image_size": 518, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
    )
    (tmp_path / "net.toml").write_text("std = 0.25\nsquash = true\n")
    stated = stated_by(file, {"mean": (0.1,)})
    assert stated.settings == {"mean": (0.1,), "std": (0.25,), "crop": 224, "squash": True, "interpolation": "bicubic"}
    assert {name: stated.sources[name] for name in ("mean", "std", "interpolation")} == {
        "mean": "options",
        "std": "net.toml",
        "interpolation": "preprocessor_config.json",
    }
    assert stated.classes == ()
    many = {str(i): f"class {i}" for i in range(12)}
    assert read_model_config(write(tmp_path, config={"id2label": dict(sorted(many.items()))})).classes == tuple(many.values())


@pytest.mark.parametrize("dims", [["n", 3, 16, 16], ["n", "c", "h", "w"], ["n", "h", "w", "c"]])
def test_a_model_as_hugging_face_has_it_needs_no_options(
    tmp_path: Path, dims: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The model in a folder ``onnx``, its files above it; the layout from the first convolution."""
    file = write_network(tmp_path / "onnx" / "model.onnx", dims)
    write(
        tmp_path,
        preprocessor_config={**HALF, "crop_size": 16, "resample": 3, "size": {"shortest_edge": 18}},
        config={"image_size": 16},
    )
    with caplog.at_level(logging.INFO, "penult.extractor"):
        facts = import_onnx(Backbone(str(file)), tmp_path / "m.onnx")
    pixels = facts.preprocess
    assert (pixels.resize, pixels.crop, pixels.interpolation, pixels.mean) == (18, 16, "bicubic", (0.5,) * 3)
    assert facts.reading["warnings"] == []
    assert facts.reading["settings"]["mean"] == "preprocessor_config.json"
    assert (
        "model.onnx: mean, std, interpolation, crop, resize as preprocessor_config.json beside it says"
        in caplog.text.replace("mean, std, interpolation, resize", "mean, std, interpolation, crop, resize")
    )


def test_a_file_that_normalises_its_pixels_itself_is_said(tmp_path: Path) -> None:
    model = onnx.load(write_network(tmp_path / "net.onnx", ["n", 3, 16, 16]))
    model.graph.initializer.append(numpy_helper.from_array(np.full((1, 3, 1, 1), 0.5, np.float32), "mean"))
    model.graph.node.insert(1, helper.make_node("Sub", ["float", "mean"], ["centred"]))
    model.graph.node[2].input[0] = "centred"
    onnx.save(model, tmp_path / "net.onnx")
    stated: dict[str, Any] = {"std": (1.0,), "resize": 18, "interpolation": "bilinear"}
    (warning,) = import_onnx(Backbone(str(tmp_path / "net.onnx"), mean=(0.5,), **stated), tmp_path / "m.onnx").reading[
        "warnings"
    ]
    assert (
        "computes with its pixels before its first convolution (Sub), and mean and deviation are applied before that" in warning
    )
    plain = import_onnx(Backbone(str(tmp_path / "net.onnx"), mean=(0.0,), **stated), tmp_path / "m.onnx")
    assert plain.reading["warnings"] == []


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    file = write_network(tmp_path / "net.onnx", ["n", "c", "h", "w"])
    model = onnx.load(file)
    model.graph.node[1].op_type = "Identity"  # no convolution that says the layout
    del model.graph.node[1].attribute[:], model.graph.node[1].input[1:]
    model.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, None))
    onnx.save(model, file)
    with pytest.raises(UsageError, match=r"^4 things must be stated\. ") as refused:
        import_onnx(Backbone(str(file)), tmp_path / "m.onnx")
    for part in ("(1) ", "--layout nchw", "(2) ", "--mean", "(3) ", "--crop 224", "(4) ", "--layer out"):
        assert part in str(refused.value)


def test_a_file_that_takes_bytes_normalises_itself(tmp_path: Path) -> None:
    file = write_network(tmp_path / "net.onnx", ["n", 16, 16, 3], TensorProto.UINT8)
    write(tmp_path, preprocessor_config={**HALF, "size": {"height": 16, "width": 16}})
    pixels = import_onnx(Backbone(str(file)), tmp_path / "m.onnx").preprocess
    assert (pixels.mean, pixels.std, pixels.input_range, pixels.squash) == ((0.0,) * 3, (1.0,) * 3, 255, True)


def test_what_contradicts_the_network_is_refused(tmp_path: Path) -> None:
    file = write_network(tmp_path / "net.onnx", ["n", 3, 16, 16])
    write(tmp_path, preprocessor_config={**HALF, "size": {"height": 24, "width": 24}})
    with pytest.raises(UsageError, match=r"--crop 24 \(from preprocessor_config\.json\): .* takes 16 x 16 pixels"):
        import_onnx(Backbone(str(file)), tmp_path / "m.onnx")
    grey = write_network(tmp_path / "grey.onnx", ["n", "c", "h", "w"], channels=1)
    with pytest.raises(ValueError, match=r"takes images of 1 channel\(s\), as its first convolution says"):
        import_onnx(Backbone(str(grey)), tmp_path / "m.onnx")


def test_files_beside_a_model_do_not_change_what_was_stated_in_full(tmp_path: Path) -> None:
    file = write_network(tmp_path / "net.onnx", ["n", 3, 16, 16])
    stated = Backbone(str(file), mean=(0.1,), std=(0.2,), resize=20, interpolation="box")
    alone: BackboneFacts = import_onnx(stated, tmp_path / "m.onnx")
    write(tmp_path, preprocessor_config={**HALF, "crop_size": 16, "resample": 3, "size": {"shortest_edge": 18}})
    assert import_onnx(stated, tmp_path / "m.onnx").fingerprints() == alone.fingerprints()
