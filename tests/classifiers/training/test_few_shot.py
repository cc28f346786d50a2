"""Learning curves from few training images, and heads by name, from the command line to the bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier

import classifiers
from benchmarks.coverage import Nearest
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.held_out import evaluate, evaluate_bundle
from classifiers.bundles.predictor import Predictor
from classifiers.heads.centroid import CentroidHead
from classifiers.heads.registry import make_head
from classifiers.training import few_shot
from classifiers.training.train import save_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache, Subset
from store.errors import BadDataError, UsageError

REPO = Path(__file__).resolve().parents[3]

Penult = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cache(dataset: Callable[..., Path], backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("fewshot")
    photos = dataset(folder / "photos", {"train/ants": 12, "train/bees": 9, "val/ants": 5, "val/bees": 5})
    run_extract(ImageFolder(photos), backbone, folder / "photos.cache", Options(quiet=True))
    return FeatureCache(folder / "photos.cache")


def subset(n: int, seed: int, *, per_group: int = 1) -> Subset:
    """Two Gaussian classes that few samples tell apart badly and many well."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % 2
    apart = 0.5 * np.where(np.arange(30) % 2, 1, -1)
    X = (rng.normal(size=(n, 30)) + targets[:, None] * apart).astype(np.float32) + 2
    keys = [int(i).to_bytes(32) for i in range(n)]
    groups = [b"%d-%d" % (i % 2, i // 2 // per_group) for i in range(n)]
    return Subset(X, np.array(["a", "b"])[targets], keys, keys, groups, "val")


def test_the_interval_is_for_other_images() -> None:
    """Also where each draw takes most of the images there are, and all are alike for that."""
    rng, held, shots, pool = np.random.default_rng(22), [], 10, 12

    def draw(n: int) -> Subset:
        targets = np.arange(2 * n) % 2
        X = rng.normal(0, 1, (2 * n, 6)).astype(np.float32) + np.where(targets[:, None], 0.4, -0.4)
        keys = [rng.bytes(32) for _ in targets]
        return Subset(X.astype(np.float32), np.array(["a", "b"])[targets], keys, keys, keys)

    everyone = draw(3000)
    truth = np.mean([(Nearest().fit(p.X, p.y).predict(everyone.X) == everyone.y).mean() for p in map(draw, [shots] * 60)])
    for _ in range(40):
        [point] = few_shot.learning_curve(Nearest(), draw(pool), draw(40), [shots], 6, seed=int(rng.integers(1000)))
        low, high = point["accuracy_interval"]
        held.append(low <= truth <= high)
    assert np.mean(held) >= 0.85


def test_a_draw_of_everything_says_nothing_of_other_images() -> None:
    [point] = few_shot.learning_curve(CentroidHead(), subset(20, 0), subset(40, 1), [10], 3)
    assert len(set(point["accuracies"])) == 1
    assert point["accuracy_interval"] == [0.0, 1.0]


def test_a_group_of_two_classes_is_drawn_once() -> None:
    train = subset(40, 0)
    train = replace(train, groups=[b"%d" % (i // 2) for i in range(40)])  # each group has an image of both
    members, rng = few_shot._members(train), np.random.default_rng(0)
    for _ in range(20):
        drawn = np.concatenate(few_shot._draw(members, 8, rng))
        assert len({train.groups[i] for i in drawn.tolist()}) == 16
    with pytest.raises(BadDataError, match="class 'b' shares its groups with other classes"):
        few_shot._draw(members, 12, rng)


@pytest.mark.parametrize("name", ["logistic", "ridge", "knn", "centroid"])
def test_more_images_are_better_and_the_interval_is_wider_than_that_of_the_draws(name: str) -> None:
    train, held_out = subset(200, 0), subset(400, 1)
    curve = few_shot.learning_curve(make_head(name), train, held_out, [10, 2], 6)
    assert [point["shots"] for point in curve] == [2, 10]
    assert curve[0]["accuracy"] < curve[1]["accuracy"]
    for point in curve:
        low, high = point["accuracy_interval"]
        each = np.array(point["accuracies"])
        assert point["accuracy"] == pytest.approx(each.mean())
        assert (high - low) / 2 > 2.57 * each.std(ddof=1) / np.sqrt(6)  # t with 5 degrees
        assert point["n"] == 400
    assert few_shot.learning_curve(make_head(name), train, held_out, [2], 6, seed=0)[0] != curve[1]


def test_draws_are_seeded_nested_and_of_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = subset(60, 0, per_group=3), subset(10, 1)
    seen: list[tuple[list[bytes], Any]] = []

    class Watching(CentroidHead):
        def fit(self, X: Any, y: Any, **given: Any) -> Watching:
            seen.append((sorted(X[:, 0].tolist()), given["groups"]))
            assert sorted(y) == ["a"] * (len(y) // 2) + ["b"] * (len(y) // 2)
            return super().fit(X, y, **given)

    first = few_shot.learning_curve(Watching(), train, held_out, [2, 5], 3, seed=4)
    small, large = seen[:3], seen[3:]
    for (few, _), (many, groups) in zip(small, large, strict=True):
        assert set(few) < set(many) <= set(train.X[:, 0].tolist())
        assert len(set(groups)) == len(groups) == 10
    assert len({tuple(rows) for rows, _ in large}) == 3
    assert few_shot.learning_curve(CentroidHead(), train, held_out, [2, 5], 3, seed=4) == first
    assert few_shot.learning_curve(CentroidHead(), train, held_out, [2, 5], 3, seed=5) != first


def test_what_cannot_be_drawn_is_refused() -> None:
    train, held_out = subset(60, 0, per_group=3), subset(10, 1)
    with pytest.raises(BadDataError, match=r"--few-shot 11: class 'a' has 10 training image\(s\) or group\(s\)"):
        few_shot.learning_curve(CentroidHead(), train, held_out, [1, 11])
    with pytest.raises(UsageError, match="nothing is held out"):
        few_shot.learning_curve(CentroidHead(), train, None, [1])
    with pytest.raises(UsageError, match="there is 1 draw"):
        few_shot.learning_curve(CentroidHead(), train, held_out, [1], 1)


def test_a_warning_is_said_once_for_all_draws(caplog: pytest.LogCaptureFixture) -> None:
    few_shot.learning_curve(CentroidHead(), subset(20, 0), subset(10, 1), [1], 5)
    assert caplog.text.count("nothing can be chosen or calibrated") == 1
    CentroidHead().fit(subset(2, 0).X, subset(2, 0).y)
    assert caplog.text.count("nothing can be chosen or calibrated") == 2


@pytest.mark.parametrize("name", ["ridge", "knn", "centroid"])
def test_from_the_command_line_to_predictions(cache: FeatureCache, tmp_path: Path, penult: Penult, name: str) -> None:
    out = tmp_path / "photos.head"
    code, stdout, stderr = penult("train", cache.path, "--head", name, "-o", out, "--few-shot", "1,4", "--repeats", "3")
    assert code == 0, stderr
    assert f"{name} head, 2 classes" in stdout
    assert "Accuracy on 'val' by training images of each class" in stdout
    bundle = Bundle.load(out)
    assert bundle.head == name
    assert [point["shots"] for point in bundle.few_shot or ()] == [1, 4]
    assert "With few images" in (out / "report.html").read_text()
    evaluation, predictions = evaluate_bundle(bundle, cache.path)
    assert evaluation.n == 10
    np.testing.assert_allclose(predictions.probabilities, bundle.predictions().probabilities, atol=1e-5)
    image = next((cache.path.parent / "photos/val/ants").iterdir())
    [found] = Predictor.of(bundle).predict([image])
    assert found.probabilities is not None
    row = [path.endswith(image.name.encode()) and b"ants" in path for path in predictions.paths].index(True)
    np.testing.assert_allclose(found.probabilities, predictions.probabilities[row], atol=1e-5)


def test_few_shot_as_json_and_its_mistakes(cache: FeatureCache, tmp_path: Path, penult: Penult) -> None:
    arguments = ("train", cache.path, "--head", "centroid", "-o", tmp_path / "x.head")
    code, stdout, _ = penult(*arguments, "--few-shot", "2", "--repeats", "2", "--json")
    assert code == 0
    [point] = json.loads(stdout)["few_shot"]
    assert (point["shots"], point["n"], len(point["accuracies"])) == (2, 10, 2)
    code, _, stderr = penult(*arguments, "--few-shot", "1,x", "--overwrite")
    assert code == 2
    assert '--few-shot is "x"; expected a whole number' in stderr
    code, _, stderr = penult(*arguments, "--few-shot", "10", "--overwrite")
    assert code == 65
    assert "class 'bees' has 9 training image(s)" in stderr
    code, _, stderr = penult(*arguments, "--alpha", "3", "--overwrite")
    assert code == 2
    assert "--alpha is a setting of the ridge head, and this is centroid" in stderr


def test_settings_of_the_command_line_reach_the_head(cache: FeatureCache, tmp_path: Path, penult: Penult) -> None:
    assert penult("train", cache.path, "--head", "ridge", "--alpha", "30", "-o", tmp_path / "r.head")[0] == 0
    assert Bundle.load(tmp_path / "r.head").hyperparameters["alpha"] == 30
    assert penult("train", cache.path, "--head", "knn", "--k", "3", "-o", tmp_path / "k.head")[0] == 0
    facts = Bundle.load(tmp_path / "k.head").hyperparameters
    assert (facts["k"], facts["references"], facts["reference_dtype"]) == (3, 21, "float32")


def test_a_large_batch_passes_a_head_in_parts(cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = classifiers.train(cache, tmp_path / "k.head", make_head("knn"))
    features = cache.subset("train").X.astype(np.float32)
    whole = bundle.head_function()(features)
    monkeypatch.setattr("classifiers.bundles.head_graph.BLOCK", 4)
    np.testing.assert_allclose(bundle.head_function()(features), whole, atol=1e-6)
    assert bundle.head_function()(features[:0]).shape == (0, 2)


def test_any_scikit_learn_classifier_by_its_dotted_name(cache: FeatureCache, tmp_path: Path) -> None:
    train, val = cache.subset("train"), cache.subset("val")
    head = make_head("sklearn.ensemble.RandomForestClassifier", n_estimators=5, random_state=0).fit(train.X, train.y)
    assert evaluate(head, val).n == 10
    for attempt in (
        lambda: save_head(cache, tmp_path / "x.head", head, fitted=[train], held_out=val),
        lambda: classifiers.train(cache, tmp_path / "x.head", head),
    ):
        with pytest.raises(UsageError, match=r"RandomForestClassifier cannot be saved.*never a pickle.*train one of logistic"):
            attempt()
    assert not (tmp_path / "x.head").exists()


def test_the_example_of_the_docs_runs(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(cache.path.parent)
    [block] = re.findall(r"```python\n(.*?)```", (REPO / "docs/heads.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/heads.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("sklearn.svm.NoSuch", "has no attribute 'NoSuch'"),
        ("nowhere.at.All", "no installed package has the module 'nowhere'"),
        ("json.loads", "no installed package has the module 'json'"),
        ("numpy.linalg.norm", "is not a scikit-learn estimator"),
        ("sklearn.svm.LinearSVC", "not a classifier with predict_proba"),
        ("sklearn.linear_model.Ridge", "not a classifier with predict_proba"),
        ("forest", "--head forest: expected logistic, mlp, ridge, knn, centroid"),
    ],
)
def test_other_names_are_refused(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        make_head(name)


def test_a_dotted_name_takes_settings_and_refuses_unknown_ones() -> None:
    assert isinstance(make_head("sklearn.dummy.DummyClassifier", strategy="uniform"), DummyClassifier)
    with pytest.raises(UsageError, match=r"DummyClassifier: .*unexpected keyword argument 'no_such'"):
        make_head("sklearn.dummy.DummyClassifier", no_such=1)


def test_a_file_in_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="no installed package has the module 'mine'"):
        make_head("mine.Classifier")
