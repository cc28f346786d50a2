"""A scheduler sees how far a run is, while it runs: in the JSON log, and in the metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.run_log import observed
from store.progress.stages import Stage


def metrics(path: Path) -> dict[str, float]:
    families = text_string_to_metric_families(path.read_text())
    return {"".join([sample.name, *sample.labels.values()]): sample.value for family in families for sample in family.samples}


def test_a_run_that_is_watched(
    dataset: Callable[..., Path], backbone: Backbone, tmp_path: Path, clock: Any, make_image: Callable[..., Path]
) -> None:
    """Quiet, as a scheduler starts it; the log and the metrics have it all the same."""
    photos = dataset(tmp_path / "photos", {"ants": 15, "bees": 15})
    run_extract(ImageFolder(photos), backbone, tmp_path / "cache", Options(quiet=True))
    for i in range(12):
        make_image(photos / f"ants/new{i}.jpg", seed=900 + i)
    (photos / "ants/new0.jpg").write_bytes(b"no image")
    log, prom = tmp_path / "log.jsonl", tmp_path / "run.prom"
    during: list[dict[str, float]] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "facts", {}).get("event") in ("progress", "shard"):
                during.append(metrics(prom))

    clock.slow("extractor.runtime.session:Embedder.embed", 25)
    logger, reader = logging.getLogger("penult"), Reader()
    with observed(log_json=log, metrics=prom) as record, Stage("running", quiet=True):
        logger.addHandler(reader)
        try:
            summary = run_extract(
                ImageFolder(photos), backbone, tmp_path / "cache", Options(batch_size=3, max_failures="9", quiet=True)
            )
        finally:
            logger.removeHandler(reader)
        record |= {"exit_code": 3, "extract": summary.to_json()}
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (resumed,) = [event for event in events if event.get("event") == "resumed"]
    assert (resumed["inputs"], resumed["cached"], resumed["to_compute"]) == (42, 30, 12)
    lines = [event for event in events if event.get("event") == "progress"]
    assert lines[0]["stage"] == "extracting"
    assert 30 < lines[0]["done"] <= lines[-1]["done"] <= lines[0]["total"] == 42
    assert {"unit", "seconds", "rate", "left", "within"} < set(lines[0])
    (shard,) = [event for event in events if event.get("event") == "shard"]
    assert (shard["inputs"], shard["computed"], shard["done"], shard["total"]) == (12, 11, 42, 42)
    assert shard["rows"] == {"ok": 41, "duplicates": 0, "failed": 1}
    assert not [text for _, text in clock.lines if text.startswith("extracting")], "it was to be quiet"

    assert len(during) == len(lines) + 1
    assert all("penult_exit_code" not in each for each in during)
    assert any("penult_left_seconds" in each for each in during)
    assert (during[-1]["penult_rowsok"], during[-1]["penult_rowsfailed"], during[-1]["penult_inputs"]) == (41, 1, 42)
    beats = [each["penult_heartbeat_timestamp_seconds"] for each in during]
    assert beats == sorted(beats)
    end = metrics(prom)
    assert (end["penult_computed"], end["penult_cached"], end["penult_exit_code"]) == (11, 30, 3)
    assert end["penult_changedsplit"] == summary.changes["split"]
    assert (end["penult_warnings"], "penult_left_seconds" in end) == (len(summary.warnings), False)


def test_nothing_comes_after_the_summary(tmp_path: Path, clock: Any) -> None:
    """A command is still under way when its log is complete: it prints, and the watcher may have something to say."""
    log, prom = tmp_path / "log.jsonl", tmp_path / "run.prom"
    with Stage("running"):
        with observed(log_json=log, metrics=prom) as record:
            clock.sleep(40)
            record["exit_code"] = 0
        clock.sleep(40)
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["progress", "summary"]
    assert metrics(prom)["penult_exit_code"] == 0
