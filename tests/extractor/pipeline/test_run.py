"""The pipeline end to end with a real network: what is computed, what is not, and what survives kills and damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

import extractor.data.files
import extractor.pipeline.run
import store.writer
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.manifest import Manifest
from extractor.data.sources import Source
from extractor.graphs.backbone_facts import read_facts
from extractor.pipeline.plan import preview
from extractor.pipeline.run import extract, run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import Summary
from extractor.pixels.images import decode
from store.cache import FeatureCache
from store.errors import (
    BadDataError,
    BudgetExceededError,
    FingerprintMismatchError,
    InputMissingError,
    OutputExistsError,
    StorageError,
    UsageError,
)
from store.format import hdf5
from store.format.metadata import shard_paths
from store.splits import assign_splits, with_splits

REPO = Path(__file__).resolve().parents[3]
SIZE = 4  # images per inference call; with SHARD_BYTES = 1 also per shard

Run = Callable[..., Summary]
MakeImage = Callable[..., Path]
MakeDataset = Callable[..., Path]


@pytest.fixture
def run(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(data, cache, **options)``: extract on the CPU, a shard per batch of four."""
    monkeypatch.setattr(store.writer, "SHARD_BYTES", 1)

    def go(data: Path | Source, cache: Path, *, net: Backbone = backbone, **options: Any) -> Summary:
        source = ImageFolder(data) if isinstance(data, Path) else data
        chosen = Options(**{"device": "cpu", "batch_size": SIZE, "workers": 2, "quiet": True, **options})
        summary = run_extract(source, net, cache, chosen)
        assert summary.ok + summary.duplicates + summary.failed == summary.inputs
        assert sum(summary.codes.values()) == summary.failed
        return summary

    return go


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, dataset: MakeDataset) -> Path:
    """Twelve pictures of two classes; not to be changed."""
    return dataset(tmp_path_factory.mktemp("photos"), {"ants": 6, "bees": 6})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, photos: Path, backbone: Backbone) -> Path:
    """The cache of `photos` from one uninterrupted run; not to be changed."""
    cache = tmp_path_factory.mktemp("reference") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.writer, "SHARD_BYTES", 1)
        extract(ImageFolder(photos), backbone, cache, Options(device="cpu", batch_size=SIZE, workers=2))
    return cache


@pytest.fixture
def mine(tmp_path: Path, photos: Path, reference: Path) -> tuple[Path, Path]:
    """Copies of `photos` (with their times) and of `reference`, to be changed."""
    shutil.copytree(photos, tmp_path / "data")
    shutil.copytree(reference, tmp_path / "c")
    return tmp_path / "data", tmp_path / "c"


def contents(cache: Path) -> dict[bytes, tuple[Any, ...]]:
    """All that a reader sees, by path: label, split, key and the very bytes of the features."""
    opened = FeatureCache(cache)
    rows = opened.rows()
    X = opened.features([row.sha256 for row in rows])
    return {row.path: (row.label, row.split, row.sha256, str(x.dtype), x.tobytes()) for row, x in zip(rows, X, strict=True)}


