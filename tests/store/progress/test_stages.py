"""A stage is shown as far as it is, by a watcher that is there only while something is under way."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store.progress.stages import EVERY, WATCH, Clock, Stage, staged
from store.progress.wording import Standing, about, span


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "penult-progress"]


def test_a_line_every_half_minute_says_how_far_how_fast_and_how_long(clock: Any) -> None:
    with Stage("extracting", 100, "images") as stage:
        for _ in stage.each(range(50)):
            clock.sleep(2)
    assert clock.lines == [
        (30, "extracting: 14 of 100 images, 30 a minute, 3 min left"),
        (60, "extracting: 29 of 100 images, 30 a minute, 2 min left"),
        (90, "extracting: 44 of 100 images, 30 a minute, 2 min left"),
    ]
    assert watchers() == []


def test_a_call_that_counts_no_steps_is_no_silence(clock: Any) -> None:
    staged("fitting the head")(clock.sleep)(100)
    assert clock.text.splitlines() == [f"still fitting the head, {time}" for time in ("30 s", "1 min", "1 min 30 s")]


def test_the_innermost_stage_is_shown_with_the_part_of_the_outer_one(clock: Any) -> None:
    with Stage("comparing", 4, "backbones") as outer:
        for name in outer.each(["resnet18", "resnet50"]):
            outer.at(name)
            with Stage("extracting", 10, "images") as inner:
                clock.sleep(20)
                inner.step(5)
    clock.sleep(60)  # nothing is under way
    assert clock.lines == [(30, "2 of 4: resnet50: extracting: 0 of 10 images, 10 s")]


def test_the_rate_is_that_of_the_last_minutes_and_of_what_is_really_done(clock: Any) -> None:
    """40 of 100 are there from before, 20 are recognised in no time, and the machine slows down to a tenth."""
    with Stage("extracting", 100, "images", done=40, cached=20) as stage:
        clock.sleep(29)
        stage.skip(20)
        for _ in range(20):
            clock.sleep(1)
            stage.step()
        for _ in range(15):
            clock.sleep(10)
            stage.step()
    texts = dict(clock.lines)
    assert texts[30] == "extracting: 60 of 100 images, 30 s", "nothing is known of the speed yet"
    assert texts[60] == "extracting: 81 of 100 images, 42 a minute, 26 s left"
    assert texts[180] == "extracting: 93 of 100 images, 6.0 a minute, 69 s left"


def test_what_is_expected_to_be_recognised_takes_no_time(clock: Any) -> None:
    with Stage("extracting", 100, "images", cached=50) as stage:
        for _ in stage.each(range(10)):
            clock.sleep(4)
        standing = stage.standing(clock.now())
    assert standing.left == pytest.approx((100 - 10 - 50) * 4)


def test_quiet_reaches_all_stages_inside(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "penult")
    with Stage("extracting", quiet=True), Stage("reading", 3, "files"):
        clock.sleep(40)
    assert clock.lines == []
    (record,) = caplog.records  # for --log-json and --metrics
    assert record.levelno == logging.DEBUG
    assert record.facts["stage"] == "reading"


def test_the_facts_of_a_line(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Stage("sweep", 2, "backbones") as outer, Stage("extracting", 60, "images") as stage:
        outer.at("vit")
        for _ in stage.each(range(20)):
            clock.sleep(2)
    facts = {"stage": "extracting", "within": ["1 of 2: vit"], "done": 14, "total": 60, "unit": "images"}
    assert caplog.records[0].facts == {"event": "progress", **facts, "seconds": 30, "rate": 0.5, "left": 90}


def test_a_stage_that_an_error_has_left_ends_with_the_one_around_it(clock: Any) -> None:
    with Stage("outer"):
        Stage("abandoned").__enter__()
        assert watchers()
    assert (WATCH.due, watchers()) == (float("inf"), [])


def test_short_stages_in_a_row_are_no_silence(clock: Any) -> None:
    for _ in range(4):
        staged("reading")(clock.sleep)(20)
    assert clock.lines == [(30, "still reading, 10 s"), (60, "still reading, 20 s")]


def test_stages_of_two_threads_are_shown_side_by_side(clock: Any) -> None:
    opened, over = threading.Event(), threading.Event()

    def work() -> None:
        with Stage("reading", 5, "files"):
            opened.set()
            over.wait()

    thread = threading.Thread(target=work)
    with Stage("writing", 3, "files"):
        thread.start()
        opened.wait()
        clock.sleep(30)
        over.set()
        thread.join()
    assert sorted(clock.text.splitlines()) == ["reading: 0 of 5 files, 30 s", "writing: 0 of 3 files, 30 s"]


def test_the_watcher_itself_writes_while_a_call_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the thread waits, and its waiting is what makes time pass; the call returns after the fifth line."""
    enough, times = threading.Event(), list[float]()

    class Hurried(Clock):
        time = 0.0

        def now(self) -> float:
            return self.time

        def wait(self, change: threading.Condition, seconds: float) -> None:
            self.time += seconds

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            times.append(WATCH.clock.now())
            if len(times) == 5:
                enough.set()

    logger, handler = logging.getLogger("penult.progress"), Heard()
    monkeypatch.setattr(WATCH, "clock", Hurried())
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    try:
        staged("waiting")(enough.wait)()
    finally:
        logger.removeHandler(handler)
    assert times[:5] == [EVERY * k for k in range(1, 6)]
    assert watchers() == []


