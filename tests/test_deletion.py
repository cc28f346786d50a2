"""Only what penult wrote, and can prove to be its own, is deleted: whatever lies beside it survives byte for byte."""

from __future__ import annotations

import ast
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import classifiers
from classifiers import demo
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.bundle_folder import install, refuse_existing, remove_leftovers
from classifiers.finetuning.checkpoints import LAST, Checkpoints
from classifiers.heads.registry import make_head
from classifiers.jobs import run
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import BackboneFacts, Layer, write_facts
from extractor.graphs.onnx_file import MARKER, data_files, remove_unfinished, replacing, save
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.preprocess import Preprocess
from store.cache import FeatureCache
from store.errors import OutputError, OutputExistsError, StorageError
from store.format import atomic
from store.format.lock import output_lock
from store.writer import open_writer
from tests.conftest import MakeDataset

from .test_house import REPO, SOURCES

Penult = Callable[..., tuple[int, str, str]]

HEX = "0123456789ab"
WEIGHTS = numpy_helper.from_array(np.random.default_rng(0).normal(0, 0.3, (16, 3, 8, 8)).astype(np.float32), "W")


def model() -> Any:
    nodes = [
        helper.make_node("Conv", ["pixels", "W"], ["map"], strides=[8, 8]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    ends = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 32, 32]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 16]),
    ]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], [WEIGHTS])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def hostile(path: Path, names: list[str]) -> Path:
    """A network that names files as its data, as anybody can write one."""
    made = model()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for name in names:
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", name
    path.write_bytes(made.SerializeToString())
    return path


