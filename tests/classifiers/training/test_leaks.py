"""What stands on both sides of a split is found, named, and its effect stated; what does not is left in peace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import classifiers
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


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path], backbone: Backbone) -> FeatureCache:
    """30 training and 10 test images of each class; one exact copy, one recompressed and enlarged copy, one double label."""
    root = dataset(tmp_path_factory.mktemp("leaks") / "photos", {"train/a": 30, "train/b": 30, "test/a": 10, "test/b": 10})
    shutil.copy(root / "train/a/003.jpg", root / "test/a/exact.jpg")
    with Image.open(root / "train/b/004.jpg") as image:
        image.resize((120, 90), Image.Resampling.BICUBIC).save(root / "test/b/near.jpg", quality=80)
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
    assert "4 group(s) have fitted and held-out images, so that the scores are too good: a 0, a 1, b 0, b 1" in err
    assert json.loads(out)["metrics"]["leaks"]["divided"] == ["a 0", "a 1", "b 0", "b 1"]
    code, _, err = penult("train", cache, "--head", "centroid", "-o", tmp_path / "y.head", "--leaks", "refuse")
    assert code == 65
    assert "(--leaks refuse)" in err


def test_refuse_refuses_and_allow_is_silent(planted: FeatureCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadDataError, match=r"near\.jpg ~ train/b/004\.jpg.*--leaks refuse"):
        classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0), TrainOptions(leaks="refuse"))
    assert not (tmp_path / "x.head").exists()
    classifiers.train(planted, tmp_path / "x.head", make_head("logistic", C=1.0), TrainOptions(leaks="allow"))
    assert "copies" not in caplog.text
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
