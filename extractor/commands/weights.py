"""The commands ``penult weights fetch``, ``import`` and ``list``: download, copy and list weight files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from extractor.commands.console import FOLDER, CommandGroup, json_option, print_json, print_table, say


@click.group(cls=CommandGroup)
def weights() -> None:
    """Bring torchvision's weights to machines without internet.

    Example: penult weights fetch resnet50
    """


@weights.command("fetch")
@click.argument("name", metavar="BACKBONE")
@click.option("--weights", "weights_name", metavar="NAME", help="Which (V1, V2, ...); by default torchvision's.")
@click.option("-o", "--output", type=FOLDER, help="Folder for the file; by default where torch and penult look for it.")
@json_option
def weights_fetch(name: str, weights_name: str | None, output: Path | None, *, as_json: bool) -> None:
    """Download the weights of a backbone, unless they are there.

    The file is checked against the digest in its name.

    Example: penult weights fetch resnet50 --weights V2 -o /media/usb
    """
    from extractor.backbones.registry import choose_weights
    from extractor.backbones.weights import WeightsFile, fetch

    file = WeightsFile(name, choose_weights(name, weights_name, "--weights"))
    path, digest, new = fetch(file, output)
    if as_json:
        facts = {"network": name, "weights": file.entry.name, "licence": file.licence, "source": file.entry.url}
        return print_json({"file": str(path), "bytes": path.stat().st_size, "sha256": digest, "downloaded": new, **facts})
    say(f"{path}: {'downloaded' if new else 'already there and sound'}, {path.stat().st_size / 2**20:.1f} MiB")
    say(f"sha256 {digest}")
    say(f"{name} {file.entry.name}, licence {file.licence}")
    return say(f"Bring this file to the other machine and run there: penult weights import {file.name}")


@weights.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FOLDER)
@json_option
def weights_import(files: Sequence[Path], *, as_json: bool) -> None:
    """Take weights from another machine to where torch looks.

    They are checked against torchvision's digests. Afterwards `penult extract -m BACKBONE` uses them without a flag. A file may
    have been renamed.

    Example: penult weights import /media/usb/resnet50-11ad3fa6.pth
    """
    from extractor.backbones.networks import import_weights

    done = []
    for path in files:
        file, target, new = import_weights(path)
        done.append({"file": str(target), "network": file.network, "weights": file.entry.name, "copied": new})
        if not as_json:
            what = "copied, checked" if new else "already there and sound"
            say(f"{target}: {what}; {file.network} {file.entry.name}, licence {file.licence}")
    if as_json:
        print_json(done)


@weights.command("list")
@json_option
def weights_list(*, as_json: bool) -> None:
    """List which of torchvision's files are here and sound.

    Example: penult weights list --json
    """
    from extractor.backbones.weights import survey_files

    files = survey_files()
    if as_json:
        return print_json(files)
    rows = [(Path(f["file"]).name, f["network"], f["weights"], f"{f['bytes'] / 2**20:.1f} MiB", f["state"]) for f in files]
    return print_table(("file", "backbone", "weights", "size", "state"), rows, left=3)
