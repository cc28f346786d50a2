"""The end-to-end mode: backbone and head are trained together in torch, to compare with frozen features.

The last layer is not replaced. The head reads the same tensor that `extractor.export` cuts at, the input of the last
classification layer, so a fine-tuned network is exported, cached and fused like any other backbone.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from extractor import backbones
from extractor.augment import STANDARD, Augmentation
from extractor.backbones import Backbone, Loaded
from extractor.decoder import Decoder
from extractor.layers import last_weighted
from extractor.progress import Progress, StopFlag, stop_on_signal
from extractor.session import resolve_device
from store.errors import BadDataError, DeviceUnavailableError, InterruptedRunError, UsageError

from .batches import Batches, Item

log = logging.getLogger("penult.classifiers")


@dataclass(frozen=True)
class FineTuneOptions:
    """How to fine-tune; the defaults are the command line's.

    Attributes:
        lr: initial learning rate of the transferred layers; it falls to zero along half a cosine over ``epochs``.
        head_lr_factor: the head's learning rate over ``lr``; it begins at zero and has far to go.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adamw``.
        label_smoothing: in the training loss only.
        freeze_until: name of a layer as in ``network.named_modules()``, such as ``layer3`` or ``features.14``: everything
            that runs before it is frozen, parameters and batch-norm statistics. ``head``: only the new head is trained.
            None: everything is.
        batch_statistics: let batch normalisation follow the new images where it is not frozen; False keeps the statistics
            it came with, which a few hundred images in small batches only make worse.
        patience, min_delta: stop after so many epochs in which the validation loss did not fall by more than min_delta.
        augment: how the training images are changed at random, anew in every epoch; `extractor.augment.NONE` for not at all.
        workers: threads that prepare batches; 0 for none but the training one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        quiet: no progress line.
    """

    epochs: int = 5
    batch_size: int = 16
    lr: float = 1e-4
    head_lr_factor: float = 100.0
    optimizer: str = "sgd"
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
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
            "head_lr_factor": (0 < self.head_lr_factor < math.inf, "a positive number"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 or more, less than 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "min_delta": (0 <= self.min_delta < math.inf, "0 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "workers": (self.workers >= 0, "0 or more"),
        }
        for name, (fits, expected) in allowed.items():
            if not fits:
                message = f"{name} is {getattr(self, name)!r}; expected {expected}"
                raise UsageError(message)


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network and its head, as of the epoch with the lowest validation loss.

    Attributes:
        loaded: on the CPU, in eval mode, shaped as torchvision's (its own classifier is still there, and untrained).
        weight, bias: the head on penultimate features, ``(k, d)`` and ``(k,)`` float32; logits = features @ weight.T + bias.
        history: per epoch: epoch (from 1), train_loss (of augmented images, with label smoothing), val_loss,
            val_accuracy, lr (of the transferred layers), seconds.
        seconds: wall time, loading and decoding included.
        images: images passed through the network, training and validation.
        trained_parameters: how many numbers were trained, the head's included.
    """

    loaded: Loaded
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    history: list[dict[str, Any]]
    best_epoch: int
    seconds: float
    images: int
    trained_parameters: int


def finetune(
    train: Sequence[Item], validation: Sequence[Item], n_classes: int, backbone: Backbone, options: FineTuneOptions
) -> FineTuned:
    """Train backbone and head end to end on images, with early stopping on the validation loss.

    Args:
        train, validation: paths and labels, 0 to n_classes - 1.

    Raises:
        UsageError: options that do not fit the network; an unknown ``freeze_until`` is answered with the nearest names.
        BadDataError: labels that do not fit, an image that cannot be decoded, a loss that is not finite.
        InputMissingError: an image or the weights cannot be read.
        DeviceUnavailableError: torch does not have the device.
        InterruptedRunError: SIGINT or SIGTERM; nothing is kept, the same command starts over.
    """
    options.check()
    _check_items(train, validation, n_classes)
    if backbone.is_file:
        message = f"{backbone.name} is an ONNX file and cannot be trained: name a torchvision network and --weights FILE.pth"
        raise UsageError(message)
    device = _device(options.device)
    begin = time.perf_counter()
    with stop_on_signal("nothing of an unfinished fine-tuning is kept") as stop:
        try:
            with _isolated(device, options.seed):
                tuned = _fit(train, validation, n_classes, backbone, options, device, stop)
        except BaseException as error:
            # Lightning makes exceptions of its own of a signal, one of them a SystemExit.
            if stop:
                raise InterruptedRunError(stop.signum, "to start over") from None
            if "out of memory" in str(error) and device != "cpu":
                message = (
                    f"--device {device}: out of memory with {options.batch_size} images at a time; use a smaller batch_size"
                )
                raise DeviceUnavailableError(message) from error
            raise
        if stop:
            raise InterruptedRunError(stop.signum, "to start over")
    return replace(tuned, seconds=round(time.perf_counter() - begin, 3))


