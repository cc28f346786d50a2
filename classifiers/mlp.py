"""A small multi-layer perceptron in torch, with scikit-learn's manners."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from store.errors import BadDataError
from store.samples import MULTI_LABEL
from store.splits import hash_rank_split

from .conformal import Conformal, calibrate
from .dense import DenseHead, Fold, class_indices, standardisation, with_validation

log = logging.getLogger("penult.classifiers")

SMALL_BATCH = 2**20  # numbers; a smaller batch is done before a second thread has woken up


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch with so many threads, for a while; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class MlpHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Dense layers with ReLU and dropout, AdamW, early stopping, then a refit on everything for the best number of epochs.

    Args:
        hidden: width of each hidden layer.
        dropout: probability, on the input of every layer but the first.
        weight_decay: of AdamW, decoupled.
        lr: learning rate.
        batch_size: rows per step.
        max_epochs: limit.
        patience: epochs without a better validation loss (by more than ``min_delta``) before it stops.
        min_delta: what counts as better.
        validation_fraction: share of the training rows to stop on where no validation set is given; whole groups, by hash rank.
        seed: of initial weights, order and dropout.

    Attributes:
        classes_, dense_, temperature_, conformal_: as in `LogisticHead`.
        best_epoch_: number of epochs of the final fit.
        history_: for each epoch of the search: epoch, train_loss, val_loss, val_accuracy.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128,),
        *,
        dropout: float = 0.3,
        weight_decay: float = 1e-2,
        lr: float = 3e-4,
        batch_size: int = 32,
        max_epochs: int = 100,
        patience: int = 10,
        min_delta: float = 1e-4,
        validation_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.weight_decay = weight_decay
        self.lr = lr
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.min_delta = min_delta
        self.validation_fraction = validation_fraction
        self.seed = seed

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
    ) -> Self:
        """Find the number of epochs on validation, then fit on everything; arguments as in `LogisticHead.fit`."""
        features, labels = map(np.asarray, validate_data(self, X, y, dtype=np.float32))
        self.classes_, targets = class_indices(labels)
        if validation is not None:
            features, targets, [(train, held)] = with_validation(features, targets, validation, self.classes_)
        else:
            train, held = self._inner_split(features, labels, groups)
        self.conformal_: Conformal | None = None
        self.dense_, search = self._search(features, targets, train, held)
        if search is not None:
            self.dense_, self.conformal_ = calibrate(self.dense_, search.logits(features[held]), targets[held])
        self.temperature_: float | None = self.dense_.temperature
        return self

    def _search(
        self, X: NDArray[np.float32], targets: NDArray[Any], train: NDArray[np.intp], held: NDArray[np.intp]
    ) -> tuple[DenseHead, DenseHead | None]:
        """The head on all rows, and the one without the held-out rows that said how many epochs are best."""
        self.history_: list[dict[str, float]] = []
        if not len(held):  # too few to hold any out
            self.best_epoch_ = self.max_epochs
            return self._train(X, targets, None, self.max_epochs), None
        search = self._train(X[train], targets[train], (X[held], targets[held]), self.max_epochs)
        self.best_epoch_ = int(np.argmin([point["val_loss"] for point in self.history_])) + 1
        return self._train(X, targets, None, self.best_epoch_), search

    def _inner_split(self, X: NDArray[np.float32], y: NDArray[Any], groups: Sequence[bytes] | None) -> Fold:
        owners = groups or [hashlib.sha256(row.tobytes()).digest() for row in X]
        try:
            names = hash_rank_split([str(label) for label in y], owners, val=self.validation_fraction, test=0.0, seed=self.seed)
        except BadDataError as error:
            log.warning("nothing to stop early on (%s): all %d epochs are trained", error, self.max_epochs)
            return np.arange(len(X)), np.empty(0, np.intp)
        inner = np.array(names) == "val"
        return np.flatnonzero(~inner), np.flatnonzero(inner)

    def _train(
        self,
        X: NDArray[np.float32],
        targets: NDArray[Any],
        held: tuple[NDArray[np.float32], NDArray[Any]] | None,
        epochs: int,
        classes: list[str] | None = None,
    ) -> DenseHead:
        """Train for so many epochs, or with held-out rows until they get no better; then the best epoch is what returns.

        Targets are class indices ``(n,)``, or of several labels ``(n, k)`` float32, 1 for those that a row has.
        """
        import torch
        from torch import nn

        several = targets.ndim == 2
        mean, scale = standardisation(X)

        def standardised(rows: NDArray[np.float32]) -> Any:
            return torch.from_numpy((rows - mean) / scale)

        with torch.random.fork_rng(devices=[]), _threads(1 if self.batch_size * X.shape[1] < SMALL_BATCH else None):
            torch.manual_seed(self.seed)
            sizes = [X.shape[1], *self.hidden]
            blocks: list[nn.Module] = []
            for i, (width, following) in enumerate(itertools.pairwise(sizes)):
                blocks += [nn.Dropout(self.dropout)] if i else []
                blocks += [nn.Linear(width, following), nn.ReLU()]
            network = nn.Sequential(*blocks, nn.Dropout(self.dropout), nn.Linear(sizes[-1], len(classes or self.classes_)))
            optimiser = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            criterion = nn.BCEWithLogitsLoss() if several else nn.CrossEntropyLoss()
            inputs, truth = standardised(X), torch.from_numpy(targets)
            held_inputs, held_truth = (standardised(held[0]), torch.from_numpy(held[1])) if held else (None, None)
            best, best_loss, waited = self._arrays(network), np.inf, 0
            for epoch in range(1, epochs + 1):
                network.train()
                total = 0.0
                for rows in torch.split(torch.randperm(len(inputs)), self.batch_size):
                    optimiser.zero_grad()
                    loss = criterion(network(inputs[rows]), truth[rows])
                    loss.backward()
                    optimiser.step()
                    total += loss.item() * len(rows)
                if held_inputs is None or held_truth is None:
                    continue
                network.eval()
                with torch.inference_mode():
                    logits = network(held_inputs)
                    val_loss = criterion(logits, held_truth).item()
                    right = (logits > 0) == (held_truth > 0) if several else logits.argmax(dim=1) == held_truth
                    val_accuracy = right.float().mean().item()
                train_loss = total / len(inputs)
                self.history_.append(
                    {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
                )
                waited = 0 if val_loss < best_loss - self.min_delta else waited + 1
                if val_loss < best_loss:
                    best, best_loss = self._arrays(network), val_loss
                if waited >= self.patience:
                    break
            layers = best if held else self._arrays(network)
        names = classes or [str(label) for label in self.classes_]
        return DenseHead(mean, scale, layers, names, activation="Sigmoid" if several else "Softmax")

    def again(self, X: NDArray[np.float32], targets: NDArray[np.intp], classes: list[str]) -> DenseHead:
        """A head on other rows ``(n, d)`` with what was chosen here, without choosing again."""
        return self._train(X, targets, None, self.best_epoch_, classes)

    @staticmethod
    def _arrays(network: Any) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        from torch import nn

        linear = [module for module in network if isinstance(module, nn.Linear)]
        return [(m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy()) for m in linear]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """Probabilities ``(n, k)``, temperature included."""
        check_is_fitted(self)
        return self.dense_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable label of each row."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])

    @property
    def hyperparameters_(self) -> dict[str, Any]:
        """What was used, as JSON."""
        return {**self.get_params(), "hidden": list(self.hidden), "epochs": self.best_epoch_}


class MultiLabelMlpHead(MlpHead):
    """The same for several labels an image: y is a label indicator ``(n, k)``, and each label has a sigmoid.

    Attributes:
        classes_: the columns of y, by number.
        best_epoch_, history_, dense_: as in `MlpHead`; val_accuracy is the share of right decisions.
    """

    kind, task = "mlp", MULTI_LABEL
    temperature_ = None
    conformal_ = None

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        validation: tuple[ArrayLike, ArrayLike] | None = None,
        groups: Sequence[bytes] | None = None,
    ) -> Self:
        features, given = map(np.asarray, validate_data(self, X, y, dtype=np.float32, multi_output=True))
        truth = given.reshape(len(given), -1).astype(np.float32)
        self.classes_ = np.arange(truth.shape[1])
        if validation is not None:
            held, labels = np.asarray(validation[0], np.float32), np.asarray(validation[1], np.float32)
            train, inner = np.arange(len(features)), len(features) + np.arange(len(held))
            features, truth = np.concatenate([features, held]), np.concatenate([truth, labels])
        else:
            train, inner = self._inner_split(features, np.zeros(len(features)), groups)
        self.dense_, _ = self._search(features, truth, train, inner)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """Which labels each row has ``(n, k)``: those more probable than not."""
        return (self.predict_proba(X) >= 0.5).astype(np.intp)
