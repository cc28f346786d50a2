"""The training loop of fine-tuning, on one device or as one of several processes that share every batch."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from extractor.backbones.networks import Loaded
from extractor.backbones.registry import Backbone
from extractor.pixels.decoder import Decoder
from extractor.progress import Progress, StopFlag
from extractor.runtime.cuda import number_of

from .checkpoints import Checkpoints, checkpoint_io
from .history import history_writer
from .loader import Batches, Item

if TYPE_CHECKING:
    from .init_head import AffineHead
    from .settings import FineTuneOptions

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # Lightning's names


@dataclass(frozen=True)
class Plan:
    """The checked and resolved arguments of a fine-tuning.

    Attributes:
        devices: of torch; each takes its share of every batch.
        others: as the arguments of `train_network`.
    """

    train: Sequence[Item]
    validation: Sequence[Item]
    n_classes: int
    backbone: Backbone
    options: FineTuneOptions
    devices: Sequence[str]
    start: AffineHead | None
    checkpoints: Checkpoints
    log_dir: Path | None

    @property
    def counts(self) -> NDArray[np.intp]:
        """Training images of each class."""
        return np.bincount([label for _, label in self.train], minlength=self.n_classes)


@contextmanager
def isolated(devices: Sequence[str], seed: int) -> Iterator[None]:
    """Seed torch and contain the flags, logs and warnings of Lightning; afterwards everything is as before."""
    import torch

    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        import lightning.pytorch  # noqa: F401 - it sets levels and filters when it is first imported

        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # Lightning 2.6, torch 2.15
        warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")  # the frozen modules
        warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
        loggers = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
        strict, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
        gpus = [number_of(device) for device in devices if device != "cpu"]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            with torch.random.fork_rng(devices=gpus):
                for generator in (torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)):
                    generator.manual_seed(seed)
                yield
        finally:
            torch.set_deterministic_debug_mode(strict)
            torch.backends.cudnn.benchmark = benchmark
            for logger, level in loggers.items():
                logger.setLevel(level)


def run_epochs(plan: Plan, loaded: Loaded, model: Any, facts: dict[str, Any], stop: StopFlag, rank: int = 0) -> None:
    """Train a module of `end_to_end` from the plan's last checkpoint, or from the start, to the end.

    Args:
        facts: what `Checkpoints.resume` compares.
        stop: ends the training at the next batch.
        rank: index of this process's device in the plan.
    """
    options, state = plan.options, plan.checkpoints.read()
    epochs, validated = options.epochs, len(plan.validation)
    share = rank, len(plan.devices)
    with (
        Progress(epochs * (len(plan.train) + validated) + validated, "fine-tune", quiet=options.quiet or rank > 0) as progress,
        Decoder(loaded.preprocess, crop=False, stop=stop) as decoder,
    ):
        progress.advance(state["training"]["images"] if state else 0)
        batches = [
            Batches(items, decoder, options, train=items is plan.train, share=share) for items in (plan.train, plan.validation)
        ]
        batches[0].skip(state["training"]["history"][-1]["epoch"] if state else 0)
        model.watch(progress, stop)
        keeper = plan.checkpoints.keeper(facts, earlier=state["run"]["seconds"] if state else 0.0)
        path = plan.checkpoints.file if state else None
        _trainer(plan, keeper, rank, resumed=state is not None).fit(model, *batches, ckpt_path=path, weights_only=True)


def _trainer(plan: Plan, keeper: Any, rank: int, *, resumed: bool) -> Any:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    options, device = plan.options, plan.devices[rank]
    callbacks = [EarlyStopping("val_loss", min_delta=options.min_delta, patience=options.patience), keeper]
    if options.ema is not None:
        # Its average of equal numbers is exactly that number, so frozen weights do not change. Statistics are averages already.
        average: Any = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
        callbacks.append(WeightAveraging(device=device, use_buffers=False, multi_avg_fn=average))
    if plan.log_dir is not None and rank == 0:
        callbacks.append(history_writer(plan.log_dir))
    return Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=len(plan.devices) if device == "cpu" else [number_of(each) for each in plan.devices],
        strategy="ddp" if len(plan.devices) > 1 else "auto",
        precision=PRECISIONS[options.precision],
        max_epochs=options.epochs,
        callbacks=callbacks,
        deterministic="warn",  # not every operation has a deterministic CUDA kernel
        plugins=[LightningEnvironment(), checkpoint_io()],  # within SLURM, Lightning would take the job's tasks for its own
        num_sanity_val_steps=0 if resumed else -1,  # -1: validate on everything before training, as epoch 0
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
