"""Images that are right and wrong together count together: in intervals, tests, verdicts, and in what is said of them."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t

import classifiers
from classifiers.bundles.bundle import Bundle
from classifiers.comparison.verdict import UNKNOWN, WORTH, judge
from classifiers.evaluation.conformal import Conformal, bound
from classifiers.evaluation.gates import GATES
from classifiers.evaluation.intervals import Z95, resampled, wilson
from classifiers.evaluation.paired_tests import difference_interval, flip_test, paired
from classifiers.evaluation.registry import task_of
from classifiers.evaluation.single_label import score
from classifiers.evaluation.units import Units
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.manifest import Manifest
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from tests.conftest import MakeDataset

Penult = Callable[..., tuple[int, str, str]]


def together(groups: int, size: int) -> Units:
    return Units(np.repeat(np.arange(groups), size))


def patients(rng: np.random.Generator, groups: int, size: int, correlation: float, share: float) -> NDArray[np.bool_]:
    """Whether images are right, of patients whose own shares vary (beta-binomial)."""
    weight = (1 - correlation) / correlation
    own = rng.beta(share * weight, (1 - share) * weight, groups)
    return rng.random(groups * size) < np.repeat(own, size)


def test_independent_images_are_judged_as_ever() -> None:
    truth, groups = np.arange(40) % 3, [bytes([i]) for i in range(40)]
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 40).astype(np.float32)
    labels, classes = np.array(["a", "b", "c"])[truth], ["a", "b", "c"]
    one, other = score(labels, probabilities, classes, units=Units.of_groups(groups)), score(labels, probabilities, classes)
    assert one == other
    assert one.groups is None
    units = Units.of_groups(groups)
    assert (units.single, units.phrase, units.reach, units.notes) == (True, "40 images", Z95, [])
    assert units.proportion(truth == 0) == wilson(14, 40)
    drawn = zip(units.resampled(truth, 50), resampled(truth, 50), strict=True)
    assert all((a == b).all() for a, b in drawn)


@pytest.mark.parametrize(("groups", "size"), [(10, 30), (20, 15), (50, 6)])
def test_the_interval_holds_the_truth_where_images_of_a_patient_are_alike(groups: int, size: int) -> None:
    """benchmarks/coverage.py measures all scores; this is the mechanism."""
    rng, units, held = np.random.default_rng(groups), together(groups, size), []
    for _ in range(400):
        right = patients(rng, groups, size, 0.3, 0.85)
        bounds = units.proportion(right), wilson(int(right.sum()), len(right))
        held.append([low <= 0.85 <= high for low, high in bounds])
    ours, plain = np.mean(held, axis=0)
    assert 0.89 <= ours <= 0.98
    assert plain < ours - 0.08


def test_the_design_effect_is_the_variance_between_groups_over_that_of_images() -> None:
    alike = np.repeat([1.0, 0.0], 50)  # each of ten groups is all right or all wrong: ten images' worth
    effect, z = together(10, 10).design(alike)
    assert effect == 10
    assert z == pytest.approx(t.ppf(0.975, 9))
    mixed = np.tile([1.0, 0.0], 50)  # every group is half right: no more than independent images
    assert together(10, 10).design(mixed) == (1.0, Z95)


def test_without_an_error_a_group_counts_as_one_image() -> None:
    low, high = together(10, 20).proportion(np.ones(200, bool))
    z = t.ppf(0.975, 9)
    assert (low, high) == (pytest.approx(10 / (10 + z**2)), 1.0)
    assert together(1, 20).proportion(np.ones(20, bool)) == (0.0, 1.0)


def test_copies_of_an_image_are_one_image() -> None:
    """Ten images in 20 copies each are no 200 images."""
    labels, digests = np.repeat(["a", "b"], 100), [bytes([i]) * 32 for i in range(10) for _ in range(20)]
    probabilities = np.repeat(np.eye(2, dtype=np.float32), 100, axis=0)
    evaluation = score(labels, probabilities, ["a", "b"], "test", units=Units.of_groups(digests))
    assert evaluation.accuracy == 1.0
    assert evaluation.accuracy_interval[0] < 0.7
    assert "of 10 groups" in repr(evaluation)
    assert score(labels, probabilities, ["a", "b"]).accuracy_interval[0] > 0.98


def test_a_resample_draws_whole_groups() -> None:
    units, strata = Units(np.array([0, 0, 1, 1, 2, 3])), np.array([0, 0, 0, 1, 1, 1])
    for weights in units.resampled(strata, 40):
        assert (weights[0] == weights[1]).all()
        assert (weights[2] == weights[3]).all()
        assert ((weights[0] + weights[2]) == 2).all(), "groups 0 and 1 are of the first class"
        assert ((weights[4] + weights[5]) == 2).all()


def signs(balances: NDArray[np.float64]) -> Iterator[float]:
    for choice in itertools.product((1, -1), repeat=len(balances)):
        yield abs(float(np.array(choice) @ balances))


@pytest.mark.parametrize("balances", [[3, 1, -2], [5, 5, 0, 1], [1, 1, 1, -1, 4, -7, 2], [0, 0], [2, 2, 2, 2, 2, 2]])
def test_the_exact_test_exchanges_the_heads_group_by_group(balances: list[float]) -> None:
    numbers = np.array(balances, np.float64)
    all_signs = np.array(list(signs(numbers)))
    assert flip_test(numbers) == pytest.approx((all_signs >= abs(numbers.sum())).mean())
    assert flip_test(-numbers) == pytest.approx(flip_test(numbers))


def test_the_exact_test_of_many_large_groups_is_exact_enough() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(-40, 44, 3000).astype(np.float64)
    normal = 2 * (1 - float(np.vectorize(_normal)(abs(numbers.sum()) / np.sqrt((numbers**2).sum()))))
    assert flip_test(numbers) == pytest.approx(normal, abs=2e-3)


def _normal(z: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(z))


def test_heads_that_differ_by_the_luck_of_patients_are_not_told_apart() -> None:
    """Two equally good heads, of which each is better for some patients: the images alone would prove a difference."""
    rng, units, wrong = np.random.default_rng(1), together(20, 15), np.zeros(2)
    for _ in range(200):
        change = patients(rng, 20, 15, 0.3, 0.85).astype(np.int8) - patients(rng, 20, 15, 0.3, 0.85).astype(np.int8)
        wrong += [flip_test(each) < 0.05 for each in (units.sums(change), change.astype(np.float64))]
    ours, plain = wrong / 200
    assert ours <= 0.08
    assert plain > 0.2
    narrow, strata = Units.each(300), np.zeros(300, np.intp)
    drawn, alone = (
        np.concatenate([change @ weights / weights.sum(axis=0) for weights in each.resampled(strata, 300)])
        for each in (units, narrow)
    )
    low, high = difference_interval(change, drawn, units)
    plain_low, plain_high = difference_interval(change, alone, narrow)
    assert high - low > 1.5 * (plain_high - plain_low)
    assert difference_interval(change, drawn, together(1, 300)) == (-1.0, 1.0)


def outputs(right: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Probabilities of a head that is right on these images, all of which are of the first class."""
    return np.where(right[:, None], [0.9, 0.1], [0.1, 0.9]).astype(np.float32)


