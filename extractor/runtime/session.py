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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extractor.graphs.cpu_session import cpu_session
from extractor.graphs.graph import in_float16
from extractor.graphs.normalisation import takes_pixels
from extractor.graphs.onnx_file import read_model
from extractor.machine import cores, nvidia_driver_present
from extractor.pixels.preprocess import Preprocess
from store.errors import BadDataError, DeviceUnavailableError, UsageError

from .cuda import PROVIDER, BoundLane, free_memory, hushed, prove, providers, reason, trouble

log = logging.getLogger("penult.extractor")

# The last two as in CUBLAS_STATUS_ALLOC_FAILED and CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
OUT_OF_MEMORY = ("BFCArena", "Failed to allocate memory", "OUT_OF_MEMORY", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
MAX_DIM = 65536
CPU_BATCH = 4  # large batches are slower there: they do not fit the processor's caches
GPU_BATCHES = ((40e9, 256), (12e9, 128), (0, 64))  # by the free bytes on a GPU; a size that is too large is halved
MAX_LANES = 16  # on a CPU; with more cores each lane gets several threads, because it keeps its own activations
LANES_CUDA = 2  # the copies of one batch hide behind the compute of the other
MAX_PROLOGUE = 256 * 2**20  # bytes of a backbone file that is rewritten in memory on a CPU, see `Embedder`


def check_device(device: str) -> None:
    """Refuse text that is not the name of a device.

    Raises:
        UsageError: neither ``auto``, ``cpu``, ``cuda`` nor ``cuda:N``.
    """
    kind, colon, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdecimal())):
        message = f"--device {device}: expected auto, cpu, cuda or cuda:N"
        raise UsageError(message)


def no_cuda() -> str:
    """Why no GPU can be used here, as far as is known without trying one; empty if one may work."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {PROVIDER}; install onnxruntime-gpu"
    if not nvidia_driver_present():
        return "this machine has no NVIDIA driver (no /dev/nvidiactl). Install the driver, or pass --device cpu"
    return ""


def resolve_device(device: str) -> str:
    """The device to use: ``auto`` becomes ``cuda`` if that computes, else ``cpu`` with the reason in the log.

    Raises:
        DeviceUnavailableError: CUDA was requested and does not compute here; says why.
        UsageError: not the name of a device.
    """
    check_device(device)
    if device == "cpu":
        return device
    why = no_cuda() or trouble("cuda" if device == "auto" else device)
    if not why:
        return "cuda" if device == "auto" else device
    if device != "auto":
        message = f"--device {device}: {why}"
        raise DeviceUnavailableError(message)
    _say_cpu(why if nvidia_driver_present() else "")
    return "cpu"


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


Lane = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]  # one padded batch to the outputs


class Embedder:
    """A backbone in an ONNX Runtime session: pixels in, features out, in several lanes at once.

    On a CPU a lane is a thread that runs whole batches alone: several small batches side by side are faster than one
    whose layers all threads wait for, even more so if decoding uses the same cores. On a GPU two lanes let copies hide behind
    compute. On a GPU every batch is padded to one shape, so that its memory stays flat and results do not depend on the last
    batch; a CPU gives the same bits at every batch size (measured on nine networks, fp32).

    Args:
        model: the ONNX file.
        preprocess: with it, pixels are ``(n, h, w, 3)`` uint8 and are normalised here: inside the graph, or beforehand if
            the file is too large to be rewritten in memory; the features are the same bits. Without it, what the file takes.
        device: ``cpu``, ``cuda`` or ``cuda:N`` (see `resolve_device`).
        batch_size: images per call; None for the device's default.
        lanes: batches at once; None for one per core on the CPU and two on a GPU.
        outputs: names of the outputs to compute; by default the first.
        tf32: let a GPU round the products of float32 to 10 bits, for speed.

    Attributes:
        provider: family, ``cpu`` or ``cuda``, checked after the session is opened.
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
        self.provider = device.partition(":")[0]
        self.calls, self.seconds = 0, 0.0
        self.on_batch: Callable[[int, float], None] | None = None
        self.lanes = lanes or (LANES_CUDA if self.provider == "cuda" else min(cores(), MAX_LANES))
        self._model, self._device, self._preprocess, self._tf32 = model, device, preprocess, tf32
        self._gate, self._pool = Condition(), ThreadPoolExecutor(self.lanes, "penult-lane")
        session = self._open()
        shapes = {output.name: output.shape for output in session.get_outputs()}
        self._outputs = list(outputs) or [next(iter(shapes))]
        self.dims = [self._dim(shapes.get(name, [])) for name in self._outputs]
        tensor = session.get_inputs()[0]
        self._input, self._dtype = tensor.name, np.uint8 if tensor.type == "tensor(uint8)" else np.float32
        self._on_host = preprocess if tensor.type != "tensor(uint8)" else None
        self.fixed_batch = isinstance(tensor.shape[0], int)  # the graph takes no other
        self._opened = _Opened(session, tensor.shape[0] if self.fixed_batch else batch_size or self._usual_batch())

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

    def _usual_batch(self) -> int:
        if self.provider == "cpu":
            return CPU_BATCH
        free = free_memory(self._device)
        return next(size for least, size in GPU_BATCHES if free >= least)

    def _dim(self, shape: Sequence[Any]) -> int:
        if len(shape) == 2 and isinstance(shape[1], int) and 0 < shape[1] <= MAX_DIM:
            return shape[1]
        message = f"{self._model} gives an output of shape {list(shape)}; expected (n, d) with d at most {MAX_DIM}"
        raise BadDataError(message)

    def _open(self) -> Any:
        import onnxruntime

        graph = self._graph()
        if self.provider == "cpu":
            try:
                return cpu_session(graph or self._model, threads=max(cores() // self.lanes, 1))
            except Exception as error:  # onnxruntime's exceptions have no common public base
                message = f"{self._model} cannot be run: {reason(error)}"
                raise BadDataError(message) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        import onnx

        resolve_device(self._device)  # raises with the reason
        nodes = (onnx.load_model_from_string(graph) if graph else read_model(self._model)).graph
        choice = providers(self._device, tensor_cores=self._tf32 or in_float16(nodes))
        try:  # its own fallback to the CPU would print, and continue
            with hushed(onnxruntime):
                session = onnxruntime.InferenceSession(graph or str(self._model), options, providers=choice, enable_fallback=0)
        except Exception as error:
            message = f"--device {self._device}: {reason(error)}"
            raise DeviceUnavailableError(message) from error
        prove(session, self._device, nodes)
        return session

    def _graph(self) -> bytes | None:
        """The graph that takes uint8 pixels; None to open the file: on a CPU, a copy of a large one costs too much memory."""
        if self._preprocess is None or (self.provider == "cpu" and self._model.stat().st_size > MAX_PROLOGUE):
            return None
        return takes_pixels(self._model, self._preprocess)

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
            if not any(sign in str(failure) for sign in OUT_OF_MEMORY):
                message = f"{self._model}: {reason(failure)}"
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
        short = opened.batch_size - len(part) if self.fixed_batch or self.provider == "cuda" else 0
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
            opened.lanes.lane = self._make_lane(opened, shape)
        lane: Lane = opened.lanes.lane
        return lane

    def _make_lane(self, opened: _Opened, shape: tuple[int, ...]) -> Lane:
        session = opened.session
        if self.provider == "cpu":
            return lambda padded: session.run(self._outputs, {self._input: padded})
        outputs = dict(zip(self._outputs, self.dims, strict=True))
        return BoundLane(session, self._device, self._input, shape, self._dtype, outputs)
