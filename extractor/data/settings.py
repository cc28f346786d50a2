"""The settings of a dataset: where its images are, what their labels mean, and how many are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from extractor.settings import FilePath, Names, Settings, rule, setting
from store.tasks import Task

if TYPE_CHECKING:
    from .sources import Source


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
        from .sources import open_source

        names = {**SourceSettings.model_fields, **TaskSettings.model_fields}
        return open_source(data, base=base, **{name: getattr(self, name) for name in names})


class LimitSettings(Settings):
    section: ClassVar[str] = "extract"
    heading: ClassVar[str] = "Data"

    limit: int | None = setting(None, "Only the first N inputs, by a hash of their paths.", ge=1, metavar="N", shown="all")
