"""The execution providers that backbones run on: one row for each kind of device. Imports neither NumPy nor ONNX Runtime.

A new provider is a module beside this one, with a class that has what `Provider` lists, and a row in `PROVIDERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from store.errors import UsageError

from .cpu import Cpu
from .cuda import Cuda

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    Lane = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]  # one batch to the outputs


class Provider(Protocol):
    """How backbones run on one kind of device.

    Attributes:
        devices: their names: the key of the row, with ``:N`` for a number where there may be several.
        shares_cores: it computes on the cores that decode images.
        pads: every batch is padded to one shape.
        out_of_memory: parts of the errors after which half of the batch may fit.
    """

    devices: tuple[str, ...]
    shares_cores: bool
    pads: bool
    out_of_memory: tuple[str, ...]

    def missing(self) -> str:
        """Why no such device can be used here, as far as is known without trying one; empty if one may work."""

    def trouble(self, device: str) -> str:
        """Why a device does not compute, for people; empty if it does."""

    def present(self) -> bool:
        """Whether this machine seems to have such a device, even one that does not compute."""

    def lanes(self) -> int:
        """How many batches run at once, unless the caller says."""

    def batch_size(self, device: str) -> int:
        """Images per batch, unless the caller says; the session is open."""

    def rewrites(self, model: Path) -> bool:
        """Whether a backbone's graph is rewritten in memory, so that it takes pixels and normalises them itself."""

    def open(self, model: Path, graph: bytes | None, device: str, *, lanes: int, tf32: bool) -> Any:
        """A session on a device that computes, with proof that it runs there.

        Args:
            model: the ONNX file.
            graph: its content where it was rewritten.
            device: of this kind.
            lanes: threads that will share the session.
            tf32: the products of float32 may be rounded to 10 bits.

        Raises:
            BadDataError: the file is not a usable network.
            DeviceUnavailableError: it does not run there as a whole.
        """

    def lane(
        self, session: Any, device: str, pixels: str, shape: Sequence[int], dtype: DTypeLike, outputs: Mapping[str, int]
    ) -> Lane:
        """A lane for one thread.

        Args:
            session: shared with other lanes.
            device: that it was opened on.
            pixels: name of the input.
            shape, dtype: of the first batch.
            outputs: length of a feature vector by name of the output.
        """

    def reason(self, error: Exception) -> str:
        """An error of ONNX Runtime in one line."""


# The CPU, then the accelerators in the order in which ``auto`` tries them
PROVIDERS: dict[str, Provider] = {"cpu": Cpu(), "cuda": Cuda()}
CPU, *ACCELERATORS = PROVIDERS

*_most, _last = ["auto", *(form for provider in PROVIDERS.values() for form in provider.devices)]
DEVICE_HELP = f"{', '.join(_most)} or {_last}"
DEVICES_HELP = f"{DEVICE_HELP}, or several of one kind with commas, such as cuda:0,cuda:1"


def provider_of(device: str) -> Provider:
    """The provider of a device, by the first part of its name."""
    return PROVIDERS[device.partition(":")[0]]


def _patterns() -> list[str]:
    """The names of the devices of each provider, as a regular expression."""
    return [f"({'|'.join(provider.devices)})".replace(":N", ":[0-9]+") for provider in PROVIDERS.values()]


def check_device(device: str) -> None:
    """Refuse text that is not the name of a device.

    Raises:
        UsageError: neither ``auto`` nor the name of a device.
    """
    if not re.fullmatch("|".join(["auto", *_patterns()]), device):
        message = f"--device {device}: expected {DEVICE_HELP}"
        raise UsageError(message)


def check_devices(text: str) -> str:
    """The text, if it is ``auto``, or devices of one kind with commas between them.

    Raises:
        ValueError: it is not; says what is expected.
    """
    if not re.fullmatch("|".join(["auto", *(f"{each}(,{each})*" for each in _patterns())]), text):
        raise ValueError(DEVICES_HELP)
    return text