def _check_items(train: Sequence[Item], validation: Sequence[Item], n_classes: int) -> None:
    empty = sorted(set(range(n_classes)) - {label for _, label in train})
    wrong = [f"{path} has label {label}" for path, label in (*train, *validation) if not 0 <= label < n_classes]
    message = None
    if n_classes < 2:
        message = f"{n_classes} classes: a classifier needs at least 2"
    elif wrong:
        message = f"{wrong[0]}; expected 0 to {n_classes - 1}"
    elif empty:
        message = f"no training image of class {', '.join(map(str, empty))}"
    elif not validation:
        message = "no validation images: the best epoch is chosen by them"
    if message:
        raise BadDataError(message)


def _device(wanted: str) -> str:
    import torch

    device = resolve_device(wanted).replace("tensorrt", "cuda")  # torch trains on the card itself
    if device == "cpu" or (torch.cuda.is_available() and int(device.partition(":")[2] or 0) < torch.cuda.device_count()):
        return device
    if wanted == "auto":
        log.info("torch has no GPU here: training on the CPU")
        return "cpu"
    message = f"--device {wanted}: torch {torch.__version__} finds {torch.cuda.device_count()} such devices; try --device cpu"
    raise DeviceUnavailableError(message)


@contextmanager
def _isolated(device: str, seed: int) -> Iterator[None]:
    """Seed torch and let Lightning set its flags, speak and warn; afterwards everything is as it was."""
    import torch

    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        import lightning.pytorch  # noqa: F401 - it sets levels and filters when it is first imported

        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # Lightning 2.6, torch 2.15
        warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")  # they are the frozen ones
        warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
        loggers = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
        strict, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
        gpus = [int(device.partition(":")[2] or 0)] if device != "cpu" else []
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


def modules_before(network: Any, example: Any, freeze_until: str, last: str) -> list[Any]:
    """The modules of a network that begin to run before a layer; what each holds directly is what is frozen.

    So a module around that layer counts, for its own parameters (the class token of a ViT), and its children count by
    themselves. A module that is never called (the projection of an attention) goes with the one around it.

    Args:
        freeze_until: name of the layer.
        last: name of the last classification layer, for which ``head`` stands.

    Raises:
        UsageError: no such layer, or it does not run.
    """
    import torch

    modules = dict(network.named_modules())
    began: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: began.append(name)) for n, m in modules.items()]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    until = last if freeze_until == "head" else freeze_until
    if not until or until not in began:
        near = difflib.get_close_matches(until, [name for name in began if name], n=5)
        stages = ", ".join(near or [name for name, _ in network.named_children() if name in began])
        what = "does not run in this network" if until in modules else "is no layer of this network"
        message = f"freeze_until {freeze_until!r} {what}. {'Did you mean' if near else 'It has'} {stages}, or head?"
        raise UsageError(message)
    called, before = set(began), set(began[: began.index(until)])

    def caller(name: str) -> str:
        while name not in called:
            name = name.rpartition(".")[0]
        return name

    return [module for name, module in modules.items() if caller(name) in before]


