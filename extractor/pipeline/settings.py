"""Settings of an extraction, in groups that commands share; NumPy is imported only by the properties that need it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator

from extractor.backbones.settings import LayerSettings, NetworkSettings, OnnxInputSettings
from extractor.settings import FilePath, Names, Settings, rule, seed_setting, setting
from store.fingerprint import MAX_VIEWS
from store.tasks import Task

if TYPE_CHECKING:
    from extractor.data.sources import Source
    from extractor.pixels.augment import Augmentation
    from extractor.pixels.views import Views

MAX_BATCH, MAX_WORKERS = 4096, 256  # a larger number is a mistake: decoded images of a batch alone would fill the memory
MIN_BUDGET = 3
FRACTION = 0.2  # default share of the images, for validation and for held-out


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu(,cpu)*|cuda(:[0-9]+)?(,cuda(:[0-9]+)?)*", value):
        message = "auto, cpu, cuda or cuda:N, or several of one kind with commas, such as cuda:0,cuda:1"
        raise ValueError(message)
    return value


def _budget(value: Any) -> Any:
    """A number, or a share as text; both are kept as text."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?%\s*|\s*[0-9]+\s*", text):
        message = "a number such as 10, or a share such as 1%"
        raise ValueError(message)
    return text.strip()


class SourceSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Data"

    root: FilePath = setting(None, "What the paths of a manifest are relative to.", metavar="FOLDER", shown="its folder")
    group_by: str | None = setting(
        None, "What must stay in one split: a column, or a pattern over paths.", metavar="COLUMN|REGEX"
    )
    follow_symlinks: bool = setting(False, "Follow symbolic links.")


class TaskSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Data"

    task: Literal["single-label", "multi-label", "regression"] = setting(
        "single-label", "What labels mean; multi-label separates them by |."
    )
    targets: Names = setting((), "regression: the numeric columns to predict.", flag="--target", metavar="COLUMN", repeat=True)

    @rule
    def _targets_are_of_regression(self) -> None:
        Task.named(self.task, self.targets, lambda name: f"<{name}>")


class DataSettings(SourceSettings, TaskSettings):
    def source(self, data: str | Path, base: Path = Path()) -> Source:
        """The images that ``DATA`` means; see `sources.open_source`."""
        from extractor.data.sources import open_source

        names = {**SourceSettings.model_fields, **TaskSettings.model_fields}
        return open_source(data, base=base, **{name: getattr(self, name) for name in names})


class LimitSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Data"

    limit: int | None = setting(None, "Only the first N inputs, by a hash of their paths.", ge=1, metavar="N", shown="all")


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


class AugmentSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Augmentation"

    augment: Literal["standard", "trivialaugment", "randaugment", "autoaugment", "augmix", "none"] = setting(
        "standard", "Random changes: standard is crops and flips; policies come on top of these."
    )
    crop_area: float | None = setting(
        None, "Least share of an image in a random crop.", gt=0, le=1, metavar="SHARE", shown="0.35"
    )
    flip: Literal["none", "horizontal", "vertical", "both"] | None = setting(
        None, "Mirror images: none if left and right differ in meaning, as in text.", shown="horizontal"
    )
    rotation: float = setting(0.0, "At most so far, either way.", ge=0, le=180, metavar="DEGREES")
    translation: float = setting(0.0, "At most so far, either way, share of the side.", ge=0, le=1, metavar="SHARE")
    shear: float = setting(0.0, "At most so far, either way.", ge=0, lt=90, metavar="DEGREES")
    zoom: float = setting(0.0, "0.25: from 1/1.25 to 1.25 times the size.", ge=0, metavar="X")
    brightness: float = setting(0.0, "0.2: a factor from 0.8 to 1.2.", ge=0, le=1, metavar="X")
    contrast: float = setting(0.0, "0.2: a factor from 0.8 to 1.2.", ge=0, le=1, metavar="X")

    @property
    def augmentation(self) -> Augmentation:
        """The random changes and their ranges."""
        from dataclasses import replace

        from extractor.pixels.augment import Augmentation

        names = ("rotation", "translation", "shear", "zoom", "brightness", "contrast")
        changes: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.crop_area is not None:
            changes["area"] = (self.crop_area, 1.0)
        if self.flip is not None:
            changes["flip"] = 0.5 if self.flip in ("horizontal", "both") else 0.0
            changes["vertical_flip"] = 0.5 if self.flip in ("vertical", "both") else 0.0
        return replace(Augmentation.named(self.augment), **changes)


