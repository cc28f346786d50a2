"""What is in a dataset: class folders, split folders, flat folders, links, CSV manifests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.labels import Labels, labels_of, say_labels
from extractor.data.manifest import Manifest
from extractor.data.samples import Sample
from extractor.data.sources import Source, open_source
from extractor.pipeline.plan import preview
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.errors import BadDataError, InputMissingError, UsageError

REPO = Path(__file__).resolve().parents[3]


def tree(root: Path, *names: str | bytes) -> Path:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))  # noqa: PTH118 - a Path cannot hold every name
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(os.fsencode(name))
    return root


def listing(root: Path, follow_symlinks: bool = False) -> list[tuple[bytes, str | None, str | None]]:
    return [(s.path, s.label, s.split) for s in ImageFolder(root, follow_symlinks=follow_symlinks).samples()]


# --- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_per_class(tmp_path: Path) -> None:
    tree(tmp_path, "bees/b.jpg", "ants/B.jpg", "ants/a.JPEG", "ants/Thumbs.db", "ants/._a.jpg", "ants/no-extension")
    assert listing(tmp_path) == [
        (b"ants/._a.jpg", "ants", None),
        (b"ants/B.jpg", "ants", None),
        (b"ants/Thumbs.db", "ants", None),
        (b"ants/a.JPEG", "ants", None),
        (b"ants/no-extension", "ants", None),
        (b"bees/b.jpg", "bees", None),
    ]


def test_deeper_folders_belong_to_their_class(tmp_path: Path) -> None:
    tree(tmp_path, "ants/2024/may/a.jpg", "ants/z.jpg", "ants/.hidden/b.jpg", "bees/x/c.jpg")
    assert listing(tmp_path) == [
        (b"ants/2024/may/a.jpg", "ants", None),
        (b"ants/z.jpg", "ants", None),
        (b"bees/x/c.jpg", "bees", None),
    ]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation", "VAL"])
def test_split_folders_with_their_other_names(tmp_path: Path, name: str) -> None:
    tree(tmp_path, "train/ants/a.jpg", "train/bees/deep/b.jpg", f"{name}/ants/c.jpg", "test/bees/d.jpg")
    assert set(listing(tmp_path)) == {
        (b"train/ants/a.jpg", "ants", "train"),
        (b"train/bees/deep/b.jpg", "bees", "train"),
        (f"{name}/ants/c.jpg".encode(), "ants", "val"),
        (b"test/bees/d.jpg", "bees", "test"),
    }


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    tree(tmp_path, "train/a.jpg", "bus/b.jpg")
    assert [(label, split) for _, label, split in listing(tmp_path)] == [("bus", None), ("train", None)]


def test_splits_need_no_train(tmp_path: Path) -> None:
    tree(tmp_path, "Testing/ants/x.jpg", "val/ants/y.jpg")
    assert [(label, split) for _, label, split in listing(tmp_path)] == [("ants", "test"), ("ants", "val")]


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train/ants/x.jpg", "val/ants/y.jpg", "extra/z.jpg")
    with pytest.raises(BadDataError, match=r"train, val in .* look like splits .* and extra beside them do not"):
        listing(tmp_path)


def test_what_file_managers_leave_behind_is_no_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "ants/a.jpg", "ants/.DS_Store", "ants/desktop.ini", "__MACOSX/ants/._a.jpg", "ants/.thumbs/a.jpg")
    assert listing(tmp_path) == [(b"ants/a.jpg", "ants", None)]
    assert "the folder __MACOSX" in caplog.text
    assert "the folder .thumbs" in caplog.text


def test_a_file_in_a_split_folder_but_no_class_is_bad_data(tmp_path: Path) -> None:
    tree(tmp_path, "train/ants/a.jpg", "train/stray.jpg", "val/ants/b.jpg")
    with pytest.raises(BadDataError, match=r"train/stray\.jpg lies in a split folder but in no class folder"):
        listing(tmp_path)


@pytest.mark.parametrize(
    ("names", "begins", "example"),
    [
        (["train/a.jpg", "test/b.jpg"], "test/ and train/ hold images", "train/cats/"),
        (["Training/a.jpg", "val/b.jpg", "README.md"], "Training/ and val/ hold images", "Training/cats/"),
        (["train/a.jpg"], "train/ holds images", "train/cats/"),
        (["valid/a.jpg", "test/.cache/x"], "valid/ holds images", "valid/cats/"),
    ],
)
def test_split_folders_without_class_folders_are_refused(tmp_path: Path, names: list[str], begins: str, example: str) -> None:
    """They gave the classes "train" and "test", and a head that tells one split from the other."""
    tree(tmp_path / "photos", *names)
    with pytest.raises(BadDataError) as caught:
        listing(tmp_path / "photos")
    assert f"photos: {begins} and no class folders: move the images of each class into a folder of its own" in str(caught.value)
    assert f"({example}...), or list them in a CSV with the columns path, label, split" in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("names", "holds", "path"),
    [
        (["photos/train/cats/a.jpg", "photos/val/cats/b.jpg"], "photos, which holds train and val", "photos"),
        (["photos/train/a.jpg", "photos/test/b.jpg"], "photos, which holds test and train", "photos"),
        (["data/cats/a.jpg", "data/dogs/b.jpg"], "data, which holds cats and dogs", "data"),
        (["data/cats/a.jpg", "data/dogs/b.jpg", "data/labels.csv", "data/README"], "data, which holds cats and dogs", "data"),
        (["a/b/cats/a.jpg", "a/b/dogs/b.jpg", "list.txt"], "a/b, which holds cats and dogs", "a/b"),
        (["data/train/cats/a.jpg"], "data, which holds train", "data"),
        ([f"data/{name}/a.jpg" for name in "abcdefg"], "data, which holds a, b, c, d, e and 2 more", "data"),
    ],
)
def test_a_folder_around_the_dataset_is_refused_with_the_path_to_use(
    tmp_path: Path, names: list[str], holds: str, path: str
) -> None:
    outer = tree(tmp_path / "outer", *names)
    with pytest.raises(BadDataError) as caught:
        listing(outer)
    assert str(caught.value) == f"the only folder with images in {outer} is {holds}: pass {outer}/{path}"
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    "names",
    [
        ["cats/a.jpg"],
        ["cats/a.jpg", "cats/train/old/b.jpg"],
        ["cats/no-extension", "cats/2024/b.jpg"],
        ["cats/2024/b.jpg", "dogs/2024/c.jpg"],
    ],
)
def test_one_class_or_folders_in_classes_stay_what_they_were(tmp_path: Path, names: list[str]) -> None:
    tree(tmp_path, *names)
    assert listing(tmp_path) == sorted((name.encode(), name[:4], None) for name in names)


def test_one_split_of_class_folders_is_a_split(tmp_path: Path) -> None:
    tree(tmp_path, "train/ants/a.jpg")
    assert listing(tmp_path) == [(b"train/ants/a.jpg", "ants", "train")]


def test_class_folders_whose_names_only_look_the_same_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "caf\u00e9/a.jpg", "cafe\u0301/b.jpg", "bar/c.jpg")
    with pytest.raises(BadDataError, match="Unicode normalisation") as caught:
        listing(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the classes 'cafe\\u0301' and 'caf\\xe9' both show as caf\u00e9 and differ in Unicode normalisation "
        f"(NFC, NFD) alone: give them one name"
    )


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    tree(tmp_path, "b.jpg", "a.jpg", ".cache/x")
    assert listing(tmp_path) == [(b"a.jpg", None, None), (b"b.jpg", None, None)]


def test_stray_files_beside_the_classes_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "ants/a.jpg", "README.txt", ".DS_Store")
    assert listing(tmp_path) == [(b"ants/a.jpg", "ants", None)]
    assert "1 file(s) beside the class folders" in caplog.text


def test_hidden_folders_at_the_top_are_no_classes(tmp_path: Path) -> None:
    tree(tmp_path, "ants/a.jpg", ".git/objects/x", ".ipynb_checkpoints/y.jpg")
    assert listing(tmp_path) == [(b"ants/a.jpg", "ants", None)]


def test_names_that_are_not_utf8_and_newlines_survive(tmp_path: Path) -> None:
    names = [b"caf\xe9/\xff\xfe.jpg", b"caf\xe9/line\nbreak.jpg", "ü/e\u0301.jpg".encode(), "ü/\u00e9.jpg".encode()]
    tree(tmp_path, *names)
    found = ImageFolder(tmp_path).samples()
    assert [sample.path for sample in found] == sorted(names)
    assert [sample.label for sample in found] == ["caf\\xe9", "caf\\xe9", "ü", "ü"]


def test_links_are_not_followed_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "data/ants/a.jpg", "data/bees/b.jpg", "outside/secret.jpg")
    (tmp_path / "data/ants/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/ants/out.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (tmp_path / "data/wasps").symlink_to(tmp_path / "outside")
    assert [path for path, _, _ in listing(tmp_path / "data")] == [b"ants/a.jpg", b"bees/b.jpg"]
    assert "3 symbolic link(s)" in caplog.text
    assert "--follow-symlinks" in caplog.text


def test_followed_links_do_not_loop_and_give_no_file_twice(tmp_path: Path) -> None:
    """`torchvision.datasets.ImageFolder` gives 246 samples for these 6."""
    tree(tmp_path, *(f"data/{label}/{i}.jpg" for label in ("ants", "bees") for i in range(3)))
    (tmp_path / "data/ants/root").symlink_to(tmp_path / "data")
    (tmp_path / "data/ants/self").symlink_to(tmp_path / "data/ants")
    (tmp_path / "data/bees/ants").symlink_to("../ants")
    assert listing(tmp_path / "data", follow_symlinks=True) == [
        (f"{label}/{i}.jpg".encode(), label, None) for label in ("ants", "bees") for i in range(3)
    ]


def test_followed_links_reach_files_and_folders_outside(tmp_path: Path) -> None:
    tree(tmp_path, "data/ants/a.jpg", "outside/x/b.jpg", "outside/c.jpg")
    (tmp_path / "data/ants/more").symlink_to(tmp_path / "outside/x")
    (tmp_path / "data/ants/c.jpg").symlink_to(tmp_path / "outside/c.jpg")
    (tmp_path / "data/bees").symlink_to(tmp_path / "outside")
    assert [path for path, _, _ in listing(tmp_path / "data", follow_symlinks=True)] == [
        b"ants/a.jpg",
        b"ants/c.jpg",
        b"ants/more/b.jpg",
        b"bees/c.jpg",
        b"bees/x/b.jpg",
    ]


def test_a_broken_link_that_is_followed_is_an_input(tmp_path: Path) -> None:
    tree(tmp_path, "ants/a.jpg")
    (tmp_path / "ants/gone.jpg").symlink_to("nowhere")
    assert [path for path, _, _ in listing(tmp_path, follow_symlinks=True)] == [b"ants/a.jpg", b"ants/gone.jpg"]


def calls_of(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a function asks the file system for a folder, or for facts about a path."""
    count = 0

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            return call(*arguments, **options)

        return counting

    with monkeypatch.context() as patched:
        for name in ("scandir", "stat", "lstat", "readlink", "listdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        function()
    return count


@pytest.mark.parametrize("follow_symlinks", [False, True])
@pytest.mark.parametrize("split", ["", "train/"])
def test_listing_is_linear_in_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, *, follow_symlinks: bool
) -> None:
    """With 2,000 classes it took 33 seconds when every class looked at all others."""
    counts = []
    for begin, end in ((0, 20), (20, 40), (40, 80)):
        for i in range(begin, end):
            tree(tmp_path, f"{split}k{i}/a.jpg", f"{split}k{i}/deeper/b.jpg")
            (tmp_path / f"{split}k{i}/another").symlink_to(tmp_path / f"{split}k{i // 2}")
        source = open_source(tmp_path, follow_symlinks=follow_symlinks)
        assert len(source.samples()) == 2 * end
        counts.append(calls_of(source.samples, monkeypatch))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_listing_for_predict_is_linear_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for begin, end in ((0, 20), (20, 40), (40, 80)):
        tree(tmp_path, *(f"k{i}/deeper/b.jpg" for i in range(begin, end)))
        counts.append(calls_of(lambda: list(ImageFolder(tmp_path).everything()), monkeypatch))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


