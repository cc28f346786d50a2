"""The summary of a run: its times and its rate follow from each other, as text and as JSON."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import PARTS, Summary, stages
from tests.conftest import MakeDataset

CLOCK = {"read+decode": 2.786, "wait": 0.31, "embed": 2.37, "settle": 0.01, "backbone": 4.0994, "write": 0.004, "images": 2.69}


def summary(clock: dict[str, float], total: float, computed: int = 398) -> Summary:
    rate = round(computed / clock["images"], 1) if computed else 0.0
    run = Summary(inputs=398, ok=398, computed=computed, provider="cpu", images_per_second=rate, bottleneck="backbone")
    run.workers, run.lanes, run.batch_size, run.seconds = 2, 2, 4, stages(clock, total)
    return run


def test_the_rate_follows_from_the_time_and_the_rest_is_named() -> None:
    first = summary(CLOCK | {"export": 9.4, "start": 0.7, "list": 0.01}, 12.9)
    assert first.text().splitlines() == [
        "398 inputs = 398 ok + 0 duplicates + 0 failed",
        "398 images on cpu in 2.69 s, 148 a second (ms an image: decoding 7.0 in 2 workers, backbone 10.3 in 2 lanes of 4, "
        "writing 0.0)",
        "12.9 s in all: 9.40 s to export the network once, 0.70 s to open the network",
    ]
    assert first.seconds["other"] == 0.1


@pytest.mark.parametrize("total", [2.9, 3.6])
def test_a_rest_that_is_short_is_not_named(total: float) -> None:
    assert len(summary(CLOCK | {"start": total - 2.7}, total).text().splitlines()) == 2


def test_advice_is_for_long_runs_of_images_and_not_for_long_exports() -> None:
    assert "bottleneck" not in summary(CLOCK | {"export": 40.0}, 43.0).text()
    assert "bottleneck" in summary(CLOCK | {"images": 26.9}, 28.0).text()


def test_a_run_without_anything_to_compute_says_what_took_its_time() -> None:
    lines = summary(CLOCK | {"images": 0.0, "list": 7.0, "compare": 3.0}, 10.4, computed=0).text().splitlines()
    assert lines[1:] == [
        "nothing to compute, 0 inference calls, 10.4 s",
        "10.4 s in all: 7.00 s to list the images, 3.00 s to see which are cached",
    ]


def test_the_stages_of_a_run_add_up(tmp_path: Path, dataset: MakeDataset, backbone: Backbone) -> None:
    run = run_extract(ImageFolder(dataset(tmp_path / "photos")), backbone, tmp_path / "c", Options(quiet=True))
    seconds = run.seconds
    assert seconds["total"] == pytest.approx(seconds["images"] + sum(seconds[name] for name in PARTS), abs=0.01)
    assert seconds["images"] == pytest.approx(seconds["wait"] + seconds["embed"] + seconds["settle"], abs=0.002)
    assert min(seconds[name] for name in ("import", "start", "images")) > 0
    assert run.images_per_second == pytest.approx(run.computed / seconds["images"], rel=0.05)
    shown = re.search(r"(\d+) images on cpu in ([\d.]+) s, (\d+) a second", run.text())
    assert shown is not None
    assert int(shown[3]) == pytest.approx(int(shown[1]) / float(shown[2]), rel=0.1)
