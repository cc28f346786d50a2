"""What the first result costs: core-seconds of whole commands, imports and children included.

Run by ``make bench``; writes its section of docs/benchmarks.md. A command is one `Row`. With ``--before CHECKOUT`` an earlier
checkout takes turns with this one, but for the listing, which took it hours. Photos and weights are not part of the project
(``PENULT_TEST_ASSETS`` or ../shared); without them only the listing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from PIL import Image, ImageOps

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")
PHOTOS, OTHERS, WEIGHTS = ASSETS / "data/hymenoptera", ASSETS / "data/photos", ASSETS / "weights/mobilenet_v2-imagenet.pth"
PAGE = REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/start.py -->", "<!-- end -->"
TURNS = 3
BUSY = 2  # processes that compute something else
MANY = 1784  # photos: each of them in several versions
ALL = ("--val-fraction", "0", "--test-fraction", "0", "--overwrite")
NETWORK = ("-m", "mobilenet_v2", "--weights", str(WEIGHTS), "--preset", "IMAGENET1K_V1")
TEN = ("extract", "ten", *NETWORK, "-o", "ten.cache", *ALL)
EXPORTED = ("extract", "many", "-m", "net.onnx", "-o", "many.cache", "--overwrite")
LISTING = ("extract", "-m", "resnet18", "-o", "new.cache", "--dry-run", "--val-fraction", "0", "--test-fraction", "0")


@dataclass(frozen=True)
class Row:
    """A command, run in the folder that `make_inputs` has filled.

    Attributes:
        name: as the table has it.
        line: arguments of ``penult``.
        bound: core-seconds that it may take; None if nothing is promised.
        busy: run beside `BUSY` other processes.
        first: without the store of prepared backbones, as on a machine where the network was never used.
        photos: it needs what is not part of the project.
    """

    name: str
    line: tuple[str, ...]
    bound: float | None = None
    busy: bool = False
    first: bool = False
    photos: bool = True


ROWS = (
    Row("`extract --dry-run`, 2,000 classes of 2 files", (*LISTING, "c2000"), 3.0, photos=False),
    Row("`extract --dry-run`, 10,000 classes of 2 files", (*LISTING, "c10000"), photos=False),
    Row("`info` of 398 images", ("info", "photos.cache"), 0.25),
    Row("`predict` of one image", ("predict", "photos.head", "one.jpg"), 0.5),
    Row("`train`, 245 images", ("train", "photos.cache", "-o", "a.head", "--overwrite"), 2.5),
    Row(
        f"`train --head centroid`, 400 held out, {BUSY} busy processes",
        ("train", "mixed.cache", "--head", "centroid", "-o", "b.head", "--overwrite"),
        4.0,
        busy=True,
    ),
    Row("`extract` of ten photos by name, the first time", TEN, 7.0, first=True),
    Row("`extract` of ten photos by name, the network prepared before", TEN, 1.5),
    Row(f"`extract` of {MANY:,} photos from an ONNX file", EXPORTED),
    Row(f"`extract --precision int8` of {MANY:,} photos, the first time", (*EXPORTED, "--precision", "int8"), first=True),
    Row(f"`extract --precision int8` of {MANY:,} photos, calibrated before", (*EXPORTED, "--precision", "int8")),
)
FP32, INT8 = ROWS[-3], ROWS[-2]


@dataclass(frozen=True)
class Ran:
    """What one run of a command took: seconds of wall time and of all cores, and seconds by stage as it says them."""

    wall: float
    cores: float
    stages: dict[str, float]

    @classmethod
    def penult(cls, checkout: Path, folder: Path, *line: str, first: bool = False) -> Ran:
        variables = {**os.environ, "PYTHONPATH": str(checkout), "PENULT_CACHE": str(folder / "penult")}
        variables |= {"PENULT_CACHE_GIB": "0"} if first else {}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        as_json = ["--json"] if line[0] == "train" else []
        begin = time.perf_counter()
        command = [sys.executable, str(checkout / "cli.py"), "-q", *line, *as_json]
        with (folder / "out").open("wb") as out:
            child = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)  # with the children that it has waited for
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command)
        stages = json.loads((folder / "out").read_bytes()).get("seconds", {}) if as_json else {}
        return cls(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, stages)


@contextmanager
def others(count: int) -> Iterator[None]:
    """Processes that compute as long as the block runs."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def make_inputs(folder: Path, *, photos: bool) -> None:
    for classes in (2000, 10_000):
        for i in range(classes):
            place = folder / f"c{classes}/k{i:05d}"
            place.mkdir(parents=True)
            for name in ("0.jpg", "1.jpg"):
                (place / name).touch()
    if not photos:
        return
    for file in sorted(PHOTOS.glob("*/*/*")):
        (folder / "mixed" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / "mixed" / file.parent.name / file.name)
    (folder / "mixed/others").mkdir()
    for i, file in enumerate(sorted(file for file in OTHERS.rglob("*") if file.is_file())):
        shutil.copyfile(file, folder / f"mixed/others/{i}{file.suffix}")
    shutil.copyfile(next(PHOTOS.glob("val/ants/*")), folder / "one.jpg")
    for name in ("ants", "bees"):
        (folder / "ten" / name).mkdir(parents=True)
        for file in sorted(PHOTOS.glob(f"train/{name}/*.jpg"))[:5]:
            shutil.copyfile(file, folder / "ten" / name / file.name)
    make_many(folder / "many")
    Ran.penult(REPO, folder, "export", *NETWORK[1:], "-o", "net.onnx")
    Ran.penult(REPO, folder, "extract", str(PHOTOS), *NETWORK, "-o", "photos.cache")
    held_out = ("--val-fraction", "0.618", "--test-fraction", "0")
    Ran.penult(REPO, folder, "extract", "mixed", *NETWORK, *held_out, "-o", "mixed.cache", "--max-failures", "50")
    Ran.penult(REPO, folder, "train", "photos.cache", "-o", "photos.head")


