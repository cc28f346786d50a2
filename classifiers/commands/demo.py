"""The command ``penult demo``: every step on handwritten digits."""

from __future__ import annotations

from pathlib import Path

import click

from extractor.commands.console import FOLDER, Command, overwrite_option, print_table, table_width

from .console import print_evaluation


@click.command(cls=Command)
@click.option("-o", "--output", type=FOLDER, default=Path("penult-demo"), show_default=True, help="Folder for all files.")
@click.option(
    "--weights", metavar="NAME|FILE.pth|random", help="Of resnet18; by default torchvision's if available, else random."
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True, help="Epochs of fine-tuning.")
@overwrite_option
def demo(output: Path, weights: str | None, epochs: int, *, overwrite: bool) -> None:
    """Show every step on handwritten digits, in two minutes.

    Nothing is downloaded.

    Example: penult demo -o demo
    """
    from classifiers.comparison.compare_page import comparison_text
    from classifiers.demo import run_demo

    result = run_demo(output, weights=weights, epochs=epochs, overwrite=overwrite)
    click.echo(f"\nFirst extraction   {result.first.text()}")
    click.echo(f"Second extraction  {result.second.text()}")
    click.echo("\nLogistic head on cached features")
    print_evaluation(result.evaluation)
    click.echo("\nSome predictions")
    print_table(
        ("image", "label", "probability"), [(p.name, p.label or "", f"{p.probability:.3f}") for p in result.predictions]
    )
    click.echo("\nFrozen features or fine-tuning?")
    click.echo(comparison_text(result.comparison, width=table_width()))
    for note in result.notes:
        click.echo(f"\n{note}")
    click.echo(f"\nReport: {result.report}   Bundles: {output}/*.head (each has a report.html)")
