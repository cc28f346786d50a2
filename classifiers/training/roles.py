"""The role of each sample: fitted, used for choices, or reported on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from extractor.pipeline.settings import FRACTION
from store.errors import BadDataError
from store.format.samples import Row, SampleTable
from store.splits import assign_splits, hash_rank_rule, missed_shares, with_splits

log = logging.getLogger("penult.classifiers")

FOLDS = "folds of train"  # what choices are made on where nothing is set apart for them


@dataclass(frozen=True)
class Roles:
    """The samples of each role.

    Attributes:
        fit: what is fitted.
        choose: what choices are made on; if empty, k-fold inside ``fit``.
        report: what is held out; may be empty.
        facts: JSON for the bundle: split names and the rule they came from.
        copies: what was left out of ``choose`` and ``report``, because its exact bytes are fitted.
    """

    fit: list[Row]
    choose: list[Row]
    report: list[Row]
    facts: dict[str, Any]
    copies: list[Row] = field(default_factory=list)


def assign_roles(table: SampleTable, *, val: float | None = None, test: float | None = None, seed: int = 0) -> Roles:
    """Assign roles from the stored splits, or from a new split if there are fractions.

    Raises:
        BadDataError: more inputs failed than the extraction allowed; samples without a label or a target; a class is too small.
    """
    if table.facts.get("budget_exceeded"):
        message = "more inputs failed than --max-failures allows; look at the ledger, then extract again with a larger budget"
        raise BadDataError(message)
    rows = [row for row in table.rows if row.ok]
    if not rows:
        message = f"none of the {len(table.rows)} inputs could be used; `penult info` says why"
        raise BadDataError(message)
    if unlabelled := table.task.incomplete(rows):
        example = f"{len(unlabelled)} of {len(rows)} samples {table.task.lacking} (such as {unlabelled[0].name})"
        message = f"{example}; training needs one for each"
        raise BadDataError(message)
    rule = dict(table.facts.get("split", {}))
    if val is not None or test is not None:
        val, test = (FRACTION if each is None else each for each in (val, test))
        rule = {**hash_rank_rule(val=val, test=test, seed=seed), "override": True}
        names = assign_splits(rows, val=val, test=test, seed=seed, stratify=table.task.stratifies)
        rows = with_splits(rows, names)
        labels = [row.label or "" if table.task.stratifies else "" for row in rows]
        for sentence in missed_shares(zip(labels, names, strict=True), val=val, test=test):
            log.warning("%s", sentence)
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.split or "train", []).append(row)
    reported_on = "test" if "test" in by_name else "val" if "val" in by_name else None
    chosen_on = "val" if reported_on == "test" and "val" in by_name else None
    fit = by_name.get("train", [])
    if not fit:
        message = f"there is no split 'train' to fit on, only {', '.join(by_name)}"
        raise BadDataError(message)
    choose, report = by_name.get(chosen_on or "", []), by_name.get(reported_on or "", [])
    digests = {row.sha256 for row in fit}
    copies = [row for row in choose if row.sha256 in digests]
    choose = [row for row in choose if row.sha256 not in digests]
    digests |= {row.sha256 for row in choose}
    copies += [row for row in report if row.sha256 in digests]
    report = [row for row in report if row.sha256 not in digests]
    facts = {"fit": "train", "chosen_on": chosen_on or FOLDS, "reported_on": reported_on, **rule}
    return Roles(fit, choose, report, facts, copies)


def inner_validation(rows: Sequence[Row], *, fraction: float = 0.2, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split training rows once more by hash rank, for training that cannot do k-fold: (fit, choose)."""
    names = assign_splits(rows, val=fraction, test=0.0, seed=seed)
    fit = [row for row, name in zip(rows, names, strict=True) if name == "train"]
    return fit, [row for row, name in zip(rows, names, strict=True) if name == "val"]