def make_many(folder: Path) -> None:
    """Photos of different content: parts of the real ones, mirrored or not."""
    photos = sorted(file for place in (PHOTOS, OTHERS) for file in place.rglob("*.[jJ]*"))
    (folder / "all").mkdir(parents=True)
    for i in range(MANY):
        with Image.open(photos[i % len(photos)]) as image:
            cut, mirrored = divmod(i // len(photos), 2)
            part = image.convert("RGB").crop((cut, cut, image.width - 2 * cut, image.height - cut))
            (ImageOps.mirror(part) if mirrored else part).save(folder / "all" / f"{i:05d}.jpg", quality=90)


def measure(rows: list[Row], folder: Path, checkouts: dict[str, list[Path]]) -> dict[str, list[list[Ran]]]:
    """The runs of every command in each of its checkouts, in turns; the first turn compiles modules and does not count."""
    runs: dict[str, list[list[Ran]]] = {row.name: [[] for _ in checkouts[row.name]] for row in rows}
    for turn in range(TURNS + 1):
        for row in rows:
            for checkout, kept in zip(checkouts[row.name], runs[row.name], strict=True):
                with others(BUSY if row.busy else 0):
                    ran = Ran.penult(checkout, folder, *row.line, first=row.first)
                print(f"{row.name}: {ran.cores:.2f} core-s, {ran.wall:.2f} s", flush=True)
                kept += [ran] if turn else []
    return runs


def stages(runs: list[Ran]) -> str:
    """What of a command's wall time went where; what it does not say itself is imports, start and end."""
    named = [name for name in runs[0].stages if name != "total"]
    seconds = {name: statistics.median(ran.stages[name] for ran in runs) for name in named}
    seconds["imports, start, end"] = statistics.median(ran.wall - ran.stages["total"] for ran in runs)
    return ", ".join(f"{name.replace('_', ' ')} {each:.2f}" for name, each in seconds.items() if each >= 0.01)


def of_photos(runs: dict[str, list[list[Ran]]], medians: dict[str, list[float]]) -> str:
    ratios = [int8.cores / fp32.cores for int8, fp32 in zip(runs[INT8.name][0], runs[FP32.name][0], strict=True)]
    return (
        f" `train`, 245 images, by stage in seconds: {stages(runs[ROWS[4].name][0])}. int8, the first time, takes "
        f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}) what fp32 takes, in pairs of runs, "
        f"and {medians[ROWS[-1].name][0] / medians[FP32.name][0]:.2f} times with a calibration that was made before."
    )


TEXT = """{begin}

## The first result

Core-seconds of whole commands, with imports and children: median of {turns} runs, and in brackets the lowest and the highest.
{date}, {cores} cores ({machine}), the modules compiled before.

{table}

10,000 classes take {ratio:.1f} times as long to list as 2,000.{photos}

{end}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="An earlier checkout, which is measured in turns with this one.")
    before = parser.parse_args().before
    photos = PHOTOS.is_dir() and OTHERS.is_dir() and WEIGHTS.is_file()
    rows = [row for row in ROWS if photos or not row.photos]
    checkouts = {row.name: [REPO, *([before.resolve()] if before and row.photos else [])] for row in rows}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), photos=photos)
        runs = measure(rows, Path(name), checkouts)
    medians = {row.name: [statistics.median(ran.cores for ran in each) for each in runs[row.name]] for row in rows}
    lines = [f"| | core-seconds |{' before |' if before else ''} at most |", f"|---|---:|{'---:|' if before else ''}---:|"]
    for row in rows:
        cells = [
            f"{median:.2f} ({min(ran.cores for ran in each):.2f} to {max(ran.cores for ran in each):.2f})"
            for median, each in zip(medians[row.name], runs[row.name], strict=True)
        ]
        cells += ["-"] * (bool(before) + 1 - len(cells))
        lines.append(f"| {row.name} | {' | '.join(cells)} | {'' if row.bound is None else row.bound} |")
    section = TEXT.format(
        begin=BEGIN,
        end=END,
        turns=TURNS,
        date=date.today(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        table="\n".join(lines),
        ratio=medians[ROWS[1].name][0] / medians[ROWS[0].name][0],
        photos=of_photos(runs, medians) if photos else "",
    )
    text, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, more = rest.partition(END + "\n")
    PAGE.write_text(f"{text.rstrip()}\n\n{section}{more}")


if __name__ == "__main__":
    main()
