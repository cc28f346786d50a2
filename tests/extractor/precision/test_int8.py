"""int8 on the CPU: calibrated once on training images, near to float or refused, and frozen in the cache.

The network is a small one that was trained for seconds: random weights would prove nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import classifiers
from classifiers.demo import write_digits
from classifiers.heads.registry import make_head
from classifiers.training.int8_check import judge_rounding
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs import cpu_session
from extractor.graphs.backbone_facts import BackboneFacts, Layer, read_facts, write_facts
from extractor.graphs.onnx_file import save
from extractor.graphs.parity import cosines
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import Summary
from extractor.pixels.preprocess import Preprocess
from extractor.precision import calibration as calibrating
from extractor.precision.int8 import BOUND, quantise
from extractor.precision.quantiser import Network
from extractor.precision.ranges import BINS, METHODS, Histogram, Observed, histogram, ranges
from extractor.precision.registry import Report
from extractor.runtime import session
from store.cache import FeatureCache
from store.errors import BadDataError, FingerprintMismatchError, InterruptedRunError, UsageError
from store.format.calibration import read_calibration, write_calibration
from store.verify import verify_cache

Pair = tuple[FeatureCache, FeatureCache]
Penult = Callable[..., tuple[int, str, str]]
Patch = pytest.MonkeyPatch

SIDE = 16
INT8 = Options(precision="int8", quiet=True)
PREPROCESS = Preprocess(SIDE, SIDE, "bilinear", (0.5,) * 3, (0.5,) * 3)


def write_network(path: Path, state: dict[str, np.ndarray], stretch: float = 1.0) -> Path:
    """Three convolutions and a residual sum, as a backbone file.

    Args:
        path: the file.
        state: arrays by torch's names.
        stretch: multiplies one channel in the middle and divides it out again: nothing in float, ruin in 8 bits.
    """
    state = {name: array.copy() for name, array in state.items()}
    state["1.weight"][0] *= stretch
    state["1.bias"][0] *= stretch
    state["2.weight"][:, 0] /= stretch
    nodes, last = [], "pixels"
    for i, strides in enumerate([(1, 1), (2, 2), (1, 1)]):
        out = "sum_in" if i == 2 else f"conv_{i}"
        inputs = [last, f"{i}.weight", f"{i}.bias"]
        nodes.append(onnx.helper.make_node("Conv", inputs, [out], pads=[1] * 4, kernel_shape=[3, 3], strides=strides))
        if i < 2:
            nodes.append(onnx.helper.make_node("Relu", [out], [f"relu_{i}"]))
            last = f"relu_{i}"
    nodes += [
        onnx.helper.make_node("Relu", ["sum_in"], ["last"]),
        onnx.helper.make_node("GlobalAveragePool", ["last"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in state.items()]
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["n", 3, SIDE, SIDE])
    features = onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["n", 32])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "digits", [pixels], [features], tensors),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=10,
    )
    layer = Layer("input of fc", "average", 32)
    write_facts(model, BackboneFacts("digits", f"x{stretch}", f"{stretch:064.3f}", (layer,), PREPROCESS))
    save(model, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Weights of a small network that reads digits."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1).expand(-1, 3, -1, -1)
    x = nn.functional.interpolate(x, size=SIDE, mode="bilinear")
    y = torch.from_numpy(labels)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(24, 32, 3, padding=1)]
    net = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    head = nn.Linear(32, 10)
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(8):
        for rows in torch.split(torch.randperm(len(x)), 64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(head(net(x[rows]).mean(dim=(2, 3))), y[rows]).backward()
            optimiser.step()
    return {f"{i}.{name}": value.detach().numpy() for i, layer in enumerate(layers) for name, value in layer.named_parameters()}


@pytest.fixture(scope="module")
def network(trained: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("network") / "digits.onnx", trained)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, limit=300)
    return folder


@pytest.fixture(scope="module")
def made(network: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, FeatureCache]:
    """The same digits in float and in int8."""
    folder = tmp_path_factory.mktemp("caches")
    for options in (Options(quiet=True), INT8):
        run_extract(ImageFolder(digits), Backbone(str(network)), folder / options.precision, options)
    return FeatureCache(folder / "fp32"), FeatureCache(folder / "int8")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty store of prepared backbones for each test, so that all of them calibrate."""
    monkeypatch.setenv("PENULT_CACHE", str(tmp_path / "penult"))
    return tmp_path / "penult/backbones"


