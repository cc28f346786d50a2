"""Learning rates step by step, schedules, averages of weights, weights of classes, precision."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers.finetuning import module
from classifiers.finetuning.finetune import FineTuned, train_network
from classifiers.finetuning.settings import FineTuneOptions
from extractor.backbones import networks
from extractor.backbones.layers import torch_penultimate
from extractor.backbones.registry import Backbone

SQUEEZE = Backbone("squeezenet1_1", "random:0", resize=40, crop=32)
SHUFFLE = Backbone("shufflenet_v2_x0_5", "random:0", resize=40, crop=32)
FAST = FineTuneOptions(
    epochs=2, batch_size=8, lr=0.01, head_lr_factor=2.0, augment="none", device="cpu", quiet=True, refit=False
)
Items = list[tuple[Path, int]]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Path]) -> tuple[Items, Items]:
    """24 training and 8 validation images, a quarter of them of class 1."""
    folder = tmp_path_factory.mktemp("pictures")
    items = [(make_image(folder / f"{i}.png", seed=i, size=(48, 44)), int(i % 4 == 0)) for i in range(32)]
    return items[:24], items[24:]


def run(pictures: tuple[Items, Items], backbone: Backbone = SHUFFLE, **changes: Any) -> FineTuned:
    return train_network(*pictures, 2, backbone, FAST.replace(**changes))


def logits(tuned: FineTuned, items: Items) -> np.ndarray:
    import torch
    from PIL import Image

    preprocess = tuned.loaded.preprocess
    pixels = preprocess.normalise(np.stack([preprocess.pixels(Image.open(path).convert("RGB")) for path, _ in items]))
    return torch_penultimate(tuned.loaded.network, torch.from_numpy(pixels))[1](pixels) @ tuned.weight.T + tuned.bias


def losses(tuned: FineTuned, items: Items) -> np.ndarray:
    rows = logits(tuned, items).astype(np.float64)
    return np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(items)), [label for _, label in items]]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What the optimiser's two groups, network and head, really step with."""
    seen: list[tuple[float, float]] = []
    original = module.optimizer_of

    def watched(groups: Any, options: Any) -> Any:
        optimizer = original(groups, options)
        optimizer.register_step_pre_hook(lambda each, *_: seen.append(tuple(group["lr"] for group in each.param_groups)))
        return optimizer

    monkeypatch.setattr(module, "optimizer_of", watched)
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_network_and_head_step_with_the_rates_asked_for(
    pictures: tuple[Items, Items], rates: list[tuple[float, float]], optimizer: str
) -> None:
    run(pictures, optimizer=optimizer, schedule="constant", warmup=1.0, head_lr_factor=10.0, lr=0.002)
    shares = [1 / 3, 2 / 3, 1, 1, 1, 1]  # three batches an epoch
    assert [body for body, _ in rates] == pytest.approx([0.002 * share for share in shares])
    assert [head for _, head in rates] == pytest.approx([0.02 * share for share in shares])


@pytest.mark.parametrize(("start", "factor"), [({}, 10.0), ({"head_lr_factor": 3.0}, 3.0)], ids=["as it comes", "as asked"])
def test_the_heads_factor(
    pictures: tuple[Items, Items], rates: list[tuple[float, float]], start: dict[str, float], factor: float
) -> None:
    tuned = run(pictures, epochs=1, **{"head_lr_factor": None, **start})
    assert rates[0] == (0.01, pytest.approx(0.01 * factor))
    assert tuned.head_lr_factor == factor


def test_the_optimisers_settings() -> None:
    import torch

    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1}]
    sgd = module.optimizer_of(groups, FAST.replace(momentum=0.7, weight_decay=0.03))
    assert [sgd.defaults[name] for name in ("momentum", "nesterov", "weight_decay")] == [0.7, True, 0.03]
    assert not module.optimizer_of(groups, FAST.replace(momentum=0.0)).defaults["nesterov"]
    adamw = module.optimizer_of(groups, FAST.replace(optimizer="adamw", weight_decay=0.04))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["weight_decay"] == 0.04


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 0.5, [1, 1, 1, 1, 1, 1]),  # half an epoch is one batch, which has nothing to rise from
        ("cosine", 0, [(1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]),
        ("cosine", 1, [0.5, 1, *((1 + np.cos(np.pi * i / 4)) / 2 for i in range(4))]),
        ("step", 0, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ],
)
def test_schedules(schedule: str, warmup: float, expected: list[float]) -> None:
    share = module.share_of_rate(FAST.replace(epochs=3, schedule=schedule, warmup=warmup), 2)
    assert [share(step) for step in range(6)] == pytest.approx(expected)


