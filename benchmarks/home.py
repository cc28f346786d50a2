"""What every command leaves in a fresh home folder, and which hosts it looks up: the commands, and their traces by strace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
OURS = (".cache/penult", ".cache/torch/hub/checkpoints")  # caches that are named: README, "Nothing leaves your machine"
NET = "squeezenet1_1 --weights random:0 --resize 72 --crop 64"
SYSTEM = ("/dev/", "/proc/")
CALLS = "connect,sendto,sendmsg,sendmmsg,?open,openat,?creat,?mkdir,mkdirat,?rename,?renameat,renameat2,?link,linkat,?symlink"


class Command(NamedTuple):
    """Of the command line, in the folder of `make_inputs`.

    Attributes:
        line: its arguments.
        code: the exit status that is right.
        quick: whether the suite, too, has the time for it.
    """

    line: str
    code: int = 0
    quick: bool = False


COMMANDS = (
    Command("--help", quick=True),
    Command("backbones"),
    Command("backbones resnet18 --layers"),
    Command("backbones --prepared", quick=True),
    Command("weights list"),
    Command("weights import list.csv", 65),  # a file that it takes is not at hand
    Command(f"export {NET} -o exported.onnx", quick=True),
    Command("extract photos -m net.onnx -o p.cache --log-json log.jsonl --metrics metrics.prom", quick=True),
    Command("extract photos -m net.onnx -o p.cache", quick=True),
    Command("extract photos -m net.onnx -o several.cache --device cpu,cpu"),
    Command("extract photos -m net.onnx -o views.cache --views 2"),
    Command("extract photos -m net.onnx -o policy.cache --views 2 --augment randaugment"),
    Command(f"extract photos -m {NET} -o layers.cache --layer features.12 --layer penultimate"),
    Command(f"extract photos -m {NET} -o int8.cache --precision int8"),
    Command("extract shards.tar -m net.onnx -o tar.cache", quick=True),
    Command("extract list.csv -m net.onnx -o numbers.cache --task regression --target weight"),
    Command("extract list.parquet -m net.onnx -o labels.cache --task multi-label", quick=True),
    Command("info p.cache", quick=True),
    Command("verify p.cache", quick=True),
    Command("diff p.cache tar.cache", quick=True),
    Command("compact p.cache -o p.h5 --dtype float16", quick=True),
    Command("check p.cache --against p.h5", quick=True),
    Command("train p.cache -o p.head", quick=True),
    Command("train p.cache -o elastic.head --l1-ratio 0.5 --C 1"),
    Command("train p.cache -o mlp.head --head mlp --hidden 8 --lr 0.01"),
    Command("train p.cache -o ridge.head --head ridge"),
    Command("train p.cache -o knn.head --head knn"),
    Command("train p.cache -o centroid.head --head centroid --few-shot 1,2 --repeats 2"),
    Command("train numbers.cache -o numbers.head"),
    Command("train labels.cache -o labels.head"),
    Command(f"finetune p.cache -m {NET} -o tuned.head --epochs 1 --device cpu --log-dir logs"),
    Command(f"finetune p.cache -m {NET} -o both.head --epochs 1 --device cpu,cpu"),
    Command("evaluate p.head p.cache --plot p.png", quick=True),
    Command("evaluate p.head photos --plot p.pdf"),
    Command("predict p.head photos/ants/000.jpg --selftest", quick=True),
    Command("fuse p.head -o p.onnx", quick=True),
    Command("predict p.onnx photos/ants/000.jpg --selftest", quick=True),
    Command("report p.head p.cache -o p.html"),
    Command("compare p.head tuned.head -o compared.html --curve p.cache"),
    Command("sweep photos -m net.onnx -o p.sweep"),
    Command("run job.toml"),
    Command("runs job.toml"),
    Command("demo --weights random --epochs 1 -o demo"),
)


def make_inputs(folder: Path, photos: int) -> None:
    """What `COMMANDS` takes: so many photos of two classes, lists of them, a shard, a job."""
    for i in range(photos):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        file = folder / "photos" / ("ants", "bees")[i % 2] / f"{i:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(file)
    files = sorted((folder / "photos").rglob("*.jpg"))
    paths = [str(file.relative_to(folder)) for file in files]
    lines = [f"{path},{i % 7}" for i, path in enumerate(paths)]
    (folder / "list.csv").write_text("\n".join(["path,weight", *lines]))
    labels = [f"{file.parent.name}|{('odd', 'even')[i % 2]}" for i, file in enumerate(files)]
    pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": labels}), folder / "list.parquet")
    with tarfile.open(folder / "shards.tar", "w") as shard:
        for i, file in enumerate(files):
            label = folder / "label.cls"
            label.write_text(file.parent.name)
            shard.add(file, f"{i:03}.jpg")
            shard.add(label, f"{i:03}.cls")
    (folder / "job.toml").write_text('data = "photos"\ncache = "job.cache"\nbundle = "job.head"\nbackbone.name = "net.onnx"\n')


def strangers(home: Path) -> list[str]:
    """What lies in a home folder that was empty, beside what is named `OURS`."""
    ours = [home / name for name in OURS]
    return [
        str(path.relative_to(home))
        for path in sorted(home.rglob("*"))
        if not any(each == path or each in path.parents or path in each.parents for each in ours)
    ]


def bare_environment(home: Path, temporary: Path) -> dict[str, str]:
    """As from cron, and as nobody has set anything: no variable that would silence a library by itself."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Traced:
    """What a command did.

    Attributes:
        code: its exit status.
        lookups: system calls that look a host up, or reach another machine.
        made: files and folders that were made outside of the folders that it was given, and what is left in its home folder.
        stderr: of the command.
    """

    code: int
    lookups: list[str]
    made: list[str]
    stderr: str


