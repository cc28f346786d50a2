"""The one-file form says what the folder says; pruning removes what no sample refers to; drift is measured and explained."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import classifiers
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.heads.registry import make_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.compact import prune, write_compact
from store.drift import compare_caches
from store.errors import BadDataError, CorruptCacheError, OutputExistsError
from store.fingerprint import Fingerprint
from store.format import shard
from store.format.samples import Row, SampleTable
from store.testing import assert_features_match, assert_metrics_match
from store.verify import verify_cache
from store.writer import open_writer

FIELDS = {"backbone": "net", "weights": "0" * 64, "pixels": {"resize": 72, "crop": 64, "probe": "1" * 64}, "provider": "cpu"}


def fill(
    path: Path, X: np.ndarray, labels: Sequence[str] = (), *, storage: str = "float32", fields: dict[str, object] | None = None
) -> FeatureCache:
    """A cache of given features; image i has content i."""
    digests = [f"{i:032d}".encode() for i in range(len(X))]
    names = [f"{i:03d}.jpg".encode() for i in range(len(X))]
    with open_writer(path) as writer:
        writer.begin(Fingerprint({**FIELDS, "storage": storage, **(fields or {})}), facts={})
        writer.append([X.astype(np.float32)], digests, names)
        writer.commit()
        given = labels or ["a", "b"] * (len(X) // 2) + ["a"] * (len(X) % 2)
        rows = [Row(name, label, "train", sha256=key) for name, label, key in zip(names, given, digests, strict=True)]
        writer.finish(SampleTable(rows, {"root": b"/nowhere".hex()}))
    return FeatureCache(path)


@pytest.fixture(name="X")
def positive_features() -> np.ndarray:
    return np.random.default_rng(0).exponential(size=(60, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path], backbone: Backbone) -> Path:
    root = dataset(tmp_path_factory.mktemp("compact") / "photos", {"ants": 12, "bees": 12})
    (root / "ants/broken.jpg").write_bytes(b"")
    shutil.copy(root / "ants/000.jpg", root / "ants/copy.jpg")
    run_extract(ImageFolder(root), backbone, root.parent / "c", Options(quiet=True))
    return root.parent / "c"


def test_a_compact_file_is_the_cache_in_one_file(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(folder)
    assert write_compact(cache, tmp_path / "c.h5") == 25
    one = FeatureCache(tmp_path / "c.h5")
    assert one.samples == cache.samples
    assert one.fingerprint == cache.fingerprint
    assert one.dtype == np.float32
    for split in cache.samples.splits():
        np.testing.assert_array_equal(one.subset(split).X, cache.subset(split).X.astype(np.float32))
        assert one.subset(split).paths == cache.subset(split).paths
    assert one.read_backbone() == cache.read_backbone() == (folder / "backbone.onnx").read_bytes()
    assert verify_cache(tmp_path / "c.h5") == []
    with pytest.raises(OutputExistsError):
        write_compact(cache, tmp_path / "c.h5")


@pytest.mark.parametrize("part", ["samples.h5", "cache.json", "backbone.onnx", "shards/*.h5"])
def test_overwriting_does_not_destroy_the_cache_itself(folder: Path, part: str) -> None:
    [file, *_] = sorted(folder.glob(part))
    before = file.read_bytes()
    with pytest.raises(OutputExistsError, match="is a part of"):
        write_compact(FeatureCache(folder), file, overwrite=True)
    assert file.read_bytes() == before
    assert verify_cache(folder) == []


def test_plain_h5py_sees_features_beside_their_labels(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(folder)
    write_compact(cache, tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5") as file:
        n = len(file["features"])
        ends = file["label-names-offsets"][:]
        names = [bytes(file["label-names"][a:b]).decode() for a, b in itertools.pairwise(ends)]
        labels = [names[i] for i in file["label"][:n]]
        assert file["features"].dtype == np.float32
        assert file["features"].chunks is None
    assert labels == cache.subset().y.tolist()


def test_a_head_is_trained_and_evaluated_on_a_compact_file(folder: Path, tmp_path: Path) -> None:
    write_compact(FeatureCache(folder), tmp_path / "c.h5")
    ours = classifiers.train(FeatureCache(tmp_path / "c.h5"), tmp_path / "one.head", make_head("logistic", C=1.0))
    theirs = classifiers.train(FeatureCache(folder), tmp_path / "folder.head", make_head("logistic", C=1.0))
    np.testing.assert_allclose(ours.predictions().probabilities, theirs.predictions().probabilities, atol=1e-6)
    assert evaluate_bundle(theirs, tmp_path / "c.h5")[0].accuracy == evaluate_bundle(theirs, folder)[0].accuracy


def test_a_flipped_bit_in_a_compact_file_is_refused(folder: Path, tmp_path: Path) -> None:
    write_compact(FeatureCache(folder), tmp_path / "c.h5")
    data = bytearray((tmp_path / "c.h5").read_bytes())
    with h5py.File(tmp_path / "c.h5") as file:
        data[file["features"].id.get_offset() + 99] ^= 4
    (tmp_path / "c.h5").write_bytes(data)
    assert "damaged" in verify_cache(tmp_path / "c.h5")[0].problem
    with pytest.raises(CorruptCacheError, match="damaged"):
        FeatureCache(tmp_path / "c.h5")


def test_pruning_keeps_exactly_what_is_referred_to(
    folder: Path, tmp_path: Path, dataset: Callable[..., Path], backbone: Backbone
) -> None:
    cache = shutil.copytree(folder, tmp_path / "c")
    root = shutil.copytree(folder.parent / "photos", tmp_path / "photos")
    for name in ("ants/001.jpg", "bees/002.jpg", "bees/003.jpg"):
        (root / name).unlink()
    run_extract(ImageFolder(root), backbone, cache, Options(quiet=True))
    before = FeatureCache(cache).subset()
    assert prune(cache) == (3, 21)
    after = FeatureCache(cache)
    np.testing.assert_array_equal(after.subset().X, before.X)
    assert sum(len(s.sha256) for s in after.shards) == 21
    assert verify_cache(cache) == []
    assert prune(cache) == (0, 21)
    assert run_extract(ImageFolder(root), backbone, cache, Options(quiet=True)).computed == 0


def test_float16_is_refused_where_it_would_not_hold(tmp_path: Path) -> None:
    cache = fill(tmp_path / "c", np.full((3, 4), 1e6, np.float32))
    with pytest.raises(BadDataError, match="float16 would not hold 3 of 3 rows"):
        write_compact(cache, tmp_path / "c.h5", dtype="float16")


# --- drift -------------------------------------------------------------------------------------------------------------


def test_what_a_killed_prune_left_twice_is_counted_once_and_the_next_writer_removes_it(tmp_path: Path, X: np.ndarray) -> None:
    for name in ("prune", "extract"):
        cache = fill(tmp_path / name, X)
        (old,) = cache.shards
        digests = old.digests()[10:30]  # the rows that it had copied when it was killed before it removed the old shard
        shard.write_shard(tmp_path / name / "shards", 1, X[10:30], digests, [b"x"] * 20, cache.fingerprint)
        again = FeatureCache(tmp_path / name)
        assert (sum(len(each.sha256) for each in again.shards), again.describe()["rows"]) == (80, 60)
        np.testing.assert_array_equal(again.subset().X, X)
        if name == "prune":
            assert prune(tmp_path / name) == (0, 60)
        else:
            with open_writer(tmp_path / name) as writer:
                writer.begin(cache.fingerprint, facts={})
        assert [each.path for each in FeatureCache(tmp_path / name).shards] == [old.path]


def test_equal_caches_do_not_drift(tmp_path: Path, X: np.ndarray) -> None:
    drift = compare_caches(fill(tmp_path / "a", X), fill(tmp_path / "b", X))
    assert drift.passed
    assert (drift.common, drift.max_l2, drift.causes) == (60, 0.0, [])
    assert_features_match(tmp_path / "b", tmp_path / "a")


def test_a_permutation_is_named(tmp_path: Path, X: np.ndarray) -> None:
    drift = compare_caches(fill(tmp_path / "a", X), fill(tmp_path / "b", np.concatenate([X[:40], np.roll(X[40:], 1, axis=0)])))
    assert not drift.passed
    assert drift.causes == ["permutation: 20 of 20 drifted rows are the features of other images; rows were mixed up"]


def test_a_label_swap_is_named(tmp_path: Path, X: np.ndarray) -> None:
    labels = ["a", "b", "c"] * 20
    swapped = [{"a": "b", "b": "a"}.get(label, label) for label in labels]
    drift = compare_caches(fill(tmp_path / "a", X, labels), fill(tmp_path / "b", X, swapped))
    assert not drift.passed
    assert drift.causes == ["labels swapped: a and b, 40 images"]


def test_another_resolution_is_named(tmp_path: Path, X: np.ndarray) -> None:
    pixels = {"pixels": {"resize": 146, "crop": 128, "probe": "2" * 64}}
    drift = compare_caches(fill(tmp_path / "a", X), fill(tmp_path / "b", X * 1.01, fields=pixels))
    assert not drift.passed
    assert drift.causes == [
        "other resolution: crop 64 against 128 pixels",
        "other resolution: resize 72 against 146 pixels",
    ]


def test_noise_is_drift_without_a_named_cause_and_the_worst_image_leads(tmp_path: Path, X: np.ndarray) -> None:
    noisy = X.copy()
    noisy[17] *= 1.05
    drift = compare_caches(fill(tmp_path / "a", X), fill(tmp_path / "b", noisy))
    assert not drift.passed
    assert drift.causes == []
    assert (drift.worst[0].path, drift.worst[0].relative_l2) == ("017.jpg", pytest.approx(0.05, rel=1e-3))
    with pytest.raises(AssertionError, match=r"moved: 017\.jpg: 5\.0e-02"):
        assert_features_match(tmp_path / "b", tmp_path / "a")
    assert_features_match(tmp_path / "b", tmp_path / "a", bound=0.06)


def test_a_float32_golden_does_not_pass_as_float16(tmp_path: Path, X: np.ndarray) -> None:
    exact = X.astype(np.float16).astype(np.float32)  # the values are the same, the type is not
    drift = compare_caches(fill(tmp_path / "a", exact), fill(tmp_path / "b", exact, storage="auto"))
    assert drift.max_l2 == 0
    assert not drift.passed
    assert "stored as float16 instead of float32" in drift.causes


def test_cpu_and_cuda_may_differ_by_1e_4(tmp_path: Path, X: np.ndarray) -> None:
    a = fill(tmp_path / "a", X)
    assert compare_caches(a, fill(tmp_path / "b", X * (1 + 5e-5), fields={"provider": "cuda"})).passed
    assert not compare_caches(a, fill(tmp_path / "c", X * (1 + 5e-4), fields={"provider": "cuda"})).passed
    assert not compare_caches(a, fill(tmp_path / "d", X * (1 + 5e-5))).passed  # same provider: 1e-6


def test_missing_and_added_images_fail_and_flips_are_counted(tmp_path: Path, X: np.ndarray) -> None:
    a, b = fill(tmp_path / "a", X[:50]), fill(tmp_path / "b", X)
    drift = compare_caches(a, b, predict=lambda features: (features[:, 0] > 1).astype(np.intp))
    assert (drift.only_a, drift.only_b, drift.flips, drift.passed) == (0, 10, 0, False)
    moved = X.copy()
    moved[3, 0] = 2 - moved[3, 0]
    flipped = compare_caches(b, fill(tmp_path / "c", moved), predict=lambda f: (f[:, 0] > 1).astype(np.intp))
    assert flipped.flips == 1


def test_caches_without_a_common_image_say_why(tmp_path: Path, X: np.ndarray) -> None:
    a, b = fill(tmp_path / "a", X), fill(tmp_path / "b", X)
    object.__setattr__(b.samples, "rows", [replace(row, sha256=b"x" + row.sha256[1:]) for row in b.samples.rows])
    with pytest.raises(BadDataError, match=r"60 paths .* written again, for example with another resolution or compression"):
        compare_caches(a, b)
    with pytest.raises(BadDataError, match=r"32 features a row .* 16"):
        compare_caches(a, fill(tmp_path / "c", X[:, :16]))


def test_metrics_match_within_a_tolerance() -> None:
    golden = {"n": 100, "accuracy": 0.95, "macro_f1": 0.94, "log_loss": 0.2}
    assert_metrics_match({**golden, "accuracy": 0.954}, {"metrics": golden}, tolerance=0.005)
    with pytest.raises(AssertionError, match=r"accuracy: 0\.960000 against 0\.950000"):
        assert_metrics_match({**golden, "accuracy": 0.96}, golden, tolerance=0.005)
    with pytest.raises(AssertionError, match="n: 90 against 100"):
        assert_metrics_match({**golden, "n": 90}, golden, tolerance=1)
    with pytest.raises(AssertionError, match="log_loss: nan"):
        assert_metrics_match({**golden, "log_loss": float("nan")}, golden, tolerance=1)
