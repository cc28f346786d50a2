"""Every pixel path against the reference on real photos: pixels, features, decisions, and what an image costs.

Run by ``make bench``; writes docs/pixel-paths.md. It needs photos and ImageNet weights of MobileNetV2 that are not part of the
project: ``--photos`` (a folder), ``--labelled`` (train|val folders per class, for a head), ``--weights`` (.pth) and
``--classifier`` (.onnx, 1000 classes). By default they are looked for in PENULT_TEST_ASSETS or ../shared.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from classifiers.heads.logistic import LogisticHead
from extractor.backbones.export import export
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.parity import relative_l2
from extractor.pixels.preprocess import PIXEL_PATHS, Preprocess
from extractor.runtime.session import Embedder

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")
PAGE = REPO / "docs" / "pixel-paths.md"
REFERENCE = "pillow"
RECOMMENDED = 0.995  # of all decisions must be those on the reference
BOUND = 3e-4  # relative L2; a path beyond it is not the default
SMALL, LARGE = (500, 375), (2000, 1500)
TIMED = {SMALL: 50, LARGE: 12}  # images

Pixels = dict[str, NDArray[np.uint8]]  # by path, (n, side, side, 3)
Decide = Callable[[NDArray[np.uint8]], NDArray[np.int64]]


@dataclass
class Judges:
    """What looks at pixels: the backbone, and two who decide."""

    preprocess: Preprocess
    backbone: Embedder
    classify: Decide
    head: LogisticHead

    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.backbone(self.preprocess.normalise(pixels))


def enlarged(data: bytes) -> bytes:
    """The photo at `LARGE`, or upright at its width and height swapped, as a camera's JPEG file."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    size = LARGE if image.width >= image.height else LARGE[::-1]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels_of(files: Iterable[bytes], preprocess: Preprocess) -> Pixels:
    paths = {name: replace(preprocess, pixel_path=name) for name in PIXEL_PATHS}
    read = [{name: path.read(data) for name, path in paths.items()} for data in files]
    return {name: np.stack([each[name] for each in read]) for name in paths}


