"""The promises on real photos and real ImageNet weights, where they are at hand."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import numpy as np
import pytest

from classifiers.heldout import evaluate_bundle
from classifiers.predict import Predictor
from classifiers.train import make_head, train_head
from extractor.backbones import Backbone
from extractor.options import Options
from extractor.pipeline import run_extract
from extractor.sources import ImageFolder
from store.cache import FeatureCache
from store.errors import FingerprintMismatchError

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def imagenet(assets: Path) -> Backbone:
    return Backbone("mobilenet_v2", str(assets / "weights/mobilenet_v2-imagenet.pth"), "IMAGENET1K_V1")


@pytest.fixture(scope="module")
def ants(assets: Path, imagenet: Backbone, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    path = tmp_path_factory.mktemp("ants") / "ants.cache"
    first = run_extract(ImageFolder(assets / "data/hymenoptera"), imagenet, path, Options(quiet=True))
    again = run_extract(ImageFolder(assets / "data/hymenoptera"), imagenet, path, Options(quiet=True))
    assert (first.inputs, first.failed) == (398, 0)
    assert (again.computed, again.inference_calls) == (0, 0)
    return FeatureCache(path)


def test_logistic_regression_on_frozen_features(ants: FeatureCache, assets: Path, tmp_path: Path) -> None:
    bundle = train_head(ants, tmp_path / "ants.head", make_head("logistic"))
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


def test_the_mlp_over_five_seeds(ants: FeatureCache) -> None:
    train, val = ants.subset("train"), ants.subset("val")
    accuracies = []
    for seed in range(5):
        head = make_head("mlp", seed=seed).fit(train.X, train.y, groups=train.groups)
        accuracies.append(float(np.mean(head.predict(val.X) == val.y)))
    assert statistics.median(accuracies) >= 0.94


def test_other_weights_into_the_same_cache_are_refused(ants: FeatureCache, assets: Path, imagenet: Backbone) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in ants.path.rglob("*"))
    other = Backbone(imagenet.name, "random", imagenet.preset)
    with pytest.raises(FingerprintMismatchError, match=r"They differ in weights: aa1a5c195525\.\. against"):
        run_extract(ImageFolder(assets / "data/hymenoptera"), other, ants.path, Options(quiet=True))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in ants.path.rglob("*")) == before
