"""The whole path of regularisation against 45 fits of scikit-learn's LogisticRegression, on the same standardised features.

Run by ``make bench``; writes its section of docs/benchmarks.md. Both take turns: the path is fitted before, between and after
scikit-learn's fits, and its median time counts. On the largest set scikit-learn's fits would take an hour, so a few of them
stand for all. Features of the ants and bees need photos and weights that are not part of the project (``PENULT_TEST_ASSETS``
or ../shared); without them that row is left out, and says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from classifiers.evaluation.probabilities import log_loss
from classifiers.heads.logistic import CS, enough
from classifiers.heads.solvers.softmax import Optimum, SoftmaxPath
from classifiers.heads.solvers.standardise import standardisation
from classifiers.heads.solvers.threads import threads_for

REPO = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("PENULT_TEST_ASSETS") or REPO.parent / "shared")
PAGE = REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/heads.py -->", "<!-- end -->"
MOST = 2000  # evaluations for one C, as in the head

Floats = NDArray[np.float32]
Weights = NDArray[np.floating]
Part = tuple[Floats, NDArray[np.intp]]


def embedded(files: Sequence[Path]) -> Floats:
    """Penultimate features of MobileNetV2 of photos.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    from extractor.backbones.export import export
    from extractor.backbones.registry import Backbone
    from extractor.runtime.session import Embedder

    weights = ASSETS / "weights/mobilenet_v2-imagenet.pth"
    if not weights.exists():
        raise FileNotFoundError(weights)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "backbone.onnx"
        preprocess = export(Backbone("mobilenet_v2", str(weights), "IMAGENET1K_V1"), file).preprocess
        embed = Embedder(file, device="cpu")
        pixels = np.stack([preprocess.read(path.read_bytes()) for path in files])
        return np.asarray(embed(preprocess.normalise(pixels)), np.float32)


def hymenoptera() -> tuple[Part, Part]:
    """Features of the train and the val photos.

    Raises:
        FileNotFoundError: the photos or the weights are not there.
    """
    folder = ASSETS / "data/hymenoptera"
    if not folder.exists():
        raise FileNotFoundError(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    features, targets = embedded(files), np.unique([path.parent.name for path in files], return_inverse=True)[1]
    train = np.array([path.parent.parent.name == "train" for path in files])
    return (features[train], targets[train]), (features[~train], targets[~train])


def digits() -> tuple[Part, Part]:
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order].astype(np.float32), y[order]
    return (X[:1437], y[:1437]), (X[1437:], y[1437:])


