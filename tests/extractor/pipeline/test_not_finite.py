"""A network that gives NaN or infinity for an image gives no label: that image has a code, and the others what they had."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.fuse import fuse, selftest
from classifiers.bundles.predictor import Predictor
from classifiers.evaluation import multi_label, regression
from classifiers.evaluation.single_label import score
from classifiers.heads.fitted import DenseHead
from classifiers.heads.registry import make_head
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.sources import open_source
from extractor.graphs.backbone_facts import BackboneFacts, Layer, write_facts
from extractor.graphs.onnx_file import save
from extractor.graphs.parity import check_parity, relative_l2
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.preprocess import Preprocess
from store.cache import FeatureCache
from store.errors import BadDataError
from store.format import json_text
from tests.conftest import as_before

Penult = Callable[..., tuple[int, str, str]]

SIDE, DIM = 16, 12
PREPROCESS = Preprocess(SIDE, SIDE, "bilinear", (0.5,) * 3, (0.25,) * 3)
GREY = 128
FLAT = {"nan": GREY, "inf": 255, "-inf": 0}  # the level of a picture without contrast, by what the network makes of it
HEADS = {  # the task, the settings and the plainest file of samples of each head
    "logistic": ("single-label", {"C": 1.0}),
    "mlp": ("single-label", {"hidden": [8], "lr": 1e-2, "max_epochs": 3}),
    "ridge": ("single-label", {"alpha": 1.0}),
    "knn": ("single-label", {"k": 3}),
    "centroid": ("single-label", {}),
    "logistic, several labels": ("multi-label", {"C": 1.0}),
    "ridge, numbers": ("regression", {"alpha": 1.0}),
}


def write_network(path: Path) -> Path:
    """Features of 8 x 8 patches, plus (the first pixel - grey) / contrast: 0/0, 1/0 or -1/0 where a picture has no contrast."""
    grey = PREPROCESS.normalise(np.full((1, 1, 1, 3), GREY, np.uint8))[0, 0, 0, 0]
    rng = np.random.default_rng(0)
    arrays = {
        "weight": rng.normal(0, 0.2, (DIM, 3, 8, 8)).astype(np.float32),
        "grey": np.array(grey, np.float32),
        "axes": np.array([1, 2, 3], np.int64),
        "one": np.array([1], np.int64),
        "begin": np.zeros(3, np.int64),
        "end": np.ones(3, np.int64),
    }
    make = helper.make_node
    nodes = [
        make("Conv", ["pixels", "weight"], ["map"], strides=[8, 8]),
        make("GlobalAveragePool", ["map"], ["pooled"]),
        make("Flatten", ["pooled"], ["vector"]),
        make("ReduceMax", ["pixels", "axes"], ["most"], keepdims=0),
        make("ReduceMin", ["pixels", "axes"], ["least"], keepdims=0),
        make("Sub", ["most", "least"], ["contrast"]),
        make("Slice", ["pixels", "begin", "end", "axes"], ["first"]),
        make("Flatten", ["first"], ["corner"]),
        make("Sub", ["corner", "grey"], ["lightness"]),
        make("Unsqueeze", ["contrast", "one"], ["divisor"]),
        make("Div", ["lightness", "divisor"], ["term"]),
        make("Add", ["vector", "term"], ["features"]),
    ]
    shapes = {"pixels": ["n", 3, SIDE, SIDE], "features": ["n", DIM]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    weights = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "contrast", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    write_facts(model, BackboneFacts("contrast", "seed 0", "0" * 64, (Layer("patches", "average", DIM),), PREPROCESS))
    save(model, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty noisy pictures of two colours with a manifest for each task, and three flat ones that no manifest names."""
    root, rng = tmp_path_factory.mktemp("contrast"), np.random.default_rng(1)
    for name, level in FLAT.items():
        Image.new("RGB", (20, 20), (level,) * 3).save(root / f"flat {name}.png")
    rows = ["path,label,weight"]
    for i in range(30):
        tint = np.array([60 * (i % 2), 0, 0])
        pixels = np.clip(rng.normal(100, 40, (20, 20, 3)) + tint, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{('red', 'blue')[i % 2]},{pixels[..., 0].mean():.3f}")
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    write_network(root / "net.onnx")
    for task in ("single-label", "multi-label", "regression"):
        targets = ("weight",) if task == "regression" else ()
        source = open_source(root / "list.csv", task=task, targets=targets)
        run_extract(source, Backbone(str(root / "net.onnx")), root / f"{task}.cache", Options(quiet=True))
    return root


@pytest.fixture(scope="module")
def trained(folder: Path) -> Callable[[str], Bundle]:
    """``trained(head) -> Bundle``, each once."""
    made: dict[str, Bundle] = {}

    def train(name: str) -> Bundle:
        if name not in made:
            task, settings = HEADS[name]
            head = make_head(name.partition(",")[0], task, **settings)
            made[name] = classifiers.train(
                FeatureCache(folder / f"{task}.cache"), folder / f"{name}.head", head, TrainOptions(thumbnails=False)
            )
            fuse(made[name], folder / f"{name}.onnx")
        return made[name]

    return train


def ten(folder: Path) -> list[Path]:
    """Ten pictures; the third, the sixth and the ninth are flat."""
    paths = [folder / f"{i:02d}.png" for i in range(10)]
    for place, name in zip((2, 5, 8), FLAT, strict=True):
        paths[place] = folder / f"flat {name}.png"
    return paths


@pytest.mark.parametrize("name", HEADS)
def test_each_head_apart_and_fused(name: str, trained: Callable[[str], Bundle], folder: Path) -> None:
    bundle, paths = trained(name), ten(folder)
    pixels = np.stack([PREPROCESS.read(path.read_bytes()) for path in paths])
    ordinary = pixels.copy()
    ordinary[[2, 5, 8]] = PREPROCESS.read((folder / "10.png").read_bytes())
    for place in (bundle.path, folder / f"{name}.onnx"):
        predictor = Predictor.load(place, batch_size=10)
        expected = predictor.probabilities(ordinary)
        found = list(predictor.predict(paths))
        assert [p.code for p in found] == [("not_finite" if i in (2, 5, 8) else None) for i in range(10)]
        for i, prediction in enumerate(found):
            if i in (2, 5, 8):
                assert (prediction.label, prediction.probability, prediction.probabilities) == (None, None, None)
                continue
            assert prediction.probabilities is not None
            assert prediction.probabilities.tobytes() == expected[i].tobytes(), "bit for bit"
            assert prediction.label == predictor.task.decide(expected[i])[0]
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"pixels": pixels}), strict=True))
    bad = np.isnan(outputs[predictor.task.output])
    assert np.flatnonzero(bad.all(axis=1)).tolist() == np.flatnonzero(bad.any(axis=1)).tolist() == [2, 5, 8]
    if bundle.task == "single-label":
        best = np.where(np.isin(np.arange(10), (2, 5, 8)), -1, outputs["probabilities"].argmax(axis=1))
        assert outputs["label"].tolist() == best.tolist()
        assert outputs["label"].dtype == np.int64
    assert "golden vectors agree" in selftest(folder / f"{name}.onnx")


