"""The example of docs/clouds.md: 20 days of pictures of the sky, drawn here, and 60 later days to see what is true.

Run by hand, with ImageNet weights for a backbone; rewrites the sessions in docs/clouds.md. A day has its own light, haze,
colour and size of clouds, and its weather lasts: what a camera sees every half an hour is not independent. Clouds are sums of
noise at several scales (as in Perlin 1985, "An image synthesizer"): heaps above a threshold are cumulus, a grey layer is
stratus, thin stretched veils are cirrus.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "clouds.md"
BEGIN, END = "<!-- {}: made by `benchmarks/clouds.py` -->", "<!-- end -->"
KINDS = ("cirrus", "cumulus", "stratus")
WIDTH, HEIGHT = 320, 240
FRAMES = 15  # of a day, every half an hour from 8:00
DAYS, LATER = 20, 60
FIRST = datetime(2026, 5, 1, 8)
GROUP = r"(\d{4}-\d{2}-\d{2})"


@dataclass(frozen=True)
class Day:
    """What all pictures of a day have in common.

    Attributes:
        seed: of its clouds.
        blue, haze, light: the colour of the sky, from 0 to 1.
        grain: size of its clouds, as a factor.
        cover: how much of the sky is clouded, from 0 to 1.
        kinds: of clouds before and after noon.
    """

    seed: int
    blue: float
    haze: float
    light: float
    grain: float
    cover: float
    kinds: tuple[str, str]

    @classmethod
    def draw(cls, seed: int) -> Day:
        rng = np.random.default_rng(seed)
        first = KINDS[seed % 3]
        second = first if rng.random() < 0.6 else KINDS[rng.integers(3)]
        blue, haze, light, cover = rng.random(4).tolist()
        return cls(seed, blue, haze, light, float(2 ** rng.uniform(-0.8, 0.8)), cover, (first, second))

    def clouds(self, kind: str, frame: int) -> NDArray[np.float64]:
        """How thick the clouds are ``(height, width)``, from 0 to 1: the field of the day drifts, and changes a little."""
        rng = np.random.default_rng((self.seed, KINDS.index(kind)))
        base = {"cirrus": 2.6, "cumulus": 1.3, "stratus": 2.2}[kind]
        stretch, edge = base * np.exp(rng.normal(0, 0.45)), np.exp(rng.normal(0, 0.5))
        field: NDArray[np.float64] = np.zeros((HEIGHT, WIDTH))
        for octave, size in enumerate((24, 12, 6, 3)):
            widths = [max(size * self.grain * factor, 0.6) for factor in (stretch**-0.5, stretch**0.5)]
            changing = np.random.default_rng((self.seed, frame, octave))
            still, fresh = (gaussian_filter(noise.normal(size=field.shape), widths, mode="wrap") for noise in (rng, changing))
            mixed = 0.9 * still / still.std() + 0.45 * fresh / fresh.std()
            field += np.roll(mixed, 9 * frame, axis=1) * 0.55**octave
        field /= field.std()
        if kind == "cumulus":
            return np.asarray(np.clip((field - 1.2 + 2.2 * self.cover) * 1.2 * edge, 0, 1))
        if kind == "cirrus":
            return np.asarray(np.clip((field - 0.6 + 1.6 * self.cover) * 0.35 * edge, 0, 0.85))
        return np.asarray(np.clip(0.45 + 0.5 * self.cover + 0.25 * edge * field, 0, 1))

    def picture(self, frame: int) -> tuple[str, Image.Image]:
        """The kind of clouds of a frame, and the picture."""
        kind = self.kinds[frame >= FRAMES // 2]
        thick = self.clouds(kind, frame)[..., None]
        height = np.linspace(0, 1, HEIGHT)[:, None, None]
        high, low = np.array([40 + 50 * self.blue, 95 + 50 * self.blue, 190.0]), np.array([175.0, 200.0, 225.0])
        sky = high + (low - high) * (0.3 + 0.7 * height) * (0.4 + 0.6 * self.haze)
        white = np.array([250.0, 248.0, 244.0]) * (0.72 if kind == "stratus" else 0.95)
        shade = 1 - 0.35 * gaussian_filter(thick[..., 0], 9)[..., None] * (kind == "cumulus")
        noon = 1 - abs(frame - FRAMES / 2) / FRAMES
        brightness = (0.6 + 0.35 * self.light) * (0.75 + 0.4 * noon)
        noise = np.random.default_rng((self.seed, frame)).normal(0, 4, (HEIGHT, WIDTH, 3))
        pixels = ((1 - thick) * sky + thick * white * shade) * brightness + noise
        return kind, Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_days(folder: Path, first: int, count: int) -> None:
    """Pictures of some days, each in the folder of its kind: ``cumulus/2026-05-01_0800.jpg``."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for day in range(first, first + count):
        weather = Day.draw(day)
        for frame in range(FRAMES):
            kind, picture = weather.picture(frame)
            moment = FIRST + timedelta(days=day, minutes=30 * frame)
            picture.save(folder / kind / f"{moment:%Y-%m-%d_%H%M}.jpg", quality=90)


