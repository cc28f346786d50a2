"""Tar shards: grouping, labels, splits, damage, hostile names, and reading where they lie."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.samples import Sample
from extractor.data.sources import open_source
from extractor.data.tar_shards import TarFiles, TarShards
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.images import ImageError
from store.cache import FeatureCache
from store.errors import BadDataError, InputMissingError, UsageError
from store.tasks import Task

Members = Mapping[str | bytes, bytes | str | dict[str, Any]]


def shard(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(os.fsdecode(name))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def listing(path: Path, **options: Any) -> list[Sample]:
    found = open_source(path, **options)
    assert isinstance(found, TarShards)
    return found.samples()


# --- what is in a shard ------------------------------------------------------------------------------------------------


def test_keys_of_json_count_in_any_case_and_unused_ones_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``Split`` and ``Group`` were ignored without a word, and the user's test set and patients with them."""
    facts = {"Label": "ants", "SPLIT": "Test", "Group": "p1", "width": 4, "class": 3}
    assert listing(shard(tmp_path / "a.tar", {"0.jpg": b"", "0.json": facts})) == [
        Sample(b"a.tar/0.jpg", "ants", "test", b"p1")
    ]
    assert caplog.messages == [f"{tmp_path / 'a.tar'}: these keys of its .json are not used: 'width' and 'class'"]
    with pytest.raises(BadDataError, match="it has two keys 'split' that differ in case alone; rename or remove one of them"):
        listing(shard(tmp_path / "a.tar", {"0.jpg": b"", "0.json": {"split": "train", "Split": "test"}}))


@pytest.mark.parametrize("labels", [{"0.cls": "nan"}, {"0.json": {"label": float("nan")}}, {"0.json": {"class": "<NA>"}}])
def test_a_label_that_stands_for_an_empty_cell_is_refused(tmp_path: Path, labels: Members) -> None:
    with pytest.raises(BadDataError, match=r"the labels of a\.tar/0\.jpg: the label is nan, which pandas writes"):
        listing(shard(tmp_path / "a.tar", {"0.jpg": b"", **labels}))


def test_members_of_one_key_are_one_sample(tmp_path: Path) -> None:
    members: Members = {
        "000.jpg": b"zero",
        "000.cls": "ants\n",
        "001.json": {"label": "bees", "split": "Train", "group": 7},
        "001.PNG": b"one",
        "sub/000.jpeg": b"two",
        "sub/000.json": {"class": 3},
        "sub/000.txt": "a caption",
        "./003.webp": b"three",
        "003.cls": "5",
        "003.json": {"label": "left to the .cls"},
    }
    with pytest.raises(BadDataError, match=r"3 of 4 rows have no split \(such as a.tar/000.jpg\)"):
        listing(shard(tmp_path / "a.tar", members))
    members["001.json"]["split"] = ""
    assert listing(shard(tmp_path / "a.tar", members)) == [
        Sample(b"a.tar/000.jpg", "ants"),
        Sample(b"a.tar/001.PNG", "bees", None, b"7"),
        Sample(b"a.tar/003.webp", "5"),
        Sample(b"a.tar/sub/000.jpeg", "3"),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_names_that_are_not_utf8(tmp_path: Path, form: int) -> None:
    long = "folder/" + "x" * 90
    path = shard(tmp_path / "a.tar", {b"caf\xe9.jpg": b"1", f"{long}.jpg": b"22", "ü.jpg": b"333"}, form)
    found = TarShards(path)
    expected = [b"a.tar/caf\xe9.jpg", f"a.tar/{long}.jpg".encode(), "a.tar/ü.jpg".encode()]
    assert [sample.path for sample in found.samples()] == sorted(expected)
    assert [found.files.read(path)[0] for path in expected] == [b"1", b"22", b"333"]


def test_what_belongs_to_no_image_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": "a", "1.cls": "b", "._0.jpg": b"", "0.seg.png": b"mask"})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.jpg" if kind == tarfile.SYMTYPE else "folder")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with caplog.at_level(logging.WARNING):
        assert listing(path) == [Sample(b"a.tar/0.jpg", "a")]
    assert "4 member(s)" in caplog.text
    assert "a sample is KEY.jpg with KEY.cls or KEY.json" in caplog.text


