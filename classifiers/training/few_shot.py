"""Learning curves: the accuracy of a head with few training images, from seeded draws of the training split."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.cache import Subset
from store.errors import BadDataError, UsageError

log = logging.getLogger("penult.classifiers")


def learning_curve(
    head: Any,
    train: Subset,
    held_out: Subset | None,
    shots: Sequence[int],
    repeats: int = 20,
    *,
    seed: int = 0,
    views: Subset | None = None,
) -> list[dict[str, Any]]:
    """Accuracy by number of training images.

    In each draw the classes are shuffled, and n shots are the first n of each: the draws of 5 images contain those of 1. No two
    images of a draw are of one group. A head chooses its settings inside the draw.

    Args:
        head: unfitted; clones of it are fitted.
        train: the images that are drawn from.
        held_out: the images that every draw is measured on.
        shots: numbers of images of each class.
        repeats: draws for each number.
        seed: of the draws.
        views: all views of ``train`` in the same order, if all those of a drawn image are fitted.

    Returns:
        For each number, in rising order: ``shots``; ``accuracy``, the mean over the draws; ``accuracy_interval``, its 95 %
        interval over draws (Student's t, without the uncertainty from the number of held-out images); ``accuracies`` of all
        draws; ``n``, the number of held-out images.

    Raises:
        UsageError: nothing is held out, or there are fewer than two draws.
        BadDataError: a class has fewer training images, or groups, than a draw needs; names it.
    """
    from sklearn.base import clone

    if held_out is None or repeats < 2:
        problem = "nothing is held out" if held_out is None else f"there is {repeats} draw"
        message = f"a few-shot curve needs held-out images and two draws or more to show an interval; {problem}"
        raise UsageError(message)
    most = max(shots)
    members = _members(train)
    for label, groups in members.items():
        if len(groups) < most:
            message = f"--few-shot {most}: class {label!r} has {len(groups)} training image(s) or group(s); ask for fewer"
            raise BadDataError(message)
    every = views or train
    n_views = len(every) // len(train)
    rng = np.random.default_rng(seed)
    draws = [_draw(members, most, rng) for _ in range(repeats)]
    curve = []
    for n in sorted(set(shots)):
        accuracies = []
        with each_warning_once():
            for draw in draws:
                images = np.concatenate([order[:n] for order in draw])
                rows = (images[:, None] * n_views + np.arange(n_views)).ravel()
                owners = [every.groups[i] for i in rows.tolist()]
                fitted = clone(head).fit(every.X[rows], every.y[rows], groups=owners, views=n_views)
                accuracies.append(float(np.mean(fitted.predict(held_out.X) == held_out.y)))
        curve.append(_point(n, accuracies, len(held_out)))
    return curve


def _members(train: Subset) -> dict[str, list[NDArray[np.intp]]]:
    """The rows of each group of each class."""
    rows: dict[str, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (label, group) in enumerate(zip(train.y.tolist(), train.groups, strict=True)):
        rows[label][group].append(i)
    return {label: [np.array(each) for each in groups.values()] for label, groups in sorted(rows.items())}


def _draw(members: dict[str, list[NDArray[np.intp]]], most: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """``most`` rows of each class in random order, from different groups."""
    return [
        np.array([rng.choice(groups[i]) for i in rng.choice(len(groups), most, replace=False)]) for groups in members.values()
    ]


def _point(shots: int, accuracies: list[float], n: int) -> dict[str, Any]:
    from scipy.stats import t

    mean = float(np.mean(accuracies))
    half = float(t.ppf(0.975, len(accuracies) - 1) * np.std(accuracies, ddof=1) / np.sqrt(len(accuracies)))
    bounds = [max(mean - half, 0.0), min(mean + half, 1.0)]
    return {"shots": shots, "accuracy": mean, "accuracy_interval": bounds, "accuracies": accuracies, "n": n}


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Log each message once: a head warns about every draw alike."""
    messages: set[str] = set()

    def once(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in messages
        messages.add(text)
        return new

    log.addFilter(once)
    try:
        yield
    finally:
        log.removeFilter(once)
