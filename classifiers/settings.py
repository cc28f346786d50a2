"""The settings of training, fine-tuning and judging; see `extractor.settings.declaration` for what a setting is."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, create_model

from extractor.settings.declaration import ARGUMENTS, PLACE, Settings, rule, setting
from extractor.settings.groups import (
    FRACTION,
    MAX_BATCH,
    AugmentSettings,
    BudgetSettings,
    DataSettings,
    DeviceSettings,
    FilePath,
    LimitSettings,
    NetworkSettings,
    OnnxInputSettings,
    Options,
    PixelSettings,
    PoolingSettings,
    SourceSettings,
    SplitSettings,
    as_tuple,
    backbone_of,
    seed_setting,
)
from store.errors import InputMissingError

from .gates import GATES, Gate, require_gates, wanted_gates
from .heads import head_names, make_head, row_of, rows

if TYPE_CHECKING:
    from extractor.backbones import Backbone

MAX_SHOTS = 10**6  # images of a class
HEAD_FACTOR = 10.0  # of the learning rate, for a head that begins at zero


def _head(value: str) -> str:
    """One of ours; in Python also a scikit-learn class by its dotted name."""
    if value not in head_names() and not ("." in value and PLACE.get() is ARGUMENTS):
        message = ", ".join(head_names())
        raise ValueError(message)
    return value


class ThumbnailSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Report"

    thumbnails: bool = setting(True, "Images in the report, or none.", shown="with")


class TrainOptions(ThumbnailSettings):
    """How a head is trained and judged: what `train.train_head` takes beside the head."""

    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Training"

    leaks: Literal["warn", "refuse", "allow"] = setting("warn", "Images on both sides of the split, or under two labels.")
    few_shot: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_SHOTS)], ...], BeforeValidator(as_tuple)] = setting(
        (), "Learning curve: the head fitted on so many training images of each class.", metavar="N,N"
    )
    repeats: int = setting(20, "Of the learning curve: draws for each number of images.", ge=2, metavar="N")
    average_views: bool = setting(False, "Predict the mean over the views of an image, which are fitted anyway.")
    max_memory: ByteSize | None = setting(
        None, "Of this process; features that do not fit stay on disk.", ge=1, metavar="SIZE", shown="half of what is free"
    )
    val_fraction: float | None = setting(
        None, "Share for validation, in another split.", ge=0, lt=1, metavar="SHARE", shown="the cache's split"
    )
    test_fraction: float | None = setting(
        None, "Share held out, in another split.", ge=0, lt=1, metavar="SHARE", shown="the cache's split"
    )
    seed: int = seed_setting("Of the training, and of a split of its own.")

    @rule
    def _something_is_left(self) -> None:
        given = (self.val_fraction, self.test_fraction)
        val, test = (FRACTION if each is None else each for each in given)
        if given != (None, None) and val + test >= 1:
            message = f"<val_fraction> {val} and <test_fraction> {test} leave nothing to train on"
            raise ValueError(message)

    @property
    def own_split(self) -> dict[str, Any]:
        """Of another split than the stored one, as a digest of a bundle's origin has it."""
        own = (self.val_fraction, self.test_fraction) != (None, None)
        return {"val": self.val_fraction, "test": self.test_fraction, "split_seed": self.seed if own else 0}


class HeadSettings(Settings):
    section: ClassVar[str] = "train"
    heading: ClassVar[str] = "Head"

    head: Annotated[str, AfterValidator(_head)] | None = setting(
        None, "Kind of head (docs/heads.md).", shown="logistic; ridge for regression", choices=head_names
    )


class TrainSettings(HeadSettings, TrainOptions):
    """What `penult train` takes, and a job in its section ``[train]``; `train_settings` has the settings of the heads, too."""

    layer: str | None = setting(None, "Which feature set, where the cache has several.", metavar="NAME", shown="the first")

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
            UsageError: there is none of this name for the task, or it lacks a setting that was given.
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
    """`TrainSettings` with the settings of every head there is."""
    groups = tuple(dict.fromkeys(row.settings for row in rows() if row.settings is not Settings))
    specific = [each for each in groups if not any(each is not other and issubclass(other, each) for other in groups)]
    return cast("type[TrainSettings]", create_model("TrainSettings", __base__=(TrainSettings, *specific)))


