"""The split of every sample of a run, from the source or by hash rank, and warnings about it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from extractor.data.samples import Sample, in_words
from extractor.settings import flag_of
from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.splits import (
    assign_splits,
    divided_groups,
    hash_rank_rule,
    missed_shares,
    require_sizes,
    rule_text,
    split_names,
    untrained_labels,
    version_of,
)
from store.tasks import Task

from .settings import Options

log = logging.getLogger("penult.extractor")


def resolve_splits(
    rows: Sequence[Row], options: Options, task: Task, before: SampleTable | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """The rows with their split, and the rule that decided it.

    Splits of the source win. Otherwise, if there are labels or numeric targets, the ok rows are split by hash rank, within
    each class if a sample has one. A class that became too small because its files failed is an error that names it.

    Args:
        rows: of this run.
        options: with the fractions and the seed.
        task: what the samples are for.
        before: the sample table of the last run; its version of the rule stays, unless another split is asked for.
    """
    if any(row.split for row in rows):
        return list(rows), {"rule": "source"}
    good = [row for row in rows if row.ok]
    if not good or not task.can_be_trained_on([row.label for row in good]):
        return list(rows), {"rule": "none"}
    val, test, seed = options.val_fraction, options.test_fraction, options.seed
    previous = before.facts.get("split", {}) if before and not options.resplit else {}
    same = {"val": val, "test": test, "seed": seed}.items() <= previous.items()
    rule = hash_rank_rule(val=val, test=test, seed=seed, version=version_of(previous if same else None))
    version = version_of(rule)
    names = assign_splits(good, val=val, test=test, seed=seed, stratify=task.stratifies, version=version)
    labels = [row.label or "" if task.stratifies else "" for row in good]
    for sentence in missed_shares(zip(labels, names, strict=True), val=val, test=test, version=version):
        log.warning("%s", sentence)
    split_of = {row.path: name for row, name in zip(good, names, strict=True)}
    return [row.with_split(split_of.get(row.path)) for row in rows], rule


def say_splits(before: SampleTable | None, rows: Sequence[Row], rule: dict[str, Any], task: Task) -> dict[str, int]:
    """Say what of a finished cache changes: splits, labels, the task; and warn about classes without a usable image.

    A sample of the last run is found by its path or, if it was moved, by its content.

    Returns:
        The number of samples of the last run whose ``split`` and whose ``label`` (or targets) is another now.
    """
    recorded = before.facts.get("task", task.name) if before else task.name
    if recorded != task.name:
        log.warning("the samples were recorded with --task %s, they are %s now", recorded, task.name)
    usable = {label for row in rows if row.ok for label in task.labels_of(row)}
    lost = sorted({label for row in rows for label in task.labels_of(row)} - usable)
    if lost and usable and not task.targets:
        log.warning("no image of class %s could be used, so a head will not know it", in_words(list(map(repr, lost))))
    if before is None:
        return {"split": 0, "label": 0}
    paths, contents = {row.path: row for row in before.rows}, {row.sha256: row for row in before.rows}
    common = [(earlier, row) for row in rows if (earlier := paths.get(row.path) or (row.ok and contents.get(row.sha256)))]
    moved = sum(earlier.split != now.split for earlier, now in common)
    relabelled = sum((earlier.label, earlier.targets) != (now.label, now.targets) for earlier, now in common)
    if (previous := before.facts.get("split")) and previous != rule:
        log.warning("the split was %s, it is %s now: %d samples changed split", rule_text(previous), rule_text(rule), moved)
    elif moved and any(earlier.group != now.group for earlier, now in common):
        log.warning("the groups changed, and %d of %d samples changed split with them", moved, len(common))
    elif moved and (relabelled or recorded != task.name):
        log.warning("the labels changed, and %d of %d samples changed split with them", moved, len(common))
    elif moved:
        log.info("%d of %d samples changed split, because other samples came or went", moved, len(common))
    if relabelled:
        log.info("%d of %d samples have another label than in the last run", relabelled, len(common))
    return {"split": moved, "label": relabelled}


def say_own_splits(samples: Sequence[Sample] | Sequence[Row], options: Options, task: Task) -> None:
    """Warn about what the splits of a source do: classes without training images, groups on both sides, unused options."""
    if task.stratifies:
        for sentence in untrained_labels((sample.label, sample.split) for sample in samples):
            log.warning("%s: `penult train` will refuse that", sentence)
    if divided := divided_groups((sample.group, sample.split) for sample in samples if sample.split):
        group, splits = next(iter(divided.items()))
        log.warning(
            "%d of %d groups have images in more than one split of the data (such as %s in %s): what is held out is not new",
            len(divided),
            len({sample.group for sample in samples if sample.group}),
            group,
            in_words(splits),
        )
    unused = options.explicit().keys() & {"val_fraction", "test_fraction"}
    if unused and any(sample.split for sample in samples):
        flags = " and ".join(sorted(flag_of(Options, name) for name in unused))
        log.warning("the data has splits of its own, so %s changes nothing", flags)


def require_groups(before: SampleTable | None, samples: Sequence[Sample] | Sequence[Row], *, resplit: bool) -> None:
    """Refuse a split that would divide what belonged together in the last run, unless that is asked for.

    Args:
        before: the sample table of the last run.
        samples: of this run; as rows with the digests of their contents, by which moved files are found.
        resplit: whether it is asked for.

    Raises:
        BadDataError: the samples had groups, and have none now; says how many there were.
    """
    if before is None or resplit or any(sample.split for sample in samples):
        return
    groups = {key: row.group for row in before.rows if row.group for key in (row.path, row.sha256) if key}
    grouped = {row.sha256 for row in samples if isinstance(row, Row) and row.group}  # their copies stay with them
    lost = set()
    for sample in samples:
        content = sample.sha256 if isinstance(sample, Row) else b""
        group = groups.get(sample.path) or groups.get(content)
        if group and not sample.group and content not in grouped:
            lost.add(group)
    if lost:
        known = before.facts.get("group_by", "group")
        again = "the same --group-by" if known == "group" else f"--group-by {known!r}"
        message = (
            f"in the last run {len(lost)} groups of samples each stayed in one split, and now they have none: images of one "
            f"group would be on both sides. Pass {again} (or the column `group`) again, or --resplit to do without groups"
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
