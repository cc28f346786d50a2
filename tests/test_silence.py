"""No command is silent for more than 40 s where nobody sees a bar, whatever part of its work takes long.

Fine-tuning, int8 and downloads are looked at where they are tested.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import classifiers
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options

LONGEST = 40.0  # seconds
Penult = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path], backbone_file: Path) -> Path:
    """Photos, a cache of them in three shards, two bundles, a compact file, a job."""
    folder = tmp_path_factory.mktemp("silence")
    photos = dataset(folder / "photos", {"train/ants": 20, "train/bees": 20, "val/ants": 12, "val/bees": 12})
    dataset(folder / "fewer", {"train/ants": 20, "train/bees": 20, "val/ants": 12, "val/bees": 11})
    shutil.copy(backbone_file, folder / "net.onnx")
    backbone = Backbone(str(folder / "net.onnx"))
    for count in (24, 48, None):
        run_extract(ImageFolder(photos), backbone, folder / "photos.cache", Options(limit=count, quiet=True))
    for head in ("ridge", "centroid"):
        classifiers.train(folder / "photos.cache", folder / f"{head}.head", head)
    (folder / "job.toml").write_text(
        'data = "photos"\ncache = "job.cache"\nbundle = "job.head"\n[backbone]\nname = "net.onnx"\n[train]\nhead = "ridge"\n'
    )
    return folder


EMBED, READ = "extractor.runtime.session:Embedder.embed", "extractor.data.files:FolderFiles.read"
SHARD, SAVE = "store.format.shard:read_shard", "store.format.atomic:commit"
CASES: dict[str, tuple[str, dict[str, float], tuple[str, ...]]] = {  # a command, what takes how long, and what is said of it
    "extract": (
        "extract photos -m net.onnx -o new.cache",
        {
            "extractor.data.folders:ImageFolder.samples": 100,
            "extractor.pipeline.prepare:obtain": 100,
            "extractor.pipeline.run:open_embedder": 100,
            EMBED: 25,
            "store.format.shard:write_shard": 100,
            SAVE: 100,
        },
        (
            "still listing the images, 1 min 30 s",
            "still preparing net.onnx, 1 min ",
            "still starting the session, 1 min ",
            r"extracting: \d+ of 64 images, .* left",
            "still writing the sample table, 1 min ",
        ),
    ),
    "an unchanged extract": (
        "extract photos -m net.onnx -o photos.cache",
        {
            "store.format.shard:read_shard": 50,
            "store.format.samples:SampleTable.read": 100,
            "store.format.integrity:raise_answered": 50,
            "extractor.data.files:FolderFiles.stat": 10,
        },
        (
            r"verifying: 1 of 3 files",
            r"opening the shards: 1 of 3 shards",
            "still reading the sample table, 1 min ",
            r"looking for changed files: \d+ of 64 files, 6.0 a minute, \d+ min left",
        ),
    ),
    "sweep": (
        "sweep photos -m net.onnx,other.onnx -o new.sweep --head ridge",
        {EMBED: 25, "classifiers.heads.ridge:Spectrum": 100, "classifiers.comparison.sweep:transferability": 100},
        (r"2 of 2: other.onnx: extracting: \d+ of 64 images", "2 of 2: other.onnx: still fitting the ridge head"),
    ),
    "predict": ("predict ridge.head photos", {EMBED: 25}, (r"predicting: \d+ of 64 images, .* left",)),
    "verify": ("verify photos.cache", {"store.format.integrity:raise_answered": 50}, (r"verifying: 2 of 4 files",)),
    "compact": (
        "compact photos.cache -o new.h5",
        {SAVE: 100, "store.format.shard:read_rows": 100},
        ("still writing the compact file, 6 min", r"reading features: \d+ of 64 rows, .* left"),
    ),
    "prune": (
        "compact fewer.cache --prune",
        {"store.format.shard:require_sound": 100, "store.format.shard:write_shard": 100},
        ("removing unused features: . of 3 shards",),
    ),
    "train": (
        "train photos.cache --head logistic --few-shot 2 --repeats 2 -o new.head",
        {
            "classifiers.near_copies:nearest": 100,
            "classifiers.near_copies:_units": 100,
            "classifiers.heads.logistic:LogisticHead._path_of_fold": 100,
            "classifiers.heads.logistic:_Problem.fit": 100,
            "classifiers.bundles.novelty:_rows": 100,
            "classifiers.reports.feature_map:principal_axes": 100,
            "classifiers.training.train:bundle_report": 100,
            SAVE: 100,
        },
        (
            "searching for near copies: 0 of 64 images, 1 min 30 s",
            "still looking for near copies, 3 min",
            "2 of 2: learning curve: choosing C of the logistic head: 1 of 2 folds",
            r"choosing C of the logistic head: 3 of 5 folds, 36 an hour, 3 min left",
            "still fitting the logistic head, 10 min",
            "still measuring how unlike images are",
            "still making the map of features, 1 min",
            "still saving the bundle and its report, 3 min",
        ),
    ),
    "evaluate": ("evaluate ridge.head fewer", {EMBED: 25, READ: 5}, (r"reading images: \d+ of 63", r"predicting: \d+ of 23")),
    "compare": (
        "compare ridge.head centroid.head --curve photos.cache",
        {"classifiers.comparison.compare:_need_same_images": 100, "classifiers.heads.ridge:RidgeHead.fit": 50},
        ("still comparing the bundles, 1 min", r"measuring the learning curve: \d+ of 16 fits, 1.2 a minute, \d+ min left"),
    ),
    "diff": ("diff photos.cache fewer.cache", {"store.drift:_distances": 300}, ("still comparing the caches, 4 min",)),
    "check": (
        "check photos.cache --against golden.h5 --update",
        {"store.drift:_distances": 100, "store.compact:hdf5.build": 100},
        ("still comparing the caches, 1 min", "still writing the compact file, 1 min"),
    ),
    "fuse": (
        "fuse ridge.head -o new.onnx",
        {"extractor.graphs.onnx_file:save": 300},
        ("still making one file of the bundle, 4",),
    ),
    "export": ("export net.onnx -o new.onnx", {"extractor.backbones.export:obtain": 300}, ("still exporting net.onnx, 4 min",)),
    "run": (
        "run job.toml",
        {EMBED: 25, "classifiers.jobs.run:evaluate_bundle": 300},
        (r"extracting: \d+ of 64 images", "still running the job, "),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_command_is_not_silent(
    name: str, place: Path, tmp_path: Path, clock: Any, penult: Penult, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, slow, says = CASES[name]
    for item in place.iterdir():
        copy = shutil.copytree if item.is_dir() and item.suffix else None
        copy(item, tmp_path / item.name) if copy else (tmp_path / item.name).symlink_to(item)
    if "other" in line:
        shutil.copy(place / "net.onnx", tmp_path / "other.onnx")
    monkeypatch.chdir(tmp_path)
    if "fewer.cache" in line:
        shutil.copytree("photos.cache", "fewer.cache")
        fewer = ImageFolder(Path("fewer"))
        run_extract(fewer, Backbone("net.onnx"), Path("fewer.cache"), Options(quiet=True))
    if "golden" in line:
        assert penult("compact", "photos.cache", "-o", "golden.h5")[0] == 0
    clock.time, clock.lines = 0.0, []
    for where, seconds in slow.items():
        clock.slow(where, seconds)
    code, _, err = penult(*line.split())
    assert code == 0, err
    assert clock.time > 100, "that which should take long was not called"
    assert clock.longest_silence <= LONGEST, clock.lines
    for words in says:
        assert re.search(words, clock.text), clock.text
    assert set(clock.text.splitlines()) <= set(re.sub("(?m)^warning: ", "", err).splitlines())


def test_a_network_on_features_is_not_silent(clock: Any) -> None:
    import numpy as np

    from classifiers.heads.mlp import MlpHead

    rng = np.random.default_rng(0)
    clock.slow("classifiers.heads.mlp:_Network.epoch", 25)
    MlpHead(hidden=(8,), max_epochs=3).fit(rng.normal(size=(40, 4)), np.arange(40) % 2)
    assert clock.longest_silence <= LONGEST, clock.lines
    assert re.search(r"training the mlp head: \d of 3 epochs at most, ", clock.text)
    assert re.search(r"fitting the mlp head: \d of \d epochs, ", clock.text)
