"""The settings of augmentation and of cached views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from extractor.settings import Settings, rule, setting
from store.fingerprint import MAX_VIEWS

if TYPE_CHECKING:
    from .augment import Augmentation


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
    rotation: float = setting(0.0, "Largest random angle, either way.", ge=0, le=180, metavar="DEGREES")
    translation: float = setting(0.0, "Largest random shift, either way, as a share of the side.", ge=0, le=1, metavar="SHARE")
    shear: float = setting(0.0, "Largest random angle of a shear, either way.", ge=0, lt=90, metavar="DEGREES")
    zoom: float = setting(0.0, "Random zoom; 0.25 is from 1/1.25 to 1.25 times the size.", ge=0, metavar="X")
    brightness: float = setting(0.0, "Random factor; 0.2 is from 0.8 to 1.2.", ge=0, le=1, metavar="X")
    contrast: float = setting(0.0, "Random factor; 0.2 is from 0.8 to 1.2.", ge=0, le=1, metavar="X")

    @property
    def augmentation(self) -> Augmentation:
        """The random changes and their ranges."""
        from dataclasses import replace

        from .augment import Augmentation

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
