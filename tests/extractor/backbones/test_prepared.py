"""The store of prepared backbones: a network is exported once, then taken without torch; bounded, and never in the way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from extractor.backbones import export as exporting
from extractor.backbones import prepared
from extractor.backbones.export import obtain, request_of
from extractor.backbones.registry import Backbone
from extractor.graphs import backbone_facts, onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, read_facts, write_facts
from extractor.graphs.prepared_entry import ENTRY, MODEL, key_of
from extractor.pixels.pixel_drift import ProbeImage
from store.errors import UsageError

REPO = Path(__file__).resolve().parents[3]
SQUEEZENET = Backbone("squeezenet1_1", "random:0", resize=72, crop=64)  # what conftest's backbone_file was made from
NET = ["squeezenet1_1", "--resize", "72", "--crop", "64"]
BLOCKED = """
import importlib.abc, importlib.machinery, os, sys

class Refusing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name not in ("torch", "torchvision"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # looking where it lies is no import
        spec.loader = self
        return spec

    def exec_module(self, module):
        with open(os.environ["TRIED"], "a") as file:
            print(os.getpid(), module.__name__, file=file)
        raise ImportError(f"this test blocks {module.__name__}")

sys.meta_path.insert(0, Refusing())
"""


SESSION = """
import sys
import cli
for line in sys.argv[1:]:
    sys.argv = ["penult", *line.split()]
    try:
        cli.main()
    except SystemExit as ended:
        print(f"exit {ended.code or 0}", end="\\0")
"""


def without_torch(folder: Path, *lines: str) -> tuple[list[str], str]:
    """Run commands where neither they nor their children can import torch or torchvision; ``tried`` names who tried.

    Returns:
        What each printed and its exit status, and stderr.
    """
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(BLOCKED)
    own = {"PYTHONPATH": os.pathsep.join([str(folder / "site"), str(REPO)]), "TRIED": str(folder / "tried")}
    command = [sys.executable, "-c", SESSION, *lines]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1], done.stderr


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of this test, in a process that has warned of nothing yet."""
    monkeypatch.setenv("PENULT_CACHE", str(tmp_path / "penult"))
    monkeypatch.setattr(prepared, "_warned", set())
    return tmp_path / "penult/backbones"


@pytest.fixture
def exports(backbone_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the networks that were exported; each is a copy of a file that `export` made before."""
    names: list[str] = []

    def copy(backbone: Backbone, path: Path, *_: object) -> BackboneFacts:
        facts = renamed(backbone_file, path, backbone)
        names.append(f"{backbone.name}={facts.weights}")
        return facts

    monkeypatch.setattr(exporting, "in_child", copy)
    return names


def renamed(source: Path, target: Path, backbone: Backbone) -> BackboneFacts:
    """A copy of an exported file as that of another network."""
    model = onnx.load(source)
    request = request_of(backbone)
    origin = f"(sha256 {request['weights_sha256']})"
    facts = replace(read_facts(source), name=backbone.name, weights=request["weights"], source=origin)
    del model.metadata_props[:]
    write_facts(model, facts)
    onnx_file.save(model, target)
    return facts


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path]) -> Path:
    return dataset(tmp_path_factory.mktemp("prepared") / "photos", {"ants": 8, "bees": 8})


# --- without torch -----------------------------------------------------------------------------------------------------


def test_a_known_network_is_extracted_without_torch(photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    prepared.keep(request_of(SQUEEZENET), backbone_file, read_facts(backbone_file))  # it was exported earlier in this test run
    extract = f"extract {photos} -m squeezenet1_1 --resize 72 --crop 64 --json"
    lines = [f"{extract} --weights random:0 -o c", "backbones --prepared --json", f"{extract} --weights random:99 -o d"]
    (known, listing, unknown), stderr = without_torch(tmp_path, *lines)
    assert json.loads(known.removesuffix("exit 0"))["backbone"]["prepared"] == "store"
    assert "using squeezenet1_1 (random:0) as prepared before; features: 512 of input of classifier.1" in stderr
    assert (tmp_path / "c/backbone.onnx").read_bytes() == backbone_file.read_bytes()
    rows = json.loads(listing.removesuffix("exit 0"))["prepared"]
    assert ("squeezenet1_1", "random:0") in [(row["name"], row["weights"]) for row in rows]
    assert unknown == "exit 70", "the block works, in the child of an export, too"
    assert (tmp_path / "tried").read_text().split()[1:] == ["torch"]


def test_a_sweep_of_four_known_networks_exports_none(photos: Path, backbone_file: Path, store: Path, tmp_path: Path) -> None:
    names = ("squeezenet1_1", "squeezenet1_0", "resnet18", "mobilenet_v2")
    for name in names:
        known = replace(SQUEEZENET, name=name)
        prepared.keep(request_of(known), tmp_path / "m.onnx", renamed(backbone_file, tmp_path / "m.onnx", known))
    assert len(list(store.iterdir())) == 4
    sources = ",".join(f"{name}=random:0" for name in names)
    line = f"sweep {photos} -m {sources} --resize 72 --crop 64 --head centroid --json -o sweep"
    (ranking,), stderr = without_torch(tmp_path, line)
    assert ranking.endswith("exit 0"), stderr
    assert [stderr.count(f"using {name} (random:0) as prepared before") for name in names] == [1] * 4
    assert not (tmp_path / "tried").exists()


# --- what is taken, and what is not ------------------------------------------------------------------------------------


def test_a_network_is_exported_once_and_then_taken(
    store: Path, exports: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts, origin = obtain(SQUEEZENET, tmp_path / "a.onnx")
    assert (origin, exports) == ("exported", ["squeezenet1_1=random:0"])
    with caplog.at_level(logging.INFO):
        assert obtain(replace(SQUEEZENET, layers=("penultimate",)), tmp_path / "b.onnx") == (facts, "store")
    assert "using squeezenet1_1 (random:0) as prepared before" in caplog.text
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert obtain(replace(SQUEEZENET, layers=("features",)), tmp_path / "c.onnx")[1] == "exported"
    assert len(exports) == 2
    entries, damaged = prepared.entries()
    assert len(entries) == 2
    assert damaged == []
    assert {path.name for entry in entries for path in entry.path.iterdir()} == {MODEL, ENTRY}
    assert len(list(store.iterdir())) == 2


def test_a_file_of_the_user_is_never_kept(store: Path, backbone: Backbone, tmp_path: Path) -> None:
    assert obtain(backbone, tmp_path / "a.onnx")[1] == "imported"
    assert not store.exists()


def key(**changes: Any) -> str:
    return key_of(request_of(replace(Backbone("resnet50"), **changes)))


def test_names_for_the_same_network_have_one_entry() -> None:
    assert key() == key(weights="DEFAULT") == key(weights="V2") == key(weights="IMAGENET1K_V2") == key(preset="V2")
    assert key(layers=("penultimate",)) == key()
    assert key(weights="random") == key(weights="random:0") == key(weights="random:0", preset="V2")


def test_whatever_decides_a_file_makes_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a.pth", b"a"), ("b.pth", b"a"), ("c.pth", b"b")):
        (tmp_path / name).write_bytes(content)
    keys = [
        key(),
        key(name="resnet18"),
        key(weights="V1"),
        *(key(weights=f"random:{seed}") for seed in (0, 1)),
        key(weights="random:0", preset="V1"),
        *(key(weights=str(tmp_path / f"{name}.pth"), preset="V1") for name in "abc"),
        key(weights=str(tmp_path / "a.pth"), preset="V2"),
        key(weights=str(tmp_path / "a.pth")),
        *(key(layers=layers) for layers in (("layer3",), ("layer3", "layer4"), ("layer4", "layer3"))),
        *(key(layers=("layer3",), pooling=pooling) for pooling in ("average", "max")),
        key(resize=300),
        key(crop=200),
        key(pixel_path="pillow-draft"),
    ]
    monkeypatch.setattr(exporting, "EXPORTER", exporting.EXPORTER + 1)
    keys.append(key())
    monkeypatch.setattr(exporting, "versions_of", lambda names: dict.fromkeys(names, "0"))
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_weights_file_that_is_replaced_during_the_export_is_not_kept(
    store: Path, exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"before")
    known = Backbone("squeezenet1_1", str(weights), "IMAGENET1K_V1")
    export_copy = exporting.in_child

    def replaced(*arguments: Any) -> BackboneFacts:
        weights.write_bytes(b"after")
        return export_copy(*arguments)

    monkeypatch.setattr(exporting, "in_child", replaced)
    assert obtain(known, tmp_path / "a.onnx")[1] == "exported"
    assert not store.exists()
    assert [obtain(known, tmp_path / "b.onnx")[1] for _ in range(2)] == ["exported", "store"]


def test_the_test_image_is_of_the_machine_that_takes_it(
    store: Path, exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {"pillow": "1.0"}
    with monkeypatch.context() as patch:
        patch.setattr("extractor.pixels.pixel_drift.libraries", lambda: then)
        obtain(SQUEEZENET, tmp_path / "a.onnx")
    obtain(SQUEEZENET, tmp_path / "b.onnx")
    images = [
        json.loads(backbone_facts.entries_in(onnx.load(tmp_path / f"{name}.onnx"))[backbone_facts.PROBE_IMAGE]) for name in "ab"
    ]
    assert images[0]["libraries"] == then
    assert images[1] == json.loads(json.dumps(ProbeImage.here(read_facts(tmp_path / "b.onnx").preprocess).to_json()))
    assert read_facts(tmp_path / "a.onnx") == read_facts(tmp_path / "b.onnx")
    assert len(exports) == 1


def test_what_is_wrong_in_the_place_of_an_entry_is_replaced_and_what_is_not_ours_stays(
    store: Path, exports: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry, another = (store / key_of(request) for request in (request_of(SQUEEZENET), {"of": "another"}))
    target = tmp_path / "m.onnx"
    obtain(SQUEEZENET, target)
    prepared.keep({"of": "another"}, target, read_facts(target))
    makers: list[tuple[Callable[[], object], bool]] = [
        (entry.mkdir, True),
        (lambda: shutil.copytree(another, entry), True),
        (lambda: (entry / ENTRY).mkdir(parents=True), False),
        (lambda: (entry.mkdir(), (entry / "thesis.txt").touch()), False),
        (entry.touch, False),
        (lambda: (entry.unlink(), entry.symlink_to(another)), False),
    ]
    for make, ours in makers:
        shutil.rmtree(entry, ignore_errors=True)
        make()
        before = sorted(store.rglob("*"))
        caplog.clear()
        assert [obtain(SQUEEZENET, target)[1] for _ in range(2)] == ["exported", "store" if ours else "exported"]
        assert caplog.text.count("is damaged") == (1 if ours else 2)
        assert caplog.text.count("it cannot be removed") == (0 if ours else 2)
        if not ours:
            assert prepared.prune()[0] == 1, "the other one"
            assert sorted(store.rglob("*")) == [path for path in before if another not in (path, *path.parents)]
            prepared.keep({"of": "another"}, target, read_facts(target))


def test_large_networks_bring_their_data(
    store: Path, exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MAX_INLINE", 1000)
    for name in "ab":
        obtain(SQUEEZENET, tmp_path / f"{name}.onnx")
    assert len(exports) == 1
    models = [onnx_file.read_model(tmp_path / f"{name}.onnx") for name in "ab"]
    data = [onnx_file.data_files(tmp_path / f"{name}.onnx", model) for name, model in zip("ab", models, strict=True)]
    assert [file.name[:2] for files in data for file in files] == ["a-", "b-"]
    assert len({onnx_file.weights_digest(model, tmp_path) for model in models}) == 1
    assert data[0][0].read_bytes() == data[1][0].read_bytes()
    next(store.glob("*/*.data")).unlink()
    assert obtain(SQUEEZENET, tmp_path / "a.onnx")[1] == "exported"


# --- bounded, and without a place --------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes(
    store: Path, backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_facts(backbone_file)

    def use(name: str, seconds: int) -> bool:
        taken = prepared.take({"of": name}, tmp_path / "m.onnx")
        if taken is None:
            prepared.keep({"of": name}, backbone_file, facts)
        entry = store / key_of({"of": name}) / ENTRY
        os.utime(entry, (seconds, seconds))
        return taken is not None

    size = backbone_file.stat().st_size
    monkeypatch.setenv(prepared.LIMIT_VARIABLE, str(2.5 * size / 2**30))
    assert [use(name, number) for number, name in enumerate("abac")] == [False, False, True, False]
    assert [prepared.take({"of": name}, tmp_path / "m.onnx") is None for name in "abc"] == [False, True, False]
    monkeypatch.setenv(prepared.LIMIT_VARIABLE, str(0.5 * size / 2**30))
    prepared.keep({"of": "d"}, backbone_file, facts)
    assert len(list(store.iterdir())) == 2, "what is too large for the store drives nothing out"


def test_the_last_bytes_of_a_disk_are_left_to_the_run(
    store: Path, exports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20))
    obtain(SQUEEZENET, tmp_path / "a.onnx")
    assert "1 MiB are free on its disk, and this one has 3 MiB" in caplog.text
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("place", ["a file", "no home folder", "an empty name of it", "off"])
def test_without_a_place_everything_is_exported_and_it_is_said_once(
    place: str,
    store: Path,
    exports: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.parent.touch()
    if place == "no home folder":
        for name in ("PENULT_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    if place == "an empty name of it":
        for name in ("PENULT_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.setenv(name, "")
    if place == "off":
        monkeypatch.setenv(prepared.LIMIT_VARIABLE, "0")
    for name in "ab":
        assert obtain(SQUEEZENET, tmp_path / f"{name}.onnx")[1] == "exported"
    expected = {
        "a file": "not writable (Not a directory)",
        "no home folder": "PENULT_CACHE=FOLDER in the environment chooses one",
        "an empty name of it": "PENULT_CACHE=FOLDER in the environment chooses one",
    }
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (place != "off")
    assert expected.get(place, "") in "".join(warnings)


def test_a_limit_that_is_no_number_is_refused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("many", "-1", "nan", "1e99"):
        monkeypatch.setenv(prepared.LIMIT_VARIABLE, text)
        with pytest.raises(UsageError, match=f"PENULT_CACHE_GIB is '{text}'; expected a number of GiB, 0 or more"):
            obtain(SQUEEZENET, tmp_path / "a.onnx")


# --- the commands ------------------------------------------------------------------------------------------------------


def test_they_are_listed_and_removed(
    store: Path, exports: list[str], tmp_path: Path, penult: Callable[..., tuple[int, str, str]]
) -> None:
    _, out, _ = penult("export", *NET, "--weights", "random:0", "-o", tmp_path / "a.onnx", "--json")
    assert json.loads(out)["prepared"] == "exported"
    obtain(replace(SQUEEZENET, name="resnet18"), tmp_path / "b.onnx")
    (store / key_of(request_of(SQUEEZENET)) / ENTRY).write_text("{")
    code, out, err = penult("backbones", "--prepared")
    assert (code, err) == (0, "")
    assert "resnet18" in out
    assert "cannot be read: it is damaged, or of another version of penult" in out
    assert f"1 prepared, 3 MiB of at most 4 GiB, in {store}" in out
    facts = json.loads(penult("backbones", "--prepared", "--json")[1])
    assert [row["name"] for row in facts["prepared"]] == ["resnet18"]
    assert len(facts["damaged"]) == 1
    assert json.loads(penult("backbones", "--prepared", "--prune", "--json")[1])["removed"] == 2
    assert list(store.iterdir()) == []
    assert penult("backbones", "--prune")[0] == penult("backbones", "resnet18", "--prepared")[0] == 2