def synthetic(n: int, d: int, shares: Sequence[float], spread: float) -> tuple[Part, Part]:
    """What networks give: correlated, skewed directions, a few of which tell the classes apart; a fifth more for validation."""
    rng = np.random.default_rng(0)
    classes = len(shares)
    targets = rng.choice(classes, n + n // 5, p=np.array(shares) / sum(shares))
    targets[:classes] = range(classes)
    hidden = rng.normal(size=(classes, 64))[targets] * spread + rng.normal(size=(len(targets), 64))
    features = (hidden @ rng.normal(size=(64, d)) / 8).astype(np.float32)
    features += 0.3 * rng.standard_normal(features.shape, np.float32)
    np.maximum(features, 0, out=features)
    return (features[:n], targets[:n]), (features[n:], targets[n:])


@dataclass(frozen=True)
class Case:
    """One set, how often the path is fitted on it, and at how many of its points scikit-learn is."""

    name: str
    make: Callable[[], tuple[Part, Part]]
    turns: int = 3
    every: int = 1


CASES = (
    Case("ants and bees, MobileNetV2", hymenoptera),
    Case("scikit-learn's digits", digits),
    Case("synthetic, imbalanced", lambda: synthetic(10_000, 512, (0.9, 0.07, 0.02, 0.01), 0.4)),
    Case("synthetic, 10 classes", lambda: synthetic(50_000, 1280, (1,) * 10, 0.4)),
    Case("synthetic, 100 classes", lambda: synthetic(20_000, 2048, (1,) * 100, 0.6), turns=1, every=9),
)


@dataclass(frozen=True)
class Found:
    """What both sides found, by place in the grid."""

    ours: list[Optimum]
    seconds: list[float]
    theirs: dict[int, LogisticRegression]
    their_seconds: dict[int, float]


def measure(inputs: Floats, targets: NDArray[np.intp], case: Case) -> Found:
    """Take turns; on a set that is too small for several threads both have one."""
    places = list(range(case.every // 2, len(CS), case.every))
    shares = np.array_split(places, max(case.turns - 1, 1))
    theirs, their_seconds, seconds, ours = {}, {}, [], []
    for turn in range(case.turns):
        with threads_for(inputs.size):
            begin = time.perf_counter()
            ours = list(SoftmaxPath(inputs, targets, int(targets.max()) + 1).optima(CS, MOST))
            seconds.append(time.perf_counter() - begin)
            for i in shares[turn].tolist() if turn < len(shares) else []:
                begin = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    theirs[i] = LogisticRegression(C=CS[i], max_iter=10_000).fit(inputs, targets)
                their_seconds[i] = time.perf_counter() - begin
                print(f"  C = {CS[i]:.3g}: {their_seconds[i]:.2f} s", flush=True)
    return Found(ours, seconds, theirs, their_seconds)


def logits_of(inputs: Floats, weight: Weights, bias: Weights) -> NDArray[np.float64]:
    """In float64, block by block; for two classes with the zeros of the first."""
    wide = [inputs[i : i + 8192].astype(np.float64) @ weight.T for i in range(0, len(inputs), 8192)]
    logits = np.concatenate(wide) + bias
    return np.concatenate([0 * logits, logits], axis=1) if logits.shape[1] == 1 else logits


def objective(inputs: Floats, targets: NDArray[np.intp], C: float, fit: tuple[Weights, Weights]) -> float:
    weight, bias = fit
    penalty = float(np.square(weight.astype(np.float64)).sum()) / (2 * C)
    return log_loss(logits_of(inputs, weight, bias), targets) * len(inputs) + penalty


def row(case: Case) -> str:
    (X, targets), (held, truth) = case.make()
    mean, scale = standardisation(X)
    inputs, unseen = (X - mean) / scale, (held - mean) / scale
    found = measure(inputs, targets, case)
    ratios = {
        i: objective(inputs, targets, CS[i], (found.ours[i].weight, found.ours[i].bias))
        / objective(inputs, targets, CS[i], (model.coef_, model.intercept_))
        for i, model in found.theirs.items()
    }
    losses = [log_loss(logits_of(unseen, point.weight, point.bias), truth) for point in found.ours]
    theirs = [log_loss(logits_of(unseen, model.coef_, model.intercept_), truth) for model in found.theirs.values()]
    ranks: list[tuple[float, float]] = []
    for loss in losses:
        ranks.append((0.0, loss))
        if enough(CS, ranks):
            break
    chosen = min(range(len(ranks)), key=ranks.__getitem__)
    best = min(*losses, *theirs)
    own, whole = statistics.median(found.seconds), sum(found.their_seconds.values()) * len(CS) / len(found.theirs)
    few = "" if len(found.theirs) == len(CS) else f" (from {len(found.theirs)})"
    cells = (
        case.name,
        f"{len(inputs):,} x {inputs.shape[1]:,} x {targets.max() + 1}",
        f"{own:.2f}",
        f"{whole:.1f}{few}",
        f"**{whole / own:.1f}**",
        f"{max(ratios.values()):.6f}",
        f"{1 / min(ratios.values()):.3g} at {CS[min(ratios, key=ratios.__getitem__)]:.2g}",
        f"{max(point.gradient for point in found.ours):.0e}" + ("" if all(p.converged for p in found.ours) else ", not all"),
        f"{losses[chosen]:.5f} at {CS[chosen]:.2g}",
        f"{losses[chosen] / best - 1:+.3%}",
    )
    text = f"| {' | '.join(cells)} |"
    print(text, flush=True)
    return text


TEXT = """{begin}

## Heads

`--head logistic` fits 45 strengths of regularisation; here is that whole path against 45 fits of scikit-learn's
`LogisticRegression(max_iter=10000)` on the same standardised float32 features. {date}, {cores} cores ({machine}),
scikit-learn {sklearn}; the path is timed up to three times, before, between and after scikit-learn's fits (median). Where the
total is from a few fits only, those are spread evenly over the path.

- Objective: the largest of ours over scikit-learn's at the same C, and the most that scikit-learn's is of ours, where it stops
  early.
- Gradient: the largest entry, of any point, of the gradient of the mean objective, ours.
- Log-loss: on a fifth more rows (of the ants and bees: the val folder), at the C that the head chooses, and against the best of
  all fits of both sides.

| features | rows x features x classes | path, s | 45 fits, s | times faster | objective, at most | scikit-learn's, at most \
| gradient | log-loss at C | against the best |
|---|---|---|---|---|---|---|---|---|---|
{rows}
{left_out}
{end}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sets whose name contains this; the page is then left as it is")
    given = parser.parse_args()
    rows, left_out = [], []
    for case in CASES:
        if given.only in case.name:
            try:
                rows.append(row(case))
            except FileNotFoundError as error:
                left_out.append(f"\nLeft out: {case.name}, without the project's test assets.\n")
                print(f"{case.name} is left out: no {error}", flush=True)
    if given.only:
        return
    section = TEXT.format(
        begin=BEGIN,
        end=END,
        date=date.today(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        sklearn=version("scikit-learn"),
        rows="\n".join(rows),
        left_out="".join(left_out),
    )
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END + "\n")
    PAGE.write_text(f"{before.rstrip()}\n\n{section}{after}")


if __name__ == "__main__":
    main()
