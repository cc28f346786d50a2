"""The demo is the first thing anybody runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from classifiers.bundles.bundle import Bundle
from classifiers.demo import make_room, run_demo, write_digits
from extractor.data.folders import ImageFolder
from store.cache import FeatureCache
from store.errors import OutputExistsError


@pytest.mark.usefixtures("exports_here")
def test_the_whole_way_on_a_few_digits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    result = run_demo(out, weights="random", epochs=1, limit=150)
    assert result.first.computed == result.first.inputs == 150
    assert (result.second.computed, result.second.inference_calls) == (0, 0)
    found = result.comparison
    assert found.baseline == "logistic.head"
    assert {line.name for line in found.lines} == {"logistic.head", "mlp.head", "finetuned.head", "raw pixels"}
    assert next(line for line in found.lines if line.name == "raw pixels").accuracy > 0.85
    assert result.evaluation.accuracy > 0.8  # a random projection of digits is no bad feature
    assert "random weights" in result.notes[0]
    assert len(result.predictions) == 5
    html = result.report.read_text()
    assert "random weights" in html
    assert "://" not in html.replace("http://www.w3.org", "")
    assert Bundle.load(out / "finetuned.head").kind == "fine-tuned"
    assert FeatureCache(out / "digits.cache").samples.counts["ok"] == 150
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_demo(out, weights="random")
    (tmp_path / "mine/digits").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="not an earlier demo"):
        run_demo(tmp_path / "mine", weights="random", overwrite=True)
    make_room(out, overwrite=True)  # only what a demo had made in its way
    assert not [path for path in (out / "digits").rglob("*") if path.is_file()]
    assert FeatureCache(out / "digits.cache").samples.counts["ok"] == 150
    (out / "digits/3/thesis.png").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"digits/3/thesis\.png is not part of the demo; move it away"):
        run_demo(out, weights="random", overwrite=True)


def test_digits_are_1797_distinct_files(tmp_path: Path) -> None:
    assert write_digits(tmp_path) == 1797
    samples = ImageFolder(tmp_path).samples()
    assert len(samples) == 1797
    assert {sample.label for sample in samples} == set("0123456789")
    assert len({(tmp_path / sample.path.decode()).read_bytes() for sample in samples}) == 1797
