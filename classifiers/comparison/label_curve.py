"""Learning curve of a bundle: its head refitted on shares of the training images, to see whether more labels would help."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.held_out import ACCEPTED
from classifiers.evaluation.intervals import Interval, bounds, resamples_for, signed
from classifiers.evaluation.paired_tests import difference_interval
from classifiers.evaluation.units import Units
from classifiers.heads.registry import make_head
from classifiers.training.few_shot import each_warning_once
from store.cache import FeatureCache, Subset
from store.errors import BadDataError, FingerprintMismatchError

log = logging.getLogger("penult.classifiers")

SHARES = (0.1, 0.25, 0.5, 1.0)
REPEATS = 5


@dataclass(frozen=True)
class LabelCurve:
    """Accuracy by number of labelled images.

    Attributes:
        head: the bundle whose head was refitted.
        points: for each share: ``share``, ``images`` (on average), ``accuracy`` (mean of the draws), ``accuracy_interval`` and
            the ``accuracies`` of the draws; of all images there is one draw.
        gain: ``value`` and ``interval`` of the gain in accuracy from the second half of the images.
        sentence: whether more labels would help, in words.
    """

    head: str
    points: list[dict[str, Any]]
    gain: dict[str, Any]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def label_curve(bundle: Bundle, cache: FeatureCache, *, worthwhile: float, repeats: int = REPEATS, seed: int = 0) -> LabelCurve:
    """Refit the head of a frozen bundle, with the settings it was trained with, on shares of its training images.

    The head chooses its settings by folds inside the draw. Draws take the same share of each class and split no group;
    larger draws contain the smaller ones. Intervals are of a bootstrap over both held-out images and draws (Owen 2007).

    Args:
        bundle: the frozen bundle.
        cache: the cache it was trained from.
        worthwhile: the smallest difference of accuracy that matters, as a share.
        repeats: draws of each share.
        seed: of the draws.

    Raises:
        FingerprintMismatchError: the cache holds other features.
        BadDataError: the cache lacks images of the bundle.
    """
    train, held_out = _samples(bundle, cache)
    if "asked" not in bundle.hyperparameters:
        log.warning(
            "%s does not record the settings it was trained with; the learning curve uses the current defaults", bundle.name
        )
    head = make_head(bundle.head, bundle.task, **bundle.hyperparameters.get("asked", {}))
    rng = np.random.default_rng(seed)
    draws = [_ranked_groups(train, rng) for _ in range(repeats)]
    right, images = [], []
    with each_warning_once():
        for share in SHARES:
            rows = [_rows(train, draw, share) for draw in (draws if share < 1 else draws[:1])]
            right.append(np.stack([_refit(head, train, each, held_out) for each in rows]))
            images.append(round(np.mean([len(each) for each in rows])))
            log.info("refitted on %d of %d training images, %d draw(s)", images[-1], len(train), len(rows))
    units = Units.of_groups(held_out.groups)
    drawn = _resampled_accuracies(held_out.y, right, seed, units)
    points = []
    for share, count, each, values in zip(SHARES, images, right, drawn, strict=True):
        accuracy = float(each.mean())
        interval = units.bootstrap(accuracy, values) or units.proportion(each.mean(axis=0))
        accuracies = each.mean(axis=1).tolist()
        points.append(
            {"share": share, "images": count, "accuracy": accuracy, "accuracy_interval": interval, "accuracies": accuracies}
        )
    value = points[-1]["accuracy"] - points[-2]["accuracy"]
    gained = right[-1].mean(axis=0) - right[-2].mean(axis=0)  # by each image
    interval = difference_interval(gained, drawn[-1] - drawn[-2], units)
    sentence = _sentence(points, value, interval, units, worthwhile)
    return LabelCurve(bundle.name, points, {"value": value, "interval": interval}, sentence)


def _samples(bundle: Bundle, cache: FeatureCache) -> tuple[Subset, Subset]:
    """The images that the bundle was fitted or chosen on, and its held-out images."""
    if bundle.backbone.layer in cache.layers:
        cache = cache.with_layer(bundle.backbone.layer)
    differences = bundle.fingerprint.single.differences(cache.fingerprint.single, ignore=ACCEPTED)  # one view is fitted
    if differences:
        listing = ", ".join(differences)
        message = f"{cache.path} holds other features than {bundle.name} takes ({listing}); name the cache it was trained from"
        raise FingerprintMismatchError(message)
    fitted, held = bundle.fitted(), bundle.predictions()
    rows = [row for row in cache.rows() if row.sha256 in fitted]
    lacking = len((fitted | set(held.sha256)) - {row.sha256 for row in cache.rows()})
    if lacking:
        message = (
            f"{cache.path} lacks {lacking} images that {bundle.name} was trained or measured on; name the cache it is from"
        )
        raise BadDataError(message)
    X = cache.features(held.sha256)
    return cache.of_rows(rows, "train"), Subset(X, held.labels, held.sha256, held.paths, list(held.sha256), held.split)


def _ranked_groups(train: Subset, rng: np.random.Generator) -> list[list[bytes]]:
    """Groups in random order for each class; a group belongs to its most frequent class."""
    labels: dict[bytes, Counter[str]] = defaultdict(Counter)
    for group, label in zip(train.groups, train.y.tolist(), strict=True):
        labels[group][label] += 1
    of_class: dict[str, list[bytes]] = defaultdict(list)
    for group in sorted(labels):
        of_class[labels[group].most_common(1)[0][0]].append(group)
    return [[groups[i] for i in rng.permutation(len(groups))] for _, groups in sorted(of_class.items())]


def _rows(train: Subset, ranked: Sequence[Sequence[bytes]], share: float) -> NDArray[np.intp]:
    chosen = {group for groups in ranked for group in groups[: int(np.ceil(share * len(groups)))]}
    return np.array([i for i, group in enumerate(train.groups) if group in chosen], np.intp)


def _refit(head: Any, train: Subset, rows: NDArray[np.intp], held_out: Subset) -> NDArray[np.bool_]:
    """Which held-out images ``(n,)`` a head fitted on some rows classifies correctly."""
    from sklearn.base import clone

    fitted = clone(head).fit(train.X[rows], train.y[rows], groups=[train.groups[i] for i in rows])
    return np.asarray(fitted.predict(held_out.X) == held_out.y)


def _resampled_accuracies(
    labels: NDArray[np.str_], right: Sequence[NDArray[np.bool_]], seed: int, units: Units
) -> list[NDArray[np.float64]]:
    """Mean accuracy ``(b,)`` of each share, with images and draws resampled alike for all shares."""
    strata = np.unique(labels, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    blocks = []
    for weights in units.resampled(strata, resamples_for(len(labels), int(strata.max()) + 1)):
        repeats = max(map(len, right))
        times = rng.multinomial(repeats, np.full(repeats, 1 / repeats), size=weights.shape[1]).T / repeats
        accuracies = [each.astype(np.float32) @ weights / weights.sum(axis=0) for each in right]  # (draws, b)
        blocks.append([(each * (times if len(each) > 1 else 1)).sum(axis=0) for each in accuracies])
    return [np.concatenate(parts).astype(np.float64) for parts in zip(*blocks, strict=True)]


def _sentence(points: Sequence[dict[str, Any]], value: float, interval: Interval, units: Units, worthwhile: float) -> str:
    what = f"From {points[-2]['images']} to {points[-1]['images']} training images accuracy changed by {signed(value)} points"
    if units.few:
        then = f"whether more labels would help cannot be told with {units.phrase}"
    elif interval[1] < worthwhile:
        then = "more labels would hardly help"
    elif interval[0] > 0:
        then = "more labels would help"
    else:
        then = f"whether more labels would help cannot be told with {units.phrase}"
    return f"{what} {bounds(interval)}: {then}."
