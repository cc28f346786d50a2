"""Training on more features than fit into memory: 1,000,000 x 2,048 under 4 GB, and what that changes.

Run by ``make soak``; writes docs/large.md. A seeded cache is written shard by shard into a temporary
folder. Of its first 100,000 rows a head is trained twice, from disk and in memory; of all of them from disk. Each training is a
process of its own, whose peak memory counts. ``--rows`` makes it smaller.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from extractor.backbones.registry import Backbone  # noqa: E402
from extractor.data.folders import ImageFolder  # noqa: E402
from extractor.machine import MAXRSS_UNIT  # noqa: E402
from extractor.pipeline.run import extract  # noqa: E402
from extractor.pipeline.settings import Options  # noqa: E402
from store.cache import FeatureCache  # noqa: E402
from store.format.samples import Row, SampleTable  # noqa: E402
from store.splits import assign_splits, with_splits  # noqa: E402
from store.writer import CacheWriter, open_writer  # noqa: E402

PAGE = REPO / "docs" / "large.md"
DIM, CLASSES, BLOCK = 2048, 10, 1000
ROWS, SUBSET = 1_000_000, 100_000
LIMIT = "4GB"
SUBSET_LIMIT = "1GB"  # less than its features need
BOUND = 1e-3  # of the log-loss, from disk against in memory


def block(number: int) -> tuple[np.ndarray, list[Row]]:
    """What networks give: correlated, skewed directions, a few of which tell the classes apart."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, number])
    centres, mixing = fixed.normal(size=(CLASSES, 64)) * 0.4, fixed.standard_normal((64, DIM), np.float32) / 8
    targets = rng.integers(0, CLASSES, BLOCK)
    hidden = (centres[targets] + rng.normal(size=(BLOCK, 64))).astype(np.float32)
    features = hidden @ mixing + 0.3 * rng.standard_normal((BLOCK, DIM), np.float32)
    names = [f"{number:04d}/{i:03d}.jpg".encode() for i in range(BLOCK)]
    digests = [hashlib.sha256(name).digest() for name in names]
    rows = [
        Row(name, f"class {target}", sha256=digest)
        for name, digest, target in zip(names, digests, targets.tolist(), strict=True)
    ]
    return np.maximum(features, 0), rows


