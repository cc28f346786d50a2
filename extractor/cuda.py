"""The NVIDIA side of a session: libraries, providers and their options, the proof that they compute, buffers that never move.

What was decided, and why:

- Two lanes share one session. ONNX Runtime gives every concurrent `run` a stream of its own and releases the interpreter
  lock, so one lane's copies hide behind the other's compute; a second session would cost the weights a second time.
- Pixels and features lie in device buffers that are made once per lane and batch size, so memory is flat. The host side is
  pinned: a copy from pageable memory goes through the driver's own buffer at half the speed, with the interpreter locked.
- A CUDA graph is replayed at fixed addresses and must not run in two threads at once. It saves the launches of kernels, which
  batches of an extraction hide anyway; so it is off, and `Cuda.graph` turns it on for a session with one lane.
- NHWC is what tensor cores take: on for float16 and TF32; without them cuDNN's NCHW kernels need no transposition.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from store.environment import cache_folder
from store.errors import DeviceUnavailableError, OutputError

from .graph import WEIGHTED
from .onnxfile import digest

log = logging.getLogger("penult.extractor")

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
NO_GRAPH = "graph capture"  # in the message of a session whose network cannot be captured
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_graph_ids = count(1)


@dataclass(frozen=True)
class Cuda:
    """How a GPU computes.

    Attributes:
        tf32: let float32 products lose 13 bits; decides the numbers, so the fingerprint says it.
        half: the network is float16.
        graph: capture a CUDA graph; for one lane.
        nhwc: the layout of tensor cores; None for where there are some to use.
        search: how cuDNN chooses its algorithms: ``EXHAUSTIVE`` tries them once per shape, ``HEURISTIC`` guesses.
    """

    tf32: bool = False
    half: bool = False
    graph: bool = False
    nhwc: bool | None = None
    search: str = "EXHAUSTIVE"


DEFAULTS = Cuda()


def split_device(device: str) -> tuple[str, int]:
    """``cuda:1`` to ``("cuda", 1)``."""
    kind, _, number = device.partition(":")
    return kind, int(number or 0)


def load_libraries(onnxruntime: Any) -> str:
    """Load CUDA and cuDNN from NVIDIA's packages; gives what ONNX Runtime prints about it, for stdout belongs to results."""
    onnxruntime.set_default_logger_severity(4)  # what it would log is raised instead
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    return " ".join(printed.getvalue().split())


def providers(device: str, cuda: Cuda, model: bytes | Path) -> list[Any]:
    """What a session is opened with, in order of preference.

    Args:
        device: ``cuda[:N]`` or ``tensorrt[:N]``.
        cuda: how it computes.
        model: the graph, or its file; TensorRT's engines are kept under its digest.
    """
    kind, number = split_device(device)
    on = {False: "0", True: "1"}
    options = {
        "device_id": number,
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and shapes never change
        "use_tf32": on[cuda.tf32],
        "cudnn_conv_algo_search": cuda.search,
        "prefer_nhwc": on[cuda.half or cuda.tf32 if cuda.nhwc is None else cuda.nhwc],
        "enable_cuda_graph": on[cuda.graph],
    }
    found: list[Any] = [(PROVIDERS["cuda"], options), "CPUExecutionProvider"]
    if kind == "tensorrt":
        if not cuda.tf32:
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the provider has no option for it, and TensorRT's default is on
        engines = engine_folder(model, cuda)
        tensorrt = {
            "device_id": number,
            "trt_fp16_enable": on[cuda.half],
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(engines),
            "trt_cuda_graph_enable": on[cuda.graph],
        }
        found.insert(0, (PROVIDERS["tensorrt"], tensorrt))
    return found


