"""Scores against scikit-learn and published values."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from classifiers.evaluation.intervals import modified_wilson, wilson
from classifiers.evaluation.single_label import score
from classifiers.reports.tables import class_rows
from store.errors import BadDataError


def test_wilson_matches_published_values() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29 by the score method without continuity correction
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    # Brown, Cai & DasGupta 2001, section 4.1.1: 0.051, 0.355 and 0.818 for one, two and three; four are Wilson's
    assert [100 * modified_wilson(x, 100)[0] for x in (1, 2, 3)] == pytest.approx([0.0513, 0.3554, 0.8177], abs=5e-5)
    assert modified_wilson(4, 100) == wilson(4, 100)
    assert modified_wilson(99, 100) == (pytest.approx(1 - modified_wilson(1, 100)[1]), pytest.approx(1 - 0.000513, abs=5e-7))


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    classes = ["a", "b", "c", "d"]
    probabilities = rng.dirichlet(np.ones(4), size=200)
    truth = rng.choice(4, size=200, p=[0.5, 0.3, 0.2, 0.0])  # d is predicted and never true
    found = score(np.array(classes)[truth], probabilities, classes, "test")
    guess = probabilities.argmax(axis=1)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(truth, guess, labels=range(4), zero_division=0)
    assert found.accuracy == metrics.accuracy_score(truth, guess)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth, guess, average="macro", zero_division=0))
    assert found.log_loss == pytest.approx(metrics.log_loss(truth, probabilities, labels=range(4)))
    assert found.confusion == metrics.confusion_matrix(truth, guess, labels=range(4)).tolist()
    for i, entry in enumerate(found.per_class):
        assert entry["n"] == support[i]
        assert entry["precision"] == pytest.approx(precision[i])
        expected = (recall[i], f1[i]) if support[i] else (None, None)
        assert (entry["recall"], entry["f1"]) == pytest.approx(expected)


def test_a_class_without_images_has_no_recall() -> None:
    found = score(np.array(["a", "b"]), np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), ["a", "b", "c"]).to_json()
    absent = {"label": "c", "n": 0, "precision": None, "recall": None, "recall_interval": None, "f1": None}
    assert found["per_class"][2] == absent
    assert class_rows(found)[2] == ("c", "0", "-", "-", "-", "-")


def test_28_images_without_an_error_prove_little() -> None:
    found = score(np.repeat(["a", "b"], 14), np.repeat(np.eye(2), 14, axis=0), ["a", "b"])
    assert found.accuracy == 1
    assert found.notes[0] == "too few to conclude: 28 images without an error only show an accuracy of at least 88%"


def test_many_images_need_no_note_but_small_classes_are_named() -> None:
    labels = np.array(["a"] * 500 + ["b"] * 3)
    found = score(labels, np.eye(2)[(labels == "b").astype(int)], ["a", "b"])
    assert found.notes == ["classes with fewer than 10 images here, whose own scores say little: b (3)"]


def test_unknown_labels_and_nothing_at_all_are_refused() -> None:
    with pytest.raises(BadDataError) as caught:
        score(np.array(["a", "c", "c", "d"]), np.eye(4), ["a", "b"], "test")
    assert str(caught.value) == (
        "3 of 4 images of 'test' have a label that the head was not trained on: 'c' (2), 'd' (1); it knows 'a', 'b'. "
        "Correct the labels, leave these images out, or train with them"
    )
    with pytest.raises(BadDataError, match="no images"):
        score(np.array([], dtype=str), np.zeros((0, 2)), ["a", "b"])
