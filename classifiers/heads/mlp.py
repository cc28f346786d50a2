"""The mlp head: a small multi-layer perceptron in torch that is a scikit-learn estimator."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from classifiers.evaluation.conformal import Conformal
from classifiers.evaluation.probabilities import Float32
from classifiers.heads.solvers.standardise import standardisation
from store.progress.stages import Stage
from store.tasks import MultiLabelTask

from .fitted import DenseHead, calibrate
from .folds import Fold, class_indices, group_folds, on_first_views, stratified_folds, units_of, with_validation
from .search import ClassifierHead, drawing

log = logging.getLogger("penult.classifiers")

SMALL_BATCH = 2**20  # numbers; a smaller batch is done before a second thread has started
GRID: dict[str, tuple[Any, ...]] = {  # tried for each setting that is None: every combination, in this order
    "hidden": ((128,), (512,)),
    "dropout": (0.3,),
    "weight_decay": (1e-2,),
    "lr": (1e-3, 3e-3),
}
SUMMARY = ("epoch", "val_loss", "val_accuracy")
SCHEDULES = ("constant", "cosine")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """A context in which torch has ``count`` threads; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Run:
    """One setting, tried on held-out rows: the history of its epochs, and the rows' logits ``(m, k)`` at the best one."""

    setting: dict[str, Any]
    logits: Float32
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, float]:
        return min(self.history, key=lambda point: point["val_loss"])

    @property
    def summary(self) -> dict[str, Any]:
        return {**self.setting, "hidden": list(self.setting["hidden"]), **{key: self.best[key] for key in SUMMARY}}


def _layers(sizes: Sequence[int], dropout: float) -> Any:
    """Dense layers of these widths, input and output included; ReLU and dropout before each but the first."""
    from torch import nn

    blocks: list[nn.Module] = []
    for i, (width, following) in enumerate(itertools.pairwise(sizes)):
        blocks += [nn.ReLU(), nn.Dropout(dropout)] if i else []
        blocks.append(nn.Linear(width, following))
    return nn.Sequential(*blocks)


class _Training:
    """Standardised rows and their targets on a device, and the networks that are trained on some of them with one setting."""

    def __init__(self, X: Float32, targets: NDArray[Any], outputs: int, setting: dict[str, Any], device: Any) -> None:
        import torch
        from torch import nn

        self.mean, self.scale = standardisation(X)
        self.inputs = torch.from_numpy((X - self.mean) / self.scale).to(device)
        self.truth = torch.from_numpy(targets).to(device)
        self.criterion = nn.BCEWithLogitsLoss() if targets.ndim == 2 else nn.CrossEntropyLoss()
        self.sizes, self.setting = [X.shape[1], *setting["hidden"], outputs], setting


class _Network:
    """One network, its optimiser, and the rows it is trained on."""

    def __init__(self, training: _Training, rows: NDArray[np.intp]) -> None:
        import torch

        device = training.inputs.device
        self._training, self._rows = training, torch.from_numpy(rows).to(device)
        self._layers = _layers(training.sizes, training.setting["dropout"]).to(device)
        rates = {"lr": training.setting["lr"], "weight_decay": training.setting["weight_decay"]}
        self._optimiser = torch.optim.AdamW(self._layers.parameters(), **rates)

    def epoch(self, rate: float, batch_size: int) -> float:
        """One pass over the rows in random order; returns the sum of their losses."""
        import torch

        training, device = self._training, self._rows.device
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._layers.train()
        total = torch.zeros((), device=device)
        for batch in torch.split(self._rows[torch.randperm(len(self._rows)).to(device)], batch_size):
            self._optimiser.zero_grad()
            loss = training.criterion(self._layers(training.inputs[batch]), training.truth[batch])
            loss.backward()
            self._optimiser.step()
            total += loss.detach() * len(batch)
        return float(total.item())

    def logits(self, rows: NDArray[np.intp]) -> Any:
        """A tensor ``(m, k)`` for these rows."""
        self._layers.eval()
        return self._layers(self._training.inputs[rows])

    def arrays(self) -> list[tuple[Float32, Float32]]:
        """Weight and bias of each dense layer."""
        from torch import nn

        linear = [module for module in self._layers if isinstance(module, nn.Linear)]
        return [(m.weight.detach().cpu().numpy().copy(), m.bias.detach().cpu().numpy().copy()) for m in linear]