@pytest.mark.parametrize(("groups", "decision"), [(7, UNKNOWN), (60, WORTH)])
def test_too_few_groups_decide_nothing(groups: int, decision: str) -> None:
    units, truth = together(groups, 20), np.zeros(groups * 20, np.intp)
    worse = np.arange(groups * 20) % 20 < 12
    change = paired(truth, [outputs(worse), outputs(np.ones_like(worse))], ["a", "b"], 0, units)[0][1].change
    assert change is not None
    verdict = judge(change, units, subject="fine-tuning", cost_ratio=5.0, worthwhile=0.01)
    assert verdict.decision == decision
    if units.few:
        assert "cannot be told with 140 images of 7 groups; 10 groups are the least that can show it" in verdict.sentence
    evaluation = task_of("single-label", ["a", "b"]).score(np.repeat(["a"], len(truth)), outputs(worse), "test", units)
    said = [note for note in evaluation.notes if note.startswith("nothing can be told from 140 images of 7 groups")]
    assert bool(said) == units.few


def test_every_task_counts_groups() -> None:
    rng, units = np.random.default_rng(0), together(12, 5)
    right = np.repeat(rng.random(12) < 0.6, 5)
    outputs = np.where(right[:, None], [0.9, 0.8], 0.1)
    task = task_of("multi-label", ["x", "y"])
    tags, alone = (task.score(np.ones((60, 2), bool), outputs, "", each) for each in (units, None))
    noise = np.repeat(rng.normal(size=12), 5)[:, None]
    truth = rng.normal(size=(60, 1))
    numbers, plain = (task_of("regression", ["t"]).score(truth, truth + noise, "", each) for each in (units, None))

    def width(result: object, name: str, j: int | None = None) -> float:
        scores = result.scores if j is None else result.per_output[j]["scores"]  # type: ignore[attr-defined]
        low, high = scores[name]["interval"]
        return float(high - low)

    assert (tags.groups, alone.groups, numbers.groups) == (12, None, 12)
    assert width(tags, "subset_accuracy") > 1.5 * width(alone, "subset_accuracy")
    assert width(tags, "recall", 0) > 1.5 * width(alone, "recall", 0)
    assert width(numbers, "mae", 0) > 1.5 * width(plain, "mae", 0)


