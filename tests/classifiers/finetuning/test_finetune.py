"""End-to-end training, frozen layers, early stopping, and what it leaves behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classifiers.evaluation.probabilities import fit_temperature
from classifiers.finetuning import loader as loading
from classifiers.finetuning.finetune import FineTuned, train_network
from classifiers.finetuning.freezing import modules_before, parameter_groups
from classifiers.finetuning.loader import read_resized
from classifiers.finetuning.settings import FineTuneOptions
from extractor.backbones import networks
from extractor.backbones.export import to_onnx
from extractor.backbones.layers import torch_penultimate
from extractor.backbones.registry import Backbone
from extractor.graphs.parity import relative_l2
from extractor.pixels.decoder import Decoder
from extractor.pixels.preprocess import Preprocess
from store.errors import (
    BadDataError,
    DeviceUnavailableError,
    InputMissingError,
    InterruptedRunError,
    UsageError,
)

SHUFFLE = Backbone("shufflenet_v2_x0_5", "random:0", resize=40, crop=32)
SQUEEZE = Backbone("squeezenet1_1", "random:0", resize=40, crop=32)
RESNET = Backbone("resnet18", "random:0", resize=40, crop=32)  # few nodes, so it is exported fast
COLOURS = ((200, 60, 60), (60, 60, 200))
FAST = FineTuneOptions(epochs=2, lr=0.01, head_lr_factor=2.0, device="cpu", quiet=True, refit=False)
Items = list[tuple[Path, int]]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Items, Items]:
    """33 training and 10 validation images of two colours, with noise; none is square."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    items = []
    for index in range(43):
        noise = rng.normal(0, 25, (48, 60, 3)) + COLOURS[index % 2]
        path = folder / f"{index:02}.png"
        Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(path)
        items.append((path, index % 2))
    return items[:33], items[33:]


def run(photos: tuple[Items, Items], backbone: Backbone = SHUFFLE, **changes: Any) -> FineTuned:
    return train_network(*photos, 2, backbone, FAST.replace(**changes))


def numbers(tuned: FineTuned) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in tuned.history]


def embed(tuned: FineTuned, items: Items) -> np.ndarray:
    preprocess = tuned.loaded.preprocess
    example = preprocess.normalise(np.zeros((1, preprocess.crop, preprocess.crop, 3), np.uint8))
    import torch

    _, features = torch_penultimate(tuned.loaded.network, torch.from_numpy(example))
    with Decoder(preprocess, crop=False) as decoder:
        pixels = np.stack([preprocess.pixels(read_resized(path, decoder)) for path, _ in items])
    return features(preprocess.normalise(pixels))


@pytest.fixture(scope="module")
def tuned(photos: tuple[Items, Items]) -> FineTuned:
    return run(photos, SQUEEZE, epochs=8, batch_size=8)


def test_it_learns_colours(tuned: FineTuned, photos: tuple[Items, Items]) -> None:
    best = tuned.history[tuned.best_epoch]
    assert best["val_accuracy"] == 1.0
    assert best["val_loss"] < 0.3
    logits = embed(tuned, photos[1]) @ tuned.weight.T + tuned.bias
    assert (logits.argmax(1) == [label for _, label in photos[1]]).all()
    loss = np.mean([np.log(np.exp(row - row[label]).sum()) for row, (_, label) in zip(logits, photos[1], strict=True)])
    assert loss == pytest.approx(best["val_loss"], abs=1e-4)  # what is returned is the best epoch, end to end


