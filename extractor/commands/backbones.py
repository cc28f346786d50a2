"""The commands ``penult backbones`` and ``penult export``: list backbones, and write one as an ONNX file."""

from __future__ import annotations

import os
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
from store.progress.stages import Stage

if TYPE_CHECKING:
    from extractor.backbones.settings import ExportSettings


@click.command(cls=Command)
@click.argument("name", required=False)
@click.option("--layers", "with_layers", is_flag=True, help="List the layers of this backbone that can give features.")
@click.option("--prepared", "list_prepared", is_flag=True, help="List the exported networks that are kept for the next cache.")
@click.option("--prune", is_flag=True, help="With --prepared: remove them all.")
@json_option
def backbones(name: str | None, *, with_layers: bool, list_prepared: bool, prune: bool, as_json: bool) -> None:
    """List the backbones, or show one.

    Example: penult backbones resnet50 --layers
    """
    if prune and not list_prepared:
        message = "--prune needs --prepared: it removes the prepared backbones"
        raise click.UsageError(message)
    if list_prepared:
        if name or with_layers:
            message = "--prepared lists all prepared backbones: leave the name and --layers out"
            raise click.UsageError(message)
        return _prune(as_json=as_json) if prune else _list_prepared(as_json=as_json)
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


def _list_prepared(*, as_json: bool) -> None:
    from extractor.backbones import prepared

    place, limit = prepared.folder(), prepared.limit()
    entries, damaged = prepared.entries()
    size = sum(entry.bytes for entry in entries)
    if as_json:
        listing = [entry.to_json() for entry in entries]
        facts = {"folder": place and str(place), "bytes": size, "limit": limit, "damaged": list(map(str, damaged))}
        return print_json({**facts, "prepared": listing})
    if not limit:
        return say(f"prepared backbones are switched off by {prepared.LIMIT_VARIABLE}={os.environ[prepared.LIMIT_VARIABLE]}")
    if place is None:
        return None  # a warning says why
    rows = [
        (
            entry.facts.name,
            entry.facts.weights,
            ", ".join(layer.layer for layer in entry.facts.layers),
            entry.facts.precision,
            str(entry.facts.preprocess.crop),
            f"{entry.bytes / 2**20:.0f} MiB",
            f"{entry.used.astimezone():%Y-%m-%d %H:%M}",
        )
        for entry in entries
    ]
    if rows:
        print_table(("backbone", "weights", "features", "precision", "input", "size", "last used"), rows, left=4)
    for path in damaged:
        say(f"{path} cannot be read: it is damaged, or of another version of penult")
    return say(f"{len(rows)} prepared, {size / 2**20:.0f} MiB of at most {limit / 2**30:g} GiB, in {place}")


def _prune(*, as_json: bool) -> None:
    from extractor.backbones import prepared

    place = prepared.folder()
    count, size = prepared.prune()
    if as_json:
        return print_json({"folder": place and str(place), "removed": count, "bytes": size})
    return say(f"{place}: {count} removed, {size / 2**20:.0f} MiB") if place else None


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
    from extractor.backbones.export import obtain
    from store.format.output import require_free

    require_free(output, overwrite=overwrite)
    with Stage(f"exporting {settings.network().name}"):
        facts, origin = obtain(settings.network(), output)
    if as_json:
        return print_json({"output": str(output), **facts.description(), "prepared": origin})
    for layer in facts.layers:
        say(f"{output}: {facts.name} ({facts.weights}), {layer.dim} features, {layer.layer}, pooling {layer.pooling}")
    return None


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
