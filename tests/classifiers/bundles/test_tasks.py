"""Several labels an image, and numbers to predict: from a CSV to a fused file, on pictures whose colours say the truth."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.fused import Fused, golden_images
from classifiers.bundles.held_out import evaluate, evaluate_bundle
from classifiers.bundles.predictor import Predictor
from classifiers.evaluation.task import Measured
from classifiers.heads.registry import make_head
from extractor.backbones.registry import Backbone
from extractor.data.sources import open_source
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.errors import BadDataError, UsageError

N = 80
Penult = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``list.csv``: a picture is ``red`` or ``green`` where that channel is bright; ``warmth`` is how bright red is."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N):
        red, green = rng.uniform(20, 235, 2)
        noise = rng.normal(0, 8, (64, 64, 3))
        pixels = np.clip(np.array([red, green, 128]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        labels = "|".join(name for name, value in (("red", red), ("green", green)) if value > 128)
        lines.append(f"{i:03d}.png,{labels},{red / 10 + 1000},{green - red}\n")
    (folder / "list.csv").write_text("path,label,warmth,gap\n" + "".join(lines))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def several(listed: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("several") / "c"
    run_extract(open_source(listed, task="multi-label"), backbone, path, Options(quiet=True))
    return path


@pytest.fixture(scope="module")
def numbers(listed: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("numbers") / "c"
    source = open_source(listed, task="regression", targets=["warmth", "gap"])
    run_extract(source, backbone, path, Options(quiet=True))
    return path


def truth_of(listed: Path) -> dict[str, dict[str, str]]:
    return {Path(row["path"]).name: row for row in csv.DictReader(io.StringIO(listed.read_text()))}


# --- several labels ----------------------------------------------------------------------------------------------------


def test_several_labels_from_a_csv_to_a_fused_file(several: Path, listed: Path, penult: Penult, tmp_path: Path) -> None:
    code, out, err = penult("train", several, "-o", tmp_path / "h")
    assert code == 0, err
    assert "logistic head, 2 labels" in out
    assert "mean average precision" in out
    bundle = Bundle.load(tmp_path / "h")
    assert (bundle.task, bundle.head, bundle.classes) == ("multi-label", "logistic", ["green", "red"])
    scores = (bundle.metrics or {})["scores"]
    assert scores["mean_average_precision"]["value"] > 0.95
    assert scores["f1_micro"]["value"] > 0.85
    assert scores["hamming_loss"]["value"] < 0.15
    saved = bundle.predictions()
    assert saved.labels.shape == saved.probabilities.shape == (16, 2)
    report = (tmp_path / "h/report.html").read_text()
    assert "The labels" in report
    assert "mean average precision" in report

    code, out, err = penult("evaluate", tmp_path / "h", several)
    assert code == 0, err
    assert "images whose labels are all right" in out
    code, out, err = penult("train", several, "--head", "mlp", "-o", tmp_path / "m")
    assert (code, "mlp head, 2 labels" in out) == (0, True), err
    code, out, _ = penult("evaluate", tmp_path / "h", several, "--json")
    again = json.loads(out)["scores"]
    assert {name: score["value"] for name, score in again.items()} == pytest.approx(
        {name: score["value"] for name, score in scores.items()}, rel=1e-5
    )
    code, out, _ = penult("evaluate", tmp_path / "h", listed, "--split", "test")  # there is no split in the list
    assert code == 65

    assert penult("fuse", tmp_path / "h", "-o", tmp_path / "f.onnx")[:2] == (
        0,
        f"{tmp_path / 'f.onnx'}: 64 x 64 pixels to 2 labels, {(tmp_path / 'f.onnx').stat().st_size / 2**20:.1f} MiB\n",
    )
    code, out, err = penult("predict", tmp_path / "f.onnx", "--selftest")
    assert (code, "16 golden vectors agree" in out) == (0, True), err
    images = sorted(listed.parent.glob("*.png"))[:20]
    found = {}
    for what in ("h", "f.onnx"):
        code, out, err = penult("predict", tmp_path / what, *images, "--format", "jsonl")
        assert code == 0, err
        found[what] = [json.loads(line) for line in out.splitlines()]
    truth = truth_of(listed)
    right = 0
    for mine, theirs in zip(found["h"], found["f.onnx"], strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["probability"] is None
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
        assert set(filter(None, mine["label"].split("|"))) == {k for k, p in mine["probabilities"].items() if p >= 0.5}
        right += set(mine["label"].split("|")) == set(truth[Path(mine["path"]).name]["label"].split("|"))
    assert right >= 16
    assert {one["label"] for one in found["h"]} >= {"green|red", ""}  # both at once, and none
    code, out, _ = penult("predict", tmp_path / "f.onnx", images[0], "--format", "csv")
    assert out.splitlines()[0] == "path,label,probability,code,message,p_green,p_red"
    code, out, _ = penult("predict", tmp_path / "f.onnx", *images)
    assert "(no label)" in out


def test_a_head_for_several_labels_is_evaluated_on_new_data(several: Path, listed: Path, tmp_path: Path) -> None:
    """Features from the cache and from the images say the same; labels keep their columns."""
    bundle = classifiers.train(FeatureCache(several), tmp_path / "h", make_head("logistic", "multi-label"))
    fitted = bundle.fitted()
    held = [row for row in FeatureCache(several).rows() if row.sha256 not in fitted]
    new = listed.parent / "new.csv"
    truth = truth_of(listed)
    new.write_text("path,label\n" + "".join(f"{row.name},{truth[row.name]['label']}\n" for row in held))
    from_images, _ = evaluate_bundle(bundle, new)
    from_cache, _ = evaluate_bundle(bundle, several)
    assert isinstance(from_cache, Measured)
    assert isinstance(from_images, Measured)
    assert from_images.scores["log_loss"]["value"] == pytest.approx(from_cache.scores["log_loss"]["value"], rel=1e-4)
    assert from_images.novelty is not None
    new.write_text(f"path,label\n{held[0].name},blue\n")
    with pytest.raises(BadDataError, match="not trained on: 'blue'; it knows 'green', 'red'"):
        evaluate_bundle(bundle, new)


def test_labels_that_cannot_be_learnt_are_named(listed: Path, backbone: Backbone, tmp_path: Path) -> None:
    everywhere = listed.parent / "everywhere.csv"
    everywhere.write_text("path,label\n" + "".join(f"{i:03d}.png,sky{'|sun' * (i % 2)}\n" for i in range(12)))
    run_extract(open_source(everywhere, task="multi-label"), backbone, tmp_path / "c", Options(quiet=True))
    with pytest.raises(BadDataError, match=r"label 'sky' is on (\d+) of \1 training images"):
        classifiers.train(FeatureCache(tmp_path / "c"), tmp_path / "h", make_head("logistic", "multi-label"))
    everywhere.write_text("path\n" + "".join(f"{i:03d}.png\n" for i in range(12)))
    run_extract(open_source(everywhere, task="multi-label"), backbone, tmp_path / "d", Options(quiet=True))
    with pytest.raises(BadDataError, match="no image has a label"):
        classifiers.train(FeatureCache(tmp_path / "d"), tmp_path / "h", make_head("logistic", "multi-label"))


# --- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_from_a_csv_to_a_fused_file(numbers: Path, listed: Path, penult: Penult, tmp_path: Path) -> None:
    code, out, err = penult("train", numbers, "-o", tmp_path / "h")
    assert code == 0, err
    assert "ridge head, 2 targets" in out
    assert "mean R2 0." in out
    bundle = Bundle.load(tmp_path / "h")
    assert (bundle.task, bundle.head, bundle.classes) == ("regression", "ridge", ["warmth", "gap"])
    metrics: dict[str, Any] = bundle.metrics or {}
    assert metrics["scores"]["r2"]["value"] > 0.7
    assert [entry["name"] for entry in metrics["per_output"]] == ["warmth", "gap"]
    widths = [width for (width,) in (bundle.conformal or {})["half_width"]]
    assert 1 < widths[0] < 20 < widths[1] < 200  # red is worth 22 and 215 of these
    saved = bundle.predictions()
    assert saved.labels.dtype == np.float64
    truth = truth_of(listed)
    assert saved.labels[0].tolist() == [float(truth[saved.paths[0].decode()][name]) for name in ("warmth", "gap")]
    report = (tmp_path / "h/report.html").read_text()
    assert "The targets" in report
    assert "RMSE" in report

    code, out, err = penult("evaluate", tmp_path / "h", numbers)
    assert code == 0, err
    assert "mean R2 0." in out
    assert "coverage" in out
    code, out, _ = penult("evaluate", tmp_path / "h", numbers, "--json")
    again = [entry["scores"]["rmse"]["value"] for entry in json.loads(out)["per_output"]]
    assert again == pytest.approx([entry["scores"]["rmse"]["value"] for entry in metrics["per_output"]], rel=1e-4)

    assert penult("fuse", tmp_path / "h", "-o", tmp_path / "f.onnx")[0] == 0
    code, out, err = penult("predict", tmp_path / "f.onnx", "--selftest")
    assert (code, "16 golden vectors agree" in out) == (0, True), err
    images = sorted(listed.parent.glob("*.png"))[:20]
    found = {}
    for what in ("h", "f.onnx"):
        code, out, err = penult("predict", tmp_path / what, *images, "--format", "jsonl")
        assert code == 0, err
        found[what] = [json.loads(line) for line in out.splitlines()]
    held = 0
    for mine, theirs in zip(found["h"], found["f.onnx"], strict=True):
        assert (mine["label"], mine["probability"]) == (None, None)
        for j, name in enumerate(("warmth", "gap")):
            one, other = mine["values"][name], theirs["values"][name]
            assert one["value"] == pytest.approx(other["value"], abs=1e-3)
            assert one["interval"] == pytest.approx([one["value"] - widths[j], one["value"] + widths[j]], abs=1e-3)
            held += one["interval"][0] <= float(truth[Path(mine["path"]).name][name]) <= one["interval"][1]
    assert held >= 34  # of 40
    code, out, _ = penult("predict", tmp_path / "f.onnx", *images, listed, "--format", "csv")
    assert code == 3
    head, first, *_, last = csv.reader(io.StringIO(out))
    assert head == [
        "path",
        "label",
        "probability",
        "code",
        "message",
        *["value_warmth", "low_warmth", "high_warmth", "value_gap", "low_gap", "high_gap"],
    ]
    assert float(first[6]) < float(first[5]) < float(first[7])
    assert (len(last), last[3], last[5:]) == (11, "not_an_image", [""] * 6)
    code, out, _ = penult("predict", tmp_path / "f.onnx", images[0])
    assert out.startswith(f"{images[0]}\twarmth 10")
    session = onnxruntime.InferenceSession(tmp_path / "f.onnx", providers=["CPUExecutionProvider"])
    assert [(end.name, end.shape) for end in session.get_outputs()] == [("values", ["batch", 2])]
    values = session.run(None, {"pixels": golden_images(64)})[0]
    assert values == pytest.approx(np.array(Fused.load(tmp_path / "f.onnx").golden.probabilities), rel=1e-4)


def test_every_image_needs_its_numbers(listed: Path, backbone: Backbone, tmp_path: Path) -> None:
    some = listed.parent / "some.csv"
    some.write_text("path,age\n" + "".join(f"{i:03d}.png,{i if i % 4 else ''}\n" for i in range(12)))
    run_extract(open_source(some, task="regression", targets=["age"]), backbone, tmp_path / "c", Options(quiet=True))
    with pytest.raises(BadDataError, match=r"3 of 12 samples lack a target \(such as 000\.png\); training needs one for each"):
        classifiers.train(FeatureCache(tmp_path / "c"), tmp_path / "h", make_head(None, "regression"))
    with pytest.raises(BadDataError, match="lack a target"):
        FeatureCache(tmp_path / "c").subset()
    some.write_text("path,age\n" + "".join(f"{i:03d}.png,7\n" for i in range(12)))
    run_extract(open_source(some, task="regression", targets=["age"]), backbone, tmp_path / "d", Options(quiet=True))
    with pytest.raises(BadDataError, match="target 'age' is 7 for every training image"):
        classifiers.train(FeatureCache(tmp_path / "d"), tmp_path / "h", make_head(None, "regression"))


# --- what is for one label only ------------------------------------------------------------------------------------------


def test_what_is_for_one_label_says_so(several: Path, numbers: Path, penult: Penult, tmp_path: Path) -> None:
    classifiers.train(FeatureCache(several), tmp_path / "h", make_head(None, "multi-label"))
    bundle = classifiers.train(FeatureCache(numbers), tmp_path / "r", make_head(None, "regression"))
    with pytest.raises(BadDataError, match="was extracted with --task multi-label, and r is a head for regression"):
        evaluate_bundle(bundle, several)
    with pytest.raises(UsageError, match="--head knn: expected ridge for regression"):
        make_head("knn", "regression")
    with pytest.raises(UsageError, match=r"evaluate is for one label an image; this is --task regression"):
        evaluate(make_head(None, "regression"), FeatureCache(numbers).subset())
    for arguments in (
        ("compare", tmp_path / "h", tmp_path / "r"),
        ("evaluate", tmp_path / "r", numbers, "--plot", tmp_path / "p.png"),
        ("train", several, "-o", tmp_path / "x", "--few-shot", "1,2"),
        ("finetune", several, "-o", tmp_path / "x", "-m", "resnet18"),
        ("diff", several, several, "--head", tmp_path / "h"),
    ):
        code, _, err = penult(*arguments)
        assert (code, "is for one label an image; this is --task" in err) == (2, True), (arguments, err)
    code, _, err = penult("evaluate", tmp_path / "h", several, "--min-accuracy", "0.9")
    assert (
        code,
        "--min-accuracy is for single-label, and this is multi-label; expected --min-map, --min-map-lower" in err,
    ) == (2, True)


def test_two_classes_give_two_probabilities(dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path) -> None:
    photos = dataset(tmp_path / "p", {"ants": 12, "bees": 12})
    run_extract(open_source(photos), backbone, tmp_path / "c", Options(quiet=True))
    cache = FeatureCache(tmp_path / "c")
    for name in ("logistic", "ridge", "mlp"):
        bundle = classifiers.train(cache, tmp_path / name, make_head(name))
        session = onnxruntime.InferenceSession(bundle.path / "head.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, {"features": cache.subset().X.astype(np.float32)})[0]
        assert found.shape == (24, 2)
        assert found.sum(axis=1) == pytest.approx(np.ones(24), abs=1e-6)
        assert list(Predictor.of(bundle).classes) == ["ants", "bees"]
