"""What ``auto`` stands for: a batch size that is measured, and as many decode workers as the backbone has use for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from extractor import reading, tuning
from extractor.decoder import Decoder
from extractor.onnxfile import read_facts
from extractor.options import ADVICE, bottleneck
from extractor.preprocess import Preprocess
from extractor.progress import StopFlag
from extractor.reading import Crew, ahead
from extractor.session import Embedder
from extractor.tuning import tune

PIXELS = Preprocess(64, 64, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def embedder(backbone_file: Path) -> Iterator[Embedder]:
    opened = Embedder(backbone_file, read_facts(backbone_file).preprocess, lanes=2)
    yield opened
    opened.close()


def staged(monkeypatch: pytest.MonkeyPatch, rates: dict[int, float]) -> None:
    """Time stands in: so many images per second of each size, in both lanes together."""
    monkeypatch.setattr(tuning, "_seconds", lambda embedder, size, _side: size * embedder.lanes / rates[size])


@pytest.mark.parametrize(
    ("provider", "rates", "best"),
    [
        ("cpu", {4: 90, 8: 100}, 8),
        ("cpu", {1: 90, 2: 130, 4: 120, 8: 100}, 2),
        ("cpu", {1: 140, 2: 130, 4: 120, 8: 100}, 1),
        ("cuda", {8: 100, 16: 110, 32: 130, 64: 131}, 32),  # one per cent more is not worth the memory
    ],
)
def test_the_batch_size_is_the_fastest(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, provider: str, rates: dict[int, float], best: int
) -> None:
    staged(monkeypatch, rates)
    embedder.provider = provider
    assert tune(embedder, 64, 100_000) == pytest.approx(rates)
    assert embedder.batch_size == best


def test_what_is_soon_done_is_not_measured(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(monkeypatch, {8: 100})
    assert tune(embedder, 64, 100) == {}
    assert tune(embedder, 64, 5_000) == {}, "50 s are not worth it"
    assert embedder.batch_size == 8


def test_a_real_session_is_measured_in_all_its_lanes(
    embedder: Embedder, backbone_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "WORTH", 0.0)
    monkeypatch.setattr(tuning, "SECONDS", 1e-6)
    side = read_facts(backbone_file).preprocess.crop
    rates = tune(embedder, side, 100_000)
    assert {8, 4} <= set(rates)
    assert embedder.batch_size in rates
    assert embedder.calls >= 2 * 2 * len(rates)


def work(crew: Crew, items: int) -> tuple[list[int], int]:
    """Numbers through a crew, and how many of them were at work at once."""
    busy, most, lock = 0, 0, threading.Lock()

    def step(item: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        with lock:
            busy -= 1
        return item

    return list(ahead(step, range(items), crew, StopFlag(), Decoder(PIXELS))), most


def test_a_crew_keeps_the_order_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "cores", lambda: 4)
    found, most = work(Crew(3), 200)
    assert found == list(range(200))
    assert most <= 3
    crew = Crew(None, "cuda")
    assert (crew.size, crew.most) == (4, 4), "beside a GPU all cores decode at once"


def test_a_crew_grows_where_the_consumer_waits_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "cores", lambda: 4)
    monkeypatch.setattr(reading, "WINDOW", 0.0)
    monkeypatch.setattr(reading, "STARVED", -1.0)  # any wait is too long
    starving = Crew()
    assert starving.size == 2
    assert work(starving, 100)[0] == list(range(100))
    assert starving.size == 4
    monkeypatch.setattr(reading, "STARVED", 2.0)  # nobody waits for more than all the time
    content = Crew()
    assert work(content, 100)[0] == list(range(100))
    assert content.size == 2


def test_workers_that_were_asked_for_stay_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 0.0)
    monkeypatch.setattr(reading, "STARVED", -1.0)
    crew = Crew(2)
    work(crew, 100)
    assert crew.size == 2


@pytest.mark.parametrize(
    ("seconds", "provider", "found"),
    [
        ({"read+decode": 30, "backbone": 90, "wait": 1, "embed": 50}, "cpu", "backbone"),
        ({"read+decode": 90, "backbone": 30, "wait": 40, "embed": 5}, "cpu", "decoding"),
        ({"read+decode": 90, "backbone": 30, "wait": 40, "embed": 5}, "cuda", "decoding"),
        ({"read+decode": 90, "backbone": 30, "wait": 5, "embed": 40}, "cuda", "backbone"),
        ({"read+decode": 30, "backbone": 30, "wait": 5, "embed": 5, "settle": 60}, "cpu", "writing"),
    ],
)
def test_the_bottleneck_is_named(seconds: dict[str, float], provider: str, found: str) -> None:
    clock = {name: seconds.get(name, 0.0) for name in ("read+decode", "backbone", "wait", "embed", "settle")}
    assert bottleneck(clock, provider) == found
    assert ADVICE[found, "cpu" if provider == "cpu" else "gpu"]
