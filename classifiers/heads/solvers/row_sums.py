"""Losses and gradients of logistic regression, summed over training rows on the CPU, or with torch on a GPU."""

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

ROWS = 2048  # in one block, so that intermediate results stay in the CPU's caches
ROOM = 8  # bytes of GPU memory for each number: itself, and as much for intermediate results
GPU_ROWS = 2**16  # in one block on a GPU, enough to occupy all of its cores


def gpu_for(device: str, numbers: int) -> str | None:
    """The torch device for so many float32 numbers; None is the CPU, without torch.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU if there is one and the transfer is worth it.
        numbers: how many are kept on the device.

    Raises:
        DeviceUnavailableError: a GPU is required and torch finds none.
    """
    if device == "cpu" or (device == "auto" and (numbers < SMALL or not nvidia_driver_present())):
        return None
    import torch

    if not torch.cuda.is_available():
        if device == "auto":
            log.info("torch %s finds no GPU here: training on the CPU", torch.__version__)
            return None
        message = f"device {device!r}: torch {torch.__version__} finds no GPU; try 'cpu'"
        raise DeviceUnavailableError(message)
    if device != "auto":
        return device
    free, _ = torch.cuda.mem_get_info()
    if ROOM * numbers > free:
        log.info("%.1f GB do not fit on the GPU, where %.1f GB are free: training on the CPU", 4e-9 * numbers, free / 1e9)
        return None
    return "cuda"


class Rows(Protocol):
    """Rows that are read in blocks for each pass, because they do not fit into memory."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Float32: ...


class Sums(NamedTuple):
    """Sums over rows for ``count`` models with k columns each, all float64, weighted by how often each row counts.

    Attributes:
        losses: log-losses ``(count,)``.
        curvatures: p(1 - p) ``(count * k,)``.
        residuals: p, less 1 for the true class ``(count * k,)``.
        products: residuals times rows ``(count * k, d)``.
    """

    losses: Float64
    curvatures: Float64
    residuals: Float64
    products: Float64

    @classmethod
    def zero(cls, count: int, width: int, d: int) -> Sums:
        return cls(np.zeros(count), np.zeros(width), np.zeros(width), np.zeros((width, d)))

    def add(self, *more: Floats) -> None:
        for total, part in zip(self, more, strict=True):
            total += part


class RowSums:
    """Sums over rows on the CPU, block by block.

    Args:
        rows: ``(n, d)`` float32, or a reader of them.
        targets: class indices ``(n,)``.
        counts: how often each row counts ``(n,)``.
    """

    def __init__(self, rows: Float32 | Rows, targets: NDArray[np.intp], counts: Float64) -> None:
        self._rows, self._targets, self._counts = rows, targets, counts

    def __call__(self, weights: Floats, biases: Floats, count: int) -> Sums:
        """The sums for models with weights ``(d, count * k)`` and biases ``(count * k,)``, multiplied in their dtype."""
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

        total = Sums.zero(count, weights.shape[1], len(weights))
        for sums in side_by_side(part, range(0, len(self._rows), ROWS)):
            total.add(*sums)
        return total


class GpuSums:
    """Sums over rows on a torch device, which keeps the rows.

    Raises:
        RuntimeError: from torch, for example if the rows do not fit into the memory of the device.
    """

    def __init__(self, rows: Float32, targets: NDArray[np.intp], counts: Float64, device: str) -> None:
        import torch

        self._rows, self._targets, self._counts = (torch.from_numpy(each).to(device) for each in (rows, targets, counts))

    def __call__(self, weights: Floats, biases: Floats, count: int) -> Sums:
        """See `RowSums`."""
        import torch

        W, b = (torch.from_numpy(each).to(self._rows.device) for each in (weights, biases))
        totals = [torch.from_numpy(zeros).to(self._rows.device) for zeros in Sums.zero(count, weights.shape[1], len(weights))]
        blocks = (torch.split(each, GPU_ROWS) for each in (self._rows, self._targets, self._counts))
        for rows, targets, counts in zip(*blocks, strict=True):
            inputs = rows.to(W.dtype)
            logits = (inputs @ W + b).view(len(rows), count, -1)
            losses, residuals, curvatures = self._of(logits, targets)
            residuals *= counts[:, None, None].to(W.dtype)
            flat = residuals.reshape(len(rows), -1)
            bent = counts @ curvatures.reshape(len(rows), -1).double()
            parts = counts @ losses.double(), bent, flat.double().sum(dim=0), flat.T @ inputs
            for total, part in zip(totals, parts, strict=True):
                total += part
        return Sums(*(each.cpu().numpy() for each in totals))

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
    """Losses ``(rows, count)``, residuals and p(1 - p) for logits ``(rows, count, 1)`` of the second of two classes."""
    sign = np.where(truth == 1, 1, -1).astype(logits.dtype)[:, None, None]
    losses = np.logaddexp(0, -sign * logits)
    wrong = np.exp(-np.logaddexp(0, sign * logits))  # probability of the other class
    return losses[:, :, 0], -sign * wrong, wrong * (1 - wrong)


def _several(logits: Floats, truth: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """Losses ``(rows, count)``, residuals and p(1 - p) for logits ``(rows, count, k)``, which are overwritten."""
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
