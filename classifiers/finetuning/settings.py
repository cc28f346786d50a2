"""The settings of fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from classifiers.reports.settings import ThumbnailSettings
from extractor.backbones.settings import NetworkSettings
from extractor.data.settings import LimitSettings, SourceSettings
from extractor.pipeline.settings import Options, SplitSettings
from extractor.pixels.settings import AugmentSettings
from extractor.runtime.settings import MAX_BATCH, DeviceSettings
from extractor.settings import FilePath, Settings, rule, seed_setting, setting
from store.errors import InputMissingError

HEAD_FACTOR = 10.0  # of the learning rate, for a head that starts at zero


class FineTuneOptions(AugmentSettings, DeviceSettings):
    """How to fine-tune: the options of `finetune.train_network`."""

    section: ClassVar[str] = "finetune"
    heading: ClassVar[str] = "Training (docs/finetune.md)"

    epochs: int = setting(5, "At most this many epochs.", ge=1, metavar="N")
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
        None,
        "Learning rate of the head, as a multiple of that of the other layers.",
        gt=0,
        le=1e6,
        metavar="X",
        shown="10; 1 for a trained head",
    )
    schedule: Literal["constant", "cosine", "step", "plateau"] = setting("cosine", "How the learning rates fall.")
    warmup: float = setting(0.0, "First let the rates rise for this many epochs.", ge=0, metavar="EPOCHS")
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "The optimiser; sgd uses Nesterov's momentum.")
    momentum: float = setting(0.9, "Momentum of sgd.", ge=0, lt=1, metavar="X")
    weight_decay: float = setting(1e-4, "Weight decay of the optimiser.", ge=0, le=1e6, metavar="X")
    dropout: float = setting(0.0, "Dropout on the features, before the head.", ge=0, lt=1, metavar="P")
    label_smoothing: float = setting(0.0, "Label smoothing in the training loss.", ge=0, lt=1, metavar="X")
    class_weight: Literal["balanced"] | None = setting(None, "Weigh images as if all classes had the same number.")
    ema: float | None = setting(
        None, "Validate and keep an average of the weights, with this decay per batch.", gt=0, lt=1, metavar="DECAY"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "bf16 and fp16: mixed precision of torch; fp16 needs a GPU.")
    freeze_until: str | None = setting(
        None, "Freeze what runs before this layer (`penult backbones NAME --layers`); head: everything.", metavar="LAYER"
    )
    batch_statistics: bool = setting(False, "Update the statistics of batch normalisation in layers that are not frozen.")
    patience: int = setting(3, "Epochs without improvement before it stops.", ge=1, metavar="N")
    min_delta: float = setting(0.0, "What counts as an improvement of the validation loss.", ge=0, only="python")
    refit: bool = setting(True, "Then train again, on the images that chose the number of epochs too, for as many epochs.")
    seed: int = seed_setting("Seed of the training, and of the split of DATA without one.")
    quiet: bool = setting(False, "No progress bar, and no progress lines.", only="python")

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
        None, "Folder for metrics.csv, and for TensorBoard's events if it is installed.", metavar="FOLDER"
    )

    @rule
    def _the_head_is_there(self) -> None:
        if self.init_head and not self.init_head.exists():
            message = f"<init_head> {self.init_head}: there is no such bundle"
            raise InputMissingError(message)


class FineTuneSettings(
    NetworkSettings, SourceSettings, LimitSettings, FineTuneOptions, StartSettings, SplitSettings, ThumbnailSettings
):
    """The settings of `penult finetune`.

    >>> from classifiers import FineTuneSettings
    >>> FineTuneSettings(backbone="resnet18", epochs=3, freeze_until="layer4").lr
    0.0001
    """

    @rule
    def _a_network_that_can_be_trained(self) -> None:
        if self.network().is_file:
            message = f"<backbone> {self.backbone} is an ONNX file and cannot be trained: name a torchvision network"
            raise ValueError(message)

    @property
    def survey(self) -> Options:
        """How a dataset that is not a cache is read and split."""
        return Options(**self.part(SplitSettings).explicit(), limit=self.limit)
