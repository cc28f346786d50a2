"""Several backbones side by side: what `-m` means, the scores against their definitions, the ranking, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from classifiers.comparison.ranking import Headline, Line, Ranking, agreement, ranked
from classifiers.comparison.sweep import cache_paths, common_samples, label_of, parse_sources, run_sweep
from classifiers.comparison.transferability import h_scores, log_maximum_evidence, transferability
from classifiers.evaluation.multi_label import MultiLabel
from classifiers.evaluation.regression import Regression
from classifiers.evaluation.single_label import SingleLabel
from classifiers.heads.registry import make_head
from classifiers.training.leaks import look
from classifiers.training.roles import assign_roles
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.errors import BadDataError, OutputExistsError, UsageError
from store.format.samples import Row, SampleTable
from tests.conftest import as_theirs

Penult = Callable[..., tuple[int, str, str]]
RNG = np.random.default_rng(0)


def indicators(labels: NDArray[Any]) -> NDArray[np.float64]:
    return (labels[:, None] == np.unique(labels)).astype(float)


def features(n: int, d: int, kind: str) -> NDArray[np.float64]:
    """Features of a kind that real ones are of, sometimes."""
    rng = np.random.default_rng(n * 1000 + d)
    X = rng.standard_normal((n, d)) * np.geomspace(10, 0.1, d) + 3
    if kind == "columns twice":
        X[:, d // 2 :] = X[:, : d - d // 2]
    if kind == "constant columns":
        X[:, ::3] = 0.1
    return X


def labels_of(X: NDArray[np.float64], classes: int = 3) -> NDArray[np.intp]:
    """Classes that depend on the features, not wholly."""
    rng = np.random.default_rng(len(X))
    return (X[:, :classes] + 5 * rng.standard_normal((len(X), classes))).argmax(axis=1)


def largest_evidence(X: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """By the density of y itself, and a search over both precisions."""

    def against(place: NDArray[np.float64]) -> float:
        alpha, beta = np.exp(place)
        covariance = X @ X.T / alpha + np.eye(len(y)) / beta
        try:
            return -float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))
        except np.linalg.LinAlgError:  # too far out for float64
            return 1e6

    starts = [(a, b) for a in (-4.0, 2.0, 8.0) for b in (0.0, 3.0)]
    options = {"xatol": 1e-5, "fatol": 1e-9, "maxiter": 2000}
    bounds = [(-20, 30), (-20, 30)]
    found = [minimize(against, start, method="Nelder-Mead", bounds=bounds, options=options) for start in starts]
    return -min(float(each.fun) for each in found)


@pytest.mark.parametrize("kind", ["plain", "columns twice", "constant columns"])
@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30), (15, 15)])
def test_logme_is_the_largest_evidence(n: int, d: int, kind: str) -> None:
    X = features(n, d, kind)
    targets = indicators(labels_of(X))
    expected = np.mean([largest_evidence(X, y) for y in targets.T]) / n
    assert log_maximum_evidence(X, targets) == pytest.approx(expected, abs=2e-6)


def test_logme_is_the_largest_of_several_maxima() -> None:
    """One column of ten thousand times another's size, both of which say something: a search from their mean stays at -1.05."""
    X = features(40, 6, "plain") * np.geomspace(1e3, 1e-2, 6)
    score = (X / X.std(axis=0) - (X / X.std(axis=0)).mean(axis=0))[:, [1, 5]].sum(axis=1)
    y = (score + 0.3 * np.random.default_rng(40).standard_normal(40) > 0).astype(float)
    found = log_maximum_evidence(X, y[:, None])
    assert found == pytest.approx(largest_evidence(X, y) / 40, abs=2e-6)
    assert found > -0.8


def test_logme_does_not_depend_on_scale_rotation_or_order() -> None:
    X = features(30, 8, "plain")
    targets = indicators(labels_of(X))
    score = log_maximum_evidence(X, targets)
    turned = X @ np.linalg.qr(RNG.standard_normal((8, 8)))[0]
    order = RNG.permutation(30)
    for same in (1e-4 * X, 1e5 * X, turned, np.hstack([X, np.zeros((30, 5))])):
        assert log_maximum_evidence(same, targets) == pytest.approx(score, abs=1e-8)
    assert log_maximum_evidence(X[order], targets[order]) == pytest.approx(score, abs=1e-8)
    assert log_maximum_evidence(X, 10 * targets) == pytest.approx(score - math.log(10), abs=1e-8)


