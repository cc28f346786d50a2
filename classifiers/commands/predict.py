"""The commands that use a bundle: ``penult predict`` and ``penult fuse``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from extractor.commands.console import FOLDER, WITH_FAILURES, Command, SettingsCommand, output_option, overwrite_option, say
from store.format import json_text
from store.progress.stages import Stage

if TYPE_CHECKING:
    from classifiers.bundles.settings import PredictSettings


@click.command(cls=SettingsCommand, model="classifiers.bundles.settings:PredictSettings")
@click.argument("bundle", metavar="BUNDLE|CLASSIFIER.onnx", type=FOLDER)
@click.argument("images", nargs=-1, type=FOLDER)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
    help="Format of the predictions.",
)
@click.option("--selftest", "testing", is_flag=True, help="First check its weights, and its outputs for golden images.")
def predict(bundle: Path, images: Sequence[Path], settings: PredictSettings, form: str, *, testing: bool) -> int:
    """Predict label and probability of images, or of folders.

    An image with a novelty above 1 is unlike the training images. With --selftest, exit 65 if a weight was changed, or if
    the outputs here differ from those on the machine where it was made.

    Example: penult predict photos.head new/ --format csv > predictions.csv
    """
    from classifiers.bundles.predictor import Predictor, count_images, list_images

    if not (images or testing):
        message = "no images: name files or folders, or pass --selftest"
        raise click.UsageError(message)
    with Stage("listing the images"):
        listed, count = (list_images(images), count_images(images)) if images else (iter(()), 0)
    if testing:
        from classifiers.bundles.fuse import selftest

        say(selftest(bundle, **settings.runtime()), err=bool(images))
        if not images:
            return 0
    predictor = Predictor.load(bundle, **settings.runtime())
    predictions = predictor.predict(listed)
    failed = 0
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        extra = ["novelty"] if predictor.recipe.novelty else []
        writer.writerow(["path", "label", "probability", "code", "message", *extra, *predictor.task.columns()])
    with Stage("predicting", count, "images", bar=not sys.stdout.isatty()) as stage:
        for p in stage.each(predictions):
            failed += p.code is not None
            if form == "csv":
                best = "" if p.probability is None else f"{p.probability:.6f}"
                blank = [""] * len(predictor.task.columns())
                columns: list[Any] = blank if p.probabilities is None else predictor.task.cells(p.probabilities)
                if predictor.recipe.novelty:
                    columns = ["" if p.novelty is None else f"{p.novelty:.4f}", *columns]
                writer.writerow(
                    [*map(_quoted, (_exact(p.path), p.label or "")), best, p.code or "", _quoted(p.message), *columns]
                )
            elif form == "jsonl":
                facts: dict[str, Any] = {
                    "path": _exact(p.path),
                    "label": p.label,
                    "probability": p.probability,
                    "code": p.code,
                    "message": p.message,
                }
                if predictor.recipe.novelty:
                    facts["novelty"] = None if p.novelty is None else round(p.novelty, 4)
                if predictor.pixel_drift:
                    facts["pixel_drift"] = predictor.pixel_drift.to_json()
                click.echo(json_text.dumps({**facts, **predictor.task.facts(p.probabilities)}))
            else:
                unlike = " (unlike the training images)" if p.novelty and p.novelty > 1 else ""
                novelty = "" if p.novelty is None else f"\tnovelty {p.novelty:.2f}{unlike}"
                say(f"{p.name}\t{p.code}: {p.message}" if p.code else f"{p.name}\t{predictor.task.text(p)}{novelty}")
    return WITH_FAILURES if failed else 0


def _exact(path: bytes) -> str:
    """A path for machines: as it is, but for bytes that are not UTF-8, which become ``\\xNN``."""
    return path.decode("utf-8", "backslashreplace")


def _quoted(text: str) -> str:
    """Text with an apostrophe before it if a spreadsheet would run it as a formula, as OWASP advises."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


@click.command(cls=Command)
@click.argument("bundle", type=FOLDER)
@output_option("The ONNX file.")
@overwrite_option
def fuse(bundle: Path, output: Path, *, overwrite: bool) -> None:
    """Make one ONNX file of a bundle, for any program.

    It maps decoded pixels to probabilities, in ONNX Runtime. `penult predict CLASSIFIER.onnx` takes it like a bundle, and
    with --selftest checks that its outputs are still the same.

    Example: penult fuse photos.head -o photos.onnx
    """
    from classifiers.bundles.bundle import Bundle
    from classifiers.bundles.fuse import fuse as fuse_bundle
    from extractor.graphs.onnx_file import data_files

    fused = fuse_bundle(Bundle.load(bundle), output, overwrite=overwrite)
    side, size = fused.preprocess.crop, sum(file.stat().st_size for file in (output, *data_files(output)))
    say(f"{output}: {side} x {side} pixels to {len(fused.classes)} {fused.bound_task.plural}, {size / 2**20:.1f} MiB")