def test_names_with_dots_of_their_own_are_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of hymenoptera's 398 photos has such a name."""
    path = shard(
        tmp_path / "a.tar",
        {"x/F.28(f).jpg": b"1", "x/F.28(f).cls": "ants", "IMG.1.png": b"2", "IMG.2.png": b"3", "IMG.2.json": {"label": "b"}},
    )
    assert listing(path) == [
        Sample(b"a.tar/IMG.1.png"),
        Sample(b"a.tar/IMG.2.png", "b"),
        Sample(b"a.tar/x/F.28(f).jpg", "ants"),
    ]
    assert "belong to no image" not in caplog.text


def test_images_without_labels_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "a.tar", {"ants/0.jpg": b"x", "bees/0.jpg": b"y", "2.jpg": b"z", "2.cls": "ants"})
    with caplog.at_level(logging.WARNING):
        assert [sample.label for sample in listing(path)] == ["ants", None, None]
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 3 images in {path} have no label: no .cls, and none in a .json"
    ]


def test_targets_and_several_labels_come_from_json(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        {
            "0.jpg": b"x",
            "0.json": {"label": ["sky", "sea"], "weight": 1.5},
            "1.jpg": b"y",
            "1.json": {"label": "sea|sky", "weight": None},
            "2.jpg": b"z",
            "2.json": {"label": []},
        },
    )
    assert [s.label for s in listing(path, task="multi-label")] == ["sky|sea", "sea|sky", None]
    with pytest.raises(BadDataError, match=r"a.tar/0.jpg: \['sky', 'sea'\] is neither text"):
        listing(path)
    with pytest.raises(BadDataError, match=r"no .json has a number 'wieght' for --target"):
        TarShards(
            shard(tmp_path / "b.tar", {"0.jpg": b"x", "0.json": {"weight": 1}}), task=Task.named("regression", ("wieght",))
        ).samples()
    found = listing(tmp_path / "b.tar", task="regression", targets=["weight"])
    assert [sample.targets for sample in found] == [(1.0,)]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.jpg": b"x", "0.png": b"y"}, "a.tar: 0 has 2 images; expected one for each key"),
        ({"0.jpg": b"x", "0.json": "{"}, "a.tar/0.json is not usable JSON text: Expecting property name"),
        ({"0.jpg": b"x", "0.json": "[" * 100_000}, "a.tar/0.json is not usable JSON text: "),
        ({"0.jpg": b"x", "0.json": "[1]"}, r"a.tar/0.json is not usable JSON text: expected an object, found \[1\]"),
        ({"0.jpg": b"x", "0.cls": b"\xff\xfe"}, "a.tar/0.cls is not usable UTF-8 text"),
        ({"0.jpg": b"x", "0.cls": b"x" * (2**20 + 1)}, "a.tar/0.cls .* larger than 1048576 bytes"),
        ({"0.jpg": b"x", "0.json": {"split": "dev"}}, "a.tar/0.jpg: split 'dev'; expected train, val or test"),
        ({"0.jpg": b"x", "0.json": {"label": {"id": 1}}}, "a.tar/0.jpg: {'id': 1} is neither text"),
        ({"../0.jpg": b"x"}, r"a.tar holds \.\./0.jpg, a name that leaves the archive; refused"),
        ({"/etc/0.jpg": b"x"}, "a.tar holds /etc/0.jpg, a name that leaves the archive; refused"),
        ({"0.jpg": b"x", "./0.jpg": b"y"}, "a.tar holds 0.jpg twice"),
    ],
)
def test_a_bad_shard_is_refused_naming_the_member(tmp_path: Path, members: Members, reason: str) -> None:
    with pytest.raises(BadDataError, match=reason) as caught:
        listing(shard(tmp_path / "a.tar", members))
    assert caught.value.exit_code == 65


# --- damage ------------------------------------------------------------------------------------------------------------


def test_a_shard_cut_at_any_place_is_refused_by_name(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", {f"{i}.{e}": bytes([i]) * 700 for i in range(4) for e in ("jpg", "txt")}).read_bytes()
    length = whole.rstrip(b"\0").__len__()
    for cut in [0, 1, 100, 511, 512, 600, 1000, 1536, 1537, 2048, 4000, length - 1, length]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(BadDataError, match=r"cut\.tar (does not end|is not a valid tar)"):
            listing(tmp_path / "cut.tar")


def test_a_damaged_header_does_not_end_the_shard_in_silence(tmp_path: Path) -> None:
    whole = bytearray(shard(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 100 for i in range(4)}, tarfile.USTAR_FORMAT).read_bytes())
    whole[2 * 1024 + 10] ^= 1
    (tmp_path / "bad.tar").write_bytes(whole)
    with pytest.raises(BadDataError, match=r"bad\.tar does not end as a tar file does: it was cut, damaged, or joined"):
        listing(tmp_path / "bad.tar")


