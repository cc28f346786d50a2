"""The split of every sample of a run, from the source or by hash rank, and warnings about it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from extractor.data.samples import Sample
from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.splits import assign_splits, divided_groups, require_sizes, rule_text, split_names, untrained_labels
from store.tasks import Task

from .settings import Options

log = logging.getLogger("penult.extractor")


def resolve_splits(rows: Sequence[Row], options: Options, task: Task) -> tuple[list[Row], dict[str, Any]]:
    """The rows with their split, and the rule that decided it.

    Splits of the source win. Otherwise, if there are labels or numeric targets, the ok rows are split by hash rank, within
    each class if a sample has one. A class that became too small because its files failed is an error that names it.
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
    """Warn if the split or the task of a finished cache changes, and about classes that cannot be trained."""
    previous = before.facts.get("split") if before else None
    if before and previous:
        old = {row.path: row for row in before.rows}
        common = [(old[row.path], row) for row in rows if row.path in old]
        moved = sum(earlier.split != now.split for earlier, now in common)
        if previous != rule:
            log.warning("the split was %s, it is %s now: %d samples changed split", rule_text(previous), rule_text(rule), moved)
        elif moved and any(earlier.group != now.group for earlier, now in common):
            log.warning("the groups changed, and %d of %d samples changed split with them", moved, len(common))
        elif moved:
            log.info("%d of %d samples changed split, because other samples came or went", moved, len(common))
    recorded = before.facts.get("task", task.name) if before else task.name
    if recorded != task.name:
        log.warning("the samples were recorded with --task %s, they are %s now", recorded, task.name)
    if rule["rule"] == "source" and (divided := divided_groups([(row, row.split) for row in rows if row.ok and row.split])):
        log.warning(
            "%d group(s) have images in more than one split (such as %r), so scores will be too good: put each group into one "
            "split, or leave the splits out and the groups decide",
            len(divided),
            divided[0],
        )
    labelled = [(row.label, row.split) for row in rows if row.ok] if task.stratifies else []
    for sentence in untrained_labels(labelled):
        log.warning("%s: `penult train` will refuse that", sentence)


def require_groups(before: SampleTable | None, samples: Sequence[Sample], *, resplit: bool) -> None:
    """Refuse a split that would divide what belonged together in the last run, unless that is asked for.

    Raises:
        BadDataError: the samples had groups, and have none now; says how many there were.
    """
    if before is None or resplit or any(sample.split for sample in samples):
        return
    groups = {row.path: row.group for row in before.rows if row.group}
    lost = {groups[sample.path] for sample in samples if sample.path in groups and not sample.group}
    if lost:
        message = (
            f"in the last run {len(lost)} groups of samples each stayed in one split, and now they have none: images of one "
            f"group would be on both sides. Pass the same --group-by (or the column `group`) again, or --resplit to do "
            f"without groups"
        )
        raise BadDataError(message)


def check_splits_possible(samples: Sequence[Sample], options: Options, task: Task) -> None:
    """Refuse before the extraction what `resolve_splits` would refuse hours later."""
    if any(s.split for s in samples) or not task.can_be_trained_on([s.label for s in samples]):
        return
    if task.stratifies and not any(sample.group for sample in samples):
        names = split_names(val=options.val_fraction, test=options.test_fraction)
        require_sizes(Counter(sample.label or "" for sample in samples), names)
        return
    rows = [Row(s.path, s.label, None, s.group, sha256=s.path) for s in samples]  # as if there were no duplicates
    assign_splits(rows, val=options.val_fraction, test=options.test_fraction, seed=options.seed, stratify=task.stratifies)
