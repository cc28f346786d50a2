"""What cached views are worth: heads fitted on K = 4 views against the same heads on K = 1, on the same held-out images.

    python benchmarks/views.py --weights mobilenet_v2.pth --photos hymenoptera/

Writes the table of docs/views.md: a folder of photos, and scikit-learn's digits as images, each with a few and with all
training images. Draws of few images are the same for both heads, so differences are paired: by draw, or, where all are fitted,
by held-out image.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from classifiers.demo import write_digits  # noqa: E402
from classifiers.evaluation.intervals import bootstrap_interval  # noqa: E402
from classifiers.evaluation.probabilities import averaged  # noqa: E402
from classifiers.heads.logistic import LogisticHead  # noqa: E402
from extractor.backbones.registry import Backbone  # noqa: E402
from extractor.data.folders import ImageFolder  # noqa: E402
from extractor.pipeline.run import extract  # noqa: E402
from extractor.pipeline.settings import Options  # noqa: E402
from store.cache import FeatureCache, Subset  # noqa: E402

PAGE = REPO / "docs" / "views.md"
BEGIN, END = "<!-- written by benchmarks/views.py -->", "<!-- end -->"
K = 4
SHOTS, DRAWS = (2, 5, 10), 20
SEEDS = (0, 1, 2)  # of views
RESAMPLES = 10_000
UPRIGHT: dict[str, Any] = {
    "crop_area": 0.8,
    "flip": "none",
    "rotation": 10.0,
    "translation": 0.05,
}  # a flipped digit is another one
COLUMNS = (
    *("images", "training images", "accuracy, K = 1", "accuracy, K = 4"),
    *("difference [95 %], points", "log-loss, K = 1", "log-loss, K = 4", "averaged: difference [95 %], points"),
)


class Judged:
    """Heads on the same training images, as they are and in K views, on the same held-out images."""

    def __init__(self, cache: FeatureCache, train: Subset, test: Subset, chosen: NDArray[np.intp]) -> None:
        every = cache.features(train.sha256, views=True)[chosen]
        groups, labels = [train.groups[i] for i in chosen], train.y[chosen]
        once = LogisticHead().fit(every[:, 0], labels, groups=groups)
        views = LogisticHead().fit(
            every.reshape(-1, cache.dim), np.repeat(labels, K), groups=[group for group in groups for _ in range(K)], views=K
        )
        seen = cache.features(test.sha256, views=True).reshape(-1, cache.dim)
        one, several = once.predict_proba(test.X), views.predict_proba(test.X)
        mean = averaged(views.predict_proba(seen), K)
        truth = np.searchsorted(once.classes_, test.y)
        self.right = [outputs.argmax(axis=1) == truth for outputs in (one, several, mean)]
        own = [outputs[np.arange(len(truth)), truth] for outputs in (one, several)]
        self.loss = [float(-np.log(np.maximum(each, np.finfo(np.float32).tiny)).mean()) for each in own]


def draws(train: Subset, shots: int) -> Iterator[NDArray[np.intp]]:
    """So many images of each class, again and again."""
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(train.y == label) for label in np.unique(train.y)]
    for _ in range(DRAWS):
        yield np.concatenate([rng.choice(rows, shots, replace=False) for rows in members])


def by_draw(differences: NDArray[np.float64]) -> str:
    """Mean difference with its interval over draws, in points."""
    half = t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return (
        f"{100 * differences.mean():+.1f} [{100 * (differences.mean() - half):+.1f}, {100 * (differences.mean() + half):+.1f}]"
    )


def by_image(one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    """Difference of how often each held-out image is right, with its interval over these, which are drawn again in pairs."""
    gain = other - one
    drawn = np.random.default_rng(0).integers(0, len(gain), (RESAMPLES, len(gain)))
    bounds = bootstrap_interval(float(gain.mean()), gain[drawn].mean(axis=1))
    return f"{100 * gain.mean():+.1f}" + (f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else " (none differs)")


def rows(name: str, caches: Sequence[FeatureCache], held: str) -> Iterator[list[str]]:
    """Few images are drawn many times, with the views of the first cache; all are fitted with the views of each."""
    train, test = caches[0].subset("train"), caches[0].subset(held)
    for shots in (*SHOTS, None):
        begin = time.perf_counter()
        if shots is None:
            found = [Judged(cache, train, test, np.arange(len(train))) for cache in caches]
        else:
            found = [Judged(caches[0], train, test, each) for each in draws(train, shots)]
        one, several, mean = (np.array([each.right[i].mean() for each in found]) for i in range(3))
        losses = [f"{np.mean([each.loss[i] for each in found]):.3f}" for i in range(2)]
        if shots is None:
            right = [np.mean([each.right[i] for each in found], axis=0) for i in range(3)]
            gains = [by_image(right[0], right[i]) for i in (1, 2)]
        else:
            gains = [by_draw(several - one), by_draw(mean - one)]
        what = f"all {len(train)}, {len(caches)} seeds" if shots is None else f"{shots} a class, {DRAWS} draws"
        yield [name, what, f"{100 * one.mean():.1f} %", f"{100 * several.mean():.1f} %", gains[0], *losses, gains[1]]
        print(f"{name}, {what}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="mobilenet_v2 with torchvision's V1 preprocessing")
    parser.add_argument("--photos", type=Path, required=True, help="train and val folders with a folder per class")
    given = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        count = write_digits(Path(folder) / "digits")
        for name, data, held, side, changes in (
            (given.photos.name, given.photos, "val", None, {}),
            (f"{count} digits, 8 x 8", Path(folder) / "digits", "test", 96, UPRIGHT),
        ):
            backbone = Backbone("mobilenet_v2", given.weights, "IMAGENET1K_V1", resize=side, crop=side)
            options = Options(views=K, **changes, device="cpu", quiet=True)
            caches = [
                extract(ImageFolder(data), backbone, Path(folder) / f"{held}-{seed}.cache", options.replace(seed=seed))
                for seed in SEEDS
            ]
            table += list(rows(name, caches, held))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