def write_network(path: Path) -> Path:
    """A backbone file of penult's own."""
    made = model()
    preprocess = Preprocess(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    write_facts(made, BackboneFacts("tiny", "x", f"{1:064}", (Layer("last", "average", 16),), preprocess))
    save(made, path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("network") / "tiny.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, dataset: MakeDataset) -> Path:
    return dataset(tmp_path_factory.mktemp("photos"), {"ants": 8, "bees": 8})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, network: Path, photos: Path) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    run_extract(ImageFolder(photos), Backbone(str(network)), folder / "c.cache", Options(quiet=True))
    return classifiers.train(
        FeatureCache(folder / "c.cache"), folder / "c.head", make_head("logistic", C=1.0), TrainOptions(thumbnails=False)
    )


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every network were over 2 GB."""
    monkeypatch.setattr(onnx_file, "MAX_INLINE", 0)


def contents(root: Path, *but: Path) -> dict[str, Any]:
    """What lies below a folder: bytes, where links lead, which folders there are."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if not any(path == each or each in path.parents for each in but):
            found[str(path.relative_to(root))] = (
                str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
            )
    return found


def bystanders(folder: Path, stem: str) -> list[str]:
    """Files beside a model, with the names by which a hostile one names them."""
    (folder / "sub/dir").mkdir(parents=True)
    for name in ("photos.zip", "sub/dir/file", "../x", "../absolute", f"{stem}-00000003.data"):
        (folder / name).write_bytes(b"mine: " + name.encode())
    for name in (f"sub/{stem}-00000004.data", "../elsewhere", "../elsewhere too", "other-00000005.data"):
        (folder / name).write_bytes(MARKER + name.encode())
    (folder / f"{stem}-00000001.data").symlink_to("../elsewhere")
    (folder / f"{stem}-00000002.data").hardlink_to(folder / "../elsewhere too")
    hostile(folder / "another without a suffix", ["other-00000005.data"])
    own = [f"{stem}-0000000{i}.data" for i in (1, 2, 3)]
    inside = ["photos.zip", "sub/dir/file", f"sub/{stem}-00000004.data", "other-00000005.data", *own]
    return [*inside, "../x", str(folder.parent / "absolute"), "gone.data", "a\0b"]


# --- ONNX files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["export", "fuse", "extract"])
def test_what_a_hostile_file_names_survives_its_replacement(
    command: str, tmp_path: Path, network: Path, bundle: Bundle, photos: Path, penult: Penult
) -> None:
    folder = tmp_path / "folder"
    target, arguments = folder / "x.onnx", [command, network, "-o", folder / "x.onnx"]
    if command == "extract":
        shutil.copytree(bundle.path.with_name("c.cache"), folder)
        target, arguments = folder / "backbone.onnx", [command, photos, "-m", network, "-o", folder]
    elif command == "fuse":
        arguments[1] = bundle.path
    names = bystanders(folder, target.stem)
    hostile(target, names)
    mine = [target] if command != "extract" else [folder / name for name in ("shards", "samples.h5", "cache.json", target.name)]
    before = contents(tmp_path, *mine)
    code, _, err = penult(*arguments, "--overwrite")
    assert code == 0, err
    assert contents(tmp_path, *mine) == before
    assert onnx_file.external_files(onnx_file.read_model(target)) == []
    assert f"warning: the file that was {target} named " in err
    assert "and 6 more as its data: left there" in err, "of twelve names, ten of which are there"


def test_weights_beside_a_network_go_with_the_last_that_names_them(
    large: None, tmp_path: Path, network: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = numpy_helper.to_array(WEIGHTS).tobytes()
    x, y = tmp_path / "x.onnx", tmp_path / "y.onnx"

    def export() -> Path:
        with replacing(x) as new:
            save(onnx.load(network), new)
            onnx.checker.check_model(str(new))
        (data,) = data_files(x)
        assert data.read_bytes()[: len(MARKER)] == MARKER
        return data

    first = export()
    second = export()
    assert (first.exists(), second.exists()) == (False, True)
    shutil.copy(x, y)
    third = export()
    assert sorted(tmp_path.iterdir()) == sorted([x, y, second, third]), "the copy needs them"
    assert f"named '{second.name}' as its data: left there, because another model names it too" in caplog.text
    assert numpy_helper.to_array(onnx.load(y).graph.initializer[0]).tobytes() == whole
    y.rename(x)
    fourth = export()
    assert sorted(tmp_path.iterdir()) == sorted([x, third, fourth]), "nobody needs the second any more"
    fourth.write_bytes(fourth.read_bytes()[len(MARKER) :])  # as they were written before there was a mark
    export()
    assert fourth.exists()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_failed_save_leaves_nothing_and_takes_nothing(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Path
) -> None:
    tokens, urandom = iter([bytes(4), bytes([0, 0, 0, 1])]), os.urandom
    (tmp_path / "x-00000000.data").write_bytes(b"mine")
    with monkeypatch.context() as patched:
        patched.setattr(os, "urandom", lambda size: next(tokens) if size == 4 else urandom(size))
        save(onnx.load(network), tmp_path / "x.onnx")
    assert (tmp_path / "x-00000000.data").read_bytes() == b"mine"
    before = contents(tmp_path)
    monkeypatch.setattr(atomic, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x.onnx") as new:
        save(onnx.load(network), new)
    assert contents(tmp_path) == before


def test_what_a_killed_process_left_goes_unless_somebody_is_writing(large: None, tmp_path: Path, network: Path) -> None:
    with replacing(tmp_path / "x.onnx") as new:
        save(onnx.load(network), new)
        killed = contents(tmp_path)
        with ThreadPoolExecutor(1) as another:  # as another process would, at this moment
            another.submit(remove_unfinished, tmp_path / "x.onnx").result()
        assert contents(tmp_path) == killed
    made = contents(tmp_path)
    for name, data in killed.items():
        (tmp_path / name).write_bytes(data)
    for name in (f"..x.onnx.{HEX}.tmp.{HEX}.tmp", f".x-0123abcd.data.{HEX}.tmp"):
        (tmp_path / name).write_bytes(b"cut sh")
    theirs = [".x.onnx.backup.tmp", f".y.onnx.{HEX}.tmp", f".x.onnx.{HEX}", "x-notes.data", f".y-0123abcd.data.{HEX}.tmp"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "x-0123abcd.data").write_bytes(MARKER)  # of a model that was moved away, and may come back
    (tmp_path / f".x.onnx.{HEX[::-1]}.tmp").mkdir()
    (tmp_path / f".x.onnx.{HEX[2:]}00.tmp").symlink_to("x.onnx")
    with output_lock(tmp_path / "x.onnx"), ThreadPoolExecutor(1) as another:
        before = contents(tmp_path)
        another.submit(remove_unfinished, tmp_path / "x.onnx").result()
        assert contents(tmp_path) == before
    remove_unfinished(tmp_path / "x.onnx")
    left = contents(tmp_path)
    assert {name: left.pop(name) for name in made} == made
    links = {f".x.onnx.{HEX[::-1]}.tmp": "folder", f".x.onnx.{HEX[2:]}00.tmp": "x.onnx"}
    assert left == {**dict.fromkeys(theirs, b"mine"), "x-0123abcd.data": MARKER, **links}


def test_killed_at_any_moment_it_leaves_the_old_one_or_the_new_one_and_nothing_else_after_the_next_run(
    large: None, tmp_path: Path, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, states = tmp_path / "killed/x.onnx", list[dict[str, Any]]()
    x.parent.mkdir()

    def export(path: Path) -> list[Path]:
        with replacing(path) as new:
            save(onnx.load(network), new)
        return sorted([path, *data_files(path)])

    def observed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            states.append(contents(x.parent))
            return real(*given, **named)

        return call

    with monkeypatch.context() as patched:
        for name in ("write", "fsync", "link", "rename", "replace", "unlink"):
            patched.setattr(os, name, observed(getattr(os, name)))
        for _ in range(2):
            export(x)
    assert len(states) > 16
    for number, state in enumerate(states):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in state.items():
            (folder / name).write_bytes(data)
        if x.name in state:
            assert (
                numpy_helper.to_array(onnx.load(folder / x.name).graph.initializer[0]).tobytes()
                == numpy_helper.to_array(WEIGHTS).tobytes()
            )
        made = export(folder / x.name)
        assert sorted(folder.iterdir()) == made


# --- caches ------------------------------------------------------------------------------------------------------------


def test_a_folder_called_shards_makes_no_cache(tmp_path: Path, penult: Penult) -> None:
    for name, files in {
        "tars": ["shards/train-000.tar", ".notes.tmp", f".samples.h5.{HEX}.tmp"],
        "json": ["cache.json", "shards/a.tar"],
        "lock": [".lock", "samples.h5", f".cache.json.{HEX}.tmp"],
    }.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/shards").symlink_to(tmp_path / "tars/shards")
    before = contents(tmp_path)
    for name in ("tars", "json", "lock", "linked"):
        code, _, err = penult("compact", tmp_path / name, "--prune")
        assert (code, "exists and is not a penult cache" in err) == (73, True)
    assert contents(tmp_path) == before


def test_a_cache_keeps_what_is_not_its_own(tmp_path: Path, bundle: Bundle) -> None:
    cache = tmp_path / "c.cache"
    shutil.copytree(bundle.path.with_name("c.cache"), cache)
    theirs = [".notes.tmp", f".notes.{HEX}.tmp", "shards/a.tar", f"shards/.a.tar.{HEX}.tmp", ".samples.h5.backup.tmp"]
    for name in theirs:
        (cache / name).write_bytes(b"mine")
    (cache / ".work.tmp").mkdir()
    (cache / f".cache.json.{HEX}.tmp").mkdir()
    before = contents(cache)
    for name in (f".samples.h5.{HEX}.tmp", f"shards/.00001-{HEX}.h5.{HEX}.tmp"):
        (cache / name).write_bytes(b"cut sh")
    with open_writer(cache) as writer:
        assert contents(cache) == before
        writer.clear()
    left = contents(cache)
    assert [name for name in before if name not in left] == [
        "cache.json",
        "ledger.jsonl",
        "samples.h5",
        *(name for name in before if name.endswith(".h5") and name.startswith("shards/0")),
    ]
    with open_writer(cache):  # killed at this moment, it goes on
        pass


def test_a_cache_that_nothing_came_of_goes_alone(tmp_path: Path) -> None:
    def fail(cache: Path, file: str) -> None:
        with open_writer(cache):
            (cache / file).touch()
            raise ZeroDivisionError

    for name, file in (("empty", f".samples.h5.{HEX}.tmp"), ("used", "notes.txt")):
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / name / "c", file)
    assert list((tmp_path / "empty").iterdir()) == []
    assert sorted(contents(tmp_path / "used")) == ["c", "c/.lock", "c/notes.txt", "c/shards"]


def test_where_a_removed_file_stays_while_it_is_open_the_reason_is_said_and_the_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and FUSE rename such a file, so that its folder is not empty."""
    unlink, close, hidden = Path.unlink, os.close, tmp_path / "c/.nfs0001"

    def renamed(path: Path, missing_ok: bool = False) -> None:
        path.rename(hidden) if path.name == ".lock" else unlink(path, missing_ok=missing_ok)

    def closed(descriptor: int) -> None:
        last = hidden.exists() and os.path.samestat(os.fstat(descriptor), hidden.stat())
        close(descriptor)
        if last:
            unlink(hidden)

    monkeypatch.setattr(Path, "unlink", renamed)
    monkeypatch.setattr(os, "close", closed)
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "c"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_in_the_place_of_a_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OutputError, match="exists and is not a file"):
            atomic.commit(tmp_path / name, b"new")
    monkeypatch.setattr(os, "urandom", lambda _: bytes.fromhex(HEX))
    (tmp_path / f".final.{HEX}.tmp").write_bytes(b"another process's")
    with pytest.raises(StorageError, match="File exists"):
        atomic.commit(tmp_path / "final", b"new")
    assert (tmp_path / f".final.{HEX}.tmp").read_bytes() == b"another process's"


# --- bundles -----------------------------------------------------------------------------------------------------------


def test_a_bundle_is_replaced_where_it_is_one(tmp_path: Path, bundle: Bundle) -> None:
    shutil.copytree(bundle.path, tmp_path / "b.head")
    (tmp_path / "link.head").symlink_to("b.head")
    for name in ("page", "linked", "data", "folder", "named"):
        shutil.copytree(bundle.path, tmp_path / name)
    for path in (tmp_path / "page").iterdir():
        path.write_text("{}") if path.name in ("head.json", "report.html") else path.unlink()
    (tmp_path / "linked/report.html").unlink()
    (tmp_path / "linked/report.html").symlink_to("../b.head/report.html")
    (tmp_path / "data/backbone-of-mine.data").touch()
    (tmp_path / "named/backbone-12345678.data").write_text("mine, by chance with such a name")
    (tmp_path / "folder/predictions.h5").unlink()
    (tmp_path / "folder/predictions.h5").mkdir()
    before = contents(tmp_path)
    for name, reason in {
        "link.head": r"is a symbolic link, which is not overwritten; give its target instead: .*b\.head",
        "page": "is not a bundle; it is not overwritten",
        "linked": r"holds items that are not part of a bundle \(report\.html\)",
        "data": r"holds items that are not part of a bundle \(backbone-of-mine\.data\)",
        "folder": r"holds items that are not part of a bundle \(predictions\.h5\)",
        "named": r"holds items that are not part of a bundle \(backbone-12345678\.data\)",
    }.items():
        with pytest.raises(OutputExistsError, match=reason):
            refuse_existing(tmp_path / name, overwrite=True)
        with pytest.raises(OutputExistsError, match=reason):
            install(tmp_path / "b.head", tmp_path / name)
    assert contents(tmp_path) == before
    (tmp_path / "b.head/head.json").write_bytes(b"damaged")
    (tmp_path / "b.head/backbone-0123abcd.data").write_bytes(onnx_file.MARKER)
    refuse_existing(tmp_path / "b.head", overwrite=True)


def test_what_killed_runs_left_of_a_bundle(tmp_path: Path, bundle: Bundle) -> None:
    shutil.copytree(bundle.path, tmp_path / "b.head")
    unfinished, of_a_job, old = (tmp_path / f".b.head.{HEX}{end}" for end in (".tmp", f".tmp.{HEX}.tmp", ".old"))
    of_a_job = tmp_path / f".b.head.{HEX[::-1]}.tmp"
    for path in (unfinished, old, of_a_job / "b.head", of_a_job / f".b.head.{HEX}.tmp"):
        shutil.copytree(bundle.path, path)
    (unfinished / f".report.html.{HEX}.tmp").touch()
    theirs = [tmp_path / f".c.head.{HEX}.tmp", tmp_path / ".b.head.backup.tmp", tmp_path / ".b.head.old"]
    for path in theirs:
        shutil.copytree(bundle.path, path)
    (unfinished / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path / "b.head")
    assert [path.name for path in unfinished.iterdir()] == ["notes.txt"]
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "b.head", unfinished, *theirs])
    old.mkdir()
    shutil.rmtree(tmp_path / "b.head")
    remove_leftovers(tmp_path / "b.head")
    assert old.exists(), "it may be the only one"


def test_a_job_takes_no_other_folder_for_its_rejected_bundle(
    tmp_path: Path, network: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "j.toml").write_text(f'data = "{photos}"\ncache = "c"\nbundle = "b"\n[backbone]\nname = "{network}"\n')
    (tmp_path / "b.rejected").mkdir()
    (tmp_path / "b.rejected/thesis.txt").write_text("years of work")
    monkeypatch.setattr(run, "run_extract", None)  # it is refused before
    with pytest.raises(OutputExistsError, match=r"b\.rejected exists and is not a bundle"):
        run.run_job(tmp_path / "j.toml")


def test_an_unfinished_fine_tuning_takes_its_own_files_along(tmp_path: Path) -> None:
    kept = Checkpoints.beside(tmp_path / "b.head", "", overwrite=False)
    for notes in ([], ["notes.txt", ".last.ckpt.backup.tmp"]):
        with kept.held():
            for name in (LAST, f".{LAST}.{HEX}.tmp", *notes):
                (kept.folder / name).touch()
        kept.remove()
        assert sorted(contents(tmp_path)) == sorted(
            [kept.folder.name, *(f"{kept.folder.name}/{name}" for name in notes)] if notes else []
        )


def test_the_demo_replaces_what_it_wrote(tmp_path: Path) -> None:
    demo.make_room(tmp_path / "demo", overwrite=False)
    for change in ("digits/3/notes.txt", "digits/3/0000.png", "digits/3/0003.png", "mlp.head/thesis.txt"):
        out = tmp_path / change.replace("/", "-")
        shutil.copytree(tmp_path / "demo", out)
        demo.write_digits(out / "digits", limit=3)
        (out / change).parent.mkdir(exist_ok=True, parents=True)
        (out / change).symlink_to(out / demo.MARKER) if "0003" in change else (out / change).write_text("mine")
        before = contents(out)
        with pytest.raises(OutputExistsError, match=r"is not part of the demo; move it away|is not a bundle"):
            demo.make_room(out, overwrite=True)
        assert contents(out) == before
    demo.write_digits(tmp_path / "demo/digits", limit=3)
    (tmp_path / "demo/thesis.txt").write_text("mine")
    (tmp_path / "demo" / demo.MARKER).unlink()
    (tmp_path / "demo" / demo.MARKER).symlink_to("thesis.txt")
    demo.make_room(tmp_path / "demo", overwrite=True)
    assert (tmp_path / "demo/thesis.txt").read_text() == "mine"
    assert [path for path in (tmp_path / "demo/digits").rglob("*") if path.is_file()] == []


# --- the inventory -----------------------------------------------------------------------------------------------------

PLACES = {  # where something is deleted or replaced; whoever adds one says in its docstring how it is proven to be ours
    "store/format/atomic.py": {"unlink": 2, "rename": 1},  # our temporary names; the file that was asked for
    "store/format/lock.py": {"unlink": 2},  # an empty lock file, while its lock is held, or that cannot be locked
    # the files of a cache, under its lock; a shard whose rows all stand in sound others; a new cache that stayed empty
    "store/writer.py": {"unlink": 5, "rmdir": 3},
    "store/compact.py": {"unlink": 1},  # a shard that was verified and whose rows stand in a new one
    "extractor/graphs/onnx_file.py": {
        "unlink": 5,
        "rename": 2,
        "replace": 1,
    },  # a model under a temporary name; data that is marked as ours
    # folders with the name of an entry, in which every file has a name that an entry's files have
    "extractor/graphs/prepared_entry.py": {"rename": 2, "unlink": 1, "rmdir": 1},
    "extractor/pipeline/prepare.py": {"replace": 1},  # one temporary name by another
    "extractor/backbones/weights.py": {"unlink": 2, "rename": 1},  # downloads; a file of torchvision's that is damaged
    # the files of a bundle, and its empty lock file; a folder of nothing else; the old bundle that is replaced
    "classifiers/bundles/bundle_folder.py": {"unlink": 3, "rmdir": 2, "rename": 5, "replace": 1},
    "classifiers/finetuning/checkpoints.py": {"unlink": 3, "rmdir": 1},  # the files of an unfinished fine-tuning
    "classifiers/finetuning/ranks.py": {"unlink": 1},  # failure.json of an unfinished fine-tuning
    "classifiers/demo.py": {"unlink": 1},  # digits
}


def test_these_are_all_the_places_that_delete() -> None:
    found: dict[str, dict[str, int]] = {}
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        named = [(node.func.attr, node) for node in calls if isinstance(node.func, ast.Attribute)]
        kinds = Counter(
            name
            for name, node in named
            if name in ("unlink", "rmdir", "rmtree", "removedirs", "rename", "renames", "move", "truncate")
            or (name == "replace" and len(node.args) == 1 and not node.keywords)
            or ast.unparse(node.func) in ("os.remove", "os.replace")
        )
        if kinds:
            found[str(path.relative_to(REPO))] = dict(kinds)
    assert found == PLACES
