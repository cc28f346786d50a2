"""Printing of bundles and evaluations, for the commands about heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extractor.commands.console import print_json, say, say_text, table_width

if TYPE_CHECKING:
    from classifiers.evaluation.task import Evaluation, Measured

SHOWN_SHARE = 0.05  # of the whole time; a stage that took less is not shown


def print_bundle(bundle: Any, *, as_json: bool) -> None:
    """Print a bundle that was just made, and what took how long."""
    if as_json:
        return print_json({**bundle.to_json(), "seconds": bundle.seconds})
    from classifiers.bundles.bundle import task_of_bundle

    task = task_of_bundle(bundle)
    say(f"{bundle.path}: {bundle.head} head, {len(bundle.classes)} {task.plural}, in {_seconds_by_stage(bundle.seconds)}")
    metrics = bundle.metrics
    if metrics:
        say(f"{task.headline(metrics)} on {metrics['n']} images of {bundle.split['reported_on']!r}")
        for note in metrics["notes"]:
            say(f"warning: {note}", err=True)
    return say(f"report: {bundle.path / 'report.html'}")


def _seconds_by_stage(seconds: dict[str, float]) -> str:
    """The whole time, and the stages that took a good part of it, in the order in which they ended.

    >>> _seconds_by_stage({"leaks": 0.001, "head": 0.4, "report": 2.0, "save": 0.02, "total": 2.421})
    '2.42 s (head 0.40 s, report 2.00 s)'
    """
    from extractor.machine import seconds_text

    total = seconds["total"]
    parts = [
        f"{stage.replace('_', ' ')} {seconds_text(each)}"
        for stage, each in seconds.items()
        if stage != "total" and each >= SHOWN_SHARE * total
    ]
    return f"{seconds_text(total)} ({', '.join(parts)})"


def print_evaluation(result: Evaluation | Measured) -> None:
    from classifiers.reports.terminal import evaluation_text

    say_text(evaluation_text(result, width=table_width()))
    for note in result.notes:
        say(f"warning: {note}", err=True)
