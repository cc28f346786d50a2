"""The settings of the HTML report."""

from __future__ import annotations

from typing import ClassVar

from classifiers.bundles.settings import HeldOutSettings, PredictSettings, RootSettings
from extractor.settings import Settings, setting


class ThumbnailSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Report"

    thumbnails: bool = setting(True, "Small images in the report.", shown="yes")


class ReportSettings(HeldOutSettings, RootSettings, ThumbnailSettings, PredictSettings):
    """The settings of `penult report`."""
