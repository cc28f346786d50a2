"""Inference sessions of ONNX Runtime: choose and check a device, and turn pixels into features in several lanes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Condition, local
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs.normalisation import takes_pixels
from extractor.pixels.preprocess import Preprocess
from store.errors import BadDataError, DeviceUnavailableError

from .provider import ACCELERATORS, CPU, check_device, provider_of

if TYPE_CHECKING:
    from .provider import Lane

log = logging.getLogger("penult.extractor")

MAX_DIM = 65536
MAX_LANES = 16  # with more cores each lane gets several threads, because it keeps its own activations


def resolve_device(device: str) -> str:
    """The device to use: ``auto`` becomes the first accelerator that computes, else the CPU with the reason in the log.

    Raises:
        DeviceUnavailableError: the device was requested and does not compute here; says why.
        UsageError: not the name of a device.
    """
    check_device(device)
    reasons = []
    for candidate in ACCELERATORS if device == "auto" else [device]:
        provider = provider_of(candidate)
        why = provider.missing() or provider.trouble(candidate)
        if not why:
            return candidate
        if device != "auto":
            message = f"--device {device}: {why}"
            raise DeviceUnavailableError(message)
        if provider.present():
            reasons.append(why)
    _say_cpu("; ".join(reasons))
    return CPU


@cache
def _say_cpu(why: str) -> None:
    """Log once per process that the CPU is used, and why."""
    if why:
        log.warning("there is a GPU, and it cannot be used: running on the CPU. %s", why)
    else:
        log.info("no GPU here: running on the CPU")


@dataclass(eq=False)
class _Opened:
    """A session and its batch size; both are replaced together when a GPU runs out of memory."""

    session: Any
    batch_size: int
    lanes: local = field(default_factory=local)  # one per thread: a lane has buffers of its own
    running: int = 0
    closing: bool = False
    broken: Exception | None = None


class Embedder:
    """A backbone in an ONNX Runtime session: pixels in, features out, in several lanes at once.

    What differs between devices is in their `provider.Provider`.

    Args:
        model: the ONNX file.
        preprocess: with it, pixels are ``(n, h, w, 3)`` uint8 and are normalised here: inside the graph, or beforehand if
            the file is too large to be rewritten in memory; the features are the same bits. Without it, what the file takes.
        device: its name, not ``auto`` (see `resolve_device`).
        batch_size: images per call; None for the device's default.
        lanes: batches at once; None for the device's default.
        outputs: names of the outputs to compute; by default the first.
        tf32: let a GPU round the products of float32 to 10 bits, for speed.

    Attributes:
        provider: family, such as ``cpu`` or ``cuda``, checked after the session is opened.
        shares_cores: it computes on the cores that decode images.
        fixed_batch: the graph takes no other batch size.
        pads: every batch is padded to one shape.
        batch_size: in use; halved when a GPU runs out of memory.
        lanes: in use.
        calls: number of inference calls so far.
        seconds: spent in them so far, summed over the lanes.
        on_batch: called by the lanes after each batch, with its number of images and its seconds.
        dims: length of a feature vector of each output.

    Raises:
        DeviceUnavailableError: the device cannot be used.
        BadDataError: the file is not a usable network.
    """

    def __init__(
        self,
        model: Path,
        preprocess: Preprocess | None = None,
        *,
        device: str = "cpu",
        batch_size: int | None = None,
        lanes: int | None = None,
        outputs: Sequence[str] = (),
        tf32: bool = False,
    ) -> None:
        self.provider, self._provider = device.partition(":")[0], provider_of(device)
        self.shares_cores = self._provider.shares_cores
        self.calls, self.seconds = 0, 0.0
        self.on_batch: Callable[[int, float], None] | None = None
        self.lanes = lanes or min(self._provider.lanes(), MAX_LANES)
        self._model, self._device, self._preprocess, self._tf32 = model, device, preprocess, tf32
        self._gate, self._pool = Condition(), ThreadPoolExecutor(self.lanes, "penult-lane")
        session = self._open()
        shapes = {output.name: output.shape for output in session.get_outputs()}
        self._outputs = list(outputs) or [next(iter(shapes))]
        self.dims = [self._dim(shapes.get(name, [])) for name in self._outputs]
        tensor = session.get_inputs()[0]
        self._input, self._dtype = tensor.name, np.uint8 if tensor.type == "tensor(uint8)" else np.float32
        self._on_host = preprocess if tensor.type != "tensor(uint8)" else None
        self.fixed_batch = isinstance(tensor.shape[0], int)
        self.pads = self.fixed_batch or self._provider.pads
        size = tensor.shape[0] if self.fixed_batch else batch_size or self._provider.batch_size(device)
        self._opened = _Opened(session, size)

    @property
    def batch_size(self) -> int:
        return self._opened.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self._opened = _Opened(self._opened.session, size)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the loaded network; the file may have been replaced since."""
        return dict(self._opened.session.get_modelmeta().custom_metadata_map)

    def _dim(self, shape: Sequence[Any]) -> int:
        if len(shape) == 2 and isinstance(shape[1], int) and 0 < shape[1] <= MAX_DIM:
            return shape[1]
        message = f"{self._model} gives an output of shape {list(shape)}; expected (n, d) with d at most {MAX_DIM}"
        raise BadDataError(message)

    def _open(self) -> Any:
        graph = None
        if self._preprocess is not None and self._provider.rewrites(self._model):
            graph = takes_pixels(self._model, self._preprocess)
        resolve_device(self._device)  # raises with the reason
        return self._provider.open(self._model, graph, self._device, lanes=self.lanes, tf32=self._tf32)

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """The features of the first output, ``(n, dim)`` float32; see `embed`."""
        return self.embed(batch)[0]

    def submit(self, batch: NDArray[Any]) -> Future[list[NDArray[np.float32]]]:
        """Run `embed` in one of the lanes, and return at once. More than two batches under way per lane only fill memory."""
        return self._pool.submit(self.embed, batch)

    def embed(self, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Features of any number of images: ``(n, dim)`` float32 for each output.

        A GPU that runs out of memory gets a new session and half the batch, down to one image.

        Raises:
            BadDataError: the network refuses the input.
            DeviceUnavailableError: a GPU's memory is too small for one image.
        """
        rows = []
        start = 0
        while start < len(batch):
            opened = self._enter()
            part = batch[start : start + opened.batch_size]
            try:
                rows.append(self._run(opened, part))
                start += len(part)
                continue
            except Exception as error:
                failure = error.with_traceback(None)  # its frames would keep the session alive
            finally:
                self._leave(opened)
            if not any(sign in str(failure) for sign in self._provider.out_of_memory):
                message = f"{self._model}: {self._provider.reason(failure)}"
                raise BadDataError(message) from failure
            self._shrink(opened, failure)
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    def close(self) -> None:
        """End the lanes; batches that have not started are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _enter(self) -> _Opened:
        """The session as it is now, which stays open until `_leave`."""
        with self._gate:
            while self._opened.closing and self._opened.broken is None:
                self._gate.wait()
            if self._opened.broken is not None:
                raise self._opened.broken
            self._opened.running += 1
            return self._opened

    def _leave(self, opened: _Opened) -> None:
        with self._gate:
            opened.running -= 1
            self._gate.notify_all()

    def _shrink(self, opened: _Opened, failure: Exception) -> None:
        """A new session with half the batch, once all lanes have left the old one: both at once would not fit."""
        with self._gate:
            if self._opened is not opened or opened.closing:
                return  # another lane does it
            opened.closing = True
            while opened.running:
                self._gate.wait()
            opened.session = None
            opened.lanes = local()
            try:
                if opened.batch_size == 1:
                    message = f"--device {self._device}: out of memory with a single image"
                    raise DeviceUnavailableError(message) from failure
                size = opened.batch_size // 2
                log.warning("out of memory on %s: going on with batches of %d", self._device, size)
                self._opened = _Opened(self._open(), size)
            except Exception as error:
                opened.broken = error
                raise
            finally:
                self._gate.notify_all()

    def _run(self, opened: _Opened, part: NDArray[Any]) -> list[NDArray[np.float32]]:
        begin = time.perf_counter()
        if self._on_host is not None:
            part = self._on_host.normalise(part)
        short = opened.batch_size - len(part) if self.pads else 0
        padded = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) if short else part
        outputs = self._lane(opened, padded.shape)(padded)
        spent = time.perf_counter() - begin
        with self._gate:
            self.calls += 1
            self.seconds += spent
        if self.on_batch is not None:
            self.on_batch(len(part), spent)
        return [np.asarray(features[: len(part)], np.float32) for features in outputs]

    def _lane(self, opened: _Opened, shape: tuple[int, ...]) -> Lane:
        """The lane of this thread."""
        if not hasattr(opened.lanes, "lane"):
            outputs = dict(zip(self._outputs, self.dims, strict=True))
            opened.lanes.lane = self._provider.lane(opened.session, self._device, self._input, shape, self._dtype, outputs)
        lane: Lane = opened.lanes.lane
        return lane
