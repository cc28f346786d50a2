"""Training on features that stay on disk: the same numbers as in memory, and a clear word where it cannot be."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import classifiers
import classifiers.heads.solvers.row_sums
import classifiers.heads.solvers.softmax
import store.format.lazy_features
import store.writer
from classifiers.bundles.bundle import Bundle
from classifiers.heads.logistic import LogisticHead
from classifiers.heads.registry import make_head
from classifiers.training.memory import USUAL, must_stream
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.machine import default_limit, resident
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.compact import write_compact
from store.errors import CorruptCacheError, LockedError, UsageError
from store.format.lazy_features import LazyFeatures
from store.format.samples import Row, SampleTable
from store.format.shard import widen
from store.splits import assign_splits, with_splits
from store.writer import open_writer

TINY = 1  # byte: nothing fits
PLENTY = 10**12
N, CLASSES = 2400, 3


@dataclass(frozen=True)
class Synthetic:
    """A cache of many small shards, and what is in it by path."""

    path: Path
    features: dict[bytes, np.ndarray]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, dataset: Callable[..., Path]) -> Synthetic:
    folder = tmp_path_factory.mktemp("large")
    path = folder / "large.cache"
    options = Options(val_fraction=0, test_fraction=0)
    cache = extract(ImageFolder(dataset(folder / "photos", {"a": 1, "b": 1})), backbone, path, options)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, CLASSES, N)
    hidden = rng.normal(size=(CLASSES, 16))[targets] * 0.5 + rng.normal(size=(N, 16))
    X = np.maximum(hidden @ rng.normal(size=(16, cache.dim)) / 4 + 0.3 * rng.normal(size=(N, cache.dim)), 0)
    X = X.astype(np.float16).astype(np.float32)
    paths = [b"%05d.jpg" % i for i in rng.permutation(N)]
    digests = [hashlib.sha256(name).digest() for name in paths]
    rows = [Row(p, f"class {t}", sha256=d) for p, t, d in zip(paths, targets.tolist(), digests, strict=True)]
    rows.append(Row(b"copy.jpg", rows[0].label, sha256=digests[0]))
    with open_writer(path) as writer:
        writer.begin(cache.fingerprint, facts=cache.meta["facts"])
        for i in range(0, N, 150):
            writer.append([X[i : i + 150]], digests[i : i + 150], paths[i : i + 150])
            writer.commit()
        names = assign_splits(rows, val=0.2, test=0.2, seed=0)
        ordered = sorted(with_splits(rows, names), key=lambda row: row.path)
        writer.finish(SampleTable(ordered, cache.samples.facts))
    return Synthetic(path, dict(zip([*paths, b"copy.jpg"], [*X, X[0]], strict=True)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.format.lazy_features, "ROWS", 400)
    monkeypatch.setattr(classifiers.heads.solvers.row_sums, "ROWS", 400)
    monkeypatch.setattr(classifiers.heads.solvers.softmax, "ROWS", 400)


@pytest.fixture(scope="module")
def in_memory(synthetic: Synthetic) -> Bundle:
    return classifiers.train(
        FeatureCache(synthetic.path), synthetic.path.with_name("memory.head"), LogisticHead(), TrainOptions(max_memory=PLENTY)
    )


def test_every_float16_is_widened_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    out = np.empty(len(finite), np.float32)
    widen(finite, out)
    np.testing.assert_array_equal(out.view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("compact", [False, True])
def test_stored_features_are_the_features(synthetic: Synthetic, tmp_path: Path, *, compact: bool) -> None:
    cache = FeatureCache(synthetic.path)
    if compact:
        write_compact(cache, tmp_path / "large.h5")
        cache = FeatureCache(tmp_path / "large.h5")
    subset = cache.of_rows(cache.rows(), "all", lazy=True)
    assert isinstance(subset.X, LazyFeatures)
    expected = np.stack([synthetic.features[path] for path in subset.paths])
    labels = {row.path: row.label for row in cache.rows()}
    assert subset.y.tolist() == [labels[path] for path in subset.paths]
    rng = np.random.default_rng(1)
    for wanted in (
        slice(None),
        slice(100, 900),
        np.arange(0, N, 401),
        rng.integers(0, N, 700),
        np.array([], int),
        np.array([7]),
    ):
        found = np.asarray(subset.X[wanted], np.float32)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[wanted])
        np.testing.assert_array_equal(np.asarray(subset.X[wanted]).astype(np.float32), expected[wanted])
    blocks = list(subset.X.blocks())
    assert sum(len(rows) for _, rows in blocks) == len(subset) == N + 1
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(subset.X, copy=False)


@pytest.mark.usefixtures("small_blocks")
def test_a_head_from_disk_is_the_one_from_memory(
    synthetic: Synthetic, in_memory: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penult")
    bundle = classifiers.train(
        FeatureCache(synthetic.path), tmp_path / "disk.head", LogisticHead(), TrainOptions(max_memory=TINY)
    )
    assert "the features stay on disk" in caplog.text
    assert "near copies were not looked for" in caplog.text
    assert bundle.split["chosen_on"] == in_memory.split["chosen_on"] == "val"
    assert bundle.hyperparameters["C"] == in_memory.hyperparameters["C"]
    assert len(bundle.history) == len(in_memory.history)
    for disk, memory in zip(bundle.history, in_memory.history, strict=True):
        assert disk["converged"]
        assert disk["log_loss"] == pytest.approx(memory["log_loss"], abs=2e-4)
        assert disk["gradient"] <= 1e-3
    assert bundle.metrics
    assert in_memory.metrics
    assert bundle.metrics["n"] == in_memory.metrics["n"]
    assert bundle.metrics["log_loss"] == pytest.approx(in_memory.metrics["log_loss"], abs=2e-4)
    assert bundle.hyperparameters["temperature"] == pytest.approx(in_memory.hyperparameters["temperature"], abs=1e-3)
    assert bundle.predictions().ids == in_memory.predictions().ids
    assert bundle.fitted() == in_memory.fitted()
    novelty, other = bundle.novelty(), in_memory.novelty()
    assert novelty
    assert other
    assert novelty.usual == pytest.approx(other.usual, rel=0.1)  # drawn in another order


@pytest.mark.usefixtures("small_blocks")
def test_folds_class_weights_and_sample_weights_from_disk(synthetic: Synthetic) -> None:
    cache = FeatureCache(synthetic.path)
    stored = cache.of_rows(cache.rows("train"), "train", lazy=True)
    weights = np.random.default_rng(2).random(len(stored)) + 0.5
    settings = {"Cs": (1e-4, 1e-3), "cv": 2, "class_weight": "balanced"}
    disk = LogisticHead(**settings).fit(stored.X, stored.y, weights, groups=stored.groups)
    memory = LogisticHead(**settings).fit(np.asarray(stored.X), stored.y, weights, groups=stored.groups)
    assert disk.n_features_in_ == memory.n_features_in_
    assert disk.C_ == memory.C_
    for one, other in zip(disk.path_, memory.path_, strict=True):
        assert one["log_loss"] == pytest.approx(other["log_loss"], abs=2e-4)
    np.testing.assert_allclose(disk.fitted_.logits(stored.X), memory.fitted_.logits(np.asarray(stored.X)), atol=5e-3)


def test_without_a_validation_split_a_fifth_of_train_is_chosen_on(synthetic: Synthetic, tmp_path: Path) -> None:
    cache = FeatureCache(synthetic.path)
    bundle = classifiers.train(
        cache,
        tmp_path / "a.head",
        LogisticHead(Cs=(1e-3, 1e-2)),
        TrainOptions(val_fraction=0, test_fraction=0.2, max_memory=TINY),
    )
    assert bundle.split["chosen_on"] == "a fifth of train, by hash rank"
    assert len(bundle.history) == 2


@pytest.mark.parametrize(("name", "settings"), [("mlp", {}), ("knn", {}), ("ridge", {}), ("logistic", {"l1_ratio": 0.5})])
def test_heads_that_need_all_features_say_so(
    synthetic: Synthetic, tmp_path: Path, name: str, settings: dict[str, float]
) -> None:
    with pytest.raises(UsageError, match=r"million numbers need about .* GB .*--head logistic"):
        classifiers.train(
            FeatureCache(synthetic.path), tmp_path / "a.head", make_head(name, **settings), TrainOptions(max_memory=TINY)
        )


def test_a_learning_curve_needs_memory(synthetic: Synthetic, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--few-shot needs all features in memory"):
        classifiers.train(
            FeatureCache(synthetic.path), tmp_path / "a.head", LogisticHead(), TrainOptions(few_shot=[5], max_memory=TINY)
        )


def test_what_fits_stays_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    head, rows, dim = LogisticHead(), 100_000, 1000
    enough = resident() + rows * dim * (2 + USUAL)
    assert not must_stream(head, rows, dim, 2, enough + 2**26)
    assert must_stream(head, rows, dim, 2, enough - 2**26)
    assert not must_stream(make_head("mlp"), rows, dim, 2, enough - 2**26)  # it may do with less
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    assert must_stream(head, rows, dim, 2, resident() + 2**26)
    assert "this takes about 0.2 GB of memory" in caplog.text
    assert 2**26 < default_limit() < 2**50


def test_shards_that_are_lost_or_damaged_are_named(synthetic: Synthetic, tmp_path: Path) -> None:
    shutil.copytree(synthetic.path, tmp_path / "a.cache")
    cache = FeatureCache(tmp_path / "a.cache")
    X = cache.of_rows(cache.rows(), "all", lazy=True).X
    damaged, cut, lost = (shard.path for shard in cache.shards[1:4])
    np.asarray(X[-N // 2 :])
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    sound, cache._sound = cache._sound, set()
    with pytest.raises(CorruptCacheError, match=damaged.name):
        np.asarray(cache.of_rows(cache.rows(), "all", lazy=True).X)
    sound.update(range(len(cache.shards)))  # they were, when they were first read
    cut.write_bytes(cut.read_bytes()[: cache.shards[2].offset + 100])
    assert isinstance(X, LazyFeatures)
    with pytest.raises(CorruptCacheError, match=cut.name):
        np.asarray(X[np.flatnonzero(X.owner == 2)])
    lost.unlink()
    with pytest.raises(LockedError, match="is being changed, or was replaced"):  # as a prune beside this one does
        np.asarray(X[np.flatnonzero(X.owner == 3)])
    with pytest.raises(CorruptCacheError, match=cut.name):  # opened anew
        FeatureCache(tmp_path / "a.cache").of_rows(cache.rows(), "all", lazy=True)


def test_the_command_takes_a_size(synthetic: Synthetic, tmp_path: Path, penult: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = penult("train", synthetic.path, "-o", tmp_path / "a.head", "--C", "0.001", "--max-memory", "100MB")
    assert (code, "the features stay on disk" in err) == (0, True)
    code, _, err = penult("train", synthetic.path, "-o", tmp_path / "b.head", "--max-memory", "much")
    assert (code, '--max-memory is "much"; expected a size such as 4GB' in err) == (2, True)