def parameter_groups(features: Any, network: Any, head: Any, options: FineTuneOptions) -> list[dict[str, Any]]:
    """What the optimiser trains: the transferred parameters that ``features`` depend on, and the head, faster.

    All others get ``requires_grad`` False, the network's own classification layer among them.
    """
    import torch

    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if features.requires_grad:
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        used = [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    else:
        used = []
    network.requires_grad_(requires_grad=False)
    for parameter in used:
        parameter.requires_grad_()
    return [
        {"params": used, "lr": options.lr},
        {"params": list(head.parameters()), "lr": options.lr * options.head_lr_factor},
    ]


def _end_to_end(loaded: Loaded, n_classes: int, options: FineTuneOptions, progress: Progress, stop: StopFlag) -> Any:
    """A LightningModule: the network, with a head on the input of its last classification layer."""
    import torch
    from lightning.pytorch import LightningModule

    network, side = loaded.network, loaded.preprocess.crop
    example = torch.zeros(1, 3, side, side)
    last = last_weighted(network, example)
    frozen = modules_before(network, example, options.freeze_until, last) if options.freeze_until else []
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(requires_grad=False)

    class EndToEnd(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.hook = network.get_submodule(last).register_forward_pre_hook(self.catch)
            features = self.features(example)
            self.head = torch.nn.Linear(features.shape[1], n_classes)
            # From zero, the first steps move the head and spare the network.
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)
            self.groups = parameter_groups(features, network, self.head, options)
            self.history: list[dict[str, Any]] = []
            self.best: dict[str, Any] = {"epoch": 0, "val_loss": math.inf}
            self.best_state: dict[str, Any] = {}
            self.images, self.began = 0, 0.0
            self.sums: Counter[str] = Counter()

        def catch(self, _module: Any, inputs: tuple[Any, ...]) -> None:
            self.caught = inputs[0]

        def features(self, pixels: Any) -> Any:
            self.network(pixels)
            caught, self.caught = self.caught, None
            return caught.mean(dim=(2, 3)) if caught.ndim == 4 else caught

        def configure_optimizers(self) -> Any:
            if options.optimizer == "sgd":
                optimizer: Any = torch.optim.SGD(self.groups, momentum=0.9, nesterov=True, weight_decay=options.weight_decay)
            else:
                optimizer = torch.optim.AdamW(self.groups, weight_decay=options.weight_decay)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)]

        def on_train_epoch_start(self) -> None:
            self.began, self.sums = time.perf_counter(), Counter()
            self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]  # the scheduler steps before the validation

        def training_step(self, batch: tuple[Any, Any], _index: int) -> Any:
            return self.step("train", batch, options.label_smoothing)

        def validation_step(self, batch: tuple[Any, Any], _index: int) -> None:
            self.step("val", batch, 0.0)

        def step(self, part: str, batch: tuple[Any, Any], smoothing: float) -> Any:
            if stop:
                raise InterruptedRunError(stop.signum, "to start over")
            pixels, labels = batch
            logits = self.head(self.features(pixels))
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            value, n = float(loss.detach()), len(labels)
            if not math.isfinite(value):
                message = f"the loss became {value} in epoch {self.current_epoch + 1}: use a lower rate than lr {options.lr:g}"
                raise BadDataError(message)
            right = int((logits.argmax(dim=1) == labels).sum())
            self.sums.update({part: n, f"{part}_loss": value * n, f"{part}_right": right})
            self.images += n
            progress.advance(n)
            return loss

        def on_validation_epoch_end(self) -> None:
            row = {
                "epoch": self.current_epoch + 1,
                "train_loss": self.sums["train_loss"] / self.sums["train"],
                "val_loss": self.sums["val_loss"] / self.sums["val"],
                "val_accuracy": self.sums["val_right"] / self.sums["val"],
                "lr": self.rate,
                "seconds": round(time.perf_counter() - self.began, 3),
            }
            self.history.append(row)
            self.log("val_loss", row["val_loss"])
            if row["val_loss"] < self.best["val_loss"]:
                self.best = row
                self.best_state = {name: tensor.to("cpu", copy=True) for name, tensor in self.state_dict().items()}
            log.info("epoch %(epoch)d: loss %(train_loss).4f, validation %(val_loss).4f, %(val_accuracy).2f right", row)

    model = EndToEnd().train()
    statistics = () if options.batch_statistics else torch.nn.modules.batchnorm._BatchNorm
    for module in (*frozen, *(module for module in network.modules() if isinstance(module, statistics))):
        module.training = False  # Lightning leaves the modes alone, and restores each one after validation
    return model


def _fit(
    train: Sequence[Item],
    validation: Sequence[Item],
    n_classes: int,
    backbone: Backbone,
    options: FineTuneOptions,
    device: str,
    stop: StopFlag,
) -> FineTuned:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EarlyStopping

    loaded = backbones.load(backbone)
    with (
        Progress(options.epochs * (len(train) + len(validation)), "fine-tune", quiet=options.quiet) as progress,
        Decoder(loaded.preprocess, crop=False, stop=stop) as decoder,
    ):
        model = _end_to_end(loaded, n_classes, options, progress, stop)
        trainer = Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1 if device == "cpu" else [int(device.partition(":")[2] or 0)],
            max_epochs=options.epochs,
            callbacks=[EarlyStopping("val_loss", min_delta=options.min_delta, patience=options.patience)],
            deterministic="warn",  # not every operation has a deterministic CUDA kernel
            plugins=[LightningEnvironment()],  # within a SLURM job Lightning would take the job's tasks for its own
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches: Any = [Batches(items, decoder, options, train=items is train) for items in (train, validation)]
        trainer.fit(model, *batches)
    model.hook.remove()
    model.cpu().load_state_dict(model.best_state)
    network = loaded.network.eval().requires_grad_()
    network.zero_grad()
    digest = backbones.digest(network.state_dict())
    return FineTuned(
        loaded=Loaded(network, loaded.preprocess, f"fine-tuned from {loaded.weights_name}", digest, loaded.source),
        weight=model.head.weight.detach().numpy(),
        bias=model.head.bias.detach().numpy(),
        history=model.history,
        best_epoch=model.best["epoch"],
        seconds=0.0,
        images=model.images,
        trained_parameters=sum(parameter.numel() for group in model.groups for parameter in group["params"]),
    )
