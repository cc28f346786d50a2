"""What a piece of work cost: wall time, memory, and the energy of GPUs where their driver counts it."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes


@dataclass(frozen=True)
class Spent:
    """What was spent.

    Attributes:
        seconds: wall time.
        peak_memory: bytes that were resident at most, of this process or of the largest of its ended children, whichever was
            more, *since the process began*: the kernel keeps no other mark. So it is an upper bound where the process had
            done something else before. Memory of GPUs is not in it.
        energy: joules that the GPUs in use drew; None where there is none, or nothing that counts them.
    """

    seconds: float
    peak_memory: int
    energy: float | None

    def facts(self) -> dict[str, Any]:
        """JSON, without the time."""
        return {"peak_memory": self.peak_memory, "energy": self.energy}


class Meter:
    """Begins to count when it is made.

    Args:
        devices: where the work is done; everything but ``cpu`` is a GPU, the first one without ``:N``.
    """

    def __init__(self, *devices: str) -> None:
        self._gpus = [int(device.partition(":")[2] or 0) for device in devices if device != "cpu"]
        self._before = drawn(self._gpus)
        self._began = time.perf_counter()

    def read(self) -> Spent:
        """What was spent until now."""
        seconds = time.perf_counter() - self._began
        now = drawn(self._gpus)
        energy = None if now is None or self._before is None else round(now - self._before, 3)
        return Spent(seconds, peak_memory(), energy)


def peak_memory() -> int:
    """See `Spent.peak_memory`."""
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * MAXRSS_UNIT


def drawn(gpus: list[int]) -> float | None:
    """Joules that some GPUs, by their CUDA numbers, have drawn since the driver was loaded; None where NVML does not tell.

    NVML counts them from Volta on. Other programs on the same card are counted too. CUDA numbers cards of different kinds by
    speed unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, which NVML does not know of.
    """
    if not gpus:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    try:
        pynvml.nvmlInit()
        try:
            millijoules = 0
            for gpu in gpus:
                name = visible[gpu] if visible else str(gpu)
                by_number = name.isdecimal()
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(name)
                millijoules += pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, IndexError):  # no driver, a card too old or divided, a card that is not visible
        return None
    return millijoules / 1000


def together(*parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """`Spent.facts` of several pieces of work as one: the most memory, and the sum of the energies that are known."""
    memory = [part["peak_memory"] for part in parts if part and part.get("peak_memory") is not None]
    energy = [part["energy"] for part in parts if part and part.get("energy") is not None]
    return {"peak_memory": max(memory, default=None), "energy": round(sum(energy), 3) if energy else None}