def begin_cache(folder: Path) -> Path:
    """A cache of ResNet-50 with random weights, of two pictures, which its features stand for."""
    for label in ("a", "b"):
        (folder / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red" if label == "a" else "blue").save(folder / "photos" / label / "0.png")
    options = Options(val_fraction=0, test_fraction=0)
    extract(ImageFolder(folder / "photos"), Backbone("resnet50", "random:0"), folder / "large.cache", options)
    return folder / "large.cache"


def fill(writer: CacheWriter, numbers: range, before: list[Row], facts: dict[str, Any]) -> list[Row]:
    """Append blocks, and finish with the table of all rows."""
    rows = list(before)
    for number in numbers:
        features, more = block(number)
        writer.append([features], [row.sha256 for row in more], [row.path for row in more])
        rows += more
        if writer.due:
            writer.commit_behind()
    writer.commit()
    writer.finish(SampleTable(with_splits(rows, assign_splits(rows, val=0.1, test=0.1, seed=0)), facts))
    return rows


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        rows: of the cache.
        where: the features were.
        seconds: of the whole command; `fit` of the head alone.
        peak: of the process's memory, bytes.
        losses: on validation, by C.
        C, loss: what was chosen, and its log-loss on the held-out rows.
    """

    rows: int
    where: str
    seconds: float
    fit: float
    peak: int
    losses: dict[float, float]
    C: float
    loss: float

    @classmethod
    def by(cls, cache: Path, rows: int, limit: str) -> Trained:
        """Run `penult train`.

        Raises:
            RuntimeError: it failed.
        """
        out = cache.with_suffix(".head")
        command = [sys.executable, str(REPO / "cli.py"), "train", str(cache), "-o", str(out), "--overwrite"]
        begin = time.perf_counter()
        process = subprocess.Popen([*command, "--max-memory", limit], cwd=REPO, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            message = f"{' '.join(command)}: exit {process.returncode}\n{said}"
            raise RuntimeError(message)
        print(said, flush=True)
        facts = json.loads((out / "head.json").read_text())
        found = cls(
            rows,
            f"on disk, `--max-memory {limit}`" if "stay on disk" in said else "in memory",
            time.perf_counter() - begin,
            facts["cost"]["train_seconds"],
            usage.ru_maxrss * MAXRSS_UNIT,
            {point["C"]: point["log_loss"] for point in facts["history"]},
            facts["hyperparameters"]["C"],
            facts["metrics"]["log_loss"],
        )
        print(found, flush=True)
        return found

    @property
    def line(self) -> str:
        times = f"{self.fit:,.0f} | {self.seconds:,.0f}"
        return f"| {self.rows:,} | {self.where} | {times} | {self.peak / 1e9:.2f} | {self.C:.3g} | {self.loss:.6f} |"


TEXT = """# More features than memory

Written by `benchmarks/large.py`, which `make soak` runs{smaller}.

`penult train --max-memory` on seeded synthetic features ({dim:,} float16 numbers a row, {classes} classes, a tenth each for
validation and test), the whole path of regularisation. {date}, {cores} cores ({machine}). Peak memory is that of the process
(`ru_maxrss`), with Python, its libraries and the sample table.

| rows | features | fit, s | command, s | peak memory, GB | C | held-out log-loss |
|---:|---|---:|---:|---:|---:|---:|
{rows}

On the {subset:,} rows, from disk against in memory: the largest difference of validation log-loss at any of {points} values
of C is {largest:.1e}, that of the held-out log-loss {held:.1e} (bound {bound:g}).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="of the larger cache")
    parser.add_argument("--folder", type=Path, help="where there is room for the cache; the system's temporary one by default")
    given = parser.parse_args()
    subset = min(SUBSET, given.rows)
    needed = 3 * given.rows * DIM
    free = shutil.disk_usage(given.folder or tempfile.gettempdir()).free
    if free < needed:
        sys.exit(f"{needed / 1e9:.1f} GB of disk are needed and {free / 1e9:.1f} GB are free; pass --folder")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        cache = begin_cache(Path(folder))
        start = FeatureCache(cache)
        table, fingerprint, facts = start.samples, start.fingerprint, start.meta["facts"]
        with open_writer(cache) as writer:
            writer.begin(fingerprint, facts=facts)
            rows = fill(writer, range(subset // BLOCK), [], table.facts)
        trained = [Trained.by(cache, subset, SUBSET_LIMIT), Trained.by(cache, subset, "1TB")]
        if given.rows > subset:
            with open_writer(cache) as writer:
                writer.begin(fingerprint, facts=facts)
                fill(writer, range(subset // BLOCK, given.rows // BLOCK), rows, table.facts)
            trained.append(Trained.by(cache, given.rows, LIMIT))
    disk, memory = trained[:2]
    both = [C for C in disk.losses if C in memory.losses]
    largest = max(abs(disk.losses[C] - memory.losses[C]) for C in both)
    page = TEXT.format(
        smaller="" if given.rows == ROWS else f"; here with `--rows {given.rows}`",
        dim=DIM,
        classes=CLASSES,
        date=date.today(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        rows="\n".join(each.line for each in trained),
        subset=subset,
        points=len(both),
        largest=largest,
        held=abs(disk.loss - memory.loss),
        bound=BOUND,
    )
    print(page)
    PAGE.write_text(page)
    met = max(largest, abs(disk.loss - memory.loss)) <= BOUND and "disk" in disk.where and memory.where == "in memory"
    met = met and disk.peak < 1e9 and trained[-1].peak < 4e9
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
