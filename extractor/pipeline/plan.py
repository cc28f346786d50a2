"""Planning of an extraction: cheap checks, the list of samples, and which of them must be read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from extractor.backbones.registry import Backbone, check_request
from extractor.data.files import Files
from extractor.data.labels import Labels, labels_of, say_labels
from extractor.data.manifest import Manifest
from extractor.data.samples import Sample, in_words
from extractor.data.sources import Source
from extractor.pixels.views import require_reference
from extractor.precision.registry import Precision, precision_of
from extractor.run_log import kept_warnings
from extractor.runtime.devices import resolve_devices
from store.cache import FeatureCache
from store.errors import InputMissingError, UsageError
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage, staged
from store.writer import require_place

from .settings import Options
from .split_rule import check_splits_possible, require_groups, say_own_splits

log = logging.getLogger("penult.extractor")


def limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first ``limit`` samples by hash rank of their paths, in order of path: a mix of classes and splits."""
    if limit is None or limit >= len(samples):
        return samples
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.path).digest())[:limit]
    return sorted(ranked, key=lambda sample: sample.path)


@staged("listing the images")
def listed_samples(source: Source) -> list[Sample]:
    """The samples of a source; a large folder takes its time."""
    return source.samples()


def list_samples(source: Source, options: Options) -> list[Sample]:
    """The samples of a run, by name and label alone.

    Raises:
        BadDataError: classes that are too small for the split.
    """
    samples = limited(listed_samples(source), options.limit)
    check_splits_possible(samples, options, source.task)
    return samples


def list_labelled(source: Source, options: Options) -> tuple[list[Sample], Labels]:
    """As `list_samples`, and what was taken for the labels, which is logged.

    Raises:
        BadDataError: classes that are too small for the split.
    """
    listed = listed_samples(source)
    samples = limited(listed, options.limit)
    labels = labels_of(source, listed, samples)
    say_labels(source, labels, samples)
    check_splits_possible(samples, options, source.task)
    return samples, labels


def count_missing(source: Manifest, samples: Sequence[Sample]) -> int:
    """The number of files of a manifest that are not there; a warning names the first."""
    with Stage("looking for missing files", len(samples), "files") as stage:
        missing = [sample.name for sample in stage.each(samples) if source.files.stat(sample.path) is None]
    if missing:
        log.warning("%d of %d files of %s are not there: %s", len(missing), len(samples), source.path, in_words(missing))
    return len(missing)


def check_cheaply(backbone: Backbone, cache: Path, options: Options) -> list[str]:
    """Check names, paths and devices before a file is opened or a network built.

    Returns:
        The devices to compute on.

    Raises:
        UsageError: no such backbone, weights or preset, or they do not fit each other.
        InputMissingError: a file of weights or a network is not there.
        OutputExistsError: there is something else in place of the cache.
        DeviceUnavailableError: the device cannot be used.
    """
    check_request(backbone)
    if options.views > 1:
        require_reference(backbone.pixel_path)
    require_place(cache)
    return devices_of(options)


def devices_of(options: Options) -> list[str]:
    """The devices to compute on; a precision that is for the CPU alone needs no other.

    Raises:
        UsageError, DeviceUnavailableError: as `check_cheaply`.
    """
    precision = precision_of(options.precision)
    devices = resolve_devices("cpu" if precision.device == "cpu" else options.device)
    require_device(precision, devices[0])
    return devices


def require_device(precision: Precision, device: str) -> None:
    """Refuse fp16 and tf32 on a CPU: there float16 is float32 with a cast before and after, and TF32 does nothing."""
    if precision.device == "cuda" and device == "cpu":
        message = f"--precision {precision.name} is for a GPU, and this is the CPU: leave it out, or pass --device cuda"
        raise UsageError(message)


def plan(
    samples: Sequence[Sample], before: SampleTable | None, cached: Set[bytes], files: Files, options: Options
) -> tuple[list[Row | None], list[tuple[int, Sample]]]:
    """The rows that are known already, and the samples that must be read.

    A file with the size, time and inode of the last run is not opened: it keeps its outcome, provided its features are
    cached. Labels, splits and groups are always the source's.

    Args:
        samples: what the source has now.
        before: the sample table of the last run.
        cached: content digests that have features.
        files: where samples are.
        options: ``retry_failed`` and ``verify_content`` are used.

    Returns:
        One row per sample (None if it must be read), and the samples to read with their indices.
    """
    known = {row.path: row for row in before.rows} if before and not options.verify_content else {}
    rows: list[Row | None] = []
    todo = []
    with Stage("looking for changed files", len(samples), "files") as stage:
        for index, sample in enumerate(stage.each(samples)):
            row = known.get(sample.path)
            if row is not None and (row.sha256 in cached if row.ok else not options.retry_failed):
                stat = files.stat(sample.path)
                if row.stat == stat:
                    outcome = (row.sha256, row.code, row.message, stat)
                    rows.append(Row(sample.path, sample.label, sample.split, sample.group, *outcome, sample.targets))
                    continue
            rows.append(None)
            todo.append((index, sample))
    return rows, todo


def preview(source: Source, backbone: Backbone, cache: Path, options: Options) -> dict[str, Any]:
    """Count what `run_extract` would do, without doing or writing anything.

    Returns:
        ``inputs``; ``unchanged``, which would not be opened; ``to_read``, of which those with unknown content are computed;
        ``labels``, ``unlabelled`` and ``subfolders``, see `Labels`; of a manifest ``missing``, the number of files that are
        not there; ``warnings``, what was warned of.
    """
    with kept_warnings() as warnings:
        check_cheaply(backbone, cache, options)
        samples, labels = list_labelled(source, options)
        say_own_splits(samples, options, source.task)
        to_read = _count_to_read(source, samples, cache, options)
        would = {"inputs": len(samples), "unchanged": len(samples) - to_read, "to_read": to_read}
        missing = {"missing": count_missing(source, samples)} if isinstance(source, Manifest) else {}
    taken = {"labels": labels.counts, "unlabelled": labels.unlabelled, "subfolders": labels.subfolder_counts}
    return {**would, **missing, **taken, "warnings": warnings}


def _count_to_read(source: Source, samples: Sequence[Sample], cache: Path, options: Options) -> int:
    try:
        opened = FeatureCache(cache)
    except InputMissingError:
        return len(samples)
    require_groups(None if options.overwrite else opened.samples, samples, resplit=options.resplit)
    known = set.intersection(*({key for s in opened.with_layer(name).shards for key in s.digests()} for name in opened.layers))
    _, todo = plan(samples, opened.samples, known, source.files, options)
    return len(todo)
