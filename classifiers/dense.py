"""What every trained head is in the end: logits of features, a temperature, softmax (or sigmoids, or the numbers themselves).
In NumPy and in ONNX.

Most are a `DenseHead`: standardise, a few dense layers. `neighbours.NeighbourHead` is the other kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from store.errors import BadDataError
from store.stored import StoredFeatures

from .cosines import SHORTEST, unit_rows
from .folds import Fold

Float32 = NDArray[np.float32]
OPSET = 20


class FittedHead(ABC):
    """A trained head as arrays. A kind of head says how logits come about, here and as a graph; the rest is the same for all.

    Attributes:
        classes: labels in the order of the outputs.
        temperature: logits are divided by it (Guo et al. 2017, "On Calibration of Modern Neural Networks").
        activation: from logits to outputs: ``Softmax``, or ``Sigmoid`` of each (several labels), or ``Identity`` (regression).
    """

    classes: Sequence[str]
    temperature: float
    activation: str = "Softmax"

    @abstractmethod
    def logits(self, X: ArrayLike) -> Float32:
        """``(n, d)`` features to ``(n, k)`` logits, before the temperature."""

    @abstractmethod
    def graph(self) -> tuple[int, list[Any], dict[str, NDArray[Any]], str]:
        """`logits` in ONNX: d, nodes that begin with ``features``, the constants by name, and the name of the result."""

    @abstractmethod
    def with_temperature(self, temperature: float) -> Self: ...

    def probabilities(self, X: ArrayLike) -> Float32:
        """``(n, d)`` features to ``(n, k)`` float32 probabilities; of a regression, to the numbers."""
        return ACTIVATIONS[self.activation](self.logits(X) / np.float32(self.temperature))

    def to_onnx(self) -> bytes:
        """The ONNX file: ``features`` (n, d) float32 to ``probabilities`` (or ``values``, of a regression) (n, k) float32."""
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
    """A head of dense layers; ReLU stands between them.

    Attributes:
        mean, scale: ``(d,)`` float32, subtracted and divided by.
        layers: weight ``(out, in)`` and bias ``(out,)`` of each layer, float32; the last one has one output per class.
        classes, temperature, activation: as in `FittedHead`.
        unit: whether rows are brought to length 1 before and after that, so that the first layer computes cosines.
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
        if isinstance(X, StoredFeatures):
            return np.concatenate([self.logits(rows) for _, rows in X.blocks()])
        hidden = np.asarray(X, np.float32)
        hidden = ((unit_rows(hidden) if self.unit else hidden) - self.mean) / self.scale
        hidden = unit_rows(hidden) if self.unit else hidden
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
    """`unit_rows` in ONNX, from one tensor to another; takes `UNIT_CONSTANTS`."""
    from onnx import helper

    return [
        helper.make_node("ReduceL2", [name, "rows"], [f"{result}_length"], keepdims=1),
        helper.make_node("Max", [f"{result}_length", "shortest"], [f"{result}_divisor"]),
        helper.make_node("Div", [name, f"{result}_divisor"], [result]),
    ]