@pytest.mark.parametrize("bad", FLAT)
def test_every_format_says_so(bad: str, trained: Callable[[str], Bundle], folder: Path, penult: Penult) -> None:
    bundle = trained("logistic")
    paths = [folder / f"{i:02d}.png" for i in range(10)]
    paths[4] = folder / f"flat {bad}.png"
    (code, said, _), (_, table, _) = (penult("predict", bundle.path, *paths, "--format", form) for form in ("csv", "table"))
    assert code == 3
    rows = list(csv.DictReader(io.StringIO(said)))
    assert [row["code"] for row in rows] == [*[""] * 4, "not_finite", *[""] * 5]
    assert {rows[4][key] for key in ("label", "probability", "p_blue", "p_red", "novelty")} == {""}
    assert all(row["label"] in ("red", "blue") for i, row in enumerate(rows) if i != 4)
    assert table.splitlines()[4] == f"{paths[4]}\tnot_finite: the network gives NaN or infinity for this image"
    for place in (bundle.path, folder / "logistic.onnx"):
        code, said, _ = penult("predict", place, *paths, "--format", "jsonl")
        facts = [json.loads(line, parse_constant=pytest.fail) for line in said.splitlines()]
        assert (code, [each["label"] for each in facts]) == (3, [row["label"] or None for row in rows])
        assert (facts[4]["code"], facts[4]["probability"], facts[4]["probabilities"]) == ("not_finite", None, {})


