"""Backbones on NVIDIA GPUs with CUDA: libraries, provider options, checks that a GPU computes, and fixed buffers.

Decisions, and the reasons for them:

- Two lanes share one session. ONNX Runtime gives every concurrent `run` a stream of its own and releases the interpreter
  lock, so one lane's copies hide behind the other's compute; a second session would hold the weights a second time.
- Pixels and features lie in device buffers that are made once per lane and batch size, so memory stays flat. The host side is
  pinned: a copy from pageable memory goes through the driver's own buffer at half the speed, with the interpreter locked.
- ``use_tf32`` is ONNX Runtime's only switch for the tensor cores of all convolutions. If it is off, float16 does not use them
  either; if it is on, float32 products lose 13 bits. So it is on for ``--precision tf32``, and for networks that are float16
  throughout, which have no float32 to lose. It is off for networks with layers in float32, for which float16 is too coarse:
  TF32 would be as coarse (the features of one MobileNetV2 would change by 3 % instead of 0.5 %).
- Tensor cores take NHWC; without them cuDNN's NCHW kernels need no transposition.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extractor.graphs import reasons
from extractor.machine import nvidia_driver_present
from store.errors import DeviceUnavailableError

from .cpu import Cpu

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

log = logging.getLogger("penult.extractor")

PROVIDER = "CUDAExecutionProvider"
WARNINGS, NOTHING = 2, 4  # severities of what ONNX Runtime logs: its default, and fatal errors alone
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
# What ONNX Runtime itself adds to a graph for shapes; other nodes that it has named are parts of a function, or fusions.
OF_SHAPES = ("Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Cast")
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and ..Minor
BATCHES = ((40e9, 256), (12e9, 128), (0, 64))  # by the free bytes; a size that is too large is halved


class Cuda:
    """NVIDIA GPUs, by their CUDA numbers; see `provider.Provider`.

    Every batch is padded to one shape, so that memory stays flat and results do not depend on the last batch.
    """

    devices: tuple[str, ...] = ("cuda", "cuda:N")
    shares_cores = False
    pads = True
    # The last two as in CUBLAS_STATUS_ALLOC_FAILED and CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    out_of_memory = (*Cpu.out_of_memory, "OUT_OF_MEMORY", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")

    def missing(self) -> str:
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no {PROVIDER}; install onnxruntime-gpu"
        if not nvidia_driver_present():
            return "this machine has no NVIDIA driver (no /dev/nvidiactl). Install the driver, or pass --device cpu"
        return ""

    def trouble(self, device: str) -> str:
        return trouble(device)

    def present(self) -> bool:
        return nvidia_driver_present()

    def lanes(self) -> int:
        return 2

    def batch_size(self, device: str) -> int:
        free = free_memory(device)
        return next(size for least, size in BATCHES if free >= least)

    def rewrites(self, model: Path) -> bool:
        return True

    def open(self, model: Path, graph: bytes | None, device: str, *, lanes: int, tf32: bool) -> Any:
        import onnx
        import onnxruntime

        from extractor.graphs.cpu_session import WRONG_FUSIONS
        from extractor.graphs.graph import in_float16
        from extractor.graphs.onnx_file import read_model

        options = onnxruntime.SessionOptions()
        options.log_severity_level = NOTHING
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        nodes = (onnx.load_model_from_string(graph) if graph else read_model(model)).graph
        choice = providers(device, tensor_cores=tf32 or in_float16(nodes))
        try:  # its own fallback to the CPU would print, and continue
            with hushed(onnxruntime):
                session = onnxruntime.InferenceSession(
                    graph or str(model),
                    options,
                    providers=choice,
                    enable_fallback=0,
                    disabled_optimizers=list(WRONG_FUSIONS),
                )
        except Exception as error:
            message = f"--device {device}: {reason(error)}"
            raise DeviceUnavailableError(message) from error
        prove(session, device, nodes)
        return session

    def lane(
        self, session: Any, device: str, pixels: str, shape: Sequence[int], dtype: DTypeLike, outputs: Mapping[str, int]
    ) -> BoundLane:
        return BoundLane(session, device, pixels, shape, dtype, outputs)

    def reason(self, error: Exception) -> str:
        return reason(error)


def number_of(device: str) -> int:
    """The number of the GPU that ``cuda`` (0) or ``cuda:N`` names."""
    return int(device.partition(":")[2] or 0)


@contextlib.contextmanager
def hushed(onnxruntime: Any) -> Iterator[None]:
    """Keep ONNX Runtime's log off the terminal while its failures are turned into messages."""
    onnxruntime.set_default_logger_severity(NOTHING)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS)


