"""Images unlike the training images are told from others, at the rate of false alarms that was asked for."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binom

import classifiers
from classifiers.bundles import novelty
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.novelty import FALSE_ALARMS, REFERENCE, Novelty, novel_share
from classifiers.bundles.predictor import Predictor
from classifiers.evaluation.intervals import wilson
from classifiers.evaluation.units import Units
from classifiers.heads.registry import make_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache, Subset
from store.errors import BadDataError


def features(n: int, seed: int, centre: int = 0, d: int = 16) -> NDArray[np.float32]:
    """Rows around a direction of their own."""
    direction = np.random.default_rng(1000 + centre).normal(size=d)
    return (3 * direction + np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def subset(X: NDArray[np.float32], groups: list[bytes] | None = None, labels: NDArray[np.str_] | None = None) -> Subset:
    names = [b"%d" % i for i in range(len(X))]
    return Subset(X, np.repeat("a", len(X)) if labels is None else labels, names, names, groups or names)


@pytest.mark.parametrize("n", [400, REFERENCE + 1500])
def test_false_alarms_are_as_rare_as_asked_for_and_other_images_are_found(n: int) -> None:
    """Both ways to learn: by leaving one out, and from images beyond the reference."""
    X = features(n, 0)
    found = Novelty.fit([subset(X[: n // 2]), subset(X[n // 2 :])])
    assert found is not None
    assert found.reference.shape == (min(n, REFERENCE), 16)
    fresh = found.scores(features(2000, 1))
    low, high = (binom.ppf(q, 2000, FALSE_ALARMS) / 2000 for q in (1e-4, 1 - 1e-4))
    assert low - 0.02 < np.mean(fresh > 1) < high + 0.02  # the threshold itself is known from n rows only
    assert np.mean(found.scores(features(500, 2, centre=1)) > 1) > 0.99


def test_pictures_of_the_same_thing_do_not_make_it_usual() -> None:
    """Each row is there six times, nearly: without groups their copies would be the nearest neighbours of all."""
    rows = np.repeat(features(60, 0), 6, axis=0)
    X = rows + 1e-3 * np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)
    grouped, alone = Novelty.fit([subset(X, [b"%d" % (i // 6) for i in range(len(X))])]), Novelty.fit([subset(X)])
    assert grouped is not None
    assert alone is not None
    assert grouped.usual > 100 * alone.usual
    assert np.mean(grouped.scores(features(500, 2)) > 1) < 0.2


@pytest.mark.parametrize("rare", [6, 30])
def test_a_rare_class_has_a_bound_of_its_own(rare: int, tmp_path: Path) -> None:
    """The fifth nearest of its images is far away: by the common bound most of its new images were unlike."""
    alarms, common, other, plain = [], [], [], []
    for seed in range(8):
        shares = (600, 400 - rare, rare)
        X = np.concatenate([features(n, 10 * seed + k, centre=k, d=64) for k, n in enumerate(shares)])
        labels = np.repeat(["a", "b", "rare"], shares)
        found = Novelty.fit([subset(X, labels=labels)])
        assert found is not None
        fresh = features(200, 1000 + seed, centre=2, d=64)
        alarms.append(np.mean(found.scores(fresh) > 1))
        common.append(np.mean(Novelty(found.reference, found.usual, X[:0], X[:0, 0]).scores(fresh) > 1))
        other.append(np.mean(found.scores(features(200, 2000 + seed, centre=3, d=64)) > 1))
        plain.append(np.mean(found.scores(features(200, 3000 + seed, centre=0, d=64)) > 1))
    assert np.mean(alarms) < 0.08 < 0.15 < np.mean(common)
    assert np.mean(other) > 0.95
    assert np.mean(plain) < 0.08
    (tmp_path / "novelty.h5").write_bytes(found.to_bytes())
    np.testing.assert_array_equal(Novelty.load(tmp_path / "novelty.h5").scores(fresh), found.scores(fresh))


def test_where_no_class_is_rare_there_is_one_bound_for_all() -> None:
    X = np.concatenate([features(100, 0), features(100, 1, centre=1)])
    found, plain = Novelty.fit([subset(X, labels=np.repeat(["a", "b"], 100))]), Novelty.fit([subset(X)])
    assert found is not None
    assert plain is not None
    assert (len(found.own), found.usual) == (0, plain.usual)


def test_a_class_of_one_group_cannot_show_what_is_usual(caplog: pytest.LogCaptureFixture) -> None:
    X = np.concatenate([features(100, 0), features(3, 1, centre=1)])
    groups = [bytes([min(i, 100)]) for i in range(103)]
    found = Novelty.fit([subset(X, groups, np.repeat(["a", "lone"], [100, 3]))])
    assert found is not None
    assert len(found.own) == 0
    assert "new images of 'lone' may be called unlike the training images" in caplog.text


def test_the_share_of_novel_images_counts_by_group() -> None:
    scores = np.where(np.arange(200) < 20, 2, 0.5).astype(np.float32)
    alone, together = novel_share(scores, Units.each(200)), novel_share(scores, Units(np.arange(200) // 10))
    assert alone["interval"] == wilson(20, 200)
    assert (alone["novel"], alone["share"], alone["expected"]) == (20, 0.1, 0.05)
    assert together["interval"][0] < alone["interval"][0] < alone["interval"][1] < together["interval"][1]


def test_scores_do_not_depend_on_the_length_of_features_and_survive_the_file(tmp_path: Path) -> None:
    X = features(300, 0)
    found = Novelty.fit([subset(X)])
    assert found is not None
    (tmp_path / "novelty.h5").write_bytes(found.to_bytes())
    again = Novelty.load(tmp_path / "novelty.h5")
    np.testing.assert_array_equal(again.scores(X), found.scores(X))
    np.testing.assert_allclose(found.scores(7 * X), found.scores(X), rtol=1e-3, atol=1e-4)


def test_too_few_images_or_all_the_same_tell_nothing() -> None:
    assert Novelty.fit([subset(features(15, 0))]) is None
    assert Novelty.fit([subset(np.ones((50, 4), np.float32))]) is None
    assert Novelty.fit([subset(np.zeros((50, 4), np.float32))]) is not None  # no direction at all: anything is unlike it


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> FeatureCache:
    """Noise, dark for ants and bright for bees."""
    root, rng = tmp_path_factory.mktemp("novelty") / "photos", np.random.default_rng(0)
    for label, level in (("ants", 60), ("bees", 120)):
        (root / label).mkdir(parents=True)
        for i in range(25):
            Image.fromarray(rng.integers(0, 2 * level, (60, 80, 3), np.uint8)).save(root / label / f"{i:03d}.png")
    return extract(ImageFolder(root), backbone, root.parent / "photos.cache", Options(quiet=True))


@pytest.fixture(scope="module")
def bundle(cache: FeatureCache) -> Bundle:
    return classifiers.train(cache, cache.path.parent / "photos.head", make_head("logistic"))


def test_evaluate_counts_what_training_counted(bundle: Bundle, cache: FeatureCache) -> None:
    by_features, predictions = evaluate_bundle(bundle, cache.path)
    by_images, _ = evaluate_bundle(bundle, cache.root)
    assert bundle.metrics is not None
    assert by_features.to_json()["novelty"] == by_images.to_json()["novelty"] == bundle.metrics["novelty"]
    assert predictions.novelty is not None
    assert bundle.metrics["novelty"]["novel"] == (predictions.novelty > 1).sum()


def test_predict_says_how_unlike_the_training_images_a_picture_is(
    bundle: Bundle,
    cache: FeatureCache,
    tmp_path: Path,
    make_image: Callable[..., Path],
    penult: Callable[..., tuple[int, str, str]],
) -> None:
    pattern = make_image(tmp_path / "pattern.png")
    known, broken = cache.root / "ants/000.png", tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    images = [known, pattern, broken]
    a, b, c = Predictor.load(bundle.path).predict(images)
    assert a.novelty is not None
    assert b.novelty is not None
    assert a.novelty < 1 < b.novelty
    assert c.novelty is None
    rows = list(csv.DictReader(penult("predict", bundle.path, *images, "--format", "csv")[1].splitlines()))
    assert [row["novelty"] for row in rows] == [f"{a.novelty:.4f}", f"{b.novelty:.4f}", ""]
    lines = [json.loads(line) for line in penult("predict", bundle.path, *images, "--format", "jsonl")[1].splitlines()]
    assert [line["novelty"] for line in lines] == [round(a.novelty, 4), round(b.novelty, 4), None]
    table = penult("predict", bundle.path, *images)[1].splitlines()
    assert [("unlike the training images" in line) for line in table] == [False, True, False]


def test_a_changed_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy.head"
    shutil.copytree(bundle.path, copy)
    data = bytearray((copy / "novelty.h5").read_bytes())
    data[-100] ^= 1
    (copy / "novelty.h5").write_bytes(data)
    with pytest.raises(BadDataError, match=r"novelty\.h5 is not the file that was saved"):
        Bundle.load(copy)


def test_a_bundle_without_it_has_no_such_column(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, penult: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(novelty, "FEWEST", 1000)
    plain = classifiers.train(cache, tmp_path / "plain.head", make_head("logistic"))
    assert plain.novelty() is None
    assert not (plain.path / "novelty.h5").exists()
    out = penult("predict", plain.path, cache.root / "ants/000.png", "--format", "csv")[1]
    assert out.splitlines()[0] == "path,label,probability,code,message,p_ants,p_bees"
    assert evaluate_bundle(plain, cache.path)[0].novelty is None
