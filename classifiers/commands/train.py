"""The command ``penult train``: a head trained on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from extractor.commands.console import FOLDER, SettingsCommand, json_option, output_option, overwrite_option, print_table, say

from .console import print_bundle

if TYPE_CHECKING:
    from classifiers.training.settings import TrainSettings


@click.command(cls=SettingsCommand, model="classifiers.training.settings:train_settings")
@click.argument("cache", type=FOLDER)
@output_option("The bundle, a folder.")
@overwrite_option
@json_option
def train(cache: Path, settings: TrainSettings, output: Path, *, as_json: bool, overwrite: bool) -> None:
    """Train a head on cached features and save it as a bundle.

    The split stored in the cache is used; --val-fraction or --test-fraction make another one.

    Example: penult train photos.cache --head logistic -o photos.head
    """
    from classifiers.bundles.bundle_folder import reserved
    from classifiers.training.train import train as train_head
    from extractor.settings import FLAGS
    from store.cache import FeatureCache

    with reserved(output, overwrite=overwrite):
        features = FeatureCache(cache, settings.layer)
        with FLAGS.here():
            head = settings.make(features.samples.task.name)
        bundle = train_head(features, output, head, settings, overwrite=overwrite)
    print_bundle(bundle, as_json=as_json)
    if bundle.few_shot and not as_json:
        from classifiers.reports.tables import SHOT_COLUMNS, shot_cells

        say()
        say(f"Accuracy on {bundle.split['reported_on']!r} by training images of each class")
        print_table(SHOT_COLUMNS, [shot_cells(point) for point in bundle.few_shot], left=0)
