"""Heads against each other: planted differences are found, noise is not, and the verdict follows its rule."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.predictions import Predictions
from classifiers.comparison.compare import Comparison, Entrant, compare, compare_entrants
from classifiers.comparison.compare_page import comparison_report, comparison_text
from classifiers.comparison.label_curve import SHARES, _sentence, groups_by_class, label_curve, rows_of, shuffled
from classifiers.comparison.verdict import NOT_WORTH, UNKNOWN, WORTH, Verdict, judge
from classifiers.evaluation.paired_tests import Change, flip_test, holm, needed_images, paired, score_interval
from classifiers.evaluation.units import Units
from classifiers.heads.registry import make_head
from classifiers.training.cost import needed
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache, Subset
from store.errors import BadDataError, FingerprintMismatchError, UsageError
from tests.conftest import seal

Penult = Callable[..., tuple[int, str, str]]
CLASSES = ("ants", "bees", "wasps")


def says(truth: NDArray[np.intp], accuracy: float, seed: int) -> NDArray[np.float32]:
    """Probabilities of a head that is right so often, by chance."""
    rng = np.random.default_rng(seed)
    guess = np.where(
        rng.random(len(truth)) < accuracy, truth, (truth + rng.integers(1, len(CLASSES), len(truth))) % len(CLASSES)
    )
    scores = np.eye(len(CLASSES))[guess] * rng.uniform(1, 3, (len(truth), 1)) + rng.uniform(0, 0.5, (len(truth), len(CLASSES)))
    return np.asarray(np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True), np.float32)


def entrant(
    name: str, truth: NDArray[np.intp], probabilities: NDArray[np.float32], kind: str = "frozen", **seconds: float
) -> Entrant:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(len(truth))]
    predictions = Predictions(digests, [b"x"] * len(truth), np.array(CLASSES)[truth], probabilities, "test")
    cost = {"train_seconds": 1.0, "extract_seconds": 9.0, "images": len(truth), **seconds}
    return Entrant(name, kind, predictions, CLASSES, cost)


def classes_of(n: int) -> NDArray[np.intp]:
    return np.arange(n) % len(CLASSES)


def change_of(found: Comparison, name: str) -> Change:
    change = next(line for line in found.lines if line.name == name).change
    assert change is not None
    return change


# --- statistics ----------------------------------------------------------------------------------------------------------


def exact(wins: int, losses: int) -> float:
    """The test of independent images."""
    return flip_test(np.repeat([1.0, -1.0], [wins, losses]))


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1), (5, 0, 2 / 2**5), (0, 6, 2 / 2**6), (10, 2, 2 * (1 + 12 + 66) / 2**12), (7, 7, 1)]
)
def test_mcnemar_is_the_two_sided_binomial_over_the_disputed_images(wins: int, losses: int, p: float) -> None:
    assert exact(wins, losses) == pytest.approx(p)
    assert exact(losses, wins) == pytest.approx(p)


def test_holm_against_values_by_hand() -> None:
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_needed_images_against_published_examples() -> None:
    # Connor's are 23 and 155; the correction for continuity adds nearly 2 / gain
    assert [needed_images(*each) - 2 / each[1] for each in ((0.5, 0.4), (0.45, 0.15))] == pytest.approx([23, 155], abs=1.5)
    assert needed_images(0.0, 0.02, 0.01) == needed_images(0.02, 0.02, 0.01)
    assert needed_images(0.12, 0.01, 0.01) == np.inf
    assert needed_images(0.12, 0.06, 0.01, comparisons=3) > needed_images(0.12, 0.06, 0.01)


def test_few_disputed_images_prove_nothing_to_the_interval() -> None:
    low, high = score_interval(0, 0, 100)
    assert low == -high
    assert 0.03 < high < 0.04
    low, high = score_interval(0, 4, 153)  # where the bootstrap says [-5.9, -0.7] points, and McNemar's p is 1/8
    assert (low, high) == pytest.approx((-0.0653, 0.0031), abs=1e-4)
    low, high = score_interval(300, 200, 2000)  # with many it is the normal interval
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(500 / 2000**2 - 0.05**2 / 2000), rel=0.02)


def test_identical_predictions_differ_by_nothing() -> None:
    truth = classes_of(60)
    same = says(truth, 0.9, seed=1)
    found = compare_entrants([entrant("a", truth, same), entrant("b", truth, same)])
    change = change_of(found, "b")
    assert [score["value"] for score in change.scores.values()] == [0, 0, 0, 0]
    low, high = change.scores["accuracy"]["interval"]
    assert low == -high
    assert (change.wins, change.losses, change.p, change.p_adjusted) == (0, 0, 1, 1)
    assert all(entry["value"] == 0 for entry in change.per_class)


def test_a_truly_better_head_is_found() -> None:
    truth = classes_of(2000)
    weak, good = (says(truth, accuracy, seed) for accuracy, seed in ((0.85, 1), (0.90, 2)))
    pair = [entrant("frozen", truth, weak), entrant("tuned", truth, good, "fine-tuned", train_seconds=410.0, extract_seconds=0)]
    found = compare_entrants(pair)
    change = change_of(found, "tuned")
    right = [(each.argmax(axis=1) == truth) for each in (weak, good)]
    assert change.scores["accuracy"]["value"] == pytest.approx(right[1].mean() - right[0].mean())
    assert (change.wins, change.losses) == ((right[1] & ~right[0]).sum(), (right[0] & ~right[1]).sum())
    low, high = change.scores["accuracy"]["interval"]
    spread = np.sqrt((change.wins + change.losses) / 2000**2)  # the normal interval, where there are so many
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert low > 0
    assert change.p < 1e-4
    assert change.scores["f1_macro"]["interval"][0] > 0
    assert change.scores["log_loss"]["interval"][1] < 0
    assert sum(entry["wins"] for entry in change.per_class) == change.wins
    verdict = found.lines[1].verdict
    assert verdict is not None
    assert verdict.decision == WORTH
    words = r"fine-tuning changes accuracy by \+\d\.\d points \[\+.*\] and costs 41 times as much: worth it on this data\."
    assert re.fullmatch(words, verdict.sentence)


def test_noise_alone_is_covered_as_often_as_promised() -> None:
    truth, covered = classes_of(150), 0
    for seed in range(60):
        outputs = [says(truth, 0.85, 2 * seed), says(truth, 0.85, 2 * seed + 1)]
        (_, standing), _ = paired(truth, outputs, CLASSES)
        assert standing.change is not None
        low, high = standing.change.scores["accuracy"]["interval"]
        covered += low <= 0 <= high
    assert 54 <= covered < 60


def test_rows_and_classes_in_another_order_change_nothing() -> None:
    truth = classes_of(90)
    first, second = says(truth, 0.8, seed=1), says(truth, 0.9, seed=2)
    plain = compare_entrants([entrant("a", truth, first), entrant("b", truth, second)])
    order, columns = np.random.default_rng(0).permutation(90), [2, 0, 1]
    known = entrant("b", truth, second)
    shuffled = replace(
        known,
        classes=[CLASSES[i] for i in columns],
        predictions=Predictions(
            [known.predictions.sha256[i] for i in order],
            [b"y"] * 90,
            known.predictions.labels[order],
            second[order][:, columns],
            "test",
        ),
    )
    assert compare_entrants([entrant("a", truth, first), shuffled]).to_json() == plain.to_json()


def test_the_same_images_with_other_labels_are_refused() -> None:
    truth = classes_of(30)
    changed = np.where(np.arange(30) == 4, 0, truth)
    with pytest.raises(BadDataError, match=r"a and b were evaluated on the same 30 images, but some labels have changed since"):
        compare_entrants([entrant("a", truth, says(truth, 0.9, 0)), entrant("b", changed, says(truth, 0.9, 0))])


def test_several_comparisons_are_corrected_for() -> None:
    truth = classes_of(300)
    others = [entrant(f"h{i}", truth, says(truth, 0.8 + 0.03 * i, seed=i)) for i in range(4)]
    found = compare_entrants(others, baseline=2)
    assert found.lines[0].name == found.baseline == "h2"
    changes = [line.change for line in found.lines if line.change]
    assert [change.p_adjusted for change in changes] == holm([change.p for change in changes])
    assert "Holm's method for 3 comparisons" in comparison_text(found, width=100)


# --- the verdict ---------------------------------------------------------------------------------------------------------


def verdict(
    value: float, low: float, high: float, ratio: float | None, *, disputed: int = 100, n: int = 1000, p: float = 0.001
) -> Verdict:
    change = Change({"accuracy": {"value": value, "interval": (low, high)}}, disputed // 2, disputed // 2, p, p, [])
    return judge(change, Units.each(n), subject="fine-tuning", cost_ratio=ratio, worthwhile=0.01)


@pytest.mark.parametrize(
    ("given", "decision", "price", "ending"),
    [  # the share, its interval, and the ratio of the costs
        ((0.035, 0.012, 0.058, 41.2), WORTH, "costs 41 times as much", "worth it on this data"),
        ((0.003, -0.004, 0.009, 41), NOT_WORTH, "costs 41 times as much", "not worth it on this data"),
        ((-0.026, -0.06, 0.007, 12), NOT_WORTH, "costs 12 times as much", "not worth it on this data"),
        ((0.005, 0.002, 0.008, 2), NOT_WORTH, "costs 2.0 times as much", "not worth it on this data"),
        ((0.0, -0.004, 0.004, 1.2), NOT_WORTH, "costs about the same", "not worth it on this data"),
        (
            (0.013, -0.004, 0.03, 41),
            UNKNOWN,
            "costs 41 times as much",
            "whether it is worth it cannot be told",
        ),
        ((0.03, 0.01, 0.05, 0.1), WORTH, "costs 10 times less", "the saving is worth it on this data"),
        ((-0.001, -0.008, 0.006, 0.1), WORTH, "costs 10 times less", "the saving is worth it on this data"),
        ((-0.04, -0.06, -0.02, 0.1), NOT_WORTH, "costs 10 times less", "the saving is not worth it on this data"),
        (
            (-0.02, -0.05, 0.01, 0.1),
            UNKNOWN,
            "costs 10 times less",
            "whether the saving is worth it cannot be told",
        ),
        ((0.02, 0.005, 0.035, None), WORTH, "", "worth it on this data"),
    ],
)
def test_each_verdict_in_words(given: tuple[Any, ...], decision: str, price: str, ending: str) -> None:
    found = verdict(*given)
    value, low, high = (100 * each for each in given[:3])
    way, count = {0.013: ("is", 8_000), -0.02: ("is not", 2_100)}.get(given[0], ("", 0))
    if decision == UNKNOWN:
        ending += f" with 1000 images; if this is the true difference, about {count:,} would show that it {way}"
    scores = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]" + (f" and {price}" if price else "")
    assert (found.decision, found.sentence) == (decision, f"fine-tuning changes accuracy by {scores}: {ending}.")
    assert (found.needed is None) == (decision != UNKNOWN)


def test_an_interval_alone_proves_nothing_that_mcnemar_denies() -> None:
    found = verdict(0.033, 0.006, 0.06, 41, disputed=5, n=150, p=0.0625)
    assert found.decision == UNKNOWN
    assert found.needed is not None
    assert found.needed > 150


def test_too_close_to_call_asks_for_no_number_of_images() -> None:
    found = verdict(0.01003, -0.002, 0.018, 41, disputed=100, n=20_000)
    assert (found.decision, found.needed) == (UNKNOWN, None)
    assert found.sentence.endswith("with 20000 images; it is so close to 1 point that 1,000,000 would not be enough.")


def test_few_images_without_a_difference_do_not_claim_one() -> None:
    truth = classes_of(60)
    for n, decision in ((60, UNKNOWN), (3000, NOT_WORTH)):
        truth = classes_of(n)
        same = says(truth, 0.95, seed=0)
        pair = [entrant("a", truth, same), entrant("b", truth, same, train_seconds=400.0)]
        found = compare_entrants(pair).lines[1].verdict
        assert found is not None
        assert found.decision == decision


# --- bundles -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path], backbone: Backbone) -> FeatureCache:
    base = tmp_path_factory.mktemp("compare")
    photos = dataset(base / "photos", {"ants": 20, "bees": 20})
    return extract(ImageFolder(photos), backbone, base / "p.cache", Options(quiet=True))


@pytest.fixture(scope="module")
def bundles(cache: FeatureCache) -> list[Bundle]:
    folder = cache.path.parent
    return [classifiers.train(cache, folder / f"{name}.head", make_head(name, seed=3)) for name in ("logistic", "ridge", "knn")]


def test_bundles_line_up_behind_the_baseline(bundles: Sequence[Bundle]) -> None:
    found = compare(bundles)
    assert found.baseline == "logistic.head"
    assert [line.accuracy for line in found.lines[1:]] == sorted((line.accuracy for line in found.lines[1:]), reverse=True)
    assert found.notes == []
    for line in found.lines:
        extracted, trained = line.cost["extract_seconds"], line.cost["train_seconds"]
        assert line.seconds == pytest.approx(trained + extracted * 32 / 40)  # eight images are held out
        assert (line.cost["images"], line.needed["images"]) == (40, 32)
        metrics = next(bundle.metrics for bundle in bundles if bundle.name == line.name)
        assert metrics is not None
        assert line.accuracy == metrics["accuracy"]
        assert list(line.accuracy_interval) == metrics["accuracy_interval"]
        for name in ("f1_macro", "log_loss", "brier", "ece"):
            assert line.scores[name] == pytest.approx(metrics["scores"][name]["value"], abs=1e-6)
        assert line.cost["peak_memory"] > 2**20
        assert line.cost["energy"] is None
    assert compare(bundles, against="knn.head").baseline == "knn.head"
    assert compare(bundles, against=str(bundles[1].path)).baseline == "ridge.head"
    old = replace(bundles[1], kind="fine-tuned", hyperparameters={"temperature": None, "init_head": "knn.head"})
    uneven = compare([old, bundles[0]])
    assert uneven.baseline == "logistic.head"
    assert [note.partition(",")[0].partition(";")[0] for note in uneven.notes] == [
        "ridge.head: fitted on fewer images than the others",
        "ridge.head: without a temperature",
        "ridge.head: started from knn.head",
    ]
    assert uneven.to_json()["notes"] == uneven.notes
    assert all(note in comparison_text(uneven, width=100) for note in uneven.notes)
    alike = Entrant.of(old)
    assert compare_entrants([alike, replace(alike, name="another")]).notes == []  # it is the same for all
    with pytest.raises(UsageError, match=r"--against x: 0 of the bundles have this name; expected one of .*logistic.head"):
        compare(bundles, against="x")


def test_what_a_head_needs() -> None:
    cost = {"extract_seconds": 10.0, "train_seconds": 2.0, "images": 100, "energy": 50.0, "extract_energy": 40.0}
    frozen = needed(cost, 0.6)
    assert frozen == {"extract_seconds": 6.0, "train_seconds": 2.0, "images": 60, "energy": 34.0}
    tuned = {"extract_seconds": 0.0, "train_seconds": 90.0, "images": 500, "energy": None}
    assert needed(tuned) == tuned
    expected = {"extract_seconds": 8.0, "train_seconds": 90.0, "images": 560, "energy": 34.0}
    assert needed({**tuned, "init_head": frozen}) == expected


def test_bundles_of_one_name_are_told_apart(bundles: Sequence[Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles[1].path, tmp_path / "logistic.head")
    other = Bundle.load(tmp_path / "logistic.head")
    assert {line.name for line in compare([bundles[0], other]).lines} == {str(bundles[0].path), str(other.path)}


def test_old_bundles_know_less_and_compare(bundles: Sequence[Bundle], cache: FeatureCache, tmp_path: Path) -> None:
    shutil.copytree(bundles[0].path, tmp_path / "old.head")
    facts = json.loads((tmp_path / "old.head/head.json").read_text())
    del facts["cost"]["peak_memory"], facts["cost"]["energy"], facts["hyperparameters"]["asked"]
    facts["metrics"].pop("scores")
    (tmp_path / "old.head/head.json").write_text(json.dumps(facts))
    seal(tmp_path / "old.head")
    found = compare([Bundle.load(tmp_path / "old.head"), bundles[1]], curve=cache)
    assert found.curve is not None
    assert " GB\n" in comparison_text(found, width=100)
    assert comparison_report(found)


def test_the_command(penult: Penult, bundles: Sequence[Bundle], cache: FeatureCache, tmp_path: Path) -> None:
    paths, page = [bundle.path for bundle in bundles], tmp_path / "report.html"
    code, out, _ = penult("compare", *paths, "--against", "ridge.head", "--curve", cache.path, "-o", page)
    assert code == 0
    assert "knn.head changes accuracy by" in out
    assert "training images accuracy changed by" in out
    assert "Is it worth it?" in page.read_text()
    code, out, _ = penult("compare", *paths, "--json", "--worthwhile", "2.5")
    facts = json.loads(out)
    assert (facts["baseline"], facts["n"], facts["worthwhile"]) == ("logistic.head", 8, 0.025)
    assert facts["bundles"][0]["name"] == "logistic.head"
    assert facts["bundles"][1]["verdict"]["sentence"]
    other = classifiers.train(cache, tmp_path / "other.head", make_head("ridge"), TrainOptions(test_fraction=0.3))
    code, _, err = penult("compare", paths[0], other.path)
    assert (code, "they cannot be compared" in err) == (65, True)
    assert penult("compare", paths[0], paths[1], "--worthwhile", "0")[0] == 2


@pytest.mark.parametrize("width", [44, 80, 100])
def test_the_text_fits(bundles: Sequence[Bundle], width: int) -> None:
    lines = comparison_text(compare(bundles), width=width).splitlines()
    sentences = [line for line in lines if re.search("[:;] ", line)]
    assert len(sentences) == 3  # what the tables are, and two verdicts
    assert all(len(line) <= width for line in lines if line not in sentences)


def test_at_100_columns_both_tables_stand_upright(bundles: Sequence[Bundle]) -> None:
    cost = {"energy": 150_000.0, "peak_memory": 12 * 10**9, "train_seconds": 4100.0, "extract_seconds": 512.0, "images": 90_000}
    lines = [replace(line, name=f"a-long-name-of-{line.name}", cost=cost, needed=cost) for line in compare(bundles).lines]
    text = comparison_text(replace(compare(bundles), lines=lines), width=100)
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(" bundle")] == ["cost", "energy"]
    assert len(re.findall("12.0 GB   150 kJ$", text, re.MULTILINE)) == len(lines)


# --- the page ------------------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>$\\frac{a}$"


def test_the_page_loads_nothing_and_takes_no_name_for_markup(bundles: Sequence[Bundle], cache: FeatureCache) -> None:
    found = compare(bundles, curve=cache)
    history = [{"epoch": 0, "val_loss": 0.9, "val_accuracy": 0.5}]
    history += [{"epoch": i, "train_loss": 1 / i, "val_loss": 0.8 / i, "val_accuracy": 0.9} for i in (1, 2)]
    lines = [found.lines[0], *(replace(line, name=HOSTILE, kind="fine-tuned", history=history) for line in found.lines[1:])]
    hostile = replace(found, lines=lines, classes=[HOSTILE, "_bees"])
    html = comparison_report(hostile, notes=["<script>alert(1)</script>"], title=HOSTILE)
    assert "<script" not in html
    assert "<img" not in html
    assert not re.search(r"(?:src|href)=\"(?!#)", html)
    assert "://" not in html.replace("http://www.w3.org", "")
    for heading in (
        "Is it worth it?",
        "Differences",
        "Accuracy and cost",
        "Loss by epoch",
        "Would more labels help?",
        "Per class",
    ):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<h2>Reliability of") == 3
    assert html == comparison_report(hostile, notes=["<script>alert(1)</script>"], title=HOSTILE)


def test_heads_that_agree_on_everything_make_a_page_too() -> None:
    truth = classes_of(60)
    same = says(truth, 0.9, seed=1)
    found = compare_entrants([entrant("a", truth, same), entrant("b", truth, same, train_seconds=0, extract_seconds=0)])
    assert found.lines[1].verdict is not None
    assert found.lines[1].verdict.cost_ratio is None
    assert "<h2>Classes</h2>" not in comparison_report(found)


# --- more labels ---------------------------------------------------------------------------------------------------------


def test_the_curve_refits_the_same_head_on_shares(bundles: Sequence[Bundle], cache: FeatureCache) -> None:
    assert bundles[0].hyperparameters["asked"] == {"seed": 3}
    curve = label_curve(bundles[0], cache, worthwhile=0.01)
    assert [point["share"] for point in curve.points] == list(SHARES)
    assert [len(point["accuracies"]) for point in curve.points] == [5, 5, 5, 1]
    counts = [point["images"] for point in curve.points]
    assert counts == sorted(counts)
    assert counts[-1] == len(bundles[0].fitted()) == 32
    for point in curve.points:
        low, high = point["accuracy_interval"]
        assert low <= point["accuracy"] <= high
    assert curve.gain["value"] == pytest.approx(curve.points[-1]["accuracy"] - curve.points[-2]["accuracy"])
    assert label_curve(bundles[0], cache, worthwhile=0.01).to_json() == curve.to_json()
    with pytest.raises(UsageError, match="all of these are fine-tuned"):
        compare([replace(bundle, kind="fine-tuned") for bundle in bundles], curve=cache)


def test_the_curve_wants_the_cache_of_the_bundle(
    bundles: Sequence[Bundle], cache: FeatureCache, dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 6, "bees": 6}, seed=1)
    other = extract(ImageFolder(photos), backbone, tmp_path / "o.cache", Options(quiet=True))
    with pytest.raises(BadDataError, match=r"o\.cache lacks 40 images that logistic\.head was trained or measured on"):
        label_curve(bundles[0], other, worthwhile=0.01)
    changed = extract(ImageFolder(photos), backbone, tmp_path / "f.cache", Options(quiet=True, storage="float32"))
    with pytest.raises(FingerprintMismatchError, match=r"holds other features than logistic\.head takes \(storage\)"):
        label_curve(bundles[0], changed, worthwhile=0.01)


def test_draws_divide_no_group_and_hold_the_smaller_ones() -> None:
    groups = [bytes([i // 3]) for i in range(120)]  # forty groups of three
    labels = np.array(["rare" if i < 30 else "common" for i in range(120)])
    train = Subset(np.zeros((120, 1)), labels, groups, groups, groups)
    ranked = shuffled(groups_by_class(train), np.random.default_rng(0))
    assert sorted(map(len, ranked)) == [10, 30]
    drawn = [set(rows_of(train, ranked, share).tolist()) for share in SHARES]
    assert [len(rows) for rows in drawn] == [12, 33, 60, 120]  # a tenth of ten groups and of thirty, and so on, rounded up
    for smaller, larger in pairwise(drawn):
        assert smaller < larger
    for rows in drawn:
        assert all({3 * (i // 3) + j for j in range(3)} <= rows for i in rows)
        assert {labels[i] for i in rows} == {"rare", "common"}


@pytest.mark.parametrize(("groups", "expected"), [(9, 0), (12, 1), (40, 0), (0, 0)])
def test_a_comparison_on_few_groups_says_how_often_its_intervals_hold(groups: int, expected: int) -> None:
    truth = classes_of(80)
    pair = [entrant(name, truth, says(truth, 0.8, seed)) for seed, name in enumerate("ab")]
    if groups:
        of = [b"%d" % (i % groups) for i in range(80)]
        pair = [replace(each, predictions=replace(each.predictions, groups=of)) for each in pair]
    found = compare_entrants([entrant("c", truth, says(truth, 0.8, 2)), *pair])  # the first one knows no groups
    assert found.groups == compare_entrants([*pair]).groups == (groups or None)
    notes = compare_entrants(pair).to_json()["notes"]
    assert len([note for note in notes if "intervals of differences hold in 94 to 98 % of cases" in note]) == expected


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (0.03, (0.01, 0.05), "+3.0 points [+1.0, +5.0]: more labels would help."),
        (0.001, (-0.005, 0.007), "+0.1 points [-0.5, +0.7]: more labels would hardly help."),
        (
            0.01,
            (-0.02, 0.04),
            "+1.0 points [-2.0, +4.0]: whether more labels would help cannot be told with 80 images.",
        ),
    ],
)
def test_whether_more_labels_would_help(value: float, interval: tuple[float, float], expected: str) -> None:
    points = [{"images": 100}, {"images": 200}]
    assert (
        _sentence(points, value, interval, Units.each(80), 0.01)
        == f"From 100 to 200 training images accuracy changed by {expected}"
    )
    twelve = Units(np.repeat(np.arange(12), 7)[:80])
    assert _sentence(points, value, interval, twelve, 0.01).endswith(" hold in 92 to 99 % of cases.")
