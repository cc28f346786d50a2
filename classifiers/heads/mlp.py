"""The mlp head: a small multi-layer perceptron in torch that is a scikit-learn estimator."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from classifiers.evaluation.conformal import Conformal
from classifiers.heads.solvers.standardise import standardisation
from store.errors import BadDataError
from store.splits import hash_rank_split
from store.tasks import MultiLabelTask

from .fitted import DenseHead, calibrate
from .folds import Fold, class_indices, on_first_views, with_validation
from .search import ClassifierHead

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
    """One training run with one setting: the head of its best epoch, and its history."""

    setting: dict[str, Any]
    head: DenseHead
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        best = min(self.history, key=lambda point: point["val_loss"])
        return {**self.setting, "hidden": list(self.setting["hidden"]), **{key: best[key] for key in SUMMARY}}


def _network(sizes: Sequence[int], dropout: float) -> Any:
    """Dense layers of these widths, input and output included; ReLU and dropout before each but the first."""
    from torch import nn

    blocks: list[nn.Module] = []
    for i, (width, following) in enumerate(itertools.pairwise(sizes)):
        blocks += [nn.ReLU(), nn.Dropout(dropout)] if i else []
        blocks.append(nn.Linear(width, following))
    return nn.Sequential(*blocks)


def _arrays(network: Any) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weight and bias of each dense layer."""
    from torch import nn

    linear = [module for module in network if isinstance(module, nn.Linear)]
    return [(m.weight.detach().cpu().numpy().copy(), m.bias.detach().cpu().numpy().copy()) for m in linear]


