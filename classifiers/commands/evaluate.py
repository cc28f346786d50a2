"""The commands that evaluate a bundle and make its report: ``penult evaluate`` and ``penult report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from extractor.commands.console import (
    FOLDER,
    WITH_FAILURES,
    SettingsCommand,
    json_option,
    output_option,
    overwrite_option,
    print_json,
    say,
)

from .console import print_evaluation

if TYPE_CHECKING:
    from classifiers.bundles.settings import EvaluateSettings
    from classifiers.reports.settings import ReportSettings


@click.command(cls=SettingsCommand, model="classifiers.bundles.settings:EvaluateSettings")
@click.argument("bundle", type=FOLDER)
@click.argument("data", type=FOLDER)
@click.option("--plot", type=FOLDER, help="Write the confusion matrix as .png, .svg or .pdf.")
@overwrite_option
@json_option
def evaluate(bundle: Path, data: Path, settings: EvaluateSettings, plot: Path | None, *, as_json: bool, overwrite: bool) -> int:
    """Evaluate a bundle on a cache or a dataset, with intervals.

    Shows every score with its interval, the scores per class, and the confusion matrix.

    Example: penult evaluate photos.head photos.cache --split test
    """
    from classifiers.bundles.bundle import Bundle
    from classifiers.bundles.held_out import evaluate_bundle
    from classifiers.evaluation.gates import missed_gates
    from classifiers.evaluation.task import need_single_label
    from classifiers.reports.plots import require_plot, save_confusion
    from extractor.settings import FLAGS, flag_of
    from store.errors import GateError

    if plot:
        require_plot(plot, overwrite=overwrite)
    loaded = Bundle.load(bundle)
    with FLAGS.here():
        gates = settings.gates(loaded.task)
    if plot:
        need_single_label(loaded.task, "--plot")
    result, _ = evaluate_bundle(loaded, data, split=settings.split, root=settings.root, **settings.runtime())
    if plot:
        save_confusion(result.to_json(), plot, overwrite=overwrite)
    if as_json:
        print_json(result.to_json())
    else:
        print_evaluation(result)
    if missed := missed_gates(gates, result.to_json(), lambda gate: flag_of(type(settings), gate.name)):
        raise GateError(missed)
    return WITH_FAILURES if result.failed else 0


@click.command(cls=SettingsCommand, model="classifiers.reports.settings:ReportSettings")
@click.argument("bundle", type=FOLDER)
@click.argument("data", required=False, type=FOLDER)
@output_option("The page, an .html file.")
@overwrite_option
def report(bundle: Path, data: Path | None, settings: ReportSettings, output: Path, *, overwrite: bool) -> None:
    """Make the report page of a bundle again, or for other images.

    Without DATA, a cache or a dataset, the page has no images and no map of features.

    Example: penult report photos.head photos.cache -o photos.html
    """
    from classifiers.bundles.bundle import Bundle
    from classifiers.reports.bundle_page import report_again
    from store.format import atomic
    from store.format.output import written

    if data is None and (settings.split or settings.root):
        message = "--split and --root need DATA; name a cache or a dataset"
        raise click.UsageError(message)
    with written(output, overwrite=overwrite):
        atomic.commit(output, report_again(Bundle.load(bundle), data, settings).encode())
    say(f"report: {output}")
