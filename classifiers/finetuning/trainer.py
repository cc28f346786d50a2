"""The training loop of fine-tuning, on one device or as one of several processes that share every batch."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from extractor.backbones.networks import Loaded
from extractor.backbones.registry import Backbone
from extractor.machine import nvidia_driver_present
from extractor.pixels.decoder import Decoder
from extractor.runtime.cuda import number_of
from extractor.runtime.devices import parse_devices
from extractor.signals import StopFlag
from store.errors import DeviceUnavailableError, UsageError
from store.progress.stages import Stage

from .checkpoints import Checkpoints, checkpoint_io
from .history import history_writer
from .loader import Batches, Item

if TYPE_CHECKING:
    from .init_head import AffineHead
    from .settings import FineTuneOptions

log = logging.getLogger("penult.classifiers")

Advance = Callable[[int], None]  # how many more images have passed
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # Lightning's names


@dataclass(frozen=True)
class Choice:
    """What a training showed on images that it did not fit.

    Attributes:
        history: as in `FineTuned`.
        best_epoch: the one with the lowest validation loss.
        temperature: the one with the least log-loss on the logits of that epoch.
        images: passed through the network.
        seconds: wall time until now.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    temperature: float
    images: int
    seconds: float

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """The choice of a training that has ended, from its last checkpoint; of a refit, the one it began with."""
        training = state["training"]
        if training["choice"]:
            return cls(**training["choice"])
        facts = (training["history"], training["best"]["epoch"], training["temperature"], training["images"])
        return cls(*facts, state["run"]["seconds"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The checked and resolved arguments of a fine-tuning.

    Attributes:
        devices: of torch; each takes its share of every batch.
        choice: for a refit, what is not chosen again; None for the training that chooses.
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
    choice: Choice | None = None

    def refit(self, choice: Choice) -> Plan:
        """The same training on the validation images too, until the epoch that they have chosen."""
        return replace(self, train=[*self.train, *self.validation], validation=[], choice=choice)

    @property
    def epochs(self) -> int:
        """How many epochs are trained at most. A schedule of the rates is always that of all epochs."""
        return self.choice.best_epoch if self.choice else self.options.epochs

    def state(self) -> dict[str, Any] | None:
        """The last checkpoint of this training; None if it has none yet."""
        state = self.checkpoints.read()
        return state if state and bool(state["training"]["choice"]) == bool(self.choice) else None

    def stage(self, measure: Callable[[], int] | None = None) -> Stage:
        """The training as a stage; its steps are images, of all epochs."""
        state, validated = self.state(), len(self.validation)
        done = int(state["training"]["images"]) if state else 0
        total = self.epochs * (len(self.train) + validated) + validated
        name = "refitting" if self.choice else "fine-tuning"
        return Stage(name, total, "images", done=done, quiet=self.options.quiet, measure=measure)

    @property
    def counts(self) -> NDArray[np.intp]:
        """Training images of each class."""
        return np.bincount([label for _, label in self.train], minlength=self.n_classes)


def devices_of(options: FineTuneOptions) -> list[str]:
    """The devices to train on.

    Raises:
        DeviceUnavailableError: torch cannot use one of them.
        UsageError: the precision needs a GPU, and there is none.
    """
    devices = [_device(device) for device in parse_devices(options.device)]
    if devices[0] == "cpu" and options.precision == "fp16":
        message = "--precision fp16 needs a GPU; bf16 works on a CPU too"
        raise UsageError(message)
    return devices


def _device(device: str) -> str:
    """Resolve ``auto``: ``cuda`` if torch can use a GPU, else ``cpu``, and the log says why; other names stay.

    Raises:
        DeviceUnavailableError: torch cannot use it; says why.
    """
    if device not in ("auto", "cpu") and not nvidia_driver_present():
        message = f"--device {device}: this machine has no NVIDIA driver. Install it, or pass --device cpu"
        raise DeviceUnavailableError(message)
    import torch

    cuda: Any = torch.cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a driver that is too old: the log has it below
        count = cuda.device_count() if cuda.is_available() else 0
    if device == "cpu" or number_of(device) < count:
        return "cuda" if device == "auto" else device
    why = f"it finds {count} such devices"
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines()[0]
    if device == "auto":
        level = logging.WARNING if nvidia_driver_present() else logging.INFO
        log.log(level, "torch has no GPU here: training on the CPU. %s", why)
        return "cpu"
    message = f"--device {device}: torch {torch.__version__} does not compute there: {why}. Try --device cpu"
    raise DeviceUnavailableError(message)


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


def run_epochs(
    plan: Plan, loaded: Loaded, model: Any, facts: dict[str, Any], stop: StopFlag, advance: Advance, rank: int = 0
) -> None:
    """Train a module of `end_to_end` from the plan's last checkpoint, or from the start, to the end.

    Args:
        facts: what `Checkpoints.resume` compares.
        stop: ends the training at the next batch.
        advance: is told of all images that have passed through the network, on all devices.
        rank: index of this process's device in the plan.
    """
    options, state = plan.options, plan.state()
    earlier, share = plan.choice.seconds if plan.choice else 0.0, (rank, len(plan.devices))
    with Decoder(loaded.preprocess, crop=False, stop=stop) as decoder:
        batches = [
            Batches(items, decoder, options, train=items is plan.train, share=share) for items in (plan.train, plan.validation)
        ]
        batches[0].skip(state["training"]["history"][-1]["epoch"] if state else 0)
        model.watch(advance, stop)
        keeper = plan.checkpoints.keeper(facts, earlier=state["run"]["seconds"] if state else earlier)
        path = plan.checkpoints.file if state else None
        _trainer(plan, keeper, rank, resumed=state is not None).fit(model, *batches, ckpt_path=path, weights_only=True)


def _trainer(plan: Plan, keeper: Any, rank: int, *, resumed: bool) -> Any:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    options, device = plan.options, plan.devices[rank]
    callbacks: list[Any] = [keeper]
    if plan.choice is None:
        callbacks.insert(0, EarlyStopping("val_loss", min_delta=options.min_delta, patience=options.patience))
    if options.ema is not None:
        # Its average of equal numbers is exactly that number, so frozen weights do not change. Statistics are averages already.
        average: Any = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
        callbacks.append(WeightAveraging(device=device, use_buffers=False, multi_avg_fn=average))
    if plan.log_dir is not None and plan.choice is None and rank == 0:
        callbacks.append(history_writer(plan.log_dir))
    return Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=len(plan.devices) if device == "cpu" else [number_of(each) for each in plan.devices],
        strategy="ddp" if len(plan.devices) > 1 else "auto",
        precision=PRECISIONS[options.precision],
        max_epochs=plan.epochs,
        callbacks=callbacks,
        deterministic="warn",  # not every operation has a deterministic CUDA kernel
        plugins=[LightningEnvironment(), checkpoint_io()],  # within SLURM, Lightning would take the job's tasks for its own
        num_sanity_val_steps=0 if resumed or plan.choice else -1,  # -1: validate on everything before training, as epoch 0
        limit_val_batches=0 if plan.choice else 1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