@pytest.mark.parametrize("X", [np.zeros((20, 4)), np.full((20, 4), 0.1), RNG.standard_normal((20, 400)), np.ones((20, 1))])
def test_logme_of_features_that_say_nothing_is_about_what_no_features_give(X: NDArray[np.float64]) -> None:
    y = np.repeat([0.0, 1.0], 10)[:, None] - 0.5  # a constant feature cannot help where the mean is zero
    nothing = -0.5 * (1 + math.log(2 * math.pi * 0.25))
    assert log_maximum_evidence(X, y) == pytest.approx(nothing, abs=0.1)


def test_logme_of_features_that_determine_the_labels_is_finite() -> None:
    labels = np.repeat([0, 1, 2], 10)
    exact = log_maximum_evidence(np.hstack([indicators(labels), np.ones((30, 1))]), indicators(labels))
    assert 3 < exact < 12
    assert exact > log_maximum_evidence(indicators(labels) + 0.1 * RNG.standard_normal((30, 3)), indicators(labels))


def test_logme_of_targets_without_difference_is_refused() -> None:
    with pytest.raises(BadDataError, match="the same label or number"):
        log_maximum_evidence(np.ones((5, 2)), np.ones((5, 1)))


@pytest.mark.parametrize(("n", "d"), [(60, 5), (15, 40)])
@pytest.mark.parametrize("kind", ["plain", "columns twice", "constant columns"])
def test_h_scores_are_their_definitions(n: int, d: int, kind: str) -> None:
    X = features(n, d, kind)
    labels = labels_of(X)
    means = np.stack([X[labels == label].mean(axis=0) for label in labels])
    between = np.cov(means.T, bias=True)
    plain = np.trace(np.linalg.pinv(np.cov(X.T, bias=True), rcond=1e-12) @ between)
    fitted = LedoitWolf().fit(X)
    shrunk = (1 - fitted.shrinkage_) * np.trace(np.linalg.inv(fitted.covariance_) @ between)
    assert h_scores(X, labels) == pytest.approx((plain, shrunk), rel=1e-6)
    assert n > d or kind != "plain" or plain == pytest.approx(2)  # one less than the classes, whatever the features


def test_h_scores_do_not_depend_on_scale_shift_or_rotation() -> None:
    X = features(40, 8, "plain")
    labels = labels_of(X)
    turned = 100 * X @ np.linalg.qr(RNG.standard_normal((8, 8)))[0] - 7
    assert h_scores(turned, labels) == pytest.approx(h_scores(X, labels), rel=1e-8)
    assert h_scores(X @ RNG.standard_normal((8, 8)), labels)[0] == pytest.approx(h_scores(X, labels)[0], rel=1e-6)


@pytest.mark.parametrize("X", [np.zeros((20, 4)), np.full((20, 3), 0.1), np.full((20, 3), 1e5 + 0.1)])
def test_h_scores_of_constant_features_are_zero(X: NDArray[np.float64]) -> None:
    assert h_scores(X, np.repeat([0, 1], 10)) == (0, 0)


def test_scores_of_float16_features_are_those_of_the_same_numbers() -> None:
    X = features(30, 50, "plain").astype(np.float16)
    labels = labels_of(X.astype(float)).astype(str)
    assert transferability(X, labels, SingleLabel(())) == pytest.approx(
        transferability(X.astype(float), labels, SingleLabel(()))
    )


def test_scores_of_other_tasks() -> None:
    X = features(40, 6, "plain")
    numbers = X[:, :2] * 3 + RNG.standard_normal((40, 2))
    scores = transferability(X, numbers, Regression(()))
    assert (scores["h_score"], scores["h_score_shrunk"]) == (None, None)
    assert transferability(X, 1000 * numbers - 5, Regression(()))["logme"] == pytest.approx(scores["logme"], abs=1e-8)
    other = transferability(X, RNG.standard_normal((40, 2)), Regression(()))["logme"]
    assert other is not None
    assert scores["logme"] is not None
    assert scores["logme"] > other + 0.5
    truth = numbers > 9
    assert transferability(X, truth, MultiLabel(()))["logme"] == pytest.approx(log_maximum_evidence(X, truth))


