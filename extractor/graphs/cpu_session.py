"""ONNX Runtime sessions on the CPU, with threads that do not spin and exact int8 kernels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# Optimiser passes of ONNX Runtime that change what a graph computes: Pad_Fusion pads a max pooling with minus infinity
# instead of the zeros that the graph says.
WRONG_FUSIONS = ("Pad_Fusion",)


def cpu_session(model: Path | bytes, *, threads: int = 0, optimised: bool = True, **attributes: Any) -> Any:
    """Open an ONNX Runtime session on the CPU, from a file or its bytes.

    Its threads do not spin: spinning takes cores from decoding (without it +60 % end to end) and from torch.

    Args:
        model: the ONNX file, or its content.
        threads: inside an operator; 0 for one per core.
        optimised: let ONNX Runtime fuse and remove nodes.
        attributes: of ``onnxruntime.SessionOptions``.

    Raises:
        Exception: whatever ONNX Runtime raises; its exceptions have no common public base.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if int8_saturates():  # exact int8 kernels; on other CPUs they would cost more than half of the speed
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in attributes.items():
        setattr(options, name, value)
    return _open(model if isinstance(model, bytes) else str(model), options)


def _open(model: bytes | str, options: Any) -> Any:
    import onnxruntime

    # ONNX Runtime's own fallback, from the CPU to the CPU, would print
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], enable_fallback=0, disabled_optimizers=list(WRONG_FUSIONS)
    )


@cache
def int8_saturates() -> bool:
    """Whether this CPU's sums of two 8-bit products overflow 16 bits, as on x86 without VNNI; measured with ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper

    terms = 64
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, terms])
    b = helper.make_tensor_value_info("b", TensorProto.INT8, [terms, 16])
    c = helper.make_tensor_value_info("c", TensorProto.INT32, [1, 16])
    model = helper.make_model(helper.make_graph([node], "saturation", [a, b], [c]), ir_version=10)
    model.opset_import[0].version = 13
    session = _open(model.SerializeToString(), onnxruntime.SessionOptions())
    inputs = {"a": np.full((1, terms), 255, np.uint8), "b": np.full((terms, 16), 127, np.int8)}
    return bool((session.run(None, inputs)[0] != 255 * 127 * terms).any())
