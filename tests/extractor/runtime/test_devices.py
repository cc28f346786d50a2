"""Several devices by one process each, with CPUs in their place: the same bits, and what a death costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs.backbone_facts import read_facts
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.runtime.cuda import Cuda
from extractor.runtime.devices import DevicePool, resolve_devices
from extractor.runtime.session import Embedder
from store.cache import FeatureCache
from store.errors import BadDataError, DeviceUnavailableError, UsageError

REPO = Path(__file__).resolve().parents[3]


def pixels(count: int, side: int = 64) -> Any:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture
def two(backbone_file: Path) -> Iterator[DevicePool]:
    preprocess = read_facts(backbone_file).preprocess
    opened = DevicePool(["cpu", "cpu"], backbone_file, preprocess, batch_size=4, outputs=["features"], tf32=False)
    yield opened
    opened.close()


@pytest.mark.parametrize("devices", ["cpu,auto", "auto,auto", "cpu,cuda:x", "cpu,", ",", "cpu cpu"])
def test_devices_that_do_not_go_together_are_a_usage_error(devices: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        resolve_devices(devices)


def test_devices_of_several_kinds_are_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "missing", lambda _self: "")
    assert resolve_devices("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(UsageError, match="several devices of one kind, such as cuda:0,cuda:1"):
        resolve_devices("cpu,cuda:0")
    with pytest.raises(UsageError, match="of one kind"):
        resolve_devices("cuda:0,cpu")


def test_two_processes_give_the_bits_of_one_and_both_work(two: DevicePool, backbone_file: Path) -> None:
    alone = Embedder(backbone_file, read_facts(backbone_file).preprocess, batch_size=4)
    given = pixels(82)
    parts = [two.submit(given[i : i + 8]) for i in range(0, 82, 8)]
    np.testing.assert_array_equal(np.concatenate([part.result()[0] for part in parts]), alone(given))
    assert (two.provider, two.dims, two.fixed_batch, two.calls) == ("cpu", [512], False, 21)
    assert all(child.facts["calls"] for child in two._children)
    assert two.seconds > 0
    assert two.batch_size == 4


def test_what_goes_wrong_in_a_child_is_raised_here(two: DevicePool, backbone_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="onnx"):
        two.embed(pixels(2, side=63)[..., :2])
    assert two.embed(pixels(2))[0].shape == (2, 512), "and costs that batch alone"
    (tmp_path / "m.onnx").write_bytes(b"junk")
    with pytest.raises(BadDataError, match=r"m\.onnx is not an ONNX file"):
        DevicePool(
            ["cpu", "cpu"],
            tmp_path / "m.onnx",
            read_facts(backbone_file).preprocess,
            batch_size=None,
            outputs=[],
            tf32=False,
        )


def test_a_dead_child_is_named_and_nobody_waits_for_it(two: DevicePool) -> None:
    two._children[1].process.kill()
    two._children[1].process.wait()
    parts = [two.submit(pixels(4)) for _ in range(6)]
    failures = [failure for part in parts if (failure := part.exception())]
    assert failures
    assert {type(failure) for failure in failures} == {DeviceUnavailableError}
    assert "--device cpu: its process died of signal 9 (Killed); what is committed stays" in str(failures[0])


def test_children_end_with_their_parent(two: DevicePool) -> None:
    processes = [child.process for child in two._children]
    assert all(process.poll() is None for process in processes)
    two.close()
    assert [process.returncode for process in processes] == [0, 0]


def test_a_cache_of_two_processes_equals_that_of_one(dataset: Any, backbone: Backbone, tmp_path: Path) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 30, "bees": 30})
    (photos / "bees" / "copy.jpg").write_bytes((photos / "ants" / "000.jpg").read_bytes())
    (photos / "bees" / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    source = ImageFolder(photos)
    one = run_extract(source, backbone, tmp_path / "one.cache", Options(device="cpu", batch_size=4))
    both = run_extract(source, backbone, tmp_path / "two.cache", Options(device="cpu,cpu", batch_size=4))
    assert (
        (both.ok, both.duplicates, both.failed, both.computed)
        == (one.ok, one.duplicates, one.failed, one.computed)
        == (60, 1, 1, 60)
    )
    assert both.inference_calls == one.inference_calls == 15
    a, b = FeatureCache(tmp_path / "one.cache"), FeatureCache(tmp_path / "two.cache")
    assert a.fingerprint == b.fingerprint
    assert [row.path for row in a.rows()] == [row.path for row in b.rows()]
    np.testing.assert_array_equal(a.subset().X, b.subset().X)
    again = run_extract(source, backbone, tmp_path / "two.cache", Options(device="cpu", batch_size=4))
    assert again.computed == 0


def command(photos: Path, backbone_file: Path, cache: Path) -> list[str]:
    return [
        sys.executable,
        "cli.py",
        "extract",
        str(photos),
        "-m",
        str(backbone_file),
        "-o",
        str(cache),
        "-b",
        "1",
        "--device",
        "cpu,cpu",
    ]


def children_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes that hold a device, of one that runs."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_bytes()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == process.pid and b"extractor.runtime.devices" in line:
                found.append(int(folder.name))
    return found


def lives(child: int) -> bool:
    """Whether a process still does something; one whose parent died may wait, ended, for somebody to ask how."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_leaves_no_child_behind_and_the_next_run_goes_on(
    dataset: Any, backbone_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 400})
    given = command(photos, backbone_file, tmp_path / "c.cache")
    run = subprocess.Popen(
        given, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stderr is not None
    children: list[int] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and run.poll() is None and time.monotonic() < deadline:
        children = children_of(run)
    assert len(children) == 2
    if number == signal.SIGTERM:
        os.killpg(run.pid, number)  # as a scheduler does
    else:
        run.send_signal(number)
    with run:
        err = run.stderr.read()  # ends when the last child has closed it too
    assert run.returncode == code, err
    while any(map(lives, children)) and time.monotonic() < deadline:
        pass
    assert not any(map(lives, children))
    source = ImageFolder(photos)
    assert run_extract(source, Backbone(str(backbone_file)), tmp_path / "c.cache", Options(device="cpu,cpu")).ok == 400