def test_what_does_not_hold_with_so_few_groups_is_said() -> None:
    rng, units = np.random.default_rng(0), together(12, 25)
    truth, sure = rng.integers(0, 2, 300), np.repeat(rng.uniform(0.3, 1, 12), 25)
    probabilities = np.where(truth[:, None] == [0, 1], sure[:, None], 1 - sure[:, None])
    conformal = Conformal.fit(probabilities, truth, units=units)
    assert conformal.effective is not None
    assert 10 < conformal.effective < 40
    evaluation = score(np.array(["a", "b"])[truth], probabilities, ["a", "b"], units=units, conformal=conformal)
    assert evaluation.notes[-2:] == [
        "with 12 groups, intervals of macro precision, log-loss and areas under curves hold in about 90 % of cases, "
        "others in 92 to 97",
        f"the prediction sets were calibrated on 300 images of groups, which count as {conformal.effective:.0f} images: "
        f"they hold for 90 ± {100 * np.sqrt(0.09 / conformal.effective):.0f} % (one standard error) of images of other groups",
    ]
    assert (evaluation.sets or {})["spread"] == pytest.approx(np.sqrt(0.09 / conformal.effective))
    assert Conformal.from_json(conformal.to_json()) == conformal
    alone = Conformal.fit(probabilities, truth)
    assert "effective" not in alone.to_json()
    assert "spread" not in alone.measured(probabilities, truth, units)


def test_a_bound_counts_whole_groups_where_their_images_are_alike() -> None:
    """One more image is one more group: nine in ten of ten groups is the largest of them, and of eight none."""
    scores = np.repeat(np.arange(10.0), 5)
    assert bound(scores, 0.9, together(10, 5)) == (9.0, 5.0)
    assert bound(scores[:40], 0.9, together(8, 5)) == (math.inf, 5.0)
    assert bound(scores, 0.9, Units.each(50)) == (9.0, 1.0)
    assert bound(scores[:0], 0.9, Units.each(0)) == (math.inf, 1.0)


