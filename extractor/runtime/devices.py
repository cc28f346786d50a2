"""A pool of devices, one child process each, for ``--device cuda:0,cuda:1``.

This process reads, decodes, keeps the ledger and writes; each child holds one device and turns pixels into features. So
duplicates are computed once, shards have one writer, and a child that dies loses nothing that was committed. Every lane of a
child has its own connection, which carries a JSON header and the bytes of arrays, both ways, and nothing else.
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

from .provider import check_device, provider_of
from .session import MAX_LANES, Embedder, resolve_device

log = logging.getLogger("penult.extractor")

START = "from extractor.runtime.devices import serve; serve(sys.argv[1:])"
PATIENCE = 10.0  # seconds for a child to end by itself


def parse_devices(text: str) -> list[str]:
    """The devices that ``--device`` lists, with commas between several.

    Raises:
        UsageError: one is not a device, ``auto`` is among several, or they are of different kinds, which compute differently.
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
    """The devices that ``--device`` lists, ready to be opened.

    A single one is resolved (see `resolve_device`); several are tried by their own processes.

    Raises:
        DeviceUnavailableError: a device was requested and cannot be used here.
    """
    devices = parse_devices(text)
    if len(devices) == 1:
        return [resolve_device(text)]
    if why := provider_of(devices[0]).missing():
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
    """Several devices used like one `Embedder`: each has an `Embedder` in a child process.

    Attributes:
        provider, shares_cores, dims, fixed_batch: those of every child's `Embedder`.
        lanes: of all children together.

    Raises:
        DeviceUnavailableError: a device cannot be used; names it.
        BadDataError: the file is not a usable network.
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
        self.provider, self.shares_cores = first["provider"], first["shares_cores"]
        self.dims, self.fixed_batch = first["dims"], first["fixed_batch"]
        self._idle: SimpleQueue[tuple[_Child, Connection]] = SimpleQueue()
        lanes = [child.facts["lanes"] for child in self._children]
        for lane in range(max(lanes)):  # the devices in turn, so that all have work from the start
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
        """Run `embed` on the device that is free first, and return at once."""
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
        """End the children; batches under way are lost."""
        for child in self._children:
            child.hang_up()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()


class _Child:
    """A child process, its connections and the facts that it last sent."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.device: str = settings["device"]
        self.facts: dict[str, Any] = {}
        pairs = [socket.socketpair() for _ in range(MAX_LANES)]  # one for each lane that the child may have
        descriptors = [pair[1].fileno() for pair in pairs]
        # The child inherits what is blocked here: Ctrl-C and SIGTERM are for the parent alone, which ends its children.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                python(START, *descriptors),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # results go there
                pass_fds=descriptors,
            )
        except OSError as error:
            message = f"cannot start a process for --device {self.device}: {error.strerror}"
            raise PenultError(message) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for _, child_end in pairs:
                child_end.close()
        self.connections = [Connection(own_end.detach()) for own_end, _ in pairs]
        with suppress(OSError):  # it is dead, which is reported when its answer is awaited
            self.connections[0].send_bytes(json.dumps(settings).encode())

    def await_ready(self) -> None:
        """Wait until the child has opened its session."""
        self._receive(self.connections[0])

    def ask(self, connection: Connection, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Send a batch and return the arrays of the answer."""
        try:
            _send(connection, {}, [batch])
        except OSError:
            raise self._dead() from None
        before = self.facts["batch_size"]
        features = self._receive(connection)
        if self.facts["batch_size"] < before:
            log.warning("out of memory on %s: going on with batches of %d", self.device, self.facts["batch_size"])
        return features

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
        message = (
            f"--device {self.device}: its process died of {why}; what is committed stays, "
            f"run the same command again to continue"
        )
        return DeviceUnavailableError(message)

    def hang_up(self) -> None:
        """Let the child end, because no batch follows; a thread that waits for an answer gets an exception."""
        for connection in self.connections:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it, which closing would not

    def close(self) -> None:
        """Wait until the child has ended, or kill it."""
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
    """The work of a child process: open a session, then answer every lane until the connections end."""
    logging.getLogger("penult").addHandler(logging.NullHandler())  # the parent does the logging
    connections = [Connection(int(descriptor)) for descriptor in descriptors]
    with suppress(EOFError, OSError):  # the parent ended while this started
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
    """Give each child that computes on cores its share of them, or each would use all."""
    if provider_of(device).shares_cores and cores() >= count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[place::count])


def _facts(embedder: Embedder) -> dict[str, Any]:
    names = ("provider", "shares_cores", "dims", "fixed_batch", "lanes", "batch_size", "calls", "seconds")
    return {name: getattr(embedder, name) for name in names}


def _answer(connection: Connection, embedder: Embedder) -> None:
    with suppress(EOFError, OSError):  # the parent has closed it, or is gone
        while True:
            _, arrays = _receive(connection)
            try:
                outputs = [features for array in arrays for features in embedder.embed(array)]
            except PenultError as error:
                _send(connection, answer_of(error), [])
                continue
            except Exception:  # a bug: the process ends, with a traceback, and the parent sees that
                traceback.print_exc()
                os._exit(70)
            _send(connection, {"facts": _facts(embedder)}, outputs)
