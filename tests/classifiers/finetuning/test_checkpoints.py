"""A fine-tuning that was killed goes on after its last finished epoch, and ends the same."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers.finetuning import loader
from classifiers.finetuning.checkpoints import Checkpoints
from classifiers.finetuning.finetune import FineTuned, train_network
from classifiers.finetuning.settings import FineTuneOptions
from extractor.backbones.registry import Backbone
from store.errors import BadDataError, InterruptedRunError, LockedError, OutputExistsError
from store.format.lock import file_lock
from tests.conftest import Once

SQUEEZE = Backbone("squeezenet1_1", "random:0", resize=40, crop=32)  # it has dropout of its own
SHUFFLE = Backbone("shufflenet_v2_x0_5", "random:0", resize=40, crop=32)
FAST = FineTuneOptions(epochs=4, batch_size=8, lr=0.01, head_lr_factor=2.0, patience=9, device="cpu", quiet=True, refit=False)
IN_AN_EPOCH = 3  # batches: two of training, one of validation
Items = list[tuple[Path, int]]
RUN = """
import json, os, signal, sys
from pathlib import Path
from classifiers.finetuning.loader import Batches
from classifiers.finetuning.checkpoints import Checkpoints
from classifiers.finetuning.finetune import train_network
from classifiers.finetuning.settings import FineTuneOptions
from extractor.backbones.registry import Backbone

import lightning.pytorch, torchvision

told, made, original = json.loads(sys.argv[1]), [], Batches._batch

def batch(self, part):
    made.append(part)
    if len(made) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, part)

Batches._batch = batch
items = [[(Path(path), label) for path, label in part] for part in told["items"]]
for backbone, options, folder, kill_at in told["runs"]:
    if os.fork():
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status))
        continue
    options, backbone = FineTuneOptions(**options), Backbone.from_facts(backbone)
    train_network(*items, 2, backbone, options, checkpoints=Checkpoints(Path(folder)))
    break
"""
AVERAGE = FAST.replace(optimizer="adamw", schedule="plateau", min_delta=9.0, ema=0.8, batch_statistics=True)
RUNS = {  # each with the batch at which it is killed, and what is said of where it continues
    "dropout-cosine": (SQUEEZE, FAST.replace(dropout=0.3, warmup=1.0), 1 + 2 * IN_AN_EPOCH + 2, "epoch 2 of an"),
    "plateau-average": (SHUFFLE, AVERAGE, 1 + 2 * IN_AN_EPOCH + 2, "epoch 2 of an"),
    "refit": (SQUEEZE, AVERAGE.replace(epochs=2, dropout=0.3, refit=True), 1 + 2 * IN_AN_EPOCH + 3 + 2, "epoch 1 of the refit"),
}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Path]) -> tuple[Items, Items]:
    """16 training and 8 validation images."""
    folder = tmp_path_factory.mktemp("pictures")
    items = [(make_image(folder / f"{i}.png", seed=i, size=(48, 44)), i % 2) for i in range(24)]
    return items[:16], items[16:]


@pytest.fixture(scope="module")
def killed(pictures: tuple[Items, Items], once: Once) -> Path:
    """A folder with what each of `RUNS` had kept when it was killed; one process imports torch for all."""
    items = [[(str(path), label) for path, label in part] for part in pictures]

    def make(folder: Path) -> None:
        runs = [(each[0].facts(), each[1].explicit(), str(folder / name), each[2]) for name, each in RUNS.items()]
        told = {"items": items, "runs": runs}
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(told)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.stdout.split() == [str(int(-signal.SIGKILL))] * len(RUNS), done.stderr

    return once("killed", make)


def numbers(tuned: FineTuned) -> list[list[float | None]]:
    return [[value for key, value in row.items() if key != "seconds"] for row in tuned.history]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that were prepared."""
    parts: list[Any] = []
    original = loader.Batches._batch

    def batch(self: Any, part: Any) -> Any:
        parts.append(part)
        return original(self, part)

    monkeypatch.setattr(loader.Batches, "_batch", batch)
    return parts


