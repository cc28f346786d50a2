"""What a run finds in the cache before it computes anything, and the outcomes of its inputs so far."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from extractor.data.samples import Sample
from store.format.samples import Row, SampleTable
from store.writer import CacheWriter

log = logging.getLogger("penult.extractor")


@dataclass(frozen=True)
class Resumed:
    """What earlier runs have left of a run's work.

    Attributes:
        inputs: of the run.
        unchanged: inputs whose features are cached, and whose files need not be opened.
        failed: inputs that failed before, and are not tried again.
        stored: inputs of which an unfinished run has committed the features, but no sample table: their files are read, and
            recognised by their content.
    """

    inputs: int
    unchanged: int
    failed: int
    stored: int

    @property
    def cached(self) -> int:
        """Inputs whose features are in the cache."""
        return self.unchanged + self.stored

    @property
    def to_compute(self) -> int:
        """Inputs whose features are computed, unless their files turn out to be copies, or renamed or touched ones."""
        return self.inputs - self.cached - self.failed

    def say(self) -> None:
        """Log it, if there is something to compute and something that need not be."""
        if not (self.cached and self.to_compute):
            return
        failed = f", and {self.failed:,} that failed before" if self.failed else ""
        text = f"found {self.cached:,} of {self.inputs:,} images in the cache{failed}; at most {self.to_compute:,} to compute"
        if self.stored:
            text += f". The last run did not finish: {self.stored:,} files are read again to recognise them"
        facts = {"event": "resumed", "inputs": self.inputs, "cached": self.cached, "to_compute": self.to_compute}
        log.info("%s", text, extra={"facts": facts})


def resumed(
    rows: Sequence[Row | None], todo: Sequence[tuple[int, Sample]], before: SampleTable | None, writer: CacheWriter
) -> Resumed:
    """Compare the plan of a run with the cache.

    Args:
        rows: the outcome of each input that is known already, see `plan`.
        todo: the inputs that must be read.
        before: the sample table of the last run that finished.
        writer: of the cache, after `CacheWriter.begin`.
    """
    unchanged = {row.sha256 for row in rows if row is not None and row.ok}
    counts = Counter(row.ok for row in rows if row is not None)
    stored = 0
    if todo and len(writer.known) > len(unchanged):  # else no shard has a row that the sample table has not
        listed = {row.path for row in before.rows} if before else set()  # their files have changed
        paths = writer.stored_paths() - listed
        stored = sum(sample.path in paths for _, sample in todo)
    return Resumed(len(rows), counts[True], counts[False], stored)


class Tally:
    """Inputs by status, as their outcomes come.

    Args:
        rows: outcomes that are known at the start.
        total: number of inputs.
    """

    def __init__(self, rows: Iterable[Row | None], total: int) -> None:
        self._total, self._digests = total, set[bytes]()
        self._counts: Counter[str] = Counter()
        for row in rows:
            if row is not None:
                self.add(row)

    def add(self, row: Row) -> None:
        status = "failed" if not row.ok else "duplicates" if row.sha256 in self._digests else "ok"
        self._counts[status] += 1
        if row.ok:
            self._digests.add(row.sha256)

    def facts(self) -> dict[str, Any]:
        """``done`` of ``total``, and ``rows`` by status, as JSON."""
        rows = {status: self._counts[status] for status in ("ok", "duplicates", "failed")}
        return {"done": sum(rows.values()), "total": self._total, "rows": rows}
