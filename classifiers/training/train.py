"""Training of a head on a cache in four steps: prepare, fit, judge, save. Fine-tuning shares the last (see `finetune`)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classifiers.bundles.bundle import Bundle, save_bundle
from classifiers.bundles.bundle_folder import reserved
from classifiers.bundles.held_out import score_without
from classifiers.bundles.novelty import Novelty, novel_share
from classifiers.bundles.predictions import Predictions
from classifiers.evaluation.probabilities import averaged
from classifiers.evaluation.registry import task_of
from classifiers.evaluation.task import HeadTask, need_single_label
from classifiers.heads.registry import make_head, name_of, need_saveable, need_task, settings_of
from classifiers.reports.bundle_page import bundle_report
from classifiers.reports.illustrations import Illustrations, files_or_none, illustrate
from extractor.machine import Clock, Meter, Spent, new_clock, timed, together
from store.cache import FeatureCache, Subset
from store.errors import UsageError, display
from store.fingerprint import VIEWS
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage, staged

from .few_shot import learning_curve
from .int8_check import judge_rounding
from .leaks import LeakReport, guard, look
from .memory import must_stream
from .roles import Roles, assign_roles, inner_validation
from .settings import TrainOptions

if TYPE_CHECKING:
    from classifiers.heads.search import Head

log = logging.getLogger("penult.classifiers")

INNER = "a fifth of train, by hash rank"


@dataclass(frozen=True)
class Prepared:
    """The data that a head is fitted and judged on.

    Attributes:
        cache: of the features.
        options: how a head is trained.
        split: facts about it.
        fitted: everything that is fitted or chosen on, one view of each image.
        held_out: what is reported on; None for nothing.
        train_views: what a head is fitted on: the first of ``fitted``, in all views.
        rows: of these images.
        chosen_on: what choices are made on, in all views; None for folds of ``train_views``.
        views: their part of the fingerprint, and whether outputs are ``averaged``; None if each image has one view.
        leaks: images on both sides of the split, and repeated scenes; None if they were not searched.
        origin: the digest of `made_from`, by which a later run recognises this one.
        clock: seconds by stage.
    """

    cache: FeatureCache
    options: TrainOptions
    split: dict[str, Any]
    fitted: Sequence[Subset]
    held_out: Subset | None
    train_views: Subset
    rows: Sequence[Row] = ()
    chosen_on: Subset | None = None
    views: dict[str, Any] | None = None
    leaks: LeakReport | None = None
    origin: str = ""
    clock: Clock = field(default_factory=new_clock)


@dataclass(frozen=True)
class Fitted:
    """A fitted head.

    Attributes:
        head: the head.
        spent: time and memory of training.
        rounding: the result of `judge_rounding`, for an int8 cache.
        few_shot: the result of `learning_curve`.
    """

    head: Head
    spent: Spent | None = None
    rounding: dict[str, Any] | None = None
    few_shot: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Judged:
    """Everything that goes into a bundle.

    Attributes:
        bundle: its facts.
        backbone: the network, or the cache that has it.
        head: ONNX bytes.
        fitted: content digests of everything that was fitted or chosen on.
        predictions: for the held-out images.
        shown: mistakes and map of these images.
        novelty: the detector of images that are unlike the fitted ones.
        clock: seconds by stage.
    """

    bundle: Bundle
    backbone: FeatureCache | Path
    head: bytes
    fitted: Sequence[bytes]
    predictions: Predictions | None = None
    shown: Illustrations | None = None
    novelty: Novelty | None = None
    clock: Clock = field(default_factory=new_clock)


@staged("training")
def train(
    cache: str | Path | FeatureCache,
    bundle: str | Path,
    head: str | Head | None = None,
    options: TrainOptions | None = None,
    *,
    overwrite: bool = False,
) -> Bundle:
    """Fit a head on a cache's training images, evaluate it on the held-out ones and save it as a bundle.

    Args:
        cache: the features, opened or not.
        bundle: the folder of the bundle.
        head: a name such as ``"logistic"``, or an unfitted estimator such as `LogisticHead`; by default the first for the task.
        options: seed, split, learning curve and more, see docs/options.md.
        overwrite: replace an existing bundle.

    Raises:
        BadDataError: the data cannot be trained on, or int8 features cost too much accuracy; says why.
        UsageError: the head cannot be saved, is for another task than the samples, or needs more memory than it may have.
        OutputExistsError: the bundle exists.
        LockedError: another run has replaced the cache meanwhile, or makes a bundle there.

    >>> import classifiers
    >>> bundle = classifiers.train("pets.cache", "new.head", head="ridge")
    >>> bundle
    <Bundle new.head: ridge head for 2 classes, accuracy 1.0000 [0.6097, 1.0000] on 6 images of 'test'>
    """
    with reserved(Path(bundle), overwrite=overwrite):
        options, opened = options or TrainOptions(), cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
        named = head is None or isinstance(head, str)
        estimator: Any = make_head(head, opened.samples.task.name, seed=options.seed) if named else head
        clock = new_clock()
        with timed(clock, "data"):
            prepared = prepare(opened, estimator, options, clock)
        with timed(clock, "head"):
            fitted = fit(estimator, prepared)
        with timed(clock, "scores"):
            judged = judge(fitted, prepared)
        return save(judged, bundle, overwrite=overwrite)


def prepare(cache: FeatureCache, head: Head, options: TrainOptions, clock: Clock) -> Prepared:
    """Collect the rows of a cache by role, after checking that the head can be trained on them; ``leaks`` are timed apart.

    Raises:
        BadDataError, UsageError, LockedError: as `train`.
    """
    need_saveable(head)
    need_task(head, cache.samples.task.name)
    if options.few_shot:
        need_single_label(cache.samples.task.name, "--few-shot")
    if options.average_views and cache.views == 1:
        message = f"--average-views: {cache.path} has one view of each image; extract with --views 4 to have some"
        raise UsageError(message)
    origin = made_from(cache, head, options)
    roles = assign_roles(cache.samples, val=options.val_fraction, test=options.test_fraction, seed=options.seed)
    require_roles(cache.samples, roles)
    cache.require_backbone()
    rows = len(roles.fit) + len(roles.choose) + len(roles.report)
    lazy = must_stream(head, rows * cache.views, cache.dim, cache.dtype.itemsize, options.max_memory)
    with timed(clock, "leaks"):
        roles, leaks = look(cache, roles, group=options.near_copies == "group", in_memory=not lazy)
    guard(leaks, options.leaks)
    if lazy:
        roles = _for_streaming(roles, options.few_shot, seed=options.seed)
    train_views = fit = cache.of_rows(roles.fit, "train", lazy=lazy)
    chosen_on = choose = cache.of_rows(roles.choose, "val", lazy=lazy) if roles.choose else None
    held_out = cache.of_rows(roles.report, str(roles.facts["reported_on"]), lazy=lazy) if roles.report else None
    fitted, views = [fit, *([choose] if choose else [])], None
    if cache.views > 1:  # only for fitting and choosing; everything else uses the first view
        log.info("all %d views of each training image are fitted; choices are judged on the first", cache.views)
        train_views = cache.of_rows(roles.fit, "train", lazy=lazy, views=True)
        chosen_on = cache.of_rows(roles.choose, "val", lazy=lazy, views=True) if roles.choose else None
        views = {**cache.fingerprint.fields[VIEWS], "averaged": options.average_views}
    facts = (roles.facts, fitted, held_out, train_views, roles.fit, chosen_on, views, leaks, origin, clock)
    return Prepared(cache, options, *facts)


def fit(head: Head, prepared: Prepared) -> Fitted:
    """Search a head's settings and fit it; the learning curve is measured before, and the cost of int8 after.

    Raises:
        BadDataError: int8 features cost too much accuracy, or a class has too few images for the curve.
    """
    options, train_views, chosen_on = prepared.options, prepared.train_views, prepared.chosen_on
    curve = None
    if options.few_shot:
        sizes = options.few_shot, options.repeats
        with timed(prepared.clock, "few_shot"):
            curve = learning_curve(head, prepared.fitted[0], prepared.held_out, *sizes, seed=options.seed, views=train_views)
    meter = Meter(head.device)
    validation = (chosen_on.X, chosen_on.y) if chosen_on else None
    groups = [*train_views.groups, *(chosen_on.groups if chosen_on else ())]
    with Stage(f"fitting the {name_of(head)} head"):
        head.fit(train_views.X, train_views.y, validation=validation, groups=groups, views=prepared.cache.views)
    spent = meter.read()
    with timed(prepared.clock, "int8_check"):
        rounding = judge_rounding(prepared.cache, head, prepared.rows)
    return Fitted(head, spent, rounding, curve)


@staged("judging the head")
def judge(fitted: Fitted, prepared: Prepared) -> Judged:
    """Evaluate a fitted head on the held-out images, and collect what goes into the bundle."""
    from extractor.graphs.backbone_facts import read_facts

    cache, head, held_out, views = prepared.cache, fitted.head, prepared.held_out, prepared.views
    need_saveable(head)
    metrics = predictions = shown = None
    novelty = Novelty.fit(prepared.fitted)
    names = list(head.fitted_.classes) if cache.samples.task.stratifies else cache.samples.outputs
    conformal = head.conformal_ and head.conformal_.to_json()
    averaging = bool(views and views["averaged"])
    temperature = None if averaging else head.temperature_  # a mean of probabilities has no single temperature
    task = task_of(cache.samples.task.name, names, conformal, temperature)
    if held_out is not None:
        X = cache.lazy(held_out.sha256, views=True) if averaging else held_out.X
        probabilities = averaged(head.fitted_.probabilities(X), cache.views if averaging else 1)
        facts = (held_out.sha256, held_out.paths, held_out.y, probabilities, held_out.name)
        predictions = Predictions(*facts, groups=held_out.groups)
        evaluation = task.score(held_out.y, probabilities, held_out.name, predictions.units)
        novel = novel_share(novelty.scores(held_out.X), predictions.units) if novelty else None
        notes = [*evaluation.notes, *weight_notes(getattr(head, "class_weight", None))]
        metrics = replace(evaluation, novelty=novel, notes=notes).to_json()
        if task.exclusive:
            files = files_or_none(cache.samples) if prepared.options.thumbnails else None
            with timed(prepared.clock, "report"):
                shown = illustrate(predictions, names, X=held_out.X, fitted=prepared.fitted, files=files)
        if prepared.leaks is not None:
            add_leaks(metrics, prepared.leaks, predictions, task)
    else:
        log.warning("nothing is held out, so this head gets no scores")
    spent = fitted.spent
    bundle = Bundle(
        path=Path(),
        kind="frozen",
        head=name_of(head),
        task=task.name,
        classes=names,
        backbone=read_facts(cache.path, cache.read_backbone()).only(cache.layer),
        fingerprint=cache.fingerprint if averaging else cache.fingerprint.single,
        split=prepared.split if head.history_ else {**prepared.split, "chosen_on": None},
        hyperparameters={
            **head.hyperparameters_,
            "temperature": temperature,
            **({"views": views} if views else {}),
            "asked": settings_of(head),
        },
        history=list(head.history_),
        made_from=prepared.origin,
        metrics=metrics,
        conformal=conformal,
        rounding=fitted.rounding,
        few_shot=fitted.few_shot,
        cost={
            "train_seconds": round(spent.seconds, 3) if spent else 0.0,
            "extract_seconds": cache.samples.facts.get("extract_seconds", 0.0),
            "images": cache.samples.counts["ok"] * cache.views,
            "extract_energy": (cache.samples.facts.get("extract_cost") or {}).get("energy"),
            **together(cache.samples.facts.get("extract_cost"), spent.facts() if spent else None),
        },
    )
    digests = [digest for subset in prepared.fitted for digest in subset.sha256]
    return Judged(bundle, cache, head.fitted_.to_onnx(), digests, predictions, shown, novelty, prepared.clock)


@staged("saving the bundle and its report")
def save(judged: Judged, out: str | Path, *, overwrite: bool = False) -> Bundle:
    """Write the bundle, with its report, and add up the times.

    Raises:
        OutputExistsError: it exists, or something else does.
        LockedError: another run has replaced the cache meanwhile.
    """
    bundle, clock = replace(judged.bundle, path=Path(out)), judged.clock
    with timed(clock, "report"):
        page = bundle_report(bundle, judged.predictions, judged.shown)
    with timed(clock, "save"):
        saved = _saved(judged, bundle, page, overwrite=overwrite)
    every = {**clock, "total": sum(clock.values())}
    return replace(saved, seconds={stage: round(seconds, 3) for stage, seconds in every.items()})


def _saved(judged: Judged, bundle: Bundle, page: str, *, overwrite: bool) -> Bundle:
    return save_bundle(
        bundle,
        backbone=judged.backbone,
        head=judged.head,
        predictions=judged.predictions,
        fitted=judged.fitted,
        novelty=judged.novelty.to_bytes() if judged.novelty else None,
        page=page,
        overwrite=overwrite,
    )


def save_head(
    cache: FeatureCache,
    out: str | Path,
    head: Head,
    *,
    fitted: Sequence[Subset],
    held_out: Subset | None,
    overwrite: bool = False,
) -> Bundle:
    """Save a head that was fitted elsewhere as a bundle.

    Args:
        cache: where its features came from; gives the backbone and the fingerprint.
        out: the bundle's folder.
        head: a fitted one of `registry.rows`.
        fitted: everything it was fitted or chosen on; `evaluate_bundle` will refuse these images.
        held_out: what it is reported on; None for nothing.
        overwrite: replace an existing bundle.

    >>> import classifiers, store
    >>> cache = store.FeatureCache("pets.cache")
    >>> train, test = cache.split(test=0.25)
    >>> head = classifiers.LogisticHead(C=1.0).fit(train.X, train.y)
    >>> classifiers.save_head(cache, "mine.head", head, fitted=[train], held_out=test).split["reported_on"]
    'test'
    """
    need_saveable(head)
    split = {"reported_on": held_out.name if held_out else None, "rule": "caller"}
    prepared = Prepared(cache, TrainOptions(thumbnails=False), split, fitted, held_out, fitted[0])
    return save(judge(Fitted(head), prepared), out, overwrite=overwrite)


def _for_streaming(roles: Roles, few_shot: Sequence[int], *, seed: int) -> Roles:
    """Choose on one validation part instead of folds, because every pass over the features takes time.

    Raises:
        UsageError: a learning curve is among the options.
    """
    if few_shot:
        message = "--few-shot needs all features in memory, and they do not fit; raise --max-memory, or omit --few-shot"
        raise UsageError(message)
    if roles.choose:
        return roles
    fit, choose = inner_validation(roles.fit, seed=seed)
    return replace(roles, fit=fit, choose=choose, facts={**roles.facts, "chosen_on": INNER})


def add_leaks(metrics: dict[str, Any], leaks: LeakReport, held_out: Predictions, task: HeadTask) -> None:
    """Add the leaks to the metrics, and the score without the images that look like fitted ones."""
    metrics["leaks"] = leaks.to_json()
    if leaks.repeats and leaks.repeats.grouped:
        metrics["notes"].append(f"{leaks.repeats.images} images count as {leaks.repeats.groups}: they look like near copies")
    names = {leak.path for leak in leaks.near}
    near = np.array([display(path) in names for path in held_out.paths])
    if near.any():
        note, without = score_without(task, metrics, held_out, near)
        metrics["notes"].append(note)
        metrics["leaks"] |= without


def weight_notes(class_weight: Any) -> list[str]:
    """What is to be said of the probabilities of a head whose classes were weighed."""
    if class_weight is None:
        return []
    means = "as if every class had the same number of images" if class_weight == "balanced" else "as its weights say"
    return [
        f"the classes were weighed: the probabilities are {means}. Take them as scores, and not as the share of images "
        f"that are of a class (class-wise ECE says how far they are from that)"
    ]


def made_from(cache: FeatureCache, head: Any, options: TrainOptions) -> str:
    """Hexadecimal digest of everything that decides what `train` makes; its ingredients must not change."""
    rows = [(row.sha256.hex(), row.label, row.split, row.group.hex(), *row.targets) for row in cache.rows()]
    facts = [
        cache.fingerprint.fields,
        rows,
        type(head).__name__,
        head.get_params(),
        options.own_split,
        cache.samples.facts.get("split"),
    ]
    facts += [] if options.thumbnails else ["no pictures"]
    facts += ["average views"] if options.average_views else []
    facts += ["near copies are images"] if options.near_copies == "ignore" else []
    facts += [["few shot", options.few_shot, options.repeats, options.seed]] if options.few_shot else []
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def require_roles(table: SampleTable, roles: Roles) -> None:
    """Refuse samples that no head can be trained on; see `HeadTask.require`."""
    parts = [(roles.fit, "train"), (roles.choose, roles.facts["chosen_on"]), (roles.report, roles.facts["reported_on"])]
    task_of(table.task.name, table.outputs).require(table, [(rows, str(name)) for rows, name in parts])
