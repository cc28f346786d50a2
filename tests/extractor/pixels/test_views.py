"""Cached views: the first is the image as it is, the others depend on seed and content alone, and no held-out one is fitted."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

import classifiers
import store.writer
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.fuse import fuse
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictor import Predictor
from classifiers.heads.centroid import CentroidHead
from classifiers.heads.folds import on_first_views, stratified_folds
from classifiers.heads.logistic import LogisticHead
from classifiers.heads.mlp import MlpHead
from classifiers.heads.multilabel_logistic import MultiLabelLogisticHead
from classifiers.heads.registry import make_head
from classifiers.heads.ridge import RidgeHead, RidgeRegressionHead
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.sources import open_source
from extractor.graphs.backbone_facts import read_facts
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from extractor.pixels.augment import STANDARD
from extractor.pixels.images import decode
from extractor.pixels.views import Views
from store.cache import FeatureCache
from store.compact import prune, write_compact
from store.drift import compare_caches
from store.errors import (
    BadDataError,
    BudgetExceededError,
    CorruptCacheError,
    FingerprintMismatchError,
    StorageError,
    UsageError,
)
from store.fingerprint import MAX_VIEWS, Fingerprint
from store.format.metadata import shard_paths
from store.format.shard import fits_float16, read_shard, write_shard
from store.writer import open_writer
from tests.conftest import as_theirs

K = 3
TURNS: dict[str, Any] = {"rotation": 20.0, "brightness": 0.2}
TURNED = replace(STANDARD, **TURNS)
Extract = Callable[..., FeatureCache]
Penult = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colours with noise: 13 + 13 to train on, 6 + 6 to test on. One of each is there twice."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 13), ("test", 6)):
        for label, colour in (("red", (140, 110, 110)), ("blue", (110, 110, 140))):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(0, 60, (48, 60, 3)) + colour, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((90, 70)).save(folder / split / label / f"{i}.png")
            shutil.copy(folder / split / label / "0.png", folder / split / label / "copy.png")
    return folder


@pytest.fixture(scope="module")
def take(photos: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Extract:
    """``take(views=K, **options)``: the photos in a new cache, on the CPU."""

    def go(**options: Any) -> FeatureCache:
        given = {"views": K, "device": "cpu", "batch_size": 4, "workers": 2, "quiet": True, **options}
        given = {**(TURNS if given["views"] > 1 else {}), **given}
        return extract(ImageFolder(photos), backbone, tmp_path_factory.mktemp("views") / "c", Options(**given))

    return go


@pytest.fixture(scope="module")
def seen(take: Extract) -> FeatureCache:
    """A cache of three views; not to be changed."""
    return take()


@pytest.fixture(scope="module")
def plain(take: Extract) -> FeatureCache:
    """The same photos as ever; not to be changed."""
    return take(views=1)


def every(cache: FeatureCache) -> NDArray[np.floating[Any]]:
    return cache.features([row.sha256 for row in cache.rows()], views=True)


def same(one: FeatureCache, other: FeatureCache) -> bool:
    a, b = every(one), every(other)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes() and one.fingerprint == other.fingerprint


# --- extraction --------------------------------------------------------------------------------------------------------


def test_the_first_view_is_the_image_as_it_is(seen: FeatureCache, plain: FeatureCache) -> None:
    digests = [row.sha256 for row in plain.rows()]
    assert seen.views == K
    assert seen.features(digests).shape == plain.features(digests).shape
    assert seen.features(digests).tobytes() == plain.features(digests).tobytes()
    assert seen.subset("test").X.tobytes() == plain.subset("test").X.tobytes()
    views = every(seen)
    assert views.shape == (len(digests), K, 512)
    assert (views[:, 0] == plain.features(digests)).all()
    distances = np.linalg.norm(np.diff(views.astype(np.float64), axis=1), axis=2)
    assert distances.min() > 1e-3 * np.linalg.norm(views[0, 0].astype(np.float64))
    assert (every(plain)[:, 0] == plain.features(digests)).all()


def test_views_are_what_the_network_gives_for_pixels_drawn_by_seed_and_content(
    seen: FeatureCache, photos: Path, backbone_file: Path
) -> None:
    import onnxruntime

    row, preprocess = seen.rows()[3], read_facts(backbone_file).preprocess
    data = (photos / row.name).read_bytes()
    image = preprocess.scaled(decode(data))
    drawn = Views(K, 0, TURNED).pixels(image, hashlib.sha256(data).digest(), preprocess)
    assert drawn.shape == (K, 64, 64, 3)
    rng = np.random.default_rng([0, int.from_bytes(row.sha256), 2])
    assert (drawn[2] == TURNED.pixels(image, rng, preprocess)).all()
    session = onnxruntime.InferenceSession(str(backbone_file), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"pixels": preprocess.normalise(drawn)})[0]
    found = seen.features([row.sha256], views=True)[0].astype(np.float64)
    assert np.linalg.norm(found - expected, axis=1).max() <= 5e-4 * np.linalg.norm(expected, axis=1).min()


def test_batches_threads_and_company_change_no_bit(seen: FeatureCache, take: Extract) -> None:
    for options in ({"batch_size": 1}, {"batch_size": 7, "workers": 1}, {"batch_size": 64}):
        assert same(seen, take(**options)), options
    few = take(limit=7)
    digests = [row.sha256 for row in few.rows()]
    assert few.features(digests, views=True).tobytes() == seen.features(digests, views=True).tobytes()


def test_batch_sizes_are_tried_on_views_too(
    backbone: Backbone, tmp_path: Path, dataset: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penult")
    source = ImageFolder(dataset(tmp_path / "many", {"a": 45, "b": 45}))
    options = Options(views=3, device="cpu", quiet=True)
    tried = extract(source, backbone, tmp_path / "tried", options)
    assert "batches of" in caplog.text
    assert same(tried, extract(source, backbone, tmp_path / "fixed", options.replace(batch_size=4)))


def test_seed_and_augmentation_decide_all_views_but_the_first(seen: FeatureCache, take: Extract) -> None:
    for other in (take(seed=1), take(rotation=0.0, brightness=0.0)):
        assert (every(other)[:, 0] == every(seen)[:, 0]).all()
        assert (every(other)[:, 1:] != every(seen)[:, 1:]).any(axis=2).all()
        assert other.fingerprint.single == seen.fingerprint.single
        assert other.fingerprint != seen.fingerprint


def test_an_interrupted_run_continues_to_the_same_bytes(
    seen: FeatureCache, photos: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.writer, "SHARD_BYTES", 1)
    options = Options(views=K, **TURNS, device="cpu", batch_size=4, workers=2, quiet=True)
    commit, left = store.writer.shard.write_shard, [3]

    def full(*arguments: Any) -> Path:
        if not left[0]:
            message = "No space left on device"
            raise StorageError(message)
        left[0] -= 1
        return commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.writer.shard, "write_shard", full)
        with pytest.raises(StorageError):
            extract(ImageFolder(photos), backbone, tmp_path / "c", options)
    before = {path: path.read_bytes() for path in shard_paths(tmp_path / "c")}
    assert len(before) == 3
    again = extract(ImageFolder(photos), backbone, tmp_path / "c", options.replace(batch_size=5))
    assert same(seen, again)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_bad_file_among_views_costs_itself(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/train/red/5.png").write_bytes(b"no picture")
    options = Options(views=K, device="cpu", batch_size=4, quiet=True)
    cache = extract(ImageFolder(tmp_path / "data"), backbone, tmp_path / "c", options)
    assert cache.samples.counts["failed"] == 1
    assert every(cache).shape == (41, K, 512)
    with pytest.raises(BudgetExceededError, match="not_an_image"):
        extract(ImageFolder(tmp_path / "data"), backbone, tmp_path / "d", options.replace(on_error="fail"))


def test_only_a_cache_of_the_same_views_is_continued(
    seen: FeatureCache, plain: FeatureCache, photos: Path, backbone: Backbone
) -> None:
    assert "views" not in plain.fingerprint.fields
    assert plain.fingerprint == seen.fingerprint.single
    facts = seen.fingerprint.fields["views"]
    assert (facts["count"], facts["seed"], facts["augmentation"]) == (K, 0, TURNED.facts())
    assert len(facts["probe"]) == 64
    for cache, options, field in (
        (seen, Options(device="cpu"), "views.count"),
        (seen, Options(views=K, seed=5, **TURNS, device="cpu"), "views.seed"),
        (plain, Options(views=2, device="cpu"), "views.count"),
    ):
        with pytest.raises(FingerprintMismatchError, match=field):
            extract(ImageFolder(photos), backbone, cache.path, options)


def test_what_cannot_be_meant_is_refused(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    for options, word in (
        ({"views": 2, "augment": "none"}, "2 times the same"),
        (TURNS, "of 2 or more"),
        ({"views": MAX_VIEWS + 1}, "expected 1 to 64"),
    ):
        with pytest.raises(UsageError, match=word):
            Options(**options)
    with pytest.raises(UsageError, match="pillow-draft"):
        extract(ImageFolder(photos), replace(backbone, pixel_path="pillow-draft"), tmp_path / "c", Options(views=2))
    assert not (tmp_path / "c").exists()


def test_several_layers_have_views_each(photos: Path, take: Extract, backbone_file: Path, tmp_path: Path) -> None:
    early = next(node.output[0] for node in onnx.load(backbone_file).graph.node if node.op_type == "MaxPool")
    two = as_theirs(backbone_file, tmp_path / "theirs.onnx", early, "features")
    options = Options(views=2, device="cpu", batch_size=3, limit=8, quiet=True)
    cache = extract(ImageFolder(photos), two, tmp_path / "c", options)
    assert len(cache.layers) == 2
    for layer in cache.layers:
        one = cache.with_layer(layer)
        assert every(one).shape == (8, 2, one.dim)
    last = cache.with_layer("features")
    digests = [row.sha256 for row in last.rows()]
    expected = take(views=2, rotation=0.0, brightness=0.0).features(digests, views=True).astype(np.float64)
    found = last.features(digests, views=True).astype(np.float64)
    assert np.linalg.norm(found - expected, axis=2).max() <= 1e-3 * np.linalg.norm(expected, axis=2).min()


# --- on disk -----------------------------------------------------------------------------------------------------------


def test_plain_h5py_reads_views(seen: FeatureCache) -> None:
    with h5py.File(shard_paths(seen.path)[0]) as file:
        features, keys = file["features"][()], file["sha256"][()]
    assert features.shape == (len(keys), K, 512)
    row = next(row for row in seen.rows() if row.sha256 == keys[1].tobytes())
    assert (seen.features([row.sha256], views=True)[0] == features[1]).all()


def test_one_view_that_does_not_fit_float16_changes_no_bit_of_another(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(5, 2, 8)).astype(np.float32)
    X[3, 1, 0] = 1e6
    drawn = Fingerprint({"storage": "auto", "views": {"count": 2}})
    digests, paths = [hashlib.sha256(bytes([i])).digest() for i in range(5)], [b"%d.jpg" % i for i in range(5)]
    for name, fingerprint, rows in (("two", drawn, X), ("one", drawn.single, X[:, 0])):
        with open_writer(tmp_path / name) as writer:
            writer.begin(fingerprint, facts={})
            writer.append([rows], digests, paths)
            writer.commit()
    shards = [read_shard(path) for path in shard_paths(tmp_path / "two")]
    assert [(len(s.sha256), s.dtype, s.views) for s in shards] == [(4, np.float16, 2), (1, np.float32, 2)]
    with h5py.File(shards[1].path) as file:
        wide = file["features"][()]
    with h5py.File(shard_paths(tmp_path / "one")[0]) as file:
        assert file["features"].dtype == np.float16
        assert (wide[0, 0] == file["features"][3]).all()
    assert (wide[0, 1] == X[3, 1]).all()
    assert not fits_float16(X[3]).all()


def test_a_shard_whose_shape_is_not_its_fingerprints_is_refused(tmp_path: Path) -> None:
    key = [bytes(32)]
    for views, shape in ((2, (1, 8)), (2, (1, 3, 8)), (1, (1, 1, 8)), (0, (1, 0, 8)), ("x", (1, 8))):
        fingerprint = Fingerprint({"views": {"count": views}} if views != 1 else {})
        path = write_shard(tmp_path, 0, np.ones(shape, np.float32), key, [b"x"], fingerprint)
        with pytest.raises(CorruptCacheError):
            read_shard(path)


def test_a_compact_file_holds_the_images_as_they_are(
    seen: FeatureCache, plain: FeatureCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, penult: Penult
) -> None:
    caplog.set_level(logging.INFO, "penult")
    write_compact(seen, tmp_path / "seen.h5", dtype="float16")
    assert "the first of 3 views" in caplog.text
    opened = FeatureCache(tmp_path / "seen.h5")
    assert (opened.views, opened.fingerprint) == (1, plain.fingerprint)
    assert opened.subset().X.tobytes() == plain.subset().X.tobytes()
    code, out, _ = penult("check", seen.path, "--against", tmp_path / "seen.h5")
    assert code == 0
    assert "1, 3; the first are compared" in out
    drift = compare_caches(plain, seen)
    assert drift.passed
    assert drift.causes == []


def test_pruning_keeps_the_views_of_what_is_left(photos: Path, backbone: Backbone, seen: FeatureCache, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data")
    options = Options(views=K, **TURNS, device="cpu", quiet=True)
    extract(ImageFolder(tmp_path / "data"), backbone, tmp_path / "c", options)
    for name in ("train/red/3.png", "test/blue/1.png"):
        (tmp_path / "data" / name).unlink()
    extract(ImageFolder(tmp_path / "data"), backbone, tmp_path / "c", options)
    assert prune(tmp_path / "c") == (2, 36)
    left = FeatureCache(tmp_path / "c")
    digests = [row.sha256 for row in left.rows()]
    assert left.features(digests, views=True).tobytes() == seen.features(digests, views=True).tobytes()


def test_info_and_the_summary_say_how_many(penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    flags = ("--views", 2, "--augment", "none", "--rotation", 10, "--device", "cpu", "--limit", 10)
    code, out, err = penult("extract", photos, "-m", backbone_file, "-o", path, *flags)
    assert code == 0, err
    assert "in 2 views each" in out
    assert "in 2 views each" in penult("info", path)[1]
    assert penult("verify", path)[0] == 0
    assert FeatureCache(path).fingerprint.fields["views"]["augmentation"] == {"rotation": 10.0}
    assert penult("extract", photos, "-m", backbone_file, "-o", path, "--rotation", 5)[0] == 2


# --- heads -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted_rows(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float32]]:
    """All rows that a centroid head was fitted to, one array for each fit; it goes on as ever."""
    rows: list[NDArray[np.float32]] = []
    original = CentroidHead._fitted

    def watched(self: CentroidHead, X: NDArray[np.float32], *others: Any) -> Any:
        rows.append(np.array(X))
        return original(self, X, *others)

    monkeypatch.setattr(CentroidHead, "_fitted", watched)
    return rows


def owners(cache: FeatureCache, X: NDArray[np.floating[Any]]) -> set[bytes]:
    """The images that rows are views of."""
    known = {
        x.astype(np.float32).tobytes(): row.sha256 for row, views in zip(cache.rows(), every(cache), strict=True) for x in views
    }
    return {known[x.astype(np.float32).tobytes()] for x in X}


def test_no_view_of_a_held_out_image_is_ever_fitted(
    seen: FeatureCache, tmp_path: Path, fitted_rows: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[NDArray[np.float32]] = []
    original = CentroidHead._judge

    def watched(self: CentroidHead, X: Any, targets: Any, held: Any, settings: Any) -> Any:
        judged.append(np.array(held))
        assert not owners(seen, X) & owners(seen, held), "a fold divides an image"
        return original(self, X, targets, held, settings)

    monkeypatch.setattr(CentroidHead, "_judge", watched)
    bundle = classifiers.train(seen, tmp_path / "b", CentroidHead())
    train, test = ({row.sha256 for row in seen.rows(split)} for split in ("train", "test"))
    assert bundle.fitted() == train
    *folds, final = fitted_rows
    assert len(folds) == len(judged) == 5
    assert owners(seen, final) == train
    assert len(final) == K * len(seen.rows("train"))
    assert all(owners(seen, X) < train for X in folds)
    first = {x.astype(np.float32).tobytes() for x in seen.features(sorted(train))}
    assert all(x.tobytes() in first for held in judged for x in held), "choices are judged on images as they are"
    assert sum(map(len, judged)) == len(seen.rows("train"))
    assert not test & train


@pytest.mark.parametrize("name", ["logistic", "mlp", "ridge", "knn", "centroid"])
def test_every_head_learns_from_views(
    name: str, seen: FeatureCache, plain: FeatureCache, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penult")
    settings: dict[str, Any] = {"hidden": [8], "lr": 0.01} if name == "mlp" else {}
    bundle = classifiers.train(seen, tmp_path / "b", make_head(name, **settings), TrainOptions(thumbnails=False))
    assert bundle.metrics is not None
    assert bundle.metrics["accuracy"] > 0.7
    assert bundle.views is None
    assert bundle.fingerprint == plain.fingerprint
    assert bundle.hyperparameters["views"] == {**seen.fingerprint.fields["views"], "averaged": False}
    for cache in (seen, plain):
        result, predictions = evaluate_bundle(Bundle.load(bundle.path), cache.path)
        assert result.to_json()["accuracy"] == bundle.metrics["accuracy"]
        assert predictions.probabilities == pytest.approx(bundle.predictions().probabilities, abs=1e-6)
    assert "embedding the images" not in caplog.text
    files = [photos / path.decode() for path in bundle.predictions().paths]
    found = [p.probabilities for p in Predictor.load(bundle.path, device="cpu").predict(files)]
    assert np.array(found) == pytest.approx(bundle.predictions().probabilities, abs=1e-5)


def test_averages_are_taken_over_the_same_kind_of_views_everywhere(
    seen: FeatureCache, plain: FeatureCache, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penult")
    head = LogisticHead()
    bundle = classifiers.train(seen, tmp_path / "b", head, TrainOptions(average_views=True))
    kept = bundle.predictions()
    each = head.predict_proba(seen.features(kept.sha256, views=True).reshape(-1, seen.dim)).reshape(-1, K, 2)
    assert kept.probabilities == pytest.approx(each.mean(axis=1), abs=1e-6)
    assert np.abs(kept.probabilities - each[:, 0]).max() > 1e-3
    loaded = Bundle.load(bundle.path)
    assert loaded.views == Views(K, 0, TURNED)
    _, cached = evaluate_bundle(loaded, seen.path)
    assert cached.probabilities == pytest.approx(kept.probabilities, abs=1e-6)
    assert "embedding the images" not in caplog.text
    files = [photos / path.decode() for path in kept.paths]
    found = list(Predictor.load(bundle.path, device="cpu", batch_size=4).predict([*files, tmp_path / "gone.png"]))
    assert found.pop().code == "not_found"
    assert np.array([p.probabilities for p in found]) == pytest.approx(kept.probabilities, abs=1e-4)
    assert [p.novelty for p in found] == pytest.approx(bundle.novelty().scores(seen.features(kept.sha256)), abs=1e-2)
    _, drawn = evaluate_bundle(loaded, plain.path, device="cpu")
    assert "embedding the images" in caplog.text
    assert drawn.probabilities == pytest.approx(kept.probabilities, abs=1e-4)


def test_averaging_needs_views_and_a_fused_file_has_none(
    seen: FeatureCache, plain: FeatureCache, tmp_path: Path, penult: Penult, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match="--average-views"):
        classifiers.train(plain, tmp_path / "b", CentroidHead(), TrainOptions(average_views=True))
    code, _, err = penult("train", seen.path, "-o", tmp_path / "b", "--head", "ridge", "--average-views")
    assert code == 0, err
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.hyperparameters["views"]["averaged"] is True
    assert bundle.hyperparameters["temperature"] is None
    fused = fuse(bundle, tmp_path / "fused.onnx")
    assert "looks at it once" in caplog.text
    assert "views" not in fused.fingerprint
    assert penult("predict", tmp_path / "fused.onnx", "--selftest")[0] == 0


def test_what_was_averaged_counts_when_it_is_asked_whether_to_train_again(seen: FeatureCache, tmp_path: Path) -> None:
    one = classifiers.train(seen, tmp_path / "a", CentroidHead(), TrainOptions(thumbnails=False))
    two = classifiers.train(seen, tmp_path / "b", CentroidHead(), TrainOptions(thumbnails=False, average_views=True))
    assert one.made_from != two.made_from


def test_on_disk_and_in_memory_are_the_same(seen: FeatureCache, tmp_path: Path) -> None:
    head = {"C": 0.01}
    near = classifiers.train(
        seen,
        tmp_path / "a",
        make_head("logistic", **head),
        TrainOptions(val_fraction=0.3, test_fraction=0.3, average_views=True),
    )
    far = classifiers.train(
        seen,
        tmp_path / "b",
        make_head("logistic", **head),
        TrainOptions(val_fraction=0.3, test_fraction=0.3, average_views=True, max_memory=1),
    )
    order = np.argsort(far.predictions().sha256), np.argsort(near.predictions().sha256)
    assert far.predictions().probabilities[order[0]] == pytest.approx(near.predictions().probabilities[order[1]], abs=1e-4)
    assert far.conformal is not None
    assert near.conformal is not None
    assert far.conformal["n"] == near.conformal["n"], "calibrated on images, not on their views"


def test_rows_on_disk_keep_the_views_of_an_image_together(seen: FeatureCache) -> None:
    subset = seen.of_rows(seen.rows("train"), "train", lazy=True, views=True)
    assert len(set(seen.rows("train"))) > len({row.sha256 for row in seen.rows("train")}), "there are copies"
    found = np.asarray(subset.X).reshape(-1, K, seen.dim)
    assert (found == seen.features(subset.sha256[::K], views=True)).all()
    assert all(len(set(subset.paths[i : i + K])) == 1 for i in range(0, len(subset), K))


def test_a_learning_curve_fits_the_views_of_what_it_draws(seen: FeatureCache, tmp_path: Path, fitted_rows: list[Any]) -> None:
    bundle = classifiers.train(seen, tmp_path / "b", CentroidHead(), TrainOptions(few_shot=[1, 3], repeats=2, thumbnails=False))
    assert bundle.few_shot is not None
    assert [point["shots"] for point in bundle.few_shot] == [1, 3]
    sizes = {len(X) for X in fitted_rows}
    assert {2 * K, 6 * K} <= sizes


def test_folds_are_judged_on_first_views() -> None:
    targets, groups = np.repeat([0, 1], 30), [b"%d" % (i // K) for i in range(60)]
    folds = stratified_folds(targets, groups, 5, 0)
    for (train, test), (kept, judged) in zip(folds, on_first_views(folds, K), strict=True):
        assert (kept == train).all()
        assert (judged == test[::K]).all()
        assert not {groups[i] for i in train} & {groups[i] for i in judged}
    assert on_first_views(folds, 1) == folds


@pytest.mark.parametrize("head", [LogisticHead(), MlpHead(hidden=[8], lr=0.01), RidgeHead()], ids=lambda h: type(h).__name__)
def test_views_of_validation_are_fitted_and_the_first_is_judged_on(head: Any, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(["a", "b"], 30)
    X = (rng.normal(size=(60, 5)) + (y == "b")[:, None]).astype(np.float32)
    views = np.stack([X, X + rng.normal(size=X.shape), X + rng.normal(size=X.shape)], axis=1).astype(np.float32)
    rows, labels = views.reshape(-1, 5), np.repeat(y, K)
    held, held_labels = rows[60:120], labels[60:120]
    kept = np.r_[0:60, 120:180]
    groups = [b"%d" % (i // K) for i in range(len(kept))]
    head.fit(rows[kept], labels[kept], validation=(held, held_labels), groups=groups, views=K)
    assert head.conformal_.n == (60 if isinstance(head, MlpHead) else 20), "the mlp is calibrated on training images, too"
    assert np.mean(head.predict(X) == y) > 0.5


def test_several_labels_and_numbers_learn_from_views() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 6)).astype(np.float32)
    rows = np.repeat(X, K, axis=0) + np.tile([0, 1, 1], 40)[:, None] * rng.normal(0, 0.1, (40 * K, 6)).astype(np.float32)
    groups = [b"%d" % (i // K) for i in range(40 * K)]
    truth = np.repeat(X[:, :2] > 0, K, axis=0)
    several = MultiLabelLogisticHead().fit(rows, truth, groups=groups, views=K)
    assert (several.predict(X) == (X[:, :2] > 0)).mean() > 0.85
    numbers = RidgeRegressionHead().fit(rows, np.repeat(3 * X[:, 0] + 5, K), groups=groups, views=K)
    assert numbers.chosen_by_ == "folds"
    assert numbers.conformal_ is not None
    assert np.abs(numbers.predict(X) - (3 * X[:, 0] + 5)).mean() < 0.3


def test_other_tasks_take_the_same_way(photos: Path, backbone: Backbone, tmp_path: Path, penult: Penult) -> None:
    files = sorted(photos.rglob("[0-9].png"))
    lines = [f"{file.relative_to(photos)},{file.parent.name},{i}" for i, file in enumerate(files)]
    (tmp_path / "list.csv").write_text("path,label,number\n" + "\n".join(lines) + "\n")
    for task, targets, prefix in (("multi-label", (), "p_"), ("regression", ("number",), "value_")):
        cache = extract(
            open_source(tmp_path / "list.csv", root=photos, task=task, targets=targets),
            backbone,
            tmp_path / task,
            Options(views=2, device="cpu", quiet=True),
        )
        bundle = classifiers.train(cache, tmp_path / f"{task}.head", make_head(None, task), TrainOptions(average_views=True))
        kept = bundle.predictions()
        code, out, _ = penult("predict", bundle.path, photos / kept.paths[0].decode(), "--format", "csv", "--device", "cpu")
        assert code == 0
        [row] = csv.DictReader(io.StringIO(out))
        assert [float(row[prefix + name]) for name in bundle.classes] == pytest.approx(
            kept.probabilities[0].tolist(), rel=1e-3, abs=1e-3
        )


def test_a_file_cannot_ask_for_more_views_than_there_can_be() -> None:
    facts = Views(2, 0, STANDARD).facts()
    assert Views.from_facts(facts) == Views(2, 0, STANDARD)
    for count in (1, MAX_VIEWS + 1, "2", None):
        with pytest.raises(BadDataError, match="expected 2 to 64"):
            Views.from_facts({**facts, "count": count})
