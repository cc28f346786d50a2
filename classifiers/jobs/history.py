"""The history of a job: one line of JSON per run, in a file beside the job file."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from store.errors import InputMissingError
from store.format import json_text
from store.format.output import open_lines

log = logging.getLogger("penult.classifiers")

BOUNDS = ([float, float], None)
RECORD = {  # what is read of a record
    "started": str,
    "exit_code": int,
    "seconds": float,
    "extract?": dict,
    "trained?": bool,
    "evaluation?": (
        {
            "metric?": str,
            "score?": str,
            "value?": (float, None),
            "accuracy?": (float, None),
            "interval?": BOUNDS,
            "accuracy_interval?": BOUNDS,
        },
        None,
    ),
}


def runs_file(job: Path) -> Path:
    """The file with the records of a job's runs: one JSON object per line, beside the job file."""
    return job.with_name(f"{job.stem}.runs.jsonl")


def append_run(path: Path, record: dict[str, Any]) -> None:
    try:
        with open_lines(path) as file:
            file.write(json_text.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the run is done; a record that cannot be written must not make it fail
        log.warning("cannot write %s: %s", path, error.strerror)


def read_runs(job: Path) -> list[dict[str, Any]]:
    """The records of a job's runs, oldest first; a line that is none, because a crash cut it off, is left out.

    Raises:
        InputMissingError: there are no records.
    """
    path = runs_file(job)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        message = f"no runs of {job} are recorded ({path}: {error.strerror})"
        raise InputMissingError(message) from error
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if not json_text.misfit(record, RECORD):
                records.append(record)
    return records


RUN_COLUMNS = ("started", "exit", "seconds", "inputs", "failed", "computed", "trained", "metric", "value", "95 % interval")


def run_cells(record: dict[str, Any]) -> tuple[str, ...]:
    """One record as text, in the order of `RUN_COLUMNS`; a dash for what a run did not reach."""
    extract = record.get("extract", {})
    return (
        record["started"],
        str(record["exit_code"]),
        f"{record['seconds']:.1f}",
        *(str(extract.get(name, "-")) for name in ("inputs", "failed", "computed")),
        {True: "yes", False: "unchanged"}.get(record.get("trained", ""), "-"),
        *_score_cells(record.get("evaluation")),
    )


def _score_cells(evaluation: dict[str, Any] | None) -> tuple[str, str, str]:
    if not evaluation:
        return "-", "-", "-"
    metric = evaluation.get("metric") or evaluation.get("score", "accuracy")  # for older records
    value = evaluation.get("value", evaluation.get("accuracy"))
    bounds = evaluation.get("interval", evaluation.get("accuracy_interval"))
    shown = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "-"
    return metric.replace("_", " "), "-" if value is None else f"{value:.4f}", shown
