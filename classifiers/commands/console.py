"""Printing of bundles and evaluations, for the commands about heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extractor.commands.console import print_json, say, say_text, table_width

if TYPE_CHECKING:
    from classifiers.evaluation.task import Evaluation, Measured


def print_bundle(bundle: Any, *, as_json: bool) -> None:
    if as_json:
        return print_json(bundle.to_json())
    from classifiers.bundles.bundle import task_of_bundle

    task, seconds = task_of_bundle(bundle), bundle.cost["train_seconds"]
    say(f"{bundle.path}: {bundle.head} head, {len(bundle.classes)} {task.plural}, in {seconds:.1f} s")
    metrics = bundle.metrics
    if metrics:
        say(f"{task.headline(metrics)} on {metrics['n']} images of {bundle.split['reported_on']!r}")
        for note in metrics["notes"]:
            say(f"warning: {note}", err=True)
    return say(f"report: {bundle.path / 'report.html'}")


def print_evaluation(result: Evaluation | Measured) -> None:
    from classifiers.reports.terminal import evaluation_text

    say_text(evaluation_text(result, width=table_width()))
    for note in result.notes:
        say(f"warning: {note}", err=True)
