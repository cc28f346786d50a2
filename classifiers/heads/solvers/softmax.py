"""L2-regularised logistic regression for many values of C in few passes over the rows, each with a certificate.

The objective is scikit-learn's: summed log-losses plus ``|w|^2 / 2C``, intercepts free; for two classes one vector of weights.
What makes it fast, on features that a fit has to read from memory many times:

- The rows are rotated to their principal axes once. There the curvature of the loss is nearly diagonal, ``p(1 - p) s + 1/C``
  with the eigenvalue s of each axis (a bound of Boehning 1992), and L-BFGS (Nocedal and Wright, algorithm 7.4) that starts
  from it needs tens of steps instead of the hundreds on the features themselves. Fewer rows have fewer axes, too.
- One matrix product serves several values of C, which share the reading of the rows. Blocks of rows are computed in parallel.
- The steps of all classes sum to zero, like the optimum: adding one vector to the weights of all changes no probability.
- Rows that do not fit into memory are read for each product; then the weights are rotated instead of the rows.
- From the strongest regularisation to the weakest, each group starts where the last two optima point to on a scale of log C.
  If the classes can be separated, weights grow with log C without limit: there this saves three of four steps.

Rows are multiplied in float32 as long as that can distinguish one step from the next, then in float64; sums over rows and
everything else are float64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from .row_sums import ROWS, Float32, Float64, Floats, GpuSums, Rows, RowSums

COLUMNS = 64  # of one product: up to about this many, most of the time is spent reading the rows
GROUP = 8  # values of C at once, at most: the next group starts from the optima of this one, if it is needed at all
ENOUGH = 16  # times as many rows as features determine the axes of all rows well enough
MEMORY = 10  # pairs of steps and gradients that L-BFGS remembers
GAIN = 3e-7  # relative decrease that another step must promise: at the end, the objective is usually within 1e-4 of the optimum
STEEP = 1e-5  # or the certificate is at most this: a tenth of what scikit-learn stops at
HIDDEN = 8  # trials in a row whose decrease is hidden by rounding: from here on, float64
ROUNDING = 1e-4  # relative, of an objective from float32 products: smaller differences are rounding
SUFFICIENT = 1e-4  # of the expected decrease (Armijo)
SHORTEST = 2.0**-30
DISTINCT = 1e-12  # of the largest eigenvalue: directions with a smaller one are not axes of the rows


@dataclass(frozen=True)
class Optimum:
    """The fit for one C.

    Attributes:
        C: inverse strength of regularisation.
        weight, bias: ``(k, d)`` and ``(k,)``; for two classes ``(1, d)`` and ``(1,)``, of the second against the first.
        objective: summed log-losses plus ``|w|^2 / 2C``.
        gradient: the certificate: largest absolute entry of the gradient of the objective over the sum of the rows' weights.
        evaluations: of objective and gradient.
        converged: whether no further step is expected to matter, or the certificate is small enough.
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
    hidden: int = 0
    done: bool = False
    converged: bool = False

    @property
    def trial(self) -> Float64:
        return self.place if self.direction.size == 0 else self.place + self.step * self.direction

    def take(self, value: float, gradient: Float64, inverse: Float64) -> bool:
        """Take the objective at the trial: True if the search moved there, False if it will try half of the step."""
        self.evaluations += 1
        if self.direction.size == 0:
            self.value, self.gradient, self.inverse = value, gradient, inverse
        elif self._descends(value, gradient):
            moved, bent = self.step * self.direction, gradient - self.gradient
            curvature = float((moved * bent).sum())
            if curvature > 0:
                self.pairs.append((moved, bent, curvature))
            self.place, self.value, self.gradient, self.inverse = self.place + moved, value, gradient, inverse
        else:
            self.step /= 2
            self.done = self.step < SHORTEST  # no gain is left in float32
            return False
        self.step = 1.0
        self._turn()
        if self.slope >= 0:  # rounding has made the memory useless
            self.pairs.clear()
            self._turn()
        return True

    def again(self) -> None:
        """Evaluate the current place next, with higher precision."""
        self.direction, self.step, self.hidden = np.empty(0), 1.0, 0

    def _descends(self, value: float, gradient: Float64) -> bool:
        """Armijo's rule; if rounding hides the decrease, its approximation by slopes (Hager and Zhang 2005, eq. 4.1)."""
        if value <= self.value + SUFFICIENT * self.step * self.slope:
            self.hidden = 0
            return True
        self.hidden += 1
        ahead = float((gradient * self.direction).sum())
        return value <= self.value * (1 + ROUNDING) and ahead <= (2 * SUFFICIENT - 1) * self.slope

    def _turn(self) -> None:
        """Set the next direction by the two loops of L-BFGS, starting from the diagonal curvature."""
        q, taken = self.gradient.copy(), []
        for moved, bent, curvature in reversed(self.pairs):
            share = float((moved * q).sum()) / curvature
            taken.append(share)
            q -= share * bent
        q *= self.inverse
        if q.shape[1] > 1:  # the gradient sums to zero over the classes, but no longer after scaling by their curvatures
            q -= q.mean(axis=1, keepdims=True)
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
        inputs: standardised features ``(n, d)`` float32, or a reader of them.
        targets: class indices ``(n,)``.
        classes: number of classes.
        weights: of the rows ``(n,)``, more than 0; None is 1 for each.
        device: torch device for the products, such as ``cuda``; None is the CPU, without torch. Rows that are read for each
            product stay on the CPU.

    Attributes:
        evaluations: number of evaluations of objective and gradient so far, over all values of C.
    """

    def __init__(
        self,
        inputs: Float32 | Rows,
        targets: NDArray[np.intp],
        classes: int,
        weights: Float64 | None = None,
        *,
        device: str | None = None,
    ) -> None:
        self._n, self._columns = len(targets), 1 if classes == 2 else classes
        counts = np.ones(len(targets)) if weights is None else weights
        self._total = float(counts.sum())
        rows, self._axes, self._spread = principal_axes(inputs)
        self._turned = isinstance(rows, np.ndarray)
        self._sums: RowSums | GpuSums
        if device is None or not isinstance(rows, np.ndarray):
            self._sums = RowSums(rows, targets, counts)
        else:
            self._sums = GpuSums(rows, targets, counts, device)
        self._exact = False
        self.evaluations = 0

    def optima(
        self, Cs: Sequence[float], most: int, steep: float = STEEP, start: tuple[Floats, Floats] | None = None
    ) -> Iterator[Optimum]:
        """One optimum for each C, in rising order; later groups are computed only if the caller goes on.

        Args:
            Cs: in rising order.
            most: largest number of evaluations for each.
            steep: largest entry of the gradient at which to stop; 0 goes on until no step is expected to gain anything.
            start: initial weights and biases, as in `Optimum`; None is zero.
        """
        place = np.zeros((len(self._spread) + 1, self._columns))
        if start is not None:
            place[:-1], place[-1] = self._axes.T @ start[0].T, start[1]
        optima: deque[tuple[float, Float64]] = deque([(Cs[0], place)], maxlen=2)
        group = min(max(COLUMNS // self._columns, 1), GROUP)
        for begin in range(0, len(Cs), group):
            searches = [_Search(1 / C, _ahead(optima, C)) for C in Cs[begin : begin + group]]
            while active := [search for search in searches if not search.done]:
                values, gradients, curved = self._evaluate(active)
                for search, value, gradient, curvature in zip(active, values, gradients, curved, strict=True):
                    moved = search.take(value, gradient, self._inverse(curvature, search.strength))
                    search.converged = -search.slope <= GAIN * search.value or (moved and self._is_flat(gradient, steep))
                    search.done |= search.converged or search.evaluations >= most
                if not self._exact and any(search.hidden >= HIDDEN for search in active):
                    self._exact = True
                    for search in active:
                        search.again()
            for C, search in zip(Cs[begin : begin + group], searches, strict=True):
                yield self._optimum(C, search)
                optima.append((C, search.place))

    def _optimum(self, C: float, search: _Search) -> Optimum:
        weight = self._axes @ search.place[:-1].astype(np.float32)
        bias = search.place[-1].astype(np.float32)
        certificate = self._certificate(search.gradient)
        return Optimum(
            C, np.ascontiguousarray(weight.T), bias, search.value, certificate, search.evaluations, converged=search.converged
        )

    def _is_flat(self, gradient: Float64, steep: float) -> bool:
        """Whether the certificate is at most ``steep``; a gradient that is too long for that is not rotated back."""
        longest = steep * self._total * np.sqrt((len(self._axes) + 1) * self._columns)
        return bool(np.linalg.norm(gradient) <= longest) and self._certificate(gradient) <= steep

    def _certificate(self, gradient: Float64) -> float:
        """The certificate in the axes of the features, as in scikit-learn."""
        weights = self._axes @ gradient[:-1].astype(np.float32)
        return float(max(np.abs(weights).max(), np.abs(gradient[-1]).max())) / self._total

    def _inverse(self, curvature: Float64, strength: float) -> Float64:
        """Inverse of the curvature along every axis, and of the intercepts, ``(axes + 1, columns)``."""
        along = self._spread[:, None] * curvature + strength
        free = np.maximum(curvature * self._n, 1e-12)
        return np.asarray(1 / np.concatenate([along, free[None]]))

    @property
    def _kind(self) -> type[np.floating[Any]]:
        return np.float64 if self._exact else np.float32

    def _evaluate(self, searches: Sequence[_Search]) -> tuple[list[float], list[Float64], list[Float64]]:
        """Objective, gradient and, for each column, mean ``p(1 - p)`` at the trial of each search."""
        self.evaluations += len(searches)
        places = np.stack([search.trial for search in searches])
        count, _, columns = places.shape
        along = places[:, :-1].transpose(1, 0, 2).reshape(-1, count * columns)
        weights = (along if self._turned else self._axes @ along).astype(self._kind)
        biases = places[:, -1].reshape(-1).astype(self._kind)
        losses, curvatures, residuals, products = self._sums(weights, biases, count)
        if not self._turned:
            products = products @ self._axes
        gradients = np.empty_like(places)
        gradients[:, :-1] = products.reshape(count, columns, -1).transpose(0, 2, 1)
        gradients[:, -1] = residuals.reshape(count, columns)
        values = []
        for i, search in enumerate(searches):
            weight = places[i, :-1]
            gradients[i, :-1] += search.strength * weight
            values.append(float(losses[i] + 0.5 * search.strength * (weight * weight).sum()))
        return values, list(gradients), list(curvatures.reshape(count, columns) / self._n)


def _ahead(optima: Sequence[tuple[float, Float64]], C: float) -> Float64:
    """The line through the last two optima, on a scale of log C, at this C."""
    (before, first), (last, place) = optima[0], optima[-1]
    return place if last == before else place + np.log(C / last) / np.log(last / before) * (place - first)


@overload
def principal_axes(inputs: Float32) -> tuple[Float32, Float32, Float64]: ...


@overload
def principal_axes(inputs: Float32 | Rows) -> tuple[Float32 | Rows, Float32, Float64]: ...


def principal_axes(inputs: Float32 | Rows) -> tuple[Float32 | Rows, Float32, Float64]:
    """The rows in their principal axes ``(n, r)``, the axes ``(d, r)``, and the sum of squares along each ``(r,)``.

    Rows that are read for each product are returned as they are ``(n, d)``. For many rows, the axes are those of some blocks:
    they determine how many steps a fit takes, not where it ends.
    """
    n, d = inputs.shape
    if n > d or not isinstance(inputs, np.ndarray):
        gram = np.zeros((d, d))
        starts = range(0, n, ROWS)
        starts = starts[:: max(n // (ENOUGH * d), 1)]
        used = 0
        for begin in starts:
            rows = inputs[begin : begin + ROWS]
            used += len(rows)
            gram += rows.T @ rows
        spread, axes = np.linalg.eigh(gram)
        turned = axes.astype(np.float32)
        return inputs @ turned if isinstance(inputs, np.ndarray) else inputs, turned, np.maximum(spread, 0) * (n / used)
    wide = inputs.astype(np.float64)
    spread, sides = np.linalg.eigh(wide @ wide.T)
    kept = spread > DISTINCT * max(spread[-1], 1e-300)
    lengths = np.sqrt(spread[kept])
    sides = sides[:, kept]
    return (sides * lengths).astype(np.float32), (wide.T @ (sides / lengths)).astype(np.float32), spread[kept]
