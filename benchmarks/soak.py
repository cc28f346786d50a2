"""The long fault campaign: kills, signals, power loss, flipped bytes, full disks, and what an unchanged data set costs.

Run by ``make soak``; rewrites docs/reliability.md. Options: ``--only PART`` (again for more), ``--quick`` (small, writes no
document), ``--photos FOLDER`` (real photos, a folder per class), ``--seed N``. The exit status is 1 if anything is not met.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import onnx.numpy_helper
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

import store.writer  # noqa: E402
from benchmarks import crash_model, fuzz, home, kills, prepared  # noqa: E402
from benchmarks.kills import NotMetError, require  # noqa: E402
from extractor.backbones.export import export  # noqa: E402
from extractor.backbones.registry import Backbone  # noqa: E402
from extractor.data.folders import ImageFolder  # noqa: E402
from extractor.pipeline.run import run_extract  # noqa: E402
from extractor.pipeline.settings import Options  # noqa: E402
from extractor.pipeline.summary import Summary  # noqa: E402
from store.cache import FeatureCache  # noqa: E402
from store.errors import BadDataError, InputMissingError, PenultError  # noqa: E402
from store.format.lock import writer_lock  # noqa: E402
from store.format.metadata import shard_paths  # noqa: E402
from store.verify import verify_cache  # noqa: E402

DOCUMENT = REPO / "docs" / "reliability.md"
BATCH = 4
GRACE = 20.0  # seconds between SIGTERM and the end

Contents = dict[bytes, tuple[Any, ...]]


@dataclass
class Bench:
    """Where and on what the campaign runs.

    Attributes:
        scratch: an empty folder.
        seed: of every random choice.
        quick: whether counts are small.
        photos: real photos to use where files are to be decoded, or None.
        nets: backbones by crop; made when first asked for.
    """

    scratch: Path
    seed: int = 0
    quick: bool = False
    photos: Path | None = None
    nets: dict[int, Backbone] = field(default_factory=dict)

    def net(self, crop: int = 64) -> Backbone:
        """SqueezeNet with random weights as an ONNX file: 512 features."""
        if crop not in self.nets:
            path = self.scratch / f"squeezenet-{crop}.onnx"
            export(Backbone("squeezenet1_1", "random:0", resize=crop + crop // 8, crop=crop), path)
            self.nets[crop] = Backbone(str(path))
        return self.nets[crop]

    def usual_net(self) -> Backbone:
        """MobileNetV2 with random weights at 224 pixels: 1280 features."""
        path = self.scratch / "mobilenet_v2.onnx"
        if not path.exists():
            export(Backbone("mobilenet_v2", "random:0"), path)
        return Backbone(str(path))

    def other_net(self) -> Backbone:
        """The same with one weight tensor changed."""
        path = self.scratch / "other.onnx"
        if not path.exists():
            model = onnx.load(self.net().name)
            tensor = model.graph.initializer[0]
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
            onnx.save(model, path)
        return Backbone(str(path))

    def folder(self, name: str) -> Path:
        """A new empty folder."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


# --- data, runs, comparisons -------------------------------------------------------------------------------------------


def make_photos(folder: Path, count: int, *, seed: int = 0, size: tuple[int, int] = (320, 240)) -> Path:
    """Distinct JPEG files of two classes, smooth colour and noise."""
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-9, 10, (size[1], size[0], 3))
        target = folder / ("ants" if i % 2 else "bees") / f"{seed}-{i:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(target, quality=85)
    return folder


def make_tiny(folder: Path, count: int) -> Path:
    """Distinct 16 x 16 JPEG files, fast: a few pictures, each with its number in a comment segment."""
    some = [path.read_bytes() for path in sorted(make_photos(folder / "made", 16, size=(16, 16)).rglob("*.jpg"))]
    shutil.rmtree(folder / "made")
    for i in range(count):
        data, note = some[i % len(some)], f"{i:08d}".encode()
        target = folder / f"class{i % 10}" / f"{i:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + data[2:])
    return folder


@contextmanager
def small_shards(size: int = 1) -> Iterator[None]:
    before, store.writer.SHARD_BYTES = store.writer.SHARD_BYTES, size
    try:
        yield
    finally:
        store.writer.SHARD_BYTES = before


def extract(data: Path, cache: Path, net: Backbone, **options: Any) -> Summary:
    """Extract in this process, a shard per batch."""
    with small_shards():
        chosen = {"device": "cpu", "batch_size": BATCH, "workers": 2, "quiet": True, **options}
        return run_extract(ImageFolder(data), net, cache, Options(**chosen))


def contents(cache: Path) -> Contents:
    """All that a reader sees, by path: label, split, key and feature bytes, or the failure; and which backbone made it."""
    opened = FeatureCache(cache)
    rows = opened.rows()
    X = opened.features([row.sha256 for row in rows])
    seen: Contents = {row.path: (row.code, row.message) for row in opened.samples.rows if not row.ok}
    seen[b"/backbone"] = (hashlib.sha256((cache / "backbone.onnx").read_bytes()).digest(),)
    for row, x in zip(rows, X, strict=True):
        seen[row.path] = (row.label, row.split, row.sha256, str(x.dtype), x.tobytes())
    return seen


def seen(cache: Path) -> Contents | None:
    """`contents`, or None where a reader refuses the cache because it is not finished."""
    try:
        return contents(cache)
    except InputMissingError:
        return None


def require_clean(cache: Path) -> None:
    """No temporary file is left, and the lock can be had."""
    left = [path.name for path in cache.rglob(".*") if path.name != ".lock"]
    require(not left, f"left behind: {left}")
    with writer_lock(cache):
        pass


