"""The page in a bundle: what it shows, that it loads nothing, and that nothing in it is taken for markup."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from threadpoolctl import threadpool_info

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.predictions import Predictions
from classifiers.evaluation.single_label import score
from classifiers.finetuning.finetune import finetune
from classifiers.finetuning.settings import FineTuneSettings
from classifiers.heads.registry import make_head
from classifiers.reports.bundle_page import bundle_report, report_again
from classifiers.reports.feature_map import POINTS, feature_map
from classifiers.reports.illustrations import MISTAKES, NEIGHBOURS, illustrate
from classifiers.reports.settings import ReportSettings
from classifiers.reports.thumbnails import SIDE, thumbnails
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.files import FolderFiles
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache, Subset

Penult = Callable[..., tuple[int, str, str]]

HOSTILE = "<script>alert(1)</script>".replace("/", "\u2215")  # no file name has a slash
LOADING = ("src", "href", "xlink:href", "data", "poster", "action", "srcset")


class Page(HTMLParser):
    """The tags of a page, what they load, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in LOADING or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def photos(self) -> list[str]:
        return [value for value in self.loads if value.startswith("data:image/jpeg")]

    @property
    def images(self) -> int:
        return self.tags.count("img")


def loads_nothing(html: str) -> bool:
    """Nothing is loaded but what the page holds, in attributes or in styles, and no script is in it."""
    page = Page(html)
    inside = all(value.startswith(("data:image/", "#")) for value in page.loads)
    return inside and "script" not in page.tags and not re.search(r"@import|url\((?![\"']?#)", html)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of two kinds that a random network can hardly tell apart: a head makes mistakes; one label is hostile."""
    root, rng = tmp_path_factory.mktemp("report") / "photos", np.random.default_rng(0)
    for label in (HOSTILE, "_$plain$ & simple"):
        (root / label).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(root / label / f"<i>{i}.png")
    return root


@pytest.fixture(scope="module")
def cache(photos: Path, backbone: Backbone) -> FeatureCache:
    return extract(ImageFolder(photos), backbone, photos.parent / "photos.cache", Options(quiet=True))


@pytest.fixture(scope="module")
def bundle(cache: FeatureCache) -> Bundle:
    return classifiers.train(
        cache, cache.path.parent / "photos.head", make_head("logistic"), TrainOptions(few_shot=[2, 5], repeats=3)
    )


def test_the_page_shows_every_part_and_loads_nothing(bundle: Bundle) -> None:
    html = (bundle.path / "report.html").read_text()
    page = Page(html)
    for heading in (
        *("Confusion matrix", "Reliability", "Training", "Classes", "With few images", "Map of the features", "Mistakes"),
        *("Scores", "Per class", "Split", "Settings", "Fingerprint"),
    ):
        assert f"<h2>{heading}</h2>" in html
    assert page.tags.count("svg") == 6
    assert bundle.metrics is not None
    errors = bundle.metrics["n"] - bundle.metrics["correct"]
    assert errors > 0
    assert page.images == min(errors, MISTAKES) * (1 + NEIGHBOURS)
    assert "before scaling" in page.text
    assert loads_nothing(html)
    assert "default-src 'none'" in html


def test_labels_and_file_names_are_never_markup(bundle: Bundle) -> None:
    html = (bundle.path / "report.html").read_text()
    page = Page(html)
    assert HOSTILE not in html
    assert HOSTILE in page.text
    assert "_$plain$ & simple" in page.text
    assert "/<i>" in page.text
    assert "i" not in page.tags


def test_the_same_training_gives_the_same_page(bundle: Bundle, cache: FeatureCache, tmp_path: Path) -> None:
    def comparable(path: Path) -> str:
        return re.sub(r"training took [0-9.]+ s", "", (path / "report.html").read_text())

    again = classifiers.train(cache, tmp_path / "photos.head", make_head("logistic"), TrainOptions(few_shot=[2, 5], repeats=3))
    assert comparable(again.path) == comparable(bundle.path)


def test_without_thumbnails_no_image_is_in_the_page(cache: FeatureCache, tmp_path: Path, penult: Penult) -> None:
    assert penult("train", cache.path, "-o", tmp_path / "b.head", "--no-thumbnails")[0] == 0
    page = Page((tmp_path / "b.head" / "report.html").read_text())
    assert page.images == 0
    assert "made without images" in page.text
    assert "predicted as" in page.text
    assert Bundle.load(tmp_path / "b.head").made_from != ""


def test_images_that_are_gone_or_changed_are_missing_and_counted(
    bundle: Bundle, cache: FeatureCache, photos: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    whole = Page(report_again(bundle, cache.path, ReportSettings(root=moved)))
    count = len(set(whole.photos))  # some training images are beside several mistakes
    assert whole.images > count > 1
    assert "could not be read" not in whole.text
    for image in moved.rglob("*.png"):
        image.write_bytes(b"something else")
    changed = Page(report_again(bundle, cache.path, ReportSettings(root=moved)))
    assert changed.images == 0
    assert f"{count} of {count} images could not be read any more (changed: {count})" in changed.text
    shutil.rmtree(moved)
    gone = Page(report_again(bundle, cache.path, ReportSettings(root=moved)))
    assert gone.images == 0
    assert f"(not_found: {count})" in gone.text
    assert gone.tags.count("svg") == changed.tags.count("svg") == whole.tags.count("svg")


def test_report_makes_the_page_again(bundle: Bundle, cache: FeatureCache, photos: Path, tmp_path: Path, penult: Penult) -> None:
    out = tmp_path / "again.html"
    assert penult("report", bundle.path, cache.path, "-o", out)[0] == 0
    first, again = (Page(path.read_text()) for path in (bundle.path / "report.html", out))
    assert (again.text, again.photos) == (first.text, first.photos)
    assert penult("report", bundle.path, cache.path, "-o", out)[0] == 73
    assert penult("report", bundle.path, "-o", out, "--overwrite")[0] == 0
    bare = Page(out.read_text())
    assert (bare.images, bare.tags.count("svg")) == (0, 5)  # neither images nor the map
    assert "Map of the features" not in bare.text
    unseen = tmp_path / "unseen"
    shutil.copytree(photos, unseen)
    for image in unseen.rglob("*.png"):
        with Image.open(image) as pixels:
            pixels.transpose(Image.Transpose.ROTATE_180).save(image)
    assert penult("report", bundle.path, unseen, "-o", out, "--overwrite")[0] == 0
    other = Page(out.read_text())
    assert "split 'all'" in other.text
    assert other.images == MISTAKES  # of a folder there are no features of training images
    assert loads_nothing(out.read_text())


def test_neighbours_are_the_training_images_of_least_angle() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(5000, 8)).astype(np.float32)
    names = [f"{i}".encode() for i in range(5000)]
    digests = [hashlib.sha256(name).digest() for name in names]
    labels = np.array(["a", "b"])[rng.integers(0, 2, 5000)]
    fitted = [Subset(X[a:b], labels[a:b], digests[a:b], names[a:b], digests[a:b]) for a, b in ((20, 30), (30, 5000))]
    probabilities = np.where(labels[:20, None] == ["a", "b"], 0.1, 0.9).astype(np.float32)  # all wrong
    probabilities[:, 0] += np.linspace(0, 0.05, 20, dtype=np.float32)
    held = Predictions(digests[:20], names[:20], labels[:20], probabilities)
    shown = illustrate(held, ["a", "b"], X=X[:20], fitted=fitted)
    confidence = [mistake.probability for mistake in shown.mistakes]
    assert len(confidence) == MISTAKES
    assert confidence == sorted(probabilities.max(axis=1).tolist(), reverse=True)[:MISTAKES]
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    for mistake in shown.mistakes:
        nearest = 20 + np.argsort(-(unit[20:] @ unit[int(mistake.image.name)]))[:NEIGHBOURS]
        assert [int(picture.name) for picture in mistake.neighbours] == nearest.tolist()


def test_thumbnails_are_small_squares_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Mock(wraps=subprocess.Popen)
    monkeypatch.setattr(subprocess, "Popen", start)
    image = Image.new("RGB", (900, 600), "red")
    image.paste("blue", (0, 0, 900, 300))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down: blue is below
    image.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    wanted = {hashlib.sha256((tmp_path / name).read_bytes()).digest(): name.encode() for name in ("turned.jpg", "broken.jpg")}
    wanted[b"?" * 32] = b"absent.jpg"
    shown, missing = thumbnails(wanted, FolderFiles(tmp_path))
    assert sorted(missing.values()) == ["not_an_image", "not_found"]
    assert start.call_count == 1, "a second decode worker costs more than it saves"
    (uri,) = shown.values()
    with Image.open(io.BytesIO(_content(uri))) as small:
        assert (small.format, small.size) == ("JPEG", (SIDE, SIDE))
        top, bottom = small.getpixel((80, 20)), small.getpixel((80, 140))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[0] > 200 > bottom[0]
    assert bottom[2] > 200 > top[2]


def _content(uri: str) -> bytes:
    import base64

    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return base64.b64decode(data)


def test_the_map_keeps_groups_apart_and_is_bounded() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 3, POINTS + 200)
    X = (5 * rng.normal(size=(3, 20))[groups] + rng.normal(size=(len(groups), 20))).astype(np.float16)
    for n, method in ((40, "principal axes"), (80, "t-SNE"), (len(X), "t-SNE")):
        found = feature_map(X[:n])
        assert found is not None
        assert (found.method, len(found.rows)) == (method, min(n, POINTS))
        assert found.points.shape == (len(found.rows), 2)
        middle = np.stack([found.points[groups[found.rows] == g].mean(axis=0) for g in range(3)])
        nearest = np.linalg.norm(found.points[:, None] - middle, axis=2).argmin(axis=1)
        assert (nearest == groups[found.rows]).mean() > 0.99
        if n < POINTS:
            again = feature_map(X[:n])
            assert again is not None
            np.testing.assert_array_equal(again.points, found.points)
    assert feature_map(X[:2]) is None
    assert feature_map(np.ones((50, 4), np.float32)) is None


def test_the_map_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other in a loop took 14 core-seconds beside two busy processes, instead of one."""
    threads: list[int] = []
    solve = np.linalg.eigh

    def watched(matrix: NDArray[Any]) -> Any:
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return solve(matrix)

    monkeypatch.setattr(np.linalg, "eigh", watched)
    assert feature_map(np.random.default_rng(0).normal(size=(70, 4))) is not None
    assert set(threads) == {1}


