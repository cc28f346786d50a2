"""The log of a run: its messages as JSON lines, its warnings, and the summary that ends it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from store.errors import StorageError, outcome
from store.format import json_text
from store.format.output import open_lines

from .prometheus import Metrics

log = logging.getLogger("penult.extractor")


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
        self._path, self._over = path, False
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
        with self.lock or nullcontext():  # the watcher may be writing a line of progress
            self._write(time.time(), {"event": "summary", **facts})
            self._over = True

    def _write(self, when: float, facts: dict[str, Any]) -> None:
        stamp = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
        try:
            if not self._over:
                self._file.write(json_text.dumps({"time": stamp, **facts}) + "\n")
                self._file.flush()
        except OSError as error:
            self._over = True
            log.warning("cannot write %s: %s; it ends here", self._path, error.strerror)

    def close(self) -> None:
        with suppress(OSError):  # what is left in memory cannot be written either
            self._file.close()
        super().close()


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
            logger.removeHandler(watcher)  # nothing comes after the summary
            watcher.summary(facts)
            watcher.close()