# --- runs in a child process, with a fault inside ----------------------------------------------------------------------

CHILD = r"""
import json, os, resource, signal, sys, threading, time
request = json.loads(sys.argv[1])
sys.path.insert(0, request["repo"])
import h5py, onnxruntime, extractor.pipeline.run, extractor.runtime.session, store.writer, cli
if request["shard_bytes"]:
    store.writer.SHARD_BYTES = request["shard_bytes"]
COUNTED = ("MainThread", "penult-write")  # what decoding threads do is in no order
events = 0
opened = 0

def before(name, args):
    fault = request["fault"]
    if fault.get("call", name) != name or events != fault.get("at"):
        return
    if fault["kind"] == "signal":
        if name == "write":  # in the middle of it
            real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
        os.kill(os.getpid(), fault["number"])
    elif fault["kind"] == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
    elif fault["kind"] == "errno":
        raise OSError(fault["number"], os.strerror(fault["number"]))

real = {}

def count(name):
    real[name] = getattr(os, name)
    def counted(*args, **kwargs):
        global events
        if threading.current_thread().name.startswith(COUNTED) and request["fault"].get("call", name) == name:
            events += 1
            before(name, args)
        return real[name](*args, **kwargs)
    setattr(os, name, counted)

if request["fault"]:
    for name in ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink"):
        count(name)
if request["watch"]:
    watched = os.fsencode(request["watch"]) + b"/"
    def audit(event, args):
        global opened
        if event == "open" and isinstance(args[0], (str, bytes)):
            opened += os.fsencode(args[0]).startswith(watched)
    sys.addaudithook(audit)
print("ready", flush=True)
sys.argv = ["penult", *request["arguments"]]
try:
    cli.main()
finally:
    print(json.dumps({"events": events, "opened": opened}), file=sys.stderr, flush=True)
"""


@dataclass
class Ended:
    """How a child ended.

    Attributes:
        code: its exit status; negative: died of that signal.
        seconds: from ready to the end.
        late: seconds from the signal to the end.
        cpu: CPU seconds, with its children.
        peak: its largest resident set, MiB.
        facts: ``events`` (calls of the operating system counted) and ``opened`` (images opened).
        summary: what it printed, where that is JSON.
    """

    code: int
    seconds: float
    late: float
    cpu: float
    peak: float
    facts: dict[str, int]
    summary: dict[str, Any]
    stderr: str


def child(
    data: Path,
    cache: Path,
    net: Backbone,
    *,
    fault: dict[str, Any] | None = None,
    delay: float | None = None,
    number: int = signal.SIGKILL,
    group: bool = False,
    watch: bool = False,
    shard_bytes: int = 1,
    batch: int | None = BATCH,
    more: Sequence[str] = (),
) -> Ended:
    """``penult extract`` in a process of its own, with a fault in it, or a signal ``delay`` seconds after it is loaded.

    With ``group`` the signal goes to its children as well, as from systemd or a terminal.
    """
    arguments = ["extract", str(data), "-m", net.name, "-o", str(cache), "--device", "cpu", "-j", "2", "--json", *more]
    arguments += ["-b", str(batch)] if batch else []
    request = {
        "repo": str(REPO),
        "fault": fault or {},
        "watch": str(data) if watch else "",
        "shard_bytes": shard_bytes,
        "arguments": arguments,
    }
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        ready, tell = os.pipe()
        code = CHILD.replace('print("ready", flush=True)', f'real.get("write", os.write)({tell}, b"r")')
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(request)],
            stdout=output,
            stderr=errors,
            pass_fds=(tell,),
            start_new_session=True,
        )
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        begin = sent = time.monotonic()
        if delay is not None:
            time.sleep(delay)
            sent = time.monotonic()
            (os.killpg if group else os.kill)(process.pid, number)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        end = time.monotonic()
        errors.seek(0)
        output.seek(0)
        stderr, stdout = errors.read().decode(errors="replace"), output.read()
    facts, summary = _json(stderr.splitlines()[-1:]), _json([stdout.decode(errors="replace")])
    cpu = usage.ru_utime + usage.ru_stime
    return Ended(process.returncode, end - begin, end - sent, cpu, usage.ru_maxrss / 1024, facts, summary, stderr)


def _json(texts: list[str]) -> dict[str, Any]:
    try:
        return json.loads("".join(texts))
    except ValueError:  # it died before it said so
        return {}


@dataclass
class Signalled:
    """Counts of `signalled`."""

    signals: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    runs: int = 0
    unfinished: int = 0  # states that readers refused
    old: int = 0  # .. that were the complete old state
    late: list[float] = field(default_factory=list)
    left_over: int = 0  # temporary files that the next run removed