def test_plateau_lowers_the_rates_where_nothing_improves(
    pictures: tuple[Items, Items], rates: list[tuple[float, float]]
) -> None:
    tuned = run(pictures, epochs=4, schedule="plateau", warmup=1.0, min_delta=10.0, patience=3)  # nothing improves by 10
    assert len(tuned.history) == 1 + 4
    shares = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert [body for body, _ in rates] == pytest.approx([0.01 * share for share in shares])
    assert [head for _, head in rates] == pytest.approx([0.02 * share for share in shares])
    repeated = module.share_of_rate(FAST.replace(epochs=4, schedule="plateau", warmup=1.0), 4, tuned.history)  # in a refit
    assert [repeated(step) for step in range(17)] == pytest.approx([0.25, 0.5, 0.75, 1, *[1] * 4, *[0.1] * 4, *[0.01] * 5])


@pytest.mark.parametrize("follow", [True, False], ids=["statistics-follow", "statistics-kept"])
def test_an_average_of_the_weights_is_what_is_validated_and_kept(pictures: tuple[Items, Items], follow: bool) -> None:
    tuned = run(pictures, ema=0.9, freeze_until="stage3.1", batch_statistics=follow)
    assert losses(tuned, pictures[1]).mean() == pytest.approx(tuned.history[tuned.best_epoch]["val_loss"], abs=1e-5)
    alone = run(pictures, freeze_until="stage3.1", batch_statistics=follow)
    assert tuned.history[0]["val_loss"] == alone.history[0]["val_loss"]
    assert tuned.history[1]["train_loss"] == alone.history[1]["train_loss"]  # training itself does not change
    assert tuned.history[1]["val_loss"] != alone.history[1]["val_loss"]
    before, after = networks.load(SHUFFLE).network.state_dict(), tuned.loaded.network.state_dict()
    frozen = [name for name in before if name.startswith(("conv1", "stage2", "stage3.0."))]
    assert len(frozen) > 20
    assert all(before[name].equal(after[name]) for name in frozen)


def test_images_of_rare_classes_count_more(pictures: tuple[Items, Items]) -> None:
    weights = module.class_weights(np.array([18, 6]), FAST.replace(class_weight="balanced"))
    assert weights is not None
    assert weights.tolist() == pytest.approx([24 / 36, 24 / 12])
    assert module.class_weights(np.array([18, 6]), FAST) is None
    tuned = run(pictures, SQUEEZE, epochs=1, class_weight="balanced")
    each, balance = losses(tuned, pictures[1]), weights[[label for _, label in pictures[1]]]
    assert tuned.history[1]["val_loss"] == pytest.approx(np.average(each, weights=balance), abs=1e-5)
    assert abs(np.average(each, weights=balance) - each.mean()) > 1e-4


def test_dropout_and_smoothing_are_for_training_alone(pictures: tuple[Items, Items]) -> None:
    changes = {"epochs": 1, "dropout": 0.5, "label_smoothing": 0.2}
    first, again, plain = (run(pictures, SQUEEZE, **each) for each in (changes, changes, {"epochs": 1}))
    assert losses(first, pictures[1]).mean() == pytest.approx(first.history[1]["val_loss"], abs=1e-5)
    assert plain.history[1]["train_loss"] != first.history[1]["train_loss"]
    assert again.history[1]["train_loss"] == first.history[1]["train_loss"]


def test_mixed_precision_leaves_float32_weights(pictures: tuple[Items, Items]) -> None:
    tuned = run(pictures, SQUEEZE, epochs=1, precision="bf16")
    assert {str(tensor.dtype) for tensor in tuned.loaded.network.parameters()} == {"torch.float32"}
    assert tuned.weight.dtype == np.float32
    exact = run(pictures, SQUEEZE, epochs=1).history[1]["val_loss"]
    assert 0 < abs(tuned.history[1]["val_loss"] - exact) < 0.05


def test_the_history_grows_in_a_file(pictures: tuple[Items, Items], tmp_path: Path) -> None:
    tuned = train_network(*pictures, 2, SHUFFLE, FAST, log_dir=tmp_path / "new" / "logs")
    with (tmp_path / "new" / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    written = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
    assert written == tuned.history


def test_tensorboard_gets_every_epoch(pictures: tuple[Items, Items], tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here")
    tuned = train_network(*pictures, 2, SHUFFLE, FAST, log_dir=tmp_path)
    events = loading.EventAccumulator(str(tmp_path)).Reload()
    found = {event.step: event.value for event in events.Scalars("loss/validation")}
    assert found == {row["epoch"]: pytest.approx(row["val_loss"]) for row in tuned.history}
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2]
