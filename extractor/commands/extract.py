"""The command ``penult extract``: pass images through a backbone once, and write their features into a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from extractor.commands.console import (
    FOLDER,
    WITH_FAILURES,
    SettingsCommand,
    is_quiet,
    json_option,
    observing_options,
    output_option,
    overwrite_option,
    print_json,
    print_preview,
    say_text,
)

if TYPE_CHECKING:
    from extractor.pipeline.settings import ExtractSettings


@click.command(cls=SettingsCommand, model="extractor.pipeline.settings:ExtractSettings")
@click.argument("data", type=FOLDER)
@output_option("The cache, a folder.")
@observing_options
@overwrite_option
@json_option
def extract(data: Path, settings: ExtractSettings, output: Path, *, as_json: bool, overwrite: bool, **observing: Any) -> int:
    """Pass images through a backbone once; cache the features.

    Run it again to resume or to update. DATA is a folder per class, train|val|test folders of these, a flat folder, a CSV or
    Parquet file with a column `path`, a .tar file or a folder of them, or torchvision:NAME@DIR.

    Example: penult extract photos/ -m resnet50 -o photos.cache
    """
    from extractor.pipeline.plan import preview
    from extractor.pipeline.run import run_extract
    from extractor.pipeline.settings import Options
    from extractor.run_log import observed

    source, backbone = settings.source(data), settings.network()
    chosen = settings.part(Options).replace(overwrite=overwrite, quiet=is_quiet())
    if observing["dry_run"]:
        print_preview(preview(source, backbone, output, chosen), as_json=as_json)
        return 0
    with observed(log_json=observing["log_json"], metrics=observing["metrics"]) as record:
        summary = run_extract(source, backbone, output, chosen)
        code = WITH_FAILURES if summary.failed else 0
        record |= {"exit_code": code, "extract": summary.to_json()}
    if as_json:
        print_json(summary.to_json())
    else:
        say_text(summary.text())
    return code
