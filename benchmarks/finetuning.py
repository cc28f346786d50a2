"""What fine-tuning costs: ten epochs end to end against one extraction and the whole path of logistic regression.

Run by ``make bench``; writes its section of docs/benchmarks.md. Every command is a process of its own, and its whole wall time
counts. They take turns: the cached way before and after the fine-tuning, and its mean counts. It needs photos and weights that
are not part of the project (``PENULT_TEST_ASSETS`` or ../shared), and does nothing without them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")
PHOTOS, WEIGHTS = ASSETS / "data/hymenoptera", ASSETS / "weights/mobilenet_v2-imagenet.pth"
PAGE = REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/finetuning.py -->", "<!-- end -->"
EPOCHS = 10


@dataclass(frozen=True)
class Ran:
    """What one command took, in seconds, and the JSON that it printed."""

    seconds: float
    said: dict[str, Any]

    @classmethod
    def penult(cls, *arguments: object) -> Ran:
        begin = time.perf_counter()
        command = [sys.executable, str(REPO / "cli.py"), "-q", *map(str, arguments), "--json"]
        environment = os.environ | {"PENULT_CACHE_GIB": "0"}  # so that the network is exported each time
        done = subprocess.run(command, check=True, cwd=REPO, capture_output=True, text=True, env=environment)
        found = cls(time.perf_counter() - begin, json.loads(done.stdout))
        print(f"{arguments[0]}: {found.seconds:.1f} s", flush=True)
        return found


def cached(folder: Path, network: list[str]) -> tuple[Ran, Ran]:
    """Extract into a new cache, and train the head."""
    extracted = Ran.penult("extract", PHOTOS, *network, "-o", folder / "photos.cache")
    return extracted, Ran.penult("train", folder / "photos.cache", "-o", folder / "photos.head")


TEXT = """{begin}

## Fine-tuning

{images} photos of ants and bees, MobileNetV2, {date}, {cores} cores ({machine}), no GPU. Each command is a process of its own:
its whole time counts, with imports, the export to ONNX, the evaluation and the report. The cached way ran before and after the
fine-tuning ({spread}); its mean counts. `penult finetune --epochs {epochs} --patience {epochs} --no-refit` trains all layers; a
refit passes every image through up to {epochs} times more.

| | seconds | images through the network | held-out accuracy |
|---|---:|---:|---:|
| `extract` | {extract:.1f} | {images} | |
| `train --head logistic`, the whole path in five folds | {train:.1f} | 0 | {frozen:.1%} |
| `finetune`, {epochs} epochs | {tuned:.1f} | {passed:,} | {fine:.1%} |

**Fine-tuning costs {ratio:.1f} times as much as extraction and training, and {head:.0f} times as much as training another
head on the cache.**

{end}
"""


def main() -> None:
    if missing := [str(path) for path in (PHOTOS, WEIGHTS) if not path.exists()]:
        print(f"left out: no {', '.join(missing)}")
        return
    network = ["-m", "mobilenet_v2", "--weights", str(WEIGHTS), "--preset", "IMAGENET1K_V1"]
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        before = cached(Path(first), network)
        epochs = ["--epochs", EPOCHS, "--patience", EPOCHS, "--no-refit"]  # whose number of epochs is known before
        tuned = Ran.penult("finetune", Path(first) / "photos.cache", *network, *epochs, "-o", Path(first) / "tuned.head")
        after = cached(Path(second), network)
    extract, train = ((one.seconds + other.seconds) / 2 for one, other in zip(before, after, strict=True))
    section = TEXT.format(
        begin=BEGIN,
        end=END,
        date=date.today(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        epochs=EPOCHS,
        spread=", ".join(f"{sum(each.seconds for each in turn):.1f} s" for turn in (before, after)),
        images=before[0].said["ok"],
        extract=extract,
        train=train,
        frozen=before[1].said["metrics"]["accuracy"],
        tuned=tuned.seconds,
        passed=tuned.said["cost"]["images"],
        fine=tuned.said["metrics"]["accuracy"],
        ratio=tuned.seconds / (extract + train),
        head=tuned.seconds / train,
    )
    text, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, more = rest.partition(END + "\n")
    PAGE.write_text(f"{text.rstrip()}\n\n{section}{more}")


if __name__ == "__main__":
    main()
