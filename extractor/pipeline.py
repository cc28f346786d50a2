"""Plan, run shard after shard, finalize: from a source to a finished cache.

Decoding, the backbone and the disk work at the same time: `Reader` decodes ahead, `embedded` keeps every lane of the backbone
busy, and `run_shard` is the unit: it takes batches of features, commits one shard and returns its counts. A run that dies
between two of them has lost only what was not committed, and the next one continues from the shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.cache import FeatureCache, assign_splits, shard_paths
from store.errors import BudgetExceededError, InputMissingError, InterruptedRunError, StorageError, UsageError
from store.samples import SINGLE_LABEL, Row, SampleTable
from store.splits import require_sizes, rule_text, split_names, untrained_labels
from store.writer import CacheWriter, open_writer

from .backbones import Backbone
from .calibration import Calibrator, count_moved
from .cuda import Cuda
from .files import Files
from .fleet import Fleet, open_embedder, resolve_devices
from .prepare import fingerprints, library_versions, prepare_backbone
from .preprocess import Preprocess
from .progress import Progress, StopFlag, stop_on_signal
from .reading import Clock, Crew, Outcome, Reader, timed
from .samples import Sample, Task
from .session import Embedder, cores
from .sources import Source
from .tuning import tune

log = logging.getLogger("penult.extractor")

MIN_BUDGET = 3


@dataclass(frozen=True)
class Options:
    """How to extract; the defaults are the command line's.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``tensorrt``, ``tensorrt:N``, or several of one
            kind with commas, by one process each.
        batch_size: images per inference call; None for what is measured to be fast where there is much to do, see `tuning`.
        workers: decoding threads; None for as many as are needed, see `reading.Crew`.
        storage: ``auto`` (float16 where the values fit) or ``float32``.
        val_fraction, test_fraction, seed: the split, where the data has none.
        fail_fast: stop at the first input that fails.
        max_failures: budget as a number, ``"N"``, or a share, ``"P%"`` (then at least 3 files).
        retry_failed: try recorded failures again.
        verify_content: read and hash files even where size, time and inode are unchanged.
        limit: only so many inputs, chosen by hash rank.
        overwrite: start a new cache in place of an old one.
        quiet: no progress line.
        precision: ``fp32``, ``int8`` (on the CPU, calibrated once on training images), or ``fp16`` (on a GPU).
        tf32: let a GPU round the products of float32 to 10 bits, for speed.
    """

    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    storage: str = "auto"
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    seed: int = 0
    fail_fast: bool = False
    max_failures: str = "1%"
    retry_failed: bool = False
    verify_content: bool = False
    limit: int | None = None
    overwrite: bool = False
    quiet: bool = False
    precision: str = "fp32"
    tf32: bool = False

    def budget(self, inputs: int) -> int:
        """How many inputs may fail."""
        text = self.max_failures.strip()
        try:
            if text.startswith("-"):
                raise ValueError
            if text.endswith("%"):
                return max(MIN_BUDGET, int(float(text[:-1]) / 100 * inputs))
            return int(text)
        except ValueError:
            message = f"--max-failures {text}: expected a number such as 10, or a share such as 1%"
            raise UsageError(message) from None


@dataclass
class Summary:
    """What a run did; ok + duplicates + failed = inputs.

    Attributes:
        inputs, ok, duplicates, failed: outcome of every input; ok counts distinct contents.
        computed: images that went through the backbone in this run.
        inference_calls: calls of the backbone in this run.
        images_per_second: computed images over the time spent on them; 0 where there were none.
        cache_bytes: size of all shards.
        batch_size, lanes, workers: as used.
        seconds: wall time by stage. ``read+decode`` and ``backbone`` are summed over workers and lanes, ``write`` is
            beside them; ``wait`` was spent waiting for pixels, ``embed`` for features, ``settle`` for the disk.
        bottleneck: the stage that decided the speed: ``decoding``, ``backbone``, ``writing``, or none.
        codes: number of failures by code.
    """

    cache: str = ""
    inputs: int = 0
    ok: int = 0
    duplicates: int = 0
    failed: int = 0
    computed: int = 0
    inference_calls: int = 0
    provider: str = ""
    images_per_second: float = 0.0
    cache_bytes: int = 0
    batch_size: int = 0
    lanes: int = 0
    workers: int = 0
    bottleneck: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people: one line that reconciles, one that says what the run did, and where it was long, why it took so long."""
        codes = f" ({', '.join(f'{code} {count}' for code, count in sorted(self.codes.items()))})" if self.codes else ""
        lines = [f"{self.inputs} inputs = {self.ok} ok + {self.duplicates} duplicates + {self.failed} failed{codes}"]
        total = self.seconds["total"]
        if not self.computed:
            return "\n".join([*lines, f"nothing to compute, 0 inference calls, {total:.1f} s"])
        each = {name: 1000 * self.seconds[name] / self.computed for name in ("read+decode", "backbone", "write")}
        lines.append(
            f"{self.computed} computed on {self.provider} in {total:.1f} s, {self.images_per_second:.0f} images/s "
            f"(ms an image: decoding {each['read+decode']:.1f} in {self.workers} workers, "
            f"backbone {each['backbone']:.1f} in {self.lanes} lanes of {self.batch_size}, writing {each['write']:.1f})"
        )
        if total >= ADVICE_SECONDS:
            advice = ADVICE[self.bottleneck, "cpu" if self.provider == "cpu" else "gpu"]
            lines.append(f"bottleneck: {self.bottleneck}; {advice}")
        return "\n".join(lines)


