"""What a GPU gains, and whether it computes the same: penult's backbone against torch eager, decoding, end to end, memory.

Run on a machine with a card (the repository, torch, torchvision, onnxruntime-gpu[cuda,cudnn], h5py; no network):

    PYTHONPATH=. python benchmarks/gpu.py --photos FOLDER --weights FILE.pth --preset IMAGENET1K_V1 -m mobilenet_v2
    PYTHONPATH=. python benchmarks/gpu.py -m resnet50

It rewrites docs/benchmarks-gpu.md (``--out``). Untrained weights are fine for speed; the fidelity table wants ``--photos``, a
folder of real photos, and weights that were trained. ``--device cpu --smoke`` proves in a minute that the script works.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from extractor.backbones.export import export
from extractor.backbones.networks import load
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.data.reader import Reader, WorkerPool
from extractor.data.samples import Sample
from extractor.graphs.backbone_facts import BackboneFacts, read_facts
from extractor.machine import cores
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.precision.float16 import compare, to_float16
from extractor.runtime.cuda import number_of
from extractor.runtime.session import Embedder
from extractor.signals import StopFlag

PRECISIONS = ("fp32", "fp16")
MIB = 2**20


@dataclass
class Bench:
    """One run of the script: what was asked for, and the Markdown that comes of it."""

    given: argparse.Namespace
    folder: Path
    lines: list[str] = field(default_factory=list)
    verdicts: list[tuple[str, float, str, float]] = field(default_factory=list)  # what, found, ">=" or "<=", wanted

    def say(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def table(self, *heads: str) -> None:
        self.say("", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}")

    def row(self, *cells: object) -> None:
        self.say(f"| {' | '.join(f'{cell:.0f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")

    @property
    def on_gpu(self) -> bool:
        return str(self.given.device) != "cpu"

    def embedder(self, file: Path, facts: BackboneFacts, size: int, **options: Any) -> Embedder:
        return Embedder(file, facts.preprocess, device=self.given.device, batch_size=size, **options)


# --- the card ----------------------------------------------------------------------------------------------------------


def card(device: str) -> dict[str, float] | None:
    """Utilisation in percent and memory in MiB of a GPU, from NVML or nvidia-smi; None on a CPU."""
    if device == "cpu":
        return None
    number = number_of(device)
    try:
        import pynvml
    except ImportError:
        query = ["nvidia-smi", f"--id={number}", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        busy, used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
        return {"busy": float(busy), "memory": float(used)}
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    used = pynvml.nvmlDeviceGetMemoryInfo(handle).used / MIB
    return {"busy": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu), "memory": used}


@contextmanager
def watched(device: str, every: float = 0.2) -> Iterator[list[dict[str, float]]]:
    """Samples of `card` while the block runs."""
    samples: list[dict[str, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            if (now := card(device)) is not None:
                samples.append(now)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def memory(device: str) -> float:
    """MiB in use: of the GPU, or the most this process ever had on a CPU."""
    now = card(device)
    return now["memory"] if now else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the backbone alone ------------------------------------------------------------------------------------------------


def rate_of(embedder: Embedder, pixels: Any, seconds: float) -> float:
    """Images per second from uint8 pixels on the host to features on the host, every lane busy."""
    embedder.embed(pixels)  # allocations, algorithms

    def round_of() -> int:
        futures = [embedder.submit(pixels) for _ in range(4 * embedder.lanes)]
        return sum(len(future.result()[0]) for future in futures)

    round_of()
    return _rate(round_of, seconds)


class Eager:
    """Torch as a good script has it: channels-last, inference_mode, normalisation on the card, pinned non-blocking copies."""

    def __init__(self, network: Any, facts: BackboneFacts, device: str, precision: str) -> None:
        self.device, self.dtype = torch.device(device), torch.float16 if precision == "fp16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        self.network = network.to(self.device, self.dtype, memory_format=torch.channels_last)
        mean, std = (torch.tensor(value, device=self.device).reshape(1, 3, 1, 1) for value in _statistics(facts))
        self.mean, self.std = mean, std
        self.held: list[Any] = []
        _input_of_last_layer(network).register_forward_pre_hook(lambda _, inputs: self.held.append(inputs[0]))

    @torch.inference_mode()
    def features(self, pixels: Any) -> Any:
        self.held.clear()
        batch = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        self.network(batch.to(self.dtype, memory_format=torch.channels_last))
        return self.held[-1].flatten(1).float()

    def rate(self, pixels: Any, seconds: float, *, copies: bool) -> float:
        """Images per second; with ``copies`` from and to the host, as `rate_of`, else with everything on the card."""
        host = torch.from_numpy(pixels)
        host = host.pin_memory() if self.device.type == "cuda" else host
        given = host if copies else host.to(self.device)

        def round_of() -> int:
            for _ in range(8):
                found = self.features(given)
                if copies:
                    found.cpu()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return 8 * len(pixels)

        round_of()
        return _rate(round_of, seconds)


def _input_of_last_layer(network: Any) -> Any:
    return [module for module in network.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)][-1]


def _statistics(facts: BackboneFacts) -> tuple[Any, Any]:
    return facts.preprocess.mean, facts.preprocess.std


def _rate(round_of: Callable[[], int], seconds: float) -> float:
    begin, images = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        images += round_of()
    return images / (time.perf_counter() - begin)


def backbones(bench: Bench, files: dict[str, Path], network: Callable[[], Any]) -> dict[str, float]:
    """The table of batch sizes and precisions; gives the best rate of each precision."""
    given, best = bench.given, dict.fromkeys(PRECISIONS, 0.0)
    bench.say("", "### Backbone alone, images/s", "")
    bench.say("uint8 pixels on the host to features on the host; torch eager also with everything on the card. Interleaved.")
    bench.table("precision", "batch", "penult, 2 lanes", "torch eager", "on the card", "ratio")
    ratios: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for precision in PRECISIONS:
        facts = read_facts(files[precision])
        eager = Eager(network(), facts, given.device, precision)
        for size in given.batch_sizes:
            side = facts.preprocess.crop
            pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
            lanes = bench.embedder(files[precision], facts, size)
            ways: dict[str, Callable[[], float]] = {
                "lanes": lambda e=lanes, p=pixels: rate_of(e, p, given.seconds),
                "torch": lambda e=eager, p=pixels: e.rate(p, given.seconds, copies=True),
                "card": lambda e=eager, p=pixels: e.rate(p, given.seconds, copies=False),
            }
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(given.repeats):
                for way, measure in ways.items():
                    rates[way].append(measure())
            middle = {way: statistics.median(found) for way, found in rates.items()}
            each = [a / b for a, b in zip(rates["lanes"], rates["torch"], strict=True)]
            ratios[precision].append(statistics.median(each))
            best[precision] = max(best[precision], middle["lanes"])
            spread = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
            bench.row(precision, size, *(middle[way] for way in ways), spread)
    bench.verdicts.append(("fp16 backbone against torch eager fp16, best batch", max(ratios["fp16"]), ">=", 1.3))
    return best


def rounded_products(bench: Bench, file: Path) -> None:
    """What ``--precision tf32`` gains."""
    if not bench.on_gpu:
        return
    facts, size = read_facts(file), bench.given.batch_sizes[-1]
    pixels = np.random.default_rng(0).integers(0, 256, (size, facts.preprocess.crop, facts.preprocess.crop, 3), np.uint8)
    bench.say("", "### float32 and TF32, images/s")
    bench.table("float32", "TF32")
    both = [bench.embedder(file, facts, size, tf32=tf32) for tf32 in (False, True)]
    bench.row(*(rate_of(each, pixels, bench.given.seconds) for each in both))


# --- decoding and the whole way ----------------------------------------------------------------------------------------


def make_photos(folder: Path, count: int) -> Path:
    """Distinct 500 x 375 JPEG files of about 40 kB: smooth colour, texture and noise."""
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / "all" / f"{i:05d}.jpg", quality=85)
    return folder


def decoding(bench: Bench, facts: BackboneFacts, photos: Path) -> float:
    """Images per second without a backbone, for 1, 2, 4 .. workers up to the cores; gives the best."""
    bench.say("", "### Decoding alone, images/s")
    bench.table("workers", "images/s", "images/s of a core")
    source, best, workers = ImageFolder(photos), 0.0, 1
    todo = list(enumerate(source.samples()))
    counts = []
    while workers < cores():
        counts.append(workers)
        workers *= 2
    for count in [*counts, cores()]:
        begin = time.perf_counter()
        reader = Reader(source.files, facts.preprocess, set(), WorkerPool(count))
        done = sum(outcome.decoded for outcome in reader.stream(todo, StopFlag()))
        rate = done / (time.perf_counter() - begin)
        best = max(best, rate)
        bench.row(count, rate, rate / count)
    return best


def whole_way(bench: Bench, files: dict[str, Path], photos: Path, decode: float, backbone: dict[str, float]) -> None:
    """JPEG files to a cache, for each precision that the device takes."""
    bench.say("", "### JPEG files to a cache, images/s", "")
    bench.say("`of` is the share of the slower of decoding and backbone, both alone.")
    bench.table("precision", "images/s", "of", "GPU busy", "GPU memory", "bottleneck")
    source = ImageFolder(photos)
    for precision in PRECISIONS if bench.on_gpu else PRECISIONS[:1]:
        cache = bench.folder / f"{precision}.cache"
        options = Options(device=bench.given.device, val_fraction=0, test_fraction=0, quiet=True)
        shares, rates = [], []
        with watched(bench.given.device) as samples:
            for _ in range(bench.given.repeats):
                for file in [*cache.glob("shards/*"), *cache.glob("samples.h5")]:
                    file.unlink()
                summary = run_extract(source, Backbone(str(files[precision])), cache, options)
                rates.append(summary.images_per_second)
                shares.append(summary.images_per_second / min(decode, backbone[precision]))
        busy = f"{statistics.mean(s['busy'] for s in samples):.0f} %" if samples else "-"
        used = f"{max(s['memory'] for s in samples):.0f} MiB" if samples else "-"
        bench.row(
            precision, statistics.median(rates), f"{statistics.median(shares):.0%}", busy, used, summary.bottleneck or "none"
        )
        bench.verdicts.append((f"end to end, {precision}, share of the bound", statistics.median(shares), ">=", 0.9))


def flatness(bench: Bench, file: Path) -> None:
    """Memory over many batches of one size."""
    facts, size = read_facts(file), bench.given.batch_sizes[-1]
    side = facts.preprocess.crop
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    embedder = bench.embedder(file, facts, size)
    found = []
    for _ in range(10):
        for future in [embedder.submit(pixels) for _ in range(max(bench.given.memory_batches // 10, 1))]:
            future.result()
        found.append(memory(bench.given.device))
    what = "GPU memory" if bench.on_gpu else "the process's peak memory"
    bench.say("", f"### Memory over {bench.given.memory_batches} batches of {size}", "")
    bench.say(f"{what}, MiB, after every tenth: {', '.join(f'{value:.0f}' for value in found)}.")
    bench.verdicts.append(("memory, MiB more at the end than after the first tenth", found[-1] - found[0], "<=", 16))


# --- fidelity ----------------------------------------------------------------------------------------------------------


def fidelity(bench: Bench, files: dict[str, Path], photos: Path, count: int) -> None:
    """Features on the device against float32 on the CPU on photos."""
    facts = read_facts(files["fp32"])
    source = ImageFolder(photos)
    reader = Reader(source.files, facts.preprocess, set(), WorkerPool(cores()))
    outcomes = reader.stream(list(enumerate(map(Sample, islice(source.everything(), count)))), StopFlag())
    pixels = np.stack([outcome.pixels for outcome in outcomes if outcome.pixels is not None])
    exact = Embedder(files["fp32"], facts.preprocess, device="cpu").embed(pixels)
    kind = "real photos" if bench.given.photos else "synthetic pictures"
    weights = "trained" if bench.given.weights else "untrained"
    bench.say("", f"### Fidelity: {len(pixels)} {kind}, {weights} weights, against float32 on the CPU")
    bench.table("on the device", "largest relative L2", "allowed", "smallest cosine", "allowed")
    for precision, allowed, cosine in (("fp32", 1e-4, None), ("fp16", 1e-2, 0.9995)):
        found = bench.embedder(files[precision], read_facts(files[precision]), 64).embed(pixels)
        worst, least = compare(found, exact)
        bench.row(precision, f"{worst:.1e}", f"{allowed:.0e}", f"{least:.6f}", str(cosine or "-"))
        bench.verdicts.append((f"{precision} on the device against fp32 on the CPU, relative L2", worst, "<=", allowed))
        if cosine:
            bench.verdicts.append((f"{precision} on the device against fp32 on the CPU, cosine", least, ">=", cosine))


# --- the page ----------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    name = torch.cuda.get_device_name(number_of(device)) if device != "cpu" else "no card: a CPU, which says nothing of a GPU"
    found = []
    for package in ("torch", "onnxruntime-gpu", "onnxruntime"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{name}; {cores()} cores ({platform.machine()}); {', '.join(found)}"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--network", default="resnet50")
    parser.add_argument("--weights", help="a .pth file; untrained where not given")
    parser.add_argument("--preset", default="IMAGENET1K_V1")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--photos", type=Path, help="a folder of real photos; synthetic ones where not given")
    parser.add_argument("--images", type=int, default=4000, help="synthetic photos to make")
    parser.add_argument("--batch-sizes", type=numbers, default=[32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--memory-batches", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "benchmarks-gpu.md")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: does the script work?")
    given = parser.parse_args()
    if given.smoke:
        small: dict[str, Any] = {"images": 12, "batch_sizes": [4], "repeats": 1, "seconds": 0.05, "memory_batches": 20}
        vars(given).update(small, network="squeezenet1_1")
    return given


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="penult-bench-") as temporary:
        bench = Bench(given, Path(temporary))
        sizes = {"resize": 72, "crop": 64} if given.smoke else {}
        backbone = Backbone(given.network, given.weights or "random:0", given.preset, **sizes)
        files = {precision: bench.folder / f"{precision}.onnx" for precision in PRECISIONS}
        facts = export(backbone, files["fp32"])
        to_float16(files["fp32"], files["fp16"], facts)
        photos = make_photos(bench.folder / "photos", given.images)
        bench.say("# Benchmarks on a GPU", "", "Written by `benchmarks/gpu.py`; ratios travel, rates do not.", "")
        bench.say(f"## {given.network}", "", f"{date.today()}. {machine(given.device)}.")
        rates = backbones(bench, files, lambda: load(backbone).network.eval())
        rounded_products(bench, files["fp32"])
        whole_way(bench, files, photos, decoding(bench, facts, photos), rates)
        flatness(bench, files["fp16" if bench.on_gpu else "fp32"])
        fidelity(bench, files, given.photos or photos, 24 if given.smoke else 250)
        bench.say("", "### What must be shown")
        bench.table("quantity", "found", "wanted", "")
        for what, found, sign, wanted in bench.verdicts:
            met = found >= wanted if sign == ">=" else found <= wanted
            bench.row(what, f"{found:.4g}", f"{sign} {wanted:g}", "met" if met else "NOT MET")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(bench.lines) + "\n")


if __name__ == "__main__":
    main()
