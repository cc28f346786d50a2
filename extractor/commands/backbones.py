"""The commands ``penult backbones`` and ``penult export``: list backbones, and write one as an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from extractor.commands.console import (
    Command,
    SettingsCommand,
    json_option,
    output_option,
    overwrite_option,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from extractor.backbones.settings import ExportSettings


@click.command(cls=Command)
@click.argument("name", required=False)
@click.option("--layers", "with_layers", is_flag=True, help="List the layers of this backbone that can give features.")
@json_option
def backbones(name: str | None, *, with_layers: bool, as_json: bool) -> None:
    """List the backbones, or show one.

    Example: penult backbones resnet50 --layers
    """
    from extractor.backbones.layers import list_layers
    from extractor.backbones.networks import row, rows

    if name is None:
        if with_layers:
            message = "--layers needs a backbone, as in: penult backbones resnet50 --layers"
            raise click.UsageError(message)
        listing = list(rows())
        if as_json:
            return print_json(listing)
        cells = [
            (
                r["name"],
                " ".join(key.removeprefix("IMAGENET1K_") for key in r["weights"]),
                str(r["dim"]),
                str(w["crop"]),
                f"{w['parameters'] / 1e6:.1f} M",
                f"{w['gflops']:.2f}",
                f"{w['top1']:.1f} %",
            )
            for r in listing
            for w in [r["weights"][r["default"]]]
        ]
        columns = ("backbone", "weights", "features", "input", "parameters", "GFLOPs", "top-1")  # the default weights first
        return print_table(columns, cells, left=2)
    layers = list_layers(name)
    facts = {**row(name), "layers": layers}
    if as_json:
        return print_json(facts)
    if with_layers:
        listed = [(each["layer"], each["module"], shape_text(each["shape"]), str(each["dim"])) for each in layers]
        return print_table(("layer", "module", "shape", "features"), listed, left=2)
    first = layers[0]
    pooled = ", averaged" if first["pooling"] == "average" else ""
    say(f"{name}: {first['dim']} features, the {first['module']}{pooled}; --layers lists {len(layers) - 1} more layers")
    print_table(
        ("weights", "licence", "interpolation", "input", "resize", "top-1"),
        [
            (key, w["licence"], w["interpolation"], str(w["crop"]), str(w["resize"]), f"{w['top1']:.1f} %")
            for key, w in facts["weights"].items()
        ],
        left=3,
    )
    return None


@click.command(cls=SettingsCommand, model="extractor.backbones.settings:ExportSettings", leave=["backbone"])
@click.argument("backbone")
@output_option("The ONNX file.")
@overwrite_option
@json_option
def export(settings: ExportSettings, output: Path, *, overwrite: bool, as_json: bool) -> None:
    """Export a backbone to ONNX at its penultimate layer.

    It is checked against torch. BACKBONE is a torchvision network, or a custom ONNX file; the result then contains the settings
    of its input.

    Example: penult export resnet50 -o resnet50.onnx
    """
    from extractor.backbones.export import export as export_backbone
    from store.format.output import require_free

    require_free(output, overwrite=overwrite)
    facts = export_backbone(settings.network(), output)
    if as_json:
        return print_json({"output": str(output), **facts.description(), "warnings": facts.reading.get("warnings", [])})
    for layer in facts.layers:
        say(f"{output}: {facts.name} ({facts.weights}), {layer.dim} features, {layer.layer}, pooling {layer.pooling}")
    return None


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