def line(source: str, value: float, seconds: float, score: float = 0.0, right: list[int] | None = None) -> Line:
    scores: dict[str, float | None] = {"logme": score, "h_score": 1.0, "h_score_shrunk": score}
    rows = None if right is None else np.array(right, bool)
    weighted = None if rows is None else lambda weights: rows.astype(np.float32) @ weights / weights.sum(axis=0)
    return Line(
        source,
        f"{source}.cache",
        "x",
        8,
        100,
        seconds,
        0,
        Headline(value, (value - 0.1, value + 0.1), 50 if right is None else len(right)),
        None,
        scores,
        1,
        1,
        rows,
        weighted=weighted,
    )


def ranking(lines: list[Line]) -> Ranking:
    return Ranking("photos", SingleLabel.name, "logistic", "folds of train", None, ranked(lines))


def test_the_best_comes_first_and_what_is_dominated_is_said() -> None:
    found = ranking(
        [line("slow", 0.9, 20), line("bad", 0.5, 3), line("quick", 0.8, 2), line("best", 0.9, 10), line("twin", 0.8, 2)]
    )
    assert [each.source for each in found.lines] == ["best", "slow", "quick", "twin", "bad"]
    assert found.front() == [True, False, True, True, False]
    assert [row[-1] for row in found.rows()] == ["front", "dominated", "front", "front", "dominated"]
    assert found.exit_code == 0


def test_sources_that_the_images_do_not_tell_from_the_best_are_named() -> None:
    best = [1] * 18 + [0] * 2
    near, far = [0] * 3 + [1] * 16 + [0], [0] * 12 + [1] * 6 + [0] * 2
    found = ranking([line("far", 0.3, 1, right=far), line("near", 0.8, 1, right=near), line("best", 0.9, 1, right=best)])
    # 3 against 1, 12 against 0, and of the other two 10 against 0
    assert found.against_best == pytest.approx([1.0, 0.625, 3 * 2**-11])
    assert any("No significant difference from 1 on these images: 2 (" in note for note in found.notes())
    assert 0.8 < found.expected.value < 0.9  # the second is sometimes chosen
    low, high = found.expected.interval or (0, 0)
    assert (low < 0.8, high) == (True, 1.0)
    assert f"takes some luck: on others, expect {found.text(found.expected)} of 1 (" in found.notes()[1]
    assert found.to_json()["expected"]["value"] == found.expected.value
    alone = ranking([line("best", 0.9, 1, right=best)])
    assert (alone.expected, alone.luck) == (alone.lines[0].choice, [])
    clear = ranking([line("far", 0.3, 1, right=far * 9), line("best", 0.9, 1, right=best * 9)])
    assert clear.expected == clear.lines[0].choice
    assert clear.luck == ["1 leads so clearly that being the best of 2 adds nothing to its accuracy."]


