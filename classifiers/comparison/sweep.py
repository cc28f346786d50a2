"""A sweep over backbones: features cached and a head trained for each, on the same images and the same split."""

from __future__ import annotations

import csv
import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation import multi_label, regression
from classifiers.evaluation.multi_label import MultiLabel
from classifiers.evaluation.registry import task_of
from classifiers.evaluation.regression import Regression
from classifiers.evaluation.scores import Values, Weights, require_finite
from classifiers.evaluation.single_label import SingleLabel
from classifiers.evaluation.task import Evaluation, HeadTask
from classifiers.evaluation.units import Units
from classifiers.heads.folds import Fold, group_folds, stratified_folds
from classifiers.heads.registry import make_head, name_of
from classifiers.training.leaks import look
from classifiers.training.roles import Roles, assign_roles
from extractor.backbones.registry import WEIGHTS_SUFFIXES, Backbone, check_request
from extractor.data.sources import Source
from extractor.pipeline.plan import devices_of, list_samples
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import PENULTIMATE, FeatureCache, is_cache
from store.errors import (
    BadDataError,
    InputMissingError,
    InterruptedRunError,
    OutputError,
    OutputExistsError,
    PenultError,
    StorageError,
    UsageError,
)
from store.format import atomic
from store.format.output import write_output
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage, staged
from store.splits import groups_of

from .ranking import Failure, Headline, Line, Ranking, failure, ranked
from .ranking_page import ranking_page
from .transferability import transferability

log = logging.getLogger("penult.classifiers")

PAGE = "sweep.html"
FOLDS = 5
LONGEST = 100  # characters of a cache's name
OF_FILES = ("mean", "std", "input_range", "interpolation", "channels", "squash", "layout")
_WEIGHTS = "|".join(map(re.escape, WEIGHTS_SUFFIXES))
SOURCE = re.compile(  # a path may have any character, because it ends at its suffix
    rf"(?P<name>.+\.onnx|[^=@]+)(?:=(?P<weights>.+(?:{_WEIGHTS})|[^@]+))?(?P<layers>(?:@[^@]+)*)", re.IGNORECASE
)


def parse_sources(texts: Sequence[str], shared: Backbone) -> list[Backbone]:
    """What ``-m`` means: ``NAME``, ``NAME=WEIGHTS`` or ``FILE.onnx``, each with any number of ``@LAYER``.

    Args:
        texts: several sources in one text are separated by commas, as fields of a CSV line (quoted if a path has a comma).
        shared: the settings of pixels and pooling; each backbone takes those for its kind.

    Returns:
        One backbone for each network with its weights, in the order in which they are named first, with all of its layers:
        they come from one pass.

    Raises:
        UsageError: a source cannot be parsed, or a flag is for none of them.
    """
    layers: dict[tuple[str, str | None], set[str]] = {}
    for text in texts:
        for item in map(str.strip, next(csv.reader([text], skipinitialspace=True)) or [""]):
            match = SOURCE.fullmatch(item)
            if not match:
                message = f"-m {item!r}: expected NAME, NAME=WEIGHTS or FILE.onnx, with @LAYER after it for other layers"
                raise UsageError(message)
            names = match["layers"].split("@")[1:] or [PENULTIMATE]
            layers.setdefault((match["name"], match["weights"]), set()).update(names)
    backbones = []
    for (name, weights), names in layers.items():
        backbone = replace(shared, name=name, weights=weights, layers=() if names == {PENULTIMATE} else tuple(sorted(names)))
        others: dict[str, Any] = dict.fromkeys(() if backbone.is_file else OF_FILES)
        if backbone.is_file or backbone.weights_file is None:
            others["preset"] = None
        backbones.append(replace(backbone, **others))
    _refuse_unused(shared, backbones)
    return backbones


def _refuse_unused(shared: Backbone, backbones: Sequence[Backbone]) -> None:
    for name in ("preset", *OF_FILES):
        if getattr(shared, name) is not None and all(getattr(each, name) is None for each in backbones):
            kind = "a .pth file" if name == "preset" else "an ONNX file"
            message = f"--{name.replace('_', '-')} is for {kind}, and -m names none; leave it out"
            raise UsageError(message)


