"""The settings of training a head; see `extractor.settings` for what a setting is."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, create_model

from classifiers.heads.registry import head_names, make_head, row_of, rows
from classifiers.reports.settings import ThumbnailSettings
from extractor.pipeline.settings import FRACTION
from extractor.settings import ARGUMENTS, PLACE, Settings, as_tuple, rule, seed_setting, setting

MAX_SHOTS = 10**6  # images of a class


def _head(value: str) -> str:
    """A head of the registry; in Python also a scikit-learn class by its dotted name."""
    if value not in head_names() and not ("." in value and PLACE.get() is ARGUMENTS):
        message = ", ".join(head_names())
        raise ValueError(message)
    return value


class TrainOptions(ThumbnailSettings):
    """How a head is trained and judged: the options of `train.train`.

    >>> from classifiers import TrainOptions
    >>> TrainOptions(few_shot=(1, 5), seed=7).repeats
    20
    """

    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Training"

    leaks: Literal["warn", "refuse", "allow"] = setting(
        "warn", "What to do about images on both sides of the split, or under two labels."
    )
    near_copies: Literal["group", "ignore"] = setting(
        "group", "What versions of one image and frames of a burst are: one group, or images like any other (docs/leaks.md)."
    )
    few_shot: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_SHOTS)], ...], BeforeValidator(as_tuple)] = setting(
        (), "Learning curve: fit the head on this many training images of each class.", metavar="N,N"
    )
    repeats: int = setting(20, "Draws of the learning curve for each number of images.", ge=2, metavar="N")
    average_views: bool = setting(False, "Predict the mean over the views of an image; all views are fitted anyway.")
    max_memory: ByteSize | None = setting(
        None,
        "Memory of the process; features that do not fit stay on disk.",
        ge=1,
        metavar="SIZE",
        shown="half of what is free",
    )
    val_fraction: float | None = setting(
        None, "Share for validation, in another split.", ge=0, lt=1, metavar="SHARE", shown="the cache's split"
    )
    test_fraction: float | None = setting(
        None, "Share held out, in another split.", ge=0, lt=1, metavar="SHARE", shown="the cache's split"
    )
    seed: int = seed_setting("Seed of the training, and of a split of its own.")

    @rule
    def _something_is_left(self) -> None:
        fractions = (self.val_fraction, self.test_fraction)
        val, test = (FRACTION if each is None else each for each in fractions)
        if fractions != (None, None) and val + test >= 1:
            message = f"<val_fraction> {val} and <test_fraction> {test} leave nothing to train on"
            raise ValueError(message)

    @property
    def own_split(self) -> dict[str, Any]:
        """The fractions and seed of a split other than the stored one, as they enter the digest of a bundle's origin."""
        own = (self.val_fraction, self.test_fraction) != (None, None)
        return {"val": self.val_fraction, "test": self.test_fraction, "split_seed": self.seed if own else 0}


class HeadSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head"

    head: Annotated[str, AfterValidator(_head)] | None = setting(
        None, "Kind of head (docs/heads.md).", shown="logistic; ridge for regression", choices=head_names
    )


class TrainSettings(HeadSettings, TrainOptions):
    """The settings of `penult train`, and of section ``[train]`` of a job; `train_settings` adds those of the heads."""

    layer: str | None = setting(None, "Which feature set, if the cache has several.", metavar="NAME", shown="the first")

    @rule
    def _heads_have_their_own_settings(self) -> None:
        if self.head and "." in self.head:
            return
        candidates = [row for row in rows() if row.name == self.head] or [row_of(None, row.task) for row in rows()]
        own = {name for row in candidates for name in row.settings.model_fields}
        owners = {name: row.name for row in reversed(rows()) for name in row.settings.model_fields}
        problems = []
        for name in sorted(self.model_fields_set & owners.keys() - own):
            chosen = f"and this is {self.head}" if self.head else f"not of the default; say <head> {owners[name]}"
            problems.append(f"<{name}> is a setting of the {owners[name]} head, {chosen}")
        if problems:
            raise ValueError("; ".join(problems))

    def make(self, task: str) -> Any:
        """The head for a task, not yet fitted.

        Raises:
            UsageError: the task has no head of this name, or the head lacks one of the settings.
        """
        place = PLACE.get()
        if self.head and "." in self.head:
            return make_head(self.head, task)
        row = row_of(self.head, task, place.spell(type(self), "head"))
        every = {name for each in rows() for name in each.settings.model_fields}
        for name in sorted(self.model_fields_set & every - row.settings.model_fields.keys()):
            message = f"{place.spell(type(self), name)}: the {row.name} head for {task} has no such setting"
            raise place.error(message)
        return make_head(row.name, task, seed=self.seed, **{name: getattr(self, name) for name in row.settings.model_fields})


@cache
def train_settings() -> type[TrainSettings]:
    """`TrainSettings` with the settings of every head."""
    groups = tuple(dict.fromkeys(row.settings for row in rows() if row.settings is not Settings))
    specific = [each for each in groups if not any(each is not other and issubclass(other, each) for other in groups)]
    return cast("type[TrainSettings]", create_model("TrainSettings", __base__=(TrainSettings, *specific)))
