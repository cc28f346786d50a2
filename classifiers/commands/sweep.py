"""The command ``penult sweep``: several backbones on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from extractor.commands.console import (
    FOLDER,
    SettingsCommand,
    is_quiet,
    json_option,
    output_option,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from classifiers.comparison.settings import SweepSettings


@click.command(cls=SettingsCommand, model="classifiers.comparison.settings:SweepSettings")
@click.argument("data", type=FOLDER)
@click.option(
    "-m",
    "--backbone",
    "sources",
    required=True,
    multiple=True,
    metavar="NAME[=WEIGHTS][@LAYER]...,...",
    help="Networks, or FILE.onnx; each with @LAYER for features of other layers. See docs/sweep.md.",
)
@output_option("Folder of the caches and of sweep.html.")
@click.option("--overwrite", is_flag=True, help="Extract again.")
@json_option
def sweep(data: Path, sources: Sequence[str], settings: SweepSettings, output: Path, *, as_json: bool, overwrite: bool) -> int:
    """Extract with several backbones, and rank them.

    All use the same images and the same split. LogME and the H-score estimate, without training, how good features are.

    Example: penult sweep photos/ -m resnet18,resnet50,resnet50@layer3,theirs.onnx -o photos.sweep
    """
    from classifiers.comparison.ranking import AGREEMENT_COLUMNS
    from classifiers.comparison.sweep import PAGE, parse_sources, require_ready, run_sweep
    from extractor.pipeline.settings import Options

    backbones = parse_sources(sources, settings.network())
    options = settings.part(Options).replace(overwrite=overwrite, quiet=is_quiet())
    require_ready(backbones, output, options)
    source = settings.source(data)
    ranking = run_sweep(source, backbones, output, options, head=settings.head, seed=settings.seed, data=str(data))
    if as_json:
        print_json(ranking.to_json())
        return ranking.exit_code
    print_table(ranking.columns, ranking.rows(), left=2)
    for each in ranking.failed:
        say()
        say(f"No features of {each.source}: {each.error}")
    say()
    for note in ranking.notes():
        say(note)
    say()
    say(f"Rank correlation of the scores with the {ranking.metric} of trained heads, {len(ranking.lines)} sources")
    print_table(AGREEMENT_COLUMNS, [each.cells() for each in ranking.agreements()])
    say()
    say(f"Page: {output / PAGE}")
    say(f"Next: {ranking.advice()}")
    return ranking.exit_code
