"""Commands that are killed before any of their calls of the operating system, or stopped there while another runs beside them.

`Server` has penult imported and forks a process for each command, so that a kill costs what the command does and not its
imports. In that process the calls that change the disk below a folder are counted (or those that open a file there), and a
signal comes before a chosen one; if that is a write, after half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from classifiers.bundles.bundle import Bundle  # noqa: E402
from classifiers.bundles.fused import Fused  # noqa: E402
from extractor.backbones import prepared  # noqa: E402
from extractor.graphs import onnx_file  # noqa: E402
from extractor.graphs.prepared_entry import key_of  # noqa: E402
from store.cache import FeatureCache  # noqa: E402
from store.errors import InputMissingError, OutputExistsError, PenultError  # noqa: E402
from store.format.samples import SampleTable  # noqa: E402
from store.verify import verify_cache  # noqa: E402
from store.writer import open_writer  # noqa: E402

ARCHIVE = REPO / "tests/data/archives/v1"  # caches and bundles of a tiny network
MODULES = (
    "onnx",
    "onnxruntime",
    "sklearn.linear_model",
    "matplotlib.backends.backend_svg",
    "classifiers.commands.train",
    "classifiers.bundles.fuse",
    "classifiers.comparison.sweep",
    "classifiers.jobs.run",
    "classifiers.reports.bundle_page",
    "extractor.backbones.prepared",
    "store.compact",
    "store.drift",
)
FOR_TORCH = ("torchvision", "lightning.pytorch", "classifiers.finetuning.finetune", "torch.onnx", "onnxscript")
VARIES = re.compile(r"\d{5}-[0-9a-f]{12}(?=\.h5)|(?<=-)[0-9a-f]{8}(?=\.data)")  # parts of names that no two runs share
OF_STORE = "prepared backbone"  # with this, the names of scenarios and pairs that are about the store of these begin
DONE = (0, 3)  # 3: with recorded failures, some of which the archive has
LOCKED = 75

SERVER = r"""
import importlib, json, mmap, os, signal, struct, sys, threading
sys.path.insert(0, sys.argv[1])
import store.environment
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
import cli
import h5py
from store.format import atomic

shared = mmap.mmap(-1, 8)  # how many calls were counted, also of a process that is gone

