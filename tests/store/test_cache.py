"""The cache directory: writing, reading by content and by split, fingerprints, the lock."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import store.writer
from store.cache import FeatureCache
from store.errors import (
    BadDataError,
    CorruptCacheError,
    FingerprintMismatchError,
    InputMissingError,
    LockedError,
    OutputError,
    OutputExistsError,
)
from store.fingerprint import Fingerprint, short
from store.format import shard
from store.format.lock import writer_lock
from store.format.metadata import FORMAT_VERSION, meta_bytes, read_meta, shard_paths
from store.format.samples import Row, SampleTable
from store.writer import CacheWriter, open_writer

REPO = Path(__file__).resolve().parents[2]
AUTO = Fingerprint({"backbone": "tiny", "weights": "a" * 64, "storage": "auto", "pixels": {"crop": 224, "resize": 256}})
FLOAT32 = Fingerprint({**AUTO.fields, "storage": "float32"})


def key(i: int) -> bytes:
    return hashlib.sha256(str(i).encode()).digest()


def features(count: int, dim: int = 4) -> Any:
    return np.random.default_rng(count).standard_normal((count, dim)).astype(np.float32)


def table(count: int, **facts: Any) -> SampleTable:
    split = ("train", "train", "val", "test")
    rows = [Row(b"%03d.jpg" % i, "ab"[i % 2], split[i % 4], sha256=key(i), stat=(1, 2, i)) for i in range(count)]
    return SampleTable(rows, {"root": os.fsencode("/data").hex(), **facts})


def fill(path: Path, count: int = 8, fingerprint: Fingerprint = FLOAT32, shards: int = 2) -> Any:
    """A finished cache; returns the features by number."""
    X = features(count)
    with open_writer(path) as writer:
        writer.begin(fingerprint, facts={"versions": {}})
        for part in np.array_split(np.arange(count), shards):
            writer.append([X[part]], [key(i) for i in part], [b"%03d.jpg" % i for i in part])
            assert writer.commit() == len(part)
        assert writer.finish(table(count))
    return X


# --- reading and writing -----------------------------------------------------------------------------------------------


def test_features_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    X = fill(tmp_path / "c", shards=3)
    cache = FeatureCache(tmp_path / "c")
    order = [7, 0, 3, 3, 5, 1]
    found = cache.features([key(i) for i in order])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, X[order])
    assert (cache.dim, len(cache.shards)) == (4, 3)


def test_keys_that_end_in_zero_bytes_are_found(tmp_path: Path) -> None:
    """NumPy strips zero bytes from fixed-length strings when they are read; a digest may well end so."""
    keys = [b"\1" + bytes(31), bytes(32), b"\1\1" + bytes(30)]
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        writer.append([features(3)], keys, [b"a", b"b", b"c"])
        writer.commit()
        writer.finish(SampleTable([Row(b"a", sha256=keys[0])], {"root": ""}))
    np.testing.assert_array_equal(FeatureCache(tmp_path / "c").features(keys[::-1]), features(3)[::-1])
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        assert writer.known == set(keys)


def test_a_subset_is_one_split_with_labels(tmp_path: Path) -> None:
    X = fill(tmp_path / "c")
    val = FeatureCache(tmp_path / "c").subset("val")
    np.testing.assert_array_equal(val.X, X[[2, 6]])
    assert val.y.tolist() == ["a", "a"]
    assert val.paths == [b"002.jpg", b"006.jpg"]
    assert val.sha256 == val.groups == [key(2), key(6)]
    assert (val.name, len(val)) == ("val", 2)
    assert len(FeatureCache(tmp_path / "c").subset()) == 8


def test_an_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with pytest.raises(BadDataError, match="no samples in split 'valid'; it has train, val, test"):
        FeatureCache(tmp_path / "c").subset("valid")


def test_unlabelled_samples_cannot_be_trained_on(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        rows = list(table(8).rows)
        writer.finish(SampleTable([Row(b"000.jpg", sha256=key(0)), *rows[1:]], {"root": ""}))
    with pytest.raises(BadDataError, match=r"1 of 8 samples have no label \(such as 000.jpg\)"):
        FeatureCache(tmp_path / "c").subset()


def test_a_missing_feature_is_corrupt_not_wrong(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    shard_paths(tmp_path / "c")[0].unlink()
    with pytest.raises(CorruptCacheError, match="lacks the features of 4 of 8 samples"):
        FeatureCache(tmp_path / "c").subset()
    for path in shard_paths(tmp_path / "c"):
        path.unlink()
    with pytest.raises(CorruptCacheError, match="lacks the features of 8 of 8 samples"):
        FeatureCache(tmp_path / "c").subset()


def test_resplitting_a_cache_is_disjoint_and_complete(tmp_path: Path) -> None:
    fill(tmp_path / "c", count=40)
    train, test = FeatureCache(tmp_path / "c").split(test=0.25)
    assert (train.name, test.name) == ("train", "test")
    assert (len(train), len(test)) == (30, 10)
    assert set(train.paths).isdisjoint(test.paths)
    parts = FeatureCache(tmp_path / "c").split(test=0.25, val=0.25, seed=3)
    assert [part.name for part in parts] == ["train", "val", "test"]
    assert sorted(path for part in parts for path in part.paths) == [row.path for row in table(40).rows]


def test_shards_of_another_fingerprint_are_ignored(tmp_path: Path) -> None:
    """Rule 10."""
    X = fill(tmp_path / "c")
    foreign = Fingerprint({**FLOAT32.fields, "backbone": "other"})
    keys = [key(i) for i in range(5, 15)]  # some that are here, some that are not
    shard.write_shard(tmp_path / "c/shards", 99, np.zeros((10, 4), np.float32), keys, [b"x"] * 10, foreign)
    np.testing.assert_array_equal(FeatureCache(tmp_path / "c").subset().X, X)
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        assert len(writer.known) == 8


def test_foreign_names_in_the_shards_folder_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    for name in (
        "0001-0123456789ab.h5",
        "00001-XYZ.h5",
        "copy of 00000.h5",
        ".00001-0123456789ab.h5.tmp",
        "00001-0123456789abc.h5",
    ):
        (tmp_path / "c/shards" / name).write_bytes(b"junk")
    assert len(shard_paths(tmp_path / "c")) == 2
    assert len(FeatureCache(tmp_path / "c").subset()) == 8


def test_a_writer_removes_only_the_temporary_files_of_killed_runs(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    mine = [tmp_path / "c" / name for name in (f"shards/.00005-0123456789ab.h5.{12 * 'f'}.tmp", f".samples.h5.{12 * 'f'}.tmp")]
    theirs = [tmp_path / "c/notes.txt", tmp_path / "c/shards/notes.tmp"]
    for path in (*mine, *theirs):
        path.write_bytes(b"x")
    with open_writer(tmp_path / "c"):
        pass
    assert [path.exists() for path in (*mine, *theirs)] == [False, False, True, True]


def test_rows_that_do_not_fit_float16_go_into_a_float32_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    X = np.array([[1, 2, 3, 4], [1e6, 1, 1, 1], [0.5, 0.25, 0, 0], [1e-8, 0, 0, 0]], np.float32)
    with open_writer(tmp_path / "c") as writer:
        writer.begin(AUTO, facts={})
        writer.append([X], [key(i) for i in range(4)], [b"%03d.jpg" % i for i in range(4)])
        assert writer.commit() == 4
        writer.finish(table(4))
    assert "2 of 4 rows do not fit float16" in caplog.text
    cache = FeatureCache(tmp_path / "c")
    assert sorted(str(s.dtype) for s in cache.shards) == ["float16", "float32"]
    found = cache.subset().X
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, X)


def test_float16_is_kept_where_every_row_fits(tmp_path: Path) -> None:
    X = fill(tmp_path / "c", fingerprint=AUTO)
    found = FeatureCache(tmp_path / "c").subset().X
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, X.astype(np.float16))
    error = np.linalg.norm(found.astype(np.float64) - X, axis=1) / np.linalg.norm(X, axis=1)
    assert 0 < error.max() <= 5e-4


def test_float32_storage_is_exact(tmp_path: Path) -> None:
    X = fill(tmp_path / "c", fingerprint=FLOAT32)
    assert FeatureCache(tmp_path / "c").dtype == np.float32
    np.testing.assert_array_equal(FeatureCache(tmp_path / "c").subset().X, X)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_count(tmp_path: Path, value: float) -> None:
    X = features(5)
    X[1, 2] = X[3, 0] = X[3, 1] = value
    with open_writer(tmp_path / "c") as writer:
        writer.begin(AUTO, facts={})
        with pytest.raises(BadDataError, match=r"NaN or infinity for 2 of 5 images \(such as 001.jpg\)"):
            writer.append([X], [key(i) for i in range(5)], [b"%03d.jpg" % i for i in range(5)])
        assert writer.commit() == 0
    assert shard_paths(tmp_path / "c") == []


def test_a_shard_is_due_by_size_and_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(tmp_path / "c") as writer:
        writer.begin(AUTO, facts={})
        assert not writer.due
        writer.append([features(2)], [key(0), key(1)], [b"a", b"b"])
        assert not writer.due
        monkeypatch.setattr(store.writer, "SHARD_BYTES", 33)
        assert not writer.due
        monkeypatch.setattr(store.writer, "SHARD_BYTES", 32)
        assert writer.due
        monkeypatch.undo()
        monkeypatch.setattr(store.writer, "SHARD_SECONDS", 0.0)
        assert writer.due
        writer.commit()
        assert not writer.due


def test_an_unchanged_table_is_not_written_again(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "c").iterdir()}
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={"versions": {}})
        assert not writer.finish(table(8))
        assert {path.name: path.stat().st_ino for path in (tmp_path / "c").iterdir()} == before
        (tmp_path / "c/ledger.jsonl").unlink()
        assert writer.finish(table(8))
        assert writer.finish(table(7))


def test_the_ledger_lists_failures_as_json(tmp_path: Path) -> None:
    with open_writer(tmp_path / "c") as writer:
        writer.begin(AUTO, facts={})
        bad = Row(b"b\n\xff.jpg", "b", sha256=key(1), code="truncated", message='it says "no"')
        writer.finish(SampleTable([Row(b"a", "a", sha256=key(0)), bad], {"root": ""}))
    lines = (tmp_path / "c/ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"path": "b\\n\\xff.jpg", "code": "truncated", "message": 'it says "no"'}]


def test_relabelling_touches_no_shard(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in shard_paths(tmp_path / "c")}
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        writer.finish(SampleTable([Row(b"new/%d" % i, "c", sha256=key(i)) for i in range(8)], {"root": ""}))
    assert {path: path.stat().st_mtime_ns for path in shard_paths(tmp_path / "c")} == before
    assert FeatureCache(tmp_path / "c").subset().y.tolist() == ["c"] * 8


# --- what a cache may be found as --------------------------------------------------------------------------------------


def test_an_unfinished_cache_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c/samples.h5").unlink()
    with pytest.raises(InputMissingError, match="unfinished cache; run the same extract command again") as caught:
        FeatureCache(tmp_path / "c")
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("name", ["nowhere", "folder"])
def test_what_is_no_cache_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputMissingError, match="not a"):
        FeatureCache(tmp_path / name)


def test_reading_writes_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c/.lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    FeatureCache(tmp_path / "c").subset()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before
    with writer_lock(tmp_path / "c"):
        assert len(FeatureCache(tmp_path / "c").subset()) == 8


def test_a_cache_is_readable_while_it_cannot_be_written(tmp_path: Path) -> None:
    """Root may write anywhere, so a child of root becomes nobody, inside a folder that nobody can get through to."""
    X = fill(tmp_path / "open/c")
    for path in [*(tmp_path / "open").rglob("*"), tmp_path / "open"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
from store.cache import FeatureCache
FeatureCache("c").subset()  # every import is done while it can be
if os.geteuid() == 0:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
try:
    open("c/new", "w")
    sys.exit("this test must not be able to write")
except PermissionError:
    print(FeatureCache("c").subset().X.astype(float).sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path / "open")
    for path in (tmp_path / "open", tmp_path / "open/c", tmp_path / "open/c/shards"):
        path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(X.astype(float).sum()), abs=1e-9)


@pytest.mark.parametrize("content", [None, "", "{", "\x00\x00"])
def test_a_lost_cache_json_is_told_by_the_shards(tmp_path: Path, content: str | None) -> None:
    X = fill(tmp_path / "c")
    path = tmp_path / "c/cache.json"
    path.unlink() if content is None else path.write_text(content)
    cache = FeatureCache(tmp_path / "c")
    assert cache.fingerprint == FLOAT32
    np.testing.assert_array_equal(cache.subset().X, X)
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={"note": 1})
    assert json.loads(path.read_text())["fingerprint"] == dict(FLOAT32.fields)


def test_a_lost_cache_json_with_two_fingerprints_is_corrupt(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    shard.write_shard(tmp_path / "c/shards", 9, np.zeros((1, 4), np.float32), [key(0)], [b"x"], AUTO)
    (tmp_path / "c/cache.json").unlink()
    with pytest.raises(CorruptCacheError, match="2 different fingerprints"):
        FeatureCache(tmp_path / "c")


def test_a_newer_cache_is_refused_with_its_version(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    path = tmp_path / "c/cache.json"
    path.write_bytes(meta_bytes({**read_meta(tmp_path / "c"), "format": FORMAT_VERSION + 1}))
    with pytest.raises(CorruptCacheError, match="format version 2; this penult reads up to 1"):
        FeatureCache(tmp_path / "c")
    with pytest.raises(CorruptCacheError, match="format version 2"), open_writer(tmp_path / "c") as writer:
        writer.begin(AUTO, facts={})
    assert len(shard_paths(tmp_path / "c")) == 2


@pytest.mark.parametrize("content", ["[]", "7", '{"format": 1}', '{"format": 1, "fingerprint": []}'])
def test_a_strange_cache_json_is_corrupt(tmp_path: Path, content: str) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c/cache.json").write_text(content)
    with pytest.raises(CorruptCacheError, match="not a cache description"):
        read_meta(tmp_path / "c")


def damage(kind: str, path: Path) -> None:
    raw = bytearray(path.read_bytes())
    if kind == "zero":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "header":
        raw[3] ^= 0x10
        path.write_bytes(raw)
    elif kind == "newer type":
        path.write_bytes(raw.replace(b"penult-shard", b"penult-thing"))


@pytest.mark.parametrize("kind", ["zero", "truncated", "header", "newer type"])
def test_a_damaged_shard_is_refused_by_readers_and_dropped_by_a_writer(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "c")
    first, second = shard_paths(tmp_path / "c")
    damage(kind, first)
    with pytest.raises(CorruptCacheError, match=first.name):
        FeatureCache(tmp_path / "c").subset()
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        assert writer.known == {key(i) for i in range(4, 8)}
        assert first.name in caplog.text
        assert not first.exists()
        writer.append([features(8)[:4]], [key(i) for i in range(4)], [b"x"] * 4)
        writer.commit()
    assert [path.name[:5] for path in shard_paths(tmp_path / "c")] == ["00001", "00002"]
    assert shard_paths(tmp_path / "c")[0] == second
    np.testing.assert_array_equal(FeatureCache(tmp_path / "c").subset().X, features(8))


def test_a_damaged_sample_table_is_refused_by_readers_and_made_again_by_a_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "c")
    path = tmp_path / "c/samples.h5"
    path.write_bytes(path.read_bytes().replace(b"003.jpg", b"003.JPG"))
    with pytest.raises(CorruptCacheError, match="payload"):
        FeatureCache(tmp_path / "c")
    with open_writer(tmp_path / "c") as writer:
        writer.begin(FLOAT32, facts={})
        assert writer.samples is None
        assert "it is made again" in caplog.text
        assert writer.finish(table(8))
    assert len(FeatureCache(tmp_path / "c").subset()) == 8


def test_a_foreign_folder_is_not_written_into(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "mine.jpg").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match="not a penult cache") as caught, open_writer(folder):
        pass
    assert caught.value.exit_code == 73
    assert [path.name for path in folder.iterdir()] == ["mine.jpg"]
    with pytest.raises(OutputExistsError), open_writer(folder / "mine.jpg"):
        pass


def test_an_impossible_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot create") as caught, open_writer(tmp_path / "file/c"):
        pass
    assert caught.value.exit_code == 73


def test_overwriting_empties_a_cache_but_not_what_is_not_its(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c/notes.txt").write_text("mine")
    (tmp_path / "c/shards/notes.txt").write_text("mine")
    with open_writer(tmp_path / "c") as writer:
        writer.clear()
        assert writer.fresh
        writer.begin(AUTO, facts={})
        assert writer.known == set()
    assert (tmp_path / "c/notes.txt").read_text() == "mine"
    assert (tmp_path / "c/shards/notes.txt").read_text() == "mine"
    assert not (tmp_path / "c/samples.h5").exists()


def test_overwriting_a_locked_cache_leaves_it_alone(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with writer_lock(tmp_path / "c"), pytest.raises(LockedError), open_writer(tmp_path / "c"):
        pass
    assert len(FeatureCache(tmp_path / "c").subset()) == 8


# --- the fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprints_text_does_not_depend_on_order() -> None:
    a = Fingerprint({"b": 1, "a": {"y": [1, 2], "x": "ü"}})
    b = Fingerprint({"a": {"x": "ü", "y": [1, 2]}, "b": 1})
    assert a.canonical == b.canonical == '{"a":{"x":"\\u00fc","y":[1,2]},"b":1}'
    assert a.key == b.key == hashlib.sha256(a.canonical.encode()).hexdigest()
    assert Fingerprint.parse(a.canonical) == a


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_fingerprint_that_is_no_json_object_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptCacheError, match="not a fingerprint"):
        Fingerprint.parse(text)


def test_a_mismatch_names_each_field_and_shortens_digests() -> None:
    other = Fingerprint({**AUTO.fields, "weights": "b" * 64, "pixels": {"crop": 288, "resize": 256}, "tf32": False})
    assert AUTO.differences(other) == {
        "pixels.crop": (224, 288),
        "tf32": (None, False),
        "weights": ("a" * 64, "b" * 64),
    }
    with pytest.raises(FingerprintMismatchError) as caught:
        AUTO.require(other, mine="pets.cache", theirs="this run")
    message = str(caught.value)
    assert "pets.cache and this run do not go together" in message
    assert "pixels.crop: 224 against 288" in message
    assert f"weights: {'a' * 12}.. against {'b' * 12}.." in message
    assert "a" * 13 not in message
    assert caught.value.exit_code == 65


def test_ignored_fields_may_differ() -> None:
    other = Fingerprint({**AUTO.fields, "provider": "cuda"})
    with pytest.raises(FingerprintMismatchError, match="provider"):
        AUTO.require(other, mine="a", theirs="b")
    AUTO.require(other, mine="a", theirs="b", ignore={"provider"})
    AUTO.require(AUTO, mine="a", theirs="b")


def test_only_digests_are_shortened() -> None:
    assert short("g" * 64) == "g" * 64
    assert short(1.5) == "1.5"
    assert short(None) == "null"


def test_another_fingerprint_is_refused_before_anything_changes(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    with open_writer(tmp_path / "c") as writer, pytest.raises(FingerprintMismatchError, match="storage"):
        writer.begin(AUTO, facts={})
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()} == before


# --- the lock ----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
sys.path.insert(0, {repo!r})
from pathlib import Path
from store.writer import open_writer
with open_writer(Path({path!r})):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    code = HOLDER.format(repo=str(REPO), path=str(path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_turned_away_and_a_killed_one_leaves_nothing_stale(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with hold(tmp_path / "c") as holder:
        try:
            with pytest.raises(LockedError, match="in use by another run") as caught, open_writer(tmp_path / "c"):
                pass
            assert caught.value.exit_code == 75
            assert len(FeatureCache(tmp_path / "c").subset()) == 8
        finally:
            holder.send_signal(signal.SIGKILL)
    assert holder.returncode == -signal.SIGKILL
    with open_writer(tmp_path / "c") as writer:
        assert isinstance(writer, CacheWriter)


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "c"):
        raise ZeroDivisionError
    with open_writer(tmp_path / "c"):
        pass


def test_a_leftover_lock_file_means_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c/.lock").write_text("12345")
    with open_writer(tmp_path / "c"):
        pass
