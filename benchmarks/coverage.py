"""How often 95 % intervals hold the true value, and 90 % prediction sets the true label, where both are known.

Run by ``make bench``; rewrites its tables in docs/metrics.md and docs/compare.md. Images are drawn from populations whose true
scores are those of 400,000 draws; class sizes vary from draw to draw, as they do in a random split.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.conformal import KINDS, Conformal
from classifiers.evaluation.intervals import RESAMPLES, bootstrap_interval, resampled
from classifiers.evaluation.paired_tests import difference_interval
from classifiers.evaluation.scores import weighted_scores
from classifiers.evaluation.single_label import score

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- made by `make bench` -->", "<!-- end -->"
TRUE = 400_000  # draws; half at a time
SCORES = {
    "accuracy": "accuracy (Wilson)",
    "balanced_accuracy": "balanced accuracy",
    "precision_macro": "macro precision",
    "f1_macro": "macro F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "log-loss",
    "brier": "Brier",
    "ece": "ECE",
}

Drawn = tuple[NDArray[np.intp], NDArray[np.float32]]


@dataclass(frozen=True)
class Population:
    """Logits are Gaussian around the true class, and turned into its exact posterior, which is then sharpened.

    Attributes:
        n: images in one draw.
        prior: share of each class.
        distance: between the true class's logit and the others.
        overconfidence: factor on the logits; 1 is perfectly calibrated.
    """

    n: int
    prior: tuple[float, ...]
    distance: float
    overconfidence: float

    def draw(self, rng: np.random.Generator, n: int) -> Drawn:
        """Class index ``(n,)`` and probabilities ``(n, k)``."""
        truth = rng.choice(len(self.prior), n, p=self.prior)
        seen = rng.normal(size=(n, len(self.prior)))
        seen[np.arange(n), truth] += self.distance
        logits = self.overconfidence * (self.distance * seen + np.log(self.prior))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return truth, (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    def __str__(self) -> str:
        kind = "" if len(set(self.prior)) == 1 else ", imbalanced"
        sure = "" if self.overconfidence == 1 else ", overconfident"
        return f"{self.n} images, {len(self.prior)} classes{kind}{sure}"


POPULATIONS = (
    Population(150, (0.5, 0.5), 1.9, 1.0),
    Population(150, (0.5, 0.5), 3.0, 1.2),
    Population(500, (0.1,) * 10, 2.2, 1.5),
    Population(1000, (0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.04, 0.03, 0.03), 2.2, 1.0),
    Population(300, (1 / 30,) * 30, 2.5, 1.0),
)


def score_coverage(population: Population, draws: int) -> dict[str, float]:
    """Share of intervals that hold the true value, by score; and the true accuracy as ``true``."""
    rng = np.random.default_rng(0)
    classes = [f"{k:02d}" for k in range(len(population.prior))]
    halves = [population.draw(rng, TRUE // 2) for _ in range(2)]
    truth, probabilities = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    once = weighted_scores(truth, probabilities, np.ones((TRUE, 1), np.float32))
    known = {name: float(value) for name, (value,) in once.items()}
    known["accuracy"] = float((probabilities.argmax(axis=1) == truth).mean())
    held: defaultdict[str, list[bool]] = defaultdict(list)
    for _ in range(draws):
        truth, probabilities = population.draw(rng, population.n)
        for name, entry in score(np.array(classes)[truth], probabilities, classes).scores.items():
            if name in SCORES and entry["interval"]:
                low, high = entry["interval"]
                held[name].append(low <= known[name] <= high)
    return {name: float(np.mean(values)) for name, values in held.items()} | {"true": known["accuracy"]}


def set_coverage(population: Population, draws: int) -> dict[str, tuple[float, float]]:
    """By kind of prediction set, calibrated on as many images as it is measured on: coverage, and that of the worst class."""
    rng, k = np.random.default_rng(1), len(population.prior)
    held: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for _ in range(draws):
        truth, probabilities = population.draw(rng, population.n)
        conformal = Conformal.fit(probabilities, truth)
        truth, probabilities = population.draw(rng, population.n)
        for kind in KINDS:
            covered = conformal.sets(probabilities, kind)[np.arange(len(truth)), truth]
            counts = np.bincount(truth, minlength=k), np.bincount(truth, covered, minlength=k)
            held[kind].append(np.stack(counts))
    totals = {kind: np.sum(values, axis=0) for kind, values in held.items()}
    return {kind: (right.sum() / n.sum(), float((right / n).min())) for kind, (n, right) in totals.items()}


@dataclass(frozen=True)
class Pair:
    """Two heads of known accuracy on ``n`` images; on a share of them one luck decides for both."""

    n: int
    classes: int
    accuracies: tuple[float, float]
    shared: float

    def draw(self, rng: np.random.Generator) -> NDArray[np.int8]:
        """Of each image ``(n,)``: 1 where only the second head is right, -1 where only the first one is, else 0."""
        luck, other = rng.random((2, self.n))
        other = np.where(rng.random(self.n) < self.shared, luck, other)
        return (other < self.accuracies[1]).astype(np.int8) - (luck < self.accuracies[0]).astype(np.int8)


PAIRS = (
    Pair(150, 2, (0.96, 0.96), 0.5),
    Pair(150, 2, (0.95, 0.97), 0.5),
    Pair(500, 10, (0.90, 0.90), 0.7),
    Pair(500, 10, (0.88, 0.92), 0.7),
    Pair(2000, 10, (0.80, 0.82), 0.5),
)


def difference_coverage(pair: Pair, draws: int) -> tuple[float, float]:
    """Share of intervals that hold the true difference: those of `penult compare`, and the bootstrap's alone."""
    rng, truth = np.random.default_rng(0), np.arange(pair.n) % pair.classes
    true = pair.accuracies[1] - pair.accuracies[0]
    held = []
    for seed in range(draws):
        change = pair.draw(rng)
        wins, losses = int((change > 0).sum()), int((change < 0).sum())
        value = (wins - losses) / pair.n
        drawn = np.concatenate([change.astype(np.float32) @ weights for weights in resampled(truth, RESAMPLES, seed)])
        values = drawn.astype(np.float64) / pair.n
        found = difference_interval(value, values, wins, losses, pair.n), bootstrap_interval(value, values) or (value, value)
        held.append([low - 1e-9 <= true <= high + 1e-9 for low, high in found])  # a difference is a multiple of 1 / n
    shown, alone = np.mean(held, axis=0).tolist()
    return shown, alone