def sheet(folder: Path, columns: int = 6) -> Image.Image:
    """Some pictures of each kind, a row for each."""
    width, height = WIDTH // 2, HEIGHT // 2
    page = Image.new("RGB", (columns * width, len(KINDS) * height))
    for row, kind in enumerate(KINDS):
        paths = sorted((folder / kind).glob("*.jpg"))
        for column in range(columns):
            picture = Image.open(paths[column * len(paths) // columns]).resize((width, height))
            page.paste(picture, (column * width, row * height))
    return page


def penult(command: str, folder: Path, hidden: str) -> str:
    """Run a command in a folder; it and what it prints. What is ``hidden`` is run, too, and not shown."""
    run = [sys.executable, "-m", "cli", *shlex.split(command), *(shlex.split(hidden) if command.startswith("extract") else ())]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(run, cwd=folder, env=environment, check=False, text=True, stdout=pipe, stderr=both)
    if done.returncode:
        message = f"{command}: {done.stdout}"
        raise SystemExit(message)
    shown = done.stdout.replace(f"{folder}/", "").splitlines()
    if command.startswith("evaluate"):
        kept = [line for line in shown if line.startswith(("accuracy", "Prediction sets", "warning"))]
        kept.insert(1, "...")
    else:
        kept = [
            line
            for line in shown
            if not line.startswith(("bottleneck", "report:")) and " a second (" not in line and " in all: " not in line
        ]
    return "\n".join([f"$ penult {command}", *kept])


SESSIONS = {
    "alone": ("extract sky -o alone.cache -m mobilenet_v2 --quiet", "train alone.cache -o alone.head"),
    "truth": (
        f"extract later -o later.cache -m mobilenet_v2 --group-by '{GROUP}' --val-fraction 0 --test-fraction 0 --quiet",
        "evaluate alone.head later.cache",
    ),
    "days": (
        f"extract sky -o days.cache -m mobilenet_v2 --group-by '{GROUP}' --quiet",
        "train days.cache -o days.head",
    ),
    "half": ("train days.cache -o half.head --val-fraction 0 --test-fraction 0.5", "evaluate half.head later.cache"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", default="", help="options of `extract` that say where the weights are; not shown")
    parser.add_argument("--keep", type=Path, help="write the pictures there, and nothing else")
    options = parser.parse_args()
    if options.keep:
        write_days(options.keep, 0, DAYS)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_days(folder / "sky", 0, DAYS)
        write_days(folder / "later", DAYS, LATER)
        sheet(folder / "sky").save(PAGE.with_suffix(".jpg"), quality=85)
        text = PAGE.read_text("utf-8")
        for place, commands in SESSIONS.items():
            lines = "\n".join(penult(command, folder, options.hidden) for command in commands)
            before, begin, rest = text.partition(BEGIN.format(place))
            text = f"{before}{begin}\n\n```text\n{lines}\n```\n\n{END}{rest.partition(END)[2]}"
        PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
