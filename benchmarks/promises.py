"""How far the promises of heads hold on real photos and on draws: calibration of the mlp, class weights, novelty, int8.

Run by ``make bench``; rewrites its tables in docs/heads.md, docs/metrics.md and docs/int8.md. Photos and weights are those of
heads.py; without them the tables that need them stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from classifiers.bundles.novelty import Novelty
from classifiers.evaluation.probabilities import fit_temperature, log_loss, softmax
from classifiers.evaluation.scores import classwise_calibration_error
from classifiers.evaluation.units import Units
from classifiers.heads.folds import stratified_folds
from classifiers.heads.logistic import LogisticHead
from classifiers.heads.mlp import MlpHead
from classifiers.training.int8_check import FOLDS, MAX_LOSS, change_interval
from store.cache import Subset

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from benchmarks.heads import ASSETS, embedded, hymenoptera  # noqa: E402

DOCS = REPO / "docs"
BEGIN, END = "<!-- {}: made by `make bench` -->", "<!-- end -->"

Floats = NDArray[np.float32]
Labels = NDArray[np.intp]
Part = tuple[Floats, Labels]


def together(first: Part, second: Part) -> Part:
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def calibrated(head: MlpHead, train: Part, held: Part, validation: Part | None = None) -> tuple[float, float, float]:
    """Log-loss on held-out images, the least that another temperature gives there, and the coverage of the 90 % sets."""
    fitted = head.fit(*train, validation=validation)
    X, truth = held
    logits = fitted.fitted_.logits(X)
    assert fitted.temperature_ is not None
    assert fitted.conformal_ is not None
    least = log_loss(logits / fit_temperature(logits, truth), truth)
    sets = fitted.conformal_.sets(softmax(logits / np.float32(fitted.temperature_)))
    return log_loss(logits / fitted.temperature_, truth), least, float(sets[np.arange(len(truth)), truth].mean())


def mlp_report(draws: int) -> str:
    train, held = hymenoptera()
    own = together(train, held)

    def divided(seed: int, *sizes: int) -> list[Part]:
        parts = np.split(np.random.default_rng(seed).permutation(len(own[1])), np.cumsum(sizes))
        return [(own[0][rows], own[1][rows]) for rows in parts]

    def of_245(seed: int) -> tuple[float, float, float]:
        return calibrated(MlpHead(seed=seed), *divided(seed, 245))

    def of_196_and_49(seed: int) -> tuple[float, float, float]:
        fitted, validation, others = divided(seed, 196, 49)
        return calibrated(MlpHead(seed=seed), fitted, others, validation)

    cases: dict[str, Callable[[int], tuple[float, float, float]]] = {
        "245 photos, the division of the data set, by seed": lambda seed: calibrated(MlpHead(seed=seed), train, held),
        "245 photos, divided at random": of_245,
        "196 and 49 to validate, divided at random": of_196_and_49,
    }
    lines = [
        f"{date.today()}, {draws} draws of each, on the other 153 photos.",
        "",
        "| ants and bees | log-loss, mean | lowest to highest | over that of the best temperature | 90 % sets hold |",
        "|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        losses, least, held = np.array([case(seed) for seed in range(draws)]).T
        spread = f"{losses.min():.3f} to {losses.max():.3f}"
        ratio = losses.mean() / least.mean()
        lines.append(f"| {name} | {losses.mean():.3f} | {spread} | {ratio:.2f} | {100 * held.mean():.1f} % |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def weights_report(draws: int) -> str:
    """One class of two has 5 % of the images: a weighed head, and its probabilities corrected to the shares in training."""
    found: dict[str, list[list[float]]] = {"unweighed": [], "`--class-weight balanced`": [], "corrected to the shares": []}
    for seed in range(draws):
        rng = np.random.default_rng(seed)

        def draw(n: int, rng: np.random.Generator = rng) -> Part:
            truth = (rng.random(n) < 0.05).astype(np.intp)
            X = rng.normal(size=(n, 32)).astype(np.float32)
            X[:, 0] += 1.8 * truth
            return X, truth

        (X, y), (held, truth) = draw(1000), draw(20_000)
        plain, weighed = LogisticHead().fit(X, y), LogisticHead(class_weight="balanced").fit(X, y)
        scores = weighed.predict_proba(held)
        corrected = scores * np.bincount(y) / len(y)
        corrected /= corrected.sum(axis=1, keepdims=True)
        for name, p in zip(found, (plain.predict_proba(held), scores, corrected), strict=True):
            called = p[:, 1] > 0.5
            classwise = classwise_calibration_error(truth, p)
            found[name].append(
                [p[:, 1].mean(), p[called, 1].mean(), truth[called].mean(), classwise, called[truth == 1].mean()]
            )
    lines = [
        f"{date.today()}, {draws} draws of 1,000 training images, 5 % of them positive, on 20,000 others; logistic head.",
        "",
        "| probabilities | mean p (truth: 0.05) | mean p of those called positive | share of these that are | class-wise ECE "
        "| positive images that are found |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        mean, called, true, classwise, recall = np.nanmean(values, axis=0).tolist()
        lines.append(f"| {name} | {mean:.2f} | {called:.2f} | {true:.2f} | {classwise:.3f} | {100 * recall:.0f} % |")
    return "\n".join(lines)


def as_subset(X: Floats, y: Labels) -> Subset:
    names = [str(i).encode() for i in range(len(X))]
    return Subset(X.astype(np.float32), y.astype(str), names, names, names)


def novelty_report(draws: int) -> str:
    X, y = together(*hymenoptera())
    others = embedded(sorted((ASSETS / "data/photos").iterdir()))
    digits, digit = load_digits(return_X_y=True)

    def bees(rare: int, rng: np.random.Generator) -> tuple[Part, Floats, Floats]:
        ants, own = (rng.permutation(np.flatnonzero(y == k)) for k in range(2))
        rows = np.concatenate([ants[:124], own[:rare]])
        return (X[rows], y[rows]), X[own[rare:]], others

    def written(rare: int, rng: np.random.Generator) -> tuple[Part, Floats, Floats]:
        new, few, *usual = rng.permutation(10).tolist()
        own = rng.permutation(np.flatnonzero(digit == few))
        rows = np.concatenate([own[:rare], *(rng.permutation(np.flatnonzero(digit == k))[:100] for k in usual)])
        return (digits[rows], digit[rows]), digits[own[rare:]], digits[digit == new]

    cases = [
        *((f"124 ants, {rare} bees; 250 photos of other things", bees, rare) for rare in (124, 12, 6, 3)),
        *((f"100 of each of eight digits, {rare} of a ninth; the tenth", written, rare) for rare in (100, 30, 15, 5)),
    ]
    lines = [
        f"{date.today()}, {draws} draws of each; in brackets with one bound for all classes.",
        "",
        "| training images; novel ones | new images of the rare class called unlike | novel images found |",
        "|---|---|---|",
    ]
    for name, draw, rare in cases:
        shares = []
        for seed in range(draws):
            train, fresh, novel = draw(rare, np.random.default_rng(seed))
            detector = Novelty.fit([as_subset(*train)])
            assert detector is not None
            common = Novelty(detector.reference, detector.usual, detector.own[:0], detector.bounds[:0])
            parts = [part.astype(np.float32) for part in (fresh, novel)]
            shares.append([np.mean(each.scores(part) > 1) for part in parts for each in (detector, common)])
        alarms, alarms_common, seen, seen_common = (100 * np.mean(shares, axis=0)).tolist()
        lines.append(f"| {name} | {alarms:.1f} % ({alarms_common:.0f} %) | {seen:.0f} % ({seen_common:.0f} %) |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def int8_report(draws: int) -> str:
    """Gaussian classes; rounding is noise of another size on all features."""
    lines = [
        f"{date.today()}, {draws} draws of each; logistic head, two classes, 16 features.",
        "",
        "| images | noise over the spread of features | mean cost, points | refused by what was observed | refused |",
        "|---|---|---|---|---|",
    ]
    for n in (60, 245, 384):
        for noise in (0.1, 1.0, 2.0):
            lost, before, now = [], 0, 0
            for seed in range(draws):
                rng, targets = np.random.default_rng(seed), np.arange(n) % 2
                X = rng.normal(size=(n, 16)).astype(np.float32)
                X[:, 0] += 2 * targets - 1
                worse = (X + noise * rng.normal(size=X.shape)).astype(np.float32)
                head, folds = LogisticHead(C=0.1, cv=[]).fit(X, targets), stratified_folds(targets, None, FOLDS, 0)
                judged = np.concatenate([test for _, test in folds])
                exact, rounded = (
                    np.concatenate(
                        [head.refit(rows[a], targets[a]).logits(rows[b]).argmax(axis=1) == targets[b] for a, b in folds]
                    )
                    for rows in (X, worse)
                )
                cost = int(exact.sum()) - int(rounded.sum())
                lost.append(100 * cost / n)
                before += cost > 1 and cost > MAX_LOSS * n
                now += change_interval(exact, rounded, targets[judged], Units.each(n))[1] < -MAX_LOSS
            cells = (f"{np.mean(lost):.1f}", f"{100 * before / draws:.0f} %", f"{100 * now / draws:.0f} %")
            lines.append(f"| {n} | {noise:g} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


REPORTS = {
    "mlp": (DOCS / "heads.md", mlp_report, 10),
    "weights": (DOCS / "heads.md", weights_report, 20),
    "rare": (DOCS / "metrics.md", novelty_report, 50),
    "judge": (DOCS / "int8.md", int8_report, 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="of each case (default: by table, about ten minutes)")
    parser.add_argument("--only", choices=REPORTS, help="this table alone")
    options = parser.parse_args()
    for name, (page, text, draws) in REPORTS.items():
        if options.only not in (None, name):
            continue
        try:
            table = text(options.draws or draws)
        except FileNotFoundError as error:
            print(f"{name} is left out: no {error}", flush=True)
            continue
        begin = BEGIN.format(name)
        before, _, rest = page.read_text("utf-8").partition(begin)
        page.write_text(f"{before}{begin}\n\n{table}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
