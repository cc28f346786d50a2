"""Fine-tuning that starts from the head of a bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.finetuning.finetune import finetune, train_network
from classifiers.finetuning.init_head import AffineHead, start_from
from classifiers.finetuning.settings import FineTuneOptions, FineTuneSettings
from classifiers.heads.registry import make_head
from classifiers.training.cost import needed
from classifiers.training.settings import TrainOptions
from classifiers.training.train import save_head
from extractor.backbones import networks
from extractor.backbones.layers import torch_penultimate
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import extract
from store.cache import FeatureCache
from store.errors import BadDataError, FingerprintMismatchError, UsageError

NETWORK = Backbone("squeezenet1_1", "random:0", resize=72, crop=64)
FAST = FineTuneOptions(epochs=1, batch_size=8, device="cpu", quiet=True, refit=False)
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def cache(dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, exports_here: None) -> FeatureCache:
    folder = tmp_path_factory.mktemp("probing")
    return extract(ImageFolder(dataset(folder / "photos", {"ants": 20, "bees": 20})), NETWORK, folder / "photos.cache")


@pytest.fixture(scope="module")
def probe(cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return classifiers.train(
        cache,
        tmp_path_factory.mktemp("heads") / "logistic.head",
        make_head("logistic", C=100.0),
        TrainOptions(thumbnails=False),
    )


def held_out(cache: FeatureCache) -> list[bytes]:
    return [row.sha256 for row in cache.rows("test")]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def test_epoch_0_is_the_bundles_head(cache: FeatureCache, probe: Bundle) -> None:
    """The folded head on features of the untouched network gives the bundle's probabilities, and the first row is theirs."""
    import torch

    files = {label: [row.path.decode() for row in cache.rows("val") if row.label == label] for label in ("ants", "bees")}
    root = cache.root
    items = [(root / path, index) for index, label in enumerate(files) for path in files[label]]
    loaded = networks.load(NETWORK)
    pixels = [loaded.preprocess.pixels(Image.open(path).convert("RGB")) for path, _ in items]
    batch = loaded.preprocess.normalise(np.stack(pixels))
    features = torch_penultimate(loaded.network, torch.from_numpy(batch))[1](batch)
    expected = probe.head_function()(features)
    assert expected.std() > 0.001
    start = start_from(probe, ["ants", "bees"], held_out(cache))
    assert (start.weight.dtype, start.bias.dtype) == (np.float32, np.float32)
    assert np.abs(softmax(features @ start.weight.T + start.bias) - expected).max() < 1e-5
    tuned = train_network([*items, *items], items, 2, NETWORK, FAST, start=start)
    truth = [label for _, label in items]
    assert tuned.history[0]["val_loss"] == pytest.approx(-np.log(expected[np.arange(len(items)), truth]).mean(), abs=1e-5)
    assert tuned.history[0]["val_accuracy"] == (expected.argmax(axis=1) == truth).mean()
    assert tuned.head_lr_factor == 1.0


