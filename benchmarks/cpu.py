"""Images per second from JPEG files to cached features: penult against the loop people write, interleaved on the same files.

Run by ``make bench``; rewrites the CPU table of docs/benchmarks.md. Options: ``--images N --repeats R --photos FOLDER``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from extractor.backbones import Backbone, choose_weights, untrained
from extractor.pipeline import Options, run_extract
from extractor.sources import ImageFolder

NETWORKS = ("resnet18", "resnet50", "mobilenet_v3_large")
TABLE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def make_photos(folder: Path, count: int) -> Path:
    """Distinct 500 x 375 JPEG files of about 40 kB: smooth colour, texture and noise."""
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / "all" / f"{i:05d}.jpg", quality=85)
    return folder


def naive(name: str, photos: Path, batch: int) -> float:
    """Seconds for ImageFolder + DataLoader + torch eager under inference_mode, as tutorials have it, model loading left out."""
    network = untrained(name).eval()
    last = list(network.named_modules())[-1][0]
    parent, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent), child, torch.nn.Identity())
    preset = choose_weights(name, "IMAGENET1K_V1", "--weights").transforms()
    data = torchvision.datasets.ImageFolder(str(photos), preset)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=os.cpu_count() or 1)
    begin = time.perf_counter()
    with torch.inference_mode():
        features = [network(pixels).numpy() for pixels, _ in loader]
    assert len(np.concatenate(features)) == len(data)
    return time.perf_counter() - begin


def ours(name: str, photos: Path, scratch: Path) -> float:
    """Seconds of a whole `run_extract` but for the export: listing, reading, hashing, decoding, embedding, fsync."""
    backbone = Backbone(name, "random", "IMAGENET1K_V1")
    cache = scratch / f"{name}.cache"
    if not cache.exists():  # the first run exports; the timed ones find the same file there, and no features
        run_extract(ImageFolder(photos), backbone, cache, Options(limit=1, val_fraction=0, test_fraction=0, quiet=True))
    for file in [*(cache / "shards").iterdir(), cache / "samples.h5"]:
        file.unlink(missing_ok=True)
    begin = time.perf_counter()
    summary = run_extract(ImageFolder(photos), backbone, cache, Options(val_fraction=0, test_fraction=0, quiet=True))
    assert summary.computed == summary.inputs
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--photos", type=Path, help="a folder per class of real photos, instead of synthetic ones")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        photos = given.photos or make_photos(Path(temporary) / "photos", given.images)
        count = len(ImageFolder(photos).samples())
        for name in NETWORKS:
            ways: dict[str, Callable[[], float]] = {
                "naive, batch 32": lambda name=name: naive(name, photos, 32),
                "naive, batch 8": lambda name=name: naive(name, photos, 8),
                "penult": lambda name=name: ours(name, photos, Path(temporary)),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(given.repeats):  # interleaved: what the machine does besides hits all of them
                for way, run in ways.items():
                    times[way].append(run())
            rate = {way: count / statistics.median(seconds) for way, seconds in times.items()}
            ratios = [min(a, b) / c for a, b, c in zip(*times.values(), strict=True)]
            rows.append(
                f"| {name} | {rate['naive, batch 32']:.0f} | {rate['naive, batch 8']:.0f} | {rate['penult']:.0f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
            print(rows[-1], flush=True)
    kind = "real photos" if given.photos else "synthetic 500 x 375 JPEG files"
    text = f"""# Benchmarks

Written by `make bench`; rates depend on the machine and what else it does, ratios much less.

## CPU: JPEG files to cached features, fp32, decoding included

{date.today()}, {os.cpu_count()} cores ({platform.machine()}), {count} {kind}, {given.repeats} interleaved repeats; torch
{version("torch")}, onnxruntime {_onnxruntime()}. Images per second (median), and penult against the better of the two
loops (median, lowest to highest).

| backbone | DataLoader + torch eager, batch 32 | the same, batch 8 | penult | ratio |
|---|---|---|---|---|
{chr(10).join(rows)}

Decoding happens in child processes; what that costs is in [images.md](images.md#decode-workers).
"""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    main()