def classifier(file: Path) -> Decide:
    """The class that a whole network decides for: pixels in -1..1, planes first, as the shared one takes them."""
    session = cpu_session(file)
    name = session.get_inputs()[0].name
    takes = Preprocess(256, 224, "bilinear", (0.5,) * 3, (0.5,) * 3)

    def classify(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        parts = [session.run(None, {name: takes.normalise(part[None])})[0] for part in pixels]
        return np.concatenate(parts).argmax(axis=1)

    return classify


def fidelity(photos: Pixels, labelled: Pixels, judges: Judges) -> dict[str, list[str]]:
    """The cells of each path but the reference."""
    everything = {name: np.concatenate([photos[name], labelled[name]]) for name in PIXEL_PATHS}
    features = {name: judges.features(pixels) for name, pixels in everything.items()}
    held_out = slice(len(photos[REFERENCE]), None)
    classes = {name: judges.classify(pixels) for name, pixels in photos.items()}
    decisions = {name: judges.head.predict(found[held_out]) for name, found in features.items()}
    rows = {}
    for name in list(PIXEL_PATHS)[1:]:
        levels = np.abs(everything[name].astype(np.int16) - everything[REFERENCE])
        moved = relative_l2(features[name], features[REFERENCE])
        kept = [
            (np.asarray(now == before).mean(), f"{(now == before).sum()} of {len(now)}")
            for now, before in ((found[name], found[REFERENCE]) for found in (classes, decisions))
        ]
        rows[name] = [
            f"{(levels > 0).mean():.2%}",
            f"{levels.max()}",
            f"{moved.mean():.1e}",
            f"{moved.max():.1e}",
            *(counted for _, counted in kept),
            "yes" if min(share for share, _ in kept) >= RECOMMENDED else "no",
        ]
        print(name, rows[name], flush=True)
    return rows


def costs(files: Sequence[bytes], preprocess: Preprocess, repeats: int) -> dict[str, tuple[float, str]]:
    """CPU milliseconds per image of each path, and its time over the reference's: median, lowest to highest."""
    paths = {name: replace(preprocess, pixel_path=name) for name in PIXEL_PATHS}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        spent = dict.fromkeys(paths, 0.0)
        for data, (name, path) in itertools.product(files, paths.items()):  # interleaved: load of the machine hits all of them
            begin = time.process_time()
            path.read(data)
            spent[name] += time.process_time() - begin
        for name, seconds in spent.items():
            times[name].append(seconds / len(files) * 1000)
    found = {}
    for name, each in times.items():
        ratios = sorted(a / b for a, b in zip(each, times[REFERENCE], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        found[name] = (statistics.median(each), "1" if name == REFERENCE else spread)
    return found


def timed_files(photos: Sequence[bytes]) -> dict[tuple[int, int], list[bytes]]:
    landscape = [data for data in photos if Image.open(io.BytesIO(data)).size == SMALL][: TIMED[SMALL]]
    return {SMALL: landscape, LARGE: [enlarged(data) for data in landscape[: TIMED[LARGE]]]}


def make_judges(given: argparse.Namespace, folder: Path) -> tuple[Judges, list[bytes]]:
    """The judges, with a head fitted on reference features of what is in train, and the files of val."""
    facts = export(Backbone("mobilenet_v2", str(given.weights), "IMAGENET1K_V1"), folder / "backbone.onnx")
    backbone = Embedder(folder / "backbone.onnx", device="cpu")
    source = ImageFolder(given.labelled)
    samples = {split: [each for each in source.samples() if each.split == split] for split in ("train", "val")}
    files = {split: [source.files.read(sample.path)[0] for sample in found] for split, found in samples.items()}
    train = np.stack([facts.preprocess.read(data) for data in files["train"]])
    labels = np.array([sample.label for sample in samples["train"]])
    head = LogisticHead().fit(backbone(facts.preprocess.normalise(train)), labels)
    return Judges(facts.preprocess, backbone, classifier(given.classifier), head), files["val"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=ASSETS / "data/photos")
    parser.add_argument("--labelled", type=Path, default=ASSETS / "data/hymenoptera")
    parser.add_argument("--weights", type=Path, default=ASSETS / "weights/mobilenet_v2-imagenet.pth")
    parser.add_argument("--classifier", type=Path, default=ASSETS / "weights/mobilenet_v2-classifier-same-padding.onnx")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    if missing := [str(path) for path in (given.photos, given.labelled, given.weights, given.classifier) if not path.exists()]:
        print(f"pixel paths are not measured: no {', '.join(missing)} (see --help)")
        return
    photos = [path.read_bytes() for path in sorted(given.photos.rglob("*.*"))]
    with tempfile.TemporaryDirectory() as temporary:
        judges, held_out = make_judges(given, Path(temporary))
        tables = []
        for title, prepare in (("As they are", bytes), ("Enlarged to 2000 x 1500", enlarged)):
            cells = fidelity(
                pixels_of(map(prepare, photos), judges.preprocess), pixels_of(map(prepare, held_out), judges.preprocess), judges
            )
            tables += [f"| {title} | `{name}` | {' | '.join(row)} |" for name, row in cells.items()]
    measured = {size: costs(files, judges.preprocess, given.repeats) for size, files in timed_files(photos).items()}
    spent = [
        f"| `{name}` | " + " | ".join(f"{found[name][0]:.1f} | {found[name][1]}" for found in measured.values()) + " |"
        for name in PIXEL_PATHS
    ]
    PAGE.write_text(page(tables, spent, len(photos), len(held_out), given.repeats))


def page(tables: Sequence[str], spent: Sequence[str], photos: int, labelled: int, repeats: int) -> str:
    return f"""# Pixel paths, measured

Written by `make bench` (`benchmarks/pixels.py`); what the paths are is in [images.md](images.md#pixel-paths).

{date.today()}, {os.cpu_count()} cores ({platform.machine()}), Pillow {version("pillow")}. {photos} photos of ImageNet classes
and {labelled} of ants and bees, MobileNetV2 with ImageNet weights, against `{REFERENCE}`.

## What changes

Values are the red, green and blue of the pixels that the network gets. Features: relative L2 of an image. Decisions that stay:
those of a 1000-way classifier on the photos, and on the ants and bees those of a logistic head that was fitted on reference
features of the training images. A path is recommended where {RECOMMENDED:.1%} of each stay. It would be the default if it moved
no features by more than {BOUND:.0e}.

| photos | path | values that differ | levels, at most | features, mean | largest | classifier | head | recommended |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(tables)}

## What an image costs

Milliseconds of one core from a JPEG file's bytes to pixels, median of {repeats} interleaved runs, and the time over the
reference's (lowest to highest).

| path | 500 x 375 | over `{REFERENCE}` | 2000 x 1500 | over `{REFERENCE}` |
|---|---|---|---|---|
{chr(10).join(spent)}
"""


if __name__ == "__main__":
    main()
