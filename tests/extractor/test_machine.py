"""What work cost: memory as the kernel counts it, and energy as NVML would tell it."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.machine import Meter, drawn, new_clock, peak_memory, timed, together
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options


class Nvml(types.ModuleType):
    """Answers as NVIDIA's ``pynvml`` does: two cards, by number or by UUID, the second one divided and without a counter."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open, self.millijoules, self.present = 0, 5_000_000, True

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's own names
        if not self.present:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        assert self.open
        if index > 1:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        assert self.open
        return {"GPU-0": 0, "MIG-1": 1}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise self.NVMLError("Not Supported")
        self.millijoules += 1500
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def test_energy_is_what_the_counter_rose_by(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Meter("cuda").read().energy == 1.5
    assert Meter("cuda:0").read().energy == 1.5
    assert Meter("auto").read().energy == 1.5
    assert Meter("cuda:0", "cuda:0").read().energy == 6.0  # of both together
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert drawn([0]) is None
    assert Meter("cuda:1").read().energy == 1.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    assert Meter("cuda").read().energy == 1.5
    assert nvml.open == 0


def test_nothing_is_claimed_where_nvml_does_not_answer(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Meter("cpu").read().energy is None
    assert Meter().read().energy is None
    assert Meter("cuda:1").read().energy is None, "no counter"
    assert Meter("cuda:7").read().energy is None, "no such card"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert Meter("cuda:0").read().energy is None
    assert Meter("cuda:1").read().energy is None, "not visible"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    nvml.present = False
    assert Meter("cuda").read().energy is None
    assert nvml.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert Meter("cuda").read().energy is None


def test_peak_memory_is_this_process_or_its_largest_child() -> None:
    before = peak_memory()
    assert before > 2**20
    wanted = before + 2**26
    subprocess.run([sys.executable, "-c", f"b'x' * {wanted}"], check=True)
    assert peak_memory() > wanted
    spent = Meter().read()
    assert spent.peak_memory > wanted
    assert spent.seconds >= 0


def test_several_pieces_of_work_as_one() -> None:
    first, second = {"peak_memory": 5, "energy": 1.5}, {"peak_memory": 3, "energy": None}
    assert together(first, second, None, {}) == {"peak_memory": 5, "energy": 1.5}
    assert together(first, first) == {"peak_memory": 5, "energy": 3.0}
    assert together(None) == {"peak_memory": None, "energy": None}


def test_a_cache_keeps_what_extraction_cost(dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 4, "bees": 4})
    cost = []
    for more in (0, 0, 2):
        dataset(photos, {"wasps": more}, seed=1)
        facts = extract(ImageFolder(photos), backbone, tmp_path / "c", Options(quiet=True, val_fraction=0)).samples.facts
        cost.append(facts["extract_cost"])
    assert cost[0]["peak_memory"] > 2**20
    assert cost[0]["energy"] is None
    assert cost[1] == cost[0], "nothing was computed"
    assert cost[2]["peak_memory"] >= cost[0]["peak_memory"]


def test_a_stage_does_not_count_the_time_of_those_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 4.5, 10.0, 12.0])
    monkeypatch.setattr("extractor.machine.time.perf_counter", lambda: next(now))
    clock = new_clock()
    with timed(clock, "head"), timed(clock, "few_shot"):  # from 0 and 1 to 4.5 and 4
        pass
    with timed(clock, "head"):  # 10 to 12
        pass
    assert clock == {"few_shot": 3.0, "head": 3.5}
