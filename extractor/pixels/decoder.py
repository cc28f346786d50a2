"""Image decoding in child processes, so that an image that kills or hangs its decoder costs one file, not the run.

Decoders are C libraries, and read files from cameras, web servers or attackers. Each thread that decodes has a decode worker
of its own, which may use `MEMORY` bytes and be silent for `TIMEOUT` seconds. Two pipes carry

- to the worker: length, then the file's bytes;
- back: kind, height and width, then the pixels; or kind, 0 and a length, then code and message as JSON.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import warnings
from contextlib import suppress
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from store.environment import python
from store.errors import InterruptedRunError, PenultError

from .images import MAX_BYTES, MEMORY, ImageError
from .preprocess import Preprocess

if TYPE_CHECKING:  # a worker need not import it
    from extractor.signals import StopFlag

TIMEOUT = 60.0  # seconds that a worker may be silent
START_TIMEOUT = 60.0  # seconds until it first answers
PIPE_BYTES = 2**20  # the most that Linux allows to any user
SLICE = 0.25  # seconds after which a run that is to stop gives up a busy worker

START = "from extractor.pixels.decoder import serve; serve()"
SINGLE_THREADED = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} | {"VECLIB_MAXIMUM_THREADS": "1"}

LENGTH = struct.Struct("<Q")
ANSWER = struct.Struct("<BII")
READY, PIXELS, REFUSED = range(3)


class Decoder:
    """Decodes, resizes and crops in worker processes; any number of threads may call it, and each then has its own worker.

    A worker starts when it is first needed, or at `start`. Leaving the context ends all of them, busy ones too.

    Args:
        preprocess: what happens to the pixels.
        crop: whether they are cropped too.
        stop: once it is set, no worker is waited for.
    """

    def __init__(self, preprocess: Preprocess, *, crop: bool = True, stop: StopFlag | None = None) -> None:
        self.preprocess = preprocess
        self._settings = json.dumps({"preprocess": preprocess.facts(), "crop": crop, "timeout": TIMEOUT}).encode()
        self._stop = stop
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed, self._lock = False, Lock()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Pixels of a file's content: ``(height, width, 3)`` uint8, the same bits as if decoded in this process.

        Raises:
            ImageError: with one of the ledger's codes; ``decoder_crash`` or ``timeout`` if the worker had to be replaced.
            InterruptedRunError: the run is to stop and the worker was busy.
            PenultError: no worker can be started.
        """
        if len(data) > MAX_BYTES:
            message = f"{len(data) / 2**20:.0f} MiB; the limit is {MAX_BYTES // 2**20} MiB"
            raise ImageError(code="too_large", message=message)
        worker = self._take()
        try:
            return worker.ask(data)
        finally:
            self._give_back(worker)

    def start(self) -> None:
        """Start a worker before it is needed, and do not wait for it."""
        self._give_back(self._take())

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                message = "the decoder is closed"
                raise ValueError(message)
            while self._idle:
                worker = self._idle.pop()
                if worker.lives():
                    return worker
                self._workers.discard(worker)  # killed while idle, so no file is to blame
                worker.close()
            worker = _Worker(self._settings, self._stop)
            self._workers.add(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if worker.alive and not self._closed:
                self._idle.append(worker)
                return
            self._workers.discard(worker)
        worker.close()

    def close(self) -> None:
        """End all workers. The thread of a busy one soon gets an exception, and its owner must wait for it."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Worker:
    """One child process and the pipes to it. Only `kill` may be called by another thread than the one that uses it."""

    def __init__(self, settings: bytes, stop: StopFlag | None) -> None:
        self._settings, self._stop = settings, stop
        self.alive, self._ready = True, False
        # The child inherits the blocked signals: Ctrl-C and SIGTERM are for the parent alone, which ends its children.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                python(START),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                process_group=0,  # so Ctrl-Z in the terminal does not stop it, which would count as silence
                env=os.environ | SINGLE_THREADED,
            )
        except OSError as error:
            message = f"cannot start a decode worker: {error.strerror}"
            raise PenultError(message) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._to, select.POLLOUT)
        self._readable.register(self._from, select.POLLIN)
        os.set_blocking(self._to, False)
        for pipe in (self._to, self._from):
            _widen(pipe)

    def ask(self, data: bytes) -> NDArray[np.uint8]:
        """The answer to one file; after ``decoder_crash``, ``timeout`` or any other exception the process is gone."""
        try:
            if not self._ready:
                self._begin()
            self._send(LENGTH.pack(len(data)))
            self._send(data)
            kind, height, width = ANSWER.unpack(self._receive(ANSWER.size))
            if kind == PIXELS:
                pixels = np.empty((height, width, 3), np.uint8)
                self._fill(pixels.reshape(-1).data)
                return pixels
            answer = json.loads(self._receive(width))
        except BaseException:
            self.close()
            raise
        raise ImageError(code=answer["code"], message=answer["message"])

    def _begin(self) -> None:
        """Send the settings and read the first answer. An error until then has nothing to do with the image."""
        try:
            self._send(LENGTH.pack(len(self._settings)))
            self._send(self._settings)
            self._receive(ANSWER.size)
        except ImageError as error:
            assert self._process.stderr is not None
            self.kill()
            message = f"the decode worker does not start: {error}"
            failure = PenultError(message)
            failure.add_note(self._process.stderr.read().decode(errors="replace")[-4000:])
            raise failure from None
        if self._process.stderr:
            self._process.stderr.close()
        self._ready = True

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        with suppress(BrokenPipeError):  # it is dead, so the answer will be missing
            while left:
                try:
                    left = left[os.write(self._to, left) :]
                except BlockingIOError:
                    self._wait(self._writable)

    def _receive(self, size: int) -> bytearray:
        answer = bytearray(size)
        self._fill(memoryview(answer))
        return answer

    def _fill(self, left: memoryview) -> None:
        while left:
            self._wait(self._readable)
            count = os.readv(self._from, [left])
            if not count:
                raise ImageError(code="decoder_crash", message=f"the decoder died: {self._died_of()}")
            left = left[count:]

    def _wait(self, pipe: select.poll) -> None:
        timeout = TIMEOUT if self._ready else START_TIMEOUT
        for _ in range(math.ceil(timeout / SLICE)):
            if pipe.poll(SLICE * 1000):
                return
            if self._stop:
                raise InterruptedRunError(self._stop.signum)
        raise ImageError(code="timeout", message=f"no answer from the decoder for {timeout:g} s")

    def _died_of(self) -> str:
        try:
            status = self._process.wait(SLICE)
        except subprocess.TimeoutExpired:  # it has closed its end of the pipe but still runs
            self._process.kill()
            status = self._process.wait()
        return f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"

    def lives(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End the process and close its pipes."""
        self.alive = False
        with self._process:  # waits, and closes the pipes
            self._process.kill()


def _widen(pipe: int) -> None:
    """Make room for a whole answer in a pipe: with the usual 64 KiB both sides wake each other up three times per image."""
    with suppress(AttributeError, OSError):  # macOS has no such call; a user may have used up the kernel's allowance
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def serve() -> None:
    """The main loop of a decode worker: answer one file after the other until standard input ends."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    warnings.simplefilter("ignore")  # they are about metadata; damaged pixels have a code
    settings = json.loads(_question(questions) or b"{}")
    preprocess, crop = Preprocess.from_facts(settings["preprocess"]), settings["crop"]
    _restrict()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # a library that prints must not write between the answers, or into a pipe nobody reads
        os.dup2(nowhere, descriptor)
    answers.write(ANSWER.pack(READY, 0, 0))
    answers.flush()
    while (data := _question(questions)) is not None:
        # The parent kills a worker that hangs; if the parent was killed, this alarm does.
        signal.alarm(math.ceil(settings["timeout"]) + 5)
        answer = _answer(data, preprocess, crop=crop)
        if isinstance(answer, bytes):
            answers.write(ANSWER.pack(REFUSED, 0, len(answer)) + answer)
        else:
            answers.write(ANSWER.pack(PIXELS, *answer.shape[:2]))
            answers.write(answer.data)
        answers.flush()
        signal.alarm(0)


def _question(pipe: BinaryIO) -> bytes | None:
    """The content of the next file; None if the parent closed the pipe or died."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = pipe.read(length)
    return data if len(data) == length else None


def _restrict() -> None:
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        with suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one per core otherwise, each with its stack in the address space


def _answer(data: bytes, preprocess: Preprocess, *, crop: bool) -> NDArray[np.uint8] | bytes:
    """Contiguous pixels, or JSON with the code."""
    try:
        return preprocess.read(data, crop=crop)
    except ImageError as error:
        code, message = error.code, str(error)
    except MemoryError:
        code, message = "too_large", f"needs more than {MEMORY / 2**30:.0f} GiB to decode"
    except Exception as error:  # a fault in a decoder or here; it must not cost more than the file
        code, message = "decoder_crash", f"{type(error).__name__}: {error}"
    return json.dumps({"code": code, "message": message}).encode()
