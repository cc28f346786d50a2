"""What the search for near copies finds, how often it is wrong, and what near copies that are not known do to numbers.

Run by ``make bench``; rewrites its tables in docs/leaks.md. It needs photos and weights that are not part of the project
(``PENULT_TEST_ASSETS`` or ../shared); without them only the tables without photos are made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from classifiers.bundles.bundle import Bundle
from classifiers.evaluation.paired_tests import flip_test
from classifiers.evaluation.units import Units
from classifiers.near_copies import LONGEST, near_copies
from store.cache import FeatureCache

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")
PHOTOS, WEIGHTS = ASSETS / "data/hymenoptera", ASSETS / "weights/mobilenet_v2-imagenet.pth"
NETWORK = ["-m", "mobilenet_v2", "--weights", WEIGHTS, "--preset", "IMAGENET1K_V1"]
PAGE = REPO / "docs" / "leaks.md"
BEGIN, END = "<!-- {}: made by `make bench` -->", "<!-- end -->"
BURSTS = (1, 2, 5, 10, 14, 20, 30)
DIMENSIONS = (8, 32, 128, 512, 2048)
SCENES, VERSIONS = 41, ("q75", "q50", "enlarged", "crop2", "crop7", "mirrored", "dark", "bright", "reduced")

Features = NDArray[np.floating[Any]]


def crop(image: Image.Image, share: float) -> Image.Image:
    w, h = image.size
    return image.crop((int(w * share), int(h * share), w - int(w * share), h - int(h * share)))


def size(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.LANCZOS)


def light(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: ImageEnhance.Brightness(image).enhance(factor)


# name: what is done, how it is called, and the quality of the JPEG
CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], str, int]] = {
    "enlarged": (lambda image: size(image, 1.5), "enlarged 1.5 times, JPEG quality 90", 90),
    "q75": (lambda image: image, "JPEG quality 75", 75),
    "q50": (lambda image: image, "JPEG quality 50", 50),
    "q30": (lambda image: image, "JPEG quality 30", 30),
    "dark": (light(0.8), "brightness 0.8", 92),
    "bright": (light(1.2), "brightness 1.2", 92),
    "brighter": (light(1.4), "brightness 1.4", 92),
    "crop2": (lambda image: crop(image, 0.025), "borders of 2.5 % cropped", 92),
    "crop7": (lambda image: crop(image, 0.075), "borders of 7.5 % cropped", 92),
    "mirrored": (ImageOps.mirror, "mirrored", 92),
    "mirrored2": (lambda image: ImageOps.mirror(crop(image, 0.025)), "mirrored, borders of 2.5 % cropped, JPEG quality 75", 75),
    "reduced": (lambda image: size(image, 0.7), "reduced to 0.7 of its size, JPEG quality 50", 50),
    "halved": (lambda image: size(image, 0.5), "reduced to half its size, JPEG quality 50", 50),
}


def penult(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(REPO / "cli.py"), "-q", *map(str, arguments), "--json"]
    return dict(json.loads(subprocess.run(command, check=True, cwd=REPO, capture_output=True, text=True).stdout))


def changed(path: Path, name: str, out: Path) -> None:
    change, _, quality = CHANGES[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as image:
        change(image.convert("RGB")).save(out, "JPEG", quality=quality)


def frames(path: Path, out: Path, rng: np.random.Generator) -> None:
    """A burst: the camera moves, zooms and turns a little, and the light changes."""
    out.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    for number in range(LONGEST + 1):
        zoom = 1 - 0.1 * rng.random()
        w, h = int(image.width * zoom), int(image.height * zoom)
        x, y = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
        frame = light(rng.uniform(0.9, 1.1))(image.crop((x, y, x + w, y + h)))
        frame.rotate(rng.uniform(-2, 2), Image.Resampling.BICUBIC).save(out / f"{number:02d}.jpg", quality=88)


def alarms(draw: Callable[[], tuple[Features, NDArray[Any]]], draws: int) -> str:
    """Share of data sets without copies in which some are seen, and of their images."""
    shares = []
    for _ in range(draws):
        X, labels = draw()
        shares.append(float((near_copies(X, labels.astype(str).tolist()).sizes > 1).mean()))
    return f"{100 * np.mean(np.array(shares) > 0):.1f} % ({draws})"


def simulated(draws: int) -> str:
    rng = np.random.default_rng(0)

    def gauss(n: int, d: int) -> Callable[[], tuple[Features, NDArray[Any]]]:
        return lambda: (rng.normal(size=(n, d)).astype(np.float32), rng.integers(0, 2, n))

    def clusters(n: int, d: int, between: float, count: int, classes: int) -> Callable[[], tuple[Features, NDArray[Any]]]:
        def draw() -> tuple[Features, NDArray[Any]]:
            of = rng.integers(0, count, n)
            centres = between * rng.normal(size=(count, d))
            return (centres[of] + rng.normal(size=(n, d))).astype(np.float32), of % classes

        return draw

    kinds: list[tuple[str, Callable[[int, int], Callable[[], tuple[Features, NDArray[Any]]]], tuple[int, ...]]] = [
        ("normal", gauss, (50, 245, 1000, 5000)),
        (
            "10 classes, each a cluster with a third of the variance between",
            lambda n, d: clusters(n, d, 0.7, 10, 10),
            (245, 1000),
        ),
        ("10 classes, each a cluster with four fifths between", lambda n, d: clusters(n, d, 2, 10, 10), (245, 1000)),
        ("4 classes of 5 clusters each, a fifth of the variance between", lambda n, d: clusters(n, d, 0.5, 20, 4), (245, 1000)),
        ("4 classes of 5 clusters each, half of the variance between", lambda n, d: clusters(n, d, 1, 20, 4), (245, 1000)),
    ]
    lines = [
        "| features, images | " + " | ".join(f"dimension {d}" for d in DIMENSIONS) + " |",
        "|---|" + "---|" * len(DIMENSIONS),
    ]
    for what, make, sizes in kinds:
        for n in sizes:
            cells = [alarms(make(n, d), max(draws * 245 // max(n, 245) * 128 // max(d, 128), 5)) for d in DIMENSIONS]
            lines.append(f"| {what}, {n:,} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join([*lines, "", *digits(draws)])


def bursts(draws: int) -> str:
    """Of a burst among 245 other images: how many are found where frames differ much, and where they differ little."""
    rng = np.random.default_rng(2)
    lines = ["| length | " + " | ".join(f"dimension {d}" for d in DIMENSIONS) + " |", "|---|" + "---|" * len(DIMENSIONS)]
    for length in BURSTS:
        cells = []
        for d in DIMENSIONS:
            shares = []
            for apart in (0.33, 0.05):
                found = []
                for _ in range(max(draws // 20, 5)):
                    X = rng.normal(size=(245, d))
                    burst = X[0] + apart * rng.normal(size=(length, d))
                    labels = rng.integers(0, 2, 245 + length).astype(str).tolist()
                    units = near_copies(np.concatenate([X, burst]), labels).units
                    found.append(float((units[245:] == units[0]).mean()))
                shares.append(f"{100 * np.mean(found):.0f} %")
            cells.append(", ".join(shares))
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits(draws: int) -> list[str]:
    from sklearn.datasets import load_digits

    data, rng = load_digits(), np.random.default_rng(1)

    def part(n: int, dim: int | None) -> Callable[[], tuple[Features, NDArray[Any]]]:
        def draw() -> tuple[Features, NDArray[Any]]:
            rows = rng.permutation(len(data.data))[:n]
            X = data.data[rows].astype(np.float32)
            if dim:
                centred = X - X.mean(axis=0)
                X = centred @ np.linalg.svd(centred, full_matrices=False)[2][:dim].T
            return X, data.target[rows]

        return draw

    ways = {"pixels": None, "20 principal components": 20, "8 principal components": 8}
    lines = ["| handwritten digits (scikit-learn) | " + " | ".join(ways) + " |", "|---|---|---|---|"]
    for n in (50, 245, 500, 1000, len(data.data)):
        cells = [alarms(part(n, dim), draws if n < 1000 else 10 if n == 1000 else 1) for dim in ways.values()]
        lines.append(f"| {n:,} images | " + " | ".join(cells) + " |")
    return lines


class Photos:
    """Photos, their versions and bursts, with their features."""

    def __init__(self, folder: Path, network: list[Any]) -> None:
        rng = np.random.default_rng(0)
        self.train = sorted((PHOTOS / "train").rglob("*.jpg"))
        self.burst = [self.train[i] for i in rng.permutation(len(self.train))[:24]]
        data = folder / "all"
        if not data.exists():
            for split in ("train", "val"):
                for path in (PHOTOS / split).rglob("*.jpg"):
                    (data / split / path.parent.name).mkdir(parents=True, exist_ok=True)
                    (data / split / path.parent.name / path.name).write_bytes(path.read_bytes())
            for name in CHANGES:
                for path in self.train:
                    changed(path, name, data / "other" / name / path.parent.name / path.name)
            for path in self.burst:
                frames(path, data / "other" / "burst" / path.parent.name / path.stem, rng)
        cache = folder / f"{network[1]}-{Path(network[3]).stem}.cache"
        paths = sorted(path.relative_to(folder) for path in data.rglob("*.jpg"))
        names = "\n".join(["path,label", *(f"{path},{path.parts[-2]}" for path in paths)])
        (folder / "list.csv").write_text(names)
        penult("extract", folder / "list.csv", *network, "-o", cache, "--val-fraction", 0, "--test-fraction", 0)
        opened = FeatureCache(cache)
        rows = opened.rows()
        X = opened.features([row.sha256 for row in rows]).astype(np.float32)
        self.features = {os.fsdecode(row.path).partition("all/")[2]: X[i] for i, row in enumerate(rows)}

    def of(self, paths: list[str]) -> Features:
        return np.stack([self.features[path] for path in paths])

    def name(self, path: Path, version: str = "") -> str:
        here = f"{path.parent.name}/{path.name}"
        return f"other/{version}/{here}" if version else f"train/{here}"

    def labels(self, paths: list[str]) -> list[str]:
        return ["ants" if "ants/" in path else "bees" for path in paths]

    def joined(self, names: list[str], others: list[str]) -> NDArray[np.intp]:
        return near_copies(self.of([*names, *others]), self.labels([*names, *others])).units

    def table(self) -> str:
        base = [name for name in self.features if name.startswith(("train/", "val/"))]
        natural = int((near_copies(self.of(base), self.labels(base)).sizes > 1).sum())
        lines = [
            f"Seen among the {len(base)} photos as they are: {natural}.",
            "",
            "| change of the copy | one copy | 40 copies at once |",
            "|---|---|---|",
        ]
        rng = np.random.default_rng(0)
        unchanged = [path for path in self.train if all(self.name(path, name) in self.features for name in CHANGES)]
        for name, (_, what, _) in CHANGES.items():
            cells = []
            for count, times in ((1, 100), (40, 5)):
                found = []
                for _ in range(times):
                    drawn = [unchanged[i] for i in rng.choice(len(unchanged), count, replace=False)]
                    units = self.joined(base, [self.name(path, name) for path in drawn])
                    found += [units[len(base) + i] == units[base.index(self.name(path))] for i, path in enumerate(drawn)]
                cells.append(f"{100 * np.mean(found):.0f} %")
            lines.append(f"| {what} | {cells[0]} | {cells[1]} |")
        lines += ["", "| frames in the burst | of them found |", "|---|---|"]
        for length in BURSTS:
            found = []
            for start in range(0, len(self.burst), 4):
                drawn = self.burst[start : start + 4]
                rest = [name for name in base if name not in {self.name(path) for path in drawn}]
                names = [f"other/burst/{p.parent.name}/{p.stem}/{k:02d}.jpg" for p in drawn for k in range(length + 1)]
                units = self.joined(rest, names)[len(rest) :].reshape(len(drawn), length + 1)
                found += [float((each[1:] == each[0]).mean()) for each in units]
            lines.append(f"| {length} and a fitted one | {100 * np.mean(found):.0f} % |")
        return "\n".join(lines)


def inside_train(folder: Path) -> str:
    """41 photos in ten versions are all that is trained on, and the other photos are new."""
    rng, data = np.random.default_rng(1), folder / "versions"
    train = sorted((PHOTOS / "train").rglob("*.jpg"))
    scenes = {train[i] for i in rng.permutation(len(train))[:SCENES]}
    for path in sorted(PHOTOS.rglob("*.jpg")):
        split = "train" if path in scenes else "test"
        out = data / split / path.parent.name / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(path.read_bytes())
        for name in VERSIONS if path in scenes else ():
            changed(path, name, out.with_name(f"{path.stem}.{name}.jpg"))
    cache = folder / "versions.cache"
    penult("extract", data, *NETWORK, "-o", cache)
    lines = [
        "| head | near copies | accuracy | 90 % sets hold | setting chosen | new photos called unlike |",
        "|---|---|---|---|---|---|",
    ]
    for head, setting in (("logistic", "C"), ("ridge", "alpha"), ("knn", "k")):
        for way, what in (("ignore", "not looked for"), ("group", "one group")):
            out = folder / f"{head}-{way}.head"
            made = penult("train", cache, "--head", head, "--near-copies", way, "--no-thumbnails", "-o", out)
            metrics, chosen = made["metrics"], made["hyperparameters"].get(setting)
            low, high = metrics["accuracy_interval"]
            sets = metrics["sets"]["marginal"]["coverage"] if metrics.get("sets") else float("nan")
            unlike = f"{100 * metrics['novelty']['share']:.0f} %" if metrics.get("novelty") else "-"
            accuracy = f"{100 * metrics['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            lines.append(f"| {head} | {what} | {accuracy} | {100 * sets:.0f} % | {setting} = {chosen:.3g} | {unlike} |")
            repeats = made["metrics"]["leaks"]["repeats"]
    lines.append(f"\nTold: {repeats['images']} images of {repeats['groups']} groups.")
    return "\n".join(lines)


def new_data(folder: Path) -> str:
    """A head is evaluated on changed copies of the photos that it was fitted on."""
    penult("extract", PHOTOS, *NETWORK, "-o", folder / "photos.cache")
    penult("train", folder / "photos.cache", "--no-thumbnails", "-o", folder / "photos.head")
    lines = ["| evaluated on | accuracy, as before | named as copies | accuracy of the rest |", "|---|---|---|---|"]
    new = sorted((PHOTOS / "val").rglob("*.jpg"))
    for what, copies in (("mirrored", ["mirrored"]), ("JPEG quality 75", ["q75"]), ("mirrored and q75", ["mirrored", "q75"])):
        for mixed in (False, True):
            data = folder / f"new-{'-'.join(copies)}-{mixed}"
            for path in sorted((PHOTOS / "train").rglob("*.jpg"))[:: 4 if mixed else 1]:
                for name in copies:
                    changed(path, name, data / path.parent.name / f"{path.stem}.{name}.jpg")
            for path in new if mixed else []:
                (data / path.parent.name / path.name).write_bytes(path.read_bytes())
            made = penult("evaluate", folder / "photos.head", data)
            rest = made["leaks"].get("accuracy_without")
            which = "every fourth fitted photo" if mixed else "the fitted photos"
            text = f"{which}, {what}" + (f", and {len(new)} new ones" if mixed else "")
            shown = "-" if rest is None else f"{100 * rest:.1f} % of {made['leaks']['n_without']}"
            lines.append(f"| {text} | {100 * made['accuracy']:.1f} % of {made['n']} | {len(made['leaks']['near'])} | {shown} |")
    made = penult("evaluate", folder / "photos.head", PHOTOS / "val")
    lines.append(f"| {len(new)} new photos | {100 * made['accuracy']:.1f} % | {len(made['leaks']['near'])} | - |")
    return "\n".join(lines)


def held_out(folder: Path) -> str:
    """Ten new photos stand for hundreds: copies of each, on one of which two heads differ."""
    penult("extract", PHOTOS, *NETWORK, "-o", folder / "both.cache")
    rights = []
    for head in ("logistic", "centroid"):
        penult("train", folder / "both.cache", "--head", head, "--no-thumbnails", "-o", folder / f"both-{head}.head")
        shown = Bundle.load(folder / f"both-{head}.head").predictions()
        rights.append(np.array(["ants", "bees"])[shown.probabilities.argmax(axis=1)] == shown.labels)
    alike = np.flatnonzero(rights[0] & rights[1])
    chosen = [int(np.flatnonzero(rights[0] & ~rights[1])[0]), *alike[:: len(alike) // 9][:9].tolist()]
    lines = [
        "| held out | accuracy, each image for itself | accuracy now | p of the two heads | p now |",
        "|---|---|---|---|---|",
    ]
    for what, versions in (("20 exact copies of each", ["same"] * 20), ("10 versions of each", ["same", *VERSIONS])):
        data = folder / what.replace(" ", "-")
        for path in sorted((PHOTOS / "train").rglob("*.jpg")):
            out = data / "train" / path.parent.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(path.read_bytes())
        for path in (PHOTOS / os.fsdecode(shown.paths[i]) for i in chosen):
            for k, name in enumerate(versions):
                out = data / "test" / path.parent.name / f"{path.stem}.{k}.jpg"
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(path.read_bytes()) if name == "same" else changed(path, name, out)
        cache = folder / f"{data.name}.cache"
        penult("extract", data, *NETWORK, "-o", cache)
        bundles, hits = [], []
        for head in ("logistic", "centroid"):
            bundles.append(folder / f"{data.name}-{head}.head")
            made = penult("train", cache, "--head", head, "--no-thumbnails", "-o", bundles[-1])
            of_ten = Bundle.load(bundles[-1]).predictions()
            hits.append(np.array(made["classes"])[of_ten.probabilities.argmax(axis=1)] == of_ten.labels)
        compared = penult("compare", *bundles)
        before, (low, high) = Units.each(len(hits[0])).proportion(hits[0]), compared["bundles"][0]["accuracy_interval"]
        p = flip_test(hits[0].astype(np.int8) - hits[1])
        lines.append(
            f"| {what}: {len(hits[0])} images | {100 * hits[0].mean():.1f} % [{100 * before[0]:.1f}, {100 * before[1]:.1f}] "
            f"| [{100 * low:.1f}, {100 * high:.1f}], of {compared['groups']} groups | {p:.1g} "
            f"| {compared['bundles'][1]['change']['p_adjusted']:.2g} |"
        )
    return "\n".join(lines)


def seconds() -> str:
    rng = np.random.default_rng(0)
    lines = ["| images | features | CPU seconds |", "|---|---|---|"]
    for n, d in ((245, 1280), (5000, 1280), (20000, 1280)):
        X = rng.normal(size=(n, d)).astype(np.float32)
        labels = rng.integers(0, 10, n).astype(str).tolist()
        begin = time.process_time()
        near_copies(X, labels)
        lines.append(f"| {n:,} | {d:,} | {time.process_time() - begin:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="of each small simulation (default 1000)")
    parser.add_argument("--only", nargs="*", help="these tables alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables: dict[str, Callable[[], str]] = {
            "simulated": lambda: simulated(options.draws),
            "bursts": lambda: bursts(options.draws),
            "seconds": seconds,
        }
        if PHOTOS.is_dir() and WEIGHTS.is_file():
            untrained: list[Any] = ["-m", "mobilenet_v2", "--weights", "random"]
            tables |= {
                "photos": lambda: Photos(folder, NETWORK).table(),
                "untrained": lambda: Photos(folder, untrained).table(),
                "train": lambda: inside_train(folder),
                "evaluate": lambda: new_data(folder),
                "held-out": lambda: held_out(folder),
            }
        for name, table in tables.items():
            if options.only and name not in options.only:
                continue
            text = f"{date.today()}.\n\n{table()}"
            print(text, flush=True)
            begin = BEGIN.format(name)
            before, _, rest = PAGE.read_text("utf-8").partition(begin)
            PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