def everything(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_int8_is_near_to_float(made: Pair) -> None:
    exact, rounded = made
    keys = [row.sha256 for row in exact.rows()]
    cosine = cosines([exact.features(keys).astype(np.float32)], [rounded.features(keys).astype(np.float32)])
    assert cosine.min() >= BOUND
    assert 0 < (1 - cosine).mean() < 0.002
    calibration = rounded.meta["facts"]["calibration"]
    assert calibration["min"] >= BOUND
    assert {each["method"] for each in calibration["tried"]} == set(METHODS)


def test_the_fingerprint_says_so_and_that_of_float_does_not_change(made: Pair) -> None:
    exact, rounded = (cache.fingerprint.fields for cache in made)
    digest = made[1].meta["facts"]["calibration"]["sha256"]
    assert dict(rounded) == {**exact, "precision": "int8", "calibration": digest}
    assert exact["precision"] == "fp32"
    assert "calibration" not in exact


def test_the_network_runs_in_integers(made: Pair, tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(made[1].path / "backbone.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    floats = len(read_facts(made[1].path / "backbone.onnx").calibration["float_layers"])
    assert kinds.count("QLinearConv") == 3 - floats
    assert floats < 3


def test_a_calibration_is_made_once(network: Path, digits: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    cache = tmp_path / "cache"
    few = Options(precision="int8", quiet=True, limit=150)
    first = run_extract(ImageFolder(digits), Backbone(str(network)), cache, few)
    before = (cache / "backbone.onnx").read_bytes()
    monkeypatch.setattr(calibrating, "quantise", None)  # it would fail if it were called again
    again = run_extract(ImageFolder(digits), Backbone(str(network)), cache, few)
    more = run_extract(ImageFolder(digits), Backbone(str(network)), cache, INT8)
    assert (first.computed, again.computed, more.computed) == (150, 0, 150)
    assert first.conversion["images"] == 150
    assert first.conversion["core_seconds"] > 0
    assert (again.conversion, more.conversion) == ({}, {})
    (cache / "cache.json").unlink()  # the shards tell the fingerprint, and the file which network it was made of
    assert run_extract(ImageFolder(digits), Backbone(str(network)), cache, INT8).computed == 0
    assert (cache / "backbone.onnx").read_bytes() == before
    assert verify_cache(cache) == []


@pytest.mark.parametrize("at", [1, 20, 60])
def test_an_interrupted_calibration_leaves_nothing_and_is_repeated_alike(
    at: int,
    network: Path,
    digits: Path,
    made: Pair,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    cache, calls = tmp_path / "cache", 0
    check = calibrating.Calibrator._check

    def interrupted(self: calibrating.Calibrator) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise InterruptedRunError(15)
        check(self)

    monkeypatch.setattr(calibrating.Calibrator, "_check", interrupted)
    with pytest.raises(InterruptedRunError):
        run_extract(ImageFolder(digits), Backbone(str(network)), cache, INT8)
    assert not cache.exists()
    monkeypatch.undo()
    run_extract(ImageFolder(digits), Backbone(str(network)), cache, INT8)
    assert FeatureCache(cache).fingerprint == made[1].fingerprint
    for name in ("backbone.onnx", "calibration.h5"):
        assert (cache / name).read_bytes() == (made[1].path / name).read_bytes()


def test_a_killed_calibration_leaves_only_what_the_next_run_removes(network: Path, digits: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    (cache / ".lock").touch()
    for name in ("..backbone.onnx.0123456789ab.tmp.ba9876543210.tmp", ".calibration.h5.0123456789ab.tmp"):
        (cache / name).write_bytes(b"cut sh")
    run_extract(ImageFolder(digits), Backbone(str(network)), cache, INT8)
    assert not list(cache.glob(".*.tmp"))


def test_what_the_calibration_has_computed_is_not_computed_again(
    network: Path, digits: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    sizes: list[int] = []
    submit = session.Embedder.submit

    def counting(self: session.Embedder, batch: Any) -> Any:
        sizes.append(len(batch) if self._model == tmp_path / "cache/backbone.onnx" else 0)
        return submit(self, batch)

    monkeypatch.setattr(session.Embedder, "submit", counting)
    summary = run_extract(ImageFolder(digits), Backbone(str(network)), tmp_path / "cache", INT8)
    cache, kept = FeatureCache(tmp_path / "cache"), read_calibration(tmp_path / "cache")
    assert sum(sizes) == summary.computed - len(kept.sha256) == 300 - len(kept.sha256)
    stored = cache.features(list(kept.sha256))
    np.testing.assert_array_equal(stored, kept.rounded[0].astype(stored.dtype))
    assert verify_cache(cache.path) == []


def test_a_conversion_is_kept_for_the_same_network_and_images(
    network: Path,
    trained: dict[str, np.ndarray],
    kept: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_digits(tmp_path / "digits", limit=40)
    every = Options(precision="int8", quiet=True, val_fraction=0, test_fraction=0)
    calls = 0

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return quantise(*arguments)

    def run(name: str, model: Path = network) -> tuple[Summary, int]:
        before = calls
        return run_extract(ImageFolder(tmp_path / "digits"), Backbone(str(model)), tmp_path / name, every), calls - before

    monkeypatch.setattr(calibrating, "quantise", counting)
    caplog.set_level(logging.INFO, "penult")
    (first, made), (second, again) = run("a"), run("b")
    assert (made, again) == (1, 0)
    assert (first.conversion["prepared"], second.conversion) == ("calibrated", {"prepared": "store"})
    assert (second.computed, second.calibrated, second.inference_calls) == (40, 40, 0)
    assert "using the int8 conversion as prepared before" in caplog.text
    before, after = (FeatureCache(tmp_path / name) for name in "ab")
    assert before.fingerprint == after.fingerprint
    for file in ("backbone.onnx", "calibration.h5"):
        assert (before.path / file).read_bytes() == (after.path / file).read_bytes()
    keys = [row.sha256 for row in before.rows()]
    np.testing.assert_array_equal(before.features(keys), after.features(keys))
    assert verify_cache(after.path) == []

    assert run("other network", write_network(tmp_path / "other.onnx", trained, stretch=1.5))[1] == 1
    file = next(kept.glob("*/calibration.h5"))
    for damaged in kept.glob("*/calibration.h5"):
        damaged.write_bytes(damaged.read_bytes()[:-1])
    assert [run(name)[1] for name in ("damaged", "made again")] == [1, 0]
    assert "is damaged" in caplog.text
    assert file.exists()
    image, another = sorted((tmp_path / "digits").rglob("*.png"))[:2]
    image.write_bytes(another.read_bytes() + b"1")  # other bytes, the pixels of another
    assert [run(name)[1] for name in ("changed", "changed again")] == [1, 0]


@pytest.mark.parametrize(
    ("rates", "views", "pays_from"), [((100.0, 200.0), 1, 1000), ((100.0, 200.0), 4, 250), ((200.0, 100.0), 1, None)]
)
def test_the_break_even_is_what_the_calibration_cost_over_what_an_image_saves(
    rates: tuple[float, float], views: int, pays_from: int | None
) -> None:
    facts = Report("calibrated", core_seconds=5.0, rates=rates).facts(1784, views)
    assert facts == {
        "prepared": "calibrated",
        "core_seconds": 5.0,
        "images_per_core_second": {"fp32": rates[0], "int8": rates[1]},
        "images": 1784,
        "pays_from": pays_from,
    }
    assert Report().facts(1784, views) == {}


def test_only_training_images_are_looked_at(made: Pair) -> None:
    split = {row.sha256: row.split for row in made[1].rows()}
    looked_at = read_calibration(made[1].path).sha256
    assert {split[digest] for digest in looked_at} == {"train"}
    assert 8 <= len(looked_at) < sum(name == "train" for name in split.values())


def test_files_that_fail_later_move_no_calibration_image(network: Path, tmp_path: Path, clock: Any) -> None:
    write_digits(tmp_path / "digits", limit=200)
    damaged = sorted((tmp_path / "digits").rglob("*.png"))[::60]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-40])
    clock.slow("extractor.data.files:FolderFiles.read", 2)
    clock.slow("extractor.precision.calibration:quantise", 100)
    run_extract(
        ImageFolder(tmp_path / "digits"),
        Backbone(str(network)),
        tmp_path / "cache",
        Options(precision="int8", max_failures="9"),
    )
    assert clock.longest_silence <= 40
    for words in ("looking for training images: ", "reading images for int8: ", "still calibrating int8, 1 min"):
        assert words in clock.text
    cache = FeatureCache(tmp_path / "cache")
    assert cache.samples.counts["failed"] == len(damaged)
    split = {row.sha256: row.split for row in cache.rows()}
    assert {split[digest] for digest in read_calibration(cache.path).sha256} == {"train"}


def test_images_of_the_sources_own_training_split(network: Path, digits: Path, tmp_path: Path) -> None:
    for i, path in enumerate(sorted(digits.rglob("*.png"))):
        target = tmp_path / "data" / ("train" if i % 3 else "val") / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    run_extract(ImageFolder(tmp_path / "data"), Backbone(str(network)), tmp_path / "cache", INT8)
    cache = FeatureCache(tmp_path / "cache")
    assert set(read_calibration(cache.path).sha256) <= {row.sha256 for row in cache.rows("train")}


def test_too_few_images(network: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", limit=7)
    all_train = Options(precision="int8", quiet=True, val_fraction=0, test_fraction=0)
    with pytest.raises(BadDataError, match=r"at least 8 training images, and finds 7 here"):
        run_extract(ImageFolder(tmp_path / "digits"), Backbone(str(network)), tmp_path / "cache", all_train)
    assert not (tmp_path / "cache").exists()


def test_a_network_that_eight_bits_ruin_is_refused(
    trained: dict[str, np.ndarray], network: Path, digits: Path, tmp_path: Path, penult: Penult
) -> None:
    stretched = write_network(tmp_path / "stretched.onnx", trained, stretch=3e4)
    cache = tmp_path / "cache"
    code, _, err = penult("extract", digits, "-m", stretched, "-o", cache, "--precision", "int8")
    assert code == 65
    assert "int8 is too coarse for digits" in err
    assert "Use --precision fp32" in err
    assert not cache.exists()
    run_extract(ImageFolder(digits), Backbone(str(network)), cache, Options(quiet=True))
    before = everything(cache)
    assert penult("extract", digits, "-m", stretched, "-o", cache, "--precision", "int8", "--overwrite")[0] == 65
    assert everything(cache) == before
    assert penult("extract", digits, "-m", stretched, "-o", tmp_path / "float")[0] == 0


def test_float_and_int8_do_not_mix(made: Pair, network: Path, digits: Path) -> None:
    for cache, options in zip(made, (INT8, Options(quiet=True)), strict=True):
        before = everything(cache.path)
        with pytest.raises(FingerprintMismatchError, match="precision"):
            run_extract(ImageFolder(digits), Backbone(str(network)), cache.path, options)
        assert everything(cache.path) == before


def test_back_to_float_with_overwrite(network: Path, digits: Path, tmp_path: Path) -> None:
    for options in (INT8, Options(quiet=True, overwrite=True)):
        run_extract(ImageFolder(digits), Backbone(str(network)), tmp_path / "cache", options)
    assert not (tmp_path / "cache/calibration.h5").exists()
    assert FeatureCache(tmp_path / "cache").fingerprint.fields["precision"] == "fp32"


def test_int8_is_not_for_gpus(network: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for the CPU"):
        run_extract(ImageFolder(digits), Backbone(str(network)), tmp_path / "cache", Options(precision="int8", device="cuda"))


@pytest.mark.parametrize(("name", "settings"), [("logistic", {}), ("mlp", {"max_epochs": 12, "lr": 3e-3})])
def test_train_judges_and_records(name: str, settings: dict[str, Any], made: Pair, tmp_path: Path) -> None:
    exact, rounded = (
        classifiers.train(cache, tmp_path / f"{i}.head", make_head(name, **settings)) for i, cache in enumerate(made)
    )
    assert exact.rounding is None
    assert rounded.rounding is not None
    found = json.loads((rounded.path / "head.json").read_bytes())["rounding"]
    assert found == rounded.rounding
    assert found["n"] == len(read_calibration(made[1].path).sha256)
    low, high = found["change_interval"]
    assert low <= found["int8"] - found["fp32"] <= high
    assert high >= -0.005
    assert found["fp32"] > 0.7
    assert exact.metrics is not None
    assert rounded.metrics is not None
    assert abs(exact.metrics["accuracy"] - rounded.metrics["accuracy"]) <= max(0.005, 1.01 / exact.metrics["n"])


def test_train_refuses_a_head_that_int8_costs_too_much(network: Path, digits: Path, tmp_path: Path) -> None:
    run_extract(ImageFolder(digits), Backbone(str(network)), tmp_path / "cache", INT8)
    kept = read_calibration(tmp_path / "cache")
    noise = np.random.default_rng(0).normal(size=kept.rounded[0].shape).astype(np.float32)
    worse = [kept.rounded[0] + noise * kept.exact[0].std()]
    write_calibration(tmp_path / "cache", type(kept)(kept.calibration, kept.layers, kept.sha256, kept.exact, worse))
    with pytest.raises(BadDataError, match=r"int8 costs this head too much: cross-validated on \d+ training images"):
        classifiers.train(FeatureCache(tmp_path / "cache"), tmp_path / "a.head", make_head("logistic"))
    assert not (tmp_path / "a.head").exists()


def test_without_the_calibrations_features_train_says_that_it_cannot_judge(
    made: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from store.compact import write_compact

    write_compact(made[1], tmp_path / "one.h5")
    cache = FeatureCache(tmp_path / "one.h5")
    head = make_head("logistic", C=1.0).fit(cache.subset("train").X, cache.subset("train").y)
    assert judge_rounding(cache, head, cache.rows("train")) is None
    assert "cannot be measured" in caplog.text


def test_predict_and_evaluate_use_the_int8_network(made: Pair, digits: Path, tmp_path: Path) -> None:
    from classifiers.bundles.held_out import evaluate_bundle
    from classifiers.bundles.predictor import Predictor

    bundle = classifiers.train(made[1], tmp_path / "a.head", make_head("logistic"))
    evaluation, predictions = evaluate_bundle(bundle, made[1].path)
    files = [bytes(digits) + b"/" + path for path in predictions.paths]
    for found, expected in zip(Predictor.of(bundle).predict(files), predictions.probabilities, strict=True):
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert evaluation.n == len(made[1].rows("test"))


def test_info_and_verify(made: Pair, penult: Penult, tmp_path: Path) -> None:
    code, out, _ = penult("info", made[1].path)
    assert code == 0
    assert "calibrated on" in out
    assert "cosine to float" in out
    assert json.loads(penult("info", made[1].path, "--json")[1])["facts"]["calibration"]["method"] in METHODS
    assert penult("verify", made[1].path)[0] == 0
    file = made[1].path / "calibration.h5"
    sound = file.read_bytes()
    file.write_bytes(sound[:-100] + bytes(100))
    try:
        assert "calibration.h5" in penult("verify", made[1].path)[1]
    finally:
        file.write_bytes(sound)


def test_several_feature_sets_are_judged_each(digits: Path, tmp_path: Path, network: Path) -> None:
    model = onnx.load(network)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "theirs.onnx")
    both = Backbone(
        str(tmp_path / "theirs.onnx"), layers=("features", "relu_0"), mean=(0.5,), std=(0.5,), resize=SIDE, crop=SIDE
    )
    run_extract(ImageFolder(digits), both, tmp_path / "cache", INT8)
    kept = read_calibration(tmp_path / "cache")
    assert [each.shape[1] for each in kept.exact] == [32, 16]
    for layer in kept.layers:
        head = classifiers.train(FeatureCache(tmp_path / "cache", layer), tmp_path / f"{layer}.head", make_head("logistic"))
        assert head.rounding is not None


def test_ranges_of_what_was_seen() -> None:
    histogram_of_x = Histogram()
    for part in np.split(np.random.default_rng(0).normal(size=(100_000)), 10):
        assert histogram_of_x.add(part.astype(np.float32))
    assert histogram_of_x.add(np.array([8.0], np.float32))
    assert not histogram_of_x.add(np.array([9.0, np.nan], np.float32))
    observed = Observed({"x": histogram_of_x}, {"before": "x"})
    widths: dict[str, Any] = {method: ranges(observed, method)["x"] for method in METHODS}
    assert widths["min-max"][1] == 8
    assert 3.5 < widths["percentile 99.99"][1] < 4.6
    assert widths["percentile 99.99"][1] < widths["percentile 99.999"][1] <= 8
    assert all(low < -2 and high > 2 for low, high in widths.values())
    assert ranges(observed, "min-max")["before"] == widths["min-max"]


def test_the_histogram_is_numpys_also_when_its_reach_grows() -> None:
    values = np.random.default_rng(0).normal(size=30_000).astype(np.float32)
    growing = Histogram()
    for part in (values[:1] * 0, values[:10_000] / 7, values[10_000:20_000], values[20_000:] * 9):
        assert growing.add(part)
    every = np.concatenate([values[:1] * 0, values[:10_000] / 7, values[10_000:20_000], values[20_000:] * 9])
    assert growing.low == every.min()
    assert growing.high == every.max()
    assert growing.counts.sum() == len(every)
    assert 1 <= growing.reach / np.abs(every).max() < 2
    expected = np.histogram(every, BINS, range=(-growing.reach, growing.reach))[0]
    assert np.abs(np.cumsum(growing.counts - expected)).max() <= 2  # values at an edge
    full = float(np.abs(values).max())
    expected = np.histogram(values, BINS, range=(-full, full))[0]
    assert np.abs(np.cumsum(histogram(values, full) - expected)).max() <= 2


def test_the_quantiser_gives_what_onnx_runtimes_own_does(network: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    images = np.random.default_rng(1).integers(0, 256, (8, SIDE, SIDE, 3), np.uint8)
    used = Network(network, read_facts(network), tmp_path)
    model = onnx.ModelProto()
    model.CopyFrom(used.model)
    observed, _ = used.observe(images, lambda: None)
    wanted, floats = ranges(observed, "least squares"), used.weighted[:1]
    data = TensorsData(CalibrationMethod.MinMax, dict(wanted))
    settings = {"WeightSymmetric": True, "ActivationSymmetric": False, "MatMulConstBOnly": True}
    types, operators = (QuantType.QInt8, QuantType.QUInt8), list(used.operators)
    theirs = QDQQuantizer(model, True, False, *types, data, [], floats, operators, settings).quantize_model()
    for method, layers in (("min-max", ()), ("min-max", used.weighted[1:])):
        used.quantised(ranges(observed, method), layers)  # what it remembers of these changes nothing
    ours = used.quantised(wanted, floats)
    assert ours.graph.node == theirs.graph.node
    assert ours.graph.initializer == theirs.graph.initializer


def test_a_cpu_whose_8_bit_sums_overflow_gets_exact_kernels(network: Path, monkeypatch: Patch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).normal(size=(4, 3, SIDE, SIDE)).astype(np.float32)
    images = np.random.default_rng(1).integers(0, 256, (32, SIDE, SIDE, 3), np.uint8)
    quantise(network, tmp_path / "int8.onnx", read_facts(network), images[:16], images[16:])
    here = session.Embedder(tmp_path / "int8.onnx")(pixels)
    monkeypatch.setattr(cpu_session, "int8_saturates", lambda: True)
    there = session.Embedder(tmp_path / "int8.onnx")(pixels)
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)


@pytest.mark.assets
def test_imagenet_features_of_real_photos(
    assets: Path, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extractor.precision.calibration.CALIBRATED", 64)  # half of the usual ones, for time
    monkeypatch.setattr("extractor.precision.calibration.JUDGED", 64)
    run_extract(ImageFolder(assets / "data/hymenoptera"), Backbone(str(imagenet)), tmp_path / "cache", INT8)
    cache = FeatureCache(tmp_path / "cache")
    found = cache.meta["facts"]["calibration"]
    assert found["min"] >= 0.995
    assert found["mean"] >= 0.998
    assert found["mean"] > max(each["mean"] for each in found["tried"] if each["method"] == "min-max")
    bundle = classifiers.train(cache, tmp_path / "ants.head", make_head("logistic"))
    assert bundle.metrics is not None
    assert bundle.metrics["accuracy"] >= 0.95
    assert bundle.rounding is not None
    assert bundle.rounding["int8"] >= bundle.rounding["fp32"] - 0.005