@cache
def trouble(device: str) -> str:
    """Why a GPU does not compute with ONNX Runtime, for people; empty if it does. Tried once per process.

    It runs a convolution, because opening a session raises few errors: ONNX Runtime falls back to the CPU, works without
    cuDNN, and fails only in a run on a GPU that its wheel has no code for.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = NOTHING
    model, pixels, expected = _one_convolution()
    with hushed(onnxruntime):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # stdout is for results
            onnxruntime.preload_dlls()
        try:  # its own fallback to the CPU would print, and continue
            session = onnxruntime.InferenceSession(model, options, providers=providers(device), enable_fallback=0)
            delivered = session.get_providers()[0]
            if delivered != PROVIDER:
                why = _unloadable(onnxruntime) or " ".join(printed.getvalue().split())
                why = why or f"does the driver support CUDA {onnxruntime.cuda_version or '13'}?"
                return f"ONNX Runtime made a session on {delivered} instead: {PROVIDER} did not load ({why})"
            features = session.run(None, {"pixels": pixels})[0]
        except Exception as error:  # onnxruntime's exceptions have no common public base
            why = reason(error)
            if "no kernel image" in why:
                why = f"this onnxruntime has no code for a card of compute capability {capability(device, onnxruntime)}: {why}"
            return why
    if not np.allclose(features, expected, rtol=1e-3):  # some algorithms round whole numbers
        return "a convolution gives other values there than on a CPU"
    if not is_loaded("libcudnn"):  # from 1.30 on ONNX Runtime runs without it
        return "ONNX Runtime finds no cuDNN, and is slow without it; install onnxruntime-gpu[cuda,cudnn]"
    return ""


def _one_convolution() -> tuple[bytes, NDArray[np.uint8], NDArray[np.float32]]:
    """A network with one layer of cuDNN's and some of ONNX Runtime's own, its input, and the expected output."""
    import numpy as np
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["values", "ones"], ["sums"]),
        helper.make_node("Relu", ["sums"], ["features"]),
    ]
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [8, 3, 3, 3], [1.0] * 216)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", 8, 8, 3])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 8, 6, 6])
    graph = helper.make_graph(nodes, "convolution", [pixels], [features], [ones])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return model.SerializeToString(), np.full((1, 8, 8, 3), 2, np.uint8), np.full((1, 8, 6, 6), 54, np.float32)


def _unloadable(onnxruntime: Any) -> str:
    """Why the provider's library cannot be loaded, which ONNX Runtime logs and does not raise; empty if it can."""
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi/libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error)
    return ""


def is_loaded(library: str) -> bool:
    """Whether a shared library of some version is in this process (Linux, as all of CUDA here)."""
    return f"/{library}.so." in Path("/proc/self/maps").read_text("utf-8", "surrogateescape")


def reason(error: Exception) -> str:
    """An error of ONNX Runtime in one line; a failure on a GPU without source location and host name."""
    failure = re.search(r"CU[A-Z_]+ failure -?\d+: [^;\n]*", str(error))
    return failure.group().strip() if failure else reasons.reason(error)


def _runtime(onnxruntime: Any) -> Any:
    """CUDA's runtime library, which `trouble` has loaded; OSError if it has not."""
    return ctypes.CDLL(f"libcudart.so.{str(onnxruntime.cuda_version).partition('.')[0]}")


def capability(device: str, onnxruntime: Any) -> str:
    """The compute capability of a GPU, such as ``10.0``."""
    numbers = ctypes.c_int(-1), ctypes.c_int(-1)
    with contextlib.suppress(AttributeError, OSError):
        for value, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
            _runtime(onnxruntime).cudaDeviceGetAttribute(ctypes.byref(value), attribute, number_of(device))
    return ".".join(str(value.value) for value in numbers) if numbers[0].value >= 0 else "unknown"


