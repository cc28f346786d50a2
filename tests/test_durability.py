"""The seeded short form of `make soak`: kills, power loss with its controls, a changing and an unchanged data set."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak
from benchmarks.soak import Bench, PowerLoss
from extractor.backbones.registry import Backbone
from store.cache import FeatureCache
from store.errors import InterruptedRunError
from store.format import atomic
from store.format.integrity import verify_files
from store.format.metadata import shard_paths
from store.verify import verify_cache


@pytest.fixture
def bench(tmp_path: Path, backbone: Backbone) -> Bench:
    return Bench(tmp_path, nets={64: backbone, 32: backbone})


def events(number: int, total: int, seed: int) -> Iterator[dict[str, Any]]:
    """The signal strikes at a counted call of the operating system, in a write after half of it."""
    rng = random.Random(seed)
    while True:
        yield {"fault": {"kind": "signal", "number": number, "at": rng.randint(1, total)}}


def test_a_killed_run_continues_until_it_is_done(bench: Bench) -> None:
    stages = soak.two_stages(bench, 12, "data")
    # Kills early, in the middle of the first run's shards, and anywhere.
    faults = itertools.chain(
        ({"fault": {"kind": "signal", "number": int(signal.SIGKILL), "at": at}} for at in (21, 30)),
        events(signal.SIGKILL, 40, seed=3),
    )
    found = soak.signalled(bench, stages, signal.SIGKILL, faults, 4)
    assert found.signals == 4
    assert found.codes == {-signal.SIGKILL: 4}
    assert found.unfinished >= 2


def test_a_terminated_run_ends_with_143_and_continues(bench: Bench) -> None:
    stages = soak.two_stages(bench, 60, "data")[:1]  # more than are decoded ahead, or the first run would finish them
    # At the rename of the first shard after backbone.onnx and cache.json, and in the next run at its first.
    faults = ({"fault": {"kind": "signal", "call": "rename", "number": int(signal.SIGTERM), "at": at}} for at in (3, 1))
    found = soak.signalled(bench, stages, signal.SIGTERM, faults, 2)
    assert found.codes == {143: 2}


@pytest.fixture(scope="module")
def power(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Callable[..., PowerLoss]:
    def run(states: int, recover: int, fsync: str = "all") -> PowerLoss:
        bench = Bench(tmp_path_factory.mktemp("power"), nets={64: backbone})
        return soak.power_loss(bench, states=states, recover=recover, images=8, fsync=fsync)

    return run


def test_no_power_loss_loses_what_was_committed(power: Callable[..., PowerLoss]) -> None:
    found = power(300, 6)
    assert found.broken == []
    assert found.recovered >= 6
    assert found.spared > 0


@pytest.mark.parametrize("fsync", ["none", "files", "directories"])
def test_the_replay_finds_what_a_missing_fsync_loses(power: Callable[..., PowerLoss], fsync: str) -> None:
    assert len(power(100, 0, fsync).broken) > 10


def test_folders_are_as_durable_as_the_files_in_them(power: Callable[..., PowerLoss], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plain mkdir the same check finds a lost cache, so it does look at folders."""
    monkeypatch.setattr(atomic, "make_directory", lambda path: path.mkdir(parents=True, exist_ok=True))
    assert any("is lost" in what for what in power(100, 0).broken)


def test_only_what_changed_is_computed(bench: Bench) -> None:
    scores = soak.changes(bench, 60)
    assert scores["changed computed"] == 5


def test_unchanged_files_are_not_opened(bench: Bench) -> None:
    data = soak.make_tiny(bench.folder("many") / "data", 500)
    first = soak.child(data, bench.scratch / "c", bench.net(), batch=None, shard_bytes=0, watch=True)
    assert (first.code, first.summary["computed"]) == (0, 500), first.stderr
    assert first.facts["opened"] >= 500, "the hook sees what is opened"
    second = soak.child(data, bench.scratch / "c", bench.net(), batch=None, shard_bytes=0, watch=True)
    assert (second.code, second.summary["computed"], second.facts["opened"]) == (0, 0, 0), second.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_verifying_child_condemns_no_shard(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """systemd, or Ctrl-C in a terminal, signals every process of a run."""
    cache = bench.scratch / "c"
    soak.extract(soak.make_photos(bench.folder("data"), 12, size=(80, 60)), cache, bench.net())
    real = subprocess.Popen

    def struck(command: Any, *args: Any, **kwargs: Any) -> Any:
        code = f"import os, signal; signal.signal({int(number)}, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
        return real([command[0], "-c", code], *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", struck)
        with pytest.raises(InterruptedRunError) as caught:
            verify_files(shard_paths(cache))
    assert caught.value.exit_code == 128 + number
    assert verify_cache(cache) == []


@pytest.mark.parametrize(("name", "bit"), [("cache.json", 0), ("cache.json", 6), ("ledger.jsonl", 0)])
def test_a_flipped_bit_in_a_derived_file_is_found_and_repaired(bench: Bench, name: str, bit: int) -> None:
    """Above all in the fingerprint, which would otherwise refuse this run or let it compute everything again."""
    data = soak.make_photos(bench.folder("data"), 12, size=(80, 60))
    (data / "ants" / "broken.jpg").write_text("no image")
    cache = bench.scratch / "c"
    soak.extract(data, cache, bench.net())
    path, wanted, fingerprint = cache / name, soak.contents(cache), FeatureCache(cache).fingerprint.canonical
    sound = path.read_bytes()
    places = [sound.index(b'"weights": "') + 12, sound.index(b'"format": 1') + 10] if name == "cache.json" else [5]
    for at in places:
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << bit]) + sound[at + 1 :])
        assert [finding.file for finding in verify_cache(cache)] == [name]
        assert FeatureCache(cache).fingerprint.canonical == fingerprint
        assert soak.extract(data, cache, bench.net()).computed == 0
        assert path.read_bytes() == sound
        assert soak.contents(cache) == wanted
