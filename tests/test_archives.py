"""Caches, bundles and fused files of earlier formats: they open, verify, extend and give the same numbers, for ever.

A failure here is not mended by making an archive anew: what it holds is what users have. See ``make.py`` beside each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.fuse import fuse, selftest
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictor import Predictor
from classifiers.heads.registry import make_head
from classifiers.training.settings import TrainOptions
from classifiers.training.train import made_from
from extractor.backbones.registry import Backbone
from extractor.data.sources import open_source
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.verify import verify_cache

V1 = Path(__file__).parent / "data/archives/v1"
EXPECTED: dict[str, Any] = json.loads((V1 / "expected.json").read_text())
CACHES, BUNDLES = EXPECTED["caches"], EXPECTED["bundles"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What may be written to is never the archive itself."""
    return shutil.copytree(V1, tmp_path / "v1")


def test_nobody_has_touched_the_archive() -> None:
    there = {str(path.relative_to(V1)): path for path in V1.rglob("*") if path.is_file()}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()}
    assert {name: digests.get(name) for name in EXPECTED["files"]} == EXPECTED["files"]
    assert set(there) - set(EXPECTED["files"]) == {"make.py", "expected.json"}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_sound_and_holds_the_recorded_features(name: str, copy: Path) -> None:
    cache = FeatureCache(copy / name)
    assert verify_cache(cache.path) == []
    assert cache.layers == [each["layer"] for each in CACHES[name]["sets"]]
    for each in CACHES[name]["sets"]:
        found = cache.with_layer(each["layer"])
        assert found.fingerprint.canonical == each["fingerprint"]
        assert str(found.dtype) == each["dtype"]
        assert (found.dim, found.views) == (each["dim"], each["views"])
        assert {split: len(found.rows(split)) for split in found.samples.splits()} == each["splits"]
        features = found.features([bytes.fromhex(digest) for digest in each["features"]], views=found.views > 1)
        assert features.dtype == each["dtype"]
        assert [row.tobytes().hex() for row in features] == list(each["features"].values())


@pytest.mark.parametrize("name", [name for name in CACHES if "data" in CACHES[name]])
def test_extract_computes_nothing_of_what_a_cache_has_and_one_picture_more(name: str, copy: Path) -> None:
    made = CACHES[name]
    data, given = copy / made["data"], {key: made[key] for key in ("task", "targets") if key in made}
    backbone = Backbone(str(copy / "network.onnx"), layers=tuple(made.get("layers", ())))
    options = Options(device="cpu", quiet=True, **(made.get("options") or {}))
    again = run_extract(open_source(data, **given), backbone, copy / name, options)
    counts = {"inputs": again.inputs, "ok": again.ok, "duplicates": again.duplicates, "failed": again.failed}
    assert (again.computed, again.inference_calls) == (0, 0)
    assert {**counts, "computed": made["counts"]["ok"]} == made["counts"]
    if data.is_dir():
        (copy / "extra.jpg").rename(data / "train/green/extra.jpg")
    else:
        data.write_text(data.read_text() + {"multi-label": "extra.jpg,green,\n", "regression": "extra.jpg,1,2\n"}[made["task"]])
    more = run_extract(open_source(data, **given), backbone, copy / name, options)
    assert (more.computed, more.ok) == (1, made["counts"]["ok"] + 1)


def numbers(facts: Any, where: str = "") -> dict[str, float]:
    """Every number below, by its place, but for the bounds of shares: with few errors they are further away since then."""
    pairs = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    found = {where: float(facts)} if isinstance(facts, int | float) and not isinstance(facts, bool) else {}
    for key, value in pairs:
        wilson = str(key).endswith("_interval") or (key == "interval" and "wilson" in str(facts.get("method")))
        found |= {} if wilson else numbers(value, f"{where}.{key}")
    return found


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_predicts_and_is_judged_as_it_was(name: str, copy: Path) -> None:
    expected, bundle = BUNDLES[name], Bundle.load(copy / name)
    paths = [copy / path for path in EXPECTED["predicted"]]
    found = list(Predictor.of(bundle, device="cpu").predict(paths))
    probabilities = np.array([each.probabilities for each in found])
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected["probabilities"], rtol=1e-5, atol=1e-5)
    assert [each.label for each in found] == expected["labels"]
    result = evaluate_bundle(bundle, copy / expected["evaluated_on"])[0]
    evaluation = numbers(result.to_json())
    recorded = {place.replace("figures", "scores"): number for place, number in numbers(expected["evaluation"]).items()}
    if result.groups:  # since then their images count together
        recorded = {place: number for place, number in recorded.items() if "interval" not in place}
    assert recorded == pytest.approx({place: evaluation.get(place) for place in recorded}, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in BUNDLES if BUNDLES[name]["made_from"]])
def test_a_job_does_not_train_again_what_it_has(name: str) -> None:
    made = BUNDLES[name]
    cache = FeatureCache(V1 / made["cache"], made.get("layer"))
    head = make_head(made["head"], cache.samples.task.name, seed=0, **made.get("settings", {}))
    given = made["training"]
    options = TrainOptions(thumbnails=given.get("pictures", True), average_views=given.get("average_views", False))
    assert made_from(cache, head, options) == made["made_from"]
    assert Bundle.load(V1 / name).made_from == made["made_from"]


def test_a_fused_file_passes_its_own_test(copy: Path) -> None:
    assert "16 golden vectors agree" in selftest(copy / "fused.onnx", device="cpu")


@pytest.mark.parametrize("head", ["knn", "centroid"])
def test_heads_with_newer_operators_than_their_backbone_are_fused(copy: Path, tmp_path: Path, head: str) -> None:
    """onnx converts ReduceL2, Shape and others to newer opsets only: then it is the backbone that is converted."""
    fuse(Bundle.load(copy / f"{head}.head"), tmp_path / "fused.onnx")
    assert "16 golden vectors agree" in selftest(tmp_path / "fused.onnx", device="cpu")
