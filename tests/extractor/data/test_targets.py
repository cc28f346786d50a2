"""Several labels and numbers for an image, from the manifest to the cache; and DATA that is no data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import classifiers
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.heads.registry import make_head
from classifiers.jobs.history import read_runs
from classifiers.jobs.run import run_job
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.sources import open_source
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.compact import write_compact
from store.errors import BadDataError, CorruptCacheError, InputMissingError, UsageError
from store.format.samples import Row, SampleTable
from store.tasks import MISSING

Penult = Callable[..., tuple[int, str, str]]


@pytest.fixture
def listed(dataset: Callable[..., Path], tmp_path: Path) -> Path:
    """``list.csv`` with labels and numbers for 16 images."""
    folder = dataset(tmp_path / "photos", {"ants": 16})
    rows = [f"ants/{i:03d}.jpg,{('sea', 'sky', 'sky|sea')[i % 3]},{i / 2 if i % 5 else ''},{i * i}\n" for i in range(16)]
    (folder / "list.csv").write_text("path,label,weight,age\n" + "".join(rows))
    return folder / "list.csv"


def test_numbers_are_kept_with_the_samples(listed: Path, backbone: Backbone, tmp_path: Path) -> None:
    source = open_source(listed, task="regression", targets=["weight", "age"])
    run_extract(source, backbone, tmp_path / "c", Options(quiet=True))
    cache = FeatureCache(tmp_path / "c")
    assert (cache.samples.task.name, list(cache.samples.target_names)) == ("regression", ["weight", "age"])
    assert [row.targets for row in cache.rows()] == [(i / 2 if i % 5 else MISSING, float(i * i)) for i in range(16)]
    assert cache.describe()["targets"] == {
        "weight": {"given": 12, "min": 0.5, "max": 7.0},
        "age": {"given": 16, "min": 0.0, "max": 225.0},
    }
    assert sorted(row.split or "" for row in cache.rows()) == ["test"] * 3 + ["train"] * 10 + ["val"] * 3
    with h5py.File(tmp_path / "c/samples.h5") as file:
        assert file["targets"].dtype == np.float64
        assert file["targets"].shape == (16, 2)
        assert np.isnan(file["targets"][:, 0]).sum() == 4
    before = (tmp_path / "c/samples.h5").read_bytes()
    assert run_extract(source, backbone, tmp_path / "c", Options(quiet=True)).computed == 0
    assert (tmp_path / "c/samples.h5").read_bytes() == before
    listed.write_text(listed.read_text().replace(",225", ",226"))
    assert run_extract(source, backbone, tmp_path / "c", Options(quiet=True)).computed == 0
    assert FeatureCache(tmp_path / "c").rows()[15].targets == (MISSING, 226.0)
    write_compact(FeatureCache(tmp_path / "c"), tmp_path / "c.h5")
    compact = FeatureCache(tmp_path / "c.h5")
    assert (compact.samples.rows, compact.samples.target_names) == (
        FeatureCache(tmp_path / "c").samples.rows,
        ["weight", "age"],
    )


def test_targets_need_no_label(listed: Path, backbone: Backbone, tmp_path: Path) -> None:
    listed.write_text("path,age\n" + "".join(f"ants/{i:03d}.jpg,{i}\n" for i in range(16)))
    run_extract(open_source(listed, task="regression", targets=["age"]), backbone, tmp_path / "c", Options(quiet=True))
    assert FeatureCache(tmp_path / "c").samples.splits() == ["train", "val", "test"]


def test_each_of_several_labels_is_counted(listed: Path, backbone: Backbone, tmp_path: Path) -> None:
    run_extract(open_source(listed, task="multi-label"), backbone, tmp_path / "c", Options(quiet=True))
    cache = FeatureCache(tmp_path / "c")
    assert cache.rows()[2].label == "sky|sea"
    facts = cache.describe()
    assert facts["task"] == "multi-label"
    assert {label: sum(per.values()) for label, per in facts["labels"].items()} == {"sea": 11, "sky": 10}
    assert cache.samples.classes == ["sea", "sky"]
    assert len(cache.rows("test")) == 3  # 'sky|sea' is no class that would have to be in every split
    assert cache.samples.target_names == []


def test_another_task_for_the_same_cache_is_said(
    listed: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rerun without the flag would make a class of every combination of labels."""
    quiet = Options(quiet=True, val_fraction=0.0, test_fraction=0.2)
    run_extract(open_source(listed, task="multi-label"), backbone, tmp_path / "c", quiet)
    assert "recorded with --task" not in caplog.text
    run_extract(open_source(listed), backbone, tmp_path / "c", quiet)
    assert "the samples were recorded with --task multi-label, they are single-label now" in caplog.text


def test_too_few_samples_for_the_splits_are_said_before_anything_is_computed(listed: Path, backbone: Backbone) -> None:
    listed.write_text("path,age\nants/000.jpg,1\nants/001.jpg,2\n")
    with pytest.raises(BadDataError, match=r"'\(all samples\)' has 2 distinct sample"):
        run_extract(open_source(listed, task="regression", targets=["age"]), backbone, listed.parent / "c", Options())
    assert not (listed.parent / "c").exists()