def pairs_report(draws: int) -> str:
    lines = [
        f"{date.today()}, {draws} draws of each.",
        "",
        "| images | classes | true accuracies | one luck for both | interval holds the true difference | bootstrap alone |",
        "|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        shown, alone = difference_coverage(pair, draws)
        first, second = pair.accuracies
        facts = f"{pair.n} | {pair.classes} | {100 * first:.0f} %, {100 * second:.0f} % | {100 * pair.shared:.0f} %"
        lines.append(f"| {facts} | {100 * shown:.1f} % | {100 * alone:.1f} % |")
    return "\n".join(lines)


def report(draws: int) -> str:
    names = [str(population) for population in POPULATIONS]
    found = [score_coverage(population, draws) for population in POPULATIONS]
    sets = [set_coverage(population, draws) for population in POPULATIONS]
    error = 100 * math.sqrt(0.95 * 0.05 / draws)
    lines = [
        f"{date.today()}, {draws} draws of each population; one standard error of a coverage of 95 % is {error:.1f} points.",
        "",
        "| 95 % interval of | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        "| (true accuracy) | " + " | ".join(f"{100 * each['true']:.1f} %" for each in found) + " |",
    ]
    lines += [
        f"| {text} | " + " | ".join(f"{100 * each[name]:.1f} %" if name in each else "-" for each in found) + " |"
        for name, text in SCORES.items()
    ]
    lines += ["", "| 90 % prediction sets | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind, text in zip(KINDS, ("over all images", "class by class"), strict=True):
        cells = (f"{100 * each[kind][0]:.1f} %, worst class {100 * each[kind][1]:.1f} %" for each in sets)
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="of each population (default 1000: about five minutes)")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    for page, text in ((DOCS / "metrics.md", report), (DOCS / "compare.md", pairs_report)):
        found = text(options.draws)
        print(found)
        if not options.no_page:
            before, _, rest = page.read_text("utf-8").partition(BEGIN)
            page.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