@pytest.mark.parametrize("name", ["nowhere", "file", "empty", "classes"])
def test_no_input_at_all_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes/ants").mkdir(parents=True)
    with pytest.raises(InputMissingError, match=name) as caught:
        listing(tmp_path / name)
    assert caught.value.exit_code == 66


def test_an_unreadable_folder_is_an_input_error(tmp_path: Path) -> None:
    tree(tmp_path, "open/ants/a.jpg", "open/bees/b.jpg")
    (tmp_path / "open/bees").chmod(0)
    (tmp_path / "open").chmod(0o755)
    code = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from extractor.data.folders import ImageFolder
from store.errors import PenultError
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    print(ImageFolder(Path()).samples())
except PenultError as error:
    sys.exit(f"{{error.exit_code}} {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path / "open")
    (tmp_path / "open/bees").chmod(0o755)
    assert done.stderr.startswith("66 cannot read the folder"), done.stdout + done.stderr
    assert "bees" in done.stderr


# --- manifests ---------------------------------------------------------------------------------------------------------


def manifest(folder: Path, content: bytes | str, group_by: str | None = None, name: str = "list.csv") -> list[Sample]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Manifest(path, folder, group_by).samples()


def test_a_manifest_with_all_columns(tmp_path: Path) -> None:
    text = 'path,label,split,group,note\nb.jpg,ants,train,p1,"x, y"\n./a.jpg, bees ,VALID,p2,\n'
    assert manifest(tmp_path, text) == [
        Sample(b"a.jpg", "bees", "val", b"p2"),
        Sample(b"b.jpg", "ants", "train", b"p1"),
    ]


def test_a_manifest_with_paths_alone(tmp_path: Path) -> None:
    assert manifest(tmp_path, "path\na.jpg\n\nb.jpg") == [Sample(b"a.jpg"), Sample(b"b.jpg")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path: Path, end: str, mark: bytes) -> None:
    text = mark + end.join(["path,label", "a.jpg,ants", '"b,1.jpg","say ""bees"""', ""]).encode()
    assert manifest(tmp_path, text) == [Sample(b"a.jpg", "ants"), Sample(b"b,1.jpg", 'say "bees"')]


def test_tabs_separate_a_tsv(tmp_path: Path) -> None:
    assert manifest(tmp_path, "path\tlabel\na,1.jpg\tants\n", name="list.tsv") == [Sample(b"a,1.jpg", "ants")]


@pytest.mark.parametrize(
    "name", ["line\nbreak", "carriage\rreturn", "u2028\u2028x", "nel\x85x", "form\x0cfeed", "file\x1cseparator"]
)
def test_only_line_ends_end_a_line(tmp_path: Path, name: str) -> None:
    assert manifest(tmp_path, f'path,label\n"{name}.jpg",ants\n') == [Sample(f"{name}.jpg".encode(), "ants")]


def test_bytes_that_are_not_utf8_survive_in_paths(tmp_path: Path) -> None:
    found = manifest(tmp_path, b"path,label,group\ncaf\xe9/\xff.jpg,caf\xe9,\xfe\n")
    assert found == [Sample(b"caf\xe9/\xff.jpg", "caf\\xe9", None, b"\xfe")]
    assert found[0].label is not None
    found[0].label.encode()  # a label that cannot be stored would end the run after hours


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\na.jpg,ants\n", r"no column 'path' in its first line \(found: file, label\)"),
        ("", r"no column 'path' in its first line \(found: nothing\)"),
        ("path,label\na.jpg,ants\n./a.jpg,bees\n", "line 3: a.jpg is already in line 2"),
        ("path\nok.jpg\n/etc/passwd\n", "line 3: /etc/passwd leaves the root"),
        ("path\n../x.jpg\n", r"line 2: \.\./x.jpg leaves the root"),
        ("path\na/../../x.jpg\n", "line 2: .* leaves the root"),
        ("path\na\0.jpg\n", "line 2: .* leaves the root"),
        ("path,label\n ,ants\n", "line 2: empty path"),
        ("path,split\na.jpg,train\nb.jpg,holdout\n", "line 3: split 'holdout'; expected train, val or test"),
        ("path,split\na.jpg,train\nb.jpg,\n", r"1 of 2 rows have no split \(such as b.jpg\)"),
        ("path,label\na.jpg,ants,oops\n", "line 2: more fields than the header has"),
        ("path,label,note\na.jpg\n", "line 2: fewer fields than the header has"),
        ('path,label\n"a.jpg"x,ants\n', "line 2: .*expected after"),
        ('"path"x,label\na.jpg,ants\n', "line 1: .*expected after"),
        ('path,label\n"a.jpg,ants\n', "line 2: unexpected end of data"),
    ],
)
def test_a_bad_manifest_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(BadDataError, match=reason) as caught:
        manifest(tmp_path, text)
    assert "list.csv" in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("text", ["path\n", "path,label\n\n\n"])