def test_a_head_is_for_one_task(listed: Path, backbone: Backbone, dataset: Callable[..., Path], tmp_path: Path) -> None:
    run_extract(open_source(listed, task="multi-label"), backbone, tmp_path / "c", Options(quiet=True))
    with pytest.raises(UsageError, match="LogisticHead is a head for single-label, and these samples were"):
        classifiers.train(FeatureCache(tmp_path / "c"), tmp_path / "h", make_head("logistic"))
    run_extract(ImageFolder(dataset(tmp_path / "p")), backbone, tmp_path / "d", Options(quiet=True))
    bundle = classifiers.train(FeatureCache(tmp_path / "d"), tmp_path / "h", make_head("logistic"))
    with pytest.raises(BadDataError, match="extracted with --task multi-label, and h is a head for single-label"):
        evaluate_bundle(bundle, tmp_path / "c")


def test_a_table_without_targets_is_written_as_before(tmp_path: Path) -> None:
    rows = [Row(b"a", "x", sha256=bytes(31) + b"1")]
    assert not {"targets", "target-names"} & set(SampleTable(rows).datasets())
    (tmp_path / "s").write_bytes(SampleTable(rows, {"root": ""}).to_bytes())
    assert SampleTable.read(tmp_path / "s") == SampleTable(rows, {"root": ""}, [])


def test_targets_that_do_not_fit_their_names_are_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = SampleTable([Row(b"a", "x", targets=(1.0,))], {"root": ""}, ["w"])
    good = table.datasets()
    for changed in (good["targets"].astype(np.float32), np.zeros((1, 2)), np.zeros((2, 1)), np.zeros(1)):
        monkeypatch.setattr(SampleTable, "datasets", lambda _, changed=changed: {**good, "targets": changed})
        (tmp_path / "s").write_bytes(table.to_bytes())
        with pytest.raises(CorruptCacheError, match=r"targets .* do not fit 1 rows and 1 names"):
            SampleTable.read(tmp_path / "s")


def test_the_command_line_takes_a_task(listed: Path, backbone_file: Path, tmp_path: Path, penult: Penult) -> None:
    cache = tmp_path / "c"
    code, _, err = penult("extract", listed, "-m", backbone_file, "-o", cache, "--task", "regression", "--target", "age")
    assert code == 0, err
    assert "target age: 16 given, 0.0 to 225.0" in penult("info", cache)[1]
    code, out, err = penult("train", cache, "-o", tmp_path / "h")
    assert (code, "ridge head, 1 targets" in out) == (0, True), err
    code, _, err = penult("train", cache, "--head", "logistic", "-o", tmp_path / "l")
    assert (code, err) == (2, "error: --head logistic: expected ridge for regression\n")
    code, _, err = penult("extract", listed, "-m", backbone_file, "-o", tmp_path / "d", "--target", "age")
    assert (code, err) == (2, "error: --target age: numeric targets are for --task regression, this is single-label\n")


# --- what is no data, and what moved -----------------------------------------------------------------------------------


def test_caches_and_bundles_are_no_images(
    dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path, penult: Penult
) -> None:
    run_extract(ImageFolder(dataset(tmp_path / "p")), backbone, tmp_path / "c", Options(quiet=True))
    bundle = classifiers.train(FeatureCache(tmp_path / "c"), tmp_path / "h", make_head("logistic"))
    write_compact(FeatureCache(tmp_path / "c"), tmp_path / "c.h5")
    for path, kind in (("c", "a cache of features"), ("c.h5", "a cache of features"), ("h", "a bundle")):
        with pytest.raises(UsageError, match=rf"/{path} is {kind}, not images; expected a folder"):
            open_source(tmp_path / path)
    (tmp_path / "c/samples.h5").unlink()  # as a killed run leaves it
    with pytest.raises(UsageError, match="a cache of features"):
        open_source(tmp_path / "c")
    with pytest.raises(UsageError, match="a bundle, not images"):
        evaluate_bundle(bundle, bundle.path)
    code, out, err = penult("predict", bundle.path, tmp_path / "c")
    assert (code, out) == (2, "")
    assert "is a cache of features, not images" in err
    code, _, err = penult("train", bundle.path, "-o", tmp_path / "x")
    assert (code, "is not a penult cache" in err) == (66, True)


def test_evaluate_says_root_where_images_moved(dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path) -> None:
    photos = dataset(tmp_path / "p")
    run_extract(ImageFolder(photos), backbone, tmp_path / "c", Options(quiet=True))
    run_extract(ImageFolder(photos), backbone, tmp_path / "other", Options(quiet=True, storage="float32"))
    bundle = classifiers.train(FeatureCache(tmp_path / "c"), tmp_path / "h", make_head("logistic"))
    photos.rename(tmp_path / "moved")
    with pytest.raises(InputMissingError, match=r"cannot read ants/\d+\.jpg: no such file; .* --root says where they are"):
        evaluate_bundle(bundle, tmp_path / "other")
    assert evaluate_bundle(bundle, tmp_path / "other", root=tmp_path / "moved")[0].n == 2


def test_a_job_names_its_data_as_the_command_line_does(
    make_image: Callable[..., Path], backbone_file: Path, tmp_path: Path
) -> None:
    for i in range(20):
        make_image(tmp_path / "data/eurosat/2750" / ("Forest" if i % 2 else "River") / f"{i}.jpg", seed=i)
    keys = {"data": "torchvision:EuroSAT@data", "cache": "c", "bundle": "h"}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    (tmp_path / "job.toml").write_text(f"{text}[backbone]\nname = {json.dumps(str(backbone_file))}\n")
    assert run_job(tmp_path / "job.toml", quiet=True).extract.ok == 20
    assert read_runs(tmp_path / "job.toml")[0]["exit_code"] in (0, 65)
