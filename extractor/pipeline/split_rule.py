"""Which split every sample of a run belongs to, and what is said about it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from extractor.data.samples import Sample
from store.format.samples import Row, SampleTable
from store.splits import assign_splits, require_sizes, rule_text, split_names, untrained_labels
from store.tasks import Task

from .settings import Options

log = logging.getLogger("penult.extractor")


def resolve_splits(rows: Sequence[Row], options: Options, task: Task) -> tuple[list[Row], dict[str, Any]]:
    """The stored split of every row, and how it came about.

    Splits of the source win. Otherwise, where there are labels or numeric targets, the ok rows are divided by hash rank,
    within each class where a sample has one. A class that became too small because its files failed is an error that names it.
    """
    if any(row.split for row in rows):
        return list(rows), {"rule": "source"}
    good = [row for row in rows if row.ok]
    if not good or not task.can_be_trained_on([row.label for row in good]):
        return list(rows), {"rule": "none"}
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    names = assign_splits(good, **fractions, seed=options.seed, stratify=task.stratifies)
    split_of = {row.path: name for row, name in zip(good, names, strict=True)}
    rule = {"rule": "hash-rank", "val": options.val_fraction, "test": options.test_fraction, "seed": options.seed}
    return [row.with_split(split_of.get(row.path)) for row in rows], rule


def say_splits(before: SampleTable | None, rows: Sequence[Row], rule: dict[str, Any], task: Task) -> None:
    """Say where the split or the task of a finished cache changes, and which classes nothing can be trained of."""
    had = before.facts.get("split") if before else None
    if before and had and had != rule:
        old = {row.path: row.split for row in before.rows}
        moved = sum(row.path in old and old[row.path] != row.split for row in rows)
        log.warning("the split was %s, it is %s now: %d samples changed sides", rule_text(had), rule_text(rule), moved)
    recorded = before.facts.get("task", task.name) if before else task.name
    if recorded != task.name:
        log.warning("the samples were recorded with --task %s, they are %s now", recorded, task.name)
    labelled = [(row.label, row.split) for row in rows if row.ok] if task.stratifies else []
    for sentence in untrained_labels(labelled):
        log.warning("%s: `penult train` will refuse that", sentence)


def check_splits_possible(samples: Sequence[Sample], options: Options, task: Task) -> None:
    """Refuse before computing what `resolve_splits` would refuse after hours."""
    if any(s.split for s in samples) or not task.can_be_trained_on([s.label for s in samples]):
        return
    if task.stratifies and not any(sample.group for sample in samples):
        names = split_names(val=options.val_fraction, test=options.test_fraction)
        require_sizes(Counter(sample.label or "" for sample in samples), names)
        return
    rows = [Row(s.path, s.label, None, s.group, sha256=s.path) for s in samples]  # as if no two were copies
    assign_splits(rows, val=options.val_fraction, test=options.test_fraction, seed=options.seed, stratify=task.stratifies)