def label_of(backbone: Backbone) -> str:
    """A backbone as written after ``-m``, without folders."""
    weights = backbone.weights_file.name if backbone.weights_file else backbone.weights
    return (Path(backbone.name).name if backbone.is_file else backbone.name) + (f"={weights}" if weights else "")


def cache_paths(backbones: Sequence[Backbone], folder: Path) -> list[Path]:
    """The cache of each backbone: the same name for the same request in every run.

    Raises:
        UsageError: two of them would have the same name.
    """
    paths: list[Path] = []
    for backbone in backbones:
        several = f"{len(backbone.layers)}-layers" if len(backbone.layers) > 1 else ""
        name = "@".join([label_of(backbone), *([several] if several else backbone.layers)])
        name = re.sub(r"[^\w.+@=-]+", "_", name, flags=re.ASCII)
        if several or len(name) > LONGEST:
            whole = "@".join([label_of(backbone), *backbone.layers])
            name = f"{name[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
        path = folder / f"{name}.cache"
        if path in paths:
            message = f"two sources would both be kept in {path}; rename one of the files"
            raise UsageError(message)
        paths.append(path)
    return paths


WEIGHTED: dict[str, Callable[[NDArray[Any], NDArray[np.float32], Weights], Values]] = {  # the score that sources are ranked by
    SingleLabel.name: lambda right, _, weights: (right @ weights) / weights.sum(axis=0),
    MultiLabel.name: lambda truth, outputs, weights: multi_label.weighted_scores(truth, outputs, weights)[0][MultiLabel.metric],
    Regression.name: lambda truth, outputs, weights: regression.weighted_scores(truth, outputs, weights)["r2"].mean(axis=0),
}


@dataclass(frozen=True)
class _Extracted:
    """One feature set in a cache; ``computed`` counts the images of this run."""

    source: str
    cache: FeatureCache
    computed: int


def require_ready(backbones: Sequence[Backbone], folder: Path, options: Options) -> None:
    """Check names, folder and device before the data are read; a missing file is listed with its error later.

    Raises:
        UsageError: there are no such backbone or weights.
        OutputExistsError: the folder holds something other than a sweep.
        OutputError: nothing can be created in it.
        DeviceUnavailableError: the device is not available.
    """
    for backbone in backbones:
        with suppress(InputMissingError):
            check_request(backbone)
    ours = folder.is_dir() and all(
        item.name == PAGE or item.name.startswith(f".{PAGE}.") or item.suffix == ".cache" for item in folder.iterdir()
    )
    if is_cache(folder) or (folder.exists() and not ours):
        message = f"{folder} is not a folder of caches of a sweep; name a new folder"
        raise OutputExistsError(message)
    atomic.require_room(folder / PAGE)
    atomic.require_replaceable(folder / PAGE)
    devices_of(options)


@staged("comparing backbones")
def run_sweep(
    source: Source,
    backbones: Sequence[Backbone],
    folder: Path,
    options: Options,
    *,
    head: str | None = None,
    seed: int = 0,
    data: str = "",
) -> Ranking:
    """Extract with each backbone, train a head on each feature set, rank them, and write ``sweep.html``.

    A backbone that fails is listed with its error, and the others are ranked.

    Args:
        source: the images.
        backbones: see `parse_sources`.
        folder: for the caches, which are continued, and the page, which is replaced.
        options: of the extractions.
        head: see `make_head`.
        seed: of heads and folds.
        data: name of the images on the page.

    Raises:
        InterruptedRunError: a signal came; the same call continues.
        StorageError, OutputError: the folder cannot be written to.
        PenultError: every backbone failed (the error of the first), or no head can be trained on the samples.
    """
    make_head(head, source.task.name, seed=seed)  # a misspelt name is refused before the work
    require_ready(backbones, folder, options)
    list_samples(source, options)
    with Stage("extracting with each backbone", len(backbones), "backbones", quiet=options.quiet) as stage:
        extracted, failed, unusable = _extract(source, backbones, folder, options, stage)
    table = common_samples([each.cache.samples for each in extracted])
    roles = _with_near_copies(assign_roles(table), extracted)
    task = task_of(table.task.name, table.outputs)
    chosen_on, reported_on = roles.facts["chosen_on"], roles.facts["reported_on"]
    task.require(table, [(roles.fit, "train"), (roles.choose, str(chosen_on)), (roles.report, str(reported_on))])
    bench = _Bench(table, roles, task, seed)
    lines = []
    with Stage("training a head on each", len(extracted), "sources", quiet=options.quiet) as stage:
        for each in stage.each(extracted):
            stage.at(each.source)
            fitted = make_head(head, table.task.name, seed=seed)
            lines.append(bench.line(each, fitted))
            log.info("%s: %s %.4f", each.source, task.ranked_by, lines[-1].choice.value)
    ranking = Ranking(
        data or str(source.root),
        table.task.name,
        name_of(fitted),
        chosen_on,
        reported_on if roles.report else None,
        ranked(lines),
        failed,
        unusable,
    )
    write_output(folder / PAGE, ranking_page(ranking).encode(), overwrite=True)
    return ranking


