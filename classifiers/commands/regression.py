"""The commands of regression tests on cached features: ``penult check`` and ``penult diff``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from extractor.commands.console import FOLDER, Command, json_option, one_layer_option, print_json, print_table, say

if TYPE_CHECKING:
    from store.cache import FeatureCache


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@click.option("--against", required=True, type=FOLDER, help="The golden cache, a folder or a compact file.")
@click.option("--head", type=FOLDER, help="Also require that no decision of this bundle's head flips.")
@click.option("--tolerance", type=click.FloatRange(0), help="Relative L2 per row; by default what the fingerprints allow.")
@click.option("--update", is_flag=True, help="Show what changed, then make CACHE the golden one (a compact file).")
@one_layer_option
@json_option
def check(
    cache: Path, against: Path, head: Path | None, tolerance: float | None, layer: str | None, *, update: bool, as_json: bool
) -> None:
    """Regression test on cached features: exit 65 on a change.

    CACHE must hold what the golden cache holds: images, labels, storage type, fingerprint and features; only the device (CPU
    or GPU) may differ.

    Example: penult check today.cache --against golden.h5 --head photos.head
    """
    from store.cache import FeatureCache
    from store.compact import write_compact
    from store.drift import compare_caches
    from store.errors import BadDataError
    from store.format.output import require_free

    if update:
        require_free(against, overwrite=True)
    current = FeatureCache(cache, layer)
    if update and not against.exists():
        rows = write_compact(current, against, dtype=str(current.dtype))
        if as_json:
            return print_json({"new": str(against), "rows": rows})
        return say(f"{against}: new, {rows} rows")
    golden = FeatureCache(against, layer)
    drift = compare_caches(golden, current, predict=decisions(head, golden), bound=tolerance)
    print_drift(drift, as_json=as_json)
    if update:
        write_compact(current, against, dtype=str(current.dtype), overwrite=True)
        say(f"{against} is replaced", err=True)
    elif not drift.passed:
        message = f"{cache} does not match {against}: {'; '.join(drift.causes) or 'see the table'}"
        raise BadDataError(message)
    return None


@click.command(cls=Command)
@click.argument("first", metavar="CACHE_A", type=FOLDER)
@click.argument("second", metavar="CACHE_B", type=FOLDER)
@click.option("--head", type=FOLDER, help="Also count the decisions of this bundle's head that flip.")
@one_layer_option
@json_option
def diff(first: Path, second: Path, head: Path | None, layer: str | None, *, as_json: bool) -> None:
    """Show what changed from one cache to another, and why.

    Example: penult diff last-month.cache today.cache --head photos.head
    """
    from store.cache import FeatureCache
    from store.drift import compare_caches

    one, other = FeatureCache(first, layer), FeatureCache(second, layer)
    drift = compare_caches(one, other, predict=decisions(head, one))
    print_drift(drift, as_json=as_json)


def decisions(bundle: Path | None, cache: FeatureCache) -> Any:
    """The decisions of a bundle's head, as a function from features to class indices; None without a bundle."""
    if bundle is None:
        return None
    from classifiers.bundles.bundle import Bundle
    from classifiers.bundles.held_out import ACCEPTED
    from classifiers.evaluation.scores import require_finite
    from classifiers.evaluation.task import need_single_label

    loaded = Bundle.load(bundle)
    need_single_label(loaded.task, "counting changed decisions")
    features = cache.fingerprint.single
    loaded.fingerprint.single.require(features, mine=f"the head of {bundle}", theirs=str(cache.path), ignore=ACCEPTED)
    head = loaded.head_function()

    def decided(features: Any) -> Any:
        outputs = head(features)
        require_finite(outputs, str(bundle))
        return outputs.argmax(axis=1)

    return decided


def print_drift(drift: Any, *, as_json: bool) -> None:
    if as_json:
        return print_json(drift.to_json())
    print_table(("what", "value"), drift.rows(), left=2)
    for cause in drift.causes:
        say(f"cause: {cause}")
    return None