def signalled(
    bench: Bench, stages: Sequence[Path], number: int, faults: Iterator[dict[str, Any]], count: int, *, name: str = "kills"
) -> Signalled:
    """Send ``count`` signals to runs of stage after stage; restart each until it completes, look at every state between.

    Args:
        bench: where.
        stages: versions of a data set; the first is extracted into a new cache, each next one updates it.
        number: the signal.
        faults: keyword arguments of `child`: where the signal strikes.
        count: of signals that struck.
        name: of the working folder.

    Raises:
        NotMetError: a state between was readable and neither old nor new, or the end differs from an uninterrupted run.
    """
    net = bench.net()
    work = bench.folder(name)
    wanted: list[Contents] = []
    for stage in stages:
        extract(stage, work / "reference", net)
        wanted.append(contents(work / "reference"))
    counts = Signalled()
    for turn in itertools.count():
        cache = work / f"c{turn}"
        for place, stage in enumerate(stages):
            old = wanted[place - 1] if place else None
            while True:
                strike = next(faults) if counts.signals < count else {}
                ended = child(stage, cache, net, **strike)
                counts.runs += 1
                if ended.code == 0:
                    break
                struck = {-number, 128 + number}
                require(ended.code in struck, f"exit {ended.code} after signal {number}: {ended.stderr[-800:]}")
                counts.signals += 1
                counts.codes[ended.code] += 1
                counts.late.append(ended.late)
                state = seen(cache)
                require(state in (old, wanted[place]), f"an intermediate state of {stage.name} is readable")
                counts.unfinished += state is None
                counts.old += state is not None and state == old
                counts.left_over += len(list(cache.rglob(".*.tmp"))) if cache.is_dir() else 0
            require(contents(cache) == wanted[place], f"the cache of {stage.name} differs from an uninterrupted one")
            require_clean(cache)
            if place == 0:
                rows = sum(len(s.sha256) for s in FeatureCache(cache).shards)
                images = sum(len(row) > 2 for row in wanted[0].values())
            require(rows == images, f"{rows} rows are stored for {images} images: some were done twice")
        require(verify_cache(cache) == [], "verify finds damage")
        shutil.rmtree(cache)
        if counts.signals >= count:
            return counts
    raise AssertionError