def engine_folder(model: bytes | Path, cuda: Cuda) -> Path:
    """Where TensorRT keeps the engines of a graph, which take minutes to build; made here.

    ``tensorrt/DIGEST`` in `cache_folder`. The digest is of what decides the numbers: the graph, which holds weights and
    normalisation, and the precision. TensorRT itself adds its version and the kind of GPU to the names of the files.

    Raises:
        OutputError: it cannot be made.
    """
    held = hashlib.sha256(model).hexdigest() if isinstance(model, bytes) else digest(model)
    name = hashlib.sha256(f"{held} {cuda.tf32} {cuda.half}".encode()).hexdigest()
    folder = cache_folder() / "tensorrt" / name[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create {folder} for TensorRT's engines: {error.strerror}; PENULT_CACHE names another place"
        raise OutputError(message) from error
    return folder


def prove(session: Any, device: str, onnxruntime: Any, said: str = "") -> None:
    """Ask a session what it computes with.

    Args:
        session: just opened.
        device: what was asked for.
        onnxruntime: the module.
        said: what `load_libraries` gave.

    Raises:
        DeviceUnavailableError: the provider was dropped, or layers with weights went to another one; neither is an exception
            in ONNX Runtime.
    """
    kind, _ = split_device(device)
    wanted, delivered = PROVIDERS[kind], session.get_providers()[0]
    if delivered != wanted:
        libraries = {"cuda": "cuDNN 9", "tensorrt": "TensorRT 10"}[kind]
        version = getattr(onnxruntime, "cuda_version", "") or "13"
        message = (
            f"--device {device}: ONNX Runtime made a session on {delivered} instead: the {wanted} did not load "
            f"(does the driver support CUDA {version}, is {libraries} here?)"
        )
        raise DeviceUnavailableError(f"{message} {said}".rstrip())
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older ONNX Runtime
        return
    for part in session.get_provider_graph_assignment_info():
        strays = [node for node in part.get_nodes() if node.op_type in WEIGHTED]
        if part.ep_name != wanted and strays:
            message = (
                f"--device {device}: ONNX Runtime gave {strays[0].op_type} {strays[0].name!r} to {part.ep_name}; "
                f"this network cannot run there, try --device {'cuda' if kind == 'tensorrt' else 'cpu'}"
            )
            raise DeviceUnavailableError(message)


class BoundLane:
    """Passes one padded batch after the other through a session, in buffers that are made once. For one thread.

    Args:
        session: shared with other lanes.
        device: where the buffers are; on ``cpu`` they are ordinary memory.
        pixels: name of the input.
        shape, dtype: of a padded batch.
        outputs: length of a feature vector by name of the output.
        turn: held while the session runs; for a CUDA graph, whose memory is shared with the graphs of other lanes.
        graph: whether the session captures a CUDA graph, which then is this lane's own.
    """

    def __init__(
        self,
        session: Any,
        device: str,
        pixels: str,
        shape: Sequence[int],
        dtype: DTypeLike,
        outputs: Mapping[str, int],
        turn: AbstractContextManager[Any],
        *,
        graph: bool = False,
    ) -> None:
        import onnxruntime

        self._session, self._turn = session, turn
        kind, number = split_device(device)
        where = ("cpu" if kind == "cpu" else "cuda", number)  # TensorRT's memory is CUDA's
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._staged = np.zeros(shape, dtype)
        if where[0] == "cuda":
            pin(self._staged, number, onnxruntime)
        self._pixels = make(list(shape), dtype, *where)
        self._features = [make([shape[0], dim], np.float32, *where) for dim in outputs.values()]
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(pixels, self._pixels)
        for name, value in zip(outputs, self._features, strict=True):
            self._binding.bind_ortvalue_output(name, value)
        self._options = onnxruntime.RunOptions()
        if graph:
            self._options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))

    def __call__(self, padded: NDArray[Any]) -> list[NDArray[Any]]:
        """The outputs ``(n, d)`` of a batch of just the shape and type that the lane was made for."""
        np.copyto(self._staged, padded, casting="no")
        self._pixels.update_inplace(self._staged)
        with self._turn:
            self._session.run_with_iobinding(self._binding, self._options)  # returns when the GPU has finished
        return [np.array(value.numpy()) for value in self._features]


def pin(buffer: NDArray[Any], number: int, onnxruntime: Any) -> bool:
    """Lock an array's memory for fast copies to a GPU as long as the array lives.

    ONNX Runtime's Python interface cannot allocate pinned memory: ``OrtDevice`` knows default memory alone. CUDA's own
    runtime, which is loaded for it already, can pin memory that is there.

    Returns:
        Whether it did; without, copies are slower and nothing else changes.
    """
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{str(onnxruntime.cuda_version).partition('.')[0]}")
        address = ctypes.c_void_p(buffer.ctypes.data)
        runtime.cudaSetDevice(ctypes.c_int(number))  # of this thread, which else would open a context on device 0
        status = runtime.cudaHostRegister(address, ctypes.c_size_t(buffer.nbytes), ctypes.c_uint(PORTABLE))
    except (AttributeError, OSError) as error:
        log.debug("host memory is not pinned: %s", error)
        return False
    if status:
        log.debug("host memory is not pinned: CUDA error %d", status)
        runtime.cudaGetLastError()  # or it would be reported of whatever comes next
        return False
    weakref.finalize(buffer, runtime.cudaHostUnregister, address)
    return True
