"""L2-regularised logistic regression for many strengths of regularisation, each to its optimum, in few passes over the data.

The objective is scikit-learn's: summed log-losses plus ``|w|^2 / 2C``, intercepts free; for two classes one vector of weights.
What makes it fast, on features that a fit has to read from memory again and again:

- The rows are turned to their principal axes once. There the curvature of the loss is nearly diagonal, ``p(1 - p) s + 1/C``
  with the eigenvalue s of each axis (Boehning 1992 bounds it so), and L-BFGS (Nocedal and Wright, algorithm 7.4) that
  starts from it needs tens of steps where it needs hundreds on the features themselves. Fewer rows have fewer axes, too.
- One product of matrices serves several values of C: as many as share the reading of the rows.
- From the strongest regularisation to the weakest, each group starts where the one before has ended.

Products are in float32, sums over rows and everything else in float64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

COLUMNS = 64  # of one product: up to about so many, reading the rows is what takes the time ..
GROUP = 8  # .. values of C at once, at most: the next ones start from what these have found, if they are wanted at all
ROWS = 8192  # at once, so that what is computed of them stays small
MEMORY = 10  # pairs of steps and gradients that L-BFGS remembers
CERTIFICATE = 1e-5  # largest entry of the gradient of the mean objective; scikit-learn stops at 1e-4
DECREMENT = 1e-7  # of the objective: what a last step would gain
ROUNDING = 1e-7  # relative, of an objective that was computed from float32 products
SUFFICIENT = 1e-4  # of the expected decrease (Armijo)
SHORTEST = 2.0**-30
DISTINCT = 1e-12  # of the largest eigenvalue: what is less is no axis of the rows


@dataclass(frozen=True)
class Optimum:
    """What was found for one C.

    Attributes:
        C: inverse strength of regularisation.
        weight, bias: ``(k, d)`` and ``(k,)``; for two classes ``(1, d)`` and ``(1,)``, of the second against the first.
        objective: summed log-losses plus ``|w|^2 / 2C``.
        gradient: the certificate: largest absolute entry of the gradient of the objective over the number of rows.
        evaluations: of objective and gradient.
        converged: whether the certificate or the expected gain is small enough.
    """

    C: float
    weight: Float32
    bias: Float32
    objective: float
    gradient: float
    evaluations: int
    converged: bool


@dataclass(eq=False)
class _Search:
    """L-BFGS for one C; a place is ``(axes + 1, columns)``, the intercepts last."""

    strength: float
    place: Float64
    value: float = np.inf
    gradient: Float64 = field(default_factory=lambda: np.empty(0))
    inverse: Float64 = field(default_factory=lambda: np.empty(0))
    pairs: deque[tuple[Float64, Float64, float]] = field(default_factory=lambda: deque(maxlen=MEMORY))
    direction: Float64 = field(default_factory=lambda: np.empty(0))
    slope: float = 0.0
    step: float = 1.0
    evaluations: int = 0
    done: bool = False
    converged: bool = False

    @property
    def trial(self) -> Float64:
        return self.place if self.direction.size == 0 else self.place + self.step * self.direction

    def take(self, value: float, gradient: Float64, inverse: Float64) -> None:
        """The objective at the trial: go there, or try half of the step."""
        self.evaluations += 1
        if self.direction.size == 0:
            self.value, self.gradient, self.inverse = value, gradient, inverse
        elif value <= self.value + SUFFICIENT * self.step * self.slope + ROUNDING * abs(self.value):
            moved, bent = self.step * self.direction, gradient - self.gradient
            curvature = float((moved * bent).sum())
            if curvature > 0:
                self.pairs.append((moved, bent, curvature))
            self.place, self.value, self.gradient, self.inverse = self.place + moved, value, gradient, inverse
        else:
            self.step /= 2
            self.done = self.step < SHORTEST  # nothing is left to gain in float32
            return
        self.step = 1.0
        self._turn()
        if self.slope >= 0:  # rounding has spoilt the memory
            self.pairs.clear()
            self._turn()

    def _turn(self) -> None:
        """The next direction: the two loops of L-BFGS, from the diagonal curvature."""
        q, taken = self.gradient.copy(), []
        for moved, bent, curvature in reversed(self.pairs):
            share = float((moved * q).sum()) / curvature
            taken.append(share)
            q -= share * bent
        q *= self.inverse
        if self.pairs:
            _, bent, curvature = self.pairs[-1]
            q *= curvature / float((bent * bent * self.inverse).sum())
        for (moved, bent, curvature), share in zip(self.pairs, reversed(taken), strict=True):
            q += (share - float((bent * q).sum()) / curvature) * moved
        self.direction = -q
        self.slope = float((self.direction * self.gradient).sum())


class SoftmaxPath:
    """One training set, to be fitted with many values of C.

    Args:
        inputs: standardised features ``(n, d)`` float32.
        targets: class indices ``(n,)``.
        classes: how many there are.

    Attributes:
        evaluations: of objectives and gradients so far, over all values of C.
    """

    def __init__(self, inputs: Float32, targets: NDArray[np.intp], classes: int) -> None:
        self._targets, self._columns = targets, 1 if classes == 2 else classes
        self._rows, self._axes, self._spread = _principal(inputs)
        self.evaluations = 0

    def optima(self, Cs: Sequence[float], most: int) -> Iterator[Optimum]:
        """One optimum for each C, which must rise; those that nobody asks for are not computed, but for some of a group.

        Args:
            Cs: in rising order.
            most: evaluations for each.
        """
        place: Float64 = np.zeros((len(self._spread) + 1, self._columns))
        group = min(max(COLUMNS // self._columns, 1), GROUP)
        for begin in range(0, len(Cs), group):
            searches = [_Search(1 / C, place) for C in Cs[begin : begin + group]]
            while active := [search for search in searches if not search.done]:
                values, gradients, curved = self._evaluate(active)
                for search, value, gradient, curvature in zip(active, values, gradients, curved, strict=True):
                    search.take(value, gradient, self._inverse(curvature, search.strength))
                    search.converged = self._certificate(search) <= CERTIFICATE or -search.slope <= DECREMENT * search.value
                    search.done |= search.converged or search.evaluations >= most
            for C, search in zip(Cs[begin : begin + group], searches, strict=True):
                yield self._optimum(C, search)
            place = searches[-1].place

    def _optimum(self, C: float, search: _Search) -> Optimum:
        weight = self._axes @ search.place[:-1].astype(np.float32)
        bias = search.place[-1].astype(np.float32)
        found = self._certificate(search)
        return Optimum(
            C, np.ascontiguousarray(weight.T), bias, search.value, found, search.evaluations, converged=search.converged
        )

    def _certificate(self, search: _Search) -> float:
        """In the features' own axes, where scikit-learn looks."""
        weights = self._axes @ search.gradient[:-1].astype(np.float32)
        return float(max(np.abs(weights).max(), np.abs(search.gradient[-1]).max())) / len(self._targets)

    def _inverse(self, curvature: float, strength: float) -> Float64:
        """One over the curvature along every axis, and of the intercepts."""
        along = np.append(curvature * self._spread + strength, max(curvature * len(self._targets), 1e-12))
        return np.asarray(1 / along[:, None])

    def _evaluate(self, searches: Sequence[_Search]) -> tuple[list[float], list[Float64], list[float]]:
        """Objective, gradient and mean ``p(1 - p)`` at the trial of each search."""
        self.evaluations += len(searches)
        places = np.stack([search.trial for search in searches])
        count, _, columns = places.shape
        weights = np.ascontiguousarray(places[:, :-1].transpose(1, 0, 2).reshape(-1, count * columns), np.float32)
        biases = places[:, -1].reshape(-1).astype(np.float32)
        losses, curvatures, sums = np.zeros(count), np.zeros(count), np.zeros(count * columns)
        products = np.zeros((count * columns, weights.shape[0]))
        for begin in range(0, len(self._rows), ROWS):
            rows, truth = self._rows[begin : begin + ROWS], self._targets[begin : begin + ROWS]
            logits = (rows @ weights + biases).reshape(len(rows), count, columns)
            loss, residual, curvature = (_binary if columns == 1 else _several)(logits, truth)
            losses += loss
            curvatures += curvature
            flat = residual.reshape(len(rows), count * columns)
            sums += flat.sum(axis=0, dtype=np.float64)
            products += flat.T @ rows
        gradients = np.empty_like(places)
        gradients[:, :-1] = products.reshape(count, columns, -1).transpose(0, 2, 1)
        gradients[:, -1] = sums.reshape(count, columns)
        values = []
        for i, search in enumerate(searches):
            weight = places[i, :-1]
            gradients[i, :-1] += search.strength * weight
            values.append(float(losses[i] + 0.5 * search.strength * (weight * weight).sum()))
        return values, list(gradients), list(curvatures / (len(self._rows) * columns))