def test_no_score_is_made_of_it(trained: Callable[[str], Bundle], folder: Path, tmp_path: Path, penult: Penult) -> None:
    for label in ("red", "blue"):  # the first class would have it otherwise
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / "x.png").write_bytes((folder / "20.png").read_bytes())
        (tmp_path / label / "flat.png").write_bytes((folder / "flat nan.png").read_bytes())
    (tmp_path / "red/y.png").write_bytes((folder / "flat inf.png").read_bytes())
    code, said, err = penult("evaluate", trained("logistic").path, tmp_path, "--json")
    assert (code, said) == (65, "")
    assert "not_finite: the network gives NaN or infinity" in err


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_scores_refuse_it(number: float) -> None:
    outputs = np.full((10, 2), 0.5)
    outputs[6, 0] = number
    message = r"gives NaN or infinity for 1 of 10 images, the first of which is number 7"
    with pytest.raises(BadDataError, match=message):
        score(np.array(["a"] * 10), outputs, ["a", "b"])
    with pytest.raises(BadDataError, match=message):
        multi_label.measure(np.ones((10, 2), bool), outputs, ["a", "b"])
    with pytest.raises(BadDataError, match=message):
        regression.measure(np.ones((10, 2)), outputs, ["a", "b"])
    head = DenseHead(np.zeros(2), np.ones(2), [(outputs.astype(np.float32), np.zeros(10, np.float32))], list("abcdefghij"))
    with pytest.raises(BadDataError, match=r"the fitted head holds NaN or infinity \(weight0\)"):
        head.to_onnx()


def test_a_fused_file_that_makes_a_label_of_it_fails_its_self_test(
    trained: Callable[[str], Bundle], folder: Path, tmp_path: Path
) -> None:
    trained("logistic"), trained("logistic, several labels")
    model = onnx.load(folder / "logistic.onnx")
    for node in model.graph.node:  # the label of before: the largest, whatever it is
        if node.output[0] == "label":
            node.input[0] = "label/best"
    as_before(model)
    save(model, tmp_path / "argmax.onnx")
    model = onnx.load(folder / "logistic, several labels.onnx")
    (last,) = [node for node in model.graph.node if node.output[0] == "probabilities"]
    last.input[1] = "finite/zero"  # and the sigmoid of infinity is 1
    as_before(model)
    save(model, tmp_path / "number.onnx")
    for name in ("argmax", "number"):
        with pytest.raises(BadDataError, match=r"gives probabilities( and label)? for features that are not finite"):
            selftest(tmp_path / f"{name}.onnx")


def test_what_is_no_number_is_far_from_everything(folder: Path) -> None:
    """`max` passes over a NaN that is not the first: a second feature set of NaN passed for equal."""
    rows = np.ones((3, DIM), np.float32)
    broken = rows.copy()
    broken[1, 2] = np.nan
    assert relative_l2(broken, rows).tolist() == [0, np.inf, 0]
    pixels = PREPROCESS.normalise(np.stack([np.full((SIDE, SIDE, 3), GREY, np.uint8)] * 2))
    with pytest.raises(BadDataError, match="differs from torch by inf"):
        check_parity(folder / "net.onnx", [pixels], [[np.ones((2, DIM), np.float32)]], "net")
    assert json_text.dumps([np.inf, {"a": (float("nan"), 1.5)}]) == '[null, {"a": [null, 1.5]}]'