def test_what_it_returns(tuned: FineTuned) -> None:
    start = networks.load(SQUEEZE)
    loaded = tuned.loaded
    assert json.loads(json.dumps(tuned.history)) == tuned.history
    assert list(tuned.history[0]) == ["epoch", "train_loss", "val_loss", "val_accuracy", "lr", "head_lr", "seconds"]
    assert [row["epoch"] for row in tuned.history] == list(range(len(tuned.history)))
    assert (tuned.weight.shape, tuned.bias.shape) == ((2, 512), (2,))
    assert (tuned.weight.dtype, tuned.bias.dtype) == (np.float32, np.float32)
    assert loaded.weights_name == "fine-tuned from random:0"
    assert loaded.weights_digest == networks.digest(loaded.network.state_dict()) != start.weights_digest
    assert not any(part.training for part in loaded.network.modules())
    assert not any(part._forward_pre_hooks for part in loaded.network.modules())
    assert all(p.device.type == "cpu" and p.requires_grad and p.grad is None for p in loaded.network.parameters())
    for name in ("classifier.1.weight", "classifier.1.bias"):  # the old classifier is still there, as it was
        assert (loaded.network.state_dict()[name] == start.network.state_dict()[name]).all()
    body = sum(p.numel() for name, p in start.network.named_parameters() if not name.startswith("classifier."))
    assert tuned.trained_parameters == body + 2 * 512 + 2
    assert tuned.seconds >= sum(row["seconds"] for row in tuned.history)


def test_every_image_is_counted(tuned: FineTuned) -> None:
    # 33 images in batches of 8: the last one joins the batch before, batch normalisation takes no batch of one
    assert tuned.images == 10 + (len(tuned.history) - 1) * (33 + 10)


def test_epoch_0_is_before_any_training(tuned: FineTuned) -> None:
    before = tuned.history[0]
    assert (before["train_loss"], before["lr"], before["head_lr"]) == (None, None, None)
    assert before["val_loss"] == pytest.approx(np.log(2), abs=1e-6)  # the head begins at zero
    assert tuned.best_epoch > 0


@pytest.mark.parametrize(
    ("n", "size", "expected"), [(33, 16, [16, 17]), (32, 15, [15, 15, 2]), (2, 16, [2]), (3, 2, [3]), (1, 4, [1])]
)
def test_no_batch_of_one(photos: tuple[Items, Items], n: int, size: int, expected: list[int]) -> None:
    with Decoder(Preprocess(40, 32, "bilinear", (0.5,) * 3, (0.5,) * 3), crop=False) as decoder:
        batches = loading.Batches(photos[0][:n], decoder, FAST.replace(batch_size=size), train=True)
        assert len(batches) == len(expected)
        assert [len(labels) for _, labels in batches] == expected


def test_processes_share_every_batch(photos: tuple[Items, Items]) -> None:
    with Decoder(Preprocess(40, 32, "bilinear", (0.5,) * 3, (0.5,) * 3), crop=False) as decoder:
        options = FAST.replace(batch_size=10)
        shares = [loading.Batches(photos[0], decoder, options, train=True, share=(rank, 2)) for rank in (0, 1)]
        # three images are left, too few for two processes, and join the batch before
        assert [[len(labels) for _, labels in share] for share in shares] == [[5, 5, 7], [5, 5, 6]]


