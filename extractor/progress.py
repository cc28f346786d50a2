"""Progress and logs of a run: a progress bar, a JSON log, Prometheus metrics, and a stop at a signal, clean and in time."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from store.errors import PenultError, StorageError, outcome
from store.format import json_text
from store.format.output import open_lines, write_output

log = logging.getLogger("penult.extractor")

GRACE = 20.0  # seconds from SIGTERM or Ctrl-C to the end of a command; Kubernetes kills after 30, systemd after 90
TWICE = 0.5  # seconds; timeout(1) sends a signal to its command and to the group of processes that this is in
OVER = b"\0"  # no signal has this number
LAST_SUCCESS = "penult_last_success_timestamp_seconds"


class StopFlag:
    """Set by the first SIGINT or SIGTERM inside `stop_on_signal`; ``signum`` is 0 until then."""

    signum = 0

    def __bool__(self) -> bool:
        return self.signum != 0


@contextmanager
def stop_on_signal(kept: str = "what is done is kept") -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag that the pipeline looks at after every batch.

    A second one exits at once; that is safe, because files are either committed and complete or have no final name.
    Outside the main thread (a notebook's worker, a web server) signals are left alone.

    Args:
        kept: what happens to the work done so far, for the message.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if flag:
            os._exit(128 + signum)
        flag.signum = signum
        log.warning("stopping after this batch; %s (a second signal exits at once)", kept)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def leaving_in_time() -> Iterator[None]:
    """End the process `GRACE` seconds after the first SIGINT or SIGTERM inside the block, and at once at a second one.

    Python runs the handler of a signal between two steps of its own, so a native call of ONNX Runtime or torch that takes an
    hour would delay it for an hour. But the interpreter writes the signal's number into a pipe at once, and a thread reads it.
    What is committed by then is complete, and temporary files are left to the next run.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_leave_in_time, args=(reader, GRACE), name="penult-signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, OVER)
        watch.join()
        for end in (reader, writer):
            os.close(end)


def _leave_in_time(pipe: int, grace: float) -> None:
    """Read the numbers of signals from a pipe, until `OVER`."""
    first, deadline = 0, math.inf
    while select.select([pipe], [], [], max(deadline - time.monotonic(), 0) if first else None)[0]:
        number = os.read(pipe, 1)
        if number == OVER:
            return
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            now = time.monotonic()
            if not first:
                first, deadline = number[0], now + grace
            elif now > deadline - grace + TWICE:
                break
    else:
        message = f"error: this step has not ended {grace:g} s after signal {first}: it is given up; what is committed stays\n"
        with suppress(OSError, ValueError):  # nobody may read it, which must not keep this process
            if select.select([], [2], [], 0)[1]:
                os.write(2, message.encode())
    os._exit(128 + first)


class Progress:
    """A progress bar on stderr; nothing if stderr is not a terminal.

    Args:
        total: number of steps.
        what: label in front of the bar.
        quiet: show nothing.
    """

    def __init__(self, total: int, what: str, *, quiet: bool = False) -> None:
        self.total, self.what = total, what
        self._bar: Any = None
        self._task: Any = None
        self._visible = not quiet and sys.stderr.isatty() and total > 0

    def __enter__(self) -> Progress:
        if self._visible:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
            from rich.text import Text

            class Rate(ProgressColumn):
                def render(self, task: Any) -> Text:
                    return Text(f"{task.speed:.0f} images/s" if task.speed else "")

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                Rate(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.what, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)


class JsonLog(logging.Handler):
    """A log handler that writes each record as one line of JSON; `summary` writes the last line.

    What cannot be written any more, on a full disk, is warned of once; it does not end the run, nor hide how that ends.

    Args:
        path: the file; a run appends to it.

    Raises:
        StorageError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._failed = path, False
        try:
            self._file = open_lines(path)
        except OSError as error:
            message = f"cannot write {path}: {error.strerror}"
            raise StorageError(message) from error

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        self._write(record.created, {**facts, **getattr(record, "facts", {})})

    def summary(self, facts: dict[str, Any]) -> None:
        """The last line: ``event`` is ``summary``."""
        self._write(time.time(), {"event": "summary", **facts})

    def _write(self, when: float, facts: dict[str, Any]) -> None:
        stamp = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
        try:
            if not self._failed:
                self._file.write(json_text.dumps({"time": stamp, **facts}) + "\n")
                self._file.flush()
        except OSError as error:
            self._failed = True
            log.warning("cannot write %s: %s; it ends here", self._path, error.strerror)

    def close(self) -> None:
        with suppress(OSError):  # what is left in memory cannot be written either
            self._file.close()
        super().close()


@dataclass(frozen=True)
class _Collected:
    """Metric families in the form that prometheus-client writes."""

    families: list[Any]

    def collect(self) -> list[Any]:
        return self.families


class Metrics(logging.Handler):
    """A log handler that writes a Prometheus textfile: at the start, after every committed shard, and at the end.

    The file is replaced atomically. Names of files are never labels. The time of the last success survives failures.

    Args:
        path: the file, such as ``/var/lib/node_exporter/penult.prom``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._last_success = self._read_last_success()
        self._write({}, None)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "facts", {}).get("event") == "shard":
            self._write({}, None)

    def summary(self, facts: dict[str, Any]) -> None:
        """Write the metrics of a run: ``exit_code``, and ``extract`` as `Summary.to_json` returns it."""
        code = int(facts["exit_code"])
        if code in (0, 3):  # 3 is complete, with recorded failures inside the budget
            self._last_success = time.time()
        self._write(facts.get("extract") or {}, code)

    def _read_last_success(self) -> float | None:
        from prometheus_client.parser import text_string_to_metric_families

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
        if extract:
            for status in ("ok", "duplicates", "failed"):
                gauge("penult_rows", "Inputs of the last run by status.", extract[status], status=status)
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


class _Kept(logging.Handler):
    """Keeps the text of every warning, once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.texts:
            self.texts.append(text)


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """The warnings that are logged inside the block, for the JSON summary of a run."""
    logger, handler = logging.getLogger("penult"), _Kept()
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)


@contextmanager
def observed(*, log_json: Path | None = None, metrics: Path | None = None) -> Iterator[dict[str, Any]]:
    """Write the JSON log and the metrics of a run, however it ends.

    Yields:
        The facts of the last line, for the body to fill in, ``exit_code`` above all; ``warnings`` and ``seconds`` are added.
    """
    logger = logging.getLogger("penult")
    watchers: list[JsonLog | Metrics] = [JsonLog(log_json)] if log_json else []
    watchers += [Metrics(metrics)] if metrics else []
    level = logger.level
    logger.setLevel(logging.DEBUG if watchers else level)  # they see everything; other handlers have levels of their own
    for watcher in watchers:
        logger.addHandler(watcher)
    facts: dict[str, Any] = {"exit_code": 70}
    begin = time.perf_counter()
    try:
        with kept_warnings() as facts["warnings"]:
            yield facts
    except BaseException as error:
        code, text = outcome(error)
        facts |= {**getattr(error, "facts", {}), "exit_code": code, "error": text}
        raise
    finally:
        facts["seconds"] = round(time.perf_counter() - begin, 3)
        logger.setLevel(level)
        for watcher in watchers:
            watcher.summary(facts)
            logger.removeHandler(watcher)
            watcher.close()
