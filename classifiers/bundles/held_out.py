"""Evaluation of a bundle, or of a fitted head, on held-out images.

Training uses the splits like this:

- ``test`` present: choose on ``val`` if there is one (otherwise k-fold inside ``train``), refit on both, report on ``test``;
- only ``train`` and ``val``: ``val`` is held out and every choice is made by k-fold inside ``train``;
- nothing held out: everything is fitted, nothing reported.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import averaged
from classifiers.evaluation.single_label import score
from classifiers.evaluation.task import Evaluation, HeadTask, Measured, need_single_label
from classifiers.evaluation.units import Units
from classifiers.heads.solvers.cosines import unit_rows
from classifiers.near_copies import most_images, near_copies
from extractor.data.files import GONE, MOVED, Files
from extractor.data.samples import in_words
from extractor.data.sources import Source, files_of, open_source
from store.cache import FeatureCache, Subset, is_cache
from store.errors import BadDataError, InputMissingError, display
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage, staged
from store.splits import groups_of, merge_groups, with_splits
from store.tasks import ONE_LABEL

from .bundle import Bundle, task_of_bundle
from .novelty import novel_share
from .predictions import Predictions
from .predictor import Predictor

log = logging.getLogger("penult.classifiers")

ACCEPTED = ("provider",)  # a difference of these is logged and accepted: CUDA and CPU agree to 1e-4


def predict_held_out(predictor: Predictor, rows: Sequence[Row], truth: NDArray[Any], files: Files, split: str) -> Predictions:
    """Predict held-out images; ``truth`` is `SampleTable.truth` of their rows.

    Raises:
        InputMissingError: one of them can no longer be read.
        BadDataError: one of them can no longer be decoded.
    """
    probabilities, novelty, features = [], [], []
    with Stage("predicting", len(rows), "images") as stage:
        for prediction in stage.each(predictor.predict((row.path for row in rows), files)):
            if prediction.code in GONE:
                message = f"cannot read {prediction.name}: {prediction.message}; {MOVED}"
                raise InputMissingError(message)
            if prediction.probabilities is None:
                message = f"{prediction.name}: {prediction.code}: {prediction.message}"
                raise BadDataError(message)
            probabilities.append(prediction.probabilities)
            if prediction.novelty is not None and prediction.features is not None:
                novelty.append(prediction.novelty)
                features.append(prediction.features)
    digests, paths = [row.sha256 for row in rows], [row.path for row in rows]
    scores = np.array(novelty, np.float32) if novelty else None
    X = np.stack(features) if features else None
    return Predictions(digests, paths, truth, np.stack(probabilities), split, scores, X, groups_of(rows))


@staged("evaluating")
def evaluate_bundle(
    bundle: str | Path | Bundle,
    data: str | Path | FeatureCache,
    *,
    split: str | None = None,
    root: Path | None = None,
    **predictor_options: Any,
) -> tuple[Evaluation | Measured, Predictions]:
    """A bundle's scores on a cache or a dataset, leaving out every image that was fitted or chosen on.

    Cached features are used if the fingerprint matches; otherwise the images go through the bundle's own backbone.

    Args:
        bundle: a bundle or its path.
        data: a cache or its path, or a dataset as for `penult extract`.
        split: the split to evaluate on; by default the one the bundle was reported on, or everything if there are no splits.
        root: where the images are, if they were moved since they were extracted.
        predictor_options: ``device``, ``batch_size``, ``workers``, ``accept_pixels``.

    Raises:
        BadDataError: all of these images were fitted, there is nothing to evaluate, or an output is not finite.
        FingerprintMismatchError: images must be embedded, and this machine decodes them to other pixels than in training.

    >>> import classifiers
    >>> evaluation, predictions = classifiers.evaluate_bundle("pets.head", "pets.cache")
    >>> evaluation
    <Evaluation: accuracy 1.0000 [0.6097, 1.0000] on 6 images of 'test'>
    >>> predictions.probabilities.shape
    (6, 2)
    """
    bundle = Bundle.opened(bundle)
    if not isinstance(data, FeatureCache) and is_cache(data):
        data = FeatureCache(data)
    cache, data = (data, data.path) if isinstance(data, FeatureCache) else (None, data)
    if cache is not None and bundle.backbone.layer in cache.layers:
        cache = cache.with_layer(bundle.backbone.layer)
    source = None
    if cache is None:
        source = open_source(data, root=root, task=bundle.task, targets=task_of_bundle(bundle).targets)
        _require_classes(source, bundle, split)
    predictor = None if cache is not None and _same_features(bundle, cache) else Predictor.of(bundle, **predictor_options)
    if predictor is not None:
        predictor.require_pixels()
    if source is None:
        assert cache is not None
        table = cache.samples
    else:
        from extractor.pipeline.run import survey
        from extractor.pipeline.settings import Options

        table = survey(source, bundle.backbone.preprocess, Options(val_fraction=0, test_fraction=0))
        if table.facts["budget_exceeded"]:
            message = f"{_failures(table)} of {data}: more than 1 %, so scores would not represent this dataset"
            raise BadDataError(message)
        if table.counts["failed"]:
            log.warning("%s; they are not in the scores", _failures(table))
    if table.task.name != bundle.task:
        message = f"{data} was extracted with --task {table.task.name}, and {bundle.name} is a head for {bundle.task}"
        raise BadDataError(message)
    if table.rows and not any(row.ok for row in table.rows):
        message = f"{data}: {_failures(table)}, so there is nothing to evaluate on"
        raise BadDataError(message)
    rows, name = _rows_of(table, bundle, split)
    fitted = bundle.fitted()
    fresh = [row for row in rows if row.sha256 not in fitted]
    if not fresh:
        message = f"all {len(rows)} images of {data}, split {name!r}, were fitted or chosen on when {bundle.name} was trained"
        raise BadDataError(message)
    if len(fresh) < len(rows):
        log.warning(
            "%d of %d images were fitted when %s was trained; they are left out", len(rows) - len(fresh), len(rows), bundle.name
        )
    if copies := len(fresh) - len({row.sha256 for row in fresh}):
        log.warning("%d of %d images are exact copies of others among them, and count again in the scores", copies, len(fresh))
    task_of_bundle(bundle).require_labels([row.label for row in fresh if row.label is not None], name)
    truth = table.truth(fresh, bundle.classes)
    if cache is not None and predictor is None:
        digests, paths = [row.sha256 for row in fresh], [row.path for row in fresh]
        features, novelty, views = cache.features(digests), bundle.novelty(), bundle.fingerprint.views
        inputs = features if views == 1 else np.asarray(cache.lazy(digests, views=True))
        probabilities = averaged(bundle.head_function()(inputs), views)
        scores = novelty.scores(features) if novelty else None
        predictions = Predictions(digests, paths, truth, probabilities, name, scores, features, groups_of(fresh))
    else:
        assert predictor is not None
        files = source.files if source is not None else files_of(table, root)
        predictions = predict_held_out(predictor, fresh, truth, files, name)
    task = task_of_bundle(bundle)
    predictions, leaks, near = _near_copies(bundle, predictions)
    evaluation = task.score(truth, predictions.probabilities, name, predictions.units)
    notes = evaluation.notes
    if leaks and near.any():
        note, without = score_without(task, evaluation.to_json(), predictions, near)
        notes, leaks = [*notes, note], leaks | without
    failed = 0 if cache is not None else table.counts["failed"]
    novel = None if predictions.novelty is None else novel_share(predictions.novelty, predictions.units)
    drift = predictor.pixel_drift.to_json() if predictor and predictor.pixel_drift else None
    return replace(evaluation, failed=failed, novelty=novel, pixel_drift=drift, notes=notes, leaks=leaks), predictions


def _near_copies(bundle: Bundle, held: Predictions) -> tuple[Predictions, dict[str, Any] | None, NDArray[np.bool_]]:
    """Look for near copies of fitted images among held-out ones, and of these among each other.

    Fitted images are those that the bundle keeps features of, at most `novelty.REFERENCE`. Their classes are what the head
    says; their length is not kept, so it is that of the others.

    Returns:
        The predictions with near copies as one group; what was seen, as JSON, or None without features; and which are copies.
    """
    near, recorded = np.zeros(len(held.paths), bool), _recorded_groups(bundle, held)
    if held.features is None:
        return replace(held, groups=recorded or held.groups), None, near
    novelty, X = bundle.novelty(), np.asarray(held.features, np.float32)
    reference = np.empty((0, X.shape[1]), np.float32) if novelty is None else novelty.reference
    first = np.unique(np.array(held.sha256, dtype=object), return_index=True)[1]
    first = np.sort(first)[: max(most_images(len(reference) + len(first), X.shape[1]) - len(reference), 0)]
    labels = None
    if task_of_bundle(bundle).exclusive:
        length = np.float32(np.median(np.linalg.norm(X, axis=1)))
        guessed = bundle.head_function()(reference * length).argmax(axis=1) if len(reference) else []
        labels = [*(str(bundle.classes[k]) for k in guessed), *held.labels[first].tolist()]
    copies = near_copies(np.concatenate([reference, unit_rows(X[first])]), labels)
    units, known = copies.units[len(reference) :], set(copies.units[: len(reference)].tolist())
    name = {unit: held.sha256[i] for unit, i in zip(units.tolist(), first.tolist(), strict=True)}
    of = {held.sha256[i]: unit for unit, i in zip(units.tolist(), first.tolist(), strict=True)}
    near[:] = [of.get(digest) in known for digest in held.sha256]
    groups = recorded or merge_groups(held.groups, [name[of[each]] if each in of else each for each in held.sha256])
    together = len(set(held.groups)) - len(set(groups))
    fitted = len(bundle.fitted())
    kept = min(len(reference), fitted)  # of exact copies, all are kept
    names = [display(path) for path, copy in zip(held.paths, near.tolist(), strict=True) if copy]
    searched = f"{kept} of {fitted} fitted images"
    if names:
        what = "%d of %d images look like copies of fitted ones (of %s): %s"
        log.warning(what, len(names), len(near), searched, in_words(names))
    elif kept < fitted:
        log.info("near copies of fitted images were looked for among %s", searched)
    if together and not recorded:
        what = "some images look like near copies of each other, and count as one: %d images are of %d groups"
        log.warning(what, len(near), len(set(groups)))
    leaks = {"near": names, "fitted_searched": kept, "fitted": fitted, "searched": len(of) == len(set(held.sha256))}
    return replace(held, groups=groups), leaks, near


def _recorded_groups(bundle: Bundle, held: Predictions) -> list[bytes]:
    """The groups of training, if these are images that the bundle was reported on, so that both say the same; else none."""
    reported = bundle.predictions() if bundle.metrics is not None else None
    groups = dict(zip(reported.sha256, reported.groups, strict=True)) if reported and reported.groups else {}
    return [groups[digest] for digest in held.sha256] if set(held.sha256) <= groups.keys() else []


def score_without(
    task: HeadTask, metrics: dict[str, Any], held: Predictions, near: NDArray[np.bool_]
) -> tuple[str, dict[str, Any]]:
    """What the score is without images that look like fitted ones, in words and as JSON; there is none if all do."""
    keep = ~near
    if not keep.any():
        return f"all {len(near)} images look like copies of fitted ones, so this says nothing of new images", {"n_without": 0}
    without = task.score(held.labels[keep], held.probabilities[keep], held.split, held.units.among(keep)).to_json()
    note = (
        f"{task.headline(metrics)} with, {task.headline(without)} without the {int(near.sum())} image(s) that look like "
        f"copies of fitted ones"
    )
    return note, {"n_without": without["n"]} | ({"accuracy_without": without["accuracy"]} if "accuracy" in without else {})


def _is_own_data(bundle: Bundle, rows: Sequence[Row]) -> bool:
    """Whether the rows hold every image that the bundle was fitted on and reported on."""
    here = {row.sha256 for row in rows}
    held = set(bundle.predictions().sha256) if bundle.metrics is not None else set()
    return bundle.fitted() | held <= here


def _failures(table: SampleTable) -> str:
    codes = Counter(row.code for row in table.rows if row.code)
    listing = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
    return f"{sum(codes.values())} of {len(table.rows)} inputs cannot be used ({listing})"


def _require_classes(source: Source, bundle: Bundle, split: str | None) -> None:
    """Refuse labels that the head does not know, before any image is opened.

    Raises:
        BadDataError: see `HeadTask.require_labels`.
    """
    from extractor.pipeline.plan import listed_samples

    samples = [sample for sample in listed_samples(source) if sample.label is not None]
    name = _split_of(bundle, {sample.split for sample in samples}, split)
    labels = [str(sample.label) for sample in samples if name in (None, sample.split)]
    task_of_bundle(bundle).require_labels(labels, name or "")


def _split_of(bundle: Bundle, have: Set[str | None], split: str | None) -> str | None:
    """The split to evaluate on: ``split``, or the one that was held out in training; None for everything."""
    reported = bundle.split.get("reported_on")
    return split or (reported if reported in have else None)


def _rows_of(table: SampleTable, bundle: Bundle, split: str | None) -> tuple[list[Row], str]:
    rows = [row for row in table.rows if row.ok]
    if bundle.split.get("override") and _is_own_data(bundle, rows):  # it was trained on splits of its own
        reported = set(bundle.predictions().sha256) if bundle.metrics is not None else set[bytes]()
        rows = with_splits(rows, [bundle.split["reported_on"] if row.sha256 in reported else "train" for row in rows])
    have: set[str | None] = {row.split for row in rows if row.split}
    name = _split_of(bundle, have, split)
    if name is not None:
        rows = [row for row in rows if row.split == name]
        if not rows:
            message = f"there are no samples in split {name!r}; found {', '.join(sorted(map(str, have))) or 'no split at all'}"
            raise BadDataError(message)
    incomplete = table.task.incomplete(rows, bundle.classes)
    if incomplete:
        message = f"{len(incomplete)} of {len(rows)} samples {table.task.lacking} to compare with"
        raise BadDataError(message)
    return rows, name or "all"


def _same_features(bundle: Bundle, cache: FeatureCache) -> bool:
    fingerprint = cache.fingerprint if bundle.views else cache.fingerprint.single
    differences = bundle.fingerprint.differences(fingerprint, ignore=ACCEPTED)
    for name, (mine, theirs) in bundle.fingerprint.differences(fingerprint).items():
        if not differences:
            log.warning("%s differs: %s was trained with %s, %s holds %s", name, bundle.name, mine, cache.path, theirs)
    if differences:
        log.info(
            "%s holds other features than %s takes (%s): embedding the images", cache.path, bundle.name, ", ".join(differences)
        )
    return not differences


def evaluate(head: Any, subset: Subset) -> Evaluation:
    """Evaluate a fitted head (``classes_`` and ``predict_proba``) on cached features.

    Raises:
        UsageError: the head is for several labels or for numbers; for these, use `HeadTask.score`.

    >>> import classifiers, store
    >>> train, test = store.FeatureCache("pets.cache").split(test=0.2)
    >>> head = classifiers.CentroidHead().fit(train.X, train.y)
    >>> classifiers.evaluate(head, test).n
    6
    """
    from classifiers.heads.search import Head

    own = isinstance(head, Head)
    need_single_label(head.task if own else ONE_LABEL.name, "classifiers.evaluate")
    return score(
        subset.y,
        head.predict_proba(subset.X),
        [str(label) for label in head.classes_],
        subset.name,
        units=Units.of_groups(subset.groups),
        temperature=head.temperature_ if own else None,
        conformal=head.conformal_ if own else None,
    )
