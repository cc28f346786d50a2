"""What a run shows while it works: a progress line with rate and ETA for people, and signals that end it in good order."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("penult.extractor")


class StopFlag:
    """Set by the first SIGINT or SIGTERM inside `stop_on_signal`; ``signum`` is 0 until then."""

    signum = 0

    def __bool__(self) -> bool:
        return self.signum != 0


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag that the pipeline looks at after every batch.

    A second one leaves at once; that is safe, because what is committed is complete and what is not has no final name.
    Outside the main thread (a notebook's worker, a web server) signals are left alone.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        if flag:
            os._exit(128 + signum)
        flag.signum = signum
        log.warning("stopping after this batch; what is done is kept (a second signal leaves at once)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A progress line on stderr; nothing where stderr is no terminal.

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
