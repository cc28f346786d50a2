"""Lists of images as a table: Parquet, awkward CSV, size, links, targets."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extractor.backbones.registry import Backbone
from extractor.data.labels import labels_of, say_labels
from extractor.data.manifest import Manifest
from extractor.data.samples import Sample
from extractor.data.sources import open_source
from extractor.pipeline.plan import preview
from extractor.pipeline.settings import Options
from extractor.pixels.images import ImageError
from store.errors import BadDataError, InputMissingError, UsageError
from store.tasks import MISSING, Task

MULTI = Task.named("multi-label")


def csv(folder: Path, content: bytes | str, **options: Any) -> list[Sample]:
    path = folder / "list.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Manifest(path, folder, **options).samples()


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> list[Sample]:
    pq.write_table(pa.table(columns), folder / "list.parquet")
    found = open_source(folder / "list.parquet", **options)
    assert isinstance(found, Manifest)
    return found.samples()


# --- Parquet -----------------------------------------------------------------------------------------------------------


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    columns = {
        "note": [[1], [2], [3]],
        "path": ["b.jpg", "./a.jpg", "c/ü.jpg"],
        "label": pa.array(["ants", " bees ", None]).dictionary_encode(),
        "split": ["train", "VALID", "test"],
        "group": ["p1", "p2", None],
    }
    assert parquet(tmp_path, columns) == [
        Sample(b"a.jpg", "bees", "val", b"p2"),
        Sample(b"b.jpg", "ants", "train", b"p1"),
        Sample("c/ü.jpg".encode(), None, "test", b""),
    ]


def test_parquet_paths_may_be_binary_and_labels_whole_numbers(tmp_path: Path) -> None:
    found = parquet(tmp_path, {"path": [b"caf\xe9.jpg", b"b.jpg"], "label": pa.array([7, 10], pa.int8())})
    assert found == [Sample(b"b.jpg", "10"), Sample(b"caf\xe9.jpg", "7")]


def test_a_group_column_of_parquet_by_its_name(tmp_path: Path) -> None:
    found = parquet(tmp_path, {"path": ["a", "b"], "patient": [17, 17]}, group_by="patient")
    assert [sample.group for sample in found] == [b"17", b"17"]


def test_columns_of_parquet_may_have_blanks_around_their_names_and_unused_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They were ignored without a word, and the user's test set with them."""
    found = parquet(tmp_path, {"path": ["a"], " label ": ["ants"], "Split ": ["test"], "subset": ["x"], "pixels": [b"..."]})
    assert found == [Sample(b"a", "ants", "test")]
    assert caplog.messages == [f"{tmp_path / 'list.parquet'}: these columns are not used: 'subset' and 'pixels'"]
    with pytest.raises(BadDataError, match=r"no column 'y' for --target \(found: path, Y\)"):
        parquet(tmp_path, {"path": ["a"], "Y": [1.0]}, task="regression", targets=["y"])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"path": ["a"], "group": [0.5]}, "row 1: group 0.5 is neither text nor a whole number"),
        ({"file": ["a"], "label": ["x"]}, r"no column 'path' .*\(found: file, label\)"),
        ({"path": ["a", "b", "./a"]}, "row 3: a is already in row 1"),
        ({"path": ["a", "../b"]}, r"row 2: \.\./b leaves the root"),
        ({"path": ["a", "/b"]}, "row 2: /b leaves the root"),
        ({"path": ["a", None]}, "row 2: empty path"),
        ({"path": ["a\0b"]}, "row 1: .* leaves the root"),
        ({"path": ["a"], "label": [1.5]}, "row 1: 1.5 is neither text nor a whole number"),
        ({"path": ["a"], "label": [True]}, "row 1: True is neither"),
        ({"path": ["a", "b"], "split": ["train", "dev"]}, "row 2: split 'dev'; expected train, val or test"),
        ({"path": ["a", "b"], "split": ["train", None]}, "1 of 2 rows have no split"),
    ],
)
def test_bad_parquet_is_refused_with_its_row(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadDataError, match=reason):
        parquet(tmp_path, columns)