def test_shards_joined_by_cat_are_refused(tmp_path: Path) -> None:
    one = shard(tmp_path / "a.tar", {"0.jpg": b"x"}).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + shard(tmp_path / "b.tar", {"1.jpg": b"y"}).read_bytes())
    with pytest.raises(BadDataError, match="joined from several"):
        listing(tmp_path / "joined.tar")


def test_a_size_below_zero_does_not_loop(tmp_path: Path) -> None:
    whole = bytearray(shard(tmp_path / "a.tar", {f"{i}.jpg": b"x" for i in range(2)}, tarfile.GNU_FORMAT).read_bytes())
    header = tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT)
    header = header[:124] + tarfile.itn(-1024, 12, tarfile.GNU_FORMAT) + header[136:]
    checksum = sum(header[:148]) + 8 * 32 + sum(header[156:512])
    whole[1024:1536] = header[:148] + f"{checksum:06o}\0 ".encode() + header[156:512]
    (tmp_path / "back.tar").write_bytes(whole)
    with pytest.raises(BadDataError, match=r"back\.tar is (damaged at 1\.jpg|not a valid)"):
        listing(tmp_path / "back.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_tars_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UsageError, match=r"decompress it first, and name the \.tar"):
        open_source(tmp_path / name)
    with pytest.raises(BadDataError, match=rf"{name} is compressed.* Decompress it .*{name}"):
        open_source(tmp_path)


def test_a_compressed_tar_by_another_name_is_found_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(BadDataError, match=r"a\.tar is compressed"):
        listing(tmp_path / "a.tar")


# --- folders of shards -------------------------------------------------------------------------------------------------


def test_shards_of_a_folder_and_splits_from_their_names(tmp_path: Path) -> None:
    for name in ("train-000", "train_001", "Val", "test.0"):
        shard(tmp_path / f"{name}.tar", {"0.jpg": b"x", "0.cls": "a"})
    found = listing(tmp_path)
    assert [(sample.path, sample.split) for sample in found] == [
        (b"Val.tar/0.jpg", "val"),
        (b"test.0.tar/0.jpg", "test"),
        (b"train-000.tar/0.jpg", "train"),
        (b"train_001.tar/0.jpg", "train"),
    ]
    shard(tmp_path / "trainer.tar", {"0.jpg": b"x", "0.cls": "a"})
    with pytest.raises(BadDataError, match=r"1 of 5 rows have no split \(such as trainer.tar/0.jpg\)"):
        listing(tmp_path)


def test_splits_from_folders_of_shards(tmp_path: Path) -> None:
    for name in ("training/000", "training/001", "valid/000"):
        shard(tmp_path / f"{name}.tar", {"0.jpg": b"x", "0.cls": "a"})
    assert [(sample.path, sample.split) for sample in listing(tmp_path)] == [
        (b"training/000.tar/0.jpg", "train"),
        (b"training/001.tar/0.jpg", "train"),
        (b"valid/000.tar/0.jpg", "val"),
    ]


def test_folders_of_images_stay_what_they_are(tmp_path: Path) -> None:
    shard(tmp_path / "backup.tar", {"0.jpg": b"x"})
    (tmp_path / "ants").mkdir()
    (tmp_path / "ants/0.jpg").write_bytes(b"x")
    assert open_source(tmp_path) == ImageFolder(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/0.jpg").write_bytes(b"x")
    assert open_source(tmp_path / "flat") == ImageFolder(tmp_path / "flat")
    shard(tmp_path / "flat/backup.tar", {"0.jpg": b"x"})
    with pytest.raises(BadDataError, match=r"holds tar shards and images \(backup.tar, 0.jpg\)"):
        open_source(tmp_path / "flat")


def test_shards_that_are_links_are_followed_where_asked_for(tmp_path: Path) -> None:
    shard(tmp_path / "there/0.tar", {"0.jpg": b"x"})
    (tmp_path / "here").mkdir()
    (tmp_path / "here/0.tar").symlink_to("../there/0.tar")
    assert isinstance(open_source(tmp_path / "here"), ImageFolder)
    assert [sample.path for sample in listing(tmp_path / "here", follow_symlinks=True)] == [b"0.tar/0.jpg"]


def test_no_image_and_no_file_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no files in"):
        listing(shard(tmp_path / "a.tar", {"0.cls": "x"}))
    with pytest.raises(InputMissingError, match=r"cannot read .*gone\.tar: No such file"):
        TarShards(tmp_path / "gone.tar").samples()


# --- reading -----------------------------------------------------------------------------------------------------------


def test_a_member_is_read_where_it_lies(tmp_path: Path) -> None:
    path = shard(tmp_path / "deep/a.tar", {"0.jpg": b"zero", "b.tar/1.jpg": b"one"})
    files = TarFiles(tmp_path)
    stat = path.stat()
    assert files.read(b"deep/a.tar/0.jpg") == (b"zero", (4, stat.st_mtime_ns, stat.st_ino))
    assert files.stat(b"deep/a.tar/b.tar/1.jpg") == (3, stat.st_mtime_ns, stat.st_ino)
    for gone in (b"deep/a.tar/2.jpg", b"a.tar/0.jpg", b"deep/0.jpg"):
        assert files.stat(gone) is None
        with pytest.raises(ImageError) as caught:
            files.read(gone)
        assert caught.value.code == "not_found"


def test_a_shard_that_changes_while_it_is_read_gives_no_wrong_bytes(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"0.jpg": b"zero", "1.jpg": b"one"})
    files = TarFiles(tmp_path)
    assert files.read(b"a.tar/0.jpg")[0] == b"zero"
    path.unlink()
    with pytest.raises(ImageError, match=r"a\.tar is gone") as caught:
        files.read(b"a.tar/1.jpg")
    assert caught.value.code == "not_found"
    shard(path, {"other.jpg": b"other", "1.jpg": b"one"})
    with pytest.raises(ImageError, match=r"a\.tar changed while it was read") as caught:
        files.read(b"a.tar/1.jpg")
    assert caught.value.code == "changed"


def test_a_second_run_computes_nothing_and_a_changed_shard_what_is_new(
    dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    images = {path.name: path.read_bytes() for path in sorted((dataset(tmp_path / "p", {"a": 8}) / "a").iterdir())}
    labels = {f"{name[:3]}.cls": "ab"[i % 2] for i, name in enumerate(images)}
    path = shard(tmp_path / "a.tar", {**images, **labels})
    options = Options(quiet=True, val_fraction=0, test_fraction=0)
    first = run_extract(TarShards(path), backbone, tmp_path / "c", options)
    assert (first.ok, first.computed, first.failed) == (8, 8, 0)
    second = run_extract(TarShards(path), backbone, tmp_path / "c", options)
    assert (second.computed, second.inference_calls) == (0, 0)
    shard(path, {**images, **labels, "000.jpg": dataset(tmp_path / "q", {"a": 1}, seed=5).joinpath("a/000.jpg").read_bytes()})
    assert run_extract(TarShards(path), backbone, tmp_path / "c", options).computed == 1
    shard(path, {**images, "bad.jpg": b"not an image"})
    third = run_extract(TarShards(path), backbone, tmp_path / "c", options)
    assert (third.computed, third.codes) == (0, {"not_an_image": 1})
    assert FeatureCache(tmp_path / "c").samples.facts["source"] == "tar"


def test_a_tar_a_list_and_a_folder_give_the_same_features(
    dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    folder = dataset(tmp_path / "photos", {"ants": 7, "bees": 6})
    members: dict[str | bytes, bytes | str | dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.jpg")):
        key = f"{path.parent.name}-{path.stem}"
        members |= {f"{key}.jpg": path.read_bytes(), f"{key}.cls": path.parent.name}
    half = 2 * 7
    shard(tmp_path / "tars/0.tar", dict(list(members.items())[:half]))
    shard(tmp_path / "tars/1.tar", dict(list(members.items())[half:]))
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"{p.relative_to(folder)},{p.parent.name}\n" for p in folder.rglob("*.jpg"))
    )
    found = []
    for i, data in enumerate((folder, tmp_path / "tars", tmp_path / "list.csv")):
        source = open_source(data, root=folder if data.suffix == ".csv" else None)
        run_extract(source, backbone, tmp_path / f"{i}.cache", Options(quiet=True, batch_size=4))
        found.append(FeatureCache(tmp_path / f"{i}.cache"))
    for other in found[1:]:
        assert [(r.sha256, r.label, r.split) for r in other.rows()] == [(r.sha256, r.label, r.split) for r in found[0].rows()]
        np.testing.assert_array_equal(other.subset().X, found[0].subset().X)
