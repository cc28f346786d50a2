"""From a cache to a bundle, and what evaluate, predict and compare make of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import classifiers
from classifiers.bundles.bundle import Bundle, save_bundle
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictor import Predictor, list_images
from classifiers.comparison.compare import compare
from classifiers.comparison.compare_page import comparison_report
from classifiers.heads.registry import make_head
from classifiers.reports.terminal import evaluation_text
from classifiers.training.roles import assign_roles
from classifiers.training.settings import TrainOptions
from classifiers.training.train import save_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, OutputExistsError, UsageError
from store.format.samples import Row, SampleTable
from tests.conftest import seal

TINTS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def paint(root: Path, count: int, seed: int = 0) -> Path:
    """Noisy pictures of three tints in a folder per class: small, distinct, and not hard to tell apart."""
    rng = np.random.default_rng(seed)
    for label, tint in TINTS.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(np.array(tint) + rng.normal(0, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("tinted") / "photos", 20)


@pytest.fixture(scope="module")
def cache(photos: Path, backbone: Backbone) -> FeatureCache:
    return extract(ImageFolder(photos), backbone, photos.parent / "photos.cache", Options(quiet=True))


@pytest.fixture(scope="module")
def bundle(cache: FeatureCache) -> Bundle:
    return classifiers.train(cache, cache.path.parent / "photos.head", make_head("logistic"))


def test_a_bundle_is_complete_and_reads_back(bundle: Bundle, cache: FeatureCache) -> None:
    names = {path.name for path in bundle.path.iterdir()}
    assert names == {"backbone.onnx", "head.onnx", "head.json", "novelty.h5", "predictions.h5", "report.html", "SHA256SUMS"}
    again = Bundle.load(bundle.path)
    assert again == bundle
    assert again.classes == ["blue", "green", "red"]
    assert again.fingerprint == cache.fingerprint
    assert again.split["reported_on"] == "test"
    assert again.split["chosen_on"] == "val"
    assert again.cost["images"] == 60
    predictions = again.predictions()
    assert len(predictions.sha256) == 12  # a fifth of 20, of each class
    assert again.fitted() == {row.sha256 for row in cache.samples.rows if row.split != "test"}


def test_the_head_in_the_bundle_runs_in_plain_onnxruntime(bundle: Bundle, cache: FeatureCache) -> None:
    session = onnxruntime.InferenceSession(bundle.path / "head.onnx", providers=["CPUExecutionProvider"])
    test = cache.subset("test")
    found = session.run(None, {"features": test.X.astype(np.float32)})[0]
    np.testing.assert_allclose(found, bundle.predictions().probabilities, atol=1e-6)


def test_evaluate_uses_the_cache_and_agrees_with_training(bundle: Bundle, cache: FeatureCache) -> None:
    evaluation, predictions = evaluate_bundle(bundle, cache.path)
    assert evaluation.split == "test"
    assert bundle.metrics is not None
    assert evaluation.accuracy == bundle.metrics["accuracy"]
    assert predictions.ids == bundle.predictions().ids


def test_a_bundle_has_scores_and_prediction_sets_and_evaluate_finds_them_again(bundle: Bundle, cache: FeatureCache) -> None:
    assert bundle.conformal is not None
    assert bundle.conformal["coverage"] == 0.9
    assert bundle.conformal["n"] == 12, "validation, where C was chosen"
    assert len(bundle.conformal["per_class"]) == 3
    evaluation, _ = evaluate_bundle(Bundle.load(bundle.path), cache.path)
    found = evaluation.to_json()
    assert bundle.metrics is not None
    for name in ("sets", "temperature", "resamples"):
        assert found[name], name
        assert found[name] == bundle.metrics[name], name
    assert found["scores"].keys() == bundle.metrics["scores"].keys()
    for name, score in found["scores"].items():
        assert score["value"] == pytest.approx(bundle.metrics["scores"][name]["value"], abs=1e-6), name
    text = evaluation_text(evaluation)
    assert "Allowed to abstain, it is sure of" in text
    assert "ROC-AUC" in text
    assert "Before temperature scaling" in text


def test_a_bundle_from_before_there_were_prediction_sets_is_evaluated(
    bundle: Bundle, cache: FeatureCache, tmp_path: Path
) -> None:
    old = tmp_path / "old.head"
    shutil.copytree(bundle.path, old)
    facts = json.loads((old / "head.json").read_text())
    del facts["conformal"], facts["hyperparameters"]["temperature"]
    for name in ("scores", "sets", "temperature", "resamples"):
        del facts["metrics"][name]
    (old / "head.json").write_text(json.dumps(facts))
    seal(old)
    evaluation, _ = evaluate_bundle(Bundle.load(old), cache.path)
    assert (evaluation.sets, evaluation.temperature) == (None, None)
    assert "ece_before" not in evaluation.scores
    assert "Allowed to abstain" not in evaluation_text(evaluation)


def test_predict_agrees_with_evaluate_image_by_image(bundle: Bundle, cache: FeatureCache, photos: Path) -> None:
    _, predictions = evaluate_bundle(bundle, cache.path)
    wanted = dict(zip(predictions.paths, predictions.probabilities, strict=True))
    files = [os.fsencode(photos) + b"/" + path for path in wanted]
    for found in Predictor.load(bundle.path, batch_size=5).predict(files):
        expected = wanted[found.path.removeprefix(os.fsencode(photos) + b"/")]
        assert found.probabilities is not None
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
        assert found.label == bundle.classes[int(expected.argmax())]


def test_evaluating_a_dataset_embeds_it_and_leaves_out_what_was_fitted(
    bundle: Bundle, cache: FeatureCache, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation, predictions = evaluate_bundle(bundle, photos)  # all 60 images, 48 of them fitted
    assert evaluation.n == 12
    assert "48 of 60 images were fitted" in caplog.text
    assert predictions.ids == bundle.predictions().ids


def test_labels_that_the_head_does_not_know_are_named_before_anything_is_embedded(
    bundle: Bundle, backbone: Backbone, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = dataset(tmp_path / "photos", {"cats": 6, "dogs": 6})
    other = extract(photos, backbone, tmp_path / "c", Options(storage="float32", quiet=True))  # other features
    monkeypatch.setattr(Predictor, "predict", lambda *_: pytest.fail("an image was embedded"))
    with pytest.raises(BadDataError, match=r"not trained on: 'cats' \(\d\), 'dogs' \(\d\)"):
        evaluate_bundle(bundle, other)


def test_what_was_fitted_is_refused(bundle: Bundle, cache: FeatureCache) -> None:
    for split in ("train", "val"):
        with pytest.raises(BadDataError, match="were fitted or chosen on"):
            evaluate_bundle(bundle, cache.path, split=split)
    with pytest.raises(BadDataError, match="no samples in split 'holdout'; found test, train, val"):
        evaluate_bundle(bundle, cache.path, split="holdout")


def test_a_split_of_its_own_is_evaluated_on_that_split(cache: FeatureCache, tmp_path: Path) -> None:
    own = classifiers.train(
        cache, tmp_path / "own.head", make_head("logistic", C=1.0), TrainOptions(val_fraction=0.1, test_fraction=0.4, seed=7)
    )
    evaluation, predictions = evaluate_bundle(own, cache.path)
    assert evaluation.n == 24
    assert predictions.ids == own.predictions().ids
    assert evaluate_bundle(own, cache.path, split="test")[1].ids == own.predictions().ids
    elsewhere = paint(tmp_path / "elsewhere", 5, seed=5)
    assert evaluate_bundle(own, elsewhere)[0].n == 15, "its split is of its own data; new images are all new"


def test_bad_files_of_an_evaluated_dataset_are_counted_and_too_many_refused(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = paint(tmp_path / "fresh", 4, seed=6)
    for i in range(3):
        (fresh / f"red/bad{i}.png").write_text("no image")
    evaluation, _ = evaluate_bundle(bundle, fresh)
    assert (evaluation.n, evaluation.failed) == (12, 3)
    assert "3 of 15 inputs cannot be used (not_an_image 3)" in caplog.text
    (fresh / "red/bad3.png").write_text("no image")
    with pytest.raises(BadDataError, match="4 of 16 inputs cannot be used"):
        evaluate_bundle(bundle, fresh)


def test_bad_files_cost_their_own_prediction_only(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "red/000.png", tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no image")
    shutil.copy(photos / "blue/001.png", tmp_path / "c.png")
    a, b, c = Predictor.load(bundle.path).predict([*list_images([tmp_path])])
    assert (b.code, b.label) == ("not_an_image", None)
    assert (a.label, c.label) == ("red", "blue")
    (missing,) = Predictor.load(bundle.path).predict([tmp_path / "gone.png"])
    assert missing.code == "not_found"


def test_bundles_are_never_overwritten_by_accident(bundle: Bundle, cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="--overwrite"):
        classifiers.train(cache, bundle.path, make_head("logistic", C=1.0))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="is not a bundle"):
        classifiers.train(cache, tmp_path / "precious", make_head("logistic", C=1.0), overwrite=True)
    assert (tmp_path / "precious/thesis.txt").read_text() == "years of work"
    shutil.copytree(bundle.path, tmp_path / "noted.head")
    (tmp_path / "noted.head/notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds items that are not part of a bundle \(notes\.txt\)"):
        classifiers.train(cache, tmp_path / "noted.head", make_head("logistic", C=1.0), overwrite=True)
    shutil.rmtree(tmp_path / "noted.head")
    first = classifiers.train(cache, tmp_path / "x.head", make_head("logistic", C=1.0))
    second = classifiers.train(cache, tmp_path / "x.head", make_head("logistic", C=0.1), overwrite=True)
    assert first.files["head.onnx"] != second.files["head.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x.head"]


@pytest.mark.parametrize("name", ["head.onnx", "backbone.onnx"])
def test_a_changed_file_is_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    shutil.copytree(bundle.path, tmp_path / "b.head")
    data = bytearray((tmp_path / "b.head" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.head" / name).write_bytes(data)
    with pytest.raises(BadDataError, match=f"{name} is not the file that was saved"):
        Bundle.load(tmp_path / "b.head")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Payload.marker),)

    marker = Path()


@pytest.mark.parametrize("name", ["head.onnx", "head.json"])
def test_a_payload_does_nothing(bundle: Bundle, tmp_path: Path, name: str) -> None:
    Payload.marker = tmp_path / "executed"
    shutil.copytree(bundle.path, tmp_path / "b.head")
    (tmp_path / "b.head" / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(BadDataError):
        Predictor.load(tmp_path / "b.head")
    assert not Payload.marker.exists()


def test_newer_and_broken_descriptions_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "b.head")
    facts = json.loads((bundle.path / "head.json").read_text())
    for change, message in (({"format": 2}, "format version 2"), ({"classes": None, "surprise": 1}, "does not describe")):
        (tmp_path / "b.head/head.json").write_text(json.dumps({**facts, **change}))
        seal(tmp_path / "b.head")
        with pytest.raises(BadDataError, match=message):
            Bundle.load(tmp_path / "b.head")
    with pytest.raises(InputMissingError, match="is not a bundle"):
        Bundle.load(tmp_path)


def test_compare_lines_up_the_same_images_and_refuses_others(bundle: Bundle, cache: FeatureCache, tmp_path: Path) -> None:
    weak = classifiers.train(cache, tmp_path / "weak.head", make_head("mlp"))
    found = compare([weak, bundle])
    assert [line.name for line in found.lines] == ["weak.head", "photos.head"]
    assert found.n == 12
    assert all(line.cost["images"] == 60 for line in found.lines)
    html = comparison_report(found, notes=["<script>alert(1)</script>"])
    assert "weak.head" in html
    assert "<script>" not in html
    other = classifiers.train(cache, tmp_path / "other.head", make_head("logistic", C=1.0), TrainOptions(test_fraction=0.3))
    with pytest.raises(BadDataError, match="they cannot be compared") as caught:
        compare([bundle, other])
    assert "other.head was trained with --val-fraction or --test-fraction, on a split of its own" in str(caught.value)
    assert "`penult extract` with --val-fraction 0.2 --test-fraction 0.3 --seed 0" in str(caught.value)


def test_one_bundle_or_the_same_twice_is_no_comparison(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"there is only one bundle, .*photos.head; name two") as caught:
        compare([bundle])
    assert caught.value.exit_code == 2
    again = replace(bundle, path=bundle.path / ".." / bundle.path.name)
    with pytest.raises(UsageError, match=r"photos\.head is given twice"):
        compare([bundle, again])


def test_a_class_that_is_only_held_out_is_named_before_training(cache: FeatureCache, tmp_path: Path) -> None:
    table = cache.samples
    first = [row.split for row in table.rows].index("test")
    rows = [replace(row, label="purple") if row.split == "val" or i == first else row for i, row in enumerate(table.rows)]
    count = sum(row.split == "val" for row in rows)
    cache.samples = SampleTable(rows, table.facts)
    try:
        with pytest.raises(BadDataError, match=rf"class 'purple' is in 'test' \(1\) and 'val' \({count}\) and not in 'train'"):
            classifiers.train(cache, tmp_path / "x.head", make_head("logistic", C=1.0))
    finally:
        cache.samples = table
    assert list(tmp_path.iterdir()) == []


def test_python_api_of_the_readme(cache: FeatureCache, tmp_path: Path) -> None:
    from classifiers.bundles.held_out import evaluate
    from classifiers.heads.logistic import LogisticHead

    train, test = cache.split(test=0.2)
    head = LogisticHead().fit(train.X, train.y)
    evaluation = evaluate(head, test)
    saved = save_head(cache, tmp_path / "api.head", head, fitted=[train], held_out=test)
    assert saved.metrics is not None
    assert saved.metrics["accuracy"] == evaluation.accuracy
    assert next(iter(Predictor.load(tmp_path / "api.head").predict([cache.root / "red/000.png"]))).label == "red"


def rows(**splits: int) -> list[Row]:
    return [
        Row(f"{split}/{label}/{i}".encode(), label, split, sha256=f"{split}{label}{i}".encode().ljust(32))
        for split, count in splits.items()
        for label in "ab"
        for i in range(count)
    ]


def test_roles_follow_the_contract() -> None:
    three = assign_roles(SampleTable(rows(train=5, val=2, test=2), {"split": {"rule": "source"}}))
    assert (len(three.fit), len(three.choose), len(three.report)) == (10, 4, 4)
    two = assign_roles(SampleTable(rows(train=5, val=2), {"split": {"rule": "source"}}))
    assert (len(two.fit), len(two.choose), len(two.report)) == (10, 0, 4)
    assert two.facts["reported_on"] == "val"
    assert two.facts["chosen_on"] == "folds of train"
    one = assign_roles(SampleTable(rows(train=5), {"split": {"rule": "source"}}))
    assert (len(one.fit), len(one.choose), len(one.report)) == (10, 0, 0)


def test_what_cannot_be_trained_on_is_refused() -> None:
    with pytest.raises(BadDataError, match="max-failures"):
        assign_roles(SampleTable(rows(train=5), {"budget_exceeded": True}))
    with pytest.raises(BadDataError, match="1 of 1 samples have no label"):
        assign_roles(SampleTable([Row(b"x", sha256=bytes(32))]))
    with pytest.raises(BadDataError, match="none of the 2 inputs could be used"):
        assign_roles(SampleTable([Row(b"x", "a", code="not_an_image"), Row(b"y", "b", code="truncated")]))
    with pytest.raises(BadDataError, match="no split 'train'"):
        assign_roles(SampleTable(rows(test=5)))
    with pytest.raises(UsageError, match="no setting hidden"):
        make_head("logistic", hidden=[3])


def test_without_held_out_images_the_bundle_says_so(cache: FeatureCache, tmp_path: Path) -> None:
    everything = cache.subset()
    head = make_head("logistic", C=1.0).fit(everything.X, everything.y)
    saved = save_head(cache, tmp_path / "all.head", head, fitted=[everything], held_out=None)
    assert "Nothing was held out" in (saved.path / "report.html").read_text()
    with pytest.raises(BadDataError, match="without held-out images"):
        compare([saved, classifiers.train(cache, tmp_path / "other.head", make_head("logistic", C=1.0))])
    with pytest.raises(OutputExistsError):
        save_bundle(saved, backbone=b"", head=b"", predictions=None, fitted=[], page="")
