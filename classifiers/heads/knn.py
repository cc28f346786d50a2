"""The knn head: k nearest neighbours by cosine with weighted votes, which keeps its training features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from classifiers.evaluation.probabilities import Float32
from classifiers.heads.solvers.cosines import Nearest, nearest, unit_rows
from store.errors import BadDataError

from .fitted import UNIT_CONSTANTS, FittedHead, unit_nodes
from .search import SearchHead

KS = (1, 3, 5, 10, 20, 50, 100, 200)
TAUS = (0.02, 0.05, 0.07, 0.1, 0.2)
DEFAULT_K, DEFAULT_TAU = 5, 0.07  # if nothing can be chosen; 0.07 as in Wu et al. and DINO
DOUBT = 0.05  # of the nearest neighbour's weight, shared by all classes: no class then has probability 0
LARGE = 2**22  # numbers; more of them are kept in float16, which moves a cosine by 1e-5
MOST = 1.9e9  # bytes of references; an ONNX file is limited to 2 GiB


@dataclass(frozen=True)
class NeighbourHead(FittedHead):
    """A fitted head that holds its training features and votes among the nearest.

    The weight of the i-th of k neighbours is exp(s_i / tau) - exp(s_(k+1) / tau), where s is the cosine. This is the vote of Wu
    et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", less the weight that the first
    neighbour without a vote would have (as in Dudani 1976): if two neighbours change places, nothing jumps, and probabilities
    do not depend on the last digit of a product.

    Attributes:
        centre: ``(d,)``, subtracted from rows at length 1, which are then scaled to length 1 again: features after a ReLU all
            point in a similar direction (Wang et al. 2019, "SimpleShot").
        references: training features ``(n, d)`` after that, float32 or float16.
        labels: ``(n,)`` int64, class indices.
        k, tau: see above.
        classes, temperature: as in `FittedHead`.
    """

    centre: Float32
    references: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]
    k: int
    tau: float
    classes: Sequence[str]
    temperature: float = 1.0

    def logits(self, X: ArrayLike) -> Float32:
        neighbours = nearest(unit_rows(np.asarray(X, np.float32)) - self.centre, self.references, self.k + 1)
        return vote(neighbours, self.labels, self.k, self.tau, len(self.classes))

    def graph(self) -> tuple[int, list[Any], dict[str, NDArray[Any]], str]:
        from onnx import TensorProto, helper

        make = helper.make_node
        nodes = [
            *unit_nodes("features", "directions"),
            make("Sub", ["directions", "centre"], ["centred"]),
            *unit_nodes("centred", "units"),
            make("Cast", ["references"], ["wide"], to=TensorProto.FLOAT),
            make("Gemm", ["units", "wide"], ["cosines"], transB=1),
            make("TopK", ["cosines", "count"], ["nearest", "which"], axis=1),
            make("ReduceMax", ["nearest", "rows"], ["best"], keepdims=1),
            make("ReduceMin", ["nearest", "rows"], ["without"], keepdims=1),
            *_weight_nodes("nearest", "weight"),
            *_weight_nodes("without", "least"),
            make("Sub", ["weight", "least"], ["votes"]),
            make("Gather", ["labels", "which"], ["voted"]),
            make("Shape", ["features"], ["n"], start=0, end=1),
            make("Concat", ["n", "k"], ["shape"], axis=0),
            make("ConstantOfShape", ["shape"], ["none"]),
            make("ScatterElements", ["none", "voted", "votes"], ["counted"], axis=1, reduction="add"),
            make("Add", ["counted", "share"], ["doubted"]),
            make("ReduceSum", ["doubted", "rows"], ["total"], keepdims=1),
            make("Div", ["doubted", "total"], ["shares"]),
            make("Log", ["shares"], ["votes_logits"]),
        ]
        k = len(self.classes)
        arrays = {
            **UNIT_CONSTANTS,
            "centre": self.centre,
            "references": self.references,
            "labels": self.labels,
            "count": np.array([self.k + 1], np.int64),
            "tau": np.array(self.tau, np.float32),
            "k": np.array([k], np.int64),
            "share": np.array(DOUBT / k, np.float32),
        }
        return self.references.shape[1], nodes, arrays, "votes_logits"

    def with_temperature(self, temperature: float) -> Self:
        return replace(self, temperature=temperature)


def _weight_nodes(name: str, result: str) -> list[Any]:
    from onnx import helper

    return [
        helper.make_node("Sub", [name, "best"], [f"{name}_below"]),
        helper.make_node("Div", [f"{name}_below", "tau"], [f"{name}_scaled"]),
        helper.make_node("Exp", [f"{name}_scaled"], [result]),
    ]


def distinct(X: Float32, targets: NDArray[np.intp]) -> NDArray[np.intp]:
    """Indices of rows without exact copies of the same label, because more than k copies would leave no votes."""
    keys = (hashlib.sha256(row.tobytes() + int(k).to_bytes(8)).digest() for row, k in zip(X, targets, strict=True))
    return np.array(list({key: i for i, key in enumerate(keys)}.values()))


def _references(X: Float32) -> tuple[NDArray[Any], Float32]:
    """Features as a `NeighbourHead` keeps them, and their centre."""
    units = unit_rows(X)
    centre = units.mean(axis=0, dtype=np.float64).astype(np.float32)
    return unit_rows(units - centre), centre


def vote(neighbours: Nearest, labels: NDArray[np.integer[Any]], k: int, tau: float, classes: int) -> Float32:
    """Logarithm of each class's share of the votes of the nearest ``k``, ``(n, classes)``."""
    cosines, which = neighbours[0][:, : k + 1], neighbours[1][:, :k]
    weights = np.exp((cosines - cosines[:, :1]) / np.float32(tau))
    votes = weights[:, :k] - weights[:, k:]
    place = np.arange(len(cosines))[:, None] * classes + labels[which]
    counted = np.bincount(place.ravel(), votes.ravel(), minlength=len(cosines) * classes).reshape(-1, classes)
    doubted = counted + DOUBT / classes
    return np.asarray(np.log(doubted / doubted.sum(axis=1, keepdims=True)), np.float32)


