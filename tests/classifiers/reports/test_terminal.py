"""Scores for people: tables on narrow terminals, and plots of labels in any script."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from classifiers.evaluation.single_label import score
from classifiers.evaluation.task import Evaluation
from classifiers.reports import plots
from classifiers.reports.plots import _drawable, save_confusion
from classifiers.reports.terminal import evaluation_text
from extractor.text_table import table

COLUMNS = ("bundle", "kind", "accuracy", "95 % interval", "macro F1", "training", "extraction", "images through backbone")
COMPARED = [
    ("ants.head", "frozen", "97.4 %", "93.5 to 99.0 %", "0.974", "0.9 s", "4.9 s once", "398"),
    ("ants-finetuned.head", "fine-tuned", "94.8 %", "90.0 to 97.3 %", "0.947", "51.1 s", "-", "1225"),
]


def evaluation(classes: list[str]) -> Evaluation:
    truth = np.tile(np.arange(len(classes)), 12)
    return score(np.array(classes)[truth], np.eye(len(classes))[truth], classes, "test")


def longest(text: str) -> int:
    return max(map(cell_len, text.splitlines()))


@pytest.mark.parametrize("width", [44, 60, 80, 100, 160])
def test_a_table_fits_its_width_and_breaks_no_score(width: int) -> None:
    text = table(COLUMNS, COMPARED, left=2, width=width)
    assert longest(text) <= width
    for row in COMPARED:
        assert all(cell in text for cell in row), text


def test_a_wide_table_is_turned_on_its_side_and_then_becomes_a_list() -> None:
    assert table(COLUMNS, COMPARED, left=2, width=160).splitlines()[0].split()[:2] == ["bundle", "kind"]
    side = table(COLUMNS, COMPARED, left=2, width=80).splitlines()
    assert side[0].split() == ["bundle", "ants.head", "ants-finetuned.head"]
    assert side[3].split() == ["accuracy", "97.4", "%", "94.8", "%"]
    listed = table(COLUMNS, COMPARED, left=2, width=40).splitlines()
    assert listed[:3] == [
        "bundle                   ants.head",
        "kind                     frozen",
        "accuracy                 97.4 %",
    ]
    assert listed[9] == "bundle                   ants-finetuned.head"


def test_long_text_is_folded_beside_whole_scores() -> None:
    path = "a/" + "long/" * 20 + "IMG_0001.jpg"
    text = table(("path", "images", "share"), [(path, "123456", "12.5 %")], width=80)
    assert longest(text) <= 80
    assert "123456   12.5 %" in text
    assert "IMG_0001.jpg" in text.replace("\n ", "")


def test_headings_are_broken_between_words_only() -> None:
    text = table(("class", "images through backbone", "GFLOPs"), [("a", "3", "4.0")], width=34)
    assert [line.strip() for line in text.splitlines()[:3]] == ["images", "through", "class   backbone   GFLOPs"]


@pytest.mark.parametrize(
    ("classes", "head"),
    [
        (["ants", "bees", "wasps"], "true \\ predicted   ants   bees   wasps"),
        ([f"class {i}" for i in range(12)], "true \\ predicted    1    2    3"),
        ([f"species number {i}" for i in range(20)], "The confusion matrix of 20 classes does not fit 80 columns: --plot"),
    ],
)
def test_an_evaluation_fits_80_columns(classes: list[str], head: str) -> None:
    text = evaluation_text(evaluation(classes), width=80)
    parts = text.split("\n\n")
    assert head in parts[-1]
    scores, per_class = parts[1], parts[3]
    assert longest(scores) <= 80
    assert longest(per_class) <= 80
    assert longest(parts[-1]) <= 80 or "--plot" in head, "a sentence is for the terminal to break"
    for label in classes:
        assert label in per_class


SCRIPTS = ["\u732b", "\u0643\u0644\u0628", "\U0001f41d bees", "ants"]  # a CJK, an Arabic, an emoji and a Latin name


def test_labels_in_any_script_are_text_in_an_svg_and_numbered_where_the_font_lacks_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning of matplotlib's would fail this test: pytest runs with warnings as errors."""
    metrics = evaluation(SCRIPTS).to_json()
    drawn = plots.confusion_svg(metrics)
    assert "\u732b" in drawn
    assert "\U0001f41d bees" in drawn
    save_confusion(metrics, tmp_path / "m.svg")
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        for kind in ("png", "pdf"):
            save_confusion(metrics, tmp_path / f"m.{kind}")
    assert caplog.text.count("its font lacks letters of some labels; these are numbered as in the per-class table") == 2
    with Image.open(tmp_path / "m.png") as image:
        assert image.format == "PNG"
    assert [_drawable(label) for label in SCRIPTS] == [False, True, False, True]
