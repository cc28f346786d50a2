"""How often 95 % intervals hold the true value, and 90 % prediction sets the true label, where both are known.

Run by ``make bench``; rewrites its tables in docs/metrics.md and docs/compare.md. Images are drawn from populations whose true
scores are those of 400,000 draws; class sizes vary from draw to draw, as they do in a random split. Images of a group share as
much of their noise as gives being right the intra-class correlation that the table names.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from classifiers.comparison.label_curve import groups_by_class, measured_curve, rows_of, shuffled
from classifiers.comparison.verdict import WORTH, judge
from classifiers.evaluation import regression
from classifiers.evaluation.conformal import KINDS, Conformal, spread
from classifiers.evaluation.intervals import RESAMPLES, Interval, bootstrap_interval, resampled
from classifiers.evaluation.paired_tests import Change, difference_interval, flip_test, paired
from classifiers.evaluation.scores import decision_scores, probability_scores, weighted_scores
from classifiers.evaluation.single_label import score
from classifiers.evaluation.units import Units
from classifiers.training.few_shot import learning_curve
from store.cache import Subset

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- {}: made by `make bench` -->", "<!-- end -->"
TRUE = 400_000  # draws; half at a time
SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision_macro": "macro precision",
    "f1_macro": "macro F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "log-loss",
    "brier": "Brier",
    "ece": "ECE",
}

PLAIN = 100  # draws that are judged in full, and without their groups, too
SHORT = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "macro F1",
    "log_loss": "log-loss",
    "roc_auc": "ROC-AUC",
}
IN_GROUPS = {
    **SHORT,
    "difference": "difference of accuracy",
    "test": "exact test finds one",
    "worth": "called worth it",
}
CURVES = {
    "few": "few-shot, 5 of each class",
    "0.1": "10 % of the labels",
    "0.5": "50 %",
    "1.0": "all",
    "gain": "gain of the second half",
}
NUMBERS = {"r2": "R2", "mae": "MAE", "rmse": "RMSE"}
SHOTS, REPEATS = 5, 10  # of a few-shot curve
OTHERS = 15  # draws that give the true accuracy of a share of the labels
WIDTH = 8  # features of an image

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
        return f"{self.groups} groups of {self.size}, {self.correlation:g}" if self.size > 1 else f"{self.groups} images"

    def members(self, rng: np.random.Generator, groups: int) -> NDArray[np.intp]:
        """The group of each image of so many groups; single images if they are independent."""
        if self.size == 1:
            return np.arange(groups)
        return np.repeat(np.arange(groups), rng.integers(max(self.size // 2, 1), self.size + self.size // 2 + 1, groups))

    def noise(self, rng: np.random.Generator, of: NDArray[np.intp], width: int, share: float) -> NDArray[np.float64]:
        """Standard normal numbers ``(n, width)`` of which images of a group have a share of the variance in common."""
        common, own = rng.normal(size=(of[-1] + 1, width)), rng.normal(size=(len(of), width))
        return np.asarray(np.sqrt(share) * common[of] + np.sqrt(1 - share) * own)

    def draw(self, rng: np.random.Generator, groups: int, heads: int = 1) -> tuple[list[bytes], Drawn, list[Drawn]]:
        """The group of each image; class and probabilities of the first head; those of equally good other heads.

        A half of what is common to a group, and of what is an image's own, is the same for all heads.
        """
        of = self.members(rng, groups)
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

    def photos(self, rng: np.random.Generator, groups: int) -> Subset:
        """Features ``(n, WIDTH)`` of images, as those of a cache."""
        of = self.members(rng, groups)
        truth = rng.choice(len(self.prior), len(of), p=self.prior)
        X = self.noise(rng, of, WIDTH, _shared_noise(self.correlation))
        X[np.arange(len(of)), truth] += self.distance
        keys = [b"%d" % i for i in range(len(of))]
        return Subset(X.astype(np.float32), np.array(["a", "b", "c"])[truth], keys, keys, [b"%d" % group for group in of])

    def numbers(self, rng: np.random.Generator, groups: int) -> tuple[Units, list[NDArray[np.float64]]]:
        """Units of images; predicted numbers, true ones, and such that scatter more where they are larger, each ``(n, 1)``."""
        of = self.members(rng, groups)
        values, noise = (self.noise(rng, of, 1, self.correlation) for _ in range(2))
        return Units(of), [values, values + 0.5 * noise, values + 0.5 * np.exp(0.6 * values) * noise]


GROUPED = (
    Grouped(300, 1, 0.0),
    *(Grouped(groups, 300 // groups, rho) for groups in (10, 20, 50) for rho in (0.0, 0.1, 0.3)),
)


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


@dataclass(frozen=True)
class Judged:
    """What is said of one draw: intervals of scores by name, and of the difference of the heads; its p and the verdict."""

    intervals: dict[str, Interval | None]
    p: float
    decision: str


def judged(truth: NDArray[np.intp], heads: Sequence[NDArray[np.float32]], units: Units) -> Judged:
    """By `score` and `paired`, as `penult evaluate` and `penult compare`."""
    classes = [f"{k}" for k in range(heads[0].shape[1])]
    scores = score(np.array(classes)[truth], heads[0], classes, units=units).scores
    change = paired(truth, heads, classes, 0, units)[0][1].change
    assert change is not None
    intervals = {name: scores[name]["interval"] for name in SHORT} | {"difference": change.scores["accuracy"]["interval"]}
    return Judged(intervals, change.p, _decision(change, units))


def judged_in_short(truth: NDArray[np.intp], heads: Sequence[NDArray[np.float32]], units: Units) -> Judged:
    """The same numbers, without those that take most of the time: areas, calibration, and all that is not looked at here."""
    right = [head.argmax(axis=1) == truth for head in heads]
    changes, first = right[1].astype(np.int8) - right[0].astype(np.int8), heads[0]
    blocks: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for weights in units.resampled(truth, RESAMPLES):
        for name, values in (decision_scores(truth, first, weights) | probability_scores(truth, first, weights)).items():
            blocks[name].append(values)
        blocks["difference"].append((changes.astype(np.float32) @ weights).astype(np.float64) / weights.sum(axis=0))
    ones = np.ones((len(truth), 1), np.float32)
    once = decision_scores(truth, first, ones) | probability_scores(truth, first, ones)
    names = [name for name in SHORT if name in once]
    intervals = {name: units.bootstrap(float(once[name][0]), np.concatenate(blocks[name])) for name in names}
    interval = difference_interval(changes, np.concatenate(blocks["difference"]), units)
    p, effect = flip_test(units.sums(changes)), units.design(changes.astype(np.float64))[0]
    counts = int((changes > 0).sum()), int((changes < 0).sum())
    change = Change({"accuracy": {"value": float(changes.mean()), "interval": interval}}, *counts, p, p, [], effect)
    return Judged({"accuracy": units.proportion(right[0]), **intervals, "difference": interval}, p, _decision(change, units))


def _decision(change: Change, units: Units) -> str:
    return judge(change, units, subject="it", cost_ratio=10.0, worthwhile=0.01).decision


def grouped_coverage(population: Grouped, draws: int) -> dict[str, float]:
    """Share of intervals with the true value, and of wrong verdicts: with the groups known and, as ``plain ...``, without."""
    rng = np.random.default_rng(3)
    _, (truth, probabilities), _ = population.draw(rng, TRUE // population.size)
    once = weighted_scores(truth, probabilities, np.ones((len(truth), 1), np.float32))
    known = {name: float(value) for name, (value,) in once.items()} | {"difference": 0.0}
    known["accuracy"] = float((probabilities.argmax(axis=1) == truth).mean())
    held: defaultdict[str, list[bool]] = defaultdict(list)
    for number in range(draws):
        groups, (truth, probabilities), ((_, others),) = population.draw(rng, population.groups, heads=2)
        heads, units = (probabilities, others), Units.of_groups(groups)
        ways = {"": (judged if number < PLAIN else judged_in_short)(truth, heads, units)}
        if number < PLAIN and population.size > 1:
            ways["plain "] = judged(truth, heads, Units.each(len(truth)))
        for way, result in ways.items():
            for name, interval in result.intervals.items():
                if interval:
                    held[way + name].append(interval[0] - 1e-9 <= known[name] <= interval[1] + 1e-9)
            held[f"{way}test"].append(result.p < 0.05)
            held[f"{way}worth"].append(result.decision == WORTH)
    return {name: float(np.mean(values)) for name, values in held.items()}


def groups_report(draws: int) -> str:
    rows = []
    for population in GROUPED:
        shown = grouped_coverage(population, draws)
        plain = {name: f" ({100 * shown[f'plain {name}']:.0f} %)" if f"plain {name}" in shown else "" for name in IN_GROUPS}
        rows.append([population, *(f"{100 * shown[name]:.1f} %{plain[name]}" for name in IN_GROUPS)])
        print(*rows[-1], flush=True)
    full = min(draws, PLAIN)
    return _table(f"{draws} draws of each, {full} for ROC-AUC and, in brackets, if groups are not known.", IN_GROUPS, rows)


def _table(text: str, columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> str:
    lines = [["groups of images, correlation", *columns.values()], ["---"] * (len(columns) + 1), *rows]
    return "\n".join([f"{date.today()}, {text}", "", *(f"| {' | '.join(map(str, cells))} |" for cells in lines)])


class Nearest(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The class whose mean is nearest: a head that is fitted in no time."""

    def fit(self, X: NDArray[np.float32], y: NDArray[np.str_], **_: object) -> Nearest:
        self.classes_ = np.unique(y)
        self.means = np.stack([X[y == label].mean(axis=0) for label in self.classes_])
        return self

    def places(self, X: NDArray[np.float32]) -> NDArray[np.intp]:
        return np.asarray(((self.means**2).sum(axis=1)[:, None] - 2 * self.means @ X.T).argmin(axis=0))

    def predict(self, X: NDArray[np.float32]) -> NDArray[np.str_]:
        return np.asarray(self.classes_[self.places(X)])