def test_an_empty_manifest_is_an_input_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputMissingError, match="no files"):
        manifest(tmp_path, text)


def test_a_missing_manifest_or_root_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"cannot read .*list.csv: No such file"):
        Manifest(tmp_path / "list.csv", tmp_path).samples()
    (tmp_path / "list.csv").write_text("path\na.jpg\n")
    with pytest.raises(InputMissingError, match=r"the root .* is not a folder"):
        Manifest(tmp_path / "list.csv", tmp_path / "nowhere").samples()


# --- groups ------------------------------------------------------------------------------------------------------------


def test_a_group_column_by_its_name(tmp_path: Path) -> None:
    text = "path,group,patient\na.jpg,g1,p1\nb.jpg,g2,p1\n"
    assert [s.group for s in manifest(tmp_path, text)] == [b"g1", b"g2"]
    assert [s.group for s in manifest(tmp_path, text, group_by="patient")] == [b"p1", b"p1"]


def test_a_row_without_its_group_column_is_refused(tmp_path: Path) -> None:
    """Otherwise that row would silently be a group of its own, on both sides of a split."""
    with pytest.raises(BadDataError, match="line 3: fewer fields"):
        manifest(tmp_path, "path,label,patient\na.jpg,x,p1\nb.jpg,x\n", group_by="patient")