def test_a_gate_without_an_interval_counts_groups() -> None:
    gate = next(each for each in GATES if each.name == "min_balanced_accuracy_lower")
    metrics = {"n": 200, "split": "test", "scores": {"balanced_accuracy": {"value": 1.0, "interval": None}}}
    assert gate.missed(metrics, 0.95, "--min") is None
    assert "on 200 images of 10 groups of 'test'" in str(gate.missed({**metrics, "groups": 10}, 0.95, "--min"))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, dataset: MakeDataset, backbone: Backbone) -> Path:
    """A cache of 72 photos of 24 patients, with two bundles."""
    folder = tmp_path_factory.mktemp("grouped")
    dataset(folder / "photos", {"ants": 36, "bees": 36})
    lines = [f"photos/{label}/{i:03d}.jpg,{label},{label}{i // 3}" for label in ("ants", "bees") for i in range(36)]
    (folder / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    run_extract(
        Manifest(folder / "list.csv", folder), backbone, folder / "p.cache", Options(test_fraction=0.4, val_fraction=0.2)
    )
    for head in ("centroid", "ridge"):
        classifiers.train(folder / "p.cache", folder / f"{head}.head", head, TrainOptions(thumbnails=False))
    return folder


def test_groups_are_kept_with_predictions_and_said_wherever_a_score_is(grouped: Path, tmp_path: Path, penult: Penult) -> None:
    bundle, other = grouped / "centroid.head", grouped / "ridge.head"
    held = Bundle.load(bundle).predictions()
    assert held.units.sizes.tolist() == [3] * held.units.count
    phrase = held.units.phrase
    assert re.fullmatch(r"\d+ images of \d+ groups", phrase)
    assert phrase in repr(Bundle.load(bundle))
    for arguments in (("evaluate", bundle, grouped / "p.cache"), ("compare", bundle, other)):
        code, out, _ = penult(*arguments)
        assert code == 0
        assert phrase in out, out
        assert json.loads(penult(*arguments, "--json")[1])["groups"] == held.units.count
    assert "exact test that exchanges the heads group by group" in penult("compare", bundle, other)[1]
    assert penult("report", bundle, "-o", tmp_path / "page.html")[0] == 0
    assert f"of {held.units.count} groups" in (tmp_path / "page.html").read_text()
    metrics = Bundle.load(bundle).metrics or {}
    curve = classifiers.compare([bundle, other], curve=FeatureCache(grouped / "p.cache")).curve
    assert curve is not None
    assert curve.points[-1]["accuracy_interval"] == pytest.approx(tuple(metrics["accuracy_interval"]))
    train, test = (FeatureCache(grouped / "p.cache").subset(split) for split in ("train", "test"))
    assert classifiers.evaluate(classifiers.CentroidHead().fit(train.X, train.y), test).groups == held.units.count


def test_bundles_from_before_are_compared_by_the_groups_of_the_other(grouped: Path, tmp_path: Path) -> None:
    import h5py

    from classifiers.bundles.predictions import ENCODING_TYPE
    from store.format import hdf5
    from tests.conftest import seal

    old = Path(shutil.copytree(grouped / "centroid.head", tmp_path / "old.head"))
    with h5py.File(old / "predictions.h5") as file:
        datasets = {name: file[name][()] for name in file if not name.startswith("group")}
        rows, split = int(file.attrs["rows"]), file.attrs["split"].decode()
    (old / "predictions.h5").write_bytes(hdf5.build(ENCODING_TYPE, datasets, {"rows": rows, "split": split})[0])
    facts = json.loads((old / "head.json").read_text())
    del facts["files"]["predictions.h5"], facts["metrics"]["groups"]
    (old / "head.json").write_text(json.dumps(facts))
    seal(old)
    assert Bundle.load(old).predictions().units.single
    assert (
        classifiers.compare([old, grouped / "ridge.head"]).groups == classifiers.compare([grouped / "ridge.head", old]).groups
    )
    new = grouped / "ridge.head"
    groups = {classifiers.compare(pair).groups for pair in ([old, new], [new, old])}
    assert groups == {Bundle.load(new).predictions().units.count}


def test_the_names_of_groups_change_nothing() -> None:
    assert Units.of_groups([b"z", b"z", b"a", b"m", b"a"]).of.tolist() == [0, 0, 1, 2, 1]