def two_stages(bench: Bench, count: int, name: str) -> list[Path]:
    """A data set, and the same one with files added, removed and changed."""
    work = bench.folder(name)
    if bench.photos is not None:
        kept = [shutil.copytree(bench.photos, work / "first")]
    else:
        kept = [make_photos(work / "first", count, seed=bench.seed)]
    second = shutil.copytree(kept[0], work / "second")
    files = sorted(path for path in second.rglob("*") if path.is_file())
    for path in files[:: max(2, len(files) // 5)]:
        path.unlink()
    make_photos(second, max(count // 3, 4), seed=bench.seed + 1)
    return [*kept, second]


# --- the parts ---------------------------------------------------------------------------------------------------------


def random_delays(bench: Bench, stages: Sequence[Path], number: int) -> Iterator[dict[str, Any]]:
    """Moments uniform over the time that an uninterrupted run takes after its imports."""
    work = bench.folder("timing")
    took = child(stages[0], work / "c", bench.net()).seconds
    rng = random.Random(bench.seed * 1000 + number)
    while True:
        yield {"delay": rng.uniform(0, took), "number": number, "group": rng.random() < 0.5}


def part_kills(bench: Bench) -> list[str]:
    """SIGKILL at random moments"""
    stages = two_stages(bench, 24 if bench.quick else 240, "kill-data")
    count = 6 if bench.quick else 150
    found = signalled(bench, stages, signal.SIGKILL, random_delays(bench, stages, signal.SIGKILL), count)
    shards = len(shard_paths(bench.scratch / "kills" / "reference"))
    files, kind = len(list(stages[0].rglob("*.jpg"))), "real photos" if bench.photos else "made pictures"
    return [
        f"{found.signals} kills in {found.runs} runs over {files} {kind}, then an update "
        f"of the same cache ({shards} shards in the end)",
        "every restart continued; every finished cache equals an uninterrupted one in labels, splits, keys and feature bytes",
        f"of the {found.signals} states between, readers refused {found.unfinished} as unfinished, {found.old} were the "
        f"complete old state, {found.signals - found.unfinished - found.old} the complete new one; no other was readable",
        f"{found.left_over} temporary files of killed runs were removed by the next run; no lock was stale; "
        "no image was computed twice within a cache",
    ]


def part_terms(bench: Bench) -> list[str]:
    """SIGTERM at random moments"""
    stages = two_stages(bench, 24 if bench.quick else 240, "term-data")
    count = 3 if bench.quick else 30
    found = signalled(bench, stages, signal.SIGTERM, random_delays(bench, stages, signal.SIGTERM), count, name="terms")
    worst = max(found.late)
    require(worst <= GRACE, f"{worst:.1f} s from SIGTERM to the end")
    died = found.codes[-signal.SIGTERM]
    require(not died, f"{died} of {found.signals} runs died of SIGTERM itself instead of exiting with 143")
    return [
        f"{found.signals} signals in {found.runs} runs: every run that was not complete exited with 143",
        "half of the signals went to the children of the run too, as from systemd",
        f"from the signal to the end at most {worst:.2f} s (median {sorted(found.late)[len(found.late) // 2]:.2f} s)",
        "every restart continued; every finished cache equals an uninterrupted one; intermediate states as for SIGKILL",
    ]


@dataclass
class PowerLoss:
    """Counts of `power_loss`."""

    operations: int = 0
    states: int = 0
    broken: list[str] = field(default_factory=list)
    recovered: int = 0
    spared: int = 0  # images whose features survived


def power_loss(bench: Bench, *, states: int, recover: int, images: int = 16, fsync: str = "all") -> PowerLoss:
    """Replay crash states of a recorded trace: a killed run, its continuation, an update, an overwriting one.

    Args:
        bench: where.
        states: how many crash states are checked.
        recover: in how many of them the run is repeated and compared.
        images: of the first data set.
        fsync: which calls of fsync count; anything but ``all`` is a control, which must lose something.

    Raises:
        NotMetError: the trace is not complete, or a repeated run ends with another cache.
    """
    stages = dict(zip(("new", "update"), two_stages(bench, images, "power-data"), strict=True))
    stages = {"killed": stages["new"], **stages, "overwrite": stages["update"]}
    nets = {phase: bench.other_net() if phase == "overwrite" else bench.net() for phase in stages}
    root = bench.folder("power")
    recorder = crash_model.Recorder(root, fsync=fsync)
    wanted: dict[str, Contents] = {}
    with recorder.recording():
        for phase, data in stages.items():
            recorder.phase = phase
            # The last shard gets its name and no fsync of that; the next run takes it as it is.
            recorder.kill_at = f"shards/{(images - 1) // BATCH:05d}-" if phase == "killed" else ""
            try:
                extract(data, root / "made" / "c", nets[phase], overwrite=phase == "overwrite")
            except crash_model.KilledError:
                continue
            wanted[phase] = contents(root / "made" / "c")
    wanted["killed"] = wanted["new"]
    trace = recorder.trace
    real = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    require(crash_model.final(trace) == real, "the trace does not account for every byte on the disk")
    counts = PowerLoss(operations=sum(op.kind != "committed" for op in trace))
    rng = random.Random(bench.seed)
    # Every point of the trace in turn (twice and more if there are enough states), each with another outcome.
    points = [i * len(trace) // max(states, 1) for i in range(states)] if states < len(trace) else []
    points = points or [i % (len(trace) + 1) for i in range(states)]
    points[-1] = len(trace)
    every = max(1, states // recover) if recover else 0
    for number, at in enumerate(points):
        state = crash_model.crash(trace, at, rng)
        broken = crash_model.losses(trace, state)
        counts.states += 1
        counts.broken += broken[:1]
        if every and number % every == 0:
            again = bench.folder("power-again")
            state.write(again)
            cache = again / "made" / "c"
            before = seen_or_refused(cache)
            allowed = [None, *(wanted[phase] for phase in stages)]
            require(before in allowed, f"the crash state after operation {at} is readable and neither old nor new")
            spared = surviving(state)
            overwrite = state.phase == "overwrite"
            summary = extract(stages[state.phase], cache, nets[state.phase], overwrite=overwrite)
            images_now = summary.inputs - summary.failed
            require(summary.computed <= images_now, "more was computed than there is")
            require(contents(cache) == wanted[state.phase], f"recovery after operation {at} gives another cache")
            require(verify_cache(cache) == [], f"verify finds damage after recovery from operation {at}")
            require_clean(cache)
            counts.recovered += 1
            counts.spared += images_now - summary.computed
            require(overwrite or not spared or summary.computed < images_now, f"no shard was used after operation {at}")
    return counts


def seen_or_refused(cache: Path) -> Contents | None:
    """What a reader sees, or None where it refuses, for whatever reason of ours."""
    try:
        return contents(cache)
    except PenultError:
        return None


def surviving(state: crash_model.Crash) -> int:
    """Number of shards in a crash state."""
    return sum("/shards/" in name and not crash_model.hidden(name) for name in state.files)


def part_power(bench: Bench) -> list[str]:
    """Power loss, replayed from the write trace"""
    states, recover = (60, 10) if bench.quick else (1000, 320)
    found = power_loss(bench, states=states, recover=recover)
    require(not found.broken, f"{len(found.broken)} of {found.states} crash states lose something: {found.broken[:3]}")
    lines = [
        f"a trace of {found.operations} operations (a killed run, its continuation, an update, another "
        "backbone by `--overwrite`) that accounts for every byte on the disk",
        f"{found.states} legal crash states: in all of them every committed file is there, byte for byte, and nothing "
        "incomplete has a final name; `samples.h5` is the complete old one or the complete new one",
        f"{found.recovered} of them written out and the run repeated: each ended with the same cache as an uninterrupted "
        f"run, and {found.spared} images were not computed again",
    ]
    for control in ("none", "files", "directories"):
        lost = power_loss(bench, states=states, recover=0, fsync=control)
        require(lost.broken, f"control: with fsync of {control} alone the replay finds no loss, so it proves nothing")
        what = "no fsync" if control == "none" else f"fsync of {control} alone"
        lines.append(f"control, {what}: the same check finds losses in {len(lost.broken)} of {lost.states} states")
    return lines


CONTENTS_CHILD = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from benchmarks.soak import seen_or_refused
found = seen_or_refused(Path(sys.argv[2]))
print(hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest() if found is not None else "refused")
"""


def read_in_child(cache: Path) -> str:
    """Digest of what a reader sees; ``refused``, or ``died``: a damaged file may take its reader along."""
    command = [sys.executable, "-c", CONTENTS_CHILD, str(REPO), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.stdout.strip() if done.returncode == 0 else "died"


def touches_data(path: Path, at: int) -> bool:
    """Whether a byte of a sound file belongs to a dataset; of a file that is not HDF5, every one counts."""
    if path.suffix != ".h5":
        return True
    with h5py.File(path) as file:
        starts = [(dataset.id.get_offset(), dataset.id.get_storage_size()) for dataset in file.values()]
    return any(start is not None and start <= at < start + size for start, size in starts)


def part_flips(bench: Bench) -> list[str]:
    """Flipped bytes"""
    data = make_photos(bench.folder("flip-data"), 200, seed=bench.seed, size=(80, 60))
    (data / "ants" / "broken.jpg").write_bytes(b"no image")
    sound = bench.folder("flips") / "sound"
    extract(data, sound, bench.net(), batch_size=40)
    wanted, digest = contents(sound), read_in_child(sound)
    originals = {path: path.read_bytes() for path in sorted(sound.rglob("*")) if path.is_file() and path.name != ".lock"}
    rng = random.Random(bench.seed)
    by_kind: dict[str, list[Path]] = {}
    for path in originals:
        by_kind.setdefault("shard" if path.parent.name == "shards" else path.name, []).append(path)
    found, harmless, computed, data_hits = Counter[str](), Counter[str](), 0, 0
    total = 15 if bench.quick else 200
    kinds = ["shard", "samples.h5", "shard", "cache.json", "backbone.onnx", "shard", "samples.h5", "ledger.jsonl"]
    for number in range(total):
        kind = kinds[number % len(kinds)]
        path = rng.choice(by_kind[kind])
        at, bit = rng.randrange(len(originals[path])), rng.randrange(8)
        spoilt = bytearray(originals[path])
        spoilt[at] ^= 1 << bit
        cache = sound.with_name("c")
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(sound, cache)
        relative = path.relative_to(sound)
        (cache / relative).write_bytes(spoilt)
        where = f"bit {bit} of byte {at} of {relative}"
        try:
            named = bool(verify_cache(cache))
        except PenultError:
            named = True
        found[kind] += named
        if touches_data(path, at):
            require(named, f"verify does not find {where}, which is data")
            data_hits += 1
        if not named:
            require(read_in_child(cache) == digest, f"verify does not find {where}, and it changes what is read")
            require(kind in ("shard", "samples.h5"), f"verify does not find {where}")
            harmless[kind] += 1
        summary = extract(data, cache, bench.net(), batch_size=40)
        computed += summary.computed
        require(contents(cache) == wanted, f"extract does not repair {where}")
        require(verify_cache(cache) == [], f"verify finds damage after the repair of {where}")
        for name in ("cache.json", "backbone.onnx", "ledger.jsonl"):
            require((cache / name).read_bytes() == originals[sound / name], f"{name} is not as before after {where}")
    per_kind = ", ".join(f"{kind} {found[kind]} of {found[kind] + harmless[kind]}" for kind in by_kind)
    return [
        f"{total} random bits, one at a time, over all files of a cache; `verify` named {sum(found.values())} ({per_kind}), "
        f"among them all {data_hits} inside a dataset or a file that is not HDF5",
        f"the other {sum(harmless.values())} lie in parts of the HDF5 layout that carry no data: readers see the same arrays",
        f"`extract` repaired every one, computing {computed} images in all; the repaired cache equals the original",
    ]


def part_disk(bench: Bench) -> list[str]:
    """Full disk and failing disk"""
    data = make_photos(bench.folder("disk-data"), 16, seed=bench.seed)
    work, net = bench.folder("disk"), bench.net()
    extract(data, work / "reference", net)
    wanted = contents(work / "reference")
    probe = child(data, work / "probe", net, fault={"kind": "none", "call": "fsync", "at": -1})
    require(probe.code == 0, probe.stderr)
    total = probe.facts["events"]
    tried: Counter[str] = Counter()

    def attempt(label: str, fault: dict[str, Any]) -> None:
        cache = work / "c"
        shutil.rmtree(cache, ignore_errors=True)
        ended = child(data, cache, net, fault=fault)
        require(ended.code == 74, f"{label} {fault}: exit {ended.code}: {ended.stderr[-500:]}")
        require("Traceback" not in ended.stderr, f"{label} {fault}: a traceback")
        require(seen(cache) in (None, wanted), f"{label} {fault}: a partial cache is readable")
        visible = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in visible:
            if path.suffix == ".h5":
                shown = verify_cache(cache) if path.name == "samples.h5" else []
                require(not [finding for finding in shown if finding.file], f"{label} {fault}: {path.name} is partial")
        require(not list(cache.rglob(".*.tmp")), f"{label} {fault}: a temporary file is left")
        extract(data, cache, net)
        require(contents(cache) == wanted, f"{label} {fault}: the next run gives another cache")
        tried[label] += 1

    calls = range(1, total + 1, 4 if bench.quick else 1)
    for at in calls:
        attempt("EIO", {"kind": "errno", "call": "fsync", "at": at, "number": 5})
    writes = child(data, work / "probe2", net, fault={"kind": "none", "call": "write", "at": -1}).facts["events"]
    for at in range(1, writes + 1, 4 if bench.quick else 1):
        attempt("limit", {"kind": "limit", "call": "write", "at": at, "bytes": 1000})
        attempt("ENOSPC", {"kind": "errno", "call": "write", "at": at, "number": 28})
    return [
        f"EIO from each of the {total} calls of fsync in turn ({tried['EIO']} runs): exit 74, never success",
        f"a file size limit (RLIMIT_FSIZE) that cuts each of the {writes} writes short ({tried['limit']} runs), and "
        f"ENOSPC from each ({tried['ENOSPC']} runs): exit 74, no partial file under a final name, no temporary file left",
        "after each the next run completed the cache, equal to an uninterrupted one",
        _tmpfs(bench, data, wanted),
    ]


TMPFS = """
import json, os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from benchmarks import soak
from extractor.backbones.registry import Backbone
mount, data, net, reference = map(Path, sys.argv[2:6])
wanted, codes = soak.contents(reference), []
for kib in map(int, sys.argv[6:]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", mount], check=True)
    ended = soak.child(data, mount / "c", Backbone(str(net)))
    state = soak.seen(mount / "c") if (mount / "c").exists() else None
    assert state in (None, wanted), "a partial cache is readable"
    assert not list(mount.rglob(".*.tmp")), "a temporary file is left"
    shards = len(list((mount / "c/shards").glob("*.h5")))
    subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
    again = soak.child(data, mount / "c", Backbone(str(net)))
    assert again.code == 0 and soak.contents(mount / "c") == wanted, again.stderr
    codes.append([kib, ended.code, shards, again.summary["computed"]])
    subprocess.run(["umount", mount], check=True)
print(json.dumps(codes))
"""


def _tmpfs(bench: Bench, data: Path, wanted: Contents) -> str:
    """The same on a real file system that is full, where mounting one is allowed."""
    mount, reference = bench.folder("tmpfs"), bench.scratch / "disk" / "reference"
    used = sum(path.stat().st_size // 4096 * 4 + 8 for path in reference.rglob("*"))
    sizes = [1024, used // 2, *range(used - 60, used + 1, 12)]
    command = [sys.executable, "-c", TMPFS, REPO, mount, data, bench.net().name, reference, *map(str, sizes)]
    try:
        able = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", mount], capture_output=True, check=False)
        reason = able.stderr.decode().strip() if able.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        return f"a full tmpfs: skipped, mounting is not allowed here ({reason})"
    done = subprocess.run(["unshare", "-rm", *map(str, command)], capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"tmpfs: {done.stderr[-1500:]}")
    results = json.loads(done.stdout.splitlines()[-1])
    full = [result for result in results if result[1] == 74]
    require(len(full) >= 3 and {result[1] for result in results} <= {0, 74}, f"tmpfs: {results}")
    kept = [result[2] for result in full]
    return (
        f"a tmpfs of {len(full)} sizes too small: exit 74 each time with {min(kept)} to {max(kept)} shards kept and nothing "
        "partial; given space, the next run completed the cache"
    )


def part_changes(bench: Bench) -> list[str]:
    """A data set that changes"""
    count = 60 if bench.quick else 2000
    counts = changes(bench, count)
    return [
        f"{count} images; every file renamed: {counts['renamed']} inference calls, {counts['renamed computed']} computed",
        f"3 changed, 2 added, 4 deleted: {counts['changed computed']} computed; all other features bit-equal",
        f"the folder moved: {counts['moved']} inference calls, {counts['moved computed']} computed, the split unchanged",
    ]


def changes(bench: Bench, count: int) -> dict[str, int]:
    """Rename all, change some, move the folder; what each computes.

    Raises:
        NotMetError: more or less was computed than changed, or something else changed with it.
    """
    net, data = bench.net(), make_photos(bench.folder("changing") / "data", count, seed=bench.seed, size=(80, 60))
    cache = data.with_name("c")

    def run() -> Summary:
        return extract(data, cache, net, batch_size=16)

    def by_key() -> dict[bytes, tuple[Any, ...]]:
        return {row[2]: (row[0], row[1], *row[3:]) for row in contents(cache).values() if len(row) > 2}

    counts: dict[str, int] = {}
    require(run().computed == count, "not every image was computed")
    first = by_key()
    for i, path in enumerate(sorted(data.rglob("*.jpg"))):
        path.rename(path.with_name(f"renamed {count - i}.jpg"))
    summary = run()
    counts |= {"renamed": summary.inference_calls, "renamed computed": summary.computed}
    require(by_key() == first, "renaming changed features or splits")
    files = sorted(data.rglob("*.jpg"))
    random.Random(bench.seed).shuffle(files)
    for i, path in enumerate([*files[:3], data / "ants" / "new 1.jpg", data / "bees" / "new 2.jpg"]):
        other = make_photos(data.with_name("other"), 1, seed=9000 + i, size=(80, 60))
        path.write_bytes(next(other.rglob("*.jpg")).read_bytes())
        shutil.rmtree(other)
    for path in files[3:7]:
        path.unlink()
    summary = run()
    counts |= {"changed": summary.inference_calls, "changed computed": summary.computed}
    second = by_key()
    same = set(first) & set(second)
    require(len(same) == count - 7 and len(second) == count - 2, f"{len(same)} of {len(second)} contents stayed")
    require(all(first[key][2:] == second[key][2:] for key in same), "features of unchanged images changed")
    data = data.rename(data.with_name("moved"))
    summary = run()
    counts |= {"moved": summary.inference_calls, "moved computed": summary.computed}
    require(by_key() == second, "moving the folder changed features or splits")
    expected = {"renamed": 0, "renamed computed": 0, "changed computed": 5, "moved": 0, "moved computed": 0}
    require({key: counts[key] for key in expected} == expected, f"computed: {counts}")
    require(summary.inputs == count - 2 and FeatureCache(cache).root == data.absolute(), "the table does not follow")
    return counts


def part_unchanged(bench: Bench) -> list[str]:
    """Many files, unchanged"""
    count = 500 if bench.quick else 50_000
    data = make_tiny(bench.folder("many") / "data", count)
    cache = data.with_name("c")
    first = child(data, cache, bench.net(32), shard_bytes=0, batch=None)
    require(first.code == 0 and first.summary["computed"] == count, first.stderr[-800:])
    watched = child(data, cache, bench.net(32), shard_bytes=0, batch=None, watch=True)
    require(watched.code == 0 and watched.summary["computed"] == 0, watched.stderr[-800:])
    require(watched.facts["opened"] == 0, f"{watched.facts['opened']} images were opened")
    cost = [child(data, cache, bench.net(32), shard_bytes=0, batch=None) for _ in range(3)]
    cpu = sorted(ended.cpu for ended in cost)
    lines = [
        f"{count} files of {sum(p.stat().st_size for p in itertools.islice(data.rglob('*.jpg'), 100)) // 100} bytes; the first "
        f"extract took {first.cpu:.1f} s of CPU time, the second {cpu[1]:.2f} s ({cpu[0]:.2f} to {cpu[2]:.2f} s in three "
        f"runs, whole process with its children; target: under 3 s), {cost[0].seconds:.1f} s on the clock",
        f"images opened in the second: {watched.facts['opened']} (counted by an audit hook)",
    ]
    if not bench.quick and cpu[1] >= 3:
        raise NotMetError("; ".join(lines))
    return lines


def part_memory(bench: Bench) -> list[str]:
    """Memory"""
    few, many = (50, 500) if bench.quick else (2000, 20_000)
    peaks: dict[int, list[float]] = {few: [], many: []}
    for count in peaks:
        data = make_tiny(bench.folder(f"memory-{count}"), count)
        # a network as people use it: a toy would make a few bytes per image look like growth
        ended = child(data, bench.scratch / f"memory-{count}.cache", bench.usual_net(), shard_bytes=0, batch=None)
        require(ended.code == 0 and ended.summary["computed"] == count, ended.stderr[-800:])
        peaks[count].append(ended.peak)
    growth = max(peaks[many]) / min(peaks[few]) - 1
    lines = [
        f"peak resident set extracting {few} images {min(peaks[few]):.0f} MiB, {many} images {max(peaks[many]):.0f} MiB: "
        f"{100 * growth:+.1f} % (target: at most +10 %; MobileNetV2 at 224 pixels, default shard size)"
    ]
    if not bench.quick and growth > 0.1:
        raise NotMetError("; ".join(lines))
    return lines


def part_commands(bench: Bench) -> list[str]:
    """SIGKILL before any call of a command"""
    lines, kinds = [], list(kills.SCENARIOS)
    with kills.serving(*kills.FOR_TORCH) as server:
        for name in [kind for kind in kinds if kind != kills.OF_STORE and (kind != "finetune" or not bench.quick)]:
            found = kills.kill(name, server, bench.folder("commands"), 5 if bench.quick else 50, bench.seed)
            lines.append(
                f"`{name}`: {found.kills} kills before one of {found.calls} calls that change the disk: {found.old} times the "
                f"old result, {found.kills - found.old} times the new one; {found.left} leftovers, which the next run removed"
            )
    return [*lines, "after each kill the same command gave the result of an uninterrupted run, and left what that leaves"]


def part_pairs(bench: Bench) -> list[str]:
    """Commands side by side"""
    lines = []
    with kills.serving() as server:
        for name in [each for each in kills.PAIRS if not each.startswith(kills.OF_STORE)]:
            found = kills.side_by_side(name, server, bench.folder("pairs"), 2 if bench.quick else 10, bench.seed)
            lines.append(
                f"{name}: {found.total()} times one was stopped at some call while the other ran: {found['both right']} times "
                f"both ended well, {found['75']} times one exited with 75"
            )
    return [*lines, "each time the results were those of running one after the other, or of one alone; nothing was left behind"]


def part_endless(bench: Bench) -> list[str]:
    """SIGTERM in a call that does not end"""
    bundle = kills.endless(bench.folder("endless"))
    late = []
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-c", kills.ANNOUNCED, "evaluate", bundle, kills.ARCHIVE / "photos.cache"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPO) as process:
            assert process.stdout is not None
            require(process.stdout.readline() == "running\n", "it does not run")
            begin = time.monotonic()
            process.send_signal(number)
            code = process.wait()
        late.append(time.monotonic() - begin)
        require(code == 128 + number, f"exit {code} after signal {number}")
        require(late[-1] <= GRACE + 1, f"{late[-1]:.1f} s from signal {number} to the end")
    return [
        "a bundle whose head counts to 2**62 in ONNX Runtime, which then looks at no signal: from SIGTERM to exit 143 "
        f"{late[0]:.1f} s, from SIGINT to exit 130 {late[1]:.1f} s"
    ]


LOOK_UP = """
import pathlib, socket
socket.getaddrinfo("localhost", 80)
pathlib.Path.home().joinpath(".stranger").touch()
"""


def part_home(bench: Bench) -> list[str]:
    """Hosts, and the home folder"""
    if not shutil.which("strace"):
        message = "strace is not here, so that nothing could be traced: install it (apt-get install strace), or use Linux"
        raise NotMetError(message)
    work = bench.folder("home") / "work"
    home.make_inputs(work, 48)
    shutil.copy(bench.net().name, work / "net.onnx")
    control = home.trace([sys.executable, "-c", LOOK_UP], work, work.with_name("control"))
    require(control.lookups and control.made == [".stranger"], f"the trace misses a look-up or a file: {control}")
    chosen = [command for command in home.COMMANDS if command.quick or not bench.quick]
    for number, command in enumerate(chosen):
        traced = home.trace(home.penult(command), work, work.with_name(f"{number}"))
        require(traced.code == command.code, f"{command.line}: exit {traced.code}: {traced.stderr[-800:]}")
        require(not traced.lookups, f"{command.line} looks a host up: {traced.lookups[:3]}")
        require(not traced.made, f"{command.line} made {traced.made}")
    return [
        f"{len(chosen)} commands, all but `weights fetch`, each traced with its children, with a fresh home folder and a bare "
        "environment",
        "none looked a host up or reached another machine; the home folders held nothing but "
        + " and ".join(f"`{name}`" for name in home.OURS),
        "control, a process that looks up `localhost` and writes one file: the trace shows both",
    ]


def part_prepared(bench: Bench) -> list[str]:
    """The store of prepared backbones"""
    with kills.serving() as server:
        place = bench.folder("prepared")
        killed = kills.kill(kills.OF_STORE, server, place / "kills", 5 if bench.quick else 50, bench.seed)
        beside = Counter[str]()
        for name in [each for each in kills.PAIRS if each.startswith(kills.OF_STORE)]:
            beside += kills.side_by_side(name, server, place / name, 2 if bench.quick else 25, bench.seed)
        bits = prepared.flips(place / "flips", server, 8 if bench.quick else 50, bench.seed)
        cut = prepared.full_disk(place / "disk", server)
        closed = prepared.only_read(place / "closed", server)
    names = ", ".join(f"{kind} {number}" for kind, number in sorted(bits.items()))
    reading = "what it has is taken without a word, what it has not is made, with one warning"
    return [
        "a run finds the entry of its network damaged and the store full: it removes the entry and another one, makes the "
        "network and keeps it",
        f"{killed.kills} kills before one of {killed.calls} calls that change the disk: {killed.old} times there was no entry, "
        f"{killed.kills - killed.old} times the new one, never another; {killed.left} leftovers, which the next run removed",
        f"{beside.total()} times such a run was stopped at some call while another one, or `penult backbones --prepared "
        f"--prune`, ran: {beside['both right']} times both ended well, with the right network; nothing was left behind",
        f"{bits.total()} random bits, one at a time, over all files of an entry ({names}): each was noticed before the network "
        "was used, the entry was removed, and the network was made and kept again",
        f"a file size limit (RLIMIT_FSIZE) that cuts each of the {cut} writes into the store short: the run went on with the "
        "right network and one warning, and nothing was left; the next run kept it",
        f"a store in which nothing may be written: {reading if closed else 'skipped, it takes a process without rights'}",
    ]


def part_fuzz(bench: Bench) -> list[str]:
    """Damaged and hostile files"""
    count = 20 if bench.quick else 2000
    tallies = fuzz.fuzz(fuzz.make_bases(bench.folder("fuzz")), list(fuzz.TARGETS), count, bench.seed, use=True)
    failures = [f"{name}, {failure}" for name, tally in tallies.items() for failure in tally.failures]
    require(not failures, "; ".join(failures[:5]))
    return [
        f"{count} changes each, of bytes or of one value, name, type or shape; in every second one the digests were computed "
        "again; of what could still be read every fifth was trained on, judged and drawn",
        *(f"{name}: {tally}" for name, tally in tallies.items()),
        "no traceback, no crash, no hang; no other number where the digests were left as they were",
    ]


PARTS: dict[str, Callable[[Bench], list[str]]] = {
    "kills": part_kills,
    "terms": part_terms,
    "commands": part_commands,
    "pairs": part_pairs,
    "endless": part_endless,
    "power": part_power,
    "flips": part_flips,
    "disk": part_disk,
    "changes": part_changes,
    "unchanged": part_unchanged,
    "memory": part_memory,
    "home": part_home,
    "prepared": part_prepared,
    "fuzz": part_fuzz,
}

HEADER = """# Reliability

Written by `make soak`, which injects each fault and checks what is left; a part that is not met says so and makes it fail.
The seeded short form of the same checks is in `tests/test_durability.py` and `tests/test_interruptions.py`; it runs with every
`make test`.
"""


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    name = f", {model[1].strip()}" if model else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({platform.machine()}{name}), {memory:.0f} GiB, {platform.system()} {platform.release()}"


def write_document(results: dict[str, tuple[str, list[str]]]) -> None:
    """Replace the sections of the parts that ran; the others keep the counts of their last run."""
    sections = {}
    if DOCUMENT.exists():
        for section in re.split(r"^(?=## )", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
            sections[section.partition("\n")[0]] = section.rstrip() + "\n"
    for title, (status, lines) in results.items():
        body = "".join(f"- {line}\n" for line in lines)
        sections[f"## {title}"] = f"## {title}\n\n{status}\n\n{body}"
    titles = [f"## {part.__doc__}" for part in PARTS.values()]
    DOCUMENT.write_text("\n".join([HEADER, *(sections[title] for title in titles if title in sections)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone")
    parser.add_argument("--quick", action="store_true", help="small counts, no document")
    shared = Path(os.environ.get("PENULT_TEST_ASSETS", REPO.parent / "shared")) / "data/hymenoptera/train"
    parser.add_argument(
        "--photos",
        type=Path,
        default=shared if shared.is_dir() else None,
        help="a folder per class of real photos for the kills and signals; by default those of ../shared, where it is",
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    results: dict[str, tuple[str, list[str]]] = {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="penult-soak-") as scratch:
        os.environ["PENULT_CACHE"] = str(Path(scratch, "penult"))  # what is exported here is not kept in the home folder
        bench = Bench(Path(scratch), given.seed, given.quick, given.photos)
        for name in given.only or PARTS:
            begin = time.monotonic()
            try:
                lines = PARTS[name](bench)
                verdict = "Met"
            except (NotMetError, BadDataError) as error:
                lines, verdict = [str(error)], "**Not met**"
                failed.append(name)
            took = time.monotonic() - begin
            status = f"{verdict}. {date.today()}, {machine()}, seed {given.seed}, {took:.0f} s."
            results[str(PARTS[name].__doc__)] = status, lines
            print(f"{name}: {status}", *(f"  - {line}" for line in lines), sep="\n", flush=True)
            if not given.quick:
                write_document(results)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