def test_batches_are_the_same_with_threads_and_without_memory(
    photos: tuple[Items, Items], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = Preprocess(40, 32, "bilinear", (0.5,) * 3, (0.5,) * 3)

    def two_epochs(workers: int) -> np.ndarray:
        with Decoder(preprocess, crop=False) as decoder:
            batches = loading.Batches(photos[0], decoder, FAST.replace(workers=workers), train=True)
            return np.concatenate([pixels.numpy() for _ in range(2) for pixels, _ in batches])

    alone = two_epochs(1)
    assert (two_epochs(3) == alone).all()
    assert not (alone[:33] == alone[33:]).all()
    monkeypatch.setattr(loading, "MAX_HELD", 5 * 40 * 50 * 3)
    assert (two_epochs(2) == alone).all()


def test_evaluation_pixels_are_the_extractors(photos: tuple[Items, Items]) -> None:
    preprocess = Preprocess(40, 32, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = np.stack([preprocess.pixels(Image.open(path).convert("RGB")) for path, _ in photos[1]])
    with Decoder(preprocess, crop=False) as decoder:
        batches = loading.Batches(photos[1], decoder, FAST, train=False)
        for _ in range(2):
            found = np.concatenate([pixels.numpy() for pixels, _ in batches])
            assert (found == preprocess.normalise(expected)).all()


@pytest.mark.parametrize("follow", [True, False], ids=["statistics-follow", "statistics-kept"])
def test_frozen_layers_do_not_move(photos: tuple[Items, Items], follow: bool) -> None:
    before = networks.load(SHUFFLE).network.state_dict()
    tuned = run(photos, epochs=1, freeze_until="stage3.1", batch_statistics=follow)
    after = tuned.loaded.network.state_dict()
    parameters = {name for name, _ in tuned.loaded.network.named_parameters()}
    frozen = {name for name in before if name.startswith(("conv1", "stage2", "stage3.0.", "fc"))}
    assert len(frozen - parameters) > 20  # running means, variances and counts
    moved = set(before) - frozen if follow else parameters - frozen
    assert {name for name in before if not (before[name] == after[name]).all()} == moved
    assert tuned.trained_parameters == sum(before[name].numel() for name in moved & parameters) + 2 * 1024 + 2


@pytest.mark.parametrize("layer", ["head", "penultimate"])
def test_head_trains_the_head_alone(photos: tuple[Items, Items], layer: str) -> None:
    tuned = run(photos, epochs=1, freeze_until=layer)
    assert tuned.loaded.weights_digest == networks.load(SHUFFLE).weights_digest
    assert tuned.trained_parameters == 2 * 1024 + 2
    assert np.abs(tuned.weight).max() > 0


def test_what_runs_before_a_layer_is_found_in_networks_of_all_kinds() -> None:
    import torch
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 16, 3, 2, 24, 48).eval()
    example = torch.zeros(1, 3, 32, 32)
    before = modules_before(network, example, "encoder.layers.encoder_layer_1", "heads.head")
    for part in before:
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(requires_grad=False)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    # class token and position embedding come before; the attention's projection, which is never called, goes with it
    inside = ("encoder.layers.encoder_layer_1.", "encoder.layers.encoder_layer_2.", "encoder.ln", "heads")
    assert trained == {name for name, _ in network.named_parameters() if name.startswith(inside)}
    assert "encoder.layers.encoder_layer_1.self_attention.out_proj.weight" in trained


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage9", r"is no layer of this network; (did you mean|it has) .*"),
        ("zzz", "is no layer of this network; it has conv1, maxpool, stage2, stage3, stage4, conv5, fc, and head"),
        ("", "--freeze-until ''"),
    ],
)
def test_an_unknown_layer_is_answered_with_names(photos: tuple[Items, Items], name: str, expected: str) -> None:
    import torch

    network = networks.load(SHUFFLE).network
    with pytest.raises(UsageError, match=expected.replace("head?", r"head\?") if "\\" not in expected else expected):
        modules_before(network, torch.zeros(1, 3, 32, 32), name, "fc")


def test_learning_rates(photos: tuple[Items, Items], tuned: FineTuned) -> None:
    import torch

    network = networks.load(SQUEEZE).network
    head = torch.nn.Linear(512, 2)
    caught: list[Any] = []
    hook = network.classifier[1].register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    network(torch.zeros(1, 3, 32, 32))
    hook.remove()
    network.features[0].requires_grad_(requires_grad=False)
    groups = parameter_groups(caught[0], network, head, FAST.replace(lr=0.002, head_lr_factor=7.0))
    assert [group["lr"] for group in groups] == [0.002, pytest.approx(0.014)]
    assert groups[1]["params"] == [head.weight, head.bias]
    assert len(groups[0]["params"]) == len(list(network.features.parameters())) - 2
    assert not any(p.requires_grad for p in network.classifier.parameters())
    cosine = [0.01 * (1 + np.cos(np.pi * epoch / 8)) / 2 for epoch in range(len(tuned.history) - 1)]
    assert [row["lr"] for row in tuned.history[1:]] == pytest.approx(cosine)
    assert [row["head_lr"] for row in tuned.history[1:]] == pytest.approx([2 * rate for rate in cosine])


def test_the_same_seed_gives_the_same_numbers(photos: tuple[Items, Items]) -> None:
    import torch

    torch.manual_seed(1)
    first = run(photos, SQUEEZE, seed=3)  # it has dropout
    torch.manual_seed(2)
    second = run(photos, SQUEEZE, seed=3, workers=2)
    assert numbers(first) == numbers(second)
    assert (first.weight == second.weight).all()
    assert first.loaded.weights_digest == second.loaded.weights_digest
    assert numbers(run(photos, SQUEEZE, seed=4)) != numbers(first)


