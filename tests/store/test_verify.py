"""Damage is found and named, whatever it does to its reader; `extract` repairs exactly that, readers refuse it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import store.writer
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.errors import CorruptCacheError, InputMissingError, NewerFormatError, StorageError
from store.format.integrity import verify_files
from store.format.metadata import shard_paths
from store.testing import assert_features_match
from store.verify import verify_cache


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path]) -> Path:
    return dataset(tmp_path_factory.mktemp("verify") / "photos", {"ants": 10, "bees": 10})


@pytest.fixture(scope="module")
def sound(photos: Path, backbone: Backbone) -> Path:
    """A cache of several shards."""
    path = photos.parent / "sound.cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.writer, "SHARD_BYTES", 1)
        run_extract(ImageFolder(photos), backbone, path, Options(batch_size=4, quiet=True))
    assert len(shard_paths(path)) == 5
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "c")


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def at_feature(path: Path, row: int = 0) -> int:
    """Where a feature row lies in the file."""
    import h5py

    with h5py.File(path) as file:
        return int(file["features"].id.get_offset()) + row * file["features"].shape[1] * file["features"].dtype.itemsize


def test_a_sound_cache_has_no_findings(cache: Path) -> None:
    assert verify_cache(cache) == []


def test_a_flipped_feature_is_found_refused_and_repaired(cache: Path, sound: Path, photos: Path, backbone: Backbone) -> None:
    damaged = shard_paths(cache)[2]
    flip(damaged, at_feature(damaged, 1) + 7, 3)
    (finding,) = verify_cache(cache)
    assert finding.file == f"shards/{damaged.name}"
    assert "is damaged: its payload is" in finding.problem
    with pytest.raises(CorruptCacheError, match=damaged.name):
        FeatureCache(cache).subset()
    again = run_extract(ImageFolder(photos), backbone, cache, Options(quiet=True))
    assert again.computed == 4
    assert verify_cache(cache) == []
    assert_features_match(cache, sound, bound=0.0)


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", None], ids=["empty", "text", "cut"])
def test_other_damage_is_named_too(cache: Path, content: bytes | None) -> None:
    path = shard_paths(cache)[0]
    path.write_bytes(path.read_bytes()[:1500] if content is None else content)
    assert [finding.file for finding in verify_cache(cache)] == [f"shards/{path.name}"]


def test_a_missing_shard_a_damaged_table_and_another_backbone_are_found(cache: Path) -> None:
    backbone = cache / "backbone.onnx"
    flip(backbone, backbone.stat().st_size // 2)
    assert [finding.file for finding in verify_cache(cache)] == ["backbone.onnx"]
    backbone.unlink()
    assert "is missing" in verify_cache(cache)[0].problem
    shard_paths(cache)[1].unlink()
    assert any("4 images have no features" in finding.problem for finding in verify_cache(cache))
    flip(cache / "samples.h5", 3000)
    assert "samples.h5" in [finding.file for finding in verify_cache(cache)]


def test_every_flip_that_touches_data_is_found(cache: Path, sound: Path, tmp_path: Path) -> None:
    """Seeded flips all over the shards; whatever passes as sound must still read exactly as before."""
    rng = np.random.default_rng(0)
    expected = FeatureCache(sound).subset().X
    shards = shard_paths(cache)
    flipped = []
    for i in range(25):
        path = shards[int(rng.integers(len(shards)))]
        (tmp_path / str(i) / "shards").mkdir(parents=True)
        flipped.append(Path(shutil.copy(path, tmp_path / str(i) / "shards")))
        flip(flipped[-1], int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
    found = verify_files(flipped)
    for path in set(flipped) - set(found):
        shard = cache / "shards" / path.name
        original = shard.read_bytes()
        shard.write_bytes(path.read_bytes())
        np.testing.assert_array_equal(FeatureCache(cache).subset().X, expected)
        shard.write_bytes(original)
    assert len(found) > 10


HANGING = "import signal, sys; sys.stdin.read(); signal.pause()"
DYING = "import os, sys; sys.stdin.read(); os.abort()"


@pytest.mark.parametrize(("script", "says"), [(HANGING, "hangs its reader"), (DYING, "kills its reader (exit -6)")])
def test_a_file_that_hangs_or_kills_its_reader_is_named_and_the_rest_is_checked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    """The interpreter of the child is replaced, once, by one that does what a damaged file makes HDF5 do."""
    import sys

    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport os\nos.unlink({str(fake)!r})\n{script}\n")
    fake.chmod(0o755)
    real, first = sys.executable, [True]

    class Executable:
        """``sys`` for the module under test: the first look at ``executable`` gives the fake."""

        path = sys.path

        @property
        def executable(self) -> str:
            return str(fake) if first and first.pop() else real

    monkeypatch.setattr("store.environment.sys", Executable())
    files = shard_paths(cache)
    problems = verify_files(files, timeout=5 if script == HANGING else 60)
    assert list(problems) == files[:1]
    assert says in problems[files[0]]


def test_what_is_no_damage_is_no_finding(cache: Path, photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    """A shard of a newer penult is not thrown away, and neither is one that cannot be read just now."""
    from store.format import hdf5

    path = shard_paths(cache)[0]
    original = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5, "ENCODING_VERSION", 2)
        path.write_bytes(hdf5.build("penult-shard", {"features": np.zeros((1, 4), np.float32)}, {"rows": 1})[0])
    with pytest.raises(NewerFormatError, match="format version 2"):
        run_extract(ImageFolder(photos), backbone, cache, Options(quiet=True))
    assert path.exists()
    path.write_bytes(original)
    if os.geteuid() != 0:  # root reads everything
        path.chmod(0)
        with pytest.raises(StorageError, match="Permission denied"):
            run_extract(ImageFolder(photos), backbone, cache, Options(quiet=True))
    with pytest.raises(InputMissingError, match="is not a penult cache"):
        verify_cache(tmp_path / "nothing")


def test_cache_json_may_be_lost(cache: Path, photos: Path, backbone: Backbone) -> None:
    (cache / "cache.json").unlink()
    flip(shard_paths(cache)[0], 0)
    again = run_extract(ImageFolder(photos), backbone, cache, Options(quiet=True))
    assert again.computed == 4
    assert json.loads((cache / "cache.json").read_text())["format"] == 1
    assert verify_cache(cache) == []