def test_groups_from_a_regular_expression(tmp_path: Path) -> None:
    tree(tmp_path, "ants/p1_1.jpg", "ants/p1_2.jpg", "bees/p2_\xff.jpg")
    whole = ImageFolder(tmp_path, group_by=r"p\d+").samples()
    assert [sample.group for sample in whole] == [b"p1", b"p1", b"p2"]
    first = ImageFolder(tmp_path, group_by=r"/(p\d+)_(.)").samples()
    assert [sample.group for sample in first] == [b"p1", b"p1", b"p2"]
    assert [s.group for s in manifest(tmp_path, "path\nx/7-a.jpg\nx/7-b.jpg\n", group_by=r"\d")] == [b"7", b"7"]


def test_a_group_that_takes_no_part_in_the_match_is_refused(tmp_path: Path) -> None:
    """That image would be a group of its own, and those of its patient would stand on both sides."""
    tree(tmp_path, "ants/p1.jpg", "ants/x.jpg")
    with pytest.raises(UsageError, match=r"gives ants/x\.jpg no group"):
        ImageFolder(tmp_path, group_by=r"(p\d)|x").samples()


@pytest.mark.parametrize(("pattern", "reason"), [("q", "gives ants/a.jpg no group"), ("(", "neither a column nor a regular")])
def test_a_group_expression_that_does_not_work_is_a_usage_error(tmp_path: Path, pattern: str, reason: str) -> None:
    tree(tmp_path, "ants/a.jpg")
    with pytest.raises(UsageError, match=reason):
        ImageFolder(tmp_path, group_by=pattern).samples()


