"""The command ``penult compare``: bundles on the same held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click

from extractor.commands.console import FOLDER, Command, json_option, overwrite_option, print_json, say_text, table_width


@click.command(cls=Command)
@click.argument("bundles", nargs=-1, required=True, type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="Also write an HTML report.")
@click.option("--against", metavar="NAME", help="The bundle to compare with; by default the first frozen one.")
@click.option(
    "--worthwhile",
    type=click.FloatRange(0, 100, min_open=True),
    default=1.0,
    show_default=True,
    help="The smallest difference of accuracy that matters, points.",
)
@click.option("--curve", type=FOLDER, metavar="CACHE", help="Also refit the frozen head on 10, 25, 50 and 100 % of its images.")
@overwrite_option
@json_option
def compare(
    bundles: Sequence[Path],
    output: Path | None,
    against: str | None,
    worthwhile: float,
    curve: Path | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compare bundles on the same held-out images.

    Shows differences with intervals, what each bundle costs, and whether that is worth it.

    Example: penult compare photos.head photos-finetuned.head -o report.html
    """
    from classifiers.bundles.bundle import Bundle
    from classifiers.comparison.compare import compare as compare_bundles
    from classifiers.comparison.compare_page import comparison_report, comparison_text
    from store.cache import FeatureCache
    from store.format import atomic
    from store.format.output import written

    with written(output, overwrite=overwrite) if output else nullcontext():
        cache = FeatureCache(curve) if curve else None
        loaded = [Bundle.load(path) for path in bundles]
        comparison = compare_bundles(loaded, against=against, worthwhile=worthwhile, curve=cache)
        if output:
            atomic.commit(output, comparison_report(comparison).encode())
    if as_json:
        return print_json(comparison.to_json())
    return say_text(comparison_text(comparison, width=table_width()))
