"""The settings of a sweep over backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from classifiers.heads.registry import row_of
from extractor.backbones.settings import OnnxInputSettings, PixelSettings, PoolingSettings, backbone_of
from extractor.data.settings import DataSettings, LimitSettings
from extractor.pipeline.settings import BudgetSettings, SplitSettings
from extractor.runtime.settings import DeviceSettings
from extractor.settings import rule

if TYPE_CHECKING:
    from extractor.backbones.registry import Backbone
from classifiers.training.settings import HeadSettings


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
    """The settings of `penult sweep`, without its backbones."""

    def network(self) -> Backbone:
        """The settings that all backbones share."""
        return backbone_of(self)

    @rule
    def _a_head_for_the_task(self) -> None:
        if not (self.head and "." in self.head):
            row_of(self.head, self.task, "<head>")
