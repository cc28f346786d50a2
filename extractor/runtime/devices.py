"""Several devices, one process each: ``--device cuda:0,cuda:1``.

This process reads, decodes, keeps the ledger and writes; each child holds one device and turns pixels into features. So copies
are computed once, shards have one writer, and a child that dies loses nothing that was committed. Every lane of a child has
a connection of its own; over it go a JSON header and the bytes of arrays, both ways, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.machine import cores
from extractor.pixels.preprocess import Preprocess
from store.environment import python
from store.errors import DeviceUnavailableError, PenultError, UsageError, answer_of, raise_answered

from .session import MAX_LANES, Embedder, check_device, no_cuda, resolve_device

log = logging.getLogger("penult.extractor")

START = "from extractor.runtime.devices import serve; serve(sys.argv[1:])"
PATIENCE = 10.0  # seconds for a child to end by itself


def parse_devices(text: str) -> list[str]:
    """The devices that ``--device`` lists, with commas between several.

    Raises:
        UsageError: one is none, ``auto`` is among several, or their kinds compute differently.
    """
    devices = text.split(",")
    for device in devices:
        check_device(device)
    kinds = {device.partition(":")[0] for device in devices}
    if len(devices) > 1 and ("auto" in kinds or len(kinds) > 1):
        message = f"--device {text}: expected several devices of one kind, such as cuda:0,cuda:1"
        raise UsageError(message)
    return devices


def resolve_devices(text: str) -> list[str]:
    """`parse_devices`; a single one is resolved (see `resolve_device`), several are tried by the processes that get them.

    Raises:
        DeviceUnavailableError: CUDA was asked for and cannot be here.
    """
    devices = parse_devices(text)
    if len(devices) == 1:
        return [resolve_device(text)]
    if devices[0] != "cpu" and (why := no_cuda()):
        message = f"--device {text}: {why}"
        raise DeviceUnavailableError(message)
    return devices


def open_embedder(
    devices: Sequence[str],
    model: Path,
    preprocess: Preprocess,
    *,
    batch_size: int | None,
    outputs: Sequence[str],
    tf32: bool,
) -> Embedder | DevicePool:
    """An `Embedder` for one device, a `DevicePool` for several."""
    if len(devices) == 1:
        return Embedder(model, preprocess, device=devices[0], batch_size=batch_size, outputs=outputs, tf32=tf32)
    return DevicePool(devices, model, preprocess, batch_size=batch_size, outputs=outputs, tf32=tf32)


class DevicePool:
    """An `Embedder` for each device, in a child process, with the face of one.

    Attributes:
        provider, dims, fixed_batch: as every child's `Embedder` has them.
        lanes: of all children together.

    Raises:
        DeviceUnavailableError: a device is not really there; names it.
        BadDataError: the file is no usable network.
    """

    def __init__(
        self,
        devices: Sequence[str],
        model: Path,
        preprocess: Preprocess,
        *,
        batch_size: int | None,
        outputs: Sequence[str],
        tf32: bool,
    ) -> None:
        settings = {
            "model": str(model.absolute()),
            "preprocess": preprocess.facts(),
            "batch_size": batch_size,
            "outputs": list(outputs),
            "tf32": tf32,
        }
        self._children: list[_Child] = []
        self._pool: ThreadPoolExecutor | None = None
        try:
            for place, device in enumerate(devices):
                self._children.append(_Child({**settings, "device": device, "place": [place, len(devices)]}))
            for child in self._children:  # all start at the same time
                child.await_ready()
        except BaseException:
            self.close()
            raise
        first = self._children[0].facts
        self.provider, self.dims, self.fixed_batch = first["provider"], first["dims"], first["fixed_batch"]
        self._idle: SimpleQueue[tuple[_Child, Connection]] = SimpleQueue()
        lanes = [child.facts["lanes"] for child in self._children]
        for lane in range(max(lanes)):  # of each device in turn, so that all have something to do from the start
            for child in self._children:
                if lane < child.facts["lanes"]:
                    self._idle.put((child, child.connections[lane]))
        self.lanes = sum(lanes)
        self._pool = ThreadPoolExecutor(self.lanes, "penult-device")

    @property
    def batch_size(self) -> int:
        return min(int(child.facts["batch_size"]) for child in self._children)

    @property
    def calls(self) -> int:
        return sum(int(child.facts["calls"]) for child in self._children)

    @property
    def seconds(self) -> float:
        return sum(float(child.facts["seconds"]) for child in self._children)

    def submit(self, batch: NDArray[Any]) -> Future[list[NDArray[np.float32]]]:
        """`embed` on whichever device is free first, while the caller goes on."""
        assert self._pool is not None
        return self._pool.submit(self.embed, batch)

    def embed(self, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        """As `Embedder.embed`.

        Raises:
            DeviceUnavailableError: the device's process died.
        """
        child, connection = self._idle.get()
        try:
            return child.ask(connection, batch)
        finally:
            self._idle.put((child, connection))

    def close(self) -> None:
        """End the children; what they compute is lost."""
        for child in self._children:
            child.hang_up()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()


class _Child:
    """One process, its connections and what it last said of itself."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.device: str = settings["device"]
        self.facts: dict[str, Any] = {}
        pairs = [socket.socketpair() for _ in range(MAX_LANES)]  # one for each lane that the child may have
        theirs = [pair[1].fileno() for pair in pairs]
        # The child inherits what is blocked here: Ctrl-C and SIGTERM are for the parent alone, which ends its children.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                python(START, *theirs),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # results go there
                pass_fds=theirs,
            )
        except OSError as error:
            message = f"cannot start a process for --device {self.device}: {error.strerror}"
            raise PenultError(message) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for _, their in pairs:
                their.close()
        self.connections = [Connection(ours.detach()) for ours, _ in pairs]
        with suppress(OSError):  # it is dead, and says so when it is waited for
            self.connections[0].send_bytes(json.dumps(settings).encode())

    def await_ready(self) -> None:
        """Wait until it has its session."""
        self._receive(self.connections[0])

    def ask(self, connection: Connection, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Send a batch; the arrays of the answer."""
        try:
            _send(connection, {}, [batch])
        except OSError:
            raise self._dead() from None
        before = self.facts["batch_size"]
        found = self._receive(connection)
        if self.facts["batch_size"] < before:
            log.warning("out of memory on %s: going on with batches of %d", self.device, self.facts["batch_size"])
        return found

    def _receive(self, connection: Connection) -> list[NDArray[np.float32]]:
        try:
            header, arrays = _receive(connection)
        except (EOFError, OSError):
            raise self._dead() from None
        raise_answered(header)
        self.facts = header["facts"]
        return arrays

    def _dead(self) -> DeviceUnavailableError:
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = 0
        why = f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"
        message = f"--device {self.device}: its process died of {why}; what is committed stays, and the same command goes on"
        return DeviceUnavailableError(message)

    def hang_up(self) -> None:
        """Let it end, for nobody will ask it; whoever waits for an answer gets an exception."""
        for connection in self.connections:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it, which closing would not

    def close(self) -> None:
        """Wait for its end, or bring it about."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for connection in self.connections:
            connection.close()


def _send(connection: Connection, header: dict[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
    shapes = [[list(array.shape), array.dtype.name] for array in arrays]
    connection.send_bytes(json.dumps({**header, "arrays": shapes}).encode())
    for array in arrays:
        connection.send_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _receive(connection: Connection) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    header = json.loads(connection.recv_bytes())
    arrays = []
    for shape, dtype in header.pop("arrays"):
        array = np.empty(shape, dtype)
        connection.recv_bytes_into(array.reshape(-1).view(np.uint8).data)
        arrays.append(array)
    return header, arrays


def serve(descriptors: Sequence[str]) -> None:
    """What a child does until its connections end: open a session, then answer every lane."""
    logging.getLogger("penult").addHandler(logging.NullHandler())  # the parent says what there is to say
    connections = [Connection(int(descriptor)) for descriptor in descriptors]
    with suppress(EOFError, OSError):  # the parent has gone while this started
        settings = json.loads(connections[0].recv_bytes())
        _share_cores(settings["device"], *settings["place"])
        try:
            embedder = Embedder(
                Path(settings["model"]),
                Preprocess.from_facts(settings["preprocess"]),
                device=settings["device"],
                batch_size=settings["batch_size"],
                outputs=settings["outputs"],
                tf32=settings["tf32"],
            )
        except PenultError as error:
            _send(connections[0], answer_of(error), [])
            return
        _send(connections[0], {"facts": _facts(embedder)}, [])
        lanes = [Thread(target=_answer, args=(connection, embedder)) for connection in connections[: embedder.lanes]]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()


def _share_cores(device: str, place: int, count: int) -> None:
    """On CPUs each child takes its part of the cores, or all would want all."""
    if device == "cpu" and cores() >= count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[place::count])


def _facts(embedder: Embedder) -> dict[str, Any]:
    names = ("provider", "dims", "fixed_batch", "lanes", "batch_size", "calls", "seconds")
    return {name: getattr(embedder, name) for name in names}


def _answer(connection: Connection, embedder: Embedder) -> None:
    with suppress(EOFError, OSError):  # the parent has closed it, or is gone
        while True:
            _, arrays = _receive(connection)
            try:
                found = [features for array in arrays for features in embedder.embed(array)]
            except PenultError as error:
                _send(connection, answer_of(error), [])
                continue
            except Exception:  # a bug: the process ends, with a traceback, and the parent sees that
                traceback.print_exc()
                os._exit(70)
            _send(connection, {"facts": _facts(embedder)}, found)
