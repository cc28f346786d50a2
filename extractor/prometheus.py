"""A run's metrics as a Prometheus textfile, for an alarm on runs that fail, hang or lose images."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import PenultError
from store.format.output import write_output

log = logging.getLogger("penult.extractor")

LAST_SUCCESS = "penult_last_success_timestamp_seconds"


@dataclass(frozen=True)
class _Collected:
    """Metric families in the form that prometheus-client writes."""

    families: list[Any]

    def collect(self) -> list[Any]:
        return self.families


class Metrics(logging.Handler):
    """A log handler that writes a Prometheus textfile: at the start, with every committed shard and line of progress, and at
    the end.

    The file is replaced atomically. Names of files are never labels. The time of the last success survives failures.

    Args:
        path: the file, such as ``/var/lib/node_exporter/penult.prom``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._last_success = self._read_last_success()
        self._warnings = set[str]()
        self._so_far: dict[str, Any] = {}
        self._left: float | None = None
        self._over = False
        self._write({}, None)

    def emit(self, record: logging.LogRecord) -> None:
        facts = getattr(record, "facts", {})
        if record.levelno >= logging.WARNING:
            self._warnings.add(record.getMessage())
        if facts.get("event") == "shard":
            self._so_far = facts
        elif facts.get("event") == "progress":
            self._left = facts["left"]
        else:
            return
        if not self._over:
            self._write({}, None)

    def summary(self, facts: dict[str, Any]) -> None:
        """Write the metrics of a run: ``exit_code``, and ``extract`` as `Summary.to_json` returns it."""
        code = int(facts["exit_code"])
        if code in (0, 3):  # 3 is complete, with recorded failures inside the budget
            self._last_success = time.time()
        with self.lock or nullcontext():  # the watcher may be writing a line of progress
            self._left, self._over = None, True
            self._write(facts.get("extract") or {}, code)

    def _read_last_success(self) -> float | None:
        from prometheus_client.parser import text_string_to_metric_families

        if not self._path.is_file():  # a device such as /dev/full has no end
            return None
        try:
            families = list(text_string_to_metric_families(self._path.read_text("utf-8")))
        except (OSError, ValueError):
            return None
        values = [sample.value for family in families for sample in family.samples if sample.name == LAST_SUCCESS]
        return values[0] if values else None

    def _write(self, extract: dict[str, Any], code: int | None) -> None:
        from prometheus_client import generate_latest
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, GaugeMetricFamily] = {}

        def gauge(name: str, text: str, value: float, **labels: str) -> None:
            family = families.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_metric(list(labels.values()), value)

        gauge("penult_heartbeat_timestamp_seconds", "When the run last made progress.", time.time())
        if self._last_success is not None:
            gauge(LAST_SUCCESS, "When a run last ended with exit code 0 or 3.", self._last_success)
        if code is not None:
            gauge("penult_exit_code", "Exit code of the last run.", code)
        gauge("penult_warnings", "Different warnings of the last run.", len(self._warnings))
        if self._left is not None:
            gauge("penult_left_seconds", "Estimated time until the end of what is under way.", self._left)
        if rows := {**self._so_far.get("rows", {}), **extract}:
            for status in ("ok", "duplicates", "failed"):
                gauge("penult_rows", "Inputs of the last run by status, so far.", rows[status], status=status)
            gauge("penult_inputs", "Inputs of the last run, done or not.", rows.get("inputs", self._so_far.get("total", 0)))
        if extract:
            gauge("penult_computed", "Images that the last run computed.", extract["computed"])
            gauge("penult_cached", "Inputs whose features were there before the last run.", extract["cached"])
            for what, count in extract["changes"].items():
                gauge("penult_changed", "Samples of the run before that have another split or label now.", count, what=what)
            for stage, seconds in extract["seconds"].items():
                gauge("penult_stage_seconds", "Seconds of the last run by stage.", seconds, stage=stage)
            gauge(
                "penult_images_per_second", "Rate of the last run; 0 where nothing was computed.", extract["images_per_second"]
            )
            gauge("penult_cache_bytes", "Size of the cache's shards.", extract["cache_bytes"])
        try:
            write_output(self._path, generate_latest(_Collected(list(families.values()))), overwrite=True)
        except PenultError as error:  # metrics that cannot be written do not end the run
            log.warning("%s", error)
