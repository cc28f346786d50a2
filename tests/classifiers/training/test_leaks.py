"""What stands on both sides of a split is found, named, and its effect stated; what does not is left in peace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import classifiers
from classifiers.comparison.label_curve import label_curve
from classifiers.heads.registry import make_head
from classifiers.training.leaks import LeakReport, guard, look
from classifiers.training.roles import assign_roles
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.errors import BadDataError
from store.splits import groups_of

REPEATS = [["train/a/010.80.jpg", "train/a/010.90.jpg", "train/a/010.jpg"]]
REPEATS += [[name.replace("a/010", "b/011") for name in REPEATS[0]]]


def enlarge(path: Path, out: Path, quality: int = 80) -> None:
    with Image.open(path) as image:
        image.resize((120, 90), Image.Resampling.BICUBIC).save(out, quality=quality)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path], backbone: Backbone) -> FeatureCache:
    """30 training and 10 test images of each class; an exact copy, a recompressed and enlarged one, a double label, and two
    training images that are three times in train."""
    root = dataset(tmp_path_factory.mktemp("leaks") / "photos", {"train/a": 30, "train/b": 30, "test/a": 10, "test/b": 10})
    shutil.copy(root / "train/a/003.jpg", root / "test/a/exact.jpg")
    enlarge(root / "train/b/004.jpg", root / "test/b/near.jpg")
    for name in ("a/010", "b/011"):
        for quality in (80, 90):
            enlarge(root / f"train/{name}.jpg", root / f"train/{name}.{quality}.jpg", quality)
    shutil.copy(root / "train/a/005.jpg", root / "train/b/relabelled.jpg")
    return extract(ImageFolder(root), backbone, root.parent / "c", Options(quiet=True))


def test_planted_leaks_are_named_with_the_accuracy_with_and_without(
    planted: FeatureCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0))
    assert bundle.metrics is not None
    found = bundle.metrics["leaks"]
    assert found["copies"] == ["test/a/exact.jpg"]
    assert [(leak["path"], leak["fitted"]) for leak in found["near"]] == [("test/b/near.jpg", "train/b/004.jpg")]
    assert found["conflicts"] == [["train/a/005.jpg", "train/b/relabelled.jpg"]]
    assert bundle.metrics["n"] == 21  # 20, and the near copy; the exact one is left out
    assert found["n_without"] == 20
    assert any("without the 1 image(s)" in note for note in bundle.metrics["notes"])
    for words in (
        "exact copies of fitted ones and are left out: test/a/exact.jpg",
        "near.jpg ~ train/b/004.jpg",
        "more than one",
    ):
        assert words in caplog.text
    assert b"test/a/exact.jpg" not in bundle.predictions().paths


def test_repeated_scenes_are_one_unit_and_said(planted: FeatureCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0))
    assert bundle.metrics is not None
    repeats = bundle.metrics["leaks"]["repeats"]
    assert repeats == {"images": 6, "groups": 2, "grouped": True, "examples": REPEATS}
    assert bundle.split["near_copies"] == repeats
    assert "6 images look like near copies of others (versions of one image, or a burst): 2 groups, such as" in caplog.text
    assert any("6 images count as 2" in note for note in bundle.metrics["notes"])
    roles, _ = look(planted, assign_roles(planted.samples))
    units = dict(zip([row.name for row in roles.fit], groups_of(roles.fit), strict=True))
    for names in REPEATS:
        assert len({units[name] for name in names}) == 1
    assert len(set(units.values())) == len({row.sha256 for row in roles.fit}) - 4
    assert label_curve(bundle, planted, worthwhile=0.01, repeats=2).points[-1]["images"] == len(units) + 1  # and the exact copy

    ignored = classifiers.train(planted, tmp_path / "y.head", make_head("logistic", C=1.0), TrainOptions(near_copies="ignore"))
    assert ignored.metrics is not None
    assert ignored.metrics["leaks"]["repeats"] == {**repeats, "grouped": False}
    assert "every image counts (--near-copies ignore)" in caplog.text
    assert ignored.made_from != bundle.made_from
    assert [row.group for row in look(planted, assign_roles(planted.samples), group=False)[0].fit] == [b""] * len(units)
    for each in (bundle, ignored):  # what is evaluated again counts as it did
        evaluation, _ = classifiers.evaluate_bundle(each, planted)
        for name, score in (each.metrics or {})["scores"].items():
            assert list(evaluation.scores[name]["interval"] or ()) == pytest.approx(score["interval"] or [], abs=1e-5), name


def test_groups_of_the_data_that_near_copies_join_are_said(planted: FeatureCache) -> None:
    roles = assign_roles(planted.samples)
    assert look(planted, roles)[1].joined == []
    each = [replace(row, group=row.path if row.name in REPEATS[0] else b"") for row in roles.fit]
    joined, report = look(planted, replace(roles, fit=each))
    assert report.joined == [3, 1]
    assert "near copies join groups that the data has: 3 are 1 now" in " ".join(report.remarks())
    assert len({row.group for row in joined.fit if row.name in REPEATS[0]}) == 1
    assert look(planted, replace(roles, fit=each), group=False)[1].joined == []


def test_nothing_is_chosen_on_images_whose_unit_is_fitted(planted: FeatureCache) -> None:
    roles = assign_roles(planted.samples)
    chosen = {"train/a/010.80.jpg", "train/a/020.jpg", "train/b/020.jpg"}
    choose = [row for row in roles.fit if row.name in chosen]
    fit = [row for row in roles.fit if row.name not in chosen]
    apart, report = look(planted, replace(roles, fit=fit, choose=choose))
    assert report.moved == ["train/a/010.80.jpg"]
    assert "are of a fitted group: train/a/010.80.jpg" in " ".join(report.remarks())
    assert [row.name for row in apart.choose] == ["train/a/020.jpg", "train/b/020.jpg"]
    assert len(apart.fit) == len(roles.fit) - 2
    for few in (choose[:1], choose[:2]):  # one image is left at most: too few to choose by
        none, report = look(planted, replace(roles, fit=fit, choose=few))
        assert (none.choose, none.facts["chosen_on"]) == ([], "folds of train")
        assert (len(none.fit), len(report.moved)) == (len(fit) + len(few), len(few))


def test_only_as_many_images_are_searched_as_there_is_time_for(planted: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifiers.near_copies.MOST_PRODUCTS", 50 * 50 * planted.dim)
    _, report = look(planted, assign_roles(planted.samples))
    assert (report.searched, report.images_searched) == (False, 50)
    assert f"among 50 of {report.images} images" in report.remarks()[-1]


def test_evaluate_names_copies_of_fitted_images_in_new_data(
    planted: FeatureCache, tmp_path: Path, dataset: Callable[..., Path], penult: Callable[..., tuple[int, str, str]]
) -> None:
    classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0))
    root = dataset(tmp_path / "new", {"a": 20, "b": 20}, seed=9)
    for number in range(3):
        enlarge(planted.root / f"train/a/02{number}.jpg", root / f"a/copy{number}.jpg")
    for quality in (80, 90):
        enlarge(root / "b/007.jpg", root / f"b/again{quality}.jpg", quality)
    code, out, err = penult("evaluate", tmp_path / "x.head", root, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["leaks"]["near"] == ["a/copy0.jpg", "a/copy1.jpg", "a/copy2.jpg"]
    assert (result["leaks"]["fitted_searched"], result["leaks"]["fitted"]) == (64, 64)
    assert (result["n"], result["groups"], result["leaks"]["n_without"]) == (45, 43, 42)
    assert any("without the 3 image(s) that look like copies of fitted ones" in note for note in result["notes"])
    assert "3 of 45 images look like copies of fitted ones (of 64 of 64 fitted images): a/copy0.jpg, a/copy1.jpg" in err
    assert any("45 images are of 43 groups" in each for each in result["warnings"])


def test_a_split_of_ones_own_that_divides_groups_is_named(
    tmp_path: Path, dataset: Callable[..., Path], backbone_file: Path, penult: Callable[..., tuple[int, str, str]]
) -> None:
    dataset(tmp_path / "photos", {"a": 12, "b": 12})
    lines = [
        f"photos/{label}/{i:03d}.jpg,{label},{'test' if i % 4 == 3 else 'train'},{label} {i // 4 if i < 8 else i}"
        for label in "ab"
        for i in range(12)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split,group", *lines]))
    cache, said = tmp_path / "p.cache", "4 of 12 groups have images in more than one split of the data (such as a 0 in"
    code, out, err = penult("extract", tmp_path / "list.csv", "-m", backbone_file, "-o", cache, "--json")
    assert code == 0
    assert said in err
    assert [each for each in json.loads(out)["warnings"] if said in each]
    code, out, err = penult("train", cache, "--head", "centroid", "-o", tmp_path / "x.head", "--json")
    assert code == 0
    assert "4 group(s) have fitted and held-out images, so that the scores are too good: a 0, a 1, b 0 and b 1" in err
    assert json.loads(out)["metrics"]["leaks"]["divided"] == ["a 0", "a 1", "b 0", "b 1"]
    code, _, err = penult("train", cache, "--head", "centroid", "-o", tmp_path / "y.head", "--leaks", "refuse")
    assert code == 65
    assert "(--leaks refuse)" in err


def test_refuse_refuses_and_allow_is_silent(planted: FeatureCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadDataError, match=r"near\.jpg ~ train/b/004\.jpg.*--leaks refuse"):
        classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0), TrainOptions(leaks="refuse"))
    assert not (tmp_path / "x.head").exists()
    classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0), TrainOptions(leaks="allow"))
    assert "fitted ones" not in caplog.text
    for mode in ("warn", "refuse", "allow"):
        guard(LeakReport(), mode)


@pytest.mark.assets
def test_no_false_alarm_on_real_photos_and_a_planted_copy_is_found(assets: Path, imagenet: Path, tmp_path: Path) -> None:
    root = shutil.copytree(assets / "data/hymenoptera", tmp_path / "photos")
    with Image.open(root / "train/ants/0013035.jpg") as image:
        smaller = image.convert("RGB").resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
        smaller.save(root / "val/ants/planted.jpg", quality=85)
    cache = extract(ImageFolder(root), Backbone(str(imagenet)), tmp_path / "c", Options(quiet=True))
    _, report = look(cache, assign_roles(cache.samples))
    assert [(leak.path, leak.fitted) for leak in report.near] == [("val/ants/planted.jpg", "train/ants/0013035.jpg")]
