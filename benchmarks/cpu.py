"""From JPEG files to cached features on the CPU: penult against the loop people write, and against what the machine allows.

Run by ``make bench``; writes docs/benchmarks.md. Every measurement is a process of its own, the ways take turns on the same
files, and a ratio is taken within a turn: what the machine does besides hits all of them. Times go from the first file to the
last feature; loading the network is left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")
TABLE = REPO / "docs" / "benchmarks.md"
FAST, MIDDLE, SLOW = ("mobilenet_v3_large",), ("resnet18", "resnet50"), ("vgg16", "inception_v3", "vit_b_16")
FEW = 14  # of so many photos, one is passed through the slow networks
NAIVE_BATCHES = (4, 8, 16, 32)
FINALISTS = 3  # cells of a grid that are measured again
BATCHES, WORKERS = (1, 2, 4, 8, 16), (1, 2, 3)

# --- the files ---------------------------------------------------------------------------------------------------------


def real_photos() -> list[Path]:
    """JPEG files of the shared assets; none where they are not there."""
    return sorted(path for path in (ASSETS / "data").rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def make_photos(folder: Path, photos: Sequence[Path], parts: int, most: int) -> list[Path]:
    """Each photo and its mirror image, dealt to so many folders; pictures of noise where there are no photos."""
    folders = [folder / f"part{i}" for i in range(parts)]
    for part in folders:
        (part / "all").mkdir(parents=True)
    for i, photo in enumerate(photos[: most // 2]):
        target = folders[i % parts] / "all" / f"{i:05d}.jpg"
        target.write_bytes(photo.read_bytes())
        with Image.open(photo) as image:
            ImageOps.mirror(image.convert("RGB")).save(target.with_stem(f"{i:05d}-mirrored"), quality=90)
    rng = np.random.default_rng(0)
    for i in range(0 if photos else most):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folders[i % parts] / "all" / f"{i:05d}.jpg", quality=85)
    return folders


def enlarge(folder: Path, photos: Sequence[Path], size: tuple[int, int]) -> Path:
    """Photos as a camera of that resolution would have made them."""
    (folder / "all").mkdir(parents=True)
    for i, photo in enumerate(photos):
        with Image.open(photo) as image:
            large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            large.save(folder / "all" / f"{i:05d}.jpg", quality=90)
    return folder


# --- the ways, each in a process of its own ----------------------------------------------------------------------------


def naive(name: str, photos: str, batch: int) -> dict[str, Any]:
    """ImageFolder + DataLoader + torch eager under inference_mode, as tutorials have it."""
    import torch
    import torchvision

    from extractor.backbones.networks import untrained
    from extractor.backbones.registry import choose_weights

    network = untrained(name).eval()
    last = list(network.named_modules())[-1][0]
    parent, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent), child, torch.nn.Identity())
    preset = choose_weights(name, "IMAGENET1K_V1", "--weights").transforms()
    data = torchvision.datasets.ImageFolder(photos, preset)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=os.cpu_count() or 1)
    begin = time.perf_counter()
    with torch.inference_mode():
        features = [network(pixels).numpy() for pixels, _ in loader]
    seconds = time.perf_counter() - begin
    return {"seconds": seconds / len(np.concatenate(features))}


def thingsvision(name: str, photos: str, batch: int) -> dict[str, Any]:
    """The peer, by the example of its README."""
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader, ImageDataset

    peer = get_extractor(model_name=name, source="torchvision", device="cpu", pretrained=False)
    with tempfile.TemporaryDirectory() as out:
        data = ImageDataset(root=photos, out_path=out, backend="pt", transforms=peer.get_transformations())
        begin = time.perf_counter()
        batches = DataLoader(dataset=data, batch_size=batch, backend="pt")
        found = peer.extract_features(batches=batches, module_name="avgpool", flatten_acts=True, output_type="ndarray")
        return {"seconds": (time.perf_counter() - begin) / len(found)}


def penult(model: str, photos: str, scratch: str, sink: str = "hdf5", **options: Any) -> dict[str, Any]:
    """A whole `run_extract` into an empty cache."""
    from extractor.backbones.registry import Backbone
    from extractor.data.folders import ImageFolder
    from extractor.pipeline.run import run_extract
    from extractor.pipeline.settings import Options
    from extractor.precision import int8 as quantise
    from store.writer import CacheWriter

    quantise.BOUND = -1.0  # weights are random here: they decide what int8 keeps, not how fast it is
    cache = Path(scratch) / f"{Path(model).stem}-{options.get('precision', 'fp32')}.cache"
    quiet = partial(Options, val_fraction=0, test_fraction=0, quiet=True)
    if not cache.exists():  # the first run puts the backbone there, and where asked for calibrates it
        only = {key: value for key, value in options.items() if key == "precision"}
        run_extract(ImageFolder(photos), Backbone(model), cache, quiet(limit=64, **only))
    for file in [*(cache / "shards").iterdir(), cache / "samples.h5"]:
        file.unlink(missing_ok=True)
    if sink == "null":
        CacheWriter.append = lambda *_: None  # type: ignore[method-assign]
        CacheWriter.commit_behind = lambda _: 0  # type: ignore[method-assign]
    summary = run_extract(ImageFolder(photos), Backbone(model), cache, quiet(**options))
    assert summary.computed == summary.inputs
    spent = summary.seconds["wait"] + summary.seconds["embed"] + summary.seconds["settle"]
    return {"seconds": spent / summary.computed, "batch": summary.batch_size, "workers": summary.workers}


def decode_alone(model: str, photos: str) -> dict[str, Any]:
    """Core-seconds an image from its file to pixels, all cores at work."""
    files = sorted(map(str, Path(photos).rglob("*.jpg")))
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        parts = [files[i::cores] for i in range(cores)]
        list(pool.map(_decode, [model] * cores, [part[:4] for part in parts]))
        begin = time.perf_counter()
        list(pool.map(_decode, [model] * cores, parts))
        return {"seconds": (time.perf_counter() - begin) * cores / len(files)}


def _decode(model: str, files: Sequence[str]) -> None:
    from extractor.graphs.backbone_facts import read_facts
    from extractor.pixels.images import decode

    preprocess = read_facts(Path(model)).preprocess
    for file in files:
        preprocess.pixels(decode(Path(file).read_bytes()))


def infer_alone(model: str, batch: int, seconds: float) -> dict[str, Any]:
    """Core-seconds an image from pixels to features, all cores at work."""
    from extractor.graphs.backbone_facts import read_facts
    from extractor.machine import cores
    from extractor.runtime.session import Embedder

    preprocess = read_facts(Path(model)).preprocess
    side = preprocess.crop
    embedder = Embedder(Path(model), preprocess, batch_size=batch)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    rounds, begin = 0, 0.0
    while rounds < 2 or time.perf_counter() - begin < seconds:
        if rounds == 1:  # the first one allocates
            begin = time.perf_counter()
        for future in [embedder.submit(pixels) for _ in range(embedder.lanes)]:
            future.result()
        rounds += 1
    return {"seconds": (time.perf_counter() - begin) * cores() / ((rounds - 1) * embedder.lanes * batch)}


def memory(model: str, photos: str, scratch: str) -> dict[str, Any]:
    """The largest sum over a run and its decode workers of memory that no other process shares, MiB."""
    command = [sys.executable, "-m", "cli", "extract", photos, "-m", model, "-o", f"{scratch}/memory.cache", "-q"]
    process = subprocess.Popen([*command, "--val-fraction", "0", "--test-fraction", "0", "--overwrite"], cwd=REPO)
    most = 0
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        most = max(most, sum(_resident(pid) for pid in (str(process.pid), *children)))
        time.sleep(0.05)
    assert process.returncode == 0
    return {"MiB": most / 1024}


def _resident(pid: str) -> int:
    """KiB; every process that decodes is a thread's child, so this misses none but those that have just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