def curve_coverage(population: Grouped, draws: int) -> dict[str, float]:
    """Share of intervals of few-shot and label curves with the true value; training images are of three times as many groups.

    A few-shot curve is for other training images, and a label curve for other draws from these.
    """
    rng = np.random.default_rng(4)
    everyone = Grouped(10_000, 1, 0.0).photos(rng, 10_000)
    truth = np.unique(everyone.y, return_inverse=True)[1]

    def accuracy(X: NDArray[np.float32], y: NDArray[np.str_]) -> float:
        return float((Nearest().fit(X, y).places(everyone.X) == truth).mean())

    def few() -> float:
        pool = Grouped(100, 1, 0.0).photos(rng, 100)
        rows = np.concatenate([np.flatnonzero(pool.y == label)[:SHOTS] for label in np.unique(pool.y)])
        return accuracy(pool.X[rows], pool.y[rows])

    true = float(np.mean([few() for _ in range(1000)]))
    held: defaultdict[str, list[bool]] = defaultdict(list)
    for seed in range(draws):
        train, held_out = population.photos(rng, 3 * population.groups), population.photos(rng, population.groups)
        [point] = learning_curve(Nearest(), train, held_out, [SHOTS], REPEATS, seed=seed)
        held["few"].append(point["accuracy_interval"][0] <= true <= point["accuracy_interval"][1])
        points, gain = measured_curve(Nearest(), train, held_out, seed=seed)
        share, classes = {}, groups_by_class(train)
        for point in points:
            ranked = (shuffled(classes, rng) for _ in range(OTHERS if point["share"] < 1 else 1))
            rows = [rows_of(train, each, point["share"]) for each in ranked]
            share[point["share"]] = float(np.mean([accuracy(train.X[each], train.y[each]) for each in rows]))
            low, high = point["accuracy_interval"]
            held[str(point["share"])].append(low <= share[point["share"]] <= high)
        low, high = gain["interval"]
        held["gain"].append(low <= share[1.0] - share[0.5] <= high)
    return {name: float(np.mean(values)) for name, values in held.items()}


