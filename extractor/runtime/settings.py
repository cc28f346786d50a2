"""The settings of a computation: devices, batch size and decoding threads."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator

from extractor.settings import Settings, setting

from .provider import check_devices

MAX_BATCH, MAX_WORKERS = 4096, 256  # a larger number is a mistake: decoded images of a batch alone would fill the memory


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


class DeviceSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Where and how fast"

    device: Annotated[str, AfterValidator(check_devices)] = setting(
        "auto", "Where to compute; several with commas (docs/gpu.md).", metavar="auto|cpu|cuda[:N]"
    )
    batch_size: Annotated[int | None, BeforeValidator(_auto)] = setting(
        None, "Images per batch.", short="-b", ge=1, le=MAX_BATCH, metavar="N|auto", shown="auto", also=", or auto"
    )
    workers: Annotated[int | None, BeforeValidator(_auto)] = setting(
        None, "Decoding threads.", short="-j", ge=1, le=MAX_WORKERS, metavar="N|auto", shown="auto", also=", or auto"
    )
