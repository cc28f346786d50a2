"""A custom classifier says what it sees in one photo, and what was read of its file is in the JSON of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torchvision
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from extractor.backbones.class_names import imagenet_names, names_of
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options

pytestmark = pytest.mark.usefixtures("exports_here")
SIDE = 8
OPTIONS = Options(device="cpu", quiet=True, val_fraction=0, test_fraction=0)
FOX = 277  # of ImageNet's classes: red fox


def write_classifier(path: Path, classes: int, best: int, *, softmax: bool = True) -> Path:
    """A network whose score of one class is the red of the image, and of the others nothing."""
    weights: NDArray[np.float32] = np.zeros((3, classes), np.float32)
    weights[0, best] = 10
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["colour"]),
        helper.make_node("Flatten", ["colour"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])
    out = helper.make_tensor_value_info("probabilities" if softmax else "logits", TensorProto.FLOAT, ["n", classes])
    graph = helper.make_graph(nodes[: 4 if softmax else 3], "net", [image], [out], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A file that is no image, and two red ones."""
    folder = tmp_path / "photos" / "red"
    folder.mkdir(parents=True)
    (folder / "0.png").write_text("no image")
    for i in (1, 2):
        Image.new("RGB", (9 + i, 9), (255, 0, 0)).save(folder / f"{i}.png")
    return folder.parent


def test_imagenets_names_are_torchvisions() -> None:
    names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert list(imagenet_names()) == names
    assert names_of(1001)[:2] == ("background", names[0])
    assert names_of(3) == ()
    assert names_of(3, ("a", "b", "c")) == ("a", "b", "c")


@pytest.mark.parametrize(("softmax", "views"), [(True, 1), (False, 2)])
def test_the_classes_of_one_photo_are_said_once_and_stay_in_the_json(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture, softmax: bool, views: int
) -> None:
    file = write_classifier(tmp_path / "net.onnx", 1000, FOX, softmax=softmax)
    backbone = Backbone(str(file), mean=(0.0,), std=(1.0,), resize=SIDE)
    options = OPTIONS.replace(views=views)
    with caplog.at_level("INFO", "penult.extractor"):
        summary = run_extract(ImageFolder(photos), backbone, tmp_path / "c", options)
        sentence = "net.onnx sees in red/1.png: red fox 96%"
        assert sentence in caplog.text
        caplog.clear()
        again = run_extract(ImageFolder(photos), backbone, tmp_path / "c", options)
        assert sentence not in caplog.text
    look = summary.to_json()["backbone"]["look"]
    assert (look["image"], look["classes"][0]) == ("red/1.png", {"name": "red fox", "probability": 0.9566})
    assert len(look["classes"]) == 5
    assert again.backbone == {**summary.backbone, "prepared": "cache"}


def test_names_beside_the_file_are_taken(tmp_path: Path, photos: Path) -> None:
    file = write_classifier(tmp_path / "net.onnx", 2, 1)
    backbone = Backbone(str(file), mean=(0.0,), std=(1.0,), resize=SIDE)
    assert "look" not in run_extract(ImageFolder(photos), backbone, tmp_path / "a", OPTIONS).backbone
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "blue", "1": "red"}}))
    look = run_extract(ImageFolder(photos), backbone, tmp_path / "b", OPTIONS).backbone["look"]
    assert look["classes"][0]["name"] == "red"


def test_what_was_read_is_in_the_json_of_a_run_and_of_a_rerun(
    penult: Callable[..., tuple[int, str, str]], tmp_path: Path, photos: Path
) -> None:
    file = write_classifier(tmp_path / "net.onnx", 1000, FOX)
    command = (
        "extract",
        photos,
        "-m",
        file,
        "-o",
        tmp_path / "c",
        "--std",
        "1",
        "--layer",
        "probabilities",
        "--json",
        "--device",
        "cpu",
    )
    (tmp_path / "net.toml").write_text("mean = 0\n")
    outputs: list[dict[str, Any]] = []
    for _ in range(2):
        code, out, err = penult(*command, "--val-fraction", "0", "--test-fraction", "0")
        assert code == 3
        outputs.append(json.loads(out))
        assert "warning: net.onnx: 'probabilities' is what a classification layer makes" in err
    for facts in outputs:
        backbone = facts["backbone"]
        assert backbone["features"] == {"probabilities": "layer"}
        settings = {"mean": "net.toml", "std": "options", "crop": "the file", "resize": "assumed", "interpolation": "assumed"}
        assert backbone["settings"] == settings
        assert [warning for warning in facts["warnings"] if "class scores rather than features" in warning]
        assert [warning for warning in facts["warnings"] if "does not say how images are resized" in warning]
    code, out, _ = penult("export", file, "-o", tmp_path / "own.onnx", "--std", "1", "--json")
    exported = json.loads(out)
    assert (code, exported["layers"][0]["layer"], exported["scores"]["count"]) == (0, "flat", 1000)
    assert exported["preprocess"]["crop"] == SIDE
    assert len(exported["warnings"]) == 1
    splits = ("--val-fraction", "0", "--test-fraction", "0", "--device", "cpu", "--json")
    code, out, _ = penult("extract", photos, "-m", tmp_path / "own.onnx", "-o", tmp_path / "d", *splits)
    assert "look" not in json.loads(out)["backbone"]