def _extract(
    source: Source, backbones: Sequence[Backbone], folder: Path, options: Options, stage: Stage
) -> tuple[list[_Extracted], list[Failure], int]:
    """The feature sets that were extracted, those that failed, and the largest number of failed images."""
    extracted: list[_Extracted] = []
    failed: list[Failure] = []
    errors: list[PenultError] = []
    unusable = 0
    for number, (backbone, path) in enumerate(stage.each(zip(backbones, cache_paths(backbones, folder), strict=True)), 1):
        label = label_of(backbone)
        stage.at(label)
        log.info("%d of %d: %s", number, len(backbones), "@".join([label, *backbone.layers]))
        try:
            summary = run_extract(source, backbone, path, options)
            cache = FeatureCache(path)
        except (InterruptedRunError, StorageError, OutputError):
            raise
        except PenultError as error:
            log.warning("%s is left out: %s", label, error)
            failed.append(failure("@".join([label, *backbone.layers]), error))
            errors.append(error)
            continue
        unusable = max(unusable, summary.failed)
        names = backbone.layers or cache.layers
        for layer, name in zip(cache.layers, names, strict=True):
            shown = label if len(cache.layers) == 1 and not backbone.layers else f"{label}@{name}"
            extracted.append(_Extracted(shown, cache.with_layer(layer), summary.computed))
    if not extracted:
        raise errors[0]
    return extracted, failed, unusable


def common_samples(tables: Sequence[SampleTable]) -> SampleTable:
    """The samples that every table has in the same split: an image may be too small for one backbone, or have changed."""

    def key(row: Row) -> tuple[bytes, bytes, str | None]:
        return row.path, row.sha256, row.split

    usable = [{key(row) for row in table.rows if row.ok} for table in tables]
    shared = set.intersection(*usable)
    if lost := max(map(len, usable)) - len(shared):
        log.warning("%d images are left out, because not every source has them in the same split", lost)
    first = tables[0]
    return SampleTable([row for row in first.rows if row.ok and key(row) in shared], first.facts, first.target_names)


def _with_near_copies(roles: Roles, extracted: Sequence[_Extracted]) -> Roles:
    """The roles with what looks like near copies to any of the sources as one group, so that all have the same."""
    for number, each in enumerate(extracted):
        roles, report = look(each.cache, roles)
        if number:  # what does not depend on features has been said, and groups are those of the sources before, too
            report = replace(report, copies=[], conflicts=[], divided=[])
        for sentence in [*report.sentences(), *report.remarks()]:
            log.warning("%s: %s", each.source, sentence)
    return roles


