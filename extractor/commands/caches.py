"""The commands ``penult info``, ``verify`` and ``compact``: show, check and compact a finished cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from extractor.commands.console import (
    FOLDER,
    Command,
    json_option,
    one_layer_option,
    overwrite_option,
    print_json,
    print_table,
    say,
)


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@one_layer_option
@json_option
def info(cache: Path, layer: str | None, *, as_json: bool) -> None:
    """Show what is in a cache: rows, labels, failures.

    Also its fingerprint: everything that decides the numbers.

    Example: penult info photos.cache
    """
    from store.cache import FeatureCache
    from store.fingerprint import short

    opened = FeatureCache(cache, layer)
    facts = opened.describe()
    if as_json:
        return print_json(facts)
    counts = facts["counts"]
    each = f" in {facts['views']} views each" if facts["views"] > 1 else ""
    say(f"{cache}: {facts['rows']} rows{each} of {facts['dim']} {facts['dtype']} features in {facts['shards']} shard(s)")
    say(f"{counts['inputs']} inputs = {counts['ok']} ok + {counts['duplicates']} duplicates + {counts['failed']} failed")
    if len(facts["layers"]) > 1:
        say(f"features of {', '.join(facts['layers'])}; these are those of {opened.layer} (--layer shows others)")
    splits = facts["splits"]
    labels = [(label, *(str(per.get(s, 0)) for s in splits), str(sum(per.values()))) for label, per in facts["labels"].items()]
    print_table(("label", *splits, "images"), labels)
    made = facts["facts"]
    if "weights" in made:
        say(", ".join(filter(None, [f"weights {made['weights']}", made.get("source")])))
    if "calibration" in made:
        say(_conversion(cache, facts["fingerprint"].get("precision", ""), made["calibration"]))
    for name, target in facts["targets"].items():
        say(f"target {name}: {target['given']} given, {target['min']} to {target['max']}")
    if facts["failures"]:
        print_table(("failed", "code", "message"), [(f["path"], f["code"], f["message"]) for f in facts["failures"]], left=3)
    leaves = opened.fingerprint.leaves().items()
    return print_table(("fingerprint", "value"), [(key, short(value)) for key, value in leaves], left=2)


def _conversion(cache: Path, precision: str, calibration: dict[str, Any]) -> str:
    """The outcome of the conversion of a cache's backbone, in words.

    Raises:
        BadDataError: the cache does not describe it.
    """
    from extractor.precision.registry import precision_of
    from store.errors import BadDataError

    try:
        return precision_of(precision).describe(calibration)
    except BadDataError as error:
        message = f"{cache}: {error}"
        raise BadDataError(message) from error


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@json_option
def verify(cache: Path, *, as_json: bool) -> None:
    """Check every file of a cache against its checksum.

    Every sample must have its features, too; exit 65 if not. `penult extract` computes again what is damaged, and nothing else.

    Example: penult verify photos.cache
    """
    from store.errors import CorruptCacheError
    from store.verify import verify_cache

    findings = verify_cache(cache)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    for finding in [] if as_json else findings:
        say(f"{finding.file}\t{finding.problem}")
    if findings:
        message = f"{cache}: {len(findings)} finding(s); run the extract command that made it again to repair it"
        raise CorruptCacheError(message)
    if not as_json:
        say(f"{cache}: sound")


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="The HDF5 file to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="MATLAB and HDFView read float32 only.",
)
@click.option("--prune", is_flag=True, help="Remove features of images that are gone from the cache itself.")
@one_layer_option
@overwrite_option
def compact(cache: Path, output: Path | None, dtype: str, layer: str | None, *, prune: bool, overwrite: bool) -> None:
    """Write a cache as one self-contained HDF5 file, or prune it.

    Example: penult compact photos.cache -o photos.h5
    """
    from store.cache import FeatureCache
    from store.compact import prune as prune_cache
    from store.compact import write_compact
    from store.format.output import require_free

    if not output and not prune:
        message = "pass -o FILE.h5, --prune, or both"
        raise click.UsageError(message)
    if output:
        require_free(output, overwrite=overwrite)
    if prune:
        removed, kept = prune_cache(cache)
        say(f"{cache}: {removed} rows removed, {kept} kept")
    if output:
        rows = write_compact(FeatureCache(cache, layer), output, dtype=dtype, overwrite=overwrite)
        say(f"{output}: {rows} rows, {output.stat().st_size / 2**20:.1f} MiB")