def class_indices(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The distinct labels, sorted, and the index of each row's label.

    Raises:
        ValueError: there is only one class (scikit-learn's law asks for this type).
    """
    classes, targets = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        message = f"a classifier needs at least two classes; this data has one class, {str(classes[0])!r}"
        raise ValueError(message)
    return classes, targets


def with_validation(
    X: Float32, targets: NDArray[np.intp], validation: tuple[ArrayLike, ArrayLike], classes: NDArray[Any]
) -> tuple[Float32, NDArray[np.intp], list[Fold]]:
    """Training and validation rows one after the other, and the single fold that tells them apart.

    Raises:
        BadDataError: validation has a class that training lacks.
    """
    held = np.asarray(validation[0], np.float32)
    fold = np.arange(len(X)), len(X) + np.arange(len(held))
    return np.concatenate([X, held]), np.concatenate([targets, validation_targets(validation[1], classes)]), [fold]


def validation_targets(y: ArrayLike, classes: NDArray[Any]) -> NDArray[np.intp]:
    """The index of each label among the classes of training.

    Raises:
        BadDataError: one is not there.
    """
    labels = np.asarray(y)
    unknown = sorted(set(labels.tolist()) - set(classes.tolist()))
    if unknown:
        message = f"validation has classes that training lacks: {', '.join(map(str, unknown))}"
        raise BadDataError(message)
    return np.searchsorted(classes, labels)


def standardisation(X: NDArray[np.floating[Any]], weights: NDArray[np.float64] | None = None) -> tuple[Float32, Float32]:
    """Mean and standard deviation per feature, computed in float64; constant features keep a scale of 1."""
    if weights is None:
        mean = X.mean(axis=0, dtype=np.float64)
        scale = X.std(axis=0, dtype=np.float64)
    else:
        mean = np.average(X.astype(np.float64), axis=0, weights=weights)
        scale = np.sqrt(np.average(np.square(X - mean), axis=0, weights=weights))
    return scale_of(mean, scale)


def scale_of(mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> tuple[Float32, Float32]:
    """Mean and scale in float32, from the mean and standard deviation of each feature."""
    scale = deviation.copy()
    scale[scale < 1e-12 * np.maximum(np.abs(mean), 1e-30)] = 1.0
    scale[scale == 0] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def softmax(logits: NDArray[np.floating[Any]]) -> Float32:
    """Row-wise softmax of ``(n, k)``, in float32."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)


def sigmoid(logits: NDArray[np.floating[Any]]) -> Float32:
    """The logistic function of each number, in float32."""
    from scipy.special import expit

    return np.asarray(expit(logits), np.float32)


ACTIVATIONS: dict[str, Callable[[NDArray[np.floating[Any]]], Float32]] = {
    "Softmax": softmax,
    "Sigmoid": sigmoid,
    "Identity": lambda logits: np.asarray(logits, np.float32),
}


def log_loss(logits: NDArray[np.floating[Any]], targets: NDArray[np.intp], weights: NDArray[np.float64] | None = None) -> float:
    """Mean, weighted where rows have weights, negative log-likelihood of ``(n, k)`` logits, in float64, without clipping."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float(np.average(total - wide[np.arange(len(targets)), targets], weights=weights))


def fit_temperature(
    logits: NDArray[np.floating[Any]],
    targets: NDArray[np.intp],
    *,
    weights: NDArray[np.float64] | None = None,
    unscaled: bool = False,
) -> float:
    """The temperature in [0.05, 20] with the least log-loss. Without a single error it would run to the lower end, where
    every probability is 1; a data set that small proves no such certainty, so there the temperature stays at 1 or above.

    Args:
        logits: ``(n, k)``.
        targets: ``(n,)`` class indices.
        weights: of the rows ``(n,)``; None is 1 for each.
        unscaled: the logits are scores such as cosines, whose size says nothing: the range is [0.01, 1000], and instead of
            the bound at 1, one more sample counts that belongs to every class alike (Laplace's rule of succession).
    """
    from scipy.optimize import minimize_scalar

    share = 1 / (len(targets) + 1) if unscaled else 0.0
    margin = float(np.mean(logits[np.arange(len(targets)), targets] - logits.mean(axis=1)))  # of the true class
    least, most = (0.01, 1000.0) if unscaled else (0.05, 20.0)

    def loss(log_t: float) -> float:
        scaled = 1 / float(np.exp(log_t))
        return log_loss(logits * scaled, targets, weights) + share * margin * scaled

    found = minimize_scalar(loss, bounds=(np.log(least), np.log(most)), method="bounded")
    temperature = float(np.exp(found.x))
    if not unscaled and (logits.argmax(axis=1) == targets).all():
        return max(temperature, 1.0)
    return temperature
