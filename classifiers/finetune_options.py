"""How to fine-tune."""

from __future__ import annotations

import math
from dataclasses import dataclass

from extractor.augment import STANDARD, Augmentation
from store.errors import UsageError

SCHEDULES = ("constant", "cosine", "step", "plateau")
HEAD_FACTOR = 10.0  # of the learning rate, for a head that begins at zero


@dataclass(frozen=True)
class FineTuneOptions:
    """How to fine-tune; the defaults are the command line's.

    Attributes:
        lr: learning rate of the transferred layers, before ``schedule``.
        head_lr_factor: the head's learning rate over ``lr``. None: 10 for a head that begins at zero and has far to go, 1 for
            one that was trained before.
        schedule: ``cosine`` (half a cosine to zero), ``step`` (to a tenth after one and after two thirds of the epochs),
            ``plateau`` (to a tenth after half of ``patience`` without improvement) or ``constant``.
        warmup: epochs, not necessarily whole, in which the rates rise from near zero before that.
        optimizer: ``sgd`` (with Nesterov's ``momentum``) or ``adamw``.
        dropout: of the features that the head sees.
        label_smoothing: in the training loss only.
        class_weight: ``balanced`` lets images count in the losses as if every class had as many. None: each counts the same.
        ema: decay per batch of an average of the weights, which is then what is validated and kept. None: no average.
        mixed_precision: ``bf16``, or on a GPU ``fp16``, for what torch computes in it safely. None: float32 throughout.
        freeze_until: name of a layer as in ``network.named_modules()``, such as ``layer3`` or ``features.14``: everything
            that runs before it is frozen, parameters and batch-norm statistics. ``head``: only the new head is trained.
            None: everything is.
        batch_statistics: let batch normalisation follow the new images where it is not frozen; False keeps the statistics
            it came with, which a few hundred images in small batches only make worse.
        patience, min_delta: stop after so many epochs in which the validation loss did not fall by more than min_delta.
        augment: how the training images are changed at random, anew in every epoch; `extractor.augment.NONE` for not at all.
        workers: threads that prepare batches; 0 for none but the training one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; several with commas share every batch.
        quiet: no progress line.
    """

    epochs: int = 5
    batch_size: int = 16
    lr: float = 1e-4
    head_lr_factor: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    dropout: float = 0.0
    label_smoothing: float = 0.0
    class_weight: str | None = None
    ema: float | None = None
    mixed_precision: str | None = None
    freeze_until: str | None = None
    batch_statistics: bool = False
    patience: int = 3
    min_delta: float = 0.0
    augment: Augmentation = STANDARD
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    quiet: bool = False

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: names the option.
        """
        allowed = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2: batch normalisation has no statistics of one image"),
            "lr": (0 < self.lr < math.inf, "a positive number"),
            "head_lr_factor": (self.head_lr_factor is None or 0 < self.head_lr_factor < math.inf, "a positive number"),
            "schedule": (self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            "warmup": (0 <= self.warmup < self.epochs, f"0 or more, less than the {self.epochs} epochs"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "momentum": (0 <= self.momentum < 1, "0 or more, less than 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "dropout": (0 <= self.dropout < 1, "0 or more, less than 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 or more, less than 1"),
            "class_weight": (self.class_weight in (None, "balanced"), "balanced, or none"),
            "ema": (self.ema is None or 0 < self.ema < 1, "more than 0, less than 1"),
            "mixed_precision": (self.mixed_precision in (None, "bf16", "fp16"), "bf16, fp16, or none"),
            "patience": (self.patience >= 1, "at least 1"),
            "min_delta": (0 <= self.min_delta < math.inf, "0 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "workers": (self.workers >= 0, "0 or more"),
        }
        for name, (fits, expected) in allowed.items():
            if not fits:
                message = f"{name} is {getattr(self, name)!r}; expected {expected}"
                raise UsageError(message)