class _Bench:
    """Trains and measures heads on the same images in the same roles for every source.

    Args:
        table: the samples.
        roles: their roles.
        task: the task of the head.
        seed: of the folds.
    """

    def __init__(self, table: SampleTable, roles: Roles, task: HeadTask, seed: int) -> None:
        self._roles, self._task = roles, task
        self._rows = [*roles.fit, *roles.choose]
        self._digests = [row.sha256 for row in self._rows]
        self._truth = table.truth(self._rows)
        self._distinct = list({digest: i for i, digest in enumerate(self._digests)}.values())  # copies add no evidence
        self._held_out = table.truth(roles.report) if roles.report else None
        self._groups = groups_of(self._rows)
        self._folds = self._make_folds(seed)
        judged = np.concatenate([test for _, test in self._folds])
        self._choice = Units.of_groups([self._groups[i] for i in judged.tolist()])
        self._reported = Units.of_groups(groups_of(roles.report))

    def _make_folds(self, seed: int) -> list[Fold]:
        """Rows to fit on and rows to judge on: the validation images if there are any, else folds."""
        n, total = len(self._roles.fit), len(self._rows)
        if self._roles.choose:
            return [(np.arange(n), np.arange(n, total))]
        if self._task.exclusive:
            folds = stratified_folds(np.unique(self._truth, return_inverse=True)[1], self._groups[:n], FOLDS, seed)
        else:
            folds = group_folds(n, self._groups[:n], FOLDS, seed)
        if not folds:
            message = "fewer than two classes have two training images, or groups, so there is nothing to rank by. Add images"
            raise BadDataError(message)
        return folds

    def line(self, extracted: _Extracted, head: Any) -> Line:
        """Train a head on one source and measure it."""
        cache, n = extracted.cache, len(self._roles.fit)
        X = np.asarray(cache.features(self._digests), np.float32)
        begin = time.perf_counter()
        validation = (X[n:], self._truth[n:]) if self._roles.choose else None
        with Stage(f"fitting the {name_of(head)} head"):
            head.fit(X[:n], self._truth[:n], validation=validation, groups=self._groups)
        trained = time.perf_counter()
        scores = transferability(X[self._distinct], self._truth[self._distinct], self._task)
        scored = time.perf_counter()
        with Stage("judging the head"):
            truth, outputs = self._out_of_fold(head, X)
        choice, right = self._headline(head, truth, outputs, self._choice)
        numbers = truth if right is None else right.astype(np.float32)
        held_out = None
        if self._held_out is not None:
            features = cache.features([row.sha256 for row in self._roles.report])
            held_out, _ = self._headline(head, self._held_out, head.fitted_.probabilities(features), self._reported)
        return Line(
            source=extracted.source,
            cache=str(cache.path),
            layer=cache.layer,
            dim=cache.dim,
            images=cache.samples.counts["ok"],
            extract_seconds=float(cache.samples.facts.get("extract_seconds", 0.0)),
            computed=extracted.computed,
            choice=choice,
            held_out=held_out,
            scores=scores,
            train_seconds=round(trained - begin, 3),
            score_seconds=round(scored - trained, 3),
            right=right,
            units=self._choice,
            weighted=partial(WEIGHTED[self._task.name], numbers, outputs),
        )

    def _out_of_fold(self, head: Any, X: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Truth and outputs of the rows that sources are ranked by, from heads with the same settings fitted without them."""
        parts = []
        for train, test in self._folds:
            refitted = head.refit(X[train], self._truth[train])
            outputs = refitted.probabilities(X[test])
            if self._task.exclusive:  # leaving out a group may leave out a whole class
                columns = np.zeros((len(test), len(head.classes_)), outputs.dtype)
                columns[:, np.searchsorted(head.classes_, refitted.classes)] = outputs
                outputs = columns
            parts.append(outputs)
        rows = np.concatenate([test for _, test in self._folds])
        return self._truth[rows], np.concatenate(parts)

    def _headline(
        self, head: Any, truth: NDArray[Any], outputs: NDArray[np.float32], units: Units
    ) -> tuple[Headline, NDArray[np.bool_] | None]:
        """The headline score of outputs ``(n, k)``, and which rows are correct if that is the metric."""
        if self._task.exclusive:
            require_finite(outputs)
            right = head.classes_[outputs.argmax(axis=1)] == truth
            return Headline(float(right.mean()), units.proportion(right), len(right), units.groups), right
        measured = self._task.score(truth, outputs, "", units)
        assert not isinstance(measured, Evaluation)
        score = measured.scores[self._task.metric]
        return Headline(float(score["value"] or 0.0), score["interval"], len(truth), units.groups), None
