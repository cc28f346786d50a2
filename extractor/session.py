"""ONNX Runtime, asked what it did rather than what it offers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError, DeviceUnavailableError, UsageError

log = logging.getLogger("penult.extractor")

OUT_OF_MEMORY = ("BFCArena", "Failed to allocate memory", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
MAX_DIM = 65536
DEFAULT_BATCH = {"cpu": 8, "cuda": 64}  # on a CPU large batches lose: they fall out of its caches
MAX_BATCH, MAX_WORKERS = 4096, 256  # beyond these a number is a slip: decoded images of a batch alone would fill the memory


def nvidia_driver_present() -> bool:
    """Whether this machine has an NVIDIA driver (Linux, or Linux in Windows)."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def resolve_device(device: str) -> str:
    """``auto`` to ``cuda`` where there is a driver and a CUDA build, else to ``cpu``, said in the log; others as they are.

    Raises:
        DeviceUnavailableError: CUDA was asked for and cannot be here; `Embedder` proves the rest.
        UsageError: not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        message = f"--device {device}: expected auto, cpu, cuda or cuda:N"
        raise UsageError(message)
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if kind == "cuda":
        if "CUDAExecutionProvider" not in available:
            message = f"--device {device}: this onnxruntime has no CUDA provider; install onnxruntime-gpu"
            raise DeviceUnavailableError(message)
        if not nvidia_driver_present():
            message = (
                f"--device {device}: this machine has no NVIDIA driver (no /dev/nvidiactl). "
                f"Install the driver, or pass --device cpu"
            )
            raise DeviceUnavailableError(message)
    if device != "auto":
        return device
    if nvidia_driver_present() and "CUDAExecutionProvider" in available:
        return "cuda"
    _say_cpu()
    return "cpu"


@cache
def _say_cpu() -> None:
    """Once per process: never silent, never a litany."""
    log.info("no GPU here: running on the CPU")


@cache
def _int8_saturates() -> bool:
    """Whether this CPU's sums of two 8-bit products overflow 16 bits, as on x86 without VNNI; asked of ONNX Runtime itself."""
    import onnxruntime
    from onnx import TensorProto, helper

    terms = 64
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, terms])
    b = helper.make_tensor_value_info("b", TensorProto.INT8, [terms, 16])
    c = helper.make_tensor_value_info("c", TensorProto.INT32, [1, 16])
    model = helper.make_model(helper.make_graph([node], "saturation", [a, b], [c]), ir_version=10)
    model.opset_import[0].version = 13
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"a": np.full((1, terms), 255, np.uint8), "b": np.full((terms, 16), 127, np.int8)}
    return bool((session.run(None, given)[0] != 255 * 127 * terms).any())


class Embedder:
    """A backbone in an ONNX Runtime session: normalised pixels in, features out.

    Every batch is padded to one shape, so that a GPU's memory stays flat and results do not depend on the last batch.

    Args:
        model: the ONNX file.
        device: ``cpu``, ``cuda`` or ``cuda:N`` (see `resolve_device`).
        batch_size: images per call; None for the device's default.
        threads: intra-op threads on the CPU; None for all cores.
        outputs: names of the outputs to compute; the first where not given.

    Attributes:
        provider: family, ``cpu`` or ``cuda``, proven after the session exists.
        batch_size: as in use; halved when a GPU ran out of memory.
        calls: number of inference calls so far.
        dims: length of a feature vector of each output.

    Raises:
        DeviceUnavailableError: the device is not really there.
        BadDataError: the file is no usable network.
    """

    def __init__(
        self,
        model: Path,
        *,
        device: str = "cpu",
        batch_size: int | None = None,
        threads: int | None = None,
        outputs: Sequence[str] = (),
    ) -> None:
        self.provider = device.partition(":")[0]
        self.batch_size = batch_size or DEFAULT_BATCH[self.provider]
        self.calls = 0
        self._model, self._device, self._threads = model, device, threads or os.cpu_count() or 1
        self._session = self._open()
        shapes = {output.name: output.shape for output in self._session.get_outputs()}
        self._outputs = list(outputs) or [next(iter(shapes))]
        self.dims = [self._dim(shapes.get(name, [])) for name in self._outputs]
        self._input = self._session.get_inputs()[0].name
        fixed = self._session.get_inputs()[0].shape[0]
        if isinstance(fixed, int):
            self.batch_size = fixed  # the graph takes no other

    def _dim(self, shape: Sequence[Any]) -> int:
        if len(shape) == 2 and isinstance(shape[1], int) and 0 < shape[1] <= MAX_DIM:
            return shape[1]
        message = f"{self._model} gives an output of shape {list(shape)}; expected (n, d) with d at most {MAX_DIM}"
        raise BadDataError(message)

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        # Spinning threads steal the cores that decode; measured +60 % end to end where both share them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if _int8_saturates():  # then exact kernels for int8 networks, which elsewhere would cost more than half of their speed
            options.add_session_config_entry("session.x64quantprecision", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.provider == "cuda":
            onnxruntime.set_default_logger_severity(4)  # what it would log is raised instead
            onnxruntime.preload_dlls()  # finds CUDA and cuDNN in torch's wheels
            number = int(self._device.partition(":")[2] or 0)
            cuda = {"device_id": number, "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        try:
            session = onnxruntime.InferenceSession(str(self._model), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common public base
            if self.provider == "cuda":
                message = f"--device {self._device}: {_first_line(error)}"
                raise DeviceUnavailableError(message) from error
            message = f"{self._model} cannot be run: {_first_line(error)}"
            raise BadDataError(message) from error
        if self.provider == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            message = (
                f"--device {self._device}: ONNX Runtime made a session on {session.get_providers()[0]} instead: "
                f"the CUDA provider did not load (does the driver support CUDA {_cuda_version(onnxruntime)}, is cuDNN 9 here?)"
            )
            raise DeviceUnavailableError(message)
        return session

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """The features of the first output, ``(n, dim)`` float32; see `embed`."""
        return self.embed(batch)[0]

    def embed(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Features of ``(n, 3, h, w)`` float32, any n: ``(n, dim)`` float32 for each output.

        A GPU that runs out of memory gets a new session and half the batch, down to one image.

        Raises:
            BadDataError: the network refuses the input.
        """
        rows = []
        start = 0
        while start < len(batch):
            part = batch[start : start + self.batch_size]
            try:
                rows.append(self._run(part))
            except Exception as error:
                if not any(sign in str(error) for sign in OUT_OF_MEMORY):
                    message = f"{self._model}: {_first_line(error)}"
                    raise BadDataError(message) from error
                if self.batch_size == 1:
                    message = f"--device {self._device}: out of memory with a single image"
                    raise DeviceUnavailableError(message) from error
                self.batch_size //= 2
                log.warning("out of memory on %s: going on with batches of %d", self._device, self.batch_size)
                del self._session
                self._session = self._open()
                continue
            start += len(part)
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    def _run(self, part: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        short = self.batch_size - len(part)
        padded = np.concatenate([part, np.zeros((short, *part.shape[1:]), np.float32)]) if short else part
        self.calls += 1
        found = self._session.run(self._outputs, {self._input: padded})
        return [np.asarray(features[: len(part)], np.float32) for features in found]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cuda_version(onnxruntime: Any) -> str:
    return str(getattr(onnxruntime, "cuda_version", "")) or "13"
