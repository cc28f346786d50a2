"""Sums over training rows that logistic regression asks for again and again: on the processor, or on a GPU by torch."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from extractor.machine import nvidia_driver_present
from store.errors import DeviceUnavailableError

from .threads import SMALL, side_by_side

log = logging.getLogger("penult.classifiers")

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

ROWS = 2048  # at once, so that what is computed of them stays in the processor's caches
ROOM = 8  # bytes of a GPU's memory for each number: itself, and as much for what is computed
GPU_ROWS = 2**16  # .. and on a GPU, so that every core of it has something to do


def gpu_for(wanted: str, numbers: int) -> str | None:
    """The device of torch for so many float32 numbers; None is this processor, without torch.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there is one and it is worth the way there.
        numbers: that will be kept there.

    Raises:
        DeviceUnavailableError: a GPU is wanted and torch finds none.
    """
    if wanted == "cpu" or (wanted == "auto" and (numbers < SMALL or not nvidia_driver_present())):
        return None
    import torch

    if not torch.cuda.is_available():
        if wanted == "auto":
            log.info("torch %s finds no GPU here: training on the CPU", torch.__version__)
            return None
        message = f"device {wanted!r}: torch {torch.__version__} finds no GPU; try 'cpu'"
        raise DeviceUnavailableError(message)
    if wanted != "auto":
        return wanted
    free, _ = torch.cuda.mem_get_info()
    if ROOM * numbers > free:
        log.info("%.1f GB do not fit on the GPU, where %.1f GB are free: training on the CPU", 4e-9 * numbers, free / 1e9)
        return None
    return "cuda"


class Rows(Protocol):
    """Rows that are read in blocks, each time, because there are too many to keep."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Float32: ...


class Sums(NamedTuple):
    """Of ``count`` models with k columns each; all float64, each row as often as it counts.

    Attributes:
        losses: log-losses ``(count,)``.
        curvatures: p(1 - p) ``(count * k,)``.
        residuals: p less 1 where it is right ``(count * k,)``.
        products: of residuals and rows ``(count * k, d)``.
    """

    losses: Float64
    curvatures: Float64
    residuals: Float64
    products: Float64

    @classmethod
    def zero(cls, count: int, width: int, d: int) -> Sums:
        return cls(np.zeros(count), np.zeros(width), np.zeros(width), np.zeros((width, d)))

    def add(self, *more: Floats) -> None:
        for mine, part in zip(self, more, strict=True):
            mine += part


class RowSums:
    """Block by block, on this processor.

    Args:
        rows: ``(n, d)`` float32, or what reads them.
        targets: class indices ``(n,)``.
        counts: how often each row counts ``(n,)``.
    """

    def __init__(self, rows: Float32 | Rows, targets: NDArray[np.intp], counts: Float64) -> None:
        self._rows, self._targets, self._counts = rows, targets, counts

    def __call__(self, weights: Floats, biases: Floats, count: int) -> Sums:
        """Of the models with these weights ``(d, count * k)`` and biases ``(count * k,)``, multiplied in their dtype."""
        several = weights.shape[1] > count

        def part(begin: int) -> tuple[Floats, ...]:
            block = slice(begin, begin + ROWS)
            rows, counts = self._rows[block].astype(weights.dtype, copy=False), self._counts[block]
            logits = (rows @ weights + biases).reshape(len(rows), count, -1)
            losses, residuals, curvatures = (_several if several else _binary)(logits, self._targets[block])
            light = counts.astype(weights.dtype)
            residuals *= light[:, None, None]
            flat = residuals.reshape(len(rows), -1)
            bent = light @ curvatures.reshape(len(rows), -1)
            return counts @ losses, bent, flat.sum(axis=0, dtype=np.float64), flat.T @ rows

        found = Sums.zero(count, weights.shape[1], len(weights))
        for sums in side_by_side(part, range(0, len(self._rows), ROWS)):
            found.add(*sums)
        return found


class GpuSums:
    """The same on a device of torch, which keeps the rows.

    Raises:
        RuntimeError: torch's, as where the rows do not fit into the memory of the device.
    """

    def __init__(self, rows: Float32, targets: NDArray[np.intp], counts: Float64, device: str) -> None:
        import torch

        self._rows, self._targets, self._counts = (torch.from_numpy(each).to(device) for each in (rows, targets, counts))

    def __call__(self, weights: Floats, biases: Floats, count: int) -> Sums:
        """As `RowSums`."""
        import torch

        W, b = (torch.from_numpy(each).to(self._rows.device) for each in (weights, biases))
        found = [torch.from_numpy(zeros).to(self._rows.device) for zeros in Sums.zero(count, weights.shape[1], len(weights))]
        blocks = (torch.split(each, GPU_ROWS) for each in (self._rows, self._targets, self._counts))
        for rows, targets, counts in zip(*blocks, strict=True):
            inputs = rows.to(W.dtype)
            logits = (inputs @ W + b).view(len(rows), count, -1)
            losses, residuals, curvatures = self._of(logits, targets)
            residuals *= counts[:, None, None].to(W.dtype)
            flat = residuals.reshape(len(rows), -1)
            bent = counts @ curvatures.reshape(len(rows), -1).double()
            parts = counts @ losses.double(), bent, flat.double().sum(dim=0), flat.T @ inputs
            for mine, part in zip(found, parts, strict=True):
                mine += part
        return Sums(*(each.cpu().numpy() for each in found))

    def _of(self, logits: Any, targets: Any) -> tuple[Any, Any, Any]:
        from torch.nn.functional import log_softmax, logsigmoid

        if logits.shape[2] == 1:
            sign = (2 * targets - 1).to(logits.dtype)[:, None, None]
            wrong = (-sign * logits).sigmoid()
            return -logsigmoid(sign * logits)[:, :, 0], -sign * wrong, wrong * (1 - wrong)
        likely = log_softmax(logits, dim=2)
        right = targets[:, None, None].expand(-1, logits.shape[1], 1)
        losses, p = -likely.gather(2, right)[:, :, 0], likely.exp()
        curvatures = p * (1 - p)
        p.scatter_(2, right, 0)
        return losses, p.scatter(2, right, -p.sum(dim=2, keepdim=True)), curvatures


def _binary(logits: Floats, truth: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """Of ``(rows, count, 1)`` logits of the second class: losses ``(rows, count)``, residuals and p(1 - p)."""
    sign = np.where(truth == 1, 1, -1).astype(logits.dtype)[:, None, None]
    losses = np.logaddexp(0, -sign * logits)
    wrong = np.exp(-np.logaddexp(0, sign * logits))  # probability of the other class
    return losses[:, :, 0], -sign * wrong, wrong * (1 - wrong)


def _several(logits: Floats, truth: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """Of ``(rows, count, k)`` logits, which it overwrites: losses ``(rows, count)``, residuals and p(1 - p)."""
    every = np.arange(len(logits))
    logits -= logits.max(axis=2, keepdims=True)
    right = logits[every, :, truth]
    np.exp(logits, out=logits)
    total = logits.sum(axis=2)
    losses = np.log(total) - right
    logits /= total[:, :, None]
    curvatures = logits * (1 - logits)
    logits[every, :, truth] = 0
    logits[every, :, truth] = -logits.sum(axis=2)  # p - 1 of the right class, without the cancellation
    return losses, logits, curvatures
