"""Several processes that share every batch train as one does. Here on the CPU, with gloo for NCCL."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from classifiers.finetuning import ranks
from classifiers.finetuning.checkpoints import Checkpoints
from classifiers.finetuning.finetune import train_network
from classifiers.finetuning.settings import FineTuneOptions
from classifiers.finetuning.trainer import Plan
from extractor.backbones.registry import Backbone
from store.errors import BadDataError, UsageError
from store.progress.stages import Stage

REGNET = Backbone("regnet_x_400mf", "random:0", resize=40, crop=32)  # no dropout, which would differ
FAST = FineTuneOptions(epochs=2, batch_size=8, lr=0.01, device="cpu", quiet=True, refit=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Path]) -> list[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("pictures")
    return [(make_image(folder / f"{i}.png", seed=i, size=(48, 44)), i % 2) for i in range(28)]


def test_two_processes_train_as_one(pictures: list[tuple[Path, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parts = pictures[:20], pictures[20:]
    one = train_network(*parts, 2, REGNET, FAST)
    kept, two = Checkpoints(tmp_path / "kept"), FAST.replace(device="cpu,cpu")
    make, stages = Plan.stage, list[Stage]()
    monkeypatch.setattr(Plan, "stage", lambda *arguments, **named: stages.append(make(*arguments, **named)) or stages[-1])
    both = train_network(*parts, 2, REGNET, two, checkpoints=kept, log_dir=tmp_path / "logs")
    (passed,) = [stage.standing(0) for stage in stages]
    assert (passed.stage, passed.done, passed.total) == ("fine-tuning", both.images, both.images), (
        "counted by the first process"
    )
    assert [row["epoch"] for row in both.history] == [0, 1, 2]
    assert abs(one.history[2]["val_loss"] - one.history[0]["val_loss"]) > 0.001
    for key in ("val_loss", "val_accuracy"):
        assert [row[key] for row in both.history] == pytest.approx([row[key] for row in one.history], abs=1e-4)
    assert both.images == one.images
    assert both.temperature == pytest.approx(one.temperature, rel=1e-2)
    assert np.abs(both.weight - one.weight).max() < 1e-3 * np.abs(one.weight).max()
    assert (tmp_path / "logs" / "metrics.csv").read_text().count("\n") == 4
    again = train_network(*parts, 2, REGNET, two, checkpoints=kept)
    assert (again.weight == both.weight).all()  # all was done


def test_what_ends_one_process_ends_all(pictures: list[tuple[Path, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(BadDataError, match="use a lower rate than lr 1e\\+30"):
        train_network(pictures[:16], pictures[16:], 2, REGNET, FAST.replace(lr=1e30, device="cpu,cpu"))


def test_a_share_of_one_image_is_refused(pictures: list[tuple[Path, int]]) -> None:
    with pytest.raises(UsageError, match=r"--device cpu,cpu,cpu: 1 image\(s\) of a batch for each device; expected at least 2"):
        train_network(pictures[:16], pictures[16:], 2, REGNET, FAST.replace(batch_size=5, device="cpu,cpu,cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_listen_to_this_machine_alone(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ), ranks._group(0, ["cpu"], tmp_path / "rendezvous"):
        sockets = {str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()}
        lines = [line.split() for kind in ("tcp", "tcp6") for line in Path("/proc/self/net", kind).read_text().splitlines()[1:]]
    listening = {
        place.partition(":")[0] for _, place, _, state, *more in lines if state == "0A" and f"socket:[{more[5]}]" in sockets
    }
    assert listening == {"0100007F"}, "127.0.0.1, in the order of bytes of x86 and Arm"