def trace(command: Sequence[str | Path], folder: Path, scratch: Path) -> Traced:
    """Run a command in ``folder`` under strace; ``scratch`` gets a home folder and a folder for temporary files of its own."""
    home, temporary, logs = (scratch / name for name in ("home", "tmp", "trace"))
    for new in (home, temporary, logs):
        new.mkdir(parents=True)
    # A file for each thread: in a common one their calls would interrupt each other.
    strace = [
        shutil.which("strace") or "strace",
        "-ff",
        "-qq",
        "--seccomp-bpf",
        "-e",
        f"trace={CALLS}",
        "-e",
        "signal=none",
        "-o",
        logs / "thread",
    ]
    environment = bare_environment(home, temporary)
    done = subprocess.run(
        [*strace, *command], cwd=folder, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    calls = [call for log in sorted(logs.iterdir()) for call in log.read_text(errors="replace").splitlines()]
    allowed = (str(folder), str(scratch), *SYSTEM)
    made = {path for call in calls for path in _made(call) if path.startswith("/") and not path.startswith(allowed)}
    return Traced(done.returncode, [call for call in calls if _looks_up(call)], [*sorted(made), *strangers(home)], done.stderr)


def _looks_up(call: str) -> bool:
    """Whether a host is asked for by name (files that say how, the port of name servers), or is another machine."""
    if re.search(r'open(at)?\(.*"/etc/(hosts|resolv\.conf)"', call):
        return True
    if not re.search(r"\b(connect|send\w+)\(", call):
        return False
    if "io.systemd.Resolve" in call or "htons(53)" in call:
        return True
    return "AF_INET" in call and not re.search(r'inet_addr\("127\.|"(::1|::ffff:127\.[\d.]+)"', call)


def _made(call: str) -> list[str]:
    """The path that a successful call made."""
    making = "O_CREAT" in call or re.search(r"\b(creat|mkdir|mkdirat|rename\w*|link|linkat|symlink\w*)\(", call)
    return re.findall(r'"([^"]*)"', call)[-1:] if making and re.search(r"= \d+$", call) else []


def penult(command: Command) -> list[str | Path]:
    """A command as a command line."""
    return [sys.executable, REPO / "cli.py", *command.line.split()]
