"""The command ``penult demo``: every step on handwritten digits."""

from __future__ import annotations

from pathlib import Path

import click

from extractor.commands.console import FOLDER, Command, overwrite_option, print_table, say, say_text, table_width

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
    say()
    say_text(f"First extraction   {result.first.text()}")
    say_text(f"Second extraction  {result.second.text()}")
    say()
    say("Logistic head on cached features")
    print_evaluation(result.evaluation)
    say()
    say("Some predictions")
    print_table(
        ("image", "label", "probability"), [(p.name, p.label or "", f"{p.probability:.3f}") for p in result.predictions]
    )
    say()
    say("Frozen features or fine-tuning?")
    say_text(comparison_text(result.comparison, width=table_width()))
    for note in result.notes:
        say()
        say(note)
    say()
    say(f"Report: {result.report}   Bundles: {output}/*.head (each has a report.html)")
