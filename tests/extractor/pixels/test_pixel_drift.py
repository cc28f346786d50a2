"""A library that decodes otherwise changes the pixels under a bundle: that is refused, or measured where it is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.fuse import fuse, selftest
from classifiers.bundles.predictor import FIRST, Predictor
from classifiers.finetuning.init_head import AffineHead
from classifiers.heads.registry import make_head
from classifiers.training.settings import TrainOptions
from extractor.backbones.networks import Loaded
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs.backbone_facts import PROBE_IMAGE
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pixels.pixel_drift import PixelOrigin, ProbeImage, then_and_now
from extractor.pixels.preprocess import probe
from store.cache import FeatureCache
from store.errors import FingerprintMismatchError
from store.fingerprint import Fingerprint

Penult = Callable[..., tuple[int, str, str]]

LIGHTER = """
from PIL import Image
resize = Image.Image.resize
Image.Image.resize = lambda *given, **named: resize(*given, **named).point(lambda level: min(level + 1, 255))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dataset: Any, backbone_file: Path) -> Path:
    """Pictures, a cache, a bundle and a fused file, made with the libraries as they are."""
    folder = tmp_path_factory.mktemp("drift")
    dataset(folder / "photos", {"ants": 15, "bees": 15})
    dataset(folder / "new", {"ants": 10, "bees": 10}, seed=1)
    run_extract(ImageFolder(folder / "photos"), Backbone(str(backbone_file)), folder / "a.cache", Options(quiet=True))
    bundle = classifiers.train(
        FeatureCache(folder / "a.cache"), folder / "a.head", make_head("logistic", C=1.0), TrainOptions(thumbnails=False)
    )
    fuse(bundle, folder / "a.onnx")
    return folder


@pytest.fixture
def lighter(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Pillow whose resize gives every value one level more, here and in the decode workers."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(LIGHTER)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda *given, **named: resize(*given, **named).point(lambda level: min(level + 1, 255)),
    )
    probe.cache_clear()
    yield
    probe.cache_clear()


def images(folder: Path) -> list[Path]:
    return sorted((folder / "new").rglob("*.jpg"))


@pytest.mark.usefixtures("lighter")
def test_other_pixels_are_refused(made: Path, tmp_path: Path, penult: Penult) -> None:
    commands = [
        ("predict", made / "a.head", made / "new"),
        ("predict", made / "a.head", made / "new", "--format", "csv"),
        ("predict", made / "a.onnx", made / "new"),
        ("predict", made / "a.onnx", "--selftest"),
        ("predict", made / "a.head", "--selftest"),
        ("evaluate", made / "a.head", made / "new"),
        ("report", made / "a.head", made / "new", "-o", tmp_path / "page.html"),
    ]
    for command in commands:
        code, said, err = penult(*command)
        assert (code, said) == (65, ""), command
        assert "was made from other pixels than this machine makes" in err
        assert "the built-in test image is decoded differently (the same versions then and now, pillow " in err
        assert "Install the earlier versions, or extract and train again with these; --accept-pixels measures" in err
    assert penult("evaluate", made / "a.head", made / "a.cache")[0] == 0, "from cached features no pixel is made"
    assert not (tmp_path / "page.html").exists()


def test_accepted_they_are_measured(made: Path, tmp_path: Path, penult: Penult, request: pytest.FixtureRequest) -> None:
    before = {p.path: p for p in Predictor.load(made / "a.head").predict(images(made))}
    request.getfixturevalue("lighter")
    predictor = Predictor.load(made / "a.head", accept_pixels=True)
    found = list(predictor.predict(images(made)))
    drift = predictor.pixel_drift
    assert drift is not None
    assert (drift.levels, drift.images) == (1, FIRST)
    assert drift.share is not None
    assert drift.share > 0.9, "white stays white"
    assert drift.features is not None
    assert 1e-5 < drift.features < 0.1
    pairs = [(before[p.path].probabilities, p.probabilities) for p in found[:FIRST]]
    exact = max(float(np.abs(a - b).max()) for a, b in pairs if a is not None and b is not None)
    assert exact == pytest.approx(drift.images_outputs, rel=0.1), "what was inferred from the test image is what happened"
    assert drift.images_decisions == sum(before[p.path].label != p.label for p in found[:FIRST])
    for place in (made / "a.head", made / "a.onnx"):
        code, said, err = penult("predict", place, made / "new", "--format", "jsonl", "--accept-pixels")
        assert code == 0
        assert "of the values of the test image differ, by up to 1 of 255 levels; that moves" in err
        assert f"The same change in the first {FIRST} images moves outputs by up to" in err
        facts = [json.loads(line)["pixel_drift"] for line in said.splitlines()]
        assert len(facts) == 20
        assert all(each == facts[0] for each in facts)
        assert (facts[0]["levels"], facts[0]["features"] is None) == (1, place.suffix == ".onnx")
        assert facts[0]["then"]["pillow"] == facts[0]["now"]["pillow"]
    code, said, _ = penult("evaluate", made / "a.head", made / "new", "--json", "--accept-pixels")
    assert (code, json.loads(said)["pixel_drift"]["levels"]) == (0, 1)
    page = tmp_path / "page.html"
    assert penult("report", made / "a.head", made / "new", "-o", page, "--accept-pixels")[0] == 0
    assert "of the values of the test image differ" in page.read_text()
    assert "golden vectors agree" in selftest(made / "a.onnx", accept_pixels=True)