def _principal(inputs: Float32) -> tuple[Float32, Float32, Float64]:
    """The rows in their principal axes ``(n, r)``, the axes ``(d, r)``, and the sum of squares along each ``(r,)``."""
    n, d = inputs.shape
    if n > d:
        spread, axes = np.linalg.eigh((inputs.T @ inputs).astype(np.float64))
        turned = axes.astype(np.float32)
        return inputs @ turned, turned, np.maximum(spread, 0)
    wide = inputs.astype(np.float64)
    spread, sides = np.linalg.eigh(wide @ wide.T)
    kept = spread > DISTINCT * max(spread[-1], 1e-300)
    lengths = np.sqrt(spread[kept])
    sides = sides[:, kept]
    return (sides * lengths).astype(np.float32), (wide.T @ (sides / lengths)).astype(np.float32), spread[kept]


def _binary(logits: Float32, truth: NDArray[np.intp]) -> tuple[Float64, Float32, Float64]:
    """Losses ``(count,)``, residuals and sums of p(1 - p) of ``(rows, count, 1)`` logits of the second class."""
    sign = np.where(truth == 1, 1, -1).astype(np.float32)[:, None, None]
    margin = sign * logits
    wrong = np.exp(-np.logaddexp(0, margin, dtype=np.float32))  # probability of the other class
    losses = np.logaddexp(0, -margin).sum(axis=(0, 2), dtype=np.float64)
    return losses, -sign * wrong, (wrong * (1 - wrong)).sum(axis=(0, 2), dtype=np.float64)


def _several(logits: Float32, truth: NDArray[np.intp]) -> tuple[Float64, Float32, Float64]:
    """Losses ``(count,)``, residuals and sums of p(1 - p) of ``(rows, count, k)`` logits."""
    every = np.arange(len(logits))
    logits -= logits.max(axis=2, keepdims=True)
    right = logits[every, :, truth]
    np.exp(logits, out=logits)
    total = logits.sum(axis=2)
    losses = (np.log(total) - right).sum(axis=0, dtype=np.float64)
    logits /= total[:, :, None]
    curvatures = (logits * (1 - logits)).sum(axis=(0, 2), dtype=np.float64)
    logits[every, :, truth] = 0
    logits[every, :, truth] = -logits.sum(axis=2)  # p - 1 of the right class, without the cancellation
    return losses, logits, curvatures