def test_a_bundle_from_a_bundle(
    cache: FeatureCache, probe: Bundle, tmp_path: Path, penult: Callable[..., tuple[int, str, str]], clock: Any
) -> None:
    out = tmp_path / "tuned.head"
    clock.slow("classifiers.finetuning.finetune:networks.load", 100)
    clock.slow("torch.nn.functional:cross_entropy", 25)
    clock.slow("classifiers.finetuning.finetune:to_onnx", 100)
    clock.slow("extractor.runtime.session:Embedder.embed", 20)
    network = ("-m", "squeezenet1_1", "--weights", "random:0", "--resize", 72, "--crop", 64)
    settings = ("--epochs", 1, "--batch-size", 8, "--log-dir", tmp_path / "logs", "--schedule", "step", "--ema", 0.9)
    code, stdout, err = penult(
        "finetune", cache.path, *network, *settings, "--init-head", probe.path, "-o", out, "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert clock.longest_silence <= 40, clock.lines
    assert re.search(r"fine-tuning: \d+ of 40 images, .* left", clock.text), clock.text
    assert re.search(r"refitting: \d+ of 32 images", clock.text), clock.text
    assert "still exporting the fine-tuned squeezenet1_1, 1 min " in clock.text
    assert re.search(r"predicting: \d+ of 8 images", clock.text), clock.text
    facts = json.loads(stdout)
    settings_kept = {key: facts["hyperparameters"][key] for key in ("init_head", "head_lr_factor", "ema", "schedule")}
    assert settings_kept == {"init_head": "logistic.head", "head_lr_factor": 1.0, "ema": 0.9, "schedule": "step"}
    assert [row["epoch"] for row in facts["history"]] == [0, 1]
    assert (facts["hyperparameters"]["refit"], facts["history"][1]["refit_loss"] > 0) == (True, True)
    assert facts["hyperparameters"]["temperature"] is None  # the head was fitted on the images that it would be fitted on
    assert facts["cost"]["init_head"] == needed(probe.cost, 32 / 40)
    assert facts["cost"]["init_head"]["images"] == 32  # of the 40 of the cache
    assert Bundle.load(out).predictions().ids == probe.predictions().ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "tuned.head"]  # no checkpoints are left
    code, _, err = penult("finetune", cache.path, *network, "--init-head", tmp_path / "logs", "-o", tmp_path / "x")
    assert (code, "is not a bundle" in err) == (66, True)


@pytest.mark.parametrize("name", ["mlp", "knn", "centroid"])
def test_heads_that_are_no_matrix(name: str, cache: FeatureCache, tmp_path: Path) -> None:
    settings = {"hidden": [4], "lr": 0.01} if name == "mlp" else {}
    bundle = classifiers.train(cache, tmp_path / f"{name}.head", make_head(name, **settings), TrainOptions(thumbnails=False))
    with pytest.raises(UsageError, match=rf"{name}\.head is a {name} head, which no single layer .* --head logistic or ridge"):
        AffineHead.of(bundle)


def test_ridge_is_a_matrix(cache: FeatureCache, tmp_path: Path) -> None:
    bundle = classifiers.train(cache, tmp_path / "ridge.head", make_head("ridge"), TrainOptions(thumbnails=False))
    start, subset = AffineHead.of(bundle), cache.subset("test")
    features = subset.X.astype(np.float32)
    expected = bundle.head_function()(features)
    assert np.abs(softmax(features @ start.weight.T + start.bias) - expected).max() < 1e-5


def test_other_features_classes_or_split(cache: FeatureCache, probe: Bundle, tmp_path: Path) -> None:
    start = start_from(probe, ["ants", "bees"], held_out(cache))
    loaded = networks.load(replace(NETWORK, weights="random:1", resize=80))
    with pytest.raises(FingerprintMismatchError, match=r"logistic.head takes other features .*weights: .*preprocessing: "):
        start.require_features(loaded, start.backbone.layer)
    with pytest.raises(FingerprintMismatchError, match=r"with; layer: input of classifier.1 against features.3. Its cache"):
        start.require_features(networks.load(NETWORK), "features.3")
    with pytest.raises(BadDataError, match="has other classes than these samples: bees, wasps in only one"):
        start_from(probe, ["ants", "wasps"], [])
    network: dict[str, Any] = {"backbone": "squeezenet1_1", "weights": "random:0", "resize": 72, "crop": 64}
    everything = cache.of_rows([row for row in cache.rows() if row.ok], "all")
    head = make_head("logistic", C=1.0).fit(everything.X, everything.y)
    leaky = save_head(cache, tmp_path / "leaky.head", head, fitted=[everything], held_out=None)
    with pytest.raises(BadDataError, match=rf"was fitted on {len(held_out(cache))} of the images that are held out here"):
        finetune(cache, tmp_path / "x.head", FineTuneSettings(**network, init_head=leaky.path))


def test_a_head_with_data_elsewhere_is_refused(probe: Bundle, tmp_path: Path) -> None:
    import onnx

    model: Any = onnx.load(probe.path / "head.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "head.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadDataError, match="data in other files"):
        AffineHead.of(replace(probe, path=tmp_path))