class ViewSettings(AugmentSettings):
    views: int = setting(
        1, "Views of each image: itself, and random changes of it (docs/views.md).", ge=1, le=MAX_VIEWS, metavar="N"
    )

    @rule
    def _views_differ(self) -> None:
        changes = self.augmentation
        if self.views > 1 and not changes:
            message = f"<views> {self.views} without an augmentation is {self.views} times the same; leave one of them out"
            raise ValueError(message)
        if self.views == 1 and changes and AugmentSettings.model_fields.keys() & self.model_fields_set - self._usual():
            message = "an augmentation needs <views> of 2 or more; give <views>, or leave the augmentation out"
            raise ValueError(message)

    def _usual(self) -> set[str]:
        """Names of the settings that were set to their default."""
        return {name for name in self.model_fields_set if getattr(self, name) == type(self).model_fields[name].default}


class DeviceSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Where and how fast"

    device: Annotated[str, AfterValidator(_device)] = setting(
        "auto", "Where to compute; several with commas (docs/gpu.md).", metavar="auto|cpu|cuda[:N]"
    )
    batch_size: Annotated[int | None, BeforeValidator(_auto)] = setting(
        None, "Images per batch.", short="-b", ge=1, le=MAX_BATCH, metavar="N|auto", shown="auto", also=", or auto"
    )
    workers: Annotated[int | None, BeforeValidator(_auto)] = setting(
        None, "Decoding threads.", short="-j", ge=1, le=MAX_WORKERS, metavar="N|auto", shown="auto", also=", or auto"
    )


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
    on_error: Literal["skip", "fail"] = setting("skip", "What a bad file does.")
    retry_failed: bool = setting(False, "Try recorded failures again.")
    verify_content: bool = setting(False, "Read every file, even if size, time and inode are unchanged.")


class Options(LimitSettings, SplitSettings, ViewSettings, DeviceSettings, FailureSettings):
    """Options of an extraction: split, views, device, precision, and what happens to files that fail.

    >>> from extractor import Options
    >>> Options(device="cpu", views=4, val_fraction=0.1).test_fraction
    0.2
    """

    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Where and how fast"

    precision: Literal["fp32", "tf32", "fp16", "int8"] = setting(
        "fp32",
        "int8 is faster on a CPU (calibrated once, on training images), fp16 and tf32 on a GPU; refused if too coarse.",
    )
    storage: Literal["auto", "float32"] = setting("auto", "float16 if the values fit, or always float32.")
    overwrite: bool = setting(False, "Start a new cache in place of an old one.", only="python")
    quiet: bool = setting(False, "No progress line.", only="python")

    @property
    def drawn(self) -> Views | None:
        """How random views are made; None if there is one view of each image."""
        from extractor.pixels.views import Views

        return Views(self.views, self.seed, self.augmentation) if self.views > 1 else None

    @rule
    def _precision_fits_the_device(self) -> None:
        kinds = {device.partition(":")[0] for device in self.device.split(",")}
        if self.precision == "int8" and "cuda" in kinds:
            message = f"<precision> int8 is for the CPU, not for <device> {self.device}; leave one of them out"
            raise ValueError(message)
        if self.precision in ("fp16", "tf32") and "cpu" in kinds:
            message = f"<precision> {self.precision} is for a GPU, and this is the CPU: leave it out, or say <device> cuda"
            raise ValueError(message)


class ExtractSettings(NetworkSettings, LayerSettings, OnnxInputSettings, DataSettings, Options):
    """Settings of `penult extract`, and of the sections ``[backbone]`` and ``[extract]`` of a job."""

    @rule
    def _views_need_whole_images(self) -> None:
        if self.views > 1 and self.pixel_path not in (None, "pillow"):
            message = f"<views> needs whole images, and <pixel_path> {self.pixel_path} makes only the crop; leave one out"
            raise ValueError(message)