def watch(root, number, at, reads):
    real, lock = {}, threading.RLock()

    def below(path):
        try:
            return (os.path.abspath(os.fsencode(path)) + b"/").startswith(root)
        except (TypeError, ValueError):
            return False

    def before(half=lambda: None):
        with lock:
            count = struct.unpack("q", shared[:])[0] + 1
            shared[:] = struct.pack("q", count)
            if count == at:
                half()
                os.kill(os.getpid(), number)

    def audit(event, args):
        if event == "open":
            writes = args[2] & (os.O_WRONLY | os.O_RDWR)
            if (reads or writes) and not isinstance(args[0], int) and below(args[0]):
                before()
        elif event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir") and below(args[0]):
            before()
        elif reads and event == "os.scandir" and below(args[0] or "."):
            before()

    def counted(name, half):
        def call(descriptor, *args):
            if below(os.readlink(f"/proc/self/fd/{descriptor}")):
                before(lambda: half(descriptor, *args))
            return real[name](descriptor, *args)
        real[name] = getattr(os, name)
        setattr(os, name, call)

    if number == signal.SIGKILL:
        counted("write", lambda descriptor, data: real["write"](descriptor, bytes(data)[: len(data) // 2]))
        counted("sendfile", lambda descriptor, *args: real["sendfile"](descriptor, *args[:2], 10))
        counted("fsync", lambda descriptor: None)
        exchange = atomic.exchange
        atomic.exchange = lambda *paths: (before(), exchange(*paths))[1]
    else:
        opened = h5py.File.__init__  # it opens files without Python's knowledge
        def init(self, name, *args, **options):
            if below(name):
                before()
            opened(self, name, *args, **options)
        h5py.File.__init__ = init
    sys.addaudithook(audit)

def run(cwd, log, code, arguments, environment, number, at, reads):
    os.chdir(cwd)
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if at is not None:
        watch(os.fsencode(cwd) + b"/", number, at, reads)
    if code:
        return exec(code, {})
    sys.argv = ["penult", *arguments]
    cli.main()

def fork(request):
    child = os.fork()
    if child:
        return child
    try:
        run(**request)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    first, second = json.loads(line)
    shared[:] = bytes(8)
    child, codes = fork(first), []
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        codes = [os.waitstatus_to_exitcode(os.waitpid(fork(second), 0)[1])]
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    codes.insert(0, os.waitstatus_to_exitcode(status))
    print(json.dumps([codes, struct.unpack("q", shared[:])[0]]), flush=True)
"""


class NotMetError(Exception):
    """A promise was broken."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise NotMetError(what)


@dataclass(frozen=True)
class Command:
    """A command line, or Python code in its place, that works in a folder.

    Attributes:
        arguments: of ``penult``.
        code: run instead.
    """

    arguments: Sequence[str] = ()
    code: str = ""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: died of that signal), and what it printed."""

    code: int
    stdout: str
    stderr: str


class Server:
    """A process with penult imported, from which commands are forked; it has no threads that a fork would lose.

    Args:
        modules: what is imported besides.
    """

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(REPO), json.dumps(modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        assert self._from.readline() == "ready\n"

    def run(self, command: Command, folder: Path) -> Ended:
        """Run a command to its end."""
        return self._ask(folder, command)[0][0]

    def killed(self, command: Command, folder: Path, at: int) -> tuple[Ended, int]:
        """Run a command and kill it before its call number ``at`` (never at 0); also returns how many it made."""
        (ended,), calls = self._ask(folder, command, number=signal.SIGKILL, at=at)
        return ended, calls

    def beside(self, command: Command, other: Command, folder: Path, at: int) -> tuple[list[Ended], int]:
        """Stop a command before it opens a file or changes a name for the time ``at``, run another, and let the first go on."""
        return self._ask(folder, command, other, number=signal.SIGSTOP, at=at)

    def _ask(
        self, folder: Path, *commands: Command, number: int = signal.SIGKILL, at: int | None = None
    ) -> tuple[list[Ended], int]:
        logs = [folder.with_name(f"{folder.name}.log{i}") for i in range(2)]
        environment = {"TMPDIR": str(folder / "tmp"), "TORCH_HOME": str(folder / "torch")}
        requests: list[dict[str, Any] | None] = [
            {
                "cwd": str(folder),
                "log": str(log),
                "code": command.code,
                "arguments": list(command.arguments),
                "environment": environment,
                "number": number,
                "at": None if i else at,
                "reads": number == signal.SIGSTOP,
            }
            for i, (command, log) in enumerate(zip(commands, logs, strict=False))
        ]
        print(json.dumps([*requests, None][:2]), file=self._to, flush=True)
        codes, calls = json.loads(self._from.readline())
        ended = []
        for code, log in zip(codes, logs, strict=False):
            texts = [log.with_name(f"{log.name}.{name}").read_text(errors="replace") for name in ("stdout", "stderr")]
            ended.append(Ended(code, *texts))
        return ended, calls

    def close(self) -> None:
        self._to.close()
        self._process.wait()
        self._from.close()


@contextmanager
def serving(*modules: str) -> Iterator[Server]:
    server = Server([*MODULES, *modules])
    try:
        yield server
    finally:
        server.close()


# --- commands, and what their results say ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A command that replaces a result.

    Attributes:
        command: the command.
        items: what it needs of the archive, by the name that it has in the folder.
        read: the result as users see it; nothing may raise.
        before: made once, in the folder.
    """

    command: Command
    items: dict[str, str]
    read: Callable[[Path], object]
    before: Callable[[Path, Server], object] = field(default=lambda folder, server: None)

    def prepare(self, folder: Path, server: Server) -> Path:
        (folder / "tmp").mkdir(parents=True)
        for name, source in self.items.items():
            path = ARCHIVE / source
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
        self.before(folder, server)
        return folder


def _bundle(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        bundle = Bundle.load(folder / name)
        predictions = bundle.predictions()
        digest = hashlib.sha256(predictions.probabilities.round(4).tobytes()).hexdigest()
        return bundle.kind, bundle.head, predictions.ids, digest, (bundle.path / "report.html").stat().st_size > 0

    return read


def _features(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        cache = FeatureCache(folder / name)
        rows = cache.rows()
        X = cache.features([row.sha256 for row in rows])
        return [row.path for row in rows], str(X.dtype), hashlib.sha256(X.tobytes()).hexdigest()

    return read


def _penult(*arguments: str) -> Command:
    return Command(arguments)


def _run(*arguments: str) -> Callable[[Path, Server], object]:
    def before(folder: Path, server: Server) -> None:
        ended = server.run(Command(arguments), folder)
        require(ended.code in DONE, f"{' '.join(arguments)}: exit {ended.code}: {ended.stderr[-800:]}")

    return before


def _forget_some(folder: Path, server: Server | None = None, name: str = "photos.cache") -> None:
    """As if a third of the images had been deleted, and the cache brought up to date."""
    with open_writer(folder / name) as writer:
        table = writer.samples
        assert table is not None
        writer.finish(SampleTable([row for i, row in enumerate(table.rows) if i % 3], table.facts, table.target_names))


def _golden(folder: Path, server: Server) -> None:
    _run("compact", "photos.cache", "-o", "golden.h5")(folder, server)
    _forget_some(folder)


WEIGHTS = """
import hashlib
from pathlib import Path
from types import SimpleNamespace
from extractor.backbones.weights import WeightsFile, install
source = Path("theirs.pth")
entry = SimpleNamespace(url="https://nowhere/net-" + hashlib.sha256(source.read_bytes()).hexdigest()[:8] + ".pth")
class Here(WeightsFile):
    place = property(lambda self: Path("torch", self.name))  # without torch, whose import takes longer than all else
install(source, Here("net", entry))
"""


def _weights(folder: Path, server: Server) -> None:
    data = random.Random(0).randbytes(3 * 2**20)
    (folder / "theirs.pth").write_bytes(data)
    target = folder / f"torch/net-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(data[:1000])  # an earlier copy by hand, cut short


JOB = 'data = "photos"\ncache = "photos.cache"\nbundle = "job.head"\n[backbone]\nname = "network.onnx"\n[train]\nhead = "{}"\n'


def _job(folder: Path, server: Server) -> None:
    (folder / "job.toml").write_text(JOB.format("centroid"))
    _run("run", "job.toml", "-q")(folder, server)
    (folder / "job.toml").write_text(JOB.format("ridge"))


def _sweep(folder: Path, server: Server) -> None:
    _run("export", "network.onnx", "-o", "other.onnx")(folder, server)
    _run("sweep", "photos", "-m", "network.onnx", "-o", "sweep", "--head", "centroid", "-q")(folder, server)


# What a run does with the store of prepared backbones: take a network, or make and keep it. `MAX_INLINE` is as small as this
# network, so that it has external data; the limit leaves room for it and for no other.
PREPARED = """
import os
os.environ |= {{"PENULT_CACHE": os.path.abspath("penult"), "PENULT_CACHE_GIB": str(60000 / 2**30)}}
from pathlib import Path
from extractor.backbones import prepared
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import read_facts
onnx_file.MAX_INLINE, prepared.SPARE = 1000, 0
request, target = {{"network": "{name}"}}, Path("{target}")
if not prepared.take(request, target):
    with onnx_file.replacing(target) as new:
        onnx_file.save(onnx_file.read_model(Path("network.onnx")), new)
    prepared.keep(request, target, read_facts(target), {{"notes.h5": bytes(20000)}})
"""


def prepared_code(name: str = "ours", target: str = "out.onnx") -> Command:
    return Command(code=PREPARED.format(name=name, target=target))


def prepared_state(folder: Path, name: str = "ours", target: str = "out.onnx") -> object:
    """What the store has, read from a copy, because reading removes what is damaged; and what was made of it.

    Raises:
        NotMetError: the store gives something else than what was kept.
    """
    made = [network_digest(path) for path in (folder / "network.onnx", folder / target) if path.exists()]
    require(len(set(made)) == 1, f"{target} is another network")
    with tempfile.TemporaryDirectory() as copy:
        if (folder / "penult").is_dir():
            shutil.copytree(folder / "penult", Path(copy, "penult"))
        with mock.patch.dict(os.environ, {"PENULT_CACHE": str(Path(copy, "penult"))}):
            taken = prepared.take({"network": name}, Path(copy, "taken.onnx"))
        if taken is None:
            message = f"{name} is not in the store"
            raise InputMissingError(message)
        require(network_digest(Path(copy, "taken.onnx")) == made[0], f"the store gives another network for {name}")
        require(taken.others == {"notes.h5": bytes(20000)}, f"the store gives other notes for {name}")
    return sorted(taken.others)


def network_digest(path: Path) -> str:
    model = onnx_file.read_model(path)
    return onnx_file.graph_digest(model) + onnx_file.weights_digest(model, path.parent)


def _second_prepared(folder: Path) -> object:
    return prepared_state(folder, target="other.onnx")


def _damaged(folder: Path, server: Server) -> None:
    """A store that has another network, and a damaged copy of ours."""
    for name in ("theirs", "ours"):
        ended = server.run(prepared_code(name), folder)
        require(ended.code == 0, ended.stderr[-800:])
        kept = folder / "penult" / name
        (folder / "penult/backbones" / key_of({"network": name})).rename(kept)
    for name in ("theirs", "ours"):
        (folder / "penult" / name).rename(folder / "penult/backbones" / key_of({"network": name}))
    data = next((folder / "penult/backbones" / key_of({"network": "ours"})).glob("*.data"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    for path in folder.glob("out*"):
        path.unlink()


def _prepared(folder: Path, server: Server) -> None:
    ended = server.run(prepared_code(), folder)
    require(ended.code == 0, ended.stderr[-800:])


NETWORK = {"network.onnx": "photos.cache/backbone.onnx"}
IMAGES = {"photos": "photos", "network.onnx": "network.onnx", "network.toml": "network.toml"}
CACHE = {"photos.cache": "photos.cache"}
TUNE = ["-m", "squeezenet1_1", "--weights", "random:0", "--resize", "40", "--crop", "32", "--epochs", "1"]
TUNE += ["--device", "cpu", "--no-thumbnails", "-q"]
SCENARIOS = {
    "train": Scenario(
        _penult("train", "photos.cache", "--head", "centroid", "-o", "a.head", "--overwrite"),
        {**CACHE, "a.head": "ridge.head"},
        _bundle("a.head"),
    ),
    "finetune": Scenario(
        _penult("finetune", "photos.cache", "--root", "photos", "-o", "a.head", "--overwrite", *TUNE),
        {**CACHE, **IMAGES, "a.head": "ridge.head"},
        _bundle("a.head"),
    ),
    "fuse": Scenario(
        _penult("fuse", "knn.head", "-o", "a.b.onnx", "--overwrite"),
        {"knn.head": "knn.head", "a.b.onnx": "fused.onnx"},
        lambda folder: Fused.load(folder / "a.b.onnx").head,
    ),
    "train, the first time": Scenario(
        _penult("train", "photos.cache", "--head", "centroid", "-o", "a.head"), CACHE, _bundle("a.head")
    ),
    "compact -o, the first time": Scenario(_penult("compact", "photos.cache", "-o", "a.h5"), CACHE, _features("a.h5")),
    "compact -o": Scenario(
        _penult("compact", "photos.cache", "-o", "a.h5", "--dtype", "float16", "--overwrite"),
        {**CACHE, "a.h5": "photos.h5"},
        _features("a.h5"),
    ),
    "compact --prune": Scenario(_penult("compact", "photos.cache", "--prune"), CACHE, _features("photos.cache"), _forget_some),
    "sweep": Scenario(
        _penult("sweep", "photos", "-m", "network.onnx,other.onnx", "-o", "sweep", "--head", "centroid", "-q"),
        IMAGES,
        lambda folder: "other.onnx" in (folder / "sweep/sweep.html").read_text(),
        _sweep,
    ),
    "weights import": Scenario(  # the part that writes
        Command(code=WEIGHTS),
        {},
        lambda folder: [hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "torch").rglob("net-*.pth")],
        _weights,
    ),
    "check --update": Scenario(
        _penult("check", "photos.cache", "--against", "golden.h5", "--update"), CACHE, _features("golden.h5"), _golden
    ),
    OF_STORE: Scenario(prepared_code(), NETWORK, prepared_state, _damaged),
    "run": Scenario(_penult("run", "job.toml", "-q"), {**CACHE, **IMAGES}, _bundle("job.head"), _job),
}


def listing(folder: Path) -> Counter[str]:
    """The names of all that lies in a folder, in which what no two runs share is left out."""
    return Counter(VARIES.sub("*", str(path.relative_to(folder))) for path in folder.rglob("*"))


@dataclass
class Killed:
    """Counts of `kill`: of the states after a kill, how many were the old result; temporary items that the next run removed."""

    kills: int = 0
    old: int = 0
    left: int = 0
    calls: int = 0


def _result(scenario: Scenario, folder: Path) -> object:
    """What a reader sees of the result; None if there is none."""
    try:
        return scenario.read(folder)
    except InputMissingError:
        return None


def kill(name: str, server: Server, place: Path, count: int, seed: int = 0) -> Killed:
    """Kill a command ``count`` times before calls drawn by a seed, the first and the last among them; then run it again.

    Args:
        name: of the scenario.
        server: its modules must include what the command needs.
        place: an empty folder.
        count: how many kills.
        seed: of the draws.

    Raises:
        NotMetError: the result is neither the old nor the new one; or the next run fails, or leaves more than one in peace.
    """
    scenario, work = SCENARIOS[name], place / "work"
    made = scenario.prepare(place / "made", server)
    old = _result(scenario, made)
    shutil.copytree(made, work)
    ended, calls = server.killed(scenario.command, work, 0)
    require(ended.code in DONE, f"{name}: exit {ended.code}: {ended.stderr[-800:]}")
    new, whole = scenario.read(work), listing(work)
    rng = random.Random(f"{seed} {name}")
    counts = Killed(calls=calls)
    for at in [1, calls, *(rng.randint(1, calls) for _ in range(count - 2))]:
        shutil.rmtree(work)
        shutil.copytree(made, work)
        ended, _ = server.killed(scenario.command, work, at)
        if ended.code in DONE:  # calls of threads are in no order, and this time there were fewer
            continue
        require(ended.code == -signal.SIGKILL, f"{name}, call {at}: exit {ended.code}: {ended.stderr[-800:]}")
        counts.kills += 1
        counts.left += sum((listing(work) - whole).values())
        try:
            state = _result(scenario, work)
        except PenultError as error:
            message = f"{name}, call {at}: the result cannot be read: {error}"
            raise NotMetError(message) from error
        require(state in (old, new), f"{name}, call {at}: neither the old nor the new result")
        counts.old += state == old
        again = server.run(scenario.command, work)
        there = again.code == OutputExistsError.exit_code and state == new  # refused, because it is
        require(there or again.code in DONE, f"{name}, call {at}: the next run: exit {again.code}: {again.stderr[-800:]}")
        require(scenario.read(work) == new, f"{name}, call {at}: the next run gives another result")
        require(listing(work) == whole, f"{name}, call {at}: {listing(work) - whole} left, {whole - listing(work)} missing")
        for cache in work.glob("**/*.cache"):
            require(verify_cache(cache) == [], f"{name}, call {at}: {cache.name} is damaged")
            opened = FeatureCache(cache)
            stored = sum(len(shard.sha256) for shard in opened.shards)
            require(stored == opened.describe()["rows"], f"{name}, call {at}: rows of {cache.name} are stored twice")
    return counts


# --- two commands side by side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two commands that share a cache, a bundle or an output.

    Attributes:
        first, second: the commands; the first is stopped while the second runs.
        items, before: as of a `Scenario`.
        read: the results of both.
        said: whether what a command prints is its result.
    """

    first: Command
    second: Command
    items: dict[str, str]
    read: Callable[[Path], object]
    before: Callable[[Path, Server], object] = field(default=lambda folder, server: None)
    said: bool = False


def _both(*reads: Callable[[Path], object]) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        results: list[object] = []
        for each in reads:
            try:
                results.append(each(folder))
            except InputMissingError:
                results.append(None)
        return results

    return read


def _changed(folder: Path, server: Server) -> None:
    _forget_some(folder)
    for path in sorted((folder / "photos/test").rglob("*.jpg"))[:2]:
        path.unlink()
    shutil.copy(ARCHIVE / "extra.jpg", folder / "photos/train/blue/extra.jpg")


EXTRACT = _penult("extract", "photos", "-m", "network.onnx", "-o", "photos.cache", "--test-fraction", "0", "-q")
PRUNE = _penult("compact", "photos.cache", "--prune")
TRAIN = _penult("train", "photos.cache", "--head", "centroid", "-o", "a.head", "--overwrite")
EVALUATE = _penult("evaluate", "ridge.head", "photos.cache", "--json", "-q")
PREDICT = _penult("predict", "ridge.head", "extra.jpg", "--format", "jsonl")
KNN, RIDGE = (_penult("fuse", f"{name}.head", "-o", "a.onnx", "--overwrite") for name in ("knn", "ridge"))
ALL = {**CACHE, **IMAGES, "ridge.head": "ridge.head", "extra.jpg": "extra.jpg"}
PRUNE_PREPARED = Command(code=PREPARED.partition("request, target")[0].format() + "prepared.prune()\n")
HEADS = {"knn.head": "knn.head", "ridge.head": "ridge.head"}
OF_CACHE = _features("photos.cache")
PAIRS = {
    "extract + prune": Pair(EXTRACT, PRUNE, ALL, OF_CACHE, _changed),
    "extract + train": Pair(EXTRACT, TRAIN, ALL, _both(OF_CACHE, _bundle("a.head")), _changed),
    "run + run": Pair(_penult("run", "job.toml", "-q"), _penult("run", "job.toml", "-q"), ALL, _bundle("job.head"), _job),
    "prune + predict": Pair(PRUNE, PREDICT, ALL, OF_CACHE, _forget_some, said=True),
    "prune + evaluate": Pair(PRUNE, EVALUATE, ALL, OF_CACHE, _forget_some, said=True),
    "prune + train": Pair(PRUNE, TRAIN, ALL, _both(OF_CACHE, _bundle("a.head")), _forget_some),
    "compact + train on the compact file": Pair(
        _penult("compact", "photos.cache", "-o", "a.h5", "--dtype", "float16", "--overwrite"),
        _penult("train", "a.h5", "--head", "centroid", "-o", "a.head", "--overwrite"),
        {**CACHE, "a.h5": "photos.h5"},
        _both(_features("a.h5"), _bundle("a.head")),
    ),
    f"{OF_STORE}, twice": Pair(
        prepared_code(), prepared_code(target="other.onnx"), NETWORK, _both(prepared_state, _second_prepared), _damaged
    ),
    f"{OF_STORE} + prune": Pair(prepared_code(), PRUNE_PREPARED, NETWORK, _both(prepared_state), _prepared),
    "fuse + fuse": Pair(KNN, RIDGE, HEADS, lambda folder: Fused.load(folder / "a.onnx").head),
    "train + train": Pair(
        TRAIN,
        _penult("train", "photos.cache", "--head", "ridge", "-o", "a.head", "--overwrite"),
        {**CACHE, "a.head": "knn.head"},
        _bundle("a.head"),
    ),
}


def side_by_side(name: str, server: Server, place: Path, count: int, seed: int = 0) -> Counter[str]:
    """Stop each of two commands before ``count`` of its calls, drawn by a seed, while the other runs from beginning to end.

    Returns:
        How often both ended well, or which of them was told to try again later.

    Raises:
        NotMetError: a command ended in another way, or the results are those of no order in which one runs after the other.
    """
    pair, made, work = PAIRS[name], place / "made", place / "work"
    Scenario(pair.first, pair.items, pair.read, pair.before).prepare(made, server)

    def begin() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(made, work)

    states: list[object] = []
    said: dict[Command, set[str]] = {pair.first: set(), pair.second: set()}
    for order in ([pair.first], [pair.second], [pair.first, pair.second], [pair.second, pair.first]):
        begin()
        for command in order:
            ended = server.run(command, work)
            require(ended.code in DONE, f"{name}: exit {ended.code}: {ended.stderr[-800:]}")
            said[command].add(ended.stdout)
        states.append(pair.read(work))
    rng, outcomes = random.Random(f"{seed} {name}"), Counter[str]()
    for first, second in ((pair.first, pair.second), (pair.second, pair.first)):
        begin()
        _, calls = server.beside(first, second, work, 0)
        for at in [rng.randint(1, calls) for _ in range(count)]:
            begin()
            both, _ = server.beside(first, second, work, at)
            where = f"{name}, {' '.join(first.arguments[:2])} stopped at call {at} of {calls}"
            for command, ended in zip((first, second), both, strict=False):
                require(ended.code in (*DONE, LOCKED), f"{where}: exit {ended.code}: {ended.stderr[-800:]}")
                if pair.said and ended.code in DONE:
                    require(ended.stdout in said[command], f"{where}: another answer than alone")
            require(pair.read(work) in states, f"{where}: the results of no order")
            left = [path for path in listing(work) if ".tmp" in path or "penult-lock" in path]
            require(not left, f"{where}: {left} left")
            outcomes["75" if LOCKED in [ended.code for ended in both] else "both right"] += 1
    return outcomes


# --- a call that does not end ------------------------------------------------------------------------------------------

ANNOUNCED = """
import sys, threading, time
import cli

def announce(main=threading.get_ident()):
    code = None
    while not (code and code.co_name == "run" and "onnxruntime" in code.co_filename):
        time.sleep(0.01)
        code = sys._current_frames()[main].f_code
    print("running", flush=True)

threading.Thread(target=announce, daemon=True).start()
cli.main()
"""  # a command that says when ONNX Runtime computes


def endless(folder: Path) -> Path:
    """A bundle whose head counts to 2**62 before it answers."""

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    real, rows = TensorProto.FLOAT, ("n", 3)
    inputs = [value("i", TensorProto.INT64), value("go", TensorProto.BOOL), value("x", real, *rows)]
    steps = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["x", "x"], ["y"])]
    body = helper.make_graph(steps, "body", inputs, [value("go_on", TensorProto.BOOL), value("y", real, *rows)])
    nodes = [
        helper.make_node("MatMul", ["features", "W"], ["begin"]),
        helper.make_node("Loop", ["times", "true", "begin"], ["probabilities"], body=body),
    ]
    constants = {"W": np.zeros((24, 3), np.float32), "times": np.array(2**62), "true": np.ones((), bool)}
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    ends = [value("features", real, "n", 24)], [value("probabilities", real, *rows)]
    graph = helper.make_graph(nodes, "head", *ends, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    bundle = Path(shutil.copytree(ARCHIVE / "ridge.head", folder / "a.head"))
    (bundle / "head.onnx").write_bytes(model)
    facts = json.loads((bundle / "head.json").read_text())
    facts["files"]["head.onnx"] = hashlib.sha256(model).hexdigest()
    (bundle / "head.json").write_text(json.dumps(facts))
    return bundle