class MlpHead(ClassifierHead):
    """Dense layers with ReLU and dropout: AdamW, early stopping, then a refit on everything for the best number of epochs.

    Settings that are None are chosen by the validation loss, from `GRID`.

    Args:
        hidden: width of each hidden layer.
        dropout: probability, on the input of every layer but the first.
        weight_decay: of AdamW, decoupled.
        lr: learning rate at the start.
        schedule: of the learning rate: ``constant``, or ``cosine`` down to 0 at ``max_epochs``.
        batch_size: rows per step.
        max_epochs: largest number of epochs.
        patience: epochs without a better validation loss (by more than ``min_delta``) before it stops.
        min_delta: smallest improvement that counts.
        validation_fraction: share of the training rows to stop on if there is no validation set; whole groups, by hash rank.
        seed: of initial weights, order and dropout.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if torch finds one. The saved head is the same kind of file.

    Attributes:
        classes_, fitted_, temperature_, conformal_: as in `LogisticHead`.
        setting_: the chosen setting of `GRID`.
        tried_: for each setting tried: the setting, its best epoch, and val_loss and val_accuracy there.
        best_epoch_: number of epochs of the final fit.
        history_: for each epoch of the chosen setting: epoch, train_loss, val_loss, val_accuracy.

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
        """Choose settings and number of epochs on validation, then fit on everything; arguments as in `LogisticHead.fit`."""
        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        check_classification_targets(labels)
        if self.schedule not in SCHEDULES:
            message = f"schedule is {self.schedule!r}; expected {' or '.join(map(repr, SCHEDULES))}"
            raise ValueError(message)
        self.classes_, targets = class_indices(labels)
        if validation is not None:
            features, targets, [(train, held)] = with_validation(features, targets, validation, self.classes_)
        else:
            train, held = self._inner_split(features, labels, groups)
        [(train, held)] = on_first_views([(train, held)], views)
        self.conformal_: Conformal | None = None
        self.fitted_, search = self._search(features, targets, train, held)
        if search is not None:
            self.fitted_, self.conformal_ = calibrate(self.fitted_, search.logits(features[held]), targets[held])
        self.temperature_: float | None = self.fitted_.temperature
        return self

    def _search(
        self, X: NDArray[np.float32], targets: NDArray[Any], train: NDArray[np.intp], held: NDArray[np.intp]
    ) -> tuple[DenseHead, DenseHead | None]:
        """The head on all rows, and the one without the held-out rows on which setting and number of epochs were chosen."""
        classes = [str(label) for label in self.classes_]
        if not len(held):  # too few to hold any out
            self.setting_, self.history_, self.tried_ = self._settings()[0], [], []
            self.best_epoch_ = self.max_epochs
            return self._train(X, targets, None, self.max_epochs, classes, self.setting_).head, None
        rows, judges = (X[train], targets[train]), (X[held], targets[held])
        runs = [self._train(*rows, judges, self.max_epochs, classes, setting) for setting in self._settings()]
        self.tried_ = [run.summary for run in runs]
        best = min(runs, key=lambda run: float(run.summary["val_loss"]))
        self.setting_, self.history_, self.best_epoch_ = best.setting, best.history, int(best.summary["epoch"])
        return self._train(X, targets, None, self.best_epoch_, classes, self.setting_).head, best.head

    def _settings(self) -> list[dict[str, Any]]:
        """Every combination to try; a single one if no setting is None."""
        choices = {name: grid if getattr(self, name) is None else (getattr(self, name),) for name, grid in GRID.items()}
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

    def _inner_split(self, X: NDArray[np.float32], y: NDArray[Any], groups: Sequence[bytes] | None) -> Fold:
        owners = groups or [hashlib.sha256(row.tobytes()).digest() for row in X]
        try:
            names = hash_rank_split([str(label) for label in y], owners, val=self.validation_fraction, test=0.0, seed=self.seed)
        except BadDataError as error:
            log.warning("no rows for early stopping (%s): training all %d epochs", error, self.max_epochs)
            return np.arange(len(X)), np.empty(0, np.intp)
        inner = np.array(names) == "val"
        return np.flatnonzero(~inner), np.flatnonzero(inner)

    def _train(
        self,
        X: NDArray[np.float32],
        targets: NDArray[Any],
        held: tuple[NDArray[np.float32], NDArray[Any]] | None,
        epochs: int,
        classes: list[str],
        setting: dict[str, Any],
    ) -> _Run:
        """Train for ``epochs`` epochs, or with held-out rows until their loss stops improving, and return the best epoch.

        Targets are class indices ``(n,)``, or for several labels ``(n, k)`` float32, 1 for those that a row has.
        """
        import torch
        from torch import nn

        several = targets.ndim == 2
        device = torch.device(self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        mean, scale = standardisation(X)

        def standardised(rows: NDArray[np.float32]) -> Any:
            return torch.from_numpy((rows - mean) / scale).to(device)

        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), _threads(1 if self.batch_size * X.shape[1] < SMALL_BATCH else None):
            torch.manual_seed(self.seed)
            network = _network([X.shape[1], *setting["hidden"], len(classes)], setting["dropout"]).to(device)
            optimiser = torch.optim.AdamW(network.parameters(), lr=setting["lr"], weight_decay=setting["weight_decay"])
            criterion = nn.BCEWithLogitsLoss() if several else nn.CrossEntropyLoss()
            inputs, truth = standardised(X), torch.from_numpy(targets).to(device)
            judges, labels = (standardised(held[0]), torch.from_numpy(held[1]).to(device)) if held else (None, None)
            head = DenseHead(mean, scale, _arrays(network), classes, activation="Sigmoid" if several else "Softmax")
            run, best_loss, waited = _Run(setting, head), np.inf, 0
            for epoch in range(1, epochs + 1):
                if self.schedule == "cosine":
                    for group in optimiser.param_groups:
                        group["lr"] = setting["lr"] * (1 + math.cos(math.pi * (epoch - 1) / self.max_epochs)) / 2
                network.train()
                total = torch.zeros((), device=device)
                for rows in torch.split(torch.randperm(len(inputs)).to(device), self.batch_size):
                    optimiser.zero_grad()
                    loss = criterion(network(inputs[rows]), truth[rows])
                    loss.backward()
                    optimiser.step()
                    total += loss.detach() * len(rows)
                if judges is None or labels is None:
                    continue
                network.eval()
                with torch.inference_mode():
                    logits = network(judges)
                    val_loss = criterion(logits, labels).item()
                    right = (logits > 0) == (labels > 0) if several else logits.argmax(dim=1) == labels
                    val_accuracy = right.float().mean().item()
                point = {"epoch": epoch, "train_loss": total.item() / len(inputs)}
                run.history.append({**point, "val_loss": val_loss, "val_accuracy": val_accuracy})
                waited = 0 if val_loss < best_loss - self.min_delta else waited + 1
                if val_loss < best_loss:
                    run.head, best_loss = replace(run.head, layers=_arrays(network)), val_loss
                if waited >= self.patience:
                    break
            if held is None:
                run.head = replace(run.head, layers=_arrays(network))
        return run

    def _refit(self, X: NDArray[np.float32], targets: NDArray[Any], classes: list[str]) -> DenseHead:
        return self._train(X, targets, None, self.best_epoch_, classes, self.setting_).head

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
        if validation is not None:
            held, labels = np.asarray(validation[0], np.float32), np.asarray(validation[1], np.float32)
            train, inner = np.arange(len(features)), len(features) + np.arange(len(held))
            features, truth = np.concatenate([features, held]), np.concatenate([truth, labels])
        else:
            train, inner = self._inner_split(features, np.zeros(len(features)), groups)
        [(train, inner)] = on_first_views([(train, inner)], views)
        self.fitted_, _ = self._search(features, truth, train, inner)
        return self

    def refit(self, X: ArrayLike, y: ArrayLike) -> DenseHead:
        truth = np.asarray(y, np.float32)
        return self._refit(np.asarray(X, np.float32), truth, [str(k) for k in range(truth.shape[1])])

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """Which labels each row has ``(n, k)``: those with a probability of at least 0.5."""
        return (self.predict_proba(X) >= 0.5).astype(np.intp)
