"""The command ``penult finetune``: backbone and head trained end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from extractor.commands.console import FOLDER, SettingsCommand, is_quiet, json_option, output_option, overwrite_option

from .console import print_bundle

if TYPE_CHECKING:
    from classifiers.finetuning.settings import FineTuneSettings


@click.command(cls=SettingsCommand, model="classifiers.finetuning.settings:FineTuneSettings")
@click.argument("data", type=FOLDER)
@output_option("The bundle, a folder.")
@overwrite_option
@json_option
def finetune(data: Path, settings: FineTuneSettings, output: Path, *, as_json: bool, overwrite: bool) -> None:
    """Fine-tune a backbone end to end on the same split.

    DATA is a cache, whose samples and split are used, or a dataset as for `penult extract`. After an interruption, the same
    command continues after the last finished epoch. docs/finetune.md explains the flags.

    Example: penult finetune photos.cache -m resnet50 -o photos-finetuned.head
    """
    from classifiers.bundles.bundle_folder import reserved
    from classifiers.finetuning.finetune import finetune as finetune_network
    from extractor.settings import flag_of
    from store.cache import is_cache

    with reserved(output, overwrite=overwrite):
        if is_cache(data):
            unused = settings.explicit().keys() & {"val_fraction", "test_fraction", "group_by", "limit"}
            if unused:
                flags = ", ".join(sorted(flag_of(type(settings), name) for name in unused))
                message = f"{flags}: {data} is a cache, and fine-tuning uses its samples and its split"
                raise click.UsageError(message)
        bundle = finetune_network(data, output, settings.replace(quiet=is_quiet()), overwrite=overwrite)
    print_bundle(bundle, as_json=as_json)