def test_rank_correlation_says_when_it_says_nothing() -> None:
    straight = agreement("logme", [1, 2, 3, 4, 5, 6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert (straight.kendall_tau, straight.spearman_rho) == (pytest.approx(1), pytest.approx(1))
    assert straight.kendall_p == pytest.approx(2 / 720)  # one order of 6! and its reverse
    assert straight.so == "hardly by chance"
    mixed = agreement("logme", [1, 2, 3, 4, 5, 6], [0.3, 0.1, 0.2, 0.6, 0.4, 0.5])
    assert mixed.kendall_tau == pytest.approx(7 / 15)
    assert mixed.so == "may be chance"
    assert agreement("logme", [1, 2, 3, 4], [1, 2, 3, 4]).so == "too few to conclude"
    assert agreement("logme", [1, 2], [1, 2]).kendall_tau is None
    rounding = [1 + i * np.finfo(float).eps for i in range(6)]
    assert agreement("h_score", rounding, [1, 2, 3, 4, 5, 6]).kendall_tau is None
    assert agreement("h_score", [1.0] * 6, [1, 2, 3, 4, 5, 6]).so == "the same for all"


STATED = Backbone("", preset="IMAGENET1K_V1", mean=(0.5,), std=(0.5,), crop=64)


def test_what_is_meant_by_the_sources() -> None:
    wanted = ["resnet18, resnet18@layer3@layer2,theirs@x.onnx", "a/b=c@d.pth.onnx@t:0", "resnet18=w@1-x.pth@layer1"]
    found = parse_sources([*wanted, "resnet18=random:7", '"odd, name.onnx"'], STATED)
    assert [(each.name, each.weights, each.layers) for each in found] == [
        ("resnet18", None, ("layer2", "layer3", "penultimate")),
        ("theirs@x.onnx", None, ()),
        ("a/b=c@d.pth.onnx", None, ("t:0",)),
        ("resnet18", "w@1-x.pth", ("layer1",)),
        ("resnet18", "random:7", ()),
        ("odd, name.onnx", None, ()),
    ]
    assert [each.preset for each in found] == [None, None, None, "IMAGENET1K_V1", None, None]
    assert [each.mean for each in found] == [None, (0.5,), (0.5,), None, None, (0.5,)]
    assert {each.crop for each in found} == {64}
    assert label_of(found[2]) == "b=c@d.pth.onnx"
    assert [path.name for path in cache_paths(found[:3], Path("f"))] == [
        "resnet18@3-layers-0e639c07.cache",
        "theirs@x.onnx.cache",
        "b=c@d.pth.onnx@t_0.cache",
    ]


@pytest.mark.parametrize("text", ["", "resnet18,", "resnet18=", "resnet18@", "@layer1", "=x.pth", "resnet18=V1=V2@"])
def test_sources_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected NAME, NAME=WEIGHTS or FILE"):
        parse_sources([text], Backbone(""))


def test_flags_for_none_of_the_sources_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--preset is for a \.pth file, and -m names none"):
        parse_sources(["resnet18=random", "x.onnx"], Backbone("", preset="IMAGENET1K_V1"))
    with pytest.raises(UsageError, match="--input-range is for an ONNX file"):
        parse_sources(["resnet18"], Backbone("", input_range=255.0))


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"would both be kept in f/x\.onnx\.cache; rename"):
        cache_paths(parse_sources(["a/x.onnx", "b/x.onnx"], Backbone("")), Path("f"))


def test_only_samples_that_all_sources_have_count(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row(f"{i}.jpg".encode(), "a", "train", sha256=bytes([i]) * 32) for i in range(4)]
    lost = Row(b"2.jpg", "a", code="bad_aspect")
    moved = rows[3].with_split("test")
    found = common_samples([SampleTable(rows), SampleTable([*rows[:2], lost, rows[3]]), SampleTable([*rows[:3], moved])])
    assert found.rows == rows[:2]
    assert "2 images are left out" in caplog.text


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose tensor ``pooled`` is the mean colour, ``grey`` a mean of these, and ``one`` always 1."""
    path = tmp_path_factory.mktemp("toy") / "toy.onnx"
    arrays = {
        "sum": np.full((3, 2), 1 / 3, np.float32),
        "none": np.zeros((3, 2), np.float32),
        "ones": np.ones(2, np.float32),
        "last": np.ones((3, 2), np.float32),
    }
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["averaged"]),
        helper.make_node("Flatten", ["averaged"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "sum"], ["grey"]),
        helper.make_node("MatMul", ["pooled", "none"], ["zero"]),
        helper.make_node("Add", ["zero", "ones"], ["one"]),
        helper.make_node("MatMul", ["pooled", "last"], ["classes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("grey", "one", "classes")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    path.with_suffix(".toml").write_text("mean = 0.0\nstd = 1.0\nresize = 16\n")
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reddish and bluish noise: told apart by colour, and not by grey."""
    root, rng = tmp_path_factory.mktemp("colours") / "photos", np.random.default_rng(0)
    for label, tint in (("red", (30, 0, -30)), ("blue", (-30, 0, 30))):
        (root / label).mkdir(parents=True)
        for i in range(40):
            base = np.array([128, 128, 128]) + rng.integers(-40, 40, 3) + tint
            pixels = base + rng.integers(-60, 60, (24, 24, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / label / f"{i:02d}.png")
    return root


def test_the_command_ranks_and_computes_nothing_twice(
    colours: Path, toy: Path, backbone_file: Path, tmp_path: Path, penult: Penult
) -> None:
    folder = tmp_path / "sweep"
    sources = f"{toy}@pooled@grey,{backbone_file},{tmp_path / 'gone.onnx'}"
    code, out, err = penult("sweep", colours, "-m", sources, "-m", f"{toy}@one", "-o", folder, "--json")
    assert code == 3, err
    found = json.loads(out)
    by_source = {each["source"]: each for each in found["sources"]}
    assert set(by_source) == {"toy.onnx@pooled", "toy.onnx@grey", "toy.onnx@one", backbone_file.name}
    assert found["sources"][0]["source"] in ("toy.onnx@pooled", backbone_file.name)
    colour, grey, one = (by_source[f"toy.onnx@{name}"] for name in ("pooled", "grey", "one"))
    assert colour["choice"]["value"] > 0.8 > grey["choice"]["value"] > 0.3
    assert colour["scores"]["logme"] > grey["scores"]["logme"]
    assert one["scores"]["h_score"] == 0
    assert (colour["dim"], grey["dim"], by_source[backbone_file.name]["dim"]) == (3, 2, 512)
    assert colour["extract_seconds"] == grey["extract_seconds"] == one["extract_seconds"] > 0
    assert {each["computed"] for each in found["sources"]} == {80}
    assert {each["choice"]["n"] for each in found["sources"]} == {16}
    assert {each["held_out"]["n"] for each in found["sources"]} == {16}
    assert (found["metric"], found["chosen_on"], found["reported_on"]) == ("accuracy", "val", "test")
    ((gone,),) = (found["failed"],)
    assert (gone["source"], gone["exit_code"]) == ("gone.onnx", 66)
    assert "gone.onnx" in gone["error"]
    assert found["agreement"][0]["n"] == 4
    assert found["agreement"][0]["so"] == "too few to conclude"
    page = (folder / "sweep.html").read_text()
    assert "dominated" in page
    assert not any(loading in page for loading in ("<script", "src=", "<link", 'href="http'))

    code, out, err = penult("sweep", colours, "-m", sources, "-m", f"{toy}@one", "-o", folder, "--json", "-q")
    assert code == 3, err
    again = json.loads(out)
    assert {each["computed"] for each in again["sources"]} == {0}
    for before, now in zip(found["sources"], again["sources"], strict=True):
        same = {"source", "extract_seconds", "choice", "held_out", "scores", "pareto", "rank", "p_against_best"}
        assert {key: before[key] for key in same} == {key: now[key] for key in same}

    code, out, err = penult("sweep", colours, "-m", sources, "-m", f"{toy}@one", "-o", folder)
    assert "No features of gone.onnx" in out
    assert "Next: penult train" in out
    assert "Layers of one backbone come from one pass" in out


def test_without_any_features_the_first_error_is_the_commands(colours: Path, tmp_path: Path, penult: Penult) -> None:
    code, _, err = penult("sweep", colours, "-m", f"{tmp_path}/a.onnx,{tmp_path}/b.onnx", "-o", tmp_path / "sweep")
    assert code == 66
    assert "a.onnx" in err.splitlines()[-1]


def test_the_folder_is_no_cache_and_no_file(colours: Path, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not a folder of caches"):
        run_sweep(ImageFolder(colours), [backbone], tmp_path / "file", Options(quiet=True))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_misspelt_head_shows_before_the_work(colours: Path, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--head forest"):
        run_sweep(ImageFolder(colours), [backbone], tmp_path / "sweep", Options(quiet=True), head="forest")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("head", ["logistic", "ridge", "knn", "centroid", "mlp"])
def test_out_of_fold_accuracy_is_that_of_heads_fitted_without_the_fold(
    colours: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory, head: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "folds.sweep"
    options = Options(quiet=True, val_fraction=0)
    (backbone,) = parse_sources([f"{toy}@pooled"], Backbone(""))
    found = run_sweep(ImageFolder(colours), [backbone], folder, options, head=head)
    (best,) = found.lines
    assert (found.head, found.chosen_on, best.choice.n) == (head, "folds of train", 64)
    assert best.choice.value > 0.8
    assert best.right is not None
    assert best.right.mean() == best.choice.value
    if head == "logistic":  # its own folds are the same
        cache = FeatureCache(best.cache)
        train = cache.of_rows(look(cache, assign_roles(cache.samples))[0].fit, "train")
        fitted = make_head(head).fit(train.X, train.y, groups=train.groups)
        assert best.choice.value == next(point["accuracy"] for point in fitted.path_ if point["C"] == fitted.C_)


def test_where_nothing_is_held_out_nothing_is_reported(colours: Path, toy: Path, tmp_path: Path) -> None:
    (backbone,) = parse_sources([f"{toy}@pooled"], Backbone(""))
    options = Options(quiet=True, val_fraction=0, test_fraction=0)
    found = run_sweep(ImageFolder(colours), [backbone], tmp_path / "sweep", options, head="centroid")
    assert (found.reported_on, found.lines[0].held_out, found.lines[0].choice.n) == (None, None, 80)
    assert [column for column in found.columns if "held out" in column] == []
    assert len(found.columns) == len(found.rows()[0])
    assert "nothing is held out" in (tmp_path / "sweep/sweep.html").read_text()


@pytest.mark.parametrize(("task", "head"), [("multi-label", "logistic"), ("multi-label", "mlp"), ("regression", None)])
def test_other_tasks_are_ranked_by_their_own_metric(
    colours: Path, toy: Path, tmp_path: Path, penult: Penult, task: str, head: str | None
) -> None:
    rows = ["path,label,redness"]
    for path in sorted(colours.glob("*/*.png")):
        red, green, blue = np.asarray(Image.open(path)).reshape(-1, 3).mean(axis=0)
        labels = [name for name, is_so in (("warm", red > blue), ("dark", red + green + blue < 384)) if is_so]
        rows.append(f"{path},{'|'.join(labels)},{red - blue}")
    (tmp_path / "list.csv").write_text("\n".join(rows).replace(f"{colours}/", ""))
    flags = ["--task", task, *(["--target", "redness"] if task == "regression" else []), *(["--head", head] if head else [])]
    data = (tmp_path / "list.csv", "--root", colours)
    code, out, err = penult(
        "sweep", *data, "-m", f"{toy}@pooled@one", "-o", tmp_path / "sweep", "--json", "--val-fraction", "0", *flags
    )
    assert code == 0, err
    found = json.loads(out)
    best, worst = found["sources"]
    assert (best["source"], worst["source"]) == ("toy.onnx@pooled", "toy.onnx@one")
    assert best["choice"]["value"] > 0.8
    assert best["scores"]["logme"] > worst["scores"]["logme"]
    assert best["scores"]["h_score"] is None
    assert best["p_against_best"] is None
    assert found["metric"] == {"multi-label": "mean average precision", "regression": "R2"}[task]
    code, out, _ = penult("sweep", *data, "-m", f"{toy}@pooled@one", "-o", tmp_path / "sweep", "--val-fraction", "0", *flags)
    assert "H-score" not in out


@pytest.mark.assets
def test_on_real_photos_logme_orders_the_depths_of_a_network_as_trained_heads_do(
    assets: Path, imagenet: Path, tmp_path: Path
) -> None:
    sums = [node.output[0] for node in onnx.load(imagenet).graph.node if node.op_type == "Add"]
    layers = (sums[0], sums[5], "features")  # the third, the tenth and the last of 19 blocks
    network = as_theirs(imagenet, tmp_path / "theirs.onnx", *layers)
    found = run_sweep(ImageFolder(assets / "data/hymenoptera"), [network], tmp_path / "sweep", Options(quiet=True, limit=160))
    assert [each.source.rpartition("@")[2] for each in found.lines] == list(reversed(layers))
    assert found.lines[0].choice.value > 0.9
    assert sorted((each.scores["logme"] or 0 for each in found.lines), reverse=True) == [
        each.scores["logme"] for each in found.lines
    ]
