"""Caches whose digests are valid and whose content is not: each command names the file and the reason, and exits with 65."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from store.cache import FeatureCache
from store.errors import CorruptCacheError
from store.format import hdf5, json_text, shard
from store.format.metadata import meta_bytes, shard_paths
from store.format.samples import SampleTable
from store.verify import verify_cache
from store.writer import open_writer

V1 = Path(__file__).resolve().parents[1] / "data/archives/v1"
Penult = Callable[..., tuple[int, str, str]]
Datasets = dict[str, Any]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return Path(shutil.copytree(V1 / "photos.cache", tmp_path / "hostile.cache"))


def rewrite(path: Path, change: Callable[[Datasets, Datasets], None]) -> None:
    """Change the datasets and attributes of an HDF5 file, which then has a digest that fits."""
    with h5py.File(path, "r") as file:
        datasets = {name: file[name][()] for name in file}
        attrs = {name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()}
    kind = attrs.pop("encoding-type")
    for name in ("encoding-version", "payload-sha256"):
        del attrs[name]
    change(datasets, attrs)
    path.write_bytes(hdf5.build(kind, datasets, attrs)[0])


def describe(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``cache.json``, whose checksum then fits."""
    meta = json.loads((cache / "cache.json").read_text())
    del meta["sha256"]
    change(meta)
    (cache / "cache.json").write_bytes(meta_bytes(meta))


def facts_of(**facts: Any) -> Callable[[Path], None]:
    """Change the facts of the sample table."""

    def change(_: Datasets, attrs: Datasets) -> None:
        attrs["facts"] = json.dumps({**json.loads(attrs["facts"]), **facts})

    return lambda cache: rewrite(cache / "samples.h5", change)


