"""The promises on real photos and real ImageNet weights, where they are at hand."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import classifiers
from classifiers.bundles.fuse import fuse
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictor import Predictor
from classifiers.heads.registry import make_head
from classifiers.training.few_shot import learning_curve
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.errors import FingerprintMismatchError
from tests.conftest import other_network

pytestmark = pytest.mark.assets

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ants(assets: Path, imagenet: Path, once: Callable[..., Path]) -> FeatureCache:
    data = ImageFolder(assets / "data/hymenoptera")
    path = once("ants.cache", lambda path: run_extract(data, Backbone(str(imagenet)), path, Options(quiet=True)))
    cache = FeatureCache(path)
    assert cache.samples.counts == {"inputs": 398, "ok": 398, "duplicates": 0, "failed": 0}
    return cache


def test_a_second_run_computes_nothing(ants: FeatureCache, assets: Path, imagenet: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(ants.path, tmp_path / "ants.cache")
    again = run_extract(ImageFolder(assets / "data/hymenoptera"), Backbone(str(imagenet)), cache, Options(quiet=True))
    assert (again.computed, again.inference_calls) == (0, 0)


def test_logistic_regression_on_frozen_features(ants: FeatureCache, assets: Path, tmp_path: Path) -> None:
    bundle = classifiers.train(ants, tmp_path / "ants.head", make_head("logistic"))
    assert bundle.split["reported_on"] == "val"
    assert bundle.split["chosen_on"] == "folds of train"
    evaluation, predictions = evaluate_bundle(bundle, ants.path, split="val")
    assert evaluation.n == 153
    assert evaluation.accuracy >= 0.95
    files = [os.fsencode(assets / "data/hymenoptera") + b"/" + path for path in predictions.paths]
    for found, expected in zip(Predictor.of(bundle).predict(files), predictions.probabilities, strict=True):
        assert found.probabilities is not None
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
        assert found.label == bundle.classes[int(expected.argmax())]


def test_fused_and_run_by_the_twenty_lines_of_the_docs(ants: FeatureCache, assets: Path, tmp_path: Path) -> None:
    bundle = classifiers.train(ants, tmp_path / "ants.head", make_head("logistic", C=0.01))
    fuse(bundle, tmp_path / "ants.onnx")
    held = bundle.predictions()
    files = [assets / "data/hymenoptera" / os.fsdecode(path) for path in held.paths]
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs/fuse.md").read_text(), re.DOTALL)
    command = [sys.executable, "-I", "-c", code, tmp_path / "ants.onnx", *files]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.rsplit(" ", 2) for line in said.splitlines()]
    assert [label for _, label, _ in lines] == [bundle.classes[i] for i in held.probabilities.argmax(axis=1)]
    np.testing.assert_allclose([float(line[2]) for line in lines], held.probabilities.max(axis=1), atol=1e-5, rtol=0)


def test_photos_of_other_things_are_unlike_ants_and_bees(ants: FeatureCache, assets: Path, tmp_path: Path) -> None:
    bundle = classifiers.train(ants, tmp_path / "ants.head", make_head("logistic"))
    assert bundle.metrics is not None
    low, high = bundle.metrics["novelty"]["interval"]
    assert low < bundle.metrics["novelty"]["expected"] < high
    low, high = bundle.metrics["sets"]["marginal"]["coverage_interval"]
    assert low < 0.9 < high
    others = sorted((assets / "data/photos").iterdir())[::10]
    scores = [found.novelty for found in Predictor.of(bundle).predict(others)]
    assert np.mean([score is not None and score > 1 for score in scores]) >= 0.8


def test_the_mlp_over_three_seeds(ants: FeatureCache) -> None:
    train, val = ants.subset("train"), ants.subset("val")
    accuracies = []
    for seed in range(3):
        head = make_head("mlp", seed=seed).fit(train.X, train.y, groups=train.groups)
        accuracies.append(float(np.mean(head.predict(val.X) == val.y)))
    assert statistics.median(accuracies) >= 0.94


@pytest.mark.parametrize(("name", "least"), [("ridge", 0.95), ("knn", 0.92), ("centroid", 0.90)])
def test_heads_that_choose_inside_train(ants: FeatureCache, tmp_path: Path, name: str, least: float) -> None:
    bundle = classifiers.train(ants, tmp_path / "ants.head", make_head(name))
    assert (bundle.split["chosen_on"], bundle.split["reported_on"]) == ("folds of train", "val")
    evaluation, predictions = evaluate_bundle(bundle, ants.path, split="val")
    assert evaluation.n == 153
    assert evaluation.accuracy >= least
    train, val = ants.subset("train"), ants.subset("val")
    blind = make_head(name).fit(train.X, train.y, groups=train.groups)  # it never saw a label of val
    np.testing.assert_allclose(blind.predict_proba(val.X), predictions.probabilities, atol=1e-5)


def test_few_images_are_better_the_more_there_are(ants: FeatureCache) -> None:
    curve = learning_curve(make_head("centroid"), ants.subset("train"), ants.subset("val"), [1, 5, 20])
    assert curve[0]["accuracy"] < curve[1]["accuracy"] < curve[2]["accuracy"]
    assert curve[1]["accuracy"] >= 0.85


def test_other_weights_into_the_same_cache_are_refused(
    ants: FeatureCache, assets: Path, imagenet: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(ants.path, tmp_path / "ants.cache")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in cache.rglob("*"))
    other = Backbone(str(other_network(imagenet, tmp_path / "other.onnx")))
    with pytest.raises(FingerprintMismatchError, match=r"They differ in weights: \w{12}\.\. against"):
        run_extract(ImageFolder(assets / "data/hymenoptera"), other, cache, Options(quiet=True))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in cache.rglob("*")) == before
