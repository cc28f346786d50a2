"""The resources of this machine: cores and memory, and the time, memory and GPU energy that work takes."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes


@dataclass(frozen=True)
class Spent:
    """The resources that a piece of work took.

    Attributes:
        seconds: wall time.
        peak_memory: peak of resident memory in bytes, of this process or of the largest of its ended children, *since the
            process began*: the kernel keeps no other record. So it is an upper bound if the process did other work before.
            GPU memory is not included.
        energy: joules that the GPUs in use drew; None without a GPU, or without a driver that counts them.
    """

    seconds: float
    peak_memory: int
    energy: float | None

    def facts(self) -> dict[str, Any]:
        """As JSON, without the time."""
        return {"peak_memory": self.peak_memory, "energy": self.energy}


class Meter:
    """Measures the resources that work takes, from when it is created.

    Args:
        devices: where the work is done; ``cuda:N`` is an NVIDIA GPU, ``cuda`` and ``auto`` the first one.
    """

    def __init__(self, *devices: str) -> None:
        parts = [device.partition(":") for device in devices]
        self._gpus = [int(number or 0) for kind, _, number in parts if kind in ("auto", "cuda")]
        self._before = drawn(self._gpus)
        self._began = time.perf_counter()

    def read(self) -> Spent:
        """The resources taken until now."""
        seconds = time.perf_counter() - self._began
        now = drawn(self._gpus)
        energy = None if now is None or self._before is None else round(now - self._before, 3)
        return Spent(seconds, peak_memory(), energy)


def peak_memory() -> int:
    """See `Spent.peak_memory`."""
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * MAXRSS_UNIT


def drawn(gpus: list[int]) -> float | None:
    """Joules that some GPUs, by their CUDA numbers, have drawn since the driver was loaded; None if NVML does not count them.

    NVML counts them from Volta on. Other programs on the same card are counted too. CUDA numbers cards of different kinds by
    speed unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, which NVML ignores.
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
    except (pynvml.NVMLError, IndexError):  # no driver, a card that is too old, partitioned or not visible
        return None
    return millijoules / 1000


def together(*parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """`Spent.facts` of several pieces of work combined: the largest memory, and the sum of the known energies."""
    memory = [part["peak_memory"] for part in parts if part and part.get("peak_memory") is not None]
    energy = [part["energy"] for part in parts if part and part.get("energy") is not None]
    return {"peak_memory": max(memory, default=None), "energy": round(sum(energy), 3) if energy else None}


def default_limit() -> int:
    """Half of the available memory of the machine, or of its control group; bytes."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # macOS
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(facts["MemAvailable"].removesuffix("kB")) * 1024
    with suppress(OSError, ValueError):  # no control group, or one whose limit is "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available // 2


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and the peak


Clock = dict[str, float]  # seconds by stage


def new_clock() -> Clock:
    return defaultdict(float)


@contextmanager
def timed(clock: Clock, stage: str) -> Iterator[None]:
    """Add the time that the block takes to a stage, but for what it adds to others."""
    begin = time.perf_counter() - sum(clock.values())
    try:
        yield
    finally:
        clock[stage] += time.perf_counter() - sum(clock.values()) - begin


def seconds_text(seconds: float) -> str:
    """A time, with as many digits as a rate needs that is computed from it.

    >>> seconds_text(0.0412), seconds_text(2.688), seconds_text(12.93), seconds_text(151.2)
    ('0.041 s', '2.69 s', '12.9 s', '151 s')
    """
    digits = next((digits for digits, least in enumerate((100, 10, 0.1)) if seconds >= least), 3)
    return f"{seconds:.{digits}f} s"


def cores() -> int:
    """How many cores this process may use, by its affinity (taskset, Slurm) and its container's quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no control group, or one whose quota is "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(count, 1)


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of those libraries that are installed, without importing one."""
    versions = {}
    for name in libraries:
        with suppress(PackageNotFoundError):  # onnxruntime has one of two names
            versions[name] = version(name)
    return versions


def nvidia_driver_present() -> bool:
    """Whether this machine has an NVIDIA driver (Linux, or Linux in Windows)."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
