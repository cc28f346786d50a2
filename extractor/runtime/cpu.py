"""Backbones on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extractor.graphs.reasons import reason
from extractor.machine import cores
from store.errors import BadDataError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

BATCH = 4  # large batches are slower: they do not fit the processor's caches
MAX_PROLOGUE = 256 * 2**20  # bytes of a backbone file; a copy of a larger one costs too much memory


class Cpu:
    """The CPU; see `provider.Provider`.

    A lane is a thread that runs whole batches alone: several small batches side by side are faster than one whose layers all
    threads wait for, even more so if decoding uses the same cores. Features are the same bits at every batch size (measured on
    nine networks, fp32), so nothing is padded.
    """

    devices: tuple[str, ...] = ("cpu",)
    shares_cores = True
    pads = False
    out_of_memory: tuple[str, ...] = ("BFCArena", "Failed to allocate memory")

    def missing(self) -> str:
        return ""

    def trouble(self, device: str) -> str:
        return ""

    def present(self) -> bool:
        return True

    def lanes(self) -> int:
        return cores()

    def batch_size(self, device: str) -> int:
        return BATCH

    def rewrites(self, model: Path) -> bool:
        return model.stat().st_size <= MAX_PROLOGUE

    def open(self, model: Path, graph: bytes | None, device: str, *, lanes: int, tf32: bool) -> Any:
        from extractor.graphs.cpu_session import cpu_session

        try:
            return cpu_session(graph or model, threads=max(cores() // lanes, 1))
        except Exception as error:  # onnxruntime's exceptions have no common public base
            message = f"{model} cannot be run: {self.reason(error)}"
            raise BadDataError(message) from error

    def lane(
        self, session: Any, device: str, pixels: str, shape: Sequence[int], dtype: DTypeLike, outputs: Mapping[str, int]
    ) -> Callable[[NDArray[Any]], Sequence[NDArray[Any]]]:
        names = list(outputs)
        return lambda batch: session.run(names, {pixels: batch})

    def reason(self, error: Exception) -> str:
        return reason(error)
