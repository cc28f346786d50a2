"""Killed at any call, side by side, told to stop in a call that does not end, and where the system says no.

The kills and the pairs are the seeded short form of two parts of `make soak`.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import kills, prepared
from benchmarks.kills import ARCHIVE, Command, Scenario, Server
from store.cache import FeatureCache

from .test_house import REPO

KILLS = 5
SOAKED = ("train, the first time",)
TOGETHER = ("prune + evaluate", "fuse + fuse", "prepared backbone, twice")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with kills.serving() as made:
        yield made


# --- killed, and side by side ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in kills.SCENARIOS if name not in SOAKED])
def test_killed_at_any_call_it_leaves_the_old_or_the_new_result_and_after_the_next_run_nothing_else(
    name: str, server: Server, tmp_path: Path
) -> None:
    with kills.serving(*kills.FOR_TORCH) if name == "finetune" else nullcontext(server) as started:
        killed = kills.kill(name, started, tmp_path, KILLS)
    assert killed.kills == KILLS
    assert killed.old > 0


@pytest.mark.parametrize("name", TOGETHER)
def test_side_by_side_both_are_right_or_one_is_told_to_try_again(name: str, server: Server, tmp_path: Path) -> None:
    assert kills.side_by_side(name, server, tmp_path, 3).total() == 6


# --- the store of prepared backbones -----------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_prepared_backbone_is_noticed_and_it_is_made_again(server: Server, tmp_path: Path) -> None:
    assert sorted(prepared.flips(tmp_path / "work", server, 8)) == ["data", "h5", "json", "onnx"]


def test_a_disk_that_is_full_at_any_write_costs_the_run_a_warning(server: Server, tmp_path: Path) -> None:
    assert prepared.full_disk(tmp_path / "work", server) == 4


def test_a_store_that_is_only_read_gives_what_it_has(server: Server, tmp_path: Path) -> None:
    if not prepared.only_read(tmp_path / "work", server):
        pytest.skip("not possible on this system")


# --- a call that does not end ------------------------------------------------------------------------------------------

SHORT = "from extractor import signals; signals.GRACE, signals.TWICE = {}, 0\n"


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.endless(tmp_path_factory.mktemp("endless"))


@pytest.mark.parametrize(
    ("numbers", "grace", "codes"),
    [([signal.SIGTERM], 0.5, {143}), ([signal.SIGINT], 0.5, {130}), ([signal.SIGINT, signal.SIGTERM], 60, {130, 143})],
)
def test_a_call_that_does_not_end_ends_with_the_grace_or_a_second_signal(
    numbers: list[signal.Signals], grace: float, codes: set[int], endless: Path
) -> None:
    command = [sys.executable, "-c", SHORT.format(grace) + kills.ANNOUNCED, "evaluate", endless, ARCHIVE / "photos.cache"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        begin = time.monotonic()
        for number in numbers:
            child.send_signal(number)
        _, err = child.communicate(timeout=30)
    assert child.returncode in codes, err
    assert (time.monotonic() - begin >= grace) == (grace < 1)
    assert ("this step has not ended 0.5 s after signal" in err) == (grace < 1)


# --- where the system says no ------------------------------------------------------------------------------------------

WITHOUT_FLOCK = f"""
import ctypes, platform, struct, sys

class Program(ctypes.Structure):  # of the kernel's filter of system calls: flock fails as on a file system without locks
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

flock = dict(x86_64=73, aarch64=32)[platform.machine()]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, flock), (0x06, 0, 0, 0x50000 | {errno.EOPNOTSUPP}), (0x06, 0, 0, 0x7FFF0000)]
program = Program(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program)):
    sys.exit(99)
"""
CALL = """
import sys, cli
sys.argv = ["penult", *{}]
cli.main()
"""


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, bundles, a job, and ``closed``, in which nothing may be created."""
    names = ("photos", "photos.cache", "ridge.head", "knn.head", "network.onnx", "network.toml")
    folder = tmp_path_factory.mktemp("refused") / "work"
    Scenario(Command(), {name: name for name in names}, lambda folder: None).prepare(folder, server)
    for name, bundle in (("job", "job.head"), ("closed", "closed/job.head")):
        (folder / f"{name}.toml").write_text(kills.JOB.format("ridge").replace("job.head", bundle))
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o555)
    return folder


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refused(before: str, line: str, place: Path, server: Server) -> kills.Ended:
    ended = server.run(Command(code=before + CALL.format(line.split())), place)
    if ended.code == 99:
        pytest.skip("not possible on this system")
    return ended


@pytest.mark.parametrize(
    "line",
    [
        "extract photos -m network.onnx -o new.cache",
        "train photos.cache -o new.head",
        "fuse ridge.head -o new.onnx",
        "export network.onnx -o new.onnx",
        "compact photos.cache -o new.h5",
        "compact photos.cache --prune",
        "check photos.cache --against new.h5 --update",
        "report ridge.head -o new.html",
        "sweep photos -m network.onnx -o new.sweep",
        "finetune photos.cache -m resnet18 -o new.head",
        "run job.toml",
    ],
)
def test_without_file_locks_nothing_is_written_and_that_is_said(line: str, place: Path, server: Server) -> None:
    before = contents(place)
    ended = refused(WITHOUT_FLOCK, line, place, server)
    assert ended.code == 74, ended.stderr
    assert "has no file locks" in ended.stderr
    assert "Choose a folder on a local disk" in ended.stderr
    assert contents(place) == before


def test_without_file_locks_all_can_be_read(place: Path, server: Server) -> None:
    for line in ("info photos.cache", "verify photos.cache", "evaluate ridge.head photos.cache"):
        assert refused(WITHOUT_FLOCK, line, place, server).code == 0


@pytest.mark.parametrize(
    "line",
    [
        "extract photos -m network.onnx -o closed/c",
        "train gone -o closed/a.head",
        "finetune gone -m resnet18 -o closed/a.head",
        "fuse ridge.head -o closed/a.onnx",
        "export network.onnx -o closed/a.onnx",
        "compact gone -o closed/a.h5",
        "check gone --against closed/a.h5 --update",
        "report gone -o closed/a.html",
        "compare gone -o closed/a.html",
        "evaluate gone gone --plot closed/a.png",
        "sweep gone -m network.onnx -o closed/sweep",
        "run closed.toml",
    ],
)
def test_that_nothing_can_be_written_is_found_before_anything_is_read(line: str, place: Path, server: Server) -> None:
    ended = refused(prepared.WITHOUT_POWER, line, place, server)
    assert ended.code == 73, ended.stderr
    assert "closed is not writable (Permission denied)" in ended.stderr


def test_a_cache_whose_shards_belong_to_others_is_refused_at_once(place: Path, server: Server) -> None:
    shards = place / "photos.cache/shards"
    shards.chmod(0o555)
    ended = refused(prepared.WITHOUT_POWER, "extract photos -m network.onnx -o photos.cache", place, server)
    shards.chmod(0o755)
    assert ended.code == 73
    assert "shards is not writable" in ended.stderr
    assert FeatureCache(place / "photos.cache").rows()
