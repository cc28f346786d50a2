"""The Lightning module of fine-tuning: a network, a head on the input of its last layer, and the learning rates."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import fit_temperature
from extractor.backbones.layers import last_weighted
from extractor.backbones.networks import Loaded
from extractor.signals import StopFlag
from store.errors import BadDataError, InterruptedRunError

from .freezing import modules_before, parameter_groups

if TYPE_CHECKING:
    from .settings import FineTuneOptions
    from .trainer import Advance, Plan

log = logging.getLogger("penult.classifiers")

# Sums over training and validation images: their number, weight in the loss, loss, and correct predictions.
SUMS = {part: [part, f"{part}_mass", f"{part}_loss", f"{part}_right"] for part in ("train", "val")}
DROP = 0.1  # factor by which `step` and `plateau` lower a rate


class DivergedError(BadDataError):
    """The loss is not finite."""


def optimizer_of(groups: list[dict[str, Any]], options: FineTuneOptions) -> Any:
    """The torch optimiser; each parameter group has its own learning rate."""
    import torch

    if options.optimizer == "sgd":
        momentum = options.momentum
        return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, weight_decay=options.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def share_of_rate(options: FineTuneOptions, steps: int, history: Sequence[dict[str, Any]] = ()) -> Callable[[int], float]:
    """The factor of every learning rate by step, counted from 0.

    Args:
        steps: the steps of one epoch.
        history: of the training whose rates `plateau` repeats, because they depended on its losses.
    """
    warm, total = round(options.warmup * steps), options.epochs * steps

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if options.schedule == "plateau":
            epoch = min(step // steps, len(history) - 2)  # the first row is before any training
            return float(history[epoch + 1]["lr"]) / options.lr if epoch * steps >= warm else 1.0
        done = (step - warm) / max(total - warm, 1)
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return DROP ** math.floor(3 * done + 1e-9) if options.schedule == "step" else 1.0

    return share


def schedules_of(
    optimizer: Any, options: FineTuneOptions, steps: int, history: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The learning-rate schedulers as Lightning takes them; arguments as in `share_of_rate`."""
    from torch.optim import lr_scheduler as torch_schedules

    if options.schedule != "plateau" or history:
        return [{"scheduler": torch_schedules.LambdaLR(optimizer, share_of_rate(options, steps, history)), "interval": "step"}]
    warm = max(round(options.warmup * steps), 1)
    rising = torch_schedules.LinearLR(optimizer, 1 / warm, total_iters=warm - 1)
    falling = torch_schedules.ReduceLROnPlateau(
        optimizer,
        factor=DROP,
        patience=max(options.patience // 2 - 1, 0),  # so that there is time to improve before the training stops
        threshold=options.min_delta,
        threshold_mode="abs",
    )
    # By step, once an epoch: Lightning runs schedulers by epoch after the checkpoint, which would miss the change.
    plateau = {"scheduler": falling, "interval": "step", "frequency": steps, "monitor": "val_loss", "reduce_on_plateau": True}
    return [{"scheduler": rising, "interval": "step"}, plateau]


def class_weights(counts: NDArray[np.intp], options: FineTuneOptions) -> NDArray[np.float32] | None:
    """Weight of an image in the losses by its class; None if all count the same."""
    if options.class_weight is None:
        return None
    return np.asarray(counts.sum() / (len(counts) * counts), np.float32)


def end_to_end(loaded: Loaded, plan: Plan) -> Any:
    """A LightningModule of a network and a head on the input of its last classification layer, to train by a plan."""
    import torch
    from lightning.pytorch import LightningModule

    network, side = loaded.network, loaded.preprocess.crop
    counts, options, start, choice = plan.counts, plan.options, plan.start, plan.choice
    example = torch.zeros(1, 3, side, side)
    last = last_weighted(network, example)
    if start is not None:
        start.require_features(loaded, f"input of {last}")
    frozen = modules_before(network, example, options.freeze_until, last) if options.freeze_until else []
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(requires_grad=False)
    balance = class_weights(counts, options)

    class EndToEnd(LightningModule):
        balance: Any  # (k,) or None, on the device of the network

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.hook = network.get_submodule(last).register_forward_pre_hook(self.catch)
            features = self.features(example)
            self.dropout = torch.nn.Dropout(options.dropout)
            self.head = torch.nn.Linear(features.shape[1], len(counts))
            with torch.no_grad():
                # From zero, the first steps change the head and hardly the network.
                self.head.weight.copy_(torch.from_numpy(start.weight) if start else torch.zeros(()))
                self.head.bias.copy_(torch.from_numpy(start.bias) if start else torch.zeros(()))
            self.groups = parameter_groups(features, network, self.head, options)
            self.register_buffer("balance", None if balance is None else torch.from_numpy(balance), persistent=False)
            self.history: list[dict[str, Any]] = []
            self.best: dict[str, Any] = {"epoch": 0, "val_loss": math.inf}
            self.best_state: dict[str, Any] = {}
            self.temperature = 1.0
            self.choice = choice and choice.to_json()
            self.validated: list[tuple[Any, Any]] = []  # logits and labels
            self.images, self.epoch_start = 0, 0.0
            self.rates: list[float | None] = [None, None]
            self.sums: Counter[str] = Counter()

        def watch(self, advance: Advance, stop: StopFlag) -> None:
            """Call ``advance`` with the images of every batch, and end the training when ``stop`` is set."""
            self.advance, self.stop = advance, stop

        def catch(self, _module: Any, inputs: tuple[Any, ...]) -> None:
            self.penultimate = inputs[0]

        def features(self, pixels: Any) -> Any:
            self.network(pixels)
            tensor, self.penultimate = self.penultimate, None
            return tensor.mean(dim=(2, 3)) if tensor.ndim == 4 else tensor

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.groups, options)
            steps = int(self.trainer.estimated_stepping_batches) // plan.epochs
            return [optimizer], schedules_of(optimizer, options, steps, choice.history if choice else ())

        def on_train_epoch_start(self) -> None:
            self.epoch_start, self.sums = time.perf_counter(), Counter()
            self.rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]

        def on_validation_epoch_start(self) -> None:
            self.validated = []
            if self.trainer.sanity_checking:  # epoch 0: validation before any training
                self.epoch_start, self.sums = time.perf_counter(), Counter()

        def training_step(self, batch: tuple[Any, Any], _index: int) -> Any:
            return self.step("train", batch, options.label_smoothing)

        def validation_step(self, batch: tuple[Any, Any], _index: int) -> None:
            self.step("val", batch, 0.0)

        def step(self, part: str, batch: tuple[Any, Any], smoothing: float) -> Any:
            if self.stop:
                raise InterruptedRunError(self.stop.signum)
            pixels, labels = batch
            logits = self.head(self.dropout(self.features(pixels)))
            loss = torch.nn.functional.cross_entropy(logits, labels, weight=self.balance, label_smoothing=smoothing)
            value, n = float(loss.detach()), len(labels)
            if not math.isfinite(value):
                epoch = f"epoch {self.current_epoch + 1}" + (" of the refit" if choice else "")
                message = f"the loss became {value} in {epoch}: use a lower rate than lr {options.lr:g}"
                raise DivergedError(message)
            mass = n if self.balance is None else float(self.balance[labels].sum())
            right = int((logits.argmax(dim=1) == labels).sum())
            self.sums.update(dict(zip(SUMS[part], (n, mass, value * mass, right), strict=True)))
            self.advance(n * self.trainer.world_size)
            if part == "val":
                self.validated.append((logits.detach().float().cpu(), labels.cpu()))
            return loss

        def on_validation_epoch_end(self) -> None:
            self.end_epoch(trained=not self.trainer.sanity_checking)

        def on_train_epoch_end(self) -> None:
            if choice:  # nothing is validated
                self.end_epoch(trained=True)

        def end_epoch(self, *, trained: bool) -> None:
            names = [*SUMS["train"], *SUMS["val"]]
            together = torch.tensor([self.sums[name] for name in names], dtype=torch.float64, device=self.device)
            totals = self.trainer.strategy.reduce(together, reduce_op="sum").tolist()
            self.sums = Counter(dict(zip(names, totals, strict=True)))
            self.images += int(self.sums["train"] + self.sums["val"])
            row: dict[str, Any] = {
                "epoch": self.current_epoch + 1 if trained else 0,
                "train_loss": self.sums["train_loss"] / self.sums["train_mass"] if trained else None,
                "val_loss": None if choice else self.sums["val_loss"] / self.sums["val_mass"],
                "val_accuracy": None if choice else self.sums["val_right"] / self.sums["val"],
                "lr": self.rates[0],
                "head_lr": self.rates[1],
                "seconds": round(time.perf_counter() - self.epoch_start, 3),
            }
            self.history.append(row)
            if choice:
                self.best = row
                log.info("epoch %(epoch)d of the refit: loss %(train_loss).4f", row)
            elif trained:
                self.log("val_loss", row["val_loss"], sync_dist=True)
                if row["val_loss"] < self.best["val_loss"]:
                    self.best, self.temperature = row, self.fitted_temperature()
                log.info("epoch %(epoch)d: loss %(train_loss).4f, validation %(val_loss).4f, %(val_accuracy).2f right", row)
            else:
                log.info("before: validation %(val_loss).4f, %(val_accuracy).2f right", row)

        def fitted_temperature(self) -> float:
            parts = [tuple(map(torch.cat, zip(*self.validated, strict=True)))]
            if self.trainer.world_size > 1:
                parts *= self.trainer.world_size
                torch.distributed.all_gather_object(parts, parts[self.global_rank])
            logits, labels = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
            return fit_temperature(logits, labels, weights=None if balance is None else balance[labels].astype(np.float64))

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.best is self.history[-1]:
                # If weights are averaged, Lightning's callback has put the average here; it is what was validated.
                state = checkpoint["state_dict"]
                self.best_state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            names = ("history", "best", "best_state", "temperature", "choice", "images")
            checkpoint["training"] = {name: getattr(self, name) for name in names}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name, value in checkpoint["training"].items():
                setattr(self, name, value)

    model = EndToEnd().train()
    statistics = () if options.batch_statistics else torch.nn.modules.batchnorm._BatchNorm
    for module in (*frozen, *(module for module in network.modules() if isinstance(module, statistics))):
        module.training = False  # Lightning keeps these modes, and restores them after validation
    return model
