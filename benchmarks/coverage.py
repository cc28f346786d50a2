"""How often 95 % intervals hold the true value, and 90 % prediction sets the true label, where both are known.

Run by ``make bench``; rewrites its tables in docs/metrics.md and docs/compare.md. Images are drawn from populations whose true
scores are those of 400,000 draws; class sizes vary from draw to draw, as they do in a random split. Images of a group share as
much of their noise as gives being right the intra-class correlation that the table names.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from classifiers.comparison.verdict import WORTH, judge
from classifiers.evaluation.conformal import KINDS, Conformal
from classifiers.evaluation.intervals import RESAMPLES, bootstrap_interval, resampled
from classifiers.evaluation.paired_tests import difference_interval, paired
from classifiers.evaluation.scores import weighted_scores
from classifiers.evaluation.single_label import score
from classifiers.evaluation.units import Units

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- {}: made by `make bench` -->", "<!-- end -->"
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

PLAIN = 300  # draws that are judged without their groups, too
IN_GROUPS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1_macro": "macro F1"}

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
class Grouped:
    """Images of groups that are right and wrong together, as those of a patient or of a day are.

    Attributes:
        groups: how many there are in one draw.
        size: images of each on average; from half of it to one and a half times.
        correlation: intra-class correlation of being right.
    """

    groups: int
    size: int
    correlation: float

    prior, distance = (0.5, 0.3, 0.2), 1.7  # of three classes; about 87 % are right

    def __str__(self) -> str:
        return f"{self.groups} groups of {self.size}, {self.correlation:g}"

    def draw(self, rng: np.random.Generator, groups: int, heads: int = 1) -> tuple[list[bytes], Drawn, list[Drawn]]:
        """The group of each image; class and probabilities of the first head; those of equally good other heads.

        A half of what is common to a group, and of what is an image's own, is the same for all heads.
        """
        of = np.repeat(np.arange(groups), rng.integers(max(self.size // 2, 1), self.size + self.size // 2 + 1, groups))
        n, k = len(of), len(self.prior)
        truth = rng.choice(k, n, p=self.prior)
        share = _shared_noise(self.correlation)

        def noise(rows: int) -> NDArray[np.float64]:
            return rng.normal(size=(rows, k))

        both = noise(groups), noise(n)
        drawn = []
        for _ in range(heads):
            common, own = (np.sqrt(0.5) * (mine + noise(len(mine))) for mine in both)
            seen = np.sqrt(share) * common[of] + np.sqrt(1 - share) * own
            seen[np.arange(n), truth] += self.distance
            logits = self.distance * seen + np.log(self.prior)
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            drawn.append((truth, (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)))
        return [str(number).encode() for number in of], drawn[0], drawn[1:]


GROUPED = tuple(Grouped(groups, 300 // groups, rho) for groups in (10, 20, 50) for rho in (0.0, 0.1, 0.3))


@cache
def _shared_noise(correlation: float) -> float:
    """The share of the noise that images of a group have in common, for an intra-class correlation of being right."""
    if not correlation:
        return 0.0
    rng, size, groups, k = np.random.default_rng(2), 20, 4000, len(Grouped.prior)
    truth = rng.choice(k, (groups, size), p=Grouped.prior)
    common, own = rng.normal(size=(groups, 1, k)), rng.normal(size=(groups, size, k))
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        seen = np.sqrt(share) * common + np.sqrt(1 - share) * own
        np.put_along_axis(seen, truth[..., None], np.take_along_axis(seen, truth[..., None], 2) + Grouped.distance, 2)
        right = ((Grouped.distance * seen + np.log(Grouped.prior)).argmax(axis=2) == truth).astype(np.float64)
        between, p = right.mean(axis=1).var(ddof=1), right.mean()
        within = right.var(axis=1, ddof=1).mean()
        low, high = (share, high) if (between - within / size) / (p * (1 - p)) < correlation else (low, share)
    return (low + high) / 2


def grouped_coverage(population: Grouped, draws: int) -> dict[str, float]:
    """Share of intervals with the true value, and of wrong verdicts: with the groups known and, as ``plain ...``, without."""
    rng = np.random.default_rng(3)
    classes = [f"{k}" for k in range(len(population.prior))]
    _, (truth, probabilities), _ = population.draw(rng, TRUE // population.size)
    once = weighted_scores(truth, probabilities, np.ones((len(truth), 1), np.float32))
    known = {name: float(value) for name, (value,) in once.items()}
    known["accuracy"] = float((probabilities.argmax(axis=1) == truth).mean())
    held: defaultdict[str, list[bool]] = defaultdict(list)
    for number in range(draws):
        groups, (truth, probabilities), ((_, others),) = population.draw(rng, population.groups, heads=2)
        labels = np.array(classes)[truth]
        ways = (("", Units.of_groups(groups)), ("plain ", Units.each(len(truth))))
        for way, units in ways[: 2 if number < PLAIN else 1]:
            for name, entry in score(labels, probabilities, classes, units=units).scores.items():
                if name in IN_GROUPS and entry["interval"]:
                    low, high = entry["interval"]
                    held[way + name].append(low <= known[name] <= high)
            change = paired(truth, [probabilities, others], classes, 0, units)[0][1].change
            assert change is not None
            low, high = change.scores["accuracy"]["interval"]
            held[f"{way}difference"].append(low - 1e-9 <= 0 <= high + 1e-9)
            held[f"{way}test"].append(change.p < 0.05)
            verdict = judge(change, units, subject="it", cost_ratio=10.0, worthwhile=0.01)
            held[f"{way}worth"].append(verdict.decision == WORTH)
    return {name: float(np.mean(values)) for name, values in held.items()}


def groups_report(draws: int) -> str:
    lines = [
        f"{date.today()}, {draws} draws of each; in brackets what it was if the groups were not known.",
        "",
        "| groups of images, correlation | "
        + " | ".join((*IN_GROUPS.values(), "difference of accuracy", "exact test finds one", "called worth it"))
        + " |",
        "|---|" + "---|" * (len(IN_GROUPS) + 3),
    ]
    for population in GROUPED:
        shown = grouped_coverage(population, draws)
        names = (*IN_GROUPS, "difference", "test", "worth")
        cells = (f"{100 * shown[name]:.1f} % ({100 * shown[f'plain {name}']:.0f} %)" for name in names)
        lines.append(f"| {population} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


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
        value = float(change.mean())
        drawn = np.concatenate([change.astype(np.float32) @ weights for weights in resampled(truth, RESAMPLES, seed)])
        values = drawn.astype(np.float64) / pair.n
        units = Units.each(pair.n)
        found = difference_interval(change, values, units), bootstrap_interval(value, values) or (value, value)
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


REPORTS = {
    "scores": (DOCS / "metrics.md", report),
    "groups": (DOCS / "metrics.md", groups_report),
    "pairs": (DOCS / "compare.md", pairs_report),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="of each population (default 1000: about five minutes)")
    parser.add_argument("--only", choices=REPORTS, help="this table alone")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    for name, (page, text) in REPORTS.items():
        if options.only not in (None, name):
            continue
        found = text(options.draws)
        print(found)
        if not options.no_page:
            begin = BEGIN.format(name)
            before, _, rest = page.read_text("utf-8").partition(begin)
            page.write_text(f"{before}{begin}\n\n{found}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