def test_the_page_of_ten_thousand_images_is_below_five_megabytes(bundle: Bundle, tmp_path: Path) -> None:
    """With a hundred classes, thumbnails of noise (which JPEG cannot make small), and a history as the bundle has it."""
    rng, n, classes = np.random.default_rng(0), 10_000, [f"a class with a long name, number {i}" for i in range(100)]
    digests, paths = [], []
    for i in range(60):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
        digests.append(hashlib.sha256(path.read_bytes()).digest())
        paths.append(path.name.encode())
    truth = np.arange(n) % 100
    logits = rng.normal(size=(n, 100)) + 4 * np.eye(100)[truth]
    powers = np.exp(logits)
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    labels, X = np.array(classes)[truth], logits.astype(np.float16)
    each = np.arange(n) % 60
    held = Predictions([digests[i] for i in each], [paths[i] for i in each], labels, probabilities, "test")
    train = Subset(X[::-1], labels[::-1], held.sha256[::-1], held.paths[::-1], held.sha256[::-1])
    metrics = score(labels, probabilities, classes, "test", temperature=1.5).to_json()
    shown = illustrate(held, classes, X=X, fitted=[train], files=FolderFiles(tmp_path))
    html = bundle_report(replace(bundle, classes=classes, metrics=metrics), held, shown)
    assert Page(html).images == MISTAKES * (1 + NEIGHBOURS)
    assert f"{POINTS} of the 10000 held-out images" in html
    assert 500_000 < len(html.encode()) < 5_000_000
    assert loads_nothing(html)


def test_a_fine_tuned_bundle_shows_its_mistakes(cache: FeatureCache, tmp_path: Path) -> None:
    network: dict[str, Any] = {"backbone": "squeezenet1_1", "weights": "random:0", "resize": 72, "crop": 64}
    tuned = finetune(
        cache, tmp_path / "tuned.head", FineTuneSettings(**network, epochs=1, quiet=True, device="cpu", refit=False)
    )
    assert tuned.metrics is not None
    errors = tuned.metrics["n"] - tuned.metrics["correct"]
    assert errors
    assert Page((tuned.path / "report.html").read_text()).images == min(errors, MISTAKES)