# --- what DATA means ---------------------------------------------------------------------------------------------------


def test_data_is_a_folder_or_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "list.CSV").write_text("path\na.jpg\n")
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert open_source(tmp_path, follow_symlinks=True, group_by="x") == ImageFolder(tmp_path, True, "x")
    found = open_source(tmp_path / "list.CSV", group_by="patient")
    assert found == Manifest(tmp_path / "list.CSV", tmp_path, "patient")
    assert open_source(str(tmp_path / "list.CSV"), root=tmp_path / "images").root == tmp_path / "images"
    with pytest.raises(UsageError, match="neither a folder nor a CSV manifest"):
        open_source(tmp_path / "photo.jpg")
    with pytest.raises(InputMissingError, match="does not exist"):
        open_source(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "names", ["train2017 val2017", "train1 test1", "train_images Test_Images", "train dev", "seg_train seg_test/x"]
)
def test_folders_called_like_splits_are_no_classes(tmp_path: Path, names: str) -> None:
    """COCO, Kaggle and others: a classifier of train and test would be perfectly useless."""
    root = tree(tmp_path, *(f"{name}/a.jpg" for name in names.split()))
    with pytest.raises(
        BadDataError, match="look like splits, and would be taken for the classes: call them train, val or test"
    ):
        listing(root)


