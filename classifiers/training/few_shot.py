"""Learning curves: the accuracy of a head with few training images, from seeded draws of the training split."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.intervals import Interval
from classifiers.evaluation.units import Units
from store.cache import Subset
from store.errors import BadDataError, UsageError
from store.progress.stages import Stage

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
    images of a draw are of one group, whatever their classes. A head chooses its settings inside the draw.

    Args:
        head: unfitted; clones of it are fitted.
        train: the images that are drawn from.
        held_out: the images that every draw is measured on.
        shots: numbers of images of each class.
        repeats: draws for each number.
        seed: of the draws.
        views: all views of ``train`` in the same order, if all those of a drawn image are fitted.

    Returns:
        For each number, in rising order: ``shots``; ``accuracy``, the mean over the draws; ``accuracy_interval``, the 95 %
        interval of what so many other images give on other held-out images, see `_point`; ``accuracies`` of all draws; ``n``,
        the number of held-out images.

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
    n_views, units = len(every) // len(train), Units.of_groups(held_out.groups)
    fewest = min(map(len, members.values()))
    rng = np.random.default_rng(seed)
    draws = [_draw(members, most, rng) for _ in range(repeats)]
    curve = []
    with Stage("measuring the learning curve", len(set(shots)) * repeats, "fits") as stage:
        stage.at("learning curve")
        for n in sorted(set(shots)):
            right = []
            with each_warning_once():
                for draw in stage.each(draws):
                    images = np.concatenate([order[:n] for order in draw])
                    rows = (images[:, None] * n_views + np.arange(n_views)).ravel()
                    owners = [every.groups[i] for i in rows.tolist()]
                    fitted = clone(head).fit(every.X[rows], every.y[rows], groups=owners, views=n_views)
                    right.append(fitted.predict(held_out.X) == held_out.y)
            curve.append(_point(n, np.stack(right), units, n / fewest))
    return curve


def _members(train: Subset) -> dict[str, dict[bytes, NDArray[np.intp]]]:
    """The rows of each group of each class."""
    rows: dict[str, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (label, group) in enumerate(zip(train.y.tolist(), train.groups, strict=True)):
        rows[label][group].append(i)
    return {label: {group: np.array(each) for group, each in groups.items()} for label, groups in sorted(rows.items())}


def _draw(members: dict[str, dict[bytes, NDArray[np.intp]]], most: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """``most`` rows of each class in random order, all from different groups."""
    drawn, taken = [], set[bytes]()
    for label, groups in members.items():
        free = [group for group in groups if group not in taken]
        if len(free) < most:
            message = f"--few-shot {most}: class {label!r} shares its groups with other classes, and too few are left for it"
            raise BadDataError(message)
        chosen = [free[i] for i in rng.choice(len(free), most, replace=False)]
        drawn.append(np.array([rng.choice(groups[group]) for group in chosen]))
        taken.update(chosen)
    return drawn


def _point(shots: int, right: NDArray[np.bool_], units: Units, share: float) -> dict[str, Any]:
    """The accuracies of some draws, and the interval of their mean.

    Draws from the same few images are alike. Two of them that have a share f of their images in common are taken to correlate
    by f squared: their variance is too small by a factor of 1 - f^2, and f^2 of it does not average out.

    Args:
        shots: images of each class in a draw.
        right: which held-out images ``(draws, n)`` each draw's head classifies correctly.
        units: which of these belong together.
        share: of the class that has fewest images, how much a draw takes; if it is all, nothing is known of other images.
    """
    accuracies, alike, bounds = right.mean(axis=1), share**2, (0.0, 1.0)
    if share < 1:
        bounds = mean_interval(right, units, accuracies.var(ddof=1) / (1 - alike) * (1 / len(right) + alike))
    facts = {"shots": shots, "accuracy": float(accuracies.mean()), "accuracy_interval": list(bounds)}
    return {**facts, "accuracies": accuracies.tolist(), "n": len(units.of)}


def mean_interval(right: NDArray[np.bool_], units: Units, by_draw: float) -> Interval:
    """The 95 % interval of the accuracy that heads of other draws have on average, on other held-out images.

    What varies by image and what varies by draw are added, side by side (Zou & Donner 2008).

    Args:
        right: which held-out images ``(draws, n)`` each draw's head classifies correctly.
        units: which of these images belong together.
        by_draw: variance of the mean accuracy by draw.
    """
    each = right.mean(axis=0)
    mean, reach = float(each.mean()), draw_reach(len(right), by_draw)
    low, high = units.proportion(each)
    return max(mean - math.hypot(reach, mean - low), 0.0), min(mean + math.hypot(reach, high - mean), 1.0)


def draw_reach(count: int, by_draw: float) -> float:
    """Half of the 95 % interval of a mean over some draws that has this variance."""
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1)) * math.sqrt(by_draw)


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
