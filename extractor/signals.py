"""A stop at a signal: clean, after the batch under way, and in time."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

log = logging.getLogger("penult.extractor")

GRACE = 20.0  # seconds from SIGTERM or Ctrl-C to the end of a command; Kubernetes kills after 30, systemd after 90
TWICE = 0.5  # seconds; timeout(1) sends a signal to its command and to the group of processes that this is in
OVER = b"\0"  # no signal has this number


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
        log.warning("stopping as soon as this step ends; %s (a second signal exits at once)", kept)

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
