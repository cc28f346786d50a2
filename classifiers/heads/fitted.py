"""Fitted heads in NumPy and in ONNX: logits of features, a temperature, then softmax, sigmoids, or the numbers themselves.

Most are a `DenseHead`: standardisation and a few dense layers. `knn.NeighbourHead` is the other kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from classifiers.evaluation.conformal import Conformal
from classifiers.evaluation.probabilities import Float32, fit_temperature, sigmoid, softmax
from classifiers.evaluation.units import Units
from classifiers.heads.solvers.cosines import SHORTEST, unit_rows
from store.errors import BadDataError
from store.format.lazy_features import LazyFeatures

OPSET = 20


class FittedHead(ABC):
    """A fitted head as arrays.

    A subclass defines how logits are computed, in NumPy and as an ONNX graph; the rest is the same for all.

    Attributes:
        classes: labels in the order of the outputs.
        temperature: logits are divided by it (Guo et al. 2017, "On Calibration of Modern Neural Networks").
        activation: from logits to outputs: ``Softmax``, ``Sigmoid`` of each (several labels) or ``Identity`` (regression).
    """

    classes: Sequence[str]
    temperature: float
    activation: str = "Softmax"

    @abstractmethod
    def logits(self, X: ArrayLike) -> Float32:
        """``(n, d)`` features to ``(n, k)`` logits, before the temperature."""

    @abstractmethod
    def graph(self) -> tuple[int, list[Any], dict[str, NDArray[Any]], str]:
        """`logits` in ONNX: d, nodes whose input is ``features``, the constants by name, and the name of the result."""

    @abstractmethod
    def with_temperature(self, temperature: float) -> Self: ...

    def probabilities(self, X: ArrayLike) -> Float32:
        """``(n, d)`` features to ``(n, k)`` float32 probabilities; for a regression, to the numbers."""
        return ACTIVATIONS[self.activation](self.logits(X) / np.float32(self.temperature))

    def to_onnx(self) -> bytes:
        """The ONNX file: ``features`` (n, d) float32 to ``probabilities`` (``values`` for a regression) (n, k) float32."""
        from onnx import TensorProto, checker, helper, numpy_helper

        width, nodes, arrays, name = self.graph()
        if broken := [key for key, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
            message = f"the fitted head holds NaN or infinity ({', '.join(broken)}): training diverged, or features are huge"
            raise BadDataError(message)
        along: dict[str, Any] = {"axis": 1} if self.activation == "Softmax" else {}
        output = "values" if self.activation == "Identity" else "probabilities"
        arrays = {**arrays, "temperature": np.array(self.temperature, np.float32)}
        nodes = [
            *nodes,
            helper.make_node("Div", [name, "temperature"], ["logits"]),
            helper.make_node(self.activation, ["logits"], [output], **along),
        ]
        graph = helper.make_graph(
            nodes,
            "head",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", width])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", len(self.classes)])],
            [numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in arrays.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="penult")
        checker.check_model(model)
        return bytes(model.SerializeToString())

    def calibrated(
        self,
        logits: ArrayLike,
        targets: NDArray[np.intp],
        *,
        weights: NDArray[np.float64] | None = None,
        unscaled: bool = False,
    ) -> Self:
        """This head with the temperature that minimises the log-loss of logits it was not fitted on.

        Args:
            logits: ``(n, k)``, out of fold.
            targets: ``(n,)`` class indices.
            weights, unscaled: as in `fit_temperature`.
        """
        return self.with_temperature(fit_temperature(np.asarray(logits), targets, weights=weights, unscaled=unscaled))


@dataclass(frozen=True)
class DenseHead(FittedHead):
    """A head of dense layers with ReLU between them.

    Attributes:
        mean, scale: ``(d,)`` float32, subtracted and divided by.
        layers: weight ``(out, in)`` and bias ``(out,)`` of each layer, float32; the last one has one output per class.
        classes, temperature, activation: as in `FittedHead`.
        unit: whether rows are scaled to length 1 before and after standardisation, so that the first layer computes cosines.
    """

    mean: Float32
    scale: Float32
    layers: Sequence[tuple[Float32, Float32]]
    classes: Sequence[str]
    temperature: float = 1.0
    unit: bool = False
    activation: str = "Softmax"

    def logits(self, X: ArrayLike) -> Float32:
        """``(n, d)`` features to ``(n, k)`` logits, before the temperature."""
        if isinstance(X, LazyFeatures):
            return np.concatenate([self.logits(rows) for _, rows in X.blocks()])
        hidden = np.asarray(X, np.float32)
        hidden = ((unit_rows(hidden) if self.unit else hidden) - self.mean) / self.scale
        hidden = unit_rows(hidden) if self.unit else hidden
        with np.errstate(invalid="ignore"):  # the BLAS may compute with what lies beside a small matrix, and throw it away
            for weight, bias in self.layers[:-1]:
                hidden = np.maximum(hidden @ weight.T + bias, 0)
            weight, bias = self.layers[-1]
            return np.asarray(hidden @ weight.T + bias, np.float32)

    def graph(self) -> tuple[int, list[Any], dict[str, NDArray[Any]], str]:
        from onnx import helper

        arrays: dict[str, NDArray[Any]] = {
            "mean": np.asarray(self.mean, np.float32),
            "scale": np.asarray(self.scale, np.float32),
        }
        nodes = [
            helper.make_node("Sub", ["directions" if self.unit else "features", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "scale"], ["standardised"]),
        ]
        name = "standardised"
        if self.unit:
            nodes = [*unit_nodes("features", "directions"), *nodes, *unit_nodes(name, "units")]
            name, arrays = "units", {**arrays, **UNIT_CONSTANTS}
        for i, (weight, bias) in enumerate(self.layers):
            arrays |= {f"weight{i}": weight.astype(np.float32), f"bias{i}": bias.astype(np.float32)}
            nodes.append(helper.make_node("Gemm", [name, f"weight{i}", f"bias{i}"], [f"dense{i}"], transB=1))
            name = f"dense{i}"
            if i < len(self.layers) - 1:
                nodes.append(helper.make_node("Relu", [name], [f"relu{i}"]))
                name = f"relu{i}"
        return len(self.mean), nodes, arrays, name

    def with_temperature(self, temperature: float) -> Self:
        return replace(self, temperature=temperature)


UNIT_CONSTANTS: dict[str, NDArray[Any]] = {"rows": np.array([1], np.int64), "shortest": np.array(SHORTEST, np.float32)}


def unit_nodes(name: str, result: str) -> list[Any]:
    """`unit_rows` in ONNX, from one tensor to another; needs `UNIT_CONSTANTS`."""
    from onnx import helper

    return [
        helper.make_node("ReduceL2", [name, "rows"], [f"{result}_length"], keepdims=1),
        helper.make_node("Max", [f"{result}_length", "shortest"], [f"{result}_divisor"]),
        helper.make_node("Div", [name, f"{result}_divisor"], [result]),
    ]


ACTIVATIONS: dict[str, Callable[[NDArray[np.floating[Any]]], Float32]] = {
    "Softmax": softmax,
    "Sigmoid": sigmoid,
    "Identity": lambda logits: np.asarray(logits, np.float32),
}


H = TypeVar("H", bound=FittedHead)


def calibrate(
    head: H,
    logits: NDArray[np.floating[Any]],
    targets: NDArray[np.intp],
    *,
    weights: NDArray[np.float64] | None = None,
    unscaled: bool = False,
    units: Units | None = None,
) -> tuple[H, Conformal]:
    """A head with its temperature, and its prediction sets, both from logits ``(n, k)`` of samples it was not fitted on.

    Row weights count for the temperature only; the coverage of the sets is for unweighted images. ``units`` says which of the
    samples belong together; by default none.
    """
    calibrated = head.calibrated(logits, targets, weights=weights, unscaled=unscaled)
    return calibrated, Conformal.fit(softmax(logits / np.float32(calibrated.temperature)), targets, units=units)
