"""The commands for job files: ``penult run`` and ``penult runs``."""

from __future__ import annotations

from pathlib import Path

import click

from extractor.commands.console import (
    FOLDER,
    Command,
    is_quiet,
    json_option,
    observing_options,
    print_json,
    print_preview,
    print_table,
    say_text,
)

from .console import print_evaluation


@click.command(cls=Command)
@click.argument("job", type=FOLDER)
@observing_options
@json_option
def run(job: Path, log_json: Path | None, metrics: Path | None, *, dry_run: bool, as_json: bool) -> int:
    """Run a job file, as a scheduler does.

    Extract, train if anything changed, evaluate, and check the result against the gates.

    Example: penult run nightly.toml --log-json nightly.jsonl --metrics nightly.prom
    """
    from classifiers.jobs.run import preview_job, run_job
    from extractor.run_log import observed
    from store.errors import GateError

    if dry_run:
        preview = preview_job(job)
        print_preview({**preview["extract"], "train": preview["train"]}, as_json=as_json)
        return 0
    with observed(log_json=log_json, metrics=metrics) as record:
        result = run_job(job, quiet=is_quiet(), record=record)
    if as_json:
        print_json(result.to_json())
    else:
        say_text(result.extract.text())
        print_evaluation(result.evaluation)
    if result.gate_missed:
        raise GateError(result.gate_missed)
    return result.exit_code


@click.command(cls=Command)
@click.argument("job", type=FOLDER)
@click.option("-n", "--last", type=click.IntRange(1), default=20, show_default=True, help="How many runs.")
@json_option
def runs(job: Path, last: int, *, as_json: bool) -> None:
    """Show the history of a job.

    Shows when each run started, how it ended, what it computed, and its score.

    Example: penult runs nightly.toml
    """
    from classifiers.jobs.history import RUN_COLUMNS, read_runs, run_cells

    records = read_runs(job)[-last:]
    if as_json:
        return print_json(records)
    return print_table(RUN_COLUMNS, [run_cells(record) for record in records])
