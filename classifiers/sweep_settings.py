"""The settings of a sweep over backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extractor.settings.declaration import rule
from extractor.settings.groups import (
    BudgetSettings,
    DataSettings,
    DeviceSettings,
    LimitSettings,
    SplitSettings,
)
from extractor.settings.network import OnnxInputSettings, PixelSettings, PoolingSettings, backbone_of

from .heads import row_of

if TYPE_CHECKING:
    from extractor.backbones import Backbone
from .settings import HeadSettings


class SweepSettings(
    PixelSettings,
    PoolingSettings,
    OnnxInputSettings,
    DataSettings,
    LimitSettings,
    SplitSettings,
    DeviceSettings,
    BudgetSettings,
    HeadSettings,
):
    """What `penult sweep` takes, beside its backbones."""

    def network(self) -> Backbone:
        """What is said of all backbones alike."""
        return backbone_of(self)

    @rule
    def _a_head_for_the_task(self) -> None:
        if not (self.head and "." in self.head):
            row_of(self.head, self.task, "<head>")