@pytest.mark.parametrize("keep", [0, 4, 40, -4])
def test_a_cut_parquet_file_is_bad_data(tmp_path: Path, keep: int) -> None:
    parquet(tmp_path, {"path": ["a", "b"]})
    whole = (tmp_path / "list.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:keep])
    with pytest.raises(BadDataError, match=r"cut\.parquet is not a valid Parquet file"):
        open_source(tmp_path / "cut.parquet").samples()


def test_no_rows_and_no_file_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no files"):
        parquet(tmp_path, {"path": pa.array([], pa.string())})
    with pytest.raises(InputMissingError, match=r"cannot read .*gone\.parquet"):
        Manifest(tmp_path / "gone.parquet", tmp_path).samples()


# --- CSV as people have it ---------------------------------------------------------------------------------------------


def test_names_of_columns_are_stripped(tmp_path: Path) -> None:
    assert csv(tmp_path, "path, label , group\na.jpg, ants,p1\n") == [Sample(b"a.jpg", "ants", None, b"p1")]


def test_the_case_of_column_names_does_not_matter(tmp_path: Path) -> None:
    expected = [Sample(b"a.jpg", "ants", "test", b"p1"), Sample(b"b.jpg", "bees", "train", b"p2")]
    assert csv(tmp_path, "Path,LABEL,Split,Group\na.jpg,ants,Test,p1\nb.jpg,bees,Train,p2\n") == expected
    columns = {"Path": ["a.jpg", "b.jpg"], "Label": ["ants", "bees"], "SPLIT": ["test", "train"], "Group": ["p1", "p2"]}
    assert parquet(tmp_path, columns) == expected
    with pytest.raises(BadDataError, match=r"two columns are called 'Split' and 'split'; rename or remove one of them"):
        csv(tmp_path, "path,split,Split\na.jpg,train,test\n")
    targets = Task.named("regression", ["Label"])  # what is asked for by its name keeps it
    assert csv(tmp_path, "path,Label,label\na.jpg,1.5,ants\n", task=targets)[0].targets == (1.5,)


def test_columns_that_are_not_used_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    csv(tmp_path, "path,label,lable,camera,a,b,c,d\n" + "".join(f"{i}.jpg,x,,,,,,\n" for i in range(3)))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "these columns are not used: 'lable', 'camera', 'a', 'b', 'c' and 1 more"
    ]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_with_its_mark_is_read(tmp_path: Path, encoding: str) -> None:
    assert csv(tmp_path, "\ufeffpath,label\nü.jpg,bées\n".encode(encoding)) == [Sample("ü.jpg".encode(), "bées")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path;label\na.jpg;ants\n", r"no column 'path' .* separated by ';': save it with commas"),
        (
            "path,label\na.jpg,ants\n".encode("utf-16-le"),
            "looks like UTF-32, or like UTF-16 without a byte-order mark; save",
        ),
        ("path,label\na.jpg,ants\n".encode("utf-32"), "looks like UTF-32"),
        (b"\xff\xfepath,label\n", "begins like UTF-16 but is not valid .*; save it as UTF-8"),
        ("path,label,path\na,b,c\n", "two columns are called 'path'"),
        ("path, path\na,b\n", "two columns are called 'path'"),
        ("path,label,note\na.jpg,ants\n", "line 2: fewer fields than the header has"),
        ("path,label\na.jpg,ants\n\nb.jpg,ants,x\n", "line 4: more fields than the header has"),
        ("path\na//b.jpg\na/./b.jpg\n", "line 3: a/b.jpg is already in line 2"),
        ("path\n//etc/passwd\n", "line 2: /etc/passwd leaves the root"),
        ("path\n./\n", "line 2: empty path"),
        ("path\tlabel\na.jpg\tants\n", r"no column 'path' .*look separated by tabs: save it with commas"),
        ('path, "label"\na.jpg, "ants"\n', 'a column is called "label": remove the blanks between its commas'),
        ("path,group\na.jpg,p1\nb.jpg, nan\n", "line 3: the group is nan, which pandas writes for an empty cell"),
        (b"path\n" + b"a" * 200_000 + b"\n", "line 2: field larger than field limit"),
    ],
)
def test_awkward_csv_is_refused_with_what_is_wrong(tmp_path: Path, content: str | bytes, reason: str) -> None:
    with pytest.raises(BadDataError, match=reason):
        csv(tmp_path, content)