class MlpHead(ClassifierHead):
    """Dense layers with ReLU and dropout: AdamW, early stopping, then a fit on everything for the best number of epochs.

    Settings that are None are chosen by the loss on one held-out part of the rows, from `GRID`. With the chosen ones a network
    is trained for each fold, all in step, up to the epoch at which the loss of all rows, each out of fold, is least.
    Temperature and prediction sets come from the same logits: from heads like the one that is kept, on rows that these were
    not fitted on (cross-fitted, as scikit-learn's ``CalibratedClassifierCV(ensemble=False)``).

    Args:
        hidden: width of each hidden layer.
        dropout: probability, on the input of every layer but the first.
        weight_decay: of AdamW, decoupled.
        lr: learning rate at the start.
        schedule: of the learning rate: ``constant``, or ``cosine`` down to 0 at ``max_epochs``.
        batch_size: rows per step.
        max_epochs: largest number of epochs.
        patience: epochs without a better loss of held-out rows (by more than ``min_delta``) before it stops.
        min_delta: smallest improvement that counts.
        validation_fraction: share of the training rows that a fold holds out; whole groups.
        seed: of initial weights, order and dropout.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if torch finds one. The saved head is the same kind of file.

    Attributes:
        classes_, fitted_, temperature_, conformal_: as in `LogisticHead`.
        setting_: the chosen setting of `GRID`.
        tried_: for each setting tried: the setting, its best epoch, and val_loss and val_accuracy there, on that part.
        best_epoch_: number of epochs of the final fit.
        history_: for each epoch of the chosen setting: epoch, train_loss, val_loss, val_accuracy, of the rows out of fold.

    >>> from classifiers import MlpHead
    >>> from store import FeatureCache
    >>> train = FeatureCache("pets.cache").subset("train")
    >>> MlpHead(hidden=(8,), max_epochs=5).fit(train.X, train.y).predict(train.X[:1]).shape
    (1,)
    """

    name = "mlp"

    def __init__(
        self,
        hidden: Sequence[int] | None = None,
        *,
        dropout: float | None = None,
        weight_decay: float | None = None,
        lr: float | None = None,
        schedule: str = "constant",
        batch_size: int = 32,
        max_epochs: int = 100,
        patience: int = 10,
        min_delta: float = 1e-4,
        validation_fraction: float = 0.2,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.weight_decay = weight_decay
        self.lr = lr
        self.schedule = schedule
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.min_delta = min_delta
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.device = device

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        """Choose settings and number of epochs, calibrate out of fold, and fit on everything.

        Arguments as in `LogisticHead.fit`. Settings are chosen on validation where there is one; for calibration, a network of
        all training rows judges it, and folds of these the training rows.
        """
        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        check_classification_targets(labels)
        if self.schedule not in SCHEDULES:
            message = f"schedule is {self.schedule!r}; expected {' or '.join(map(repr, SCHEDULES))}"
            raise ValueError(message)
        self.classes_, targets = class_indices(labels)
        folds = stratified_folds(targets, groups, self._count, self.seed)
        if validation is not None:
            features, targets, [held] = with_validation(features, targets, validation, self.classes_)
            folds = [held, *folds]
        folds = self._drawn(on_first_views(folds, views))
        self.conformal_: Conformal | None = None
        self.fitted_, logits = self._search(features, targets, folds)
        if logits is not None:
            rows = np.concatenate([test for _, test in folds])
            self.fitted_, self.conformal_ = calibrate(self.fitted_, logits, targets[rows], units=units_of(groups, rows))
        self.temperature_: float | None = self.fitted_.temperature
        return self

    @property
    def _count(self) -> int:
        """How many folds; 0 to hold nothing out."""
        return max(round(1 / self.validation_fraction), 2) if self.validation_fraction else 0

    def _drawn(self, folds: Sequence[Fold]) -> list[Fold]:
        """The folds, with only as many rows held out as settings are judged on."""
        total = sum(len(test) for _, test in folds)
        draw = drawing(max(total, 1), len(self.classes_), self.seed)
        return [(train, draw(test)) for train, test in folds]

    def _search(self, X: Float32, targets: NDArray[Any], folds: Sequence[Fold]) -> tuple[DenseHead, Float32 | None]:
        """The head on all rows, and the logits of held-out rows by networks of others, with the same setting and epochs."""
        settings = self._settings()
        if not folds:
            log.warning("there are too few images or groups to hold any out, so all %d epochs are trained", self.max_epochs)
            self.setting_, self.history_, self.tried_, self.best_epoch_ = settings[0], [], [], self.max_epochs
            return self._refit(X, targets, [str(label) for label in self.classes_]), None
        part = folds[:1] if len(settings) > 1 else folds
        with Stage(f"choosing settings of the {self.name} head", len(settings), "settings") as stage:
            runs = [self._try(X, targets, part, setting) for setting in stage.each(settings)]
        self.tried_ = [run.summary for run in runs]
        chosen = min(runs, key=lambda run: run.best["val_loss"])
        if len(part) < len(folds):
            chosen = self._try(X, targets, folds, chosen.setting)
        self.setting_, self.history_, self.best_epoch_ = chosen.setting, chosen.history, int(chosen.best["epoch"])
        return self._refit(X, targets, [str(label) for label in self.classes_]), chosen.logits

    def _settings(self) -> list[dict[str, Any]]:
        """Every combination to try; a single one if no setting is None."""
        choices = {name: grid if getattr(self, name) is None else (getattr(self, name),) for name, grid in GRID.items()}
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

    def _try(self, X: Float32, targets: NDArray[Any], folds: Sequence[Fold], setting: dict[str, Any]) -> _Run:
        """Train a network for each fold, all in step, until the loss of their held-out rows together stops improving."""
        import torch

        stage = Stage(f"training the {self.name} head", self.max_epochs, "epochs at most")
        with self._training(X, targets, len(self.classes_), setting) as training, stage:
            networks = [_Network(training, train) for train, _ in folds]
            rows = np.concatenate([test for _, test in folds])
            truth, run, best_loss, waited = training.truth[rows], _Run(setting, np.empty((0, 0), np.float32)), np.inf, 0
            for epoch in stage.each(range(1, self.max_epochs + 1)):
                totals = [network.epoch(self._rate(setting, epoch), self.batch_size) for network in networks]
                with torch.inference_mode():
                    logits = torch.cat([network.logits(test) for network, (_, test) in zip(networks, folds, strict=True)])
                    val_loss = training.criterion(logits, truth).item()
                    right = (logits > 0) == (truth > 0) if targets.ndim == 2 else logits.argmax(dim=1) == truth
                point = {"epoch": epoch, "train_loss": sum(totals) / sum(len(train) for train, _ in folds)}
                run.history.append({**point, "val_loss": val_loss, "val_accuracy": right.float().mean().item()})
                waited = 0 if val_loss < best_loss - self.min_delta else waited + 1
                if val_loss < best_loss or epoch == 1:  # a loss of NaN is never less
                    run.logits, best_loss = logits.cpu().numpy(), val_loss
                if waited >= self.patience:
                    break
        return run

    def _rate(self, setting: dict[str, Any], epoch: int) -> float:
        """The learning rate of an epoch."""
        falls = (1 + math.cos(math.pi * (epoch - 1) / self.max_epochs)) / 2 if self.schedule == "cosine" else 1.0
        return float(setting["lr"]) * falls

    @contextmanager
    def _training(self, X: Float32, targets: NDArray[Any], outputs: int, setting: dict[str, Any]) -> Iterator[_Training]:
        """Training with this setting, seeded, with the random state and the threads of the caller restored afterwards.

        Targets are class indices ``(n,)``, or for several labels ``(n, k)`` float32, 1 for those that a row has.
        """
        import torch

        device = torch.device(self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), _threads(1 if self.batch_size * X.shape[1] < SMALL_BATCH else None):
            torch.manual_seed(self.seed)
            yield _Training(X, targets, outputs, setting, device)

    def _refit(self, X: Float32, targets: NDArray[Any], classes: list[str]) -> DenseHead:
        stage = Stage(f"fitting the {self.name} head", self.best_epoch_, "epochs")
        with self._training(X, targets, len(classes), self.setting_) as training, stage:
            network = _Network(training, np.arange(len(X)))
            for epoch in stage.each(range(1, self.best_epoch_ + 1)):
                network.epoch(self._rate(self.setting_, epoch), self.batch_size)
            activation = "Sigmoid" if targets.ndim == 2 else "Softmax"
            return DenseHead(training.mean, training.scale, network.arrays(), classes, activation=activation)

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """The settings in use, as JSON."""
        chosen = {**self.setting_, "hidden": list(self.setting_["hidden"])}
        return {**self.get_params(), **chosen, "epochs": self.best_epoch_, "tried": self.tried_}


class MultiLabelMlpHead(MlpHead):
    """`MlpHead` for several labels an image: y is a label indicator ``(n, k)``, and each label has a sigmoid.

    Attributes:
        classes_: the columns of y, by number.
        setting_, tried_, best_epoch_, history_, fitted_: as in `MlpHead`; val_accuracy is the share of right decisions.

    >>> import numpy as np
    >>> from classifiers import MultiLabelMlpHead
    >>> X = np.tile(np.eye(4, dtype=np.float32), (4, 1))
    >>> y = np.tile([[1, 0], [1, 1], [0, 1], [0, 0]], (4, 1))
    >>> MultiLabelMlpHead(hidden=(8,), max_epochs=2).fit(X, y).predict_proba(X).shape
    (16, 2)
    """

    task = MultiLabelTask.name
    temperature_ = None
    conformal_ = None

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
        views: int = 1,
    ) -> Self:
        features, indicators = map(np.asarray, validate_data(self, X, y, dtype=np.float32, multi_output=True))
        truth = indicators.reshape(len(indicators), -1).astype(np.float32)
        self.classes_ = np.arange(truth.shape[1])
        folds = group_folds(len(features), groups, self._count, self.seed)
        if validation is not None:
            held, labels = np.asarray(validation[0], np.float32), np.asarray(validation[1], np.float32)
            folds = [(np.arange(len(features)), len(features) + np.arange(len(held))), *folds]
            features, truth = np.concatenate([features, held]), np.concatenate([truth, labels])
        self.fitted_, _ = self._search(features, truth, self._drawn(on_first_views(folds, views)))
        return self

    def refit(self, X: ArrayLike, y: ArrayLike) -> DenseHead:
        truth = np.asarray(y, np.float32)
        return self._refit(np.asarray(X, np.float32), truth, [str(k) for k in range(truth.shape[1])])

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """Which labels each row has ``(n, k)``: those with a probability of at least 0.5."""
        return (self.predict_proba(X) >= 0.5).astype(np.intp)