@pytest.mark.parametrize("run", RUNS)
def test_killed_in_an_epoch_it_ends_as_if_it_had_not_been(
    run: str,
    pictures: tuple[Items, Items],
    killed: Path,
    tmp_path: Path,
    made: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone, options, _, where = RUNS[run]
    kept = Checkpoints(shutil.copytree(killed / run, tmp_path / "kept"))
    whole = train_network(*pictures, 2, backbone, options)
    in_all = len(made)
    assert in_all == 1 + (4 * IN_AN_EPOCH if run != "refit" else 2 * IN_AN_EPOCH + 2 * 3)
    made.clear()
    caplog.set_level(logging.INFO, "penult")
    resumed = train_network(*pictures, 2, backbone, options, checkpoints=kept)
    assert f"continuing after {where}" in caplog.text
    assert len(made) == (2 * IN_AN_EPOCH if run != "refit" else 3)
    for ours, theirs in zip(numbers(whole), numbers(resumed), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert (resumed.best_epoch, resumed.images, resumed.temperature) == (whole.best_epoch, whole.images, whole.temperature)
    assert resumed.loaded.weights_digest == whole.loaded.weights_digest
    assert np.abs(resumed.weight - whole.weight).max() <= 1e-6
    assert np.abs(resumed.bias - whole.bias).max() <= 1e-6
    states = [tuned.loaded.network.state_dict() for tuned in (whole, resumed)]
    assert all((states[0][name] - states[1][name]).abs().max() <= 1e-6 for name in states[0])
    assert resumed.seconds >= sum(row["seconds"] for row in resumed.history)


def interrupted(pictures: tuple[Items, Items], folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> str:
    """What is said of a run that SIGTERM ends at a batch."""
    original, count = loader.Batches._batch, iter(range(1, 999))

    def stopping(self: Any, part: Any) -> Any:
        if next(count) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(loader.Batches, "_batch", stopping)
        with pytest.raises(InterruptedRunError) as caught:
            train_network(*pictures, 2, SHUFFLE, FAST, checkpoints=Checkpoints(folder))
    return str(caught.value)


def test_a_signal_keeps_the_finished_epochs(
    pictures: tuple[Items, Items],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert interrupted(pictures, tmp_path / "kept", monkeypatch, 3).endswith("run the same command again to start over")
    assert not (tmp_path / "kept").exists()
    assert interrupted(pictures, tmp_path / "kept", monkeypatch, 6).endswith("run the same command again to continue")
    assert "finished epochs are kept" in caplog.text
    made.clear()
    train_network(*pictures, 2, SHUFFLE, FAST, checkpoints=Checkpoints(tmp_path / "kept"))
    assert len(made) == 3 * IN_AN_EPOCH
    made.clear()
    again = train_network(*pictures, 2, SHUFFLE, FAST, checkpoints=Checkpoints(tmp_path / "kept"))
    assert made == []  # all was done
    assert again.history[-1]["epoch"] == 4


def test_other_settings_do_not_go_on(
    pictures: tuple[Items, Items], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoints(tmp_path / "kept", out="pets.head", images="a" * 64)
    train_network(*pictures, 2, SHUFFLE, FAST.replace(epochs=1), checkpoints=kept)
    expected = r"pets.head has an unfinished run of 1 epoch.*\(lr: 0.01, now 0.02\).*--overwrite throws it away"
    with pytest.raises(OutputExistsError, match=expected):
        train_network(*pictures, 2, SHUFFLE, FAST.replace(epochs=1, lr=0.02), checkpoints=kept)
    with pytest.raises(OutputExistsError, match=r"images: aaaaaaaaaaaa\.\., now bbbb"):
        train_network(*pictures, 2, SHUFFLE, FAST.replace(epochs=1), checkpoints=replace(kept, images="b" * 64))
    other = replace(SHUFFLE, weights="random:1")
    with pytest.raises(OutputExistsError, match="weights: "):
        train_network(*pictures, 2, other, FAST.replace(epochs=1), checkpoints=kept)
    tuned = train_network(*pictures, 2, SHUFFLE, FAST.replace(epochs=1, lr=0.02), checkpoints=replace(kept, overwrite=True))
    assert tuned.history[1]["lr"] == 0.02
    assert "an unfinished run of 1 epoch(s) is thrown away (lr: 0.01, now 0.02)" in caplog.text


def test_what_stopped_early_does_not_go_on(pictures: tuple[Items, Items], tmp_path: Path, made: list[Any]) -> None:
    kept, early = Checkpoints(tmp_path / "kept"), FAST.replace(epochs=9, patience=1, min_delta=9.0)
    first = train_network(*pictures, 2, SHUFFLE, early, checkpoints=kept)
    assert first.history[-1]["epoch"] == 2
    made.clear()
    again = train_network(*pictures, 2, SHUFFLE, early, checkpoints=kept)
    assert made == []
    assert (again.history, again.best_epoch) == (first.history, first.best_epoch)


def test_workers_may_change(pictures: tuple[Items, Items], tmp_path: Path, made: list[Any]) -> None:
    kept, once = Checkpoints(tmp_path / "kept"), FAST.replace(epochs=1)
    train_network(*pictures, 2, SHUFFLE, once, checkpoints=kept)
    made.clear()
    train_network(*pictures, 2, SHUFFLE, once.replace(workers=2), checkpoints=kept)
    assert made == []


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("damage", ["cut", "other", "payload"])
def test_a_file_that_is_no_checkpoint_starts_over(
    damage: str, pictures: tuple[Items, Items], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    kept, once = Checkpoints(tmp_path / "kept"), FAST.replace(epochs=1)
    first = train_network(*pictures, 2, SHUFFLE, once, checkpoints=kept)
    if damage == "cut":
        kept.file.write_bytes(kept.file.read_bytes()[:5000])
    elif damage == "other":
        torch.save({"state_dict": {}}, kept.file)
    else:
        torch.save({"run": Payload(tmp_path / "marker"), "training": {}}, kept.file)
    again = train_network(*pictures, 2, SHUFFLE, once, checkpoints=kept)
    assert f"{kept.file} cannot be used" in caplog.text
    assert not (tmp_path / "marker").exists()
    assert numbers(again) == numbers(first)


def test_one_run_at_a_time(pictures: tuple[Items, Items], tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept", out="pets.head")
    with kept.held():
        kept.file.touch()
        with (
            pytest.raises(LockedError, match=r"pets\.head is in use by another run"),
            file_lock(kept.folder / ".lock", what="pets.head"),
        ):
            pass
        with pytest.raises(LockedError):
            train_network(*pictures, 2, SHUFFLE, FAST, checkpoints=kept)


def test_a_loss_that_diverged_leaves_nothing(pictures: tuple[Items, Items], tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="use a lower rate"):
        train_network(*pictures, 2, SQUEEZE, FAST.replace(lr=1e30), checkpoints=Checkpoints(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()