def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    rows = [b"d%02d/caf\xe9 %06d.jpg,class %d,p%d" % (i % 100, i, i % 37, i // 3) for i in range(100_000)]
    begin = time.process_time()
    found = csv(tmp_path, b"\n".join([b"path,label,group", *rows]))
    assert time.process_time() - begin < 10  # measured: 0.8 s; 1.6 s on a busy machine
    assert len(found) == 100_000
    assert found[0] == Sample(b"d00/caf\xe9 000000.jpg", "class 0", None, b"p0")
    with pytest.raises(BadDataError, match=r"line 100002: d00/caf\\xe9 000000\.jpg is already in line 2"):
        csv(tmp_path, b"\n".join([b"path,label,group", *rows, rows[0]]))
    with pytest.raises(BadDataError, match=r"line 50002: \.\./x leaves the root"):
        csv(tmp_path, b"\n".join([b"path,label,group", *rows[:50_000], b"../x,a,b", *rows[50_000:]]))


# --- links -------------------------------------------------------------------------------------------------------------


def test_links_out_of_the_root_are_read_only_where_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (root / "real/a.jpg", tmp_path / "outside/b.jpg"):
        path.write_bytes(path.name.encode())
    (root / "inner.jpg").symlink_to("real/a.jpg")
    (root / "folder").symlink_to("real")
    (root / "file.jpg").symlink_to(tmp_path / "outside/b.jpg")
    (root / "out").symlink_to(tmp_path / "outside")
    closed, followed = (Manifest(tmp_path / "l.csv", root, follow_symlinks=follow).files for follow in (False, True))
    for path, content in ((b"real/a.jpg", b"a.jpg"), (b"inner.jpg", b"a.jpg"), (b"folder/a.jpg", b"a.jpg")):
        assert closed.read(path)[0] == followed.read(path)[0] == content
    for path in (b"file.jpg", b"out/b.jpg"):
        assert followed.read(path)[0] == b"b.jpg"
        with pytest.raises(ImageError, match=r"leaves the root \(--follow-symlinks follows it\)") as caught:
            closed.read(path)
        assert caught.value.code == "unreadable"
    with pytest.raises(ImageError, match="no such file"):
        closed.read(b"gone/x.jpg")


def test_a_root_that_is_a_link_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.jpg").write_bytes(b"x")
    (tmp_path / "link").symlink_to("root")
    assert Manifest(tmp_path / "l.csv", tmp_path / "link").files.read(b"a.jpg")[0] == b"x"
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert Manifest(Path("l.csv"), Path()).files.read(b"root/a.jpg")[0] == b"x"
    finally:
        os.chdir(before)


# --- several labels, and numbers ---------------------------------------------------------------------------------------


def test_several_labels_keep_their_order(tmp_path: Path) -> None:
    found = csv(tmp_path, "path,label\na,sky| sea \nb,\nc,sea\n", task=MULTI)
    assert [sample.label for sample in found] == ["sky|sea", None, "sea"]
    assert [sample.label for sample in csv(tmp_path, "path,label\na,sky|sea\n")] == ["sky|sea"]


@pytest.mark.parametrize("label", ["sky|sky", "sky||sea", "|", "sky|"])
def test_labels_named_twice_or_empty_are_refused_with_their_line(tmp_path: Path, label: str) -> None:
    with pytest.raises(BadDataError, match=r"line 3: labels .*; expected different names with '\|' between them"):
        csv(tmp_path, f"path,label\na,sea\nb,{label}\n", task=MULTI)


def test_numeric_targets_of_both_formats(tmp_path: Path) -> None:
    task = Task.named("regression", ("weight", "age"))
    expected = [
        Sample(b"a", None, None, b"", (1.5, 3.0)),
        Sample(b"b", None, None, b"", (MISSING, -1e3)),
    ]
    assert csv(tmp_path, "path,age,weight\na, 3 ,1.5\nb,-1e3,\n", task=task) == expected
    columns = {"path": ["a", "b"], "age": [3, -1000], "weight": [1.5, None]}
    assert parquet(tmp_path, columns, task="regression", targets=["weight", "age"]) == expected
    assert math.isnan(MISSING)


@pytest.mark.parametrize("number", ["inf", "nan", "-Infinity", "1e999", "3 kg", "1_000", '"1,5"', "0x10"])
def test_what_is_no_finite_number_is_refused_with_its_line(tmp_path: Path, number: str) -> None:
    with pytest.raises(BadDataError, match=r"line 3: weight: .* is not a finite number"):
        csv(tmp_path, f"path,weight\na,1\nb,{number}\n", task=Task.named("regression", ("weight",)))


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, math.inf], ["1", "x"], [True, False]])
def test_parquet_numbers_are_held_to_the_same(tmp_path: Path, values: list[object]) -> None:
    with pytest.raises(BadDataError, match=r"row \d: weight: .* is not a finite number"):
        parquet(tmp_path, {"path": ["a", "b"], "weight": values}, task="regression", targets=["weight"])