@pytest.mark.parametrize("names", ["contest train_station", "test_a test_b", "train car", "attest latest"])
def test_classes_may_have_such_words_in_their_names(tmp_path: Path, names: str) -> None:
    root = tree(tmp_path, *(f"{name}/a.jpg" for name in names.split()))
    assert [label for _, label, _ in listing(root)] == sorted(names.split())


def test_folders_of_notes_alone_do_not_hide_what_the_others_are(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="test/ and train/ hold images and no class folders"):
        listing(tree(tmp_path / "a", "train/a.jpg", "test/b.jpg", "annotations/all.json"))
    with pytest.raises(BadDataError, match=r"the only folder with images in .* is images, which holds train and val: pass "):
        listing(tree(tmp_path / "b", "images/train/a.jpg", "images/val/b.jpg", "labels/train/a.txt"))
    assert len(listing(tree(tmp_path / "c", "ants/README"))) == 1


def test_a_class_folder_of_a_split_that_is_empty_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree(tmp_path, "train/ants/a.jpg", "train/bees/b.jpg", "test/ants/c.jpg") / "test/bees").mkdir()
    assert len(listing(tmp_path)) == 3
    assert caplog.messages == [f"the folder test/bees in {tmp_path} is empty"]
    caplog.clear()
    (tmp_path / "train/wasps").mkdir()
    listing(tmp_path)
    assert caplog.messages == [f"2 folders in {tmp_path} are empty: test/bees and train/wasps"]


def test_a_class_folder_called_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="the label is nan, which pandas writes for an empty cell"):
        listing(tree(tmp_path, "nan/a.jpg", "ants/b.jpg"))


# --- what was taken for a label ----------------------------------------------------------------------------------------


def said_of(source: Source, caplog: pytest.LogCaptureFixture) -> tuple[Labels, list[tuple[int, str]]]:
    samples = source.samples()
    labels = labels_of(source, samples, samples)
    with caplog.at_level(logging.INFO):
        say_labels(source, labels, samples)
    return labels, [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_labels_of_class_folders_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, *(f"{name}/{i}.jpg" for name in "abcdefgh" for i in range(3)), "a/x.jpg")
    labels, messages = said_of(ImageFolder(root), caplog)
    assert labels == Labels({"a": 4, **dict.fromkeys("bcdefgh", 3)})
    assert messages == [
        (logging.INFO, f"labels are the folders below {root}/: a (4), b (3), c (3), d (3), e (3) and 3 more"),
    ]


def test_the_labels_below_split_folders_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, "train/cats/a.jpg", "train/dogs/b.jpg", "val/cats/c.jpg")
    labels, messages = said_of(ImageFolder(root), caplog)
    assert labels == Labels({"cats": 2, "dogs": 1})
    assert messages == [(logging.INFO, f"labels are the folders below train/ and val/ in {root}: cats (2) and dogs (1)")]