def _of_a_child(pipe: Any) -> None:
    pipe.send((WATCH.due, len(WATCH._stacks)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_watches_nothing() -> None:
    here, there = multiprocessing.Pipe()
    with Stage("extracting", 3, "images"):
        child = multiprocessing.get_context("fork").Process(target=_of_a_child, args=(there,))
        child.start()
        assert here.recv() == (float("inf"), 0)
        child.join()


def test_a_process_that_may_start_no_thread_works_in_silence(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Stage("extracting", 2, "images") as stage:
        for _ in stage.each(range(2)):
            clock.sleep(40)
    assert (stage.done, clock.lines) == (2, [])


def test_a_measure_that_fails_is_tried_again(clock: Any, tmp_path: Path) -> None:
    file = tmp_path / "part"
    with Stage("downloading", 10, "MiB", measure=lambda: file.stat().st_size):
        clock.sleep(30)
        file.write_bytes(b"12345")
        clock.sleep(30)
    assert [text.partition(",")[0] for _, text in clock.lines] == ["downloading: 0 of 10 MiB", "downloading: 5 of 10 MiB"]


def test_nobody_who_reads_does_not_end_the_work(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(logging.getLogger("penult.progress"), "handlers", [Gone()])
    staged("fitting")(clock.sleep)(100)
    assert clock.time == 100


BAR = """
import logging, threading
from store.progress import stages
from extractor.commands.console import say, _StderrHandler
logger = logging.getLogger("penult")
logger.handlers, logger.level = [_StderrHandler(logging.INFO)], logging.INFO
working, enough = threading.Event(), threading.Event()
class FiveSeconds(stages.Clock):
    time = 0.0
    def now(self):
        return self.time
    def wait(self, change, seconds):
        if working.is_set() and self.time < 5:
            self.time += seconds
            return
        if working.is_set():
            enough.set()
        change.wait()
stages.WATCH.clock = FiveSeconds()
with stages.Stage("running", bar=False), stages.Stage("extracting", 30, "images", quiet={quiet}) as stage:
    stage.step(15)
    with stages.WATCH._change:
        working.set()
        stages.WATCH._change.notify_all()
    enough.wait()
    say("a message", err=True)
say("the end", err=True)
"""


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_has_one_bar_that_messages_do_not_garble(quiet: bool) -> None:
    terminal, end = pty.openpty()
    code = BAR.format(quiet=quiet)
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stderr=end, env=environment)
    os.close(end)
    written = b""
    while True:
        try:
            written += os.read(terminal, 4096)
        except OSError:  # Linux's way of saying that nobody writes any more
            break
    os.close(terminal)
    assert child.wait() == 0
    text = written.decode()
    screen = [line.rpartition("\r\x1b[K")[2] for line in text.replace("\r\n", "\n").split("\n")]
    assert screen == ["a message", "the end", ""], "what is left of it on the screen"
    assert ("[============            ] extracting: 15 of 30 images, " in text) is not quiet


@pytest.mark.parametrize(
    ("rate", "words"), [(1234.5, "1,234 a second"), (3.21, "3.2 a second"), (0.5, "30 a minute"), (1 / 900, "4.0 an hour")]
)
def test_rates_are_said_in_a_unit_that_fits(rate: float, words: str) -> None:
    assert Standing("reading", 1, 9, "files", 1, rate).text == f"reading: 1 of 9 files, {words}"


def test_times_are_no_more_exact_than_they_are_known() -> None:
    assert [span(seconds) for seconds in (0, 59.6, 90, 7260, 7200)] == ["0 s", "1 min", "1 min 30 s", "2 h 1 min", "2 h"]
    assert [about(seconds) for seconds in (0.2, 89, 100, 3000, 12_345)] == ["1 s", "89 s", "2 min", "50 min", "3 h 20 min"]


def test_steps_of_many_threads_are_all_counted() -> None:
    with Stage("reading", 4000, "files") as stage:
        threads = [threading.Thread(target=lambda: [stage.step() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stage.done == 4000


def test_a_command_that_is_over_soon_says_nothing_of_its_progress(
    penult: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = penult("info", tmp_path / "none.cache")
    assert (code, out, err.count("\n")) == (66, "", 1)
    assert watchers() == []