def column(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change one dataset of the sample table."""
    return lambda cache: rewrite(cache / "samples.h5", lambda datasets, _: datasets.update({name: change(datasets[name])}))


def changed(array: Any, place: Any, value: Any) -> Any:
    """A copy with another value in one place."""
    array = array.copy()
    array[place] = value
    return array


def meta(name: str, value: Any) -> Callable[[Path], None]:
    """Change a field of cache.json, by its dotted name; ... removes it."""

    def change(fields: dict[str, Any]) -> None:
        *above, last = name.split(".")
        for key in above:
            fields = fields[key]
        if value is ...:
            del fields[last]
        else:
            fields[last] = value

    return lambda cache: describe(cache, change)


def duplicate_paths(cache: Path) -> None:
    samples = SampleTable.read(cache / "samples.h5")
    rows = [samples.rows[0], replace(samples.rows[1], path=samples.rows[0].path), *samples.rows[2:]]
    (cache / "samples.h5").write_bytes(SampleTable(rows, samples.facts).to_bytes())


def targets(values: Any, names: list[bytes]) -> Callable[[Path], None]:
    def change(datasets: Datasets, attrs: Datasets) -> None:
        attrs["facts"] = json.dumps({**json.loads(attrs["facts"]), "task": "regression"})
        n = attrs["rows"]
        datasets |= {"targets": np.array(values(n), np.float64), **hdf5.pack_strings("target-names", names)}

    return lambda cache: rewrite(cache / "samples.h5", change)


def features(value: float, place: Any = (0, 0)) -> Callable[[Path], None]:
    """Put a number among the features of the last shard."""

    def change(cache: Path) -> None:
        def put(datasets: Datasets, _: Datasets) -> None:
            datasets["features"] = changed(datasets["features"], place, value)

        rewrite(shard_paths(cache)[-1], put)

    return change


def narrower(cache: Path) -> None:
    """A second shard, of another width than the first."""
    first = shard.read_shard(shard_paths(cache)[0])
    stored = np.zeros((1, first.dim - 1), np.float32)
    shard.write_shard(cache / "shards", 99, stored, [b"k" * 32], [b"x.jpg"], FeatureCache(cache).fingerprint)


DESCRIPTIONS = {
    "facts are a list": (meta("facts", [1]), "'facts' is a list; expected an object"),
    "no facts": (meta("facts", ...), "'facts' is missing"),
    "fingerprint is a list": (meta("fingerprint", [1]), "'fingerprint' is a list"),
    "fingerprint is missing": (meta("fingerprint", ...), "'fingerprint' is missing"),
    "layer is a number": (meta("fingerprint.layer", 3), "'fingerprint.layer' is a number; expected text"),
    "pixels are text": (meta("fingerprint.pixels", "x"), "'fingerprint.pixels' is text; expected an object"),
    "views are a number as text": (meta("fingerprint.views", {"count": "three"}), "'fingerprint.views.count' is text"),
    "views lack their count": (meta("fingerprint.views", {}), "'fingerprint.views.count' is missing"),
    "more views than there can be": (meta("fingerprint.views", {"count": 10**9}), "views"),
    "no views at all": (meta("fingerprint.views", {"count": 0}), "views"),
    "more is an object": (meta("more", {}), "'more' is an object; expected a list"),
    "more holds text": (meta("more", ["x"]), "'more[0]' is text"),
    "digest is a number": (meta("facts.backbone_sha256", 5), "'facts.backbone_sha256' is a number"),
    "external data are a number": (meta("facts.backbone_data", 5), "'facts.backbone_data' is a number; expected a list"),
    "weights are a list": (meta("facts.weights", [1]), "'facts.weights' is a list"),
    "source is a number": (meta("facts.source", 1), "'facts.source' is a number"),
    "calibration is text": (meta("facts.calibration", "x"), "'facts.calibration' is text"),
    "format is text": (meta("format", "1"), "has format version 1"),
}
TABLES = {
    "facts are a list": (lambda c: rewrite(c / "samples.h5", lambda _, a: a.update(facts="[1]")), "'facts' is a list"),
    "facts are no JSON": (lambda c: rewrite(c / "samples.h5", lambda _, a: a.update(facts="{")), "is damaged"),
    "unknown task": (facts_of(task="ranking"), "the task 'ranking' is none of"),
    "task is a list": (facts_of(task=[]), "'facts.task' is a list"),
    "root is not hexadecimal": (facts_of(root="/data"), "root"),
    "root is a number": (facts_of(root=5), "'facts.root' is a number"),
    "root has a NUL": (facts_of(root=b"/da\0ta".hex()), "root"),
    "split is a list": (facts_of(split=[1]), "'facts.split' is a list"),
    "source is a list": (facts_of(source=[1]), "'facts.source' is a list"),
    "seconds are text": (facts_of(extract_seconds="long"), "'facts.extract_seconds' is text; expected a number"),
    "cost is a list": (facts_of(extract_cost=[1]), "'facts.extract_cost' is a list"),
    "memory is text": (facts_of(extract_cost={"peak_memory": "x", "energy": None}), "'facts.extract_cost.peak_memory' is text"),
    "duplicate paths": (duplicate_paths, "twice"),
    "label out of range": (column("label", lambda a: changed(a, 0, 99)), "'label' points outside"),
    "label in two columns": (column("label", lambda a: a.reshape(-1, 1)), "'label'"),
    "label is a fraction": (column("label", lambda a: a + 0.5), "'label'"),
    "label is not UTF-8": (column("label-names", lambda a: changed(a, 0, 255)), "is damaged"),
    "an ok row without a digest": (column("sha256", lambda a: changed(a, 0, 0)), "digest"),
    "targets of another shape": (targets(lambda n: np.zeros((n, 2)), [b"size"]), "targets"),
    "fewer targets": (targets(lambda n: np.zeros((n - 1, 1)), [b"size"]), "targets"),
    "an infinite target": (targets(lambda n: np.full((n, 1), np.inf), [b"size"]), "infinit"),
    "a target twice": (targets(lambda n: np.zeros((n, 2)), [b"size", b"size"]), "twice"),
    "regression without targets": (facts_of(task="regression"), "target"),
}
SHARDS = {
    "another width": (narrower, "features of width"),
    "no width": (
        lambda c: [rewrite(p, lambda d, _: d.update(features=d["features"][:, :0])) for p in shard_paths(c)],
        "do not fit",
    ),
}
COMMANDS = {
    "info": (),
    "verify": (),
    "train": ("-o", "{}/new.head", "--head", "ridge"),
    "compact": ("-o", "{}/new.h5"),
    "diff": (str(V1 / "photos.cache"),),
    "evaluate": (),
}


def call(penult: Penult, command: str, cache: Path) -> tuple[int, str, str]:
    if command == "evaluate":
        return penult(command, V1 / "logistic.head", cache)
    return penult(command, cache, *(part.format(cache.parent) for part in COMMANDS[command]))


OPENED = {**DESCRIPTIONS, **{f"table: {name}": case for name, case in TABLES.items()}, **SHARDS}


@pytest.mark.parametrize("name", OPENED)
def test_what_does_not_fit_is_named_by_every_command(name: str, cache: Path, penult: Penult) -> None:
    mutate, reason = OPENED[name]
    mutate(cache)
    for command in COMMANDS:
        code, out, err = call(penult, command, cache)
        assert "Traceback" not in err, command
        assert code == 65, (command, code, err)
        assert reason in out + err, command
        assert str(cache) in err, command


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_damage(value: float, cache: Path, penult: Penult) -> None:
    features(value)(cache)
    damaged = str(shard_paths(cache)[-1].name)
    assert call(penult, "info", cache)[0] == 0, "it reads no features"
    for command in ("verify", "train", "compact", "diff", "evaluate"):
        code, out, err = call(penult, command, cache)
        assert "Traceback" not in err, command
        assert code == 65, (command, code, err)
        assert f"{damaged} has NaN or infinity among its features" in out + err, command


def test_views_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    cache = Path(shutil.copytree(V1 / "views.cache", tmp_path / "views.cache"))
    features(np.inf, (0, 2, 1))(cache)
    assert ["NaN or infinity" in finding.problem for finding in verify_cache(cache)] == [True]
    with pytest.raises(CorruptCacheError, match="NaN or infinity"):
        FeatureCache(cache).subset()


def test_the_largest_and_smallest_numbers_are_no_damage(cache: Path) -> None:
    for value in (65504.0, -65504.0, 6e-8, -0.0):
        features(value)(cache)
        assert verify_cache(cache) == []


def test_extract_computes_features_again_that_are_not_finite(cache: Path) -> None:
    features(np.nan)(cache)
    with open_writer(cache) as writer:
        fingerprint, before = FeatureCache(cache).fingerprint, len(shard_paths(cache))
        assert writer.meta is not None
        writer.begin(fingerprint, facts=writer.meta["facts"])
        assert len(shard_paths(cache)) == before - 1
        assert {row.sha256 for row in FeatureCache(cache).rows()} - writer.known


COMPACT: dict[str, tuple[Callable[[Datasets, Datasets], None], str]] = {
    "facts are a list": (lambda _, attrs: attrs.update(cache="[1]"), "'facts' is a list"),
    "facts are no JSON": (lambda _, attrs: attrs.update(cache="{"), "is damaged"),
    "a NaN": (lambda data, _: data.update(features=changed(data["features"], (0, 0), np.nan)), "NaN or infinity"),
    "no features": (lambda data, _: data.update(features=data["features"][:, :0]), "do not fit"),
    "fewer rows": (lambda data, _: data.update(features=data["features"][:3]), "do not fit"),
    "views are text": (
        lambda _, attrs: attrs.update(fingerprint=json.dumps({"layer": 3})),
        "'fingerprint.layer' is a number",
    ),
}


@pytest.mark.parametrize("name", COMPACT)
def test_a_compact_file_that_makes_no_sense_is_refused(name: str, tmp_path: Path, penult: Penult) -> None:
    change, reason = COMPACT[name]
    file = Path(shutil.copy(V1 / "photos.h5", tmp_path / "photos.h5"))
    rewrite(file, change)
    for command in ("verify", "train", "evaluate"):
        code, out, err = call(penult, command, file)
        assert "Traceback" not in err, command
        assert code == 65, (command, code, err)
        assert reason in out + err, command


@pytest.mark.parametrize(
    "facts", [{}, {"float_layers": 3}, {"float_layers": [], "method": 1, "images": 2, "judged": 1, "min": "x"}]
)
def test_info_names_a_cache_with_facts_about_no_conversion(facts: dict[str, Any], tmp_path: Path, penult: Penult) -> None:
    cache = Path(shutil.copytree(V1 / "int8.cache", tmp_path / "int8.cache"))
    meta("facts.calibration", facts)(cache)
    code, _, err = penult("info", cache)
    assert code == 65, err
    assert f"{cache}: the facts about the conversion to int8 cannot be read" in err


CALIBRATIONS: dict[str, tuple[Callable[[Datasets, Datasets], None], str]] = {
    "layers are a number": (lambda _, attrs: attrs.update(layers="3"), "'layers' is a number"),
    "fewer images": (lambda data, _: data.update({"int8-0": data["int8-0"][:2]}), "do not fit"),
    "other digests": (lambda data, _: data.update(sha256=data["sha256"][:, :16]), "its digests have shape"),
    "a NaN": (lambda data, _: data.update({"fp32-0": data["fp32-0"] * np.float32("nan")}), "are not finite"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration_that_makes_no_sense_is_damage_that_training_does_without(
    name: str, tmp_path: Path, penult: Penult
) -> None:
    change, reason = CALIBRATIONS[name]
    cache = Path(shutil.copytree(V1 / "int8.cache", tmp_path / "int8.cache"))
    rewrite(cache / "calibration.h5", change)
    code, out, err = penult("verify", cache)
    assert code == 65, err
    assert reason in out
    code, _, err = call(penult, "train", cache)
    assert code == 0, err
    assert f"cannot be measured: {cache}/calibration.h5" in err


@pytest.mark.parametrize(
    ("value", "shape", "reason"),
    [
        ({"a": 1}, {"a": int, "b?": str}, ""),
        ({"a": True}, {"a": int}, "'a' is true or false; expected a whole number"),
        ({"a": 1}, {"a": float}, ""),
        ({"a": 1.5}, {"a": int}, "'a' is a number; expected a whole number"),
        ({"a": 2**70}, {"a": int}, "'a' is too large"),
        ({"a": 10**400}, {"a": float}, "'a' is not finite"),
        ({"a": None}, {"a": (float, None)}, ""),
        ({"a": "x"}, {"a": (float, None)}, "'a' is text; expected a number"),
        ({}, {"a": object}, "'a' is missing"),
        ({"x": 1, "y": "z"}, {"*": int}, "'y' is text; expected a whole number"),
        ([1, 2], [int], ""),
        ([1, "2"], [int], "'[1]' is text; expected a whole number"),
        ([1], [float, float], "'' has 1 elements; expected 2"),
        (3, dict, "it is a number; expected an object"),
    ],
)
def test_a_misfit_is_put_in_words(value: Any, shape: Any, reason: str) -> None:
    assert json_text.misfit(value, shape) == reason
