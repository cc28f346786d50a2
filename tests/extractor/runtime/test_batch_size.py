"""What ``auto`` stands for: a batch size that is measured, and as many decode workers as the backbone has use for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from extractor.backbones.registry import Backbone
from extractor.data import reader
from extractor.data.folders import ImageFolder
from extractor.data.reader import WorkerPool, ahead
from extractor.graphs.backbone_facts import read_facts
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import Summary, bottleneck
from extractor.pixels.decoder import Decoder
from extractor.pixels.preprocess import Preprocess
from extractor.runtime import batch_size
from extractor.runtime.batch_size import ENOUGH, SIZES, TRIALS, Pace
from extractor.runtime.session import Embedder
from extractor.signals import StopFlag
from store.cache import FeatureCache

PIXELS = Preprocess(64, 64, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def embedder(backbone_file: Path) -> Iterator[Embedder]:
    opened = Embedder(backbone_file, read_facts(backbone_file).preprocess, lanes=2)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({8: 0.5, 4: 0.9, 2: 1.0, 1: 1.2}, 8),
        ({8: 1.2, 4: 1.0, 2: 0.9, 1: 0.8}, 1),
        ({8: 1.0, 4: 1.0, 2: 0.98, 1: 0.99}, 4),  # the default, unless another is clearly faster
    ],
)
def test_a_cpu_tries_batch_sizes_on_its_first_batches_and_keeps_the_fastest(
    embedder: Embedder, seconds: dict[int, float], best: int
) -> None:
    pace = Pace(embedder, 10_000)
    tried = []
    for batch in range(10 * TRIALS):
        tried.append(pace.size)
        pace.begin()
        assert embedder.on_batch is not None
        slow = 50 if batch % 9 == 0 else 1  # once in a while the machine does something else
        embedder.on_batch(tried[-1], slow * tried[-1] * seconds[tried[-1]])
    trials = len(SIZES) * TRIALS
    assert all(tried[:trials].count(size) == TRIALS for size in SIZES)
    assert set(tried[trials + 1 :]) == {best} == {embedder.batch_size}


# Images per second of eight turns, by batch size.
BUSY = {  # beside other processes: batches of 2 had both cores, by chance or by a lane that waited
    4: [34, 31, 36, 33, 35, 34, 29, 38],
    8: [34, 36, 33, 35, 34, 30, 33, 35],
    2: [176, 170, 33, 181, 178, 176, 175, 171],
    1: [17, 18, 16, 17, 40, 17, 15, 17],
}
STEADY = {  # as BUSY, and never otherwise
    **BUSY,
    2: [176, 170, 175, 181, 178, 176, 175, 171],
}
NOISY = {  # 8 is faster on average, by chance
    4: [40, 52, 41, 55, 43, 50, 44, 49],
    8: [60, 44, 58, 43, 62, 57, 41, 59],
    2: [47, 47, 47, 46, 47, 47, 47, 47],
    1: [41, 41, 41, 41, 41, 41, 41, 41],
}
REAL = {  # a network with small layers gains from larger batches, whatever else the machine does
    4: [150, 148, 151, 60, 149, 152, 150, 147],
    8: [171, 168, 172, 66, 170, 173, 80, 169],
    2: [118, 120, 119, 50, 121, 118, 119, 117],
    1: [82, 83, 82, 35, 84, 81, 82, 83],
}
SMALLER = {1: [90, 91, 89, 92, 90, 91, 90, 88], 2: [80] * 8, 4: [70] * 8, 8: [62] * 8}


@pytest.mark.parametrize(
    ("rates", "best"), [(BUSY, 4), (STEADY, 4), (NOISY, 4), (REAL, 8), (SMALLER, 1), (dict.fromkeys(SIZES, [50] * 8), 4)]
)
def test_only_an_advantage_that_is_steady_and_can_be_is_believed(rates: dict[int, list[float]], best: int) -> None:
    assert batch_size.choose({size: [1 / rate for rate in each] for size, each in rates.items()}) == best


def test_what_is_not_believed_is_said(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "penult")
    pace = Pace(embedder, 10_000)
    for turn in range(TRIALS):
        for size in SIZES:
            pace.begin()
            assert embedder.on_batch is not None
            embedder.on_batch(size, size / BUSY[size][turn])
    pace.begin()
    rates = "1 gives 17.0 images/s, 2 gives 175.5 images/s, 4 gives 34.0 images/s, 8 gives 34.0 images/s"
    assert caplog.messages == [f"batches of 4: {rates}; the advantage of 2 is not certain"]


def test_nothing_is_tried_in_a_short_run_or_where_the_size_is_given(embedder: Embedder) -> None:
    for images in (0, ENOUGH - 1):
        pace = Pace(embedder, images)
        for _ in range(100):
            pace.begin()
            assert pace.size == embedder.batch_size == 4
    assert embedder.on_batch is None


def test_all_batch_sizes_of_a_run_give_the_same_bits(
    backbone: Backbone, dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "ENOUGH", 10)
    photos = ImageFolder(dataset(tmp_path / "photos", {"ants": 20, "bees": 20}))
    varied, fixed = (
        run_extract(photos, backbone, tmp_path / name, Options(storage="float32", quiet=True, batch_size=size))
        for name, size in (("varied", None), ("fixed", 8))
    )
    assert varied.computed == fixed.computed == 40
    assert varied.inference_calls > fixed.inference_calls == 5, "batches of 4, 8, 2 and 1 in turn"
    found, wanted = (FeatureCache(tmp_path / name) for name in ("varied", "fixed"))
    np.testing.assert_array_equal(found.of_rows(wanted.rows(), "").X, wanted.of_rows(wanted.rows(), "").X)


def work(workers: WorkerPool, items: int) -> tuple[list[int], int]:
    """Numbers through a pool of workers, and how many of them were at work at once."""
    busy, most, lock = 0, 0, threading.Lock()

    def step(item: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        with lock:
            busy -= 1
        return item

    return list(ahead(step, range(items), workers, StopFlag(), Decoder(PIXELS))), most


def test_a_crew_keeps_the_order_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "cores", lambda: 4)
    found, most = work(WorkerPool(3), 200)
    assert found == list(range(200))
    assert most <= 3
    workers = WorkerPool(None, shares_cores=False)
    assert (workers.size, workers.most) == (4, 4), "beside a GPU all cores decode at once"


def test_a_crew_grows_where_the_consumer_waits_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "cores", lambda: 4)
    monkeypatch.setattr(reader, "WINDOW", 0.0)
    monkeypatch.setattr(reader, "STARVED", -1.0)  # any wait is too long
    starving = WorkerPool()
    assert starving.size == 2
    assert work(starving, 100)[0] == list(range(100))
    assert starving.size == 4
    monkeypatch.setattr(reader, "STARVED", 2.0)  # nobody waits for more than all the time
    content = WorkerPool()
    assert work(content, 100)[0] == list(range(100))
    assert content.size == 2


def test_workers_that_were_asked_for_stay_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WINDOW", 0.0)
    monkeypatch.setattr(reader, "STARVED", -1.0)
    workers = WorkerPool(2)
    work(workers, 100)
    assert workers.size == 2


@pytest.mark.parametrize(
    ("seconds", "shares_cores", "found"),
    [
        ({"read+decode": 30, "backbone": 90, "wait": 1, "embed": 50}, True, "backbone"),
        ({"read+decode": 90, "backbone": 30, "wait": 40, "embed": 5}, True, "decoding"),
        ({"read+decode": 90, "backbone": 30, "wait": 40, "embed": 5}, False, "decoding"),
        ({"read+decode": 90, "backbone": 30, "wait": 5, "embed": 40}, False, "backbone"),
        ({"read+decode": 30, "backbone": 30, "wait": 5, "embed": 5, "settle": 60}, True, "writing"),
    ],
)
def test_the_bottleneck_is_named(seconds: dict[str, float], shares_cores: bool, found: str) -> None:
    clock = {name: seconds.get(name, 0.0) for name in ("read+decode", "backbone", "wait", "embed", "settle")}
    assert bottleneck(clock, shares_cores=shares_cores) == found


@pytest.mark.parametrize(
    ("stage", "provider", "precision", "pixel_path", "computed", "advice"),
    [
        ("backbone", "cpu", "fp32", "pillow", 50_000, "--precision int8, a smaller network or a GPU would help"),
        ("backbone", "cpu", "fp32", "pillow", 500, "a smaller network or a GPU would help"),  # int8 would not pay
        ("backbone", "cpu", "int8", "pillow", 50_000, "a smaller network or a GPU would help"),
        ("backbone", "cuda", "fp32", "pillow", 50_000, "--precision fp16 or a smaller network would help"),
        ("backbone", "cuda", "fp16", "pillow", 50_000, "a smaller network would help"),
        ("decoding", "cpu", "fp32", "pillow", 500, "more cores, smaller photos, or another --pixel-path would help"),
        ("decoding", "cpu", "int8", "pillow-draft", 500, "more cores or smaller photos would help"),
        ("decoding", "cuda", "fp32", "pillow-draft", 500, "the GPU waited for images; more cores or smaller photos would help"),
        ("writing", "cuda", "fp16", "pillow", 500, "the disk of the cache is slow"),
    ],
)
def test_the_advice_names_nothing_that_the_run_has_or_that_would_not_pay(
    stage: str, provider: str, precision: str, pixel_path: str, computed: int, advice: str
) -> None:
    seconds = dict.fromkeys(("read+decode", "backbone", "write"), 10.0) | {"images": 60.0, "total": 60.0}
    backbone = {"precision": precision, "preprocess": {"pixel_path": pixel_path}}
    run = Summary(provider=provider, computed=computed, bottleneck=stage, seconds=seconds, backbone=backbone)
    assert run.text().splitlines()[-1] == f"bottleneck: {stage}; {advice}"