def test_folders_that_look_like_the_classes_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four folders of ants and bees in two years gave the labels 2023 and 2024, in silence."""
    root = tree(tmp_path, *(f"{year}/{name}/a.jpg" for year in (2023, 2024) for name in ("ants", "bees")), "2023/notes.txt")
    labels, messages = said_of(ImageFolder(root), caplog)
    assert labels == Labels({"2023": 3, "2024": 2}, {"2023": ["ants", "bees"], "2024": ["ants", "bees"]}, nested=True)
    assert [level for level, _ in messages] == [logging.INFO, logging.WARNING]
    assert messages[1][1] == (
        f"the labels are 2023 and 2024, and these folders hold only folders (below 2023/: ants and bees; below 2024/: ants "
        f"and bees). If the classes are below, move each class into a folder directly in {root}, or list the images in a CSV "
        f"with the columns path, label"
    )


def test_folders_that_look_like_the_classes_of_splits_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, "train/data/cats/a.jpg", "train/data/dogs/a.jpg", "val/data/cats/a.jpg")
    labels, messages = said_of(ImageFolder(root), caplog)
    assert (labels.subfolder_counts, labels.nested) == ({"data": 2}, True)
    assert (
        "(below data/: cats and dogs). If the classes are below, move each class into a folder directly in its split's"
        in (messages[1][1])
    )


def test_deeper_folders_of_some_classes_are_said_and_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{name}/{year}/a.jpg" for name in "abcde" for year in (2023, 2024)]
    labels, messages = said_of(ImageFolder(tree(tmp_path, *names, "a/own.jpg")), caplog)
    assert labels == Labels({"a": 3, **dict.fromkeys("bcde", 2)}, {name: ["2023", "2024"] for name in "abcde"})
    below = "; ".join(f"below {name}/: 2023 and 2024" for name in "abc")
    assert messages[1:] == [
        (logging.INFO, f"images in deeper folders have the label of their class folder ({below}; and in 2 more)")
    ]


@pytest.mark.parametrize("own", ["cats/own.jpg", "cats/test/b.jpg"])
def test_splits_below_class_folders_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, own: str) -> None:
    root = tree(tmp_path, "cats/train/a.jpg", "dogs/train/a.jpg", "dogs/test/b.jpg", own)
    labels, messages = said_of(ImageFolder(root), caplog)
    assert labels.counts == {"cats": 2, "dogs": 2}
    assert messages[1:] == [
        (
            logging.WARNING,
            "folders in class folders do not decide the split (test and train): put them above the class folders "
            "(train/cats/...), or list the images in a CSV with the columns path, label, split",
        )
    ]


def test_classes_that_may_be_meant_as_one_or_as_none_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("Cat", "cat", "hot dog", "hot-dog", "None", "1", "-1")
    _, messages = said_of(ImageFolder(tree(tmp_path, *(f"{name}/a.jpg" for name in names))), caplog)
    assert [text for level, text in messages if level == logging.WARNING] == [
        "these classes differ in case, blanks, hyphens or underscores alone, and may be meant as one: 'Cat' = 'cat' and "
        "'hot dog' = 'hot-dog'",
        "'None' is a class here; if it stands for an empty cell, leave the cell empty",
    ]


def test_labels_that_are_not_utf8_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A list that was saved as Latin-1 made classes whose names nobody wrote."""
    (tmp_path / "list.csv").write_bytes(b"path,label\na.jpg,K\xe4fer\nb.jpg,K\xc3\xa4fer\nc.jpg,a\xe2\x80\x8bb\n")
    _, messages = said_of(Manifest(tmp_path / "list.csv", tmp_path), caplog)
    assert [text for level, text in messages if level == logging.WARNING] == [
        "these classes are not UTF-8, or have characters that cannot be shown, and are kept as they are written here: "
        r"K\xe4fer and a\u200bb. Save the list as UTF-8, or rename the folders"
    ]


def test_images_without_labels_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels, messages = said_of(ImageFolder(tree(tmp_path, "a.jpg", "b.jpg")), caplog)
    assert labels == Labels({}, unlabelled=2)
    assert messages == [(logging.INFO, f"the images of {tmp_path} have no labels")]


def test_extract_and_its_dry_run_report_the_labels(
    tmp_path: Path, dataset: Callable[..., Path], backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    source = ImageFolder(dataset(tmp_path / "years", {"2023/ants": 6, "2023/bees": 6, "2024/ants": 6}))
    options = Options(quiet=True, device="cpu", limit=16)
    would = preview(source, backbone, tmp_path / "c", options)
    assert sum(would["labels"].values()) == 16
    assert (list(would["labels"]), would["subfolders"]) == (["2023", "2024"], {"2023": 2, "2024": 1})
    assert "missing" not in would
    assert "the labels are 2023 and 2024, and these folders hold only folders" in caplog.text
    summary = run_extract(source, backbone, tmp_path / "c", options).to_json()
    assert (summary["labels"], summary["subfolders"]) == (would["labels"], would["subfolders"])
    assert would["warnings"] == summary["warnings"][: len(would["warnings"])]
    assert summary["warnings"][0].startswith("the labels are 2023 and 2024, and these folders hold only folders")


def test_nothing_is_said_about_an_ordinary_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "ants/a.jpg", "bees/b.jpg")
    with caplog.at_level(logging.WARNING):
        listing(tmp_path)
    assert caplog.text == ""
