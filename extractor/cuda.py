"""The NVIDIA side of a session: libraries, the provider and its options, the proof that it computes, buffers that never move.

What was decided, and why:

- Two lanes share one session. ONNX Runtime gives every concurrent `run` a stream of its own and releases the interpreter
  lock, so one lane's copies hide behind the other's compute; a second session would cost the weights a second time.
- Pixels and features lie in device buffers that are made once per lane and batch size, so memory is flat. The host side is
  pinned: a copy from pageable memory goes through the driver's own buffer at half the speed, with the interpreter locked.
- NHWC is what tensor cores take: on where they are used; without them cuDNN's NCHW kernels need no transposition.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from store.errors import DeviceUnavailableError

from .graph import WEIGHTED

log = logging.getLogger("penult.extractor")

PROVIDER = "CUDAExecutionProvider"
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(frozen=True)
class Cuda:
    """How a GPU computes.

    Attributes:
        tf32: let float32 products lose 13 bits; decides the numbers, so the fingerprint says it.
        half: the network is float16.
    """

    tf32: bool = False
    half: bool = False


DEFAULTS = Cuda()


def number_of(device: str) -> int:
    """Which card ``cuda`` or ``cuda:N`` is."""
    return int(device.partition(":")[2] or 0)


def load_libraries(onnxruntime: Any) -> str:
    """Load CUDA and cuDNN from NVIDIA's packages; gives what ONNX Runtime prints about it, for stdout belongs to results."""
    onnxruntime.set_default_logger_severity(4)  # what it would log is raised instead
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    return " ".join(printed.getvalue().split())


def providers(device: str, cuda: Cuda) -> list[Any]:
    """What a session on ``cuda[:N]`` is opened with, in order of preference."""
    on = {False: "0", True: "1"}
    options = {
        "device_id": number_of(device),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and shapes never change
        "use_tf32": on[cuda.tf32],
        "prefer_nhwc": on[cuda.half or cuda.tf32],
    }
    return [(PROVIDER, options), "CPUExecutionProvider"]


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
    delivered = session.get_providers()[0]
    if delivered != PROVIDER:
        version = getattr(onnxruntime, "cuda_version", "") or "13"
        message = (
            f"--device {device}: ONNX Runtime made a session on {delivered} instead: the {PROVIDER} did not load "
            f"(does the driver support CUDA {version}, is cuDNN 9 here?)"
        )
        raise DeviceUnavailableError(f"{message} {said}".rstrip())
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older ONNX Runtime
        return
    for part in session.get_provider_graph_assignment_info():
        strays = [node for node in part.get_nodes() if node.op_type in WEIGHTED]
        if part.ep_name != PROVIDER and strays:
            message = (
                f"--device {device}: ONNX Runtime gave {strays[0].op_type} {strays[0].name!r} to {part.ep_name}; "
                f"this network cannot run there, try --device cpu"
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
    """

    def __init__(
        self,
        session: Any,
        device: str,
        pixels: str,
        shape: Sequence[int],
        dtype: DTypeLike,
        outputs: Mapping[str, int],
    ) -> None:
        import onnxruntime

        self._session = session
        where = (device.partition(":")[0], number_of(device))
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._staged = np.zeros(shape, dtype)
        if where[0] == "cuda":
            pin(self._staged, where[1], onnxruntime)
        self._pixels = make(list(shape), dtype, *where)
        self._features = [make([shape[0], dim], np.float32, *where) for dim in outputs.values()]
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(pixels, self._pixels)
        for name, value in zip(outputs, self._features, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self, padded: NDArray[Any]) -> list[NDArray[Any]]:
        """The outputs ``(n, d)`` of a batch of just the shape and type that the lane was made for."""
        np.copyto(self._staged, padded, casting="no")
        self._pixels.update_inplace(self._staged)
        self._session.run_with_iobinding(self._binding)  # returns when the GPU has finished
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
