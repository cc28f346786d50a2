"""Learning curve of a bundle: its head refitted on shares of the training images, to see whether more labels would help."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.held_out import ACCEPTED
from classifiers.evaluation.intervals import Interval, bounds, signed
from classifiers.evaluation.paired_tests import mean_change_interval
from classifiers.evaluation.units import Units
from classifiers.heads.registry import make_head
from classifiers.training.few_shot import draw_reach, each_warning_once, mean_interval
from classifiers.training.leaks import look
from classifiers.training.roles import Roles
from store.cache import FeatureCache, Subset
from store.errors import BadDataError, FingerprintMismatchError
from store.progress.stages import Stage

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
    larger draws contain the smaller ones. Intervals are for these training images: what other draws from them give, on other
    held-out images.

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
    points, gain = measured_curve(head, train, held_out, repeats=repeats, seed=seed)
    sentence = _sentence(points, gain["value"], gain["interval"], Units.of_groups(held_out.groups), worthwhile)
    return LabelCurve(bundle.name, points, gain, sentence)


def measured_curve(
    head: Any, train: Subset, held_out: Subset, *, repeats: int = REPEATS, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The points and the gain of a `LabelCurve`, of clones of an unfitted head."""
    rng = np.random.default_rng(seed)
    classes = groups_by_class(train)
    draws = [shuffled(classes, rng) for _ in range(repeats)]
    right, images = [], []
    fits = sum(repeats if share < 1 else 1 for share in SHARES)
    with each_warning_once(), Stage("measuring the learning curve", fits, "fits") as stage:
        stage.at("learning curve")
        for share in SHARES:
            rows = [rows_of(train, draw, share) for draw in (draws if share < 1 else draws[:1])]
            right.append(np.stack([_refit(head, train, each, held_out) for each in stage.each(rows)]))
            images.append(round(np.mean([len(each) for each in rows])))
            log.info("refitted on %d of %d training images, %d draw(s)", images[-1], len(train), len(rows))
    units = Units.of_groups(held_out.groups)
    points = []
    for share, count, each in zip(SHARES, images, right, strict=True):
        interval = mean_interval(each, units, by_draw(each, units)) if len(each) > 1 else units.proportion(each[0])
        facts = {"share": share, "images": count, "accuracy": float(each.mean()), "accuracy_interval": interval}
        points.append({**facts, "accuracies": each.mean(axis=1).tolist()})
    gain = {"value": points[-1]["accuracy"] - points[-2]["accuracy"], "interval": gain_interval(right[-2], right[-1], units)}
    return points, gain


def gain_interval(before: NDArray[np.bool_], after: NDArray[np.bool_], units: Units) -> Interval:
    """The 95 % interval of the difference of mean accuracies, of what varies by draw and by image (Zou & Donner 2008).

    Args:
        before, after: which held-out images ``(draws, n)`` each draw's head classifies correctly; one draw is all images.
        units: which of these images belong together.
    """
    gained = after.mean(axis=0) - before.mean(axis=0)
    low, high = mean_change_interval(gained, units)
    reaches = (draw_reach(len(each), by_draw(each, units)) for each in (before, after) if len(each) > 1)
    value, reach = float(gained.mean()), math.hypot(*reaches)
    return max(value - math.hypot(reach, value - low), -1.0), min(value + math.hypot(reach, high - value), 1.0)


def by_draw(right: NDArray[np.bool_], units: Units) -> float:
    """Variance of the mean accuracy of some draws by which training images they take.

    Draws also differ by which of the held-out images each happens to get right. That is in the interval over images already,
    and counting it twice made it too wide.

    Args:
        right: which held-out images ``(draws, n)`` each draw's head classifies correctly.
        units: which of these images belong together.
    """
    count, n = right.shape
    own = right - right.mean(axis=0)
    by_image = sum(units.design(each)[0] * float(each.var()) for each in own) / (n * (count - 1))
    variance: float = right.mean(axis=1).var(ddof=1) - by_image
    return max(variance, 0.0) / len(right)


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
    if bundle.split.get("near_copies", {}).get("grouped"):  # as in training
        here = set(held.sha256)
        report = [row for row in cache.rows() if row.sha256 in here]
        rows = look(cache, Roles(rows, [], report, {}))[0].fit
    groups = list(held.groups or held.sha256)
    return cache.of_rows(rows, "train"), Subset(X, held.labels, held.sha256, held.paths, groups, held.split)


def groups_by_class(train: Subset) -> list[list[bytes]]:
    """The groups of each class; a group belongs to its most frequent class."""
    labels: dict[bytes, Counter[str]] = defaultdict(Counter)
    for group, label in zip(train.groups, train.y.tolist(), strict=True):
        labels[group][label] += 1
    of_class: dict[str, list[bytes]] = defaultdict(list)
    for group in sorted(labels):
        of_class[labels[group].most_common(1)[0][0]].append(group)
    return [groups for _, groups in sorted(of_class.items())]


def shuffled(classes: Sequence[Sequence[bytes]], rng: np.random.Generator) -> list[list[bytes]]:
    """The groups of each class in random order."""
    return [[groups[i] for i in rng.permutation(len(groups))] for groups in classes]


def rows_of(train: Subset, ranked: Sequence[Sequence[bytes]], share: float) -> NDArray[np.intp]:
    chosen = {group for groups in ranked for group in groups[: int(np.ceil(share * len(groups)))]}
    return np.array([i for i, group in enumerate(train.groups) if group in chosen], np.intp)


def _refit(head: Any, train: Subset, rows: NDArray[np.intp], held_out: Subset) -> NDArray[np.bool_]:
    """Which held-out images ``(n,)`` a head fitted on some rows classifies correctly."""
    from sklearn.base import clone

    fitted = clone(head).fit(train.X[rows], train.y[rows], groups=[train.groups[i] for i in rows])
    return np.asarray(fitted.predict(held_out.X) == held_out.y)


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
    often = f" With {units.count} groups, intervals of this curve hold in 92 to 99 % of cases." if units.scarce else ""
    return f"{what} {bounds(interval)}: {then}.{often}"