def test_without_a_change_nothing_is_said(made: Path, penult: Penult) -> None:
    code, said, err = penult("predict", made / "a.head", made / "new", "--format", "jsonl", "--accept-pixels")
    assert (code, "pixel" in said + err) == (0, False)
    code, said, _ = penult("evaluate", made / "a.head", made / "new", "--json")
    assert (code, json.loads(said)["pixel_drift"]) == (0, None)


@pytest.mark.usefixtures("lighter")
def test_a_head_of_other_pixels_is_no_start_for_finetuning(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(made / "a.head")
    preprocess, weights = bundle.backbone.preprocess, bundle.backbone.weights_sha256
    network = Loaded(None, preprocess, "mine", weights)
    with pytest.raises(FingerprintMismatchError, match="takes features of other pixels than this machine makes"):
        AffineHead.of(bundle).require_features(network, bundle.backbone.layer)
    probe.cache_clear()
    monkeypatch.undo()
    AffineHead.of(bundle).require_features(network, bundle.backbone.layer)


def test_what_the_network_says_of_the_test_image(made: Path) -> None:
    bundle = Bundle.load(made / "a.head")
    preprocess = bundle.backbone.preprocess
    digest = str(bundle.fingerprint.leaves()["pixels.probe"])
    for path in ("pillow", "pillow-draft"):
        each = replace(preprocess, pixel_path=path)
        here = ProbeImage.here(each)
        again = ProbeImage.parse(json.dumps(here.to_json()), probe(each))
        assert here.probe == probe(each)
        assert again is not None
        assert [a.tobytes() for a in again.pixels] == [a.tobytes() for a in here.pixels]
        assert {"pillow", "libjpeg-turbo"} <= set(again.libraries)
    assert (
        then_and_now({"pillow": "12.3.0", "zlib": "1"}, {"pillow": "13.0.0", "zlib": "1"})
        == "pillow 12.3.0 then, pillow 13.0.0 now"
    )
    for text in (None, "", "{", "[]", '{"shapes": [[1, 1, 3]], "pixels": ["x"], "libraries": {}}', json.dumps(here.to_json())):
        assert ProbeImage.parse(text, digest) is None, "what does not fit the fingerprint is not compared with"
    assert not PixelOrigin.of("x", Fingerprint({"pixels": {}})).differs(preprocess), "nothing is recorded"
    model = onnx.load(made / "a.head/backbone.onnx")
    (entry,) = [entry for entry in model.metadata_props if entry.key == PROBE_IMAGE]
    assert ProbeImage.parse(entry.value, digest) is not None
    assert len(entry.value) < 2 * 64 * 64 * 3, "it is not the largest part of a file"


@pytest.mark.usefixtures("lighter")
def test_a_bundle_of_before_says_that_it_cannot_tell(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("classifiers.bundles.predictor.PROBE_IMAGE", "what no file has")
    with pytest.raises(FingerprintMismatchError, match=r"\(the earlier versions are not recorded; here they are pillow"):
        Predictor.load(made / "a.head").predict([])
    predictor = Predictor.load(made / "a.head", accept_pixels=True)
    assert [p.code for p in predictor.predict(images(made)[:3])] == [None] * 3
    assert "How much they differ cannot be measured: it does not hold the earlier test image" in caplog.text
