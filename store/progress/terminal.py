"""The progress bar: one line at the bottom of a terminal, which messages push down and which leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from store.errors import printable

from .wording import Standing

WIDTH = 24  # characters of the bar itself
CLEAR = "\r\x1b[K"


def is_terminal() -> bool:
    """Whether stderr is a terminal that can clear a line."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or none
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return False


class BarLine:
    """The line on stderr; whoever else writes to the terminal does so inside `cleared`."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is drawn, and nobody is drawing."""
        self._lock = threading.RLock()
        self.drawn = False

    def draw(self, standing: Standing) -> None:
        """Show how far a stage is."""
        share = min(standing.done / standing.total, 1.0) if standing.total else 0.0
        bar = f"[{'=' * int(share * WIDTH):<{WIDTH}}] " if standing.total else ""
        text = printable(bar + standing.text)[: max(shutil.get_terminal_size().columns - 1, 1)]
        with self._lock:
            self._write(CLEAR + text)
            self.drawn = True

    def clear(self) -> None:
        with self._lock:
            if self.drawn:
                self._write(CLEAR)
                self.drawn = False

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Nothing is drawn inside; the bar comes back with its next change."""
        with self._lock:
            self.clear()
            yield

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the terminal is gone; that is not what the command is about
            sys.stderr.write(text)
            sys.stderr.flush()


BAR = BarLine()