def test_it_leaves_the_process_as_it_was(
    photos: tuple[Items, Items], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    def state() -> tuple[Any, ...]:
        return (
            torch.random.get_rng_state().tolist(),
            torch.get_deterministic_debug_mode(),
            torch.backends.cudnn.benchmark,
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            dict(os.environ),
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM),
            list(warnings.filters),
            logging.getLogger("lightning.pytorch").level,
            np.random.get_state()[1].tolist(),
            threading.active_count(),
        )

    monkeypatch.chdir(tmp_path)
    before = state()
    run(photos, epochs=1, workers=1)
    assert state() == before
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_early_stopping_restores_the_best_epoch(photos: tuple[Items, Items]) -> None:
    train, validation = photos
    wrong = [(path, 1 - label) for path, label in validation]  # the better it learns, the worse it gets
    tuned = train_network(train, wrong, 2, SHUFFLE, FAST.replace(epochs=20, patience=2))
    losses = [row["val_loss"] for row in tuned.history[1:]]
    assert len(losses) == tuned.best_epoch + 2 < 20
    assert losses[tuned.best_epoch - 1] == min(losses)
    logits = embed(tuned, wrong) @ tuned.weight.T + tuned.bias
    loss = np.mean([np.log(np.exp(row - row[label]).sum()) for row, (_, label) in zip(logits, wrong, strict=True)])
    assert loss == pytest.approx(min(losses), abs=1e-4)


def test_a_refit_is_the_same_training_on_all_images_until_the_best_epoch(photos: tuple[Items, Items]) -> None:
    train, validation = few = photos[0][:16], photos[1][:8]
    options = FAST.replace(batch_size=8, schedule="constant")
    chosen, refit = (train_network(*few, 2, SQUEEZE, options.replace(refit=each)) for each in (False, True))
    best = refit.best_epoch
    assert numbers(chosen) == [{key: row[key] for key in row if key not in ("seconds", "refit_loss")} for row in refit.history]
    assert refit.temperature == chosen.temperature
    logits = embed(chosen, validation) @ chosen.weight.T + chosen.bias
    truth = np.array([label for _, label in validation])
    assert refit.temperature == pytest.approx(fit_temperature(logits, truth), rel=1e-3)
    everything = train_network([*train, *validation], validation, 2, SQUEEZE, options.replace(epochs=best))
    assert everything.best_epoch == best
    assert refit.loaded.weights_digest == everything.loaded.weights_digest != chosen.loaded.weights_digest
    assert (refit.weight == everything.weight).all()
    losses = [row["train_loss"] for row in everything.history[1:]]
    assert [row["refit_loss"] for row in refit.history] == [None, *losses, *[None] * (2 - best)]
    assert refit.images == chosen.images + best * 24