ADVICE_SECONDS = 20.0  # nobody minds what took less
ADVICE = {
    ("decoding", "cpu"): "more cores, smaller photos, or another --pixel-path would help",
    ("decoding", "gpu"): "the GPU waited for images; more cores, smaller photos, or another --pixel-path would help",
    ("backbone", "cpu"): "--precision int8, a smaller network or a GPU would help",
    ("backbone", "gpu"): "--precision fp16 or a smaller network would help",
    ("writing", "cpu"): "the disk of the cache is slow",
    ("writing", "gpu"): "the disk of the cache is slow",
}


def bottleneck(seconds: Clock, provider: str) -> str:
    """The stage that decided the speed.

    On a GPU it is what the consumer waited for. On a CPU decoding and backbone share the cores, so it is the larger share of
    the work; unless the consumer waited for the disk.
    """
    waits = {"decoding": seconds["wait"], "backbone": seconds["embed"], "writing": seconds["settle"]}
    if provider == "cpu" and max(waits, key=waits.__getitem__) != "writing":
        return "decoding" if seconds["read+decode"] > seconds["backbone"] else "backbone"
    return max(waits, key=waits.__getitem__)


def limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first so many samples by hash rank of their paths, in order of path: some of every class and split."""
    if limit is None or limit >= len(samples):
        return samples
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.path).digest())[:limit]
    return sorted(ranked, key=lambda sample: sample.path)


def extract(source: Source, backbone: Backbone, cache: str | Path, options: Options | None = None) -> FeatureCache:
    """Make or update a cache; the Python face of `run_extract`, which also returns the summary."""
    run_extract(source, backbone, Path(cache), options or Options())
    return FeatureCache(cache)


def run_extract(source: Source, backbone: Backbone, cache: Path, options: Options) -> Summary:
    """Pass every image of a source that has no features yet through the backbone once.

    Raises:
        BudgetExceededError: more inputs failed than allowed; what succeeded is kept.
        FingerprintMismatchError: the cache was made differently.
        InterruptedRunError: SIGINT or SIGTERM came; everything embedded until then is committed.
        PenultError: see the tree in ``store.errors``.
    """
    started = time.perf_counter()
    samples = limited(source.samples(), options.limit)
    budget = options.budget(len(samples))
    _check_splits_possible(samples, options, source.task)
    devices = resolve_devices(_device(options))
    _check_for_gpu(options.precision, devices[0], tf32=options.tf32)
    with open_writer(cache) as writer, stop_on_signal() as stop, ExitStack() as opened:
        division = (options.val_fraction, options.test_fraction, options.seed)
        calibrator = Calibrator(source, samples, *division, options.workers, stop) if options.precision == "int8" else None
        half = options.precision == "fp16"
        facts, notes = prepare_backbone(
            writer, backbone, overwrite=options.overwrite, stop=stop, quantise=calibrator, half=half
        )
        # The session proves the device before any image is read.
        _check_for_gpu(facts.precision, devices[0])  # the file may say so itself
        cuda = Cuda(tf32=options.tf32, half=facts.precision == "fp16")
        embedder = open_embedder(
            devices,
            cache / "backbone.onnx",
            facts.preprocess,
            batch_size=options.batch_size,
            outputs=facts.outputs,
            cuda=cuda,
        )
        opened.callback(embedder.close)
        sets = fingerprints(facts, embedder.provider, options.storage, tf32=options.tf32)
        writer.begin(*sets, facts={**notes, "versions": library_versions()})
        _check_disk(cache, len(samples) * sum(embedder.dims) * (4 if options.storage == "float32" else 2))

        before = writer.samples
        if before and options.limit and len(samples) < len(before.rows):
            log.warning(
                "--limit leaves %d of the %d samples in the sample table; features are kept", len(samples), len(before.rows)
            )
        outcomes, todo = plan(samples, before, writer.known, source.files, options)
        if options.batch_size is None:
            tune(embedder, facts.preprocess.crop, len(todo))
        crew = Crew(options.workers, embedder.provider)
        reader = Reader(source.files, facts.preprocess, writer.known, crew, ahead=2 * embedder.batch_size)
        clock: Clock = defaultdict(float)
        computed = 0
        with Progress(len(todo), "extract", quiet=options.quiet) as progress, closing(reader.stream(todo, stop)) as stream:
            batches = embedded(stream, embedder, progress, clock, fail_fast=options.fail_fast)
            while result := run_shard(batches, writer, clock):
                for outcome in result.outcomes:
                    outcomes[outcome.index] = outcome.row
                computed += result.computed
                done = {"event": "shard", "inputs": len(result.outcomes), "computed": result.computed}
                log.debug("%(inputs)d inputs done, %(computed)d computed", done, extra={"facts": done})
            with timed(clock, "settle"):
                writer.settle()
        clock |= {**reader.seconds, "backbone": embedder.seconds, "write": writer.seconds}
        if stop:
            raise InterruptedRunError(stop.signum)
        rows = _fail_copies([row for row in outcomes if row is not None], writer.known)
        if options.fail_fast:
            _fail_fast(rows)
        failed = sum(not row.ok for row in rows)
        rows, rule = resolve_splits(rows, options, source.task)
        _say_splits(before, rows, rule, source.task)
        if facts.precision == "int8" and (moved := count_moved(cache, rows)):
            log.warning("%d images that int8 was calibrated on are in 'val' or 'test' now; --overwrite calibrates again", moved)
        working = sum(clock[name] for name in ("wait", "embed", "settle"))
        spent = (before.facts.get("extract_seconds", 0.0) if before else 0.0) + (working if computed else 0)
        facts_now = {**_facts(source, rule, rows, options), "extract_seconds": round(spent, 3)}
        table = SampleTable(rows, facts_now, source.task.targets)
        changed = writer.finish(table)
    summary = Summary(
        cache=str(cache),
        **table.counts,
        computed=computed,
        inference_calls=embedder.calls,
        provider=embedder.provider,
        images_per_second=round(computed / max(working, 1e-9), 1),
        cache_bytes=sum(path.stat().st_size for path in shard_paths(cache)),
        batch_size=embedder.batch_size,
        lanes=embedder.lanes,
        workers=crew.size,
        bottleneck=bottleneck(clock, embedder.provider) if computed else "",
        seconds={**{name: round(value, 3) for name, value in clock.items()}, "total": round(time.perf_counter() - started, 3)},
        codes=dict(Counter(row.code for row in rows if row.code)),
    )
    if not computed:
        log.info("nothing to compute: all features are cached%s", "" if changed else ", and the dataset is unchanged")
    if failed > budget:
        message = (
            f"{failed} of {len(rows)} inputs failed and --max-failures {options.max_failures} allows {budget}; "
            f"see {cache}/ledger.jsonl"
        )
        raise BudgetExceededError(message, facts={"extract": summary.to_json()})
    return summary


def plan(
    samples: Sequence[Sample], before: SampleTable | None, cached: Set[bytes], files: Files, options: Options
) -> tuple[list[Row | None], list[tuple[int, Sample]]]:
    """What is known already and what must be read.

    A file with the size, time and inode of the last run is not opened: its outcome then is its outcome now, provided its
    features are there. Labels, splits and groups are always the source's.

    Args:
        samples: what the source has now.
        before: the sample table of the last run.
        cached: content digests that have features.
        files: where samples are.
        options: ``retry_failed`` and ``verify_content`` count.

    Returns:
        One row per sample (None where it must be read), and the samples to read with their places.
    """
    known = {row.path: row for row in before.rows} if before and not options.verify_content else {}
    rows: list[Row | None] = []
    todo = []
    for index, sample in enumerate(samples):
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


def preview(source: Source, cache: Path, options: Options) -> dict[str, int]:
    """What `run_extract` would have to do, without doing any of it or writing anything.

    Returns:
        ``inputs``; ``unchanged``, which would not be opened; ``to_read``, of which those with unknown content are computed.
    """
    samples = limited(source.samples(), options.limit)
    _check_splits_possible(samples, options, source.task)
    try:
        opened = FeatureCache(cache)
    except InputMissingError:
        return {"inputs": len(samples), "unchanged": 0, "to_read": len(samples)}
    known = set.intersection(*({key for s in opened.with_layer(name).shards for key in s.digests()} for name in opened.layers))
    _, todo = plan(samples, opened.samples, known, source.files, options)
    return {"inputs": len(samples), "unchanged": len(samples) - len(todo), "to_read": len(todo)}


def survey(source: Source, preprocess: Preprocess, options: Options) -> SampleTable:
    """Read, hash and decode every input without embedding any: the sample table that `run_extract` would write."""
    samples = limited(source.samples(), options.limit)
    _check_splits_possible(samples, options, source.task)
    reader = Reader(source.files, preprocess, set(), Crew(options.workers or cores()))
    rows = _fail_copies([outcome.row for outcome in reader.stream(list(enumerate(samples)), StopFlag())], set())
    rows, rule = resolve_splits(rows, options, source.task)
    return SampleTable(rows, _facts(source, rule, rows, options), source.task.targets)


def _facts(source: Source, rule: dict[str, Any], rows: Sequence[Row], options: Options) -> dict[str, Any]:
    root = os.fsencode(Path(source.root).absolute()).hex()
    exceeded = sum(not row.ok for row in rows) > options.budget(len(rows))
    origin = {} if source.origin is None else {"source": source.origin}
    return {"root": root, **origin, "task": source.task.name, "split": rule, "budget_exceeded": exceeded}


@dataclass
class Embedded:
    """Outcomes in the order of the stream, and the features of those of them that have pixels, ``(n, d)`` each."""

    outcomes: list[Outcome]
    features: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def computed(self) -> list[Row]:
        return [outcome.row for outcome in self.outcomes if outcome.decoded]


def embedded(
    stream: Iterator[Outcome], embedder: Embedder | Fleet, progress: Progress, clock: Clock, *, fail_fast: bool = False
) -> Iterator[Embedded]:
    """Pass what a stream decodes through the backbone, batch after batch; while the lanes compute, the next is gathered.

    With ``fail_fast`` it ends at the first failed input, which is then the last outcome.
    """
    flying: deque[tuple[list[Outcome], Future[list[NDArray[np.float32]]]]] = deque()
    gathered: list[Outcome] = []
    waiting: list[NDArray[np.uint8]] = []

    def launch() -> None:
        flying.append((gathered.copy(), embedder.submit(np.stack(waiting))))
        gathered.clear()
        waiting.clear()

    def land() -> Embedded:
        outcomes, features = flying.popleft()
        with timed(clock, "embed"):
            return Embedded(outcomes, features.result())

    while True:
        with timed(clock, "wait"):
            outcome = next(stream, None)
        if outcome is None:
            break
        progress.advance()
        gathered.append(outcome)
        if outcome.pixels is not None:
            waiting.append(outcome.pixels)
            outcome.pixels = None
        if fail_fast and not outcome.row.ok:
            break
        if len(waiting) >= embedder.batch_size:
            launch()
            if len(flying) > embedder.lanes:
                yield land()
    if waiting:
        launch()
    while flying:
        yield land()
    if gathered:
        yield Embedded(gathered)


@dataclass
class ShardResult:
    """What one call of `run_shard` finished."""

    outcomes: list[Outcome]
    computed: int


def run_shard(batches: Iterator[Embedded], writer: CacheWriter, clock: Clock) -> ShardResult | None:
    """Take batches until a shard is due, and begin to commit it; None when there are no more.

    The shard is written while the next one is computed; `CacheWriter.settle` says whether that worked. Repeating it is
    harmless: rows are keyed by content, and only a committed shard counts.
    """
    result = ShardResult([], 0)
    while not writer.due:
        batch = next(batches, None)
        if batch is None:
            break
        result.outcomes += batch.outcomes
        if rows := batch.computed:
            writer.append(batch.features, [row.sha256 for row in rows], [row.path for row in rows])
            result.computed += len(rows)
    with timed(clock, "settle"):
        writer.commit_behind()
    return result if result.outcomes else None


def resolve_splits(rows: Sequence[Row], options: Options, task: Task) -> tuple[list[Row], dict[str, Any]]:
    """The stored split of every row, and how it came about.

    Splits of the source win. Otherwise, where there are labels or numeric targets, the ok rows are divided by hash rank,
    within each class where a sample has one. A class that became too small because its files failed is an error that names it.
    """
    if any(row.split for row in rows):
        return list(rows), {"rule": "source"}
    good = [row for row in rows if row.ok]
    if not good or (not task.targets and any(row.label is None for row in good)):
        return list(rows), {"rule": "none"}
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    names = assign_splits(good, **fractions, seed=options.seed, stratify=task.name == SINGLE_LABEL)
    split_of = {row.path: name for row, name in zip(good, names, strict=True)}
    rule = {"rule": "hash-rank", "val": options.val_fraction, "test": options.test_fraction, "seed": options.seed}
    return [row.with_split(split_of.get(row.path)) for row in rows], rule


def _say_splits(before: SampleTable | None, rows: Sequence[Row], rule: dict[str, Any], task: Task) -> None:
    """Say where the split or the task of a finished cache changes, and which classes nothing can be trained of."""
    had = before.facts.get("split") if before else None
    if before and had and had != rule:
        old = {row.path: row.split for row in before.rows}
        moved = sum(row.path in old and old[row.path] != row.split for row in rows)
        log.warning("the split was %s, it is %s now: %d samples changed sides", rule_text(had), rule_text(rule), moved)
    recorded = before.facts.get("task", task.name) if before else task.name
    if recorded != task.name:
        log.warning("the samples were recorded with --task %s, they are %s now", recorded, task.name)
    labelled = [(row.label, row.split) for row in rows if row.ok] if task.name == SINGLE_LABEL else []
    for sentence in untrained_labels(labelled):
        log.warning("%s: `penult train` will refuse that", sentence)


def _check_splits_possible(samples: Sequence[Sample], options: Options, task: Task) -> None:
    """Refuse before computing what `resolve_splits` would refuse after hours."""
    if any(s.split for s in samples) or (not task.targets and any(s.label is None for s in samples)):
        return
    stratify = task.name == SINGLE_LABEL
    if stratify and not any(sample.group for sample in samples):
        names = split_names(val=options.val_fraction, test=options.test_fraction)
        require_sizes(Counter(sample.label or "" for sample in samples), names)
        return
    rows = [Row(s.path, s.label, None, s.group, sha256=s.path) for s in samples]  # as if no two were copies
    assign_splits(rows, val=options.val_fraction, test=options.test_fraction, seed=options.seed, stratify=stratify)


def _check_for_gpu(precision: str, device: str, *, tf32: bool = False) -> None:
    """Refuse on a CPU what only a GPU gains from: there float16 is float32 with a cast before and after, and TF32 nothing."""
    for asked, flag in ((precision == "fp16", "--precision fp16"), (tf32, "--tf32")):
        if asked and device == "cpu":
            message = f"{flag} is for a GPU, and this is the CPU: leave it out, or pass --device cuda where there is a card"
            raise UsageError(message)


def _device(options: Options) -> str:
    """Where to compute.

    Raises:
        UsageError: int8 on a GPU, whose kernels would give other numbers, and slower than float16.
    """
    if options.precision != "int8" or set(options.device.split(",")) == {"cpu"}:
        return options.device
    if options.device != "auto":
        message = f"--precision int8 is for the CPU, not for --device {options.device}; leave one of them out"
        raise UsageError(message)
    return "cpu"


def _check_disk(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if needed > free:
        message = f"{cache} needs about {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free"
        raise StorageError(message)


def _fail_copies(rows: list[Row], known: set[bytes]) -> list[Row]:
    """Give the copies of a file that failed its failure: only the first of them was decoded."""
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