class FineTuneOptions(AugmentSettings, DeviceSettings):
    """How to fine-tune: what `finetune.finetune` takes."""

    section: ClassVar[str] = "finetune"
    heading: ClassVar[str] = "Training (docs/finetune.md)"

    epochs: int = setting(5, "At most so many.", ge=1, metavar="N")
    batch_size: Annotated[int, BeforeValidator(lambda value: 16 if value == "auto" else value)] = setting(
        16,
        "Images per step; batch normalisation has no statistics of one.",
        short="-b",
        ge=2,
        le=MAX_BATCH,
        metavar="N|auto",
        also=", or auto",
    )
    lr: float = setting(1e-4, "Learning rate of the transferred layers.", gt=0, le=1e30, metavar="RATE")
    head_lr_factor: float | None = setting(
        None, "The head learns so many times faster.", gt=0, le=1e6, metavar="X", shown="10; 1 for a trained head"
    )
    schedule: Literal["constant", "cosine", "step", "plateau"] = setting("cosine", "How the learning rates fall.")
    warmup: float = setting(0.0, "First let them rise for so many epochs.", ge=0, metavar="EPOCHS")
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "Which optimiser; sgd is with Nesterov's momentum.")
    momentum: float = setting(0.9, "Of sgd.", ge=0, lt=1, metavar="X")
    weight_decay: float = setting(1e-4, "Of the optimiser.", ge=0, le=1e6, metavar="X")
    dropout: float = setting(0.0, "Of the features that the head sees.", ge=0, lt=1, metavar="P")
    label_smoothing: float = setting(0.0, "In the training loss.", ge=0, lt=1, metavar="X")
    class_weight: Literal["balanced"] | None = setting(None, "As if every class had as many images.")
    ema: float | None = setting(
        None, "Validate and keep an average of the weights, with this decay per batch.", gt=0, lt=1, metavar="DECAY"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "Compute in it what torch finds safe; fp16 on a GPU.")
    freeze_until: str | None = setting(
        None, "Freeze what runs before this layer (`penult backbones NAME --layers`); head: everything.", metavar="LAYER"
    )
    batch_statistics: bool = setting(False, "Let batch normalisation follow the new images where not frozen.")
    patience: int = setting(3, "Epochs without improvement before it stops.", ge=1, metavar="N")
    min_delta: float = setting(0.0, "What counts as an improvement of the validation loss.", ge=0, only="python")
    seed: int = seed_setting("Of the training, and of the split of DATA without one.")
    quiet: bool = setting(False, "No progress line.", only="python")

    @rule
    def _training_begins(self) -> None:
        if self.warmup >= self.epochs:
            message = f"<warmup> is {self.warmup}; expected less than the {self.epochs} epochs of <epochs>"
            raise ValueError(message)

    @rule
    def _precision_fits_the_device(self) -> None:
        if self.precision == "fp16" and "cpu" in self.device.split(","):
            message = "<precision> fp16 needs a GPU; bf16 works on a CPU too"
            raise ValueError(message)


class StartSettings(Settings):
    section: ClassVar[str] = "finetune"
    heading: ClassVar[str] = "Training (docs/finetune.md)"

    init_head: FilePath = setting(None, "Start from this head, trained on cached features of the same split.", metavar="BUNDLE")
    log_dir: FilePath = setting(
        None, "Folder for metrics.csv, and TensorBoard's events where it is installed.", metavar="FOLDER"
    )

    @rule
    def _the_head_is_there(self) -> None:
        if self.init_head and not self.init_head.exists():
            message = f"<init_head> {self.init_head}: there is no such bundle"
            raise InputMissingError(message)


class FineTuneSettings(
    NetworkSettings, SourceSettings, LimitSettings, FineTuneOptions, StartSettings, SplitSettings, ThumbnailSettings
):
    """What `penult finetune` takes."""

    @rule
    def _a_network_that_can_be_trained(self) -> None:
        if self.network().is_file:
            message = f"<backbone> {self.backbone} is an ONNX file and cannot be trained: name a torchvision network"
            raise ValueError(message)

    @property
    def survey(self) -> Options:
        """How a dataset that is no cache is read and split."""
        return Options(**self.part(SplitSettings).given(), limit=self.limit)


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


class HeldOutSettings(Settings):
    section: ClassVar[str] = "gate"
    heading: ClassVar[str] = "Images"

    split: Literal["train", "val", "test"] | None = setting(None, "Which part.", shown="what was held out in training")


class _Gates(Settings):
    section: ClassVar[str] = "gate"
    heading: ClassVar[str] = "Gates: exit code 65 where one is not met"


_GATE_FIELDS: Any = {
    gate.name: (float | None, setting(None, gate.help, ge=gate.least, le=gate.most, metavar="X")) for gate in GATES
}


class GateSettings(HeldOutSettings, create_model("GateSettings", __base__=_Gates, **_GATE_FIELDS)):  # type: ignore[misc]
    """What a result must reach: a job's section ``[gate]``."""

    def wanted(self, task: str) -> dict[Gate, float]:
        """The gates that are asked for.

        Raises:
            UsageError: one is on a figure that a task does not have.
        """
        gates, place = wanted_gates({gate.name: getattr(self, gate.name) for gate in GATES}), PLACE.get()
        require_gates(gates, task, lambda gate: place.spell(type(self), gate.name))
        return gates


class PredictSettings(DeviceSettings):
    """What `penult predict` takes."""

    heading: ClassVar[str] = "Where and how fast"

    accept_pixels: bool = setting(
        False, "Go on where this machine decodes images otherwise than the training did, and say how much that changes."
    )

    def runtime(self) -> dict[str, Any]:
        """As a `Predictor` takes it."""
        return {name: getattr(self, name) for name in PredictSettings.model_fields}


class _Moved(Settings):
    heading: ClassVar[str] = "Images"

    root: FilePath = setting(None, "Where the images are, if they moved.", metavar="FOLDER")


class EvaluateSettings(GateSettings, _Moved, PredictSettings):
    """What `penult evaluate` takes."""


class ReportSettings(HeldOutSettings, _Moved, ThumbnailSettings, PredictSettings):
    """What `penult report` takes."""