def test_a_target_without_its_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"no column 'wieght' for --target \(found: path, weight\)"):
        csv(tmp_path, "path,weight\na,1\n", task=Task.named("regression", ("wieght",)))


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        ("regression", (), "needs --target: a column for each"),
        ("multi-label", ("x",), "numeric targets are for --task regression, this is multi-label"),
        ("regression", ("x", "x"), "names a column twice: x, x"),
        ("ranking", (), "expected single-label, multi-label, regression"),
    ],
)
def test_tasks_and_targets_must_fit_each_other(name: str, targets: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Task.named(name, targets)


def test_a_folder_has_one_label_for_each_image(tmp_path: Path) -> None:
    (tmp_path / "ants").mkdir()
    with pytest.raises(UsageError, match=r"--task multi-label: .* has one label for each image; list the images in a CSV"):
        open_source(tmp_path, task="multi-label")


# --- labels ------------------------------------------------------------------------------------------------------------

NAN = "the label is nan, which pandas writes for an empty cell: leave the cell empty, or rename the class"


def test_a_label_that_pandas_wrote_for_an_empty_cell_is_refused(tmp_path: Path) -> None:
    for text in ("nan", "NaN", " nan ", "NAN", "<NA>"):
        with pytest.raises(BadDataError, match=f"line 3: {NAN}"):
            csv(tmp_path, f"path,label\na.jpg,ants\nb.jpg,{text}\n")
    with pytest.raises(BadDataError, match=f"line 2: {NAN}"):
        csv(tmp_path, "path,label\na.jpg,sky|nan\n", task=MULTI)
    for column in (["ants", "nan"], pa.array([math.nan, math.nan])):
        with pytest.raises(BadDataError, match=f"row [12]: {NAN}"):
            parquet(tmp_path, {"path": ["a.jpg", "b.jpg"], "label": column})


def test_labels_that_only_contain_nan_are_labels(tmp_path: Path) -> None:
    samples = csv(tmp_path, "path,label\na.jpg,nancy\nb.jpg,Nan\nc.jpg,\n")
    assert [sample.label for sample in samples] == ["nancy", "Nan", None]
    numbers = Task.named("regression", ["weight"])
    assert csv(tmp_path, "path,label,weight\na.jpg,nan,1\n", task=numbers)[0].targets == (1.0,)


def test_the_column_of_groups_is_the_one_that_was_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = "path,label,group,Patient\nx1/a.jpg,ants,g,p1\nx2/b.jpg,bees,g,p2\n"
    assert [sample.group for sample in csv(tmp_path, table, group_by="Patient")] == [b"p1", b"p2"]
    assert caplog.messages == [f"{tmp_path / 'list.csv'}: these columns are not used: 'group'"]
    assert [sample.group for sample in csv(tmp_path, table, group_by=r"^\w+")] == [b"x1", b"x2"]
    assert caplog.messages[1:] == [f"{tmp_path / 'list.csv'}: these columns are not used: 'group' and 'Patient'"]
    with pytest.raises(UsageError, match=r"--group-by 'patient': .* has the column 'Patient'; write it like that"):
        csv(tmp_path, table, group_by="patient")
    ages = Task.named("regression", ["group"])
    assert csv(tmp_path, "path,group\na.jpg,7\n", task=ages) == [Sample(b"a.jpg", targets=(7.0,))]


def test_labels_that_only_look_the_same_are_refused(tmp_path: Path) -> None:
    look_the_same = "the classes 'cafe.u0301' and 'caf.xe9' both show as caf\u00e9"
    with pytest.raises(BadDataError, match=f"list.csv: {look_the_same}"):
        csv(tmp_path, "path,label\na.jpg,caf\u00e9\nb.jpg,cafe\u0301\n")
    with pytest.raises(BadDataError, match=look_the_same):
        csv(tmp_path, "path,label\na.jpg,caf\u00e9|sky\nb.jpg,sea|cafe\u0301\n", task=MULTI)
    assert len(csv(tmp_path, "path,label\na.jpg,caf\u00e9\nb.jpg,caf\u00e9\n")) == 2


def test_the_labels_of_a_manifest_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,label\na.jpg,sky|sea\nb.jpg,sky\nc.jpg,\n")
    source = Manifest(path, tmp_path, task=MULTI)
    labels = labels_of(source, source.samples(), source.samples())
    with caplog.at_level(logging.INFO):
        say_labels(source, labels, source.samples())
    assert labels.counts == {"sea": 1, "sky": 2}
    assert caplog.messages == [f"labels are in the column label of {path}: sea (1) and sky (2); without a label: 1"]


def test_a_dry_run_names_the_files_that_are_not_there(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path\n" + "".join(f"{i}.jpg\n" for i in range(9)))
    for name in ("3.jpg", "5.jpg"):
        (tmp_path / name).write_bytes(b"")
    would = preview(Manifest(path, tmp_path), backbone, tmp_path / "c", Options(quiet=True, device="cpu"))
    assert (would["inputs"], would["to_read"], would["missing"]) == (9, 9, 7)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"7 of 9 files of {path} are not there: 0.jpg, 1.jpg, 2.jpg, 4.jpg, 6.jpg and 2 more"]
    caplog.clear()
    path.write_text("path\n3.jpg\n5.jpg\n")
    assert preview(Manifest(path, tmp_path), backbone, tmp_path / "c", Options(quiet=True, device="cpu"))["missing"] == 0
    assert "not there" not in caplog.text
