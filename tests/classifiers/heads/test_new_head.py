"""A new head is one class, one group of settings and one row: everything else knows it then."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import click
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from classifiers.bundles.bundle import Bundle
from classifiers.commands.train import train
from classifiers.heads import registry
from classifiers.heads.fitted import DenseHead
from classifiers.heads.folds import class_indices
from classifiers.heads.registry import HeadRow, make_head, name_of
from classifiers.heads.search import ClassifierHead, Head
from classifiers.jobs.job_file import read_job
from classifiers.jobs.run import run_job
from classifiers.training.settings import train_settings
from extractor.settings import Settings, setting
from store.cache import FeatureCache
from store.errors import JobFileError, UsageError

Penult = Callable[..., tuple[int, str, str]]


class MeansHead(ClassifierHead):
    """The class whose mean is nearest: logits are ``strength * (x . m - |m|^2 / 2)``."""

    name = "means"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import validate_data

        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        check_classification_targets(labels)
        self.classes_, _ = class_indices(labels)
        self.fitted_, self.history_ = self.refit(features, labels), []
        return self

    def _refit(self, X: NDArray[np.float32], targets: NDArray[np.intp], classes: list[str]) -> DenseHead:
        means = np.stack([X[targets == k].mean(axis=0) for k in range(len(classes))]) * np.float32(self.strength)
        bias = -0.5 * (means**2).sum(axis=1) / np.float32(self.strength)
        return DenseHead(np.zeros(X.shape[1], np.float32), np.ones(X.shape[1], np.float32), [(means, bias)], classes)

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        return {"strength": self.strength}


class MeansSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head: means"

    strength: float = setting(1.0, "How sure it is.", gt=0, metavar="X")


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadRow]:
    """The row of the new head, as an installed package would name it."""

    class Named:
        def load(self) -> HeadRow:
            return made

    made = HeadRow("means", "single-label", MeansSettings, f"{__name__}:MeansHead")
    monkeypatch.setattr(registry, "entry_points", lambda group: [Named()] if group == "penult.heads" else [])
    monkeypatch.setattr(HeadRow, "make", lambda self: MeansHead() if self.name == "means" else MAKE(self))
    registry.rows.cache_clear()
    train_settings.cache_clear()
    yield made
    registry.rows.cache_clear()
    train_settings.cache_clear()


MAKE = HeadRow.make


def test_everything_knows_a_head_by_its_row(
    row: HeadRow, penult: Penult, dataset: Callable[..., Path], backbone_file: Path, tmp_path: Path
) -> None:
    photos = dataset(tmp_path / "photos", {"ants": 10, "bees": 10})
    cache, bundle = tmp_path / "p.cache", tmp_path / "p.head"
    assert penult("extract", photos, "-m", backbone_file, "-o", cache)[0] == 0
    code, out, err = penult("train", cache, "-o", bundle, "--head", "means", "--strength", "2", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["head"], facts["hyperparameters"]["strength"]) == ("means", 2.0)
    assert facts["metrics"]["n"] == 4
    evaluated = json.loads(penult("evaluate", bundle, cache, "--json")[1])
    assert evaluated["accuracy"] == facts["metrics"]["accuracy"]
    assert penult("fuse", bundle, "-o", tmp_path / "p.onnx")[0] == 0
    answers = [penult("predict", each, photos / "ants", "--format", "csv")[1] for each in (bundle, tmp_path / "p.onnx")]
    assert answers[0].count("\n") == answers[1].count("\n") == 11
    assert penult("predict", tmp_path / "p.onnx", "--selftest")[0] == 0
    assert penult("report", bundle, cache, "-o", tmp_path / "p.html")[0] == 0
    assert "means head on" in (tmp_path / "p.html").read_text()
    assert penult("sweep", photos, "-m", backbone_file, "--head", "means", "-o", tmp_path / "s")[0] == 0
    help_text = train.get_help(click.Context(train))
    assert "Head: means:" in help_text
    assert "|centroid|means" in help_text
    code, _, err = penult("train", cache, "-o", tmp_path / "x", "--head", "means", "--C", "1")
    assert (code, "--C is a setting of the logistic head, and this is means" in err) == (2, True)
    code, _, err = penult("train", cache, "-o", tmp_path / "x", "--head", "means", "--strength", "0")
    assert (code, "--strength is 0; expected more than 0" in err) == (2, True)


def test_a_job_takes_it_and_refuses_the_keys_of_others(
    row: HeadRow, dataset: Callable[..., Path], backbone_file: Path, tmp_path: Path
) -> None:
    dataset(tmp_path / "photos", {"ants": 10, "bees": 10})
    text = f'data = "photos"\ncache = "c"\nbundle = "b"\n[backbone]\nname = "{backbone_file}"\n[train]\nhead = "means"\n'
    job = tmp_path / "job.toml"
    job.write_text(text + "strength = 3.0\n")
    assert run_job(job).trained
    assert Bundle.load(tmp_path / "b").hyperparameters["asked"] == {"strength": 3.0}
    assert not run_job(job).trained
    job.write_text(text + "k = 3\n")
    with pytest.raises(JobFileError, match=r"train\.k is a setting of the knn head, and this is means"):
        read_job(job)
    with pytest.raises(UsageError, match="the means head has no setting k"):
        make_head("means", k=3)


def test_rows_and_classes_say_the_same() -> None:
    for each in registry.ROWS:
        made = each.make()
        assert isinstance(made, Head)
        assert (made.name, made.task, name_of(made)) == (each.name, each.task, each.name)


def test_the_head_of_a_bundle_is_an_estimator(
    penult: Penult, dataset: Callable[..., Path], backbone_file: Path, tmp_path: Path
) -> None:
    from sklearn.base import clone, is_classifier
    from sklearn.ensemble import VotingClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    photos = dataset(tmp_path / "photos", {"ants": 10, "bees": 10})
    assert penult("extract", photos, "-m", backbone_file, "-o", tmp_path / "c")[0] == 0
    assert penult("train", tmp_path / "c", "-o", tmp_path / "h", "--C", "1")[0] == 0
    bundle, test = Bundle.load(tmp_path / "h"), FeatureCache(tmp_path / "c").subset("test")
    estimator = bundle.as_estimator()
    assert is_classifier(estimator)
    np.testing.assert_array_equal(estimator.predict_proba(test.X), bundle.head_function()(test.X.astype(np.float32)))
    assert estimator.score(test.X, test.y) == bundle.metrics["accuracy"]
    assert (clone(estimator).fit(test.X, test.y).predict(test.X) == estimator.predict(test.X)).all()
    pipeline = make_pipeline(FunctionTransformer(), estimator)
    assert (pipeline.predict(test.X) == estimator.predict(test.X)).all()
    voting = VotingClassifier([("one", estimator), ("two", make_head("centroid"))], voting="soft").fit(test.X, test.y)
    assert voting.predict_proba(test.X).shape == (len(test.y), 2)
    with pytest.raises(ValueError, match="features"):
        estimator.predict(test.X[:, :-1])