WAYS = {way.__name__: way for way in (naive, thingsvision, penult, decode_alone, infer_alone, memory)}


def measure(way: str, *given: Any, **options: Any) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps([way, given, options])]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- the tables --------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """What was measured in turns: seconds an image, by way."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, way: str, found: dict[str, Any]) -> None:
        self.seconds.setdefault(way, []).append(found["seconds"])

    def rate(self, way: str) -> str:
        return f"{1 / statistics.median(self.seconds[way]):.0f}" if way in self.seconds else ""

    def ratio(self, slow: str, fast: str) -> str:
        """How many times faster: median (lowest to highest)."""
        if fast not in self.seconds:
            return ""
        found = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        return f"**{statistics.median(found):.2f}** ({min(found):.2f} to {max(found):.2f})"


def against_the_loop(
    name: str, model: str, few: Path, whole: Path, parts: Sequence[Path], scratch: str, *, int8: bool, peer: bool
) -> tuple[str, str]:
    """Rows of the table of speeds and of the table of bounds."""
    from extractor.runtime.batch_size import SIZES

    batch = min(NAIVE_BATCHES, key=lambda size: measure("naive", name, str(few), size)["seconds"])
    ours = min(SIZES, key=lambda size: measure("infer_alone", model, size, 3.0)["seconds"])
    series = Series()
    for part in map(str, parts):
        series.add("naive 32", measure("naive", name, part, 32))
        series.add("naive best", series_of(series, "naive 32") if batch == 32 else measure("naive", name, part, batch))
        series.add("penult", measure("penult", model, part, scratch))
        if int8:
            series.add("int8", measure("penult", model, part, scratch, precision="int8"))
        if peer:
            series.add("thingsvision", measure("thingsvision", name, part, 32))
        decode, infer = measure("decode_alone", model, str(whole)), measure("infer_alone", model, ours, 5.0)
        series.add("decode", decode)
        series.add("infer", infer)
        series.add("bound", {"seconds": (decode["seconds"] + infer["seconds"]) / (os.cpu_count() or 1)})
    speed = (
        f"| {name} | {series.rate('naive 32')} | {series.rate('naive best')} (batch {batch}) | {series.rate('penult')} "
        f"| {series.ratio('naive 32', 'penult')} | {series.ratio('naive best', 'penult')} "
        f"| {series.rate('int8')} | {series.ratio('naive 32', 'int8')} | {series.ratio('naive best', 'int8')} |"
    )
    if peer:
        speed += f" {series.rate('thingsvision')} | {series.ratio('thingsvision', 'penult')} |"
    each = {way: 1000 * statistics.median(series.seconds[way]) for way in ("decode", "infer")}
    share = [100 * b / p for b, p in zip(series.seconds["bound"], series.seconds["penult"], strict=True)]
    bound = (
        f"| {name} | {each['decode']:.1f} | {each['infer']:.1f} | {series.rate('bound')} | {series.rate('penult')} "
        f"| **{statistics.median(share):.0f} %** ({min(share):.0f} to {max(share):.0f}) |"
    )
    print(speed, bound, sep="\n", flush=True)
    return speed, bound


def series_of(series: Series, way: str) -> dict[str, Any]:
    return {"seconds": series.seconds[way][-1]}


def sinks(model: str, part: Path, scratch: str, turns: int) -> str:
    """What writing costs."""
    series = Series()
    for _ in range(turns):
        series.add("null", measure("penult", model, str(part), scratch, sink="null"))
        series.add("hdf5", measure("penult", model, str(part), scratch))
    cost = [100 * (a / b - 1) for a, b in zip(series.seconds["hdf5"], series.seconds["null"], strict=True)]
    return f"{statistics.median(cost):+.1f} % ({min(cost):+.1f} to {max(cost):+.1f})"


def grid(name: str, model: str, part: Path, scratch: str, turns: int) -> str:
    """Every batch size with every number of workers once; then the fastest of these and ``auto`` in turns."""
    cells = {
        (batch, workers): measure("penult", model, str(part), scratch, batch_size=batch, workers=workers)["seconds"]
        for batch in BATCHES
        for workers in WORKERS
    }
    finalists = sorted(cells, key=cells.__getitem__)[:FINALISTS]
    series, chosen = Series(), set()
    for turn in range(turns):
        for cell in [*finalists, None] if turn % 2 else [None, *finalists]:
            asked = {} if cell is None else {"batch_size": cell[0], "workers": cell[1]}
            found = measure("penult", model, str(part), scratch, **asked)
            series.add("auto" if cell is None else f"{cell[0]}, {cell[1]}", found)
            if cell is None:
                chosen.add(f"{found['batch']}, {found['workers']}")
    typical = {way: statistics.median(seconds) for way, seconds in series.seconds.items()}
    auto = typical.pop("auto")
    best = min(typical, key=typical.__getitem__)
    rows = [f"| {batch} | " + " | ".join(f"{1 / cells[batch, workers]:.0f}" for workers in WORKERS) + " |" for batch in BATCHES]
    result = (
        f"{name}: `auto` chose {' / '.join(sorted(chosen))} (batch size, workers) and made {1 / auto:.1f} images/s, "
        f"**{100 * typical[best] / auto:.0f} %** of the best of the grid ({best}: {1 / typical[best]:.1f}). That is of {turns} "
        f"turns of `auto` and the {FINALISTS} fastest cells of a first pass over the grid:"
    )
    print(result, flush=True)
    head = "| batch size | " + " | ".join(f"{workers} workers" for workers in WORKERS) + " |"
    return "\n".join([result, "", head, "|" + "---|" * (len(WORKERS) + 1), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1400, help="photos at most")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--networks", default=",".join(FAST + MIDDLE + SLOW))
    parser.add_argument("--int8", default="resnet50,mobilenet_v3_large,resnet18", help="networks to measure in int8 as well")
    parser.add_argument("--grids", default="mobilenet_v3_large,resnet18", help="networks to try every setting on")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        way, arguments, options = json.loads(given.measure)
        print(json.dumps(WAYS[way](*arguments, **options)))
        return

    from extractor.backbones.export import export
    from extractor.backbones.registry import Backbone

    names = given.networks.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        models = {
            name: f"{scratch}/{name}.onnx"
            for name in {*names, *given.grids.split(","), "mobilenet_v3_large", "resnet50", "mobilenet_v2"}
        }
        for name, model in models.items():
            export(Backbone(name, "random", "IMAGENET1K_V1"), Path(model))
        photos = real_photos()
        many = make_photos(Path(scratch) / "many", photos, given.turns, given.images)
        few = make_photos(Path(scratch) / "few", photos[::FEW], given.turns, given.images // FEW)
        whole = make_photos(Path(scratch) / "whole", photos, 1, given.images) * given.turns
        counts = [sum(len(list(part.rglob("*.jpg"))) for part in parts) for parts in (many, few)]
        peer = _installed("thingsvision")
        rows = [
            against_the_loop(
                name,
                models[name],
                few[0],
                whole[0],
                few if name in SLOW else whole if name in FAST else many,
                scratch,
                int8=name in given.int8.split(","),
                peer=peer,
            )
            for name in names
        ]
        writing = sinks(models["mobilenet_v3_large"], whole[0], scratch, given.turns)
        print("writing", writing, flush=True)
        some = sorted(photo for part in few for photo in part.rglob("*.jpg"))
        folder, draft = str(enlarge(Path(scratch) / "large", some, (2000, 1500))), f"{scratch}/resnet50-draft.onnx"
        export(Backbone("resnet50", "random", "IMAGENET1K_V1", pixel_path="pillow-draft"), Path(draft))
        best = min((4, 8, 32), key=lambda batch: measure("naive", "resnet50", folder, batch)["seconds"])
        large = Series()
        for _ in range(given.turns):
            large.add("naive", measure("naive", "resnet50", folder, best))
            large.add("penult", measure("penult", models["resnet50"], folder, scratch))
            large.add("draft", measure("penult", draft, folder, scratch))
            large.add("int8", measure("penult", draft, folder, scratch, precision="int8"))
        tried = {name: whole[0] if name in FAST else many[0] for name in given.grids.split(",")}
        grids = [grid(name, models[name], part, scratch, given.turns) for name, part in tried.items()]
        huge = enlarge(Path(scratch) / "huge", some[:: max(len(some) // 40, 1)][:40], (4000, 3000))
        peak = measure("memory", models["mobilenet_v2"], str(huge), scratch)["MiB"]
    others = re.findall(r"<!-- made by benchmarks/\w+\.py -->.*?<!-- end -->", TABLE.read_text(), re.DOTALL)
    TABLE.write_text(
        TEXT.format(
            date=date.today(),
            cores=os.cpu_count(),
            machine=_machine(),
            kind="real photos and their mirror images" if photos else "synthetic 500 x 375 JPEG files",
            many=counts[0],
            few=counts[1],
            turns=given.turns,
            fast=" and ".join(FAST),
            middle=", ".join(MIDDLE),
            slow=", ".join(SLOW),
            torch=version("torch"),
            onnxruntime=_onnxruntime(),
            head=" thingsvision, batch 32 | against it |" if peer else "",
            line="---|---|" if peer else "",
            speeds="\n".join(speed for speed, _ in rows),
            bounds="\n".join(bound for _, bound in rows),
            writing=writing,
            large=len(some),
            large_naive=large.rate("naive"),
            large_batch=best,
            large_rows="\n".join(
                f"| {text} | {large.rate(way)} | {large.ratio('naive', way)} |" for way, text in LARGE_WAYS.items()
            ),
            grids="\n\n".join(grids),
            peak=peak,
        )
        + "".join(f"\n{section}\n" for section in others)
    )


LARGE_WAYS = {"penult": "fp32", "draft": "fp32, `--pixel-path pillow-draft`", "int8": "int8, `--pixel-path pillow-draft`"}
TEXT = """# Benchmarks

