"""What is said about splits: groups on both sides, options without effect, and what a rerun changes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.manifest import Manifest
from extractor.data.samples import Sample
from extractor.pipeline.plan import preview
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.split_rule import require_groups, say_own_splits, say_splits
from store.cache import FeatureCache
from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.tasks import ONE_LABEL

QUIET = Options(quiet=True, device="cpu")


def test_groups_on_both_sides_of_the_data_own_split_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The patients of a list with columns split and group may be in both, and the held-out score too good."""
    samples = [Sample(b"%d" % i, "x", "test" if i == 3 else "train", b"p%d" % (i // 2)) for i in range(6)]
    say_own_splits(samples, QUIET, ONE_LABEL)
    assert caplog.messages == [
        "1 of 3 groups have images in more than one split of the data (such as p1 in test and train): what is held out is "
        "not new"
    ]
    caplog.clear()
    say_own_splits([sample for sample in samples if sample.split == "train"], QUIET, ONE_LABEL)
    assert not caplog.messages


def test_shares_that_change_nothing_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    own, options = [Sample(b"a", "x", "train"), Sample(b"b", "x", "test")], QUIET.replace(test_fraction=0.5)
    say_own_splits(own, options, ONE_LABEL)
    assert caplog.messages == ["the data has splits of its own, so --test-fraction changes nothing"]
    caplog.clear()
    say_own_splits([Sample(b"a", "x")], options, ONE_LABEL)
    assert not caplog.messages


def rows(*facts: tuple[str, str | None, str | None, str | None]) -> list[Row]:
    """Path, label, split and code of each; the content is named by the last letter of the path."""
    return [Row(path.encode(), label, split, b"", path[-1].encode() * 32, code) for path, label, split, code in facts]


def test_what_a_rerun_changes_is_counted_wherever_the_files_are_now(caplog: pytest.LogCaptureFixture) -> None:
    before = SampleTable(rows(("a", "x", "train", None), ("b", "x", "test", None), ("c", "y", "train", None)), {"split": {}})
    now = rows(("new/a", "x", "test", None), ("new/b", "y", "test", None), ("new/d", "y", "test", None))
    with caplog.at_level(logging.INFO):
        assert say_splits(before, now, {}, ONE_LABEL) == {"split": 1, "label": 1}
    assert caplog.messages == [
        "the labels changed, and 1 of 2 samples changed split with them",
        "1 of 2 samples have another label than in the last run",
    ]


def test_a_split_that_moves_for_another_reason_does_not_blame_other_samples(caplog: pytest.LogCaptureFixture) -> None:
    """With another task the split is stratified otherwise; the same samples are in it."""
    facts = ("a", "x", "train", None), ("a", "x", "test", None)
    before, now = (rows(each) for each in facts)
    say_splits(SampleTable(before, {"task": "multi-label"}), now, {}, ONE_LABEL)
    assert caplog.messages[1:] == ["the labels changed, and 1 of 1 samples changed split with them"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        say_splits(SampleTable(before), now, {}, ONE_LABEL)
    assert caplog.messages == ["1 of 1 samples changed split, because other samples came or went"]


def test_a_class_of_which_no_image_could_be_used_is_named(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = ("a", "x", "train", None), ("b", "y", None, "not_an_image")
    say_splits(None, rows(good, bad), {}, ONE_LABEL)
    assert caplog.messages == ["no image of class 'y' could be used, so a head will not know it"]
    caplog.clear()
    say_splits(None, rows(bad), {}, ONE_LABEL)
    assert not caplog.messages, "that there is nothing at all is said elsewhere"


def test_a_new_file_is_not_taken_for_one_that_could_not_be_read() -> None:
    gone = Row(b"a", "x", None, b"p1", b"", "not_found")
    require_groups(SampleTable([gone]), [Sample(b"a", "x", group=b"p1"), Sample(b"new", "x")], resplit=False)
    copy = Row(b"copy", "x", None, b"", bytes(32))  # stays with what it is a copy of
    require_groups(
        SampleTable([Row(b"a", "x", None, b"p1", bytes(32))]), [Row(b"b", "x", None, b"p1", bytes(32)), copy], resplit=False
    )


def test_groups_that_vanish_are_refused_where_the_files_were_moved_too(
    dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    photos, cache = dataset(tmp_path / "photos"), tmp_path / "c"
    run_extract(ImageFolder(photos, group_by=r"(\d)\.jpg$"), backbone, cache, QUIET)
    assert FeatureCache(cache).describe()["group_by"] == r"(\d)\.jpg$"
    moved = tmp_path / "moved"
    for path in sorted(photos.rglob("*.jpg")):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.parent.name / f"new-{path.name}")
    before = (cache / "samples.h5").read_bytes()
    with pytest.raises(
        BadDataError, match=r"Pass --group-by '\(\\\\d\)\\\\.jpg\$' \(or the column `group`\) again, or --resplit"
    ):
        run_extract(ImageFolder(moved), backbone, cache, QUIET)
    assert (cache / "samples.h5").read_bytes() == before
    assert run_extract(ImageFolder(moved), backbone, cache, QUIET.replace(resplit=True)).changes["split"] > 0


def test_a_dry_run_and_a_run_say_it(dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 4, "bees": 4})
    table = tmp_path / "list.csv"
    lines = [f"{i}/00{k}.jpg,{i},{'train' if k % 2 else 'test'},p\n" for i in ("ants", "bees") for k in range(4)]
    table.write_text("path,label,split,group\n" + "".join(lines))
    would = preview(Manifest(table, photos), backbone, tmp_path / "c", QUIET)
    summary = run_extract(Manifest(table, photos), backbone, tmp_path / "c", QUIET)
    assert [text[:14] for text in would["warnings"]] == ["1 of 1 groups "]
    assert set(would["warnings"]) <= set(summary.warnings)
    assert (would["unlabelled"], summary.unlabelled, summary.changes) == (0, 0, {"split": 0, "label": 0})