def snapshot(cache: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(cache)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def ledger(cache: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (cache / "ledger.jsonl").read_text().splitlines()]
    assert all(line["message"] for line in lines)
    return {line["path"]: line["code"] for line in lines}


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "auto"])
def test_a_cache_holds_what_the_network_gives(
    run: Run, photos: Path, backbone_file: Path, tmp_path: Path, storage: str
) -> None:
    import onnxruntime

    summary = run(photos, tmp_path / "c", storage=storage)
    assert (summary.inputs, summary.ok, summary.failed, summary.computed, summary.inference_calls) == (12, 12, 0, 12, 3)
    assert summary.provider == "cpu"
    assert {"read+decode", "embed", "write", "total"} <= set(summary.seconds)
    cache = FeatureCache(tmp_path / "c")
    facts = read_facts(backbone_file)
    files = sorted(photos.rglob("*.jpg"))
    pixels = facts.preprocess.normalise(np.stack([facts.preprocess.pixels(decode(file.read_bytes())) for file in files]))
    session = onnxruntime.InferenceSession(str(backbone_file), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"pixels": pixels})[0]
    found = cache.subset()
    assert found.paths == [os.fsencode(file.relative_to(photos)) for file in files]
    assert found.X.dtype == (np.float32 if storage == "float32" else np.float16)
    assert found.X.shape == (12, 512)
    error = np.linalg.norm(found.X.astype(np.float64) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= (1e-6 if storage == "float32" else 5e-4)
    assert error.max() > 0 or storage == "float32"
    assert len(np.unique(expected.round(4), axis=0)) == 12
    assert cache.root == photos
    assert onnx.load(cache.path / "backbone.onnx").graph == onnx.load(backbone_file).graph
    for shard in cache.shards:
        hdf5.verify(shard.path, "penult-shard")


def test_batch_size_and_workers_change_nothing(run: Run, photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "a", storage="float32", batch_size=1, workers=1)
    run(photos, tmp_path / "b", storage="float32", batch_size=5, workers=4)
    a, b = FeatureCache(tmp_path / "a").subset(), FeatureCache(tmp_path / "b").subset()
    assert a.paths == b.paths
    error = np.linalg.norm(a.X.astype(np.float64) - b.X, axis=1) / np.linalg.norm(a.X, axis=1)
    assert error.max() <= 1e-6


def test_an_unchanged_repetition_is_bit_equal(run: Run, photos: Path, reference: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "c", workers=3)
    assert contents(tmp_path / "c") == contents(reference)


def changed_model(file: Path, target: Path, change: Callable[[Any], None]) -> Backbone:
    model = onnx.load(file)
    change(model)
    target.write_bytes(model.SerializeToString())
    return Backbone(str(target))


def times(factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        (last,) = [node for node in model.graph.node if node.output[0] == "features"]
        last.output[0] = "unscaled"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
        model.graph.node.append(helper.make_node("Mul", ["unscaled", "factor"], ["features"]))

    return change


@pytest.mark.parametrize("factor", [1e6, 1e-7])
def test_features_beyond_float16_are_stored_as_float32(
    run: Run, photos: Path, backbone_file: Path, tmp_path: Path, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    net = changed_model(backbone_file, tmp_path / "m.onnx", times(factor))
    run(photos, tmp_path / "c", net=net)
    assert "do not fit float16 and are stored as float32" in caplog.text
    X = FeatureCache(tmp_path / "c").subset().X
    assert X.dtype == np.float32
    assert np.isfinite(X).all()
    assert (np.linalg.norm(X.astype(np.float64), axis=1) > 0).all()


def test_a_network_that_gives_nan_is_bad_data_with_counts(run: Run, photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    net = changed_model(backbone_file, tmp_path / "m.onnx", times(float("inf")))
    with pytest.raises(BadDataError, match=r"NaN or infinity for 4 of 4 images \(such as ants/000\.jpg\)"):
        run(photos, tmp_path / "c", net=net)
    with pytest.raises(InputMissingError, match="unfinished"):
        FeatureCache(tmp_path / "c")


# --- what is not computed again ----------------------------------------------------------------------------------------


def test_a_second_run_opens_no_image_and_writes_no_file(
    run: Run, mine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = mine
    run(data, cache)  # the copies have other inodes
    before = snapshot(cache)

    def forbidden(path: bytes) -> None:
        raise AssertionError(f"{path!r} was opened")

    monkeypatch.setattr(extractor.data.files, "read_file", forbidden)
    summary = run(data, cache)
    assert (summary.computed, summary.inference_calls, summary.ok) == (0, 0, 12)
    assert snapshot(cache) == before


def test_moving_renaming_and_relabelling_compute_nothing(run: Run, mine: tuple[Path, Path], reference: Path) -> None:
    data, cache = mine
    moved = data.rename(data.with_name("elsewhere"))
    (moved / "ants/000.jpg").rename(moved / "ants/renamed.jpg")
    (moved / "ants/001.jpg").rename(moved / "bees/was an ant.jpg")
    shards = [path.name for path in shard_paths(cache)]
    summary = run(moved, cache)
    assert (summary.computed, summary.inference_calls, summary.ok) == (0, 0, 12)
    assert [path.name for path in shard_paths(cache)] == shards
    found, old = contents(cache), contents(reference)
    assert found[b"ants/renamed.jpg"][2:] == old[b"ants/000.jpg"][2:]
    assert found[b"bees/was an ant.jpg"][0] == "bees"
    assert found[b"bees/was an ant.jpg"][2:] == old[b"ants/001.jpg"][2:]
    assert FeatureCache(cache).root == moved


def test_moving_the_folder_moves_no_sample_between_splits(run: Run, mine: tuple[Path, Path], reference: Path) -> None:
    data, cache = mine
    run(data.rename(data.with_name("elsewhere")), cache)
    assert contents(cache) == contents(reference)


def test_exactly_what_changed_is_computed(run: Run, mine: tuple[Path, Path], reference: Path, make_image: MakeImage) -> None:
    data, cache = mine
    make_image(data / "ants/new.jpg", 500)
    make_image(data / "bees/new.png", 501)
    for i, name in enumerate(("ants/000.jpg", "ants/003.jpg", "bees/005.jpg")):
        make_image(data / name, 600 + i)
    (data / "bees/000.jpg").unlink()
    summary = run(data, cache)
    assert (summary.computed, summary.inference_calls, summary.inputs, summary.ok) == (5, 2, 13, 13)
    found, old = contents(cache), contents(reference)
    same = set(old) - {b"ants/000.jpg", b"ants/003.jpg", b"bees/005.jpg", b"bees/000.jpg"}
    assert set(found) == same | {b"ants/000.jpg", b"ants/003.jpg", b"bees/005.jpg", b"ants/new.jpg", b"bees/new.png"}
    for path in same:
        assert found[path][2:] == old[path][2:]
    for path in (b"ants/000.jpg", b"ants/003.jpg", b"bees/005.jpg"):
        assert found[path][4] != old[path][4]


def test_a_change_that_keeps_size_time_and_inode_needs_verify_content(
    run: Run, mine: tuple[Path, Path], make_image: MakeImage
) -> None:
    data, cache = mine
    victim = data / "ants/000.jpg"
    run(data, cache)
    raw, stat = bytearray(victim.read_bytes()), victim.stat()
    make_image(data / "other.png", 900)
    raw[len(raw) // 2] ^= 1
    with victim.open("r+b") as file:
        file.write(raw)
    (data / "other.png").unlink()
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(data, cache).computed == 0
    assert run(data, cache, verify_content=True).computed == 1


def test_touching_files_computes_nothing(run: Run, mine: tuple[Path, Path]) -> None:
    data, cache = mine
    for file in data.rglob("*.jpg"):
        os.utime(file, (1, 1))
    assert run(data, cache).computed == 0


def test_duplicates_are_computed_once(run: Run, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    for i in range(5):
        shutil.copyfile(data / "ants/000.jpg", data / f"ants/copy {i}.jpg")
    summary = run(data, tmp_path / "c")
    assert (summary.inputs, summary.ok, summary.duplicates, summary.computed) == (17, 12, 5, 12)
    found = contents(tmp_path / "c")
    assert len({found[b"ants/copy %d.jpg" % i][1:] for i in range(5)} | {found[b"ants/000.jpg"][1:]}) == 1


def test_a_smaller_table_keeps_its_features_for_later(run: Run, mine: tuple[Path, Path], reference: Path) -> None:
    data, cache = mine
    summary = run(data, cache, limit=6, val_fraction=0.0)
    assert (summary.inputs, summary.computed) == (6, 0)
    assert len(contents(cache)) == 6
    assert run(data, cache).computed == 0
    assert contents(cache) == contents(reference)


# --- inputs that fail --------------------------------------------------------------------------------------------------


def spoil(data: Path, make_image: MakeImage) -> dict[str, str]:
    """Add files as real data sets have them; returns the codes of those that cannot be used."""
    whole = make_image(data / "ants/cut.jpg", 700, (300, 200)).read_bytes()
    (data / "ants/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "ants/text.jpg").write_text("this is text\n" * 20)
    (data / "bees/empty.jpg").write_bytes(b"")
    Image.new("CMYK", (70, 70), (9, 99, 0, 9)).save(data / "ants/cmyk.jpg")
    Image.new("RGBA", (70, 70), (9, 99, 0, 9)).save(data / "bees/alpha.PNG")
    return {"ants/cut.jpg": "truncated", "ants/text.jpg": "not_an_image", "bees/empty.jpg": "not_an_image"}


def test_bad_files_are_recorded_and_harm_no_other(
    run: Run, photos: Path, tmp_path: Path, reference: Path, make_image: MakeImage
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    expected = spoil(data, make_image)
    summary = run(data, tmp_path / "c")
    assert (summary.inputs, summary.ok, summary.failed, summary.computed) == (17, 14, 3, 14)
    assert summary.codes == {"truncated": 1, "not_an_image": 2}
    assert ledger(tmp_path / "c") == expected
    found, old = contents(tmp_path / "c"), contents(reference)
    assert set(found) == {*old, b"ants/cmyk.jpg", b"bees/alpha.PNG"}
    assert all(found[path][2:] == old[path][2:] for path in old)
    table = FeatureCache(tmp_path / "c").samples
    assert [row.split for row in table.rows if not row.ok] == [None] * 3
    assert table.counts == {"inputs": 17, "ok": 14, "duplicates": 0, "failed": 3}


def test_copies_of_a_bad_file_fail_like_it(run: Run, photos: Path, tmp_path: Path) -> None:
    """Only one of equal files is decoded; the others must not count as good for it."""
    data = shutil.copytree(photos, tmp_path / "data")
    for name in ("ants/a.jpg", "ants/b.jpg", "bees/c.jpg"):
        (data / name).write_bytes(b"<html>404</html>")
    summary = run(data, tmp_path / "c")
    assert (summary.inputs, summary.ok, summary.duplicates, summary.failed) == (15, 12, 0, 3)
    assert ledger(tmp_path / "c") == dict.fromkeys(("ants/a.jpg", "ants/b.jpg", "bees/c.jpg"), "not_an_image")
    assert len(contents(tmp_path / "c")) == 12
    shutil.copyfile(data / "ants/a.jpg", data / "bees/d.jpg")
    assert run(data, tmp_path / "c", max_failures="4").failed == 4


def test_a_whole_batch_of_bad_files_is_passed_over(run: Run, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    for i in range(10):
        (data / f"ants/_{i}.jpg").write_text(f"text {i}")
    summary = run(data, tmp_path / "c", max_failures="10")
    assert (summary.failed, summary.computed) == (10, 12)


def test_the_budget_is_kept(run: Run, photos: Path, tmp_path: Path, make_image: MakeImage) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    spoil(data, make_image)
    (data / "bees/more.jpg").write_bytes(b"")
    with pytest.raises(
        BudgetExceededError, match=r"4 of 18 inputs failed \(.*not_an_image \d.*\) and --max-failures 1% allows 3; see .*ledger"
    ) as error:
        run(data, tmp_path / "c")
    assert error.value.exit_code == 65
    assert len(ledger(tmp_path / "c")) == 4
    assert len(contents(tmp_path / "c")) == 14  # what succeeded is kept
    assert FeatureCache(tmp_path / "c").samples.facts["budget_exceeded"] is True
    with pytest.raises(BudgetExceededError):
        run(data, tmp_path / "c", max_failures="2")
    summary = run(data, tmp_path / "c", max_failures="25%")
    assert (summary.computed, summary.failed) == (0, 4)
    assert FeatureCache(tmp_path / "c").samples.facts["budget_exceeded"] is False


@pytest.mark.parametrize(
    ("text", "inputs", "allowed"), [("1%", 12, 3), ("1%", 1000, 10), ("0", 1000, 0), ("7", 5, 7), ("2.5%", 1000, 25)]
)
def test_budgets_are_numbers_or_shares(text: str, inputs: int, allowed: int) -> None:
    assert Options(max_failures=text).budget(inputs) == allowed


@pytest.mark.parametrize("text", ["", "few", "%", "1.5"])
def test_other_budgets_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="max_failures is"):
        Options(max_failures=text).budget(10)


def test_recorded_failures_are_skipped_until_they_are_retried_or_repaired(
    run: Run, photos: Path, tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    expected = spoil(data, make_image)
    run(data, tmp_path / "c")
    opened: list[str] = []
    real = extractor.data.files.read_file

    def record(path: bytes) -> Any:
        opened.append(os.fsdecode(path).removeprefix(f"{data}/"))
        return real(path)

    monkeypatch.setattr(extractor.data.files, "read_file", record)
    summary = run(data, tmp_path / "c")
    assert (summary.failed, summary.computed, opened) == (3, 0, [])
    summary = run(data, tmp_path / "c", retry_failed=True)
    assert (summary.failed, summary.computed, sorted(opened)) == (3, 0, sorted(expected))
    make_image(data / "ants/cut.jpg", 701)
    opened.clear()
    summary = run(data, tmp_path / "c")
    assert (summary.failed, summary.computed, opened) == (2, 1, ["ants/cut.jpg"])
    assert "ants/cut.jpg" not in ledger(tmp_path / "c")


def test_failing_fast_names_the_first_bad_file(run: Run, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "ants/_bad.jpg").write_bytes(b"")
    with pytest.raises(BudgetExceededError, match=r"ants/_bad\.jpg: not_an_image: the file is empty"):
        run(data, tmp_path / "c", on_error="fail")
    with pytest.raises(InputMissingError, match="unfinished"):
        FeatureCache(tmp_path / "c")


def test_files_of_a_manifest_that_are_not_there_are_recorded(run: Run, photos: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(photos)) for path in sorted(photos.rglob("*.jpg"))]
    lines = ["path,label", *(f"{name},{name[:4]}" for name in names), "ants/gone.jpg,ants", "ants,ants"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = Manifest(tmp_path / "list.csv", photos)
    summary = run(source, tmp_path / "c")
    assert (summary.ok, summary.codes) == (12, {"not_found": 1, "unreadable": 1})
    assert ledger(tmp_path / "c") == {"ants/gone.jpg": "not_found", "ants": "unreadable"}
    assert run(source, tmp_path / "c").computed == 0


def test_names_that_are_not_utf8_go_all_the_way(run: Run, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    base = os.fsencode(data)
    os.rename(base + b"/ants/000.jpg", base + b"/ants/\xff\nx.jpg")  # noqa: PTH104 - a Path cannot hold every name
    with open(base + b"/bees/\xfe\x1b[31m.jpg", "wb"):  # noqa: PTH123
        pass
    run(data, tmp_path / "c")
    assert b"ants/\xff\nx.jpg" in contents(tmp_path / "c")
    assert ledger(tmp_path / "c") == {"bees/\\xfe\\x1b[31m.jpg": "not_an_image"}
    assert run(data, tmp_path / "c").computed == 0


# --- splits ------------------------------------------------------------------------------------------------------------


def splits(cache: Path) -> dict[bytes, str]:
    return {path: row[1] for path, row in contents(cache).items()}


def test_splits_are_stored_and_follow_the_options(run: Run, mine: tuple[Path, Path], reference: Path) -> None:
    data, cache = mine
    opened = FeatureCache(reference)
    assert opened.samples.facts["split"] == {"rule": "hash-rank", "val": 0.2, "test": 0.2, "seed": 0, "version": 2}
    assert [len(opened.subset(name)) for name in ("train", "val", "test")] == [8, 2, 2]
    assert run(data, cache, seed=1).computed == 0
    assert splits(cache) != splits(reference)
    run(data, cache, val_fraction=0.0)
    assert FeatureCache(cache).samples.splits() == ["train", "test"]


def test_a_split_that_changes_is_said_with_both_rules(
    run: Run, mine: tuple[Path, Path], reference: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, cache = mine
    run(data, cache)
    assert "the split was" not in caplog.text
    run(data, cache, seed=1, test_fraction=0.3)
    before, after = splits(reference), splits(cache)
    moved = sum(before[path] != after[path] for path in before)
    assert moved > 0
    assert (
        "the split was by hash rank (val 0.2, test 0.2, seed 0, version 2), "
        f"it is by hash rank (val 0.2, test 0.3, seed 1, version 2) now: {moved} samples changed split" in caplog.text
    )


def test_a_cache_keeps_the_version_of_the_rule_that_it_was_split_by(
    run: Run, mine: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, cache = mine
    run(data, cache)
    table = FeatureCache(cache).samples
    first = {"rule": "hash-rank", "val": 0.2, "test": 0.2, "seed": 0}  # as it was recorded then
    names = assign_splits(table.rows, val=0.2, test=0.2, seed=0, version=1)
    rows = with_splits(table.rows, names)
    (cache / "samples.h5").write_bytes(replace(table, rows=rows, facts={**table.facts, "split": first}).to_bytes())
    expected = splits(cache)
    assert Counter(expected.values()) == {"train": 4, "val": 4, "test": 4}
    run(data, cache)
    assert (splits(cache), FeatureCache(cache).samples.facts["split"]) == (expected, first)
    assert Counter(map(len, FeatureCache(cache).split(test=0.2))) == {4: 1, 8: 1}
    assert "the split is 4 train, 4 test, 4 val: the cache was split by an earlier rule" in caplog.text
    caplog.clear()
    assert run(data, cache, resplit=True).changes["split"] == 6
    assert "seed 0), it is by hash rank (val 0.2, test 0.2, seed 0, version 2) now: 6 samples changed split" in caplog.text
    assert "the split is" not in caplog.text


def test_a_class_that_is_only_held_out_is_said_when_it_is_extracted(
    run: Run, dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(dataset(tmp_path / "data", {"train/ants": 3, "train/bees": 2, "val/ants": 1, "val/wasps": 2}), tmp_path / "c")
    assert "class 'wasps' is in 'val' (2) and not in 'train': `penult train` will refuse that" in caplog.text


def test_splits_of_the_source_win(run: Run, dataset: MakeDataset, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", {"train/ants": 3, "train/bees": 2, "valid/ants": 1, "valid/bees": 1})
    run(data, tmp_path / "c")
    cache = FeatureCache(tmp_path / "c")
    assert cache.samples.facts["split"] == {"rule": "source"}
    assert [(len(cache.subset(name)), sorted(set(cache.subset(name).y))) for name in ("train", "val")] == [
        (5, ["ants", "bees"]),
        (2, ["ants", "bees"]),
    ]


def test_unlabelled_pictures_have_features_but_no_split(run: Run, dataset: MakeDataset, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", {".": 5})
    assert run(data, tmp_path / "c").computed == 5
    cache = FeatureCache(tmp_path / "c")
    assert cache.samples.splits() == []
    with pytest.raises(BadDataError, match="5 of 5 samples have no label"):
        cache.subset()


def test_groups_of_a_manifest_are_not_divided(run: Run, dataset: MakeDataset, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", {"ants": 20, "bees": 20})
    lines = [f"{label}/{i:03d}.jpg,{label},{label[0]}{i % 5}" for label in ("ants", "bees") for i in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,patient", *lines]))
    run(Manifest(tmp_path / "list.csv", data, group_by="patient"), tmp_path / "c")
    of_group: dict[bytes, set[str | None]] = {}
    for row in FeatureCache(tmp_path / "c").samples.rows:
        of_group.setdefault(row.group, set()).add(row.split)
    assert len(of_group) == 10
    assert all(len(found) == 1 for found in of_group.values())
    assert set().union(*of_group.values()) == {"train", "val", "test"}


def test_a_survey_is_the_table_of_a_run_without_its_features(
    run: Run, photos: Path, tmp_path: Path, make_image: MakeImage
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    spoil(data, make_image)
    shutil.copyfile(data / "ants/text.jpg", data / "bees/text too.jpg")
    run(data, tmp_path / "c", max_failures="4")
    cache = FeatureCache(tmp_path / "c")
    table = extractor.pipeline.run.survey(
        ImageFolder(data), read_facts(cache.path / "backbone.onnx").preprocess, Options(workers=2)
    )
    assert list(table.rows) == list(cache.samples.rows)


def test_a_class_too_small_is_refused_before_anything_is_made(run: Run, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "wasps").mkdir()
    shutil.copyfile(data / "ants/000.jpg", data / "wasps/one.jpg")
    with pytest.raises(BadDataError, match="class 'wasps' has 1 distinct"):
        run(data, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# --- killed, interrupted, full -----------------------------------------------------------------------------------------

CHILD = """
import json, logging, os, signal, sys, threading
request = json.load(sys.stdin)
sys.path.insert(0, request["repo"])
from pathlib import Path
import store.writer
from extractor.backbones.registry import Backbone
from extractor.pipeline.settings import Options
from extractor.pipeline.run import run_extract
from extractor.data.folders import ImageFolder
from store.errors import PenultError

store.writer.SHARD_BYTES = 1
renames = 0
stopping = threading.Event()  # the first signal was noticed: two at once would be one, and shards are written in a thread
logging.getLogger("penult.extractor").addFilter(lambda record: stopping.set() or True)

def at_rename(event, args):  # a commit becomes visible by its rename, and this is called just before it
    global renames
    if event == "os.rename":
        renames += 1
        for number in request["signals"] if renames == request["at"] else []:
            os.kill(os.getpid(), number)
            stopping.wait(30)

sys.addaudithook(at_rename)
options = Options(device="cpu", batch_size=request["batch"], workers=2, quiet=True)
try:
    run_extract(ImageFolder(Path(request["data"])), Backbone(request["net"]), Path(request["cache"]), options)
except PenultError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
print(renames)
"""


def in_child(data: Path, cache: Path, net: Backbone, at: int = 0, signals: tuple[int, ...] = (), batch: int = SIZE) -> Any:
    where = {"repo": str(REPO), "data": str(data), "cache": str(cache), "net": net.name}
    request = {**where, "at": at, "signals": signals, "batch": batch}
    return subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(request), capture_output=True, text=True, check=False)


# backbone.onnx under three names, the last its own, cache.json, three shards, ledger.jsonl, samples.h5
COMMITS = 9


def test_the_number_of_commits_is_what_the_kill_points_assume(
    photos: Path, tmp_path: Path, backbone: Backbone, reference: Path
) -> None:
    done = in_child(photos, tmp_path / "c", backbone)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == COMMITS
    assert contents(tmp_path / "c") == contents(reference)


@pytest.mark.parametrize("at", range(1, COMMITS + 1))
def test_a_killed_run_continues_to_the_same_cache(
    run: Run, photos: Path, tmp_path: Path, backbone: Backbone, reference: Path, at: int
) -> None:
    done = in_child(photos, tmp_path / "c", backbone, at, (signal.SIGKILL,))
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(InputMissingError, match="unfinished"):
        FeatureCache(tmp_path / "c")
    assert len([*(tmp_path / "c").glob(".*.tmp"), *(tmp_path / "c/shards").glob(".*.tmp")]) == 1
    committed = min(max(at - 5, 0), 3)
    assert len(shard_paths(tmp_path / "c")) == committed
    summary = run(photos, tmp_path / "c")
    assert summary.computed == 12 - SIZE * committed
    assert contents(tmp_path / "c") == contents(reference)
    assert list((tmp_path / "c").rglob(".*.tmp")) == []
    table, uninterrupted = FeatureCache(tmp_path / "c").samples, FeatureCache(reference).samples
    assert list(table.rows) == list(uninterrupted.rows)
    differ = {key for key in table.facts if table.facts[key] != uninterrupted.facts[key]}
    assert differ <= {"extract_seconds", "extract_cost"}


def test_a_killed_update_leaves_the_old_state_readable(
    run: Run, mine: tuple[Path, Path], backbone: Backbone, reference: Path, make_image: MakeImage
) -> None:
    data, cache = mine
    run(data, cache)
    for i in range(6):
        make_image(data / f"bees/new{i}.jpg", 800 + i)
    done = in_child(data, cache, backbone, 2, (signal.SIGKILL,))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(cache) == contents(reference)
    assert run(data, cache).computed == 2
    assert len(contents(cache)) == 18


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_in_good_order(
    run: Run, photos: Path, tmp_path: Path, backbone: Backbone, reference: Path, number: int, code: int
) -> None:
    done = in_child(photos, tmp_path / "c", backbone, 5, (number,), batch=1)
    assert done.returncode == code, done.stderr
    assert f"InterruptedRunError: interrupted by signal {int(number)}; run the same command again" in done.stderr
    kept = len(shard_paths(tmp_path / "c"))
    assert 1 <= kept < 12, "what is on its way is committed, and nothing else is begun"
    assert list((tmp_path / "c").rglob(".*.tmp")) == []
    with pytest.raises(InputMissingError, match="unfinished"):
        FeatureCache(tmp_path / "c")
    assert run(photos, tmp_path / "c").computed == 12 - kept
    assert contents(tmp_path / "c") == contents(reference)


def test_a_second_signal_leaves_at_once_and_safely(
    run: Run, photos: Path, tmp_path: Path, backbone: Backbone, reference: Path
) -> None:
    done = in_child(photos, tmp_path / "c", backbone, 5, (signal.SIGTERM, signal.SIGTERM))
    assert done.returncode == 143
    assert "InterruptedRunError" not in done.stderr
    run(photos, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(reference)


def test_handlers_are_put_back(run: Run, mine: tuple[Path, Path]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(*mine)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_disk_that_fills_up_in_a_run_loses_only_what_was_not_committed(
    run: Run, photos: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        if "shards/.00001-" in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115 - a magic link
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            run(photos, tmp_path / "c")
    assert caught.value.exit_code == 74
    assert [path.name[:5] for path in (tmp_path / "c/shards").iterdir()] == ["00000"]
    assert run(photos, tmp_path / "c").computed == 8
    assert contents(tmp_path / "c") == contents(reference)


def test_a_disk_too_small_is_said_before_the_first_batch(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12 * 512 * 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="the disk has"):
        run(photos, tmp_path / "c")
    assert shard_paths(tmp_path / "c") == []


# --- other networks, damaged caches ------------------------------------------------------------------------------------


def nudge(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))


def other_crop(model: Any) -> None:
    for entry in model.metadata_props:
        if entry.key == "penult.preprocess":
            entry.value = json.dumps({**json.loads(entry.value), "resize": 80})


@pytest.mark.parametrize(("change", "field"), [(nudge, "weights: "), (other_crop, "pixels.resize: 72 against 80")])
def test_another_network_is_refused_and_the_cache_stays(
    run: Run, mine: tuple[Path, Path], backbone_file: Path, tmp_path: Path, change: Callable[[Any], None], field: str
) -> None:
    data, cache = mine
    run(data, cache)
    before = snapshot(cache)
    with pytest.raises(FingerprintMismatchError, match=field) as caught:
        run(data, cache, net=changed_model(backbone_file, tmp_path / "m.onnx", change))
    assert caught.value.exit_code == 65
    assert str(cache) in str(caught.value)
    assert snapshot(cache) == before
    assert run(data, cache).computed == 0


def test_other_storage_is_refused(run: Run, mine: tuple[Path, Path]) -> None:
    with pytest.raises(FingerprintMismatchError, match="storage: auto against float32"):
        run(*mine, storage="float32")


def test_the_same_network_from_another_place_is_the_same(
    run: Run, mine: tuple[Path, Path], backbone_file: Path, tmp_path: Path
) -> None:
    data, cache = mine
    copy = shutil.copyfile(backbone_file, tmp_path / "copy.onnx")
    assert run(data, cache, net=Backbone(str(copy))).computed == 0


def test_overwriting_starts_anew(run: Run, mine: tuple[Path, Path], backbone_file: Path, tmp_path: Path) -> None:
    data, cache = mine
    before = contents(cache)
    net = changed_model(backbone_file, tmp_path / "m.onnx", nudge)
    assert run(data, cache, net=net, overwrite=True).computed == 12
    after = contents(cache)
    assert set(after) == set(before)
    assert all(after[path][4] != before[path][4] for path in before)
    assert len(shard_paths(cache)) == 3


def test_overwriting_never_empties_a_foreign_folder(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/shards").mkdir(parents=True)
    (tmp_path / "mine/shards/train-000.tar").write_text("a web dataset")
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name in ("mine", "folder"):
        with pytest.raises(OutputExistsError, match="is not a penult cache"):
            run(photos, tmp_path / name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def damage(path: Path, kind: str) -> None:
    raw = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "zero":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(raw[: len(raw) * 2 // 3])
    else:
        raw[1] ^= 0x20
        path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["missing", "zero", "truncated", "flipped header"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_damaged_shard_is_done_again_and_only_that(
    run: Run, mine: tuple[Path, Path], reference: Path, kind: str, which: int
) -> None:
    data, cache = mine
    run(data, cache)
    damage(shard_paths(cache)[which], kind)
    with pytest.raises(BadDataError):
        contents(cache)
    summary = run(data, cache)
    assert (summary.computed, summary.inference_calls) == (SIZE, 1)
    assert contents(cache) == contents(reference)


@pytest.mark.parametrize("name", ["cache.json", "samples.h5", "ledger.jsonl", "backbone.onnx"])
@pytest.mark.parametrize("kind", ["missing", "zero"])
def test_every_other_file_is_made_again_without_computing(
    run: Run, mine: tuple[Path, Path], reference: Path, name: str, kind: str
) -> None:
    data, cache = mine
    run(data, cache)
    before = {path.name for path in cache.iterdir()}
    damage(cache / name, kind)
    if kind == "zero" and name == "ledger.jsonl":
        return  # an empty ledger is a right one here
    assert run(data, cache).computed == 0
    assert {path.name for path in cache.iterdir()} == before
    assert contents(cache) == contents(reference)
    if name in ("cache.json", "backbone.onnx"):
        found, old = ((folder / name).read_bytes() for folder in (cache, reference))
        assert found == old


def test_a_limit_takes_some_of_every_class_and_says_what_it_hides(
    run: Run, mine: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, cache = mine
    assert run(data, cache).inputs == 12
    assert run(data, cache, limit=8).inputs == 8
    assert FeatureCache(cache).samples.classes == ["ants", "bees"]
    assert "--limit leaves 8 of the 12 samples" in caplog.text
    again = run(data, cache)
    assert (again.inputs, again.computed) == (12, 0)


def test_groups_that_vanish_are_refused_and_a_change_of_groups_is_said(
    photos: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the images of a patient would stand on both sides of the split, without a word."""
    by_patient, quiet = r"(\d)\.jpg$", Options(quiet=True)
    cache = tmp_path / "c"
    run_extract(ImageFolder(photos, group_by=by_patient), backbone, cache, quiet)
    splits: dict[bytes, set[str | None]] = {}
    for row in FeatureCache(cache).rows():
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(each) == 1 for each in splits.values())
    before = sorted((path.name, path.read_bytes()) for path in cache.iterdir() if path.is_file())
    with pytest.raises(BadDataError, match=r"in the last run \d+ groups of samples each stayed in one split"):
        run_extract(ImageFolder(photos), backbone, cache, quiet)
    with pytest.raises(BadDataError, match="--resplit to do without groups"):
        preview(ImageFolder(photos), backbone, cache, quiet)
    assert sorted((path.name, path.read_bytes()) for path in cache.iterdir() if path.is_file()) == before
    summary = run_extract(ImageFolder(photos), backbone, cache, quiet.replace(resplit=True))
    assert summary.computed == 0
    assert re.search(r"the groups changed, and \d+ of \d+ samples changed split with them", "\n".join(summary.warnings))
    with pytest.raises(UsageError, match=r"gives .* no group"):
        ImageFolder(photos, group_by=r"(zebra)?\.jpg").samples()