Written by `make bench`. Rates depend on the machine and on what else it does, ratios much less. What is known of GPUs:
[gpu.md](gpu.md); pixel paths: [pixel-paths.md](pixel-paths.md); what int8 costs in accuracy: [int8.md](int8.md).

{date}, {cores} cores ({machine}), torch {torch}, onnxruntime {onnxruntime}, weights are random. {many} JPEG files
({kind}) in {turns} turns: {fast} pass all of them in every turn, {middle} a part of them in each,
{slow} parts of {few} of them. Every number is a median over the turns; ratios are taken
within a turn, with the lowest and the highest in brackets.

## From JPEG files to cached features

Images per second, decoding included. The loop is ImageFolder, DataLoader with a worker per core and torch eager, at batch 32
and at the best of the batch sizes 4, 8, 16 and 32.

| backbone | loop, batch 32 | loop, best | penult fp32 | against 32 | against best | penult int8 | against 32 | against best |\
{head}
|---|---|---|---|---|---|---|---|---|{line}
{speeds}

## How much of the machine that is

Decoding and the backbone are each measured alone, with all cores at work: milliseconds of one core an image. The bound is cores
over their sum: nothing that does both on these cores can be faster.

| backbone | decoding, ms | backbone, ms | bound, images/s | penult, images/s | of the bound |
|---|---|---|---|---|---|
{bounds}

Writing features to HDF5 against writing nothing (mobilenet_v3_large): {writing} of the time.

{large} photos of 2000 x 1500 pixels, resnet50; the loop at its best batch size ({large_batch}) makes {large_naive} images/s:

| penult | images/s | against the loop |
|---|---|---|
{large_rows}

## What `auto` chooses

{grids}

## Memory

40 photos of 12 megapixels, mobilenet_v2: {peak:.0f} MiB at most, the decode workers included (proportional set size).
Flat memory over 20,000 images is part of `make soak`: [reliability.md](reliability.md).
"""


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _machine() -> str:
    """Processor, as far as the system says, and the instructions that matter here."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in lines}
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in facts.get("flags", "").split()]
    return ", ".join([facts.get("model name", platform.machine()), *wanted])


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    main()