def free_memory(device: str) -> int:
    """Free bytes on a GPU; 0 if unknown."""
    import onnxruntime

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        runtime = _runtime(onnxruntime)
        runtime.cudaSetDevice(number_of(device))
        status = runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    except (AttributeError, OSError):
        return 0
    return 0 if status else free.value


def providers(device: str, *, tensor_cores: bool = False) -> list[Any]:
    """The providers of a session on ``cuda[:N]``, in order of preference; ``tensor_cores`` round float32 to TF32."""
    on = {False: "0", True: "1"}
    options = {
        "device_id": number_of(device),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and shapes never change
        "use_tf32": on[tensor_cores],
        "prefer_nhwc": on[tensor_cores],
    }
    return [(PROVIDER, options), "CPUExecutionProvider"]


def prove(session: Any, device: str, graph: Any) -> None:
    """Check that a session computes on the GPU; ONNX Runtime raises nothing for what is refused here.

    Args:
        session: just opened.
        device: that was requested.
        graph: that it was opened with.

    Raises:
        DeviceUnavailableError: the provider was dropped; or a node that computes with pixels went to another one, which would
            copy its inputs and outputs in every batch; or the first node did, which would see the pixels of one batch alone.
    """
    from extractor.graphs.graph import of_pixels

    delivered = session.get_providers()[0]
    if delivered != PROVIDER:
        message = f"--device {device}: ONNX Runtime made a session on {delivered} instead; try --device cpu"
        raise DeviceUnavailableError(message)
    computing, known = of_pixels(graph), {node.name for node in graph.node}
    if hasattr(session, "get_provider_graph_assignment_info"):  # ONNX Runtime 1.24 and newer
        for part in session.get_provider_graph_assignment_info():
            away = [] if part.ep_name == PROVIDER else part.get_nodes()
            for node in away:
                if node.name in computing or (node.name not in known and node.op_type not in OF_SHAPES):
                    message = (
                        f"--device {device}: ONNX Runtime gave {node.op_type} {node.name!r} to {part.ep_name}; "
                        f"this network cannot run there as a whole, try --device cpu"
                    )
                    raise DeviceUnavailableError(message)
    for place in session.get_input_memory_infos():
        if not (place.name.lower().startswith("cuda") and place.device_id == number_of(device)):
            message = f"--device {device}: ONNX Runtime wants the pixels in memory {place.name!r}, card {place.device_id}"
            raise DeviceUnavailableError(message)


class BoundLane:
    """A lane that passes padded batches through a session in buffers that are made once; for one thread.

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
        import numpy as np
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
        """The outputs ``(n, d)`` of a batch with exactly the shape and type that the lane was made for."""
        import numpy as np

        np.copyto(self._staged, padded, casting="no")
        self._pixels.update_inplace(self._staged)
        self._session.run_with_iobinding(self._binding)  # returns when the GPU has finished
        return [np.array(value.numpy()) for value in self._features]


def pin(buffer: NDArray[Any], number: int, onnxruntime: Any) -> bool:
    """Lock an array's memory for fast copies to a GPU as long as the array lives.

    ONNX Runtime's Python interface cannot allocate pinned memory: ``OrtDevice`` knows only default memory. CUDA's own
    runtime, which is loaded already, can pin existing memory.

    Returns:
        Whether it is pinned; if not, copies are slower and nothing else changes.
    """
    try:
        runtime = _runtime(onnxruntime)
        address = ctypes.c_void_p(buffer.ctypes.data)
        runtime.cudaSetDevice(ctypes.c_int(number))  # of this thread, which would otherwise open a context on device 0
        status = runtime.cudaHostRegister(address, ctypes.c_size_t(buffer.nbytes), ctypes.c_uint(PORTABLE))
    except (AttributeError, OSError) as error:
        log.debug("host memory is not pinned: %s", error)
        return False
    if status:
        log.debug("host memory is not pinned: CUDA error %d", status)
        runtime.cudaGetLastError()  # or the next call would report it
        return False
    weakref.finalize(buffer, runtime.cudaHostUnregister, address)
    return True