def curves_report(draws: int) -> str:
    rows = []
    for population in GROUPED:
        each = curve_coverage(population, draws)
        rows.append([population, *(f"{100 * each[name]:.1f} %" for name in CURVES)])
        print(*rows[-1], flush=True)
    return _table(f"{draws} draws of each.", CURVES, rows)


def number_coverage(population: Grouped, draws: int) -> dict[str, float]:
    """Share of intervals of scores with the true value, and of prediction intervals with the true number of a new image.

    The latter are for noise that grows with the number: over all, for the fifths of least and most noise, and how far they vary
    by data set, measured and as it was said.
    """
    rng = np.random.default_rng(5)
    _, (values, truth, uneven) = Grouped(TRUE, 1, 0.0).numbers(rng, TRUE)
    once = regression.weighted_scores(truth, values, np.ones((TRUE, 1), np.float32))
    known = {name: float(each[0, 0]) for name, each in once.items()}
    values, far = values[: TRUE // 20], np.abs(values - uneven)[: TRUE // 20, 0]
    fifth = np.digitize(values[:, 0], np.quantile(values, [0.2, 0.4, 0.6, 0.8]))
    held: defaultdict[str, list[Any]] = defaultdict(list)
    for _ in range(draws):
        units, (predicted, true, uneven) = population.numbers(rng, population.groups)
        for name, entry in regression.measure(true, predicted, ["x"], units=units).per_output[0]["scores"].items():
            low, high = entry["interval"]
            held[name].append(low <= known[name] <= high)
        intervals = regression.Intervals.fit(predicted, predicted - uneven, units=units)
        inside = far <= intervals.half_widths(values)[:, 0]
        held["all"].append(inside.mean())
        held["fifths"].append([inside[fifth == part].mean() for part in range(5)])
        held["said"].append(spread(intervals.coverage, intervals.effective or len(true)))
    fifths = np.mean(held["fifths"], axis=0)
    facts = {name: float(np.mean(values)) for name, values in held.items() if name != "fifths"}
    return {**facts, "first": fifths[0], "last": fifths[4], "spread": float(np.std(held["all"]))}


def numbers_report(draws: int) -> str:
    rows = []
    for population in GROUPED:
        each = number_coverage(population, draws)
        cells = [f"{100 * each[name]:.1f} %" for name in (*NUMBERS, "all", "first", "last")]
        rows.append([population, *cells, f"{100 * each['spread']:.1f} ({100 * each['said']:.1f})"])
    more = {
        "all": "prediction intervals",
        "first": "of the quietest fifth",
        "last": "of the noisiest",
        "spread": "spread (said)",
    }
    return _table(f"{draws} draws of each.", NUMBERS | more, rows)


def grouped_set_coverage(population: Grouped, draws: int) -> dict[str, float]:
    """Share of new images whose set has the true label: over all, of the classes by their own thresholds; and its spread."""
    rng, k = np.random.default_rng(6), len(population.prior)
    truth, probabilities = Grouped(1, 1, 0.0).draw(rng, TRUE // 20)[1]
    held: defaultdict[str, list[Any]] = defaultdict(list)
    for _ in range(draws):
        groups, (targets, outputs), _ = population.draw(rng, population.groups)
        conformal = Conformal.fit(outputs, targets, units=Units.of_groups(groups))
        for kind in KINDS:
            covered = conformal.sets(probabilities, kind)[np.arange(len(truth)), truth]
            held[kind].append(np.bincount(truth, covered, minlength=k) / np.bincount(truth))
            held[f"all {kind}"].append(covered.mean())
        held["said"].append(spread(conformal.coverage, conformal.effective or len(targets)))
    by_class = np.mean(held["per_class"], axis=0)
    facts = {name: float(np.mean(held[name])) for name in ("all marginal", "all per_class", "said")}
    return {**facts, "least": by_class.min(), "most": by_class.max(), "spread": float(np.std(held["all marginal"]))}


def sets_report(draws: int) -> str:
    names = {"all marginal": "90 % sets", "least": "by class: least", "most": "by class: most"}
    rows = []
    for population in GROUPED:
        each = grouped_set_coverage(population, draws)
        cells = [f"{100 * each[name]:.1f} %" for name in names]
        rows.append([population, *cells, f"{100 * each['spread']:.1f} ({100 * each['said']:.1f})"])
    return _table(f"{draws} draws of each.", {**names, "spread": "spread of the first, points (said)"}, rows)


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
    "sets": (DOCS / "metrics.md", sets_report),
    "numbers": (DOCS / "metrics.md", numbers_report),
    "curves": (DOCS / "metrics.md", curves_report),
    "pairs": (DOCS / "compare.md", pairs_report),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="of each population (default 1000: about half an hour)")
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
