"""The extraction run: from a source of images to a finished cache, shard by shard.

Decoding, the backbone and the disk work at the same time: `Reader` decodes ahead, `embedded` keeps every lane of the backbone
busy, and `run_shard` is the unit: it takes batches of features, commits one shard and returns its counts. A run that dies
loses only what was not committed, and the next one continues from the shards.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extractor.backbones.registry import Backbone
from extractor.data.reader import Reader, WorkerPool
from extractor.data.samples import Sample
from extractor.data.sources import Source, open_source
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.machine import Clock, Meter, cores, new_clock, timed, together
from extractor.pixels.decoder import Decoder
from extractor.pixels.preprocess import Preprocess
from extractor.pixels.views import require_reference
from extractor.precision.calibration import count_moved
from extractor.precision.registry import Report, TrainingImages, precision_of
from extractor.run_log import kept_warnings
from extractor.runtime.batch_size import Pace
from extractor.runtime.devices import DevicePool, open_embedder
from extractor.runtime.session import Embedder
from extractor.signals import StopFlag, stop_on_signal
from store.cache import FeatureCache
from store.errors import BudgetExceededError, InterruptedRunError, StorageError
from store.format.calibration import read_calibration
from store.format.metadata import BACKBONE, shard_paths
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage
from store.writer import CacheWriter, open_writer

from .batches import embedded, run_shard
from .first_look import first_look
from .plan import check_cheaply, list_labelled, list_samples, plan, require_device
from .prepare import fingerprints, library_versions, prepare_backbone
from .settings import Options
from .split_rule import require_groups, resolve_splits, say_own_splits, say_splits
from .summary import Summary, bottleneck, stages
from .tally import Tally, resumed

log = logging.getLogger("penult.extractor")


def extract(
    data: str | Path | Source, backbone: str | Backbone, cache: str | Path, options: Options | None = None
) -> FeatureCache:
    """Pass images through a backbone once and cache their features; or bring a cache up to date, computing only what is new.

    Args:
        data: images, as `open_source` takes them, or what that returned.
        backbone: the name of a torchvision network, an ONNX file, or a `Backbone`, which also says which weights and layers.
        cache: the folder of the cache.
        options: device, split, views and more, see docs/options.md.

    Returns:
        The cache, opened: features ``(n, d)``, float16 if the values fit, else float32.

    Raises:
        BudgetExceededError: more images failed than ``max_failures`` allows; what succeeded is kept.
        FingerprintMismatchError: the cache was made differently; names what differs.
        PenultError: see the tree in `store.errors`.

    >>> import extractor
    >>> extractor.extract("pets/", "tiny.onnx", "new.cache", extractor.Options(device="cpu", quiet=True))
    <FeatureCache new.cache: 30 images, labels cat, dog, features of 'last'>
    """
    source = open_source(data) if isinstance(data, str | Path) else data
    run_extract(source, Backbone(backbone) if isinstance(backbone, str) else backbone, Path(cache), options or Options())
    return FeatureCache(cache)


@dataclass(frozen=True)
class _Request:
    """The request of a run, after the cheap checks."""

    source: Source
    backbone: Backbone
    cache: Path
    options: Options
    devices: list[str]
    samples: list[Sample]


@dataclass(frozen=True)
class _Opened:
    """A backbone in the cache, with its session and the decoder of its images.

    Attributes:
        facts: of the backbone.
        decoder, embedder: started.
        before: the sample table of the last run; None if there was none.
        look: what the backbone sees in the first photo, see `first_look`.
        origin: where the backbone is from, see `prepare_backbone`.
        report: of the conversion to the precision, if it was made in this run.
    """

    facts: BackboneFacts
    decoder: Decoder
    embedder: Embedder | DevicePool
    before: SampleTable | None
    look: dict[str, Any]
    origin: str
    report: Report


@dataclass(frozen=True)
class _Streamed:
    """The outcome of every input, and the number and time of the computed ones.

    Attributes:
        rows: of all inputs, unless the run stopped.
        computed: images that went through the backbone.
        adopted: images whose features came with its calibration.
        working: seconds spent on both.
        workers: decoding threads.
        cached: inputs whose features were in the cache before.
    """

    rows: list[Row]
    computed: int
    adopted: int
    working: float
    workers: int
    cached: int


def run_extract(source: Source, backbone: Backbone, cache: Path, options: Options) -> Summary:
    """Pass every image of a source that has no features yet through the backbone once: plan, open, stream, finish.

    Raises:
        BudgetExceededError: more inputs failed than allowed; what succeeded is kept.
        FingerprintMismatchError: the cache was made differently.
        InterruptedRunError: SIGINT or SIGTERM came; everything embedded until then is committed.
        PenultError: see the tree in ``store.errors``.
    """
    with kept_warnings() as warnings, Stage("extracting", bar=False, quiet=options.quiet):
        return _run(source, backbone, cache, options, warnings)


def _run(source: Source, backbone: Backbone, cache: Path, options: Options, warnings: list[str]) -> Summary:
    started, clock = time.perf_counter(), new_clock()
    devices = check_cheaply(backbone, cache, options)
    with timed(clock, "list"):
        samples, labels = list_labelled(source, options)
    request = _Request(source, backbone, cache, options, devices, samples)
    meter = Meter(*devices)
    with open_writer(cache) as writer, stop_on_signal() as stop, _open(request, writer, stop, clock) as opened:
        streamed = _stream(request, writer, opened, stop, clock)
        with timed(clock, "finish"):
            table, unchanged, changes = _finish(request, writer, opened, streamed, meter)
    summary = Summary(
        cache=str(cache),
        **table.counts,
        computed=streamed.computed + streamed.adopted,
        calibrated=streamed.adopted,
        cached=streamed.cached,
        inference_calls=opened.embedder.calls,
        provider=opened.embedder.provider,
        images_per_second=float(f"{streamed.computed / max(clock['images'], 1e-9):.4g}"),
        cache_bytes=sum(path.stat().st_size for path in shard_paths(cache)),
        batch_size=opened.embedder.batch_size,
        lanes=opened.embedder.lanes,
        workers=streamed.workers,
        views=options.views,
        bottleneck=bottleneck(clock, shares_cores=opened.embedder.shares_cores) if streamed.computed else "",
        seconds=stages(clock, time.perf_counter() - started),
        codes=dict(Counter(row.code for row in table.rows if row.code)),
        labels=labels.counts,
        unlabelled=labels.unlabelled,
        changes=changes,
        subfolders=labels.subfolder_counts,
        conversion=opened.report.facts(len(samples), options.views),
        backbone={**opened.facts.description(), "precision": opened.facts.precision, "prepared": opened.origin}
        | ({"look": opened.look} if opened.look else {}),
        warnings=warnings,
    )
    if not table.counts["ok"]:
        log.warning("there are no features: none of the %d inputs could be used", len(table.rows))
    elif not streamed.computed + streamed.adopted:
        log.info("nothing to compute: all features are cached%s", ", and the dataset is unchanged" if unchanged else "")
    budget = options.budget(len(request.samples))
    if summary.failed > budget:
        message = (
            f"{summary.failed} of {len(table.rows)} inputs failed{summary.codes_text} and --max-failures "
            f"{options.max_failures} allows {budget}; see {cache}/ledger.jsonl"
        )
        raise BudgetExceededError(message, facts={"extract": summary.to_json()})
    return summary


@contextmanager
def _open(request: _Request, writer: CacheWriter, stop: StopFlag, clock: Clock) -> Iterator[_Opened]:
    """Put the backbone into the cache, start its session and the decoder, and agree with the cache on the fingerprint."""
    options, drawn, precision = request.options, request.options.drawn, precision_of(request.options.precision)
    tf32, split = precision.tf32, (options.val_fraction, options.test_fraction, options.seed)
    images = TrainingImages(request.source, request.samples, *split, options.workers, stop)
    conversion = precision.conversion(images)
    require_groups(None if options.overwrite else writer.samples, request.samples, resplit=options.resplit)
    with Stage(f"preparing {Path(request.backbone.name).name}"):
        facts, notes, origin = prepare_backbone(
            writer,
            request.backbone,
            overwrite=options.overwrite,
            stop=stop,
            precision=precision,
            conversion=conversion,
            clock=clock,
        )
    if drawn:
        require_reference(facts.preprocess.pixel_path)  # an ONNX file may have another one
    began = time.perf_counter()
    with ExitStack() as stack, ExitStack() as opening:
        opening.enter_context(Stage("starting the session"))
        decoder = stack.enter_context(Decoder(facts.preprocess, crop=drawn is None, stop=stop))
        decoder.start()  # while the session opens, which takes as long
        # The session checks the device before any image is read.
        require_device(precision_of(facts.precision), request.devices[0])  # an ONNX file may be float16 itself
        model = request.cache / BACKBONE
        size = options.batch_size
        embedder = open_embedder(request.devices, model, facts.preprocess, batch_size=size, outputs=facts.outputs, tf32=tf32)
        stack.callback(embedder.close)
        sets = fingerprints(facts, embedder.provider, options.storage, tf32=tf32, views=drawn)
        look = notes.get("look") or first_look(request.backbone, facts, decoder, request.source.files, request.samples)
        writer.begin(*sets, facts={**notes, **({"look": look} if look else {}), "versions": library_versions()})
        numbers = len(request.samples) * options.views * sum(embedder.dims)
        opening.close()
        _check_disk(request.cache, numbers * (4 if options.storage == "float32" else 2))
        clock["start"] += time.perf_counter() - began
        yield _Opened(facts, decoder, embedder, writer.samples, look, origin, images.report)


def _adopt(writer: CacheWriter, report: Report) -> int:
    """Write the features that came with the calibration, so that its images are not computed again; return their number."""
    if not report.paths:
        return 0
    kept = read_calibration(writer.path)
    places = [i for i, digest in enumerate(kept.sha256) if digest not in writer.known]
    digests = [kept.sha256[i] for i in places]
    writer.append([rows[places] for rows in kept.rounded], digests, [report.paths[digest] for digest in digests])
    return writer.commit()


def _stream(request: _Request, writer: CacheWriter, opened: _Opened, stop: StopFlag, clock: Clock) -> _Streamed:
    """Read, decode, embed and write what is not cached yet.

    Raises:
        InterruptedRunError: a signal came; what was embedded until then is committed.
    """
    options, embedder, before = request.options, opened.embedder, opened.before
    if before and options.limit and len(request.samples) < len(before.rows):
        counts = len(request.samples), len(before.rows)
        log.warning("--limit leaves %d of the %d samples in the sample table; features are kept", *counts)
    with timed(clock, "compare"):
        outcomes, todo = plan(request.samples, before, writer.known, request.source.files, options)
        left = resumed(outcomes, todo, before, writer)
    left.say()
    if pays_from := opened.report.facts(len(request.samples), options.views).get("pays_from"):
        log.info("%s pays from about %d images on; this run has %d", opened.facts.precision, pays_from, len(request.samples))
    adopted = _adopt(writer, opened.report) if options.drawn is None else 0
    pace = Pace(embedder, options.views * len(todo) if options.batch_size is None else 0)
    workers = WorkerPool(options.workers, shares_cores=embedder.shares_cores)
    ahead = 2 * math.ceil(embedder.batch_size / options.views)
    files, preprocess = request.source.files, opened.facts.preprocess
    reader = Reader(files, preprocess, writer.known, workers, ahead=ahead, views=options.drawn)
    total, computed, fail_fast = len(request.samples), 0, options.on_error == "fail"
    tally = Tally(outcomes, total)
    new = set(opened.report.paths) if adopted else set[bytes]()
    with (
        Stage("extracting", total, "images", done=total - len(todo), cached=left.stored + adopted) as progress,
        closing(reader.stream(todo, stop, opened.decoder)) as stream,
    ):
        batches = embedded(stream, embedder, pace, progress, clock, views=options.views, fail_fast=fail_fast)
        while result := run_shard(batches, writer, clock):
            for outcome in result.outcomes:
                outcomes[outcome.index] = outcome.row
                tally.add(outcome.row)
                new |= {outcome.row.sha256} if outcome.decoded else set()
            computed += result.computed
            done = {"event": "shard", "inputs": len(result.outcomes), "computed": result.computed, **tally.facts()}
            log.debug("%(done)d of %(total)d inputs done, %(computed)d computed", done, extra={"facts": done})
        with timed(clock, "settle"):
            writer.settle()
    clock |= {**reader.seconds, "backbone": embedder.seconds, "write": writer.seconds}
    clock["images"] = sum(clock[name] for name in ("wait", "embed", "settle"))
    if stop:
        raise InterruptedRunError(stop.signum)
    rows = _fail_copies([row for row in outcomes if row is not None], writer.known)
    if fail_fast:
        _fail_fast(rows)
    working = clock["images"] + (clock["convert"] if adopted else 0.0)
    cached = sum(row.ok and row.sha256 not in new for row in rows)
    return _Streamed(rows, computed, adopted, working, workers.size, cached)


def _finish(
    request: _Request, writer: CacheWriter, opened: _Opened, streamed: _Streamed, meter: Meter
) -> tuple[SampleTable, bool, dict[str, int]]:
    """Split the samples and replace the sample table; return it, whether it is the same, and what `say_splits` counted.

    Raises:
        BadDataError: images that were moved belonged to groups in the last run and have none now; the table stays as it was.
    """
    source, options, before = request.source, request.options, opened.before
    computed = streamed.computed + streamed.adopted
    require_groups(None if options.overwrite else before, streamed.rows, resplit=options.resplit)
    rows, rule = resolve_splits(streamed.rows, options, source.task, None if options.overwrite else before)
    changes = say_splits(before, rows, rule, source.task)
    if rule["rule"] == "source":
        say_own_splits([row for row in rows if row.ok], options, source.task)
    if opened.facts.precision == "int8" and (moved := count_moved(request.cache, rows)):
        log.warning("%d images that int8 was calibrated on are in 'val' or 'test' now; --overwrite calibrates again", moved)
    spent = (before.facts.get("extract_seconds", 0.0) if before else 0.0) + (streamed.working if computed else 0)
    facts = {**_facts(source, rule, rows, options), "extract_seconds": round(spent, 3)}
    cost = before.facts.get("extract_cost") if before else None
    if computed or cost:
        facts["extract_cost"] = together(cost, meter.read().facts()) if computed else cost
    table = SampleTable(rows, facts, source.task.targets)
    return table, not writer.finish(table), changes


def survey(source: Source, preprocess: Preprocess, options: Options) -> SampleTable:
    """Read, hash and decode every input without embedding any: the sample table that `run_extract` would write."""
    samples = list_samples(source, options)
    reader = Reader(source.files, preprocess, set(), WorkerPool(options.workers or cores()))
    with Stage("reading images", len(samples), "images") as stage:
        outcomes = stage.each(reader.stream(list(enumerate(samples)), StopFlag()))
        rows = _fail_copies([outcome.row for outcome in outcomes], set())
    rows, rule = resolve_splits(rows, options, source.task)
    return SampleTable(rows, _facts(source, rule, rows, options), source.task.targets)


def _facts(source: Source, rule: dict[str, Any], rows: Sequence[Row], options: Options) -> dict[str, Any]:
    root = os.fsencode(Path(source.root).absolute()).hex()
    exceeded = sum(not row.ok for row in rows) > options.budget(len(rows))
    origin = {} if source.origin is None else {"source": source.origin}
    pattern = getattr(source, "group_by", None)
    grouped = {"group_by": pattern or "group"} if any(row.group for row in rows) else {}
    return {"root": root, **origin, "task": source.task.name, "split": rule, **grouped, "budget_exceeded": exceeded}


def _check_disk(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if needed > free:
        message = f"{cache} needs about {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free"
        raise StorageError(message)


def _fail_copies(rows: list[Row], known: set[bytes]) -> list[Row]:
    """Mark the duplicates of a failed file as failed too: only the first of them was decoded."""
    failures = {row.sha256: row for row in rows if not row.ok and row.sha256}
    return [
        replace(row, code=failures[row.sha256].code, message=failures[row.sha256].message)
        if row.ok and row.sha256 in failures and row.sha256 not in known
        else row
        for row in rows
    ]


def _fail_fast(rows: Sequence[Row]) -> None:
    for row in rows:
        if not row.ok:
            message = f"{row.name}: {row.code}: {row.message} (--on-error fail)"
            raise BudgetExceededError(message)