class KnnHead(SearchHead):
    """k nearest neighbours; k and tau are chosen by log-loss out of fold or on validation.

    Args:
        k: number of neighbours that vote, at most all rows but one; None chooses it.
        ks, taus: the values to choose from.
        cv, seed: folds, if there is no validation set.

    Attributes:
        classes_, history_, fitted_, temperature_: as in `SearchHead`; ``setting_`` has ``k`` and ``tau``.

    >>> from classifiers import KnnHead
    >>> from store import FeatureCache
    >>> train = FeatureCache("pets.cache").subset("train")
    >>> KnnHead(k=3).fit(train.X, train.y).predict(train.X[:2]).tolist()
    ['cat', 'cat']
    """

    name = "knn"
    unscaled = False

    def __init__(
        self,
        k: int | None = None,
        *,
        ks: Sequence[int] = KS,
        taus: Sequence[float] = TAUS,
        cv: int = 5,
        seed: int = 0,
    ) -> None:
        self.k = k
        self.ks = ks
        self.taus = taus
        self.cv = cv
        self.seed = seed

    def _settings(self, n: int) -> list[dict[str, Any]]:
        ks = [self.k] if self.k is not None else [k for k in sorted(self.ks) if k < n] or [n - 1]
        return [{"k": int(k), "tau": float(tau)} for k in ks for tau in sorted(self.taus)]

    def _unchosen(self, n: int) -> dict[str, Any]:
        return {"k": min(DEFAULT_K if self.k is None else int(self.k), n - 1), "tau": DEFAULT_TAU}

    def _judge(
        self, X: Float32, targets: NDArray[np.intp], held: Float32, settings: Sequence[dict[str, Any]]
    ) -> Sequence[Float32]:
        rows = distinct(X, targets)
        ks = [min(setting["k"], len(rows) - 1) for setting in settings]
        references, centre = _references(X[rows])
        neighbours = nearest(unit_rows(held) - centre, references, max(ks) + 1)
        classes = len(self.classes_)
        return [vote(neighbours, targets[rows], k, setting["tau"], classes) for k, setting in zip(ks, settings, strict=True)]

    def _fitted(self, X: Float32, targets: NDArray[np.intp], classes: list[str], setting: dict[str, Any]) -> FittedHead:
        rows = distinct(X, targets)
        references, centre = _references(X[rows])
        if X.size > LARGE:
            references = references.astype(np.float16)
        if references.nbytes > MOST:
            message = (
                f"the knn head keeps its {len(rows)} training features, {references.nbytes / 2**30:.1f} GiB in float16, and an "
                f"ONNX file cannot hold so much; use --head logistic or ridge, which keep none"
            )
            raise BadDataError(message)
        k = min(setting["k"], len(rows) - 1)
        return NeighbourHead(centre, references, targets[rows].astype(np.int64), k, setting["tau"], classes)

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use and the size of the references, as JSON."""
        head: Any = self.fitted_
        kept = head.references
        return {
            **super().hyperparameters_,
            "k": head.k,
            "references": len(kept),
            "reference_dtype": str(kept.dtype),
            "reference_mebibytes": round(kept.nbytes / 2**20, 2),
        }
