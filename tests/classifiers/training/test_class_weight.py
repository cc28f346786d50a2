"""Weighed classes: their probabilities are scores, and the output says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from classifiers.evaluation.scores import BINS, classwise_calibration_error
from classifiers.evaluation.single_label import score
from classifiers.heads.logistic import LogisticHead

V1 = Path(__file__).resolve().parents[2] / "data/archives/v1"


def test_the_class_wise_error_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    probabilities, truth = rng.dirichlet([1, 2, 3], 200), rng.integers(0, 3, 200)
    expected = 0.0
    for k in range(3):
        for low in np.arange(BINS) / BINS:
            inside = (probabilities[:, k] > low) & (probabilities[:, k] <= low + 1 / BINS)
            if inside.any():
                gap = abs((truth[inside] == k).mean() - probabilities[inside, k].mean())
                expected += inside.mean() * gap / 3
    assert classwise_calibration_error(truth, probabilities) == pytest.approx(expected)


def test_the_class_wise_error_shows_what_the_error_of_the_winner_hides() -> None:
    """One image in twenty is of a class that cannot be told well."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
        rare = rng.random(n) < 0.05
        return (rng.normal(size=(n, 4)) + rare[:, None] * 0.8).astype(np.float32), np.where(rare, "yes", "no")

    (X, y), (Xt, yt) = draw(2000), draw(4000)
    errors = []
    for weight in (None, "balanced"):
        head = LogisticHead(C=1.0, class_weight=weight).fit(X, y)
        scores = score(yt, head.predict_proba(Xt), [str(label) for label in head.classes_]).scores
        errors.append(scores["ece_classwise"]["value"])
    plain, weighed = errors
    assert plain < 0.02
    assert weighed > 5 * plain


def test_probabilities_of_weighed_classes_are_called_scores(
    tmp_path: Path, penult: Callable[..., tuple[int, str, str]]
) -> None:
    for flags, expected in (((), False), (("--class-weight", "balanced"), True)):
        bundle = tmp_path / f"{len(flags)}.head"
        code, out, _ = penult(
            "train", V1 / "photos.cache", "--head", "logistic", "-o", bundle, "--no-thumbnails", "--json", *flags
        )
        assert code == 0
        notes = json.loads(out)["metrics"]["notes"]
        assert any("as if every class had the same number of images. Take them as scores" in note for note in notes) == expected
