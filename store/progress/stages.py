"""Stages of long work, and the watcher that says every half minute how far they are.

Work opens a `Stage` and counts its steps, which costs an addition. A thread, which lives as long as a stage is open, writes a
line every `EVERY` seconds, so that a native call that reports nothing for an hour is no silence either. On a terminal it draws
a bar instead.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from .terminal import BAR, is_terminal
from .wording import Standing

log = logging.getLogger("penult.progress")

EVERY = 30.0  # seconds between lines; who watches a log, or a heartbeat, may take 40 s of silence for the end
SOON = 1.0  # seconds until a terminal shows a bar: what is over by then needs none
DRAWN = 0.25  # seconds between changes of the bar
RECENT = 120.0  # seconds that decide the rate ..
FEWEST = 10  # .. and at least this many steps
PATIENCE = 2.0  # times what a step takes; then the work has become slower

T = TypeVar("T")
P = ParamSpec("P")


class Clock:
    """Time as the watcher sees it; a test gives it another one (`WATCH.clock`)."""

    def now(self) -> float:
        """Seconds since any moment."""
        return time.monotonic()

    def wait(self, change: threading.Condition, seconds: float) -> None:
        """Wait this long, or until ``change``, which is held, is notified."""
        change.wait(None if seconds == math.inf else max(seconds, 0.0))


class Stage:
    """A part of the work, which is under way inside ``with``. Stages may stand in each other; the innermost is shown.

    Args:
        name: what is done, as in "still fitting the head" and "extracting: 3 of 8 images".
        total: number of steps; None if it is not known, or if the work cannot count its steps.
        unit: what a step is, such as ``images``.
        done: steps that earlier runs have done.
        cached: how many of the steps are expected to be skipped, because earlier runs have done most of their work.
        quiet: say nothing, in the stages inside neither; the JSON log of a command has it still.
        bar: on a terminal, draw a bar.
        measure: returns how many steps are done, where the work itself cannot say it.

    >>> with Stage("verifying", 3, "files") as stage:
    ...     for file in stage.each(["a", "b", "c"]):
    ...         pass
    >>> stage.done
    3
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        cached: int = 0,
        quiet: bool = False,
        bar: bool = True,
        measure: Callable[[], int] | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.quiet, self.bar, self._measure = quiet, bar, measure
        self.item = ""
        self._cached, self._steps = cached, 0
        self._lock = threading.Lock()
        self._began = self._stepped = 0.0
        self._marks: deque[tuple[float, int]] = deque()  # times, and the steps until then

    def __enter__(self) -> Self:
        self._began = WATCH.clock.now()
        self._marks = deque([(self._began, 0)])
        WATCH.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        WATCH.end(self)

    def step(self, count: int = 1) -> None:
        """Count steps as done; any thread may."""
        with self._lock:
            self.done += count
            self._steps += count
            self._stepped = WATCH.clock.now()

    def skip(self, count: int = 1) -> None:
        """Count steps as done that needed next to no time, so that they say nothing of the speed."""
        with self._lock:
            self.done += count
            self._cached = max(self._cached - count, 0)
            if not self._steps:
                self._marks = deque([(WATCH.clock.now(), 0)])

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, of which each is a step: done when the next one is taken."""
        for item in items:
            yield item
            self.step()

    def at(self, item: str) -> None:
        """Say which step is under way, for the lines of the stages inside."""
        self.item = item

    def standing(self, now: float, within: tuple[str, ...] = ()) -> Standing:
        """How far it is."""
        with suppress(OSError):  # a file that was there a moment ago
            if self._measure and (arrived := self._measure() - self.done) > 0:
                self.step(arrived)
        with self._lock:
            rate, done, since = self._rate(now), self.done, now - self._stepped
            to_come = None if self.total is None else max(self.total - self.done - self._cached, 0)
        left = None if rate is None or to_come is None else to_come / rate - since
        left = None if left is None or left <= 0 < (to_come or 0) else max(left, 0.0)  # it was expected before now
        return Standing(self.name, done, self.total, self.unit, now - self._began, rate, left, within)

    @property
    def part(self) -> str:
        """The step under way, for the lines of the stages inside; empty if it has no name."""
        return f"{self.done + 1} of {self.total}: {self.item}" if self.item and self.total else self.item

    def _rate(self, now: float) -> float | None:
        """Steps a second over the last two minutes, or ten steps if these took longer, until the last step.

        If nothing came for twice as long as a step takes, the time until now counts.
        """
        marks, steps, end = self._marks, self._steps, self._stepped
        while len(marks) > 1 and now - marks[1][0] >= RECENT and steps - marks[1][1] >= FEWEST:
            marks.popleft()
        (begin, before), (last, _) = marks[0], marks[-1]
        if end - last >= SOON:
            marks.append((end, steps))
        if steps > before and now - end > PATIENCE * (end - begin) / (steps - before):
            end = now
        return (steps - before) / (end - begin) if steps > before and end > begin else None


class Watch:
    """The stages under way in each thread, and the thread that says how far they are.

    Attributes:
        clock: what it waits by.
        due: when it writes next; infinity if nothing is under way.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.forget()

    def forget(self) -> None:
        """Watch nothing."""
        self._change = threading.Condition()
        self._stacks: dict[int, list[Stage]] = {}
        self._thread: threading.Thread | None = None
        self._line = self._draw = math.inf
        self._ended = self._next = -math.inf  # when nothing was under way any more, and when a line would have come

    @property
    def due(self) -> float:
        return min(self._line, self._draw)

    def begin(self, stage: Stage) -> None:
        with self._change:
            stack = self._stacks.setdefault(threading.get_ident(), [])
            stage.quiet = stage.quiet or any(outer.quiet for outer in stack)
            stack.append(stage)
            if self._thread is None:
                now = self.clock.now()
                self._line = self._next if 0 <= now - self._ended < SOON else now + EVERY  # short stages in a row are one wait
                self._draw = now + SOON if is_terminal() else math.inf
                self._thread = threading.Thread(target=self._run, name="penult-progress", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # no more threads here, or Python is about to end: the work goes on in silence
                    self._thread, self._line, self._draw = None, math.inf, math.inf

    def end(self, stage: Stage) -> None:
        """The stage is over, and every stage inside it that an error has left."""
        over = None
        with self._change:
            for thread, stack in list(self._stacks.items()):
                if stage in stack:
                    del stack[stack.index(stage) :]
                    if not stack:
                        del self._stacks[thread]
            if not self._stacks:
                over, self._thread = self._thread, None
                self._ended, self._next = self.clock.now(), self._line
                self._line = self._draw = math.inf
                self._change.notify_all()
        if over and over is not threading.current_thread():
            over.join()  # nothing is written after the end
        BAR.clear()

    def tick(self) -> None:
        """Write what is due by now."""
        with self._change:
            now = self.clock.now()
            line, draw = now >= self._line, now >= self._draw
            self._line = now + EVERY if line else self._line
            self._draw = now + DRAWN if draw else self._draw
            stacks = [(stack[-1], stack[-1].standing(now, _within(stack))) for stack in self._stacks.values()] * (line or draw)
        if draw:
            shown = [standing for stage, standing in stacks if stage.bar and not stage.quiet and not log.disabled]
            BAR.draw(shown[0]) if shown else BAR.clear()
        for stage, standing in stacks if line else ():
            level = logging.DEBUG if stage.quiet or BAR.drawn else logging.INFO
            with suppress(OSError, ValueError):  # nobody reads it any more, which must not end the work
                log.log(level, "%s", standing.text, extra={"facts": standing.facts})

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._change:
                if self._thread is me:
                    self.clock.wait(self._change, self.due - self.clock.now())
                if self._thread is not me:
                    return
            self.tick()


def _within(stack: list[Stage]) -> tuple[str, ...]:
    return tuple(outer.part for outer in stack[:-1] if outer.part)


WATCH = Watch()


def _forget() -> None:
    """A forked child has no watcher, and what it writes is no bar."""
    WATCH.forget()
    BAR.forget()


os.register_at_fork(after_in_child=_forget)


def staged(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make each call of a function a stage, without steps."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def within(*arguments: P.args, **named: P.kwargs) -> T:
            with Stage(name):
                return function(*arguments, **named)

        return within

    return decorate
