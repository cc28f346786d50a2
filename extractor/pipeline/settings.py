"""Settings of an extraction, in groups that commands share; NumPy is imported only by the properties that need it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator

from extractor.backbones.settings import LayerSettings, NetworkSettings, OnnxInputSettings
from extractor.data.settings import DataSettings, LimitSettings
from extractor.pixels.settings import ViewSettings
from extractor.precision.registry import PRECISIONS
from extractor.runtime.settings import DeviceSettings
from extractor.settings import Settings, rule, seed_setting, setting

if TYPE_CHECKING:
    from extractor.pixels.views import Views

MIN_BUDGET = 3
FRACTION = 0.2  # default share of the images, for validation and for held-out


def _budget(value: Any) -> Any:
    """A number, or a share as text; both are kept as text."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?%\s*|\s*[0-9]+\s*", text):
        message = "a number such as 10, or a share such as 1%"
        raise ValueError(message)
    return text.strip()


class SplitSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Split, if the data has none"

    val_fraction: float = setting(FRACTION, "Share for validation.", ge=0, lt=1, metavar="SHARE")
    test_fraction: float = setting(FRACTION, "Share held out.", ge=0, lt=1, metavar="SHARE")
    seed: int = seed_setting("Seed of the split, and of everything else that is random.")

    @rule
    def _something_is_left(self) -> None:
        if self.val_fraction + self.test_fraction >= 1:
            message = f"<val_fraction> {self.val_fraction} and <test_fraction> {self.test_fraction} leave nothing to train on"
            raise ValueError(message)


class ResplitSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Split, if the data has none"

    resplit: bool = setting(False, "Split again by today's rule, and without groups if the samples have none any more.")


def _precision(value: str) -> str:
    if value not in PRECISIONS:
        message = ", ".join(PRECISIONS)
        raise ValueError(message)
    return value


class BudgetSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Files that cannot be read"

    max_failures: Annotated[str, BeforeValidator(_budget)] = setting(
        "1%", "How many may fail: a number, or a share, which is at least 3.", metavar="N|P%"
    )

    def budget(self, inputs: int) -> int:
        """How many inputs may fail."""
        if self.max_failures.endswith("%"):
            return max(MIN_BUDGET, int(float(self.max_failures[:-1]) / 100 * inputs))
        return int(self.max_failures)


class FailureSettings(BudgetSettings):
    on_error: Literal["skip", "fail"] = setting("skip", "skip records a bad file and goes on; fail stops.")
    retry_failed: bool = setting(False, "Try recorded failures again.")
    verify_content: bool = setting(False, "Read every file, even if size, time and inode are unchanged.")


class Options(LimitSettings, ResplitSettings, SplitSettings, ViewSettings, DeviceSettings, FailureSettings):
    """Options of an extraction: split, views, device, precision, and what happens to files that fail.

    >>> from extractor import Options
    >>> Options(device="cpu", views=4, val_fraction=0.1).test_fraction
    0.2
    """

    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Where and how fast"

    precision: Annotated[str, AfterValidator(_precision)] = setting(
        "fp32",
        "int8 is faster on a CPU (calibrated once, on training images), fp16 and tf32 on a GPU; refused if too coarse.",
        choices=lambda: PRECISIONS,
    )
    storage: Literal["auto", "float32"] = setting("auto", "float16 if the values fit, or always float32.")
    overwrite: bool = setting(False, "Start a new cache in place of an old one.", only="python")
    quiet: bool = setting(False, "No progress bar, and no progress lines.", only="python")

    @property
    def drawn(self) -> Views | None:
        """How random views are made; None if there is one view of each image."""
        from extractor.pixels.views import Views

        return Views(self.views, self.seed, self.augmentation) if self.views > 1 else None

    @rule
    def _precision_fits_the_device(self) -> None:
        kinds = {device.partition(":")[0] for device in self.device.split(",")}
        kind = PRECISIONS[self.precision].device
        if kind == "cpu" and kinds - {"cpu", "auto"}:
            message = f"<precision> {self.precision} is for the CPU, not for <device> {self.device}; leave one of them out"
            raise ValueError(message)
        if kind == "cuda" and "cpu" in kinds:
            message = f"<precision> {self.precision} is for a GPU, and this is the CPU: leave it out, or say <device> cuda"
            raise ValueError(message)


class ExtractSettings(NetworkSettings, LayerSettings, OnnxInputSettings, DataSettings, Options):
    """Settings of `penult extract`, and of the sections ``[backbone]`` and ``[extract]`` of a job."""

    @rule
    def _views_need_whole_images(self) -> None:
        if self.views > 1 and self.pixel_path not in (None, "pillow"):
            message = f"<views> needs whole images, and <pixel_path> {self.pixel_path} makes only the crop; leave one out"
            raise ValueError(message)