@pytest.mark.parametrize("backbone", [RESNET, SQUEEZE], ids=lambda backbone: backbone.name)
def test_the_exported_network_and_the_head_give_the_logits(
    backbone: Backbone, photos: tuple[Items, Items], tmp_path: Path
) -> None:
    import onnxruntime

    tuned = run(photos, backbone, epochs=1, optimizer="adamw", lr=1e-3, label_smoothing=0.1, augment="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's
        facts = to_onnx(tuned.loaded, backbone.name, tmp_path / "backbone.onnx")
    assert facts.dim == tuned.weight.shape[1]
    assert facts.weights == "fine-tuned from random:0"
    preprocess = tuned.loaded.preprocess
    with Decoder(preprocess, crop=False) as decoder:
        pixels = preprocess.normalise(np.stack([preprocess.pixels(read_resized(path, decoder)) for path, _ in photos[1]]))
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx", providers=["CPUExecutionProvider"])
    features = session.run(None, {session.get_inputs()[0].name: pixels})[0]
    expected = embed(tuned, photos[1]) @ tuned.weight.T + tuned.bias
    assert relative_l2(features @ tuned.weight.T + tuned.bias, expected).max() < 1e-4
    assert tuned.history[1]["val_accuracy"] == (expected.argmax(1) == [label for _, label in photos[1]]).mean()


def test_a_loss_that_is_not_finite_is_bad_data(photos: tuple[Items, Items]) -> None:
    with pytest.raises(BadDataError, match="lower rate than lr 1e\\+30"):
        run(photos, SQUEEZE, lr=1e30, epochs=5)


def test_files_that_went_bad(photos: tuple[Items, Items], tmp_path: Path) -> None:
    train, validation = photos
    with pytest.raises(InputMissingError, match=r"gone\.png: No such file"):
        train_network([*train, (tmp_path / "gone.png", 0)], validation, 2, SHUFFLE, FAST)
    (tmp_path / "cut.png").write_bytes(train[0][0].read_bytes()[:500])
    with pytest.raises(BadDataError, match=r"cut\.png: truncated"):
        train_network(train, [*validation, (tmp_path / "cut.png", 0)], 2, SHUFFLE, FAST.replace(workers=2))


def test_labels_that_do_not_fit() -> None:
    def check(train: Items, validation: Items, n_classes: int, message: str) -> None:
        with pytest.raises(BadDataError, match=message):
            train_network(train, validation, n_classes, SHUFFLE, FAST)

    a, b = (Path("a.png"), 0), (Path("b.png"), 1)
    check([a], [a], 1, "at least 2")
    check([a, b], [], 2, "no validation images")
    check([a, b], [(Path("c.png"), 2)], 2, "c.png has label 2; expected 0 to 1")
    check([a, b], [a], 3, "no training image of class 2")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"head_lr_factor": -1.0},
        {"head_lr_factor": 0.0},
        {"schedule": "linear"},
        {"warmup": 2.0},
        {"momentum": 1.0},
        {"dropout": 1.0},
        {"class_weight": "inverse"},
        {"ema": 1.0},
        {"mixed_precision": "fp8"},
        {"mixed_precision": "fp16"},
        {"optimizer": "adam"},
        {"weight_decay": -1.0},
        {"label_smoothing": 1.0},
        {"patience": 0},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(photos: tuple[Items, Items], change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        run(photos, **change)


def test_an_onnx_file_cannot_be_trained(photos: tuple[Items, Items]) -> None:
    with pytest.raises(UsageError, match="cannot be trained"):
        run(photos, Backbone("mine.onnx"))


def test_a_device_that_is_not_there(photos: tuple[Items, Items]) -> None:
    with pytest.raises(DeviceUnavailableError, match="--device cuda:99"):
        run(photos, device="cuda:99")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_as_interrupted(
    photos: tuple[Items, Items], signum: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = loading.Batches._batch
    calls = []

    def batch(self: Any, part: Any) -> Any:
        calls.append(part)
        if len(calls) == 3:
            os.kill(os.getpid(), signum)
        return original(self, part)

    monkeypatch.setattr(loading.Batches, "_batch", batch)
    before = signal.getsignal(signum)
    with pytest.raises(InterruptedRunError) as caught:
        run(photos, epochs=50)
    assert caught.value.exit_code == 128 + signum
    assert str(caught.value) == f"interrupted by signal {int(signum)}; run the same command again to start over"
    assert "nothing of an unfinished fine-tuning is kept" in caplog.text
    assert "what is done is kept" not in caplog.text
    assert len(calls) < 6
    assert signal.getsignal(signum) is before


def test_importing_it_is_light() -> None:
    code = "import sys; import classifiers.finetuning.finetune; print({'torch', 'lightning', 'torchvision'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.gpu
def test_on_a_gpu(photos: tuple[Items, Items]) -> None:
    begin = time.perf_counter()
    tuned = run(photos, device="cuda", epochs=6)
    assert tuned.history[tuned.best_epoch]["val_accuracy"] == 1.0
    assert all(parameter.device.type == "cpu" for parameter in tuned.loaded.network.parameters())
    assert tuned.seconds <= time.perf_counter() - begin
