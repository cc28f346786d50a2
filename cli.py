"""The command line: parse, call, print. The only place that prints, exits, or turns an error into an exit code.

Everything heavy is imported inside the command that needs it, so that ``penult --help`` answers at once.
"""

from __future__ import annotations

import csv
import errno
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from extractor.commands.console import SettingsCommand, options
from store import json_text
from store.environment import redirect_matplotlib
from store.errors import PenultError

if TYPE_CHECKING:
    from classifiers.bundle_settings import EvaluateSettings, PredictSettings
    from classifiers.finetune_settings import FineTuneSettings
    from classifiers.report_settings import ReportSettings
    from classifiers.settings import TrainSettings
    from classifiers.sweep_settings import SweepSettings
    from classifiers.task import Evaluation, Measured
    from extractor.settings.groups import ExtractSettings
    from extractor.settings.network import ExportSettings
    from store.cache import FeatureCache

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, readable=False)  # what cannot be read is said by the command, with its own code
WITH_FAILURES = 3
CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


observing_options = options(
    click.option("--log-json", type=FOLDER, help="Append every message as one JSON object per line; the last is `summary`."),
    click.option("--metrics", type=FOLDER, help="Write a Prometheus textfile (.prom), replaced whole."),
    click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
)
one_layer_option = click.option("--layer", metavar="NAME", help="Which feature set, where the cache has several.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def output_option(what: str) -> Callable[[F], F]:
    return click.option("-o", "--output", required=True, type=FOLDER, help=what)


def _loudness(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:  # noqa: FBT001 - click calls it so
    """Set what goes to stderr; ``-q`` and ``-v`` mean the same before and after the command."""
    key = f"penult.{parameter.name}"
    ctx.meta[key] = given or ctx.meta.get(key, False)  # one dictionary for the whole command line
    quiet, verbose = (ctx.meta.get(f"penult.{name}") for name in ("quiet", "verbose"))
    logger = logging.getLogger("penult")
    logger.setLevel(logging.DEBUG)
    logger.handlers = [_StderrHandler(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)]


loudness_options = options(
    click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_loudness, help="Only warnings on stderr."),
    click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_loudness, help="More on stderr."),
)


class Ordered(click.Group):
    """Commands in the order in which one needs them; each takes the options of all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(loudness_options(cmd) if not isinstance(cmd, click.Group) else cmd, name)


@click.group(cls=Ordered, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="penult", message="%(prog)s %(version)s")
@loudness_options
def cli() -> None:
    """Extract once, train in seconds: cached features of frozen backbones.

    Example: penult extract photos/ -m resnet50 -o photos.cache
    """


class _StderrHandler(logging.Handler):
    """Messages for people; warnings are marked."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(prefix + record.getMessage(), err=True)


@cli.command()
@click.argument("name", required=False)
@click.option("--layers", "with_layers", is_flag=True, help="List the layers of this backbone that can be asked for.")
@json_option
def backbones(name: str | None, *, with_layers: bool, as_json: bool) -> None:
    """List the backbones, or show one.

    Example: penult backbones resnet50 --layers
    """
    from extractor.layers import list_layers
    from extractor.networks import row, rows

    if name is None:
        if with_layers:
            message = "--layers: of which backbone? as in: penult backbones resnet50 --layers"
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
    click.echo(f"{name}: {first['dim']} features, the {first['module']}{pooled}; --layers lists {len(layers) - 1} more layers")
    print_table(
        ("weights", "licence", "interpolation", "input", "resize", "top-1"),
        [
            (key, w["licence"], w["interpolation"], str(w["crop"]), str(w["resize"]), f"{w['top1']:.1f} %")
            for key, w in facts["weights"].items()
        ],
        left=3,
    )
    return None


@cli.command(cls=SettingsCommand, model="extractor.settings.network:ExportSettings", leave=["backbone"])
@click.argument("backbone")
@output_option("The ONNX file.")
@overwrite_option
def export(settings: ExportSettings, output: Path, *, overwrite: bool) -> None:
    """Export a backbone to ONNX at its penultimate layer.

    It is checked against torch. BACKBONE is a torchvision network, or somebody's ONNX file, which becomes one that says itself
    what it takes.

    Example: penult export resnet50 -o resnet50.onnx
    """
    from extractor.export import export as export_backbone
    from store.atomic import require_free

    require_free(output, overwrite=overwrite)
    facts = export_backbone(settings.network(), output)
    for layer in facts.layers:
        click.echo(f"{output}: {facts.name} ({facts.weights}), {layer.dim} features, {layer.layer}, pooling {layer.pooling}")


@cli.group(cls=Ordered)
def weights() -> None:
    """Bring torchvision's weights to machines without internet.

    Example: penult weights fetch resnet50
    """


@weights.command("fetch")
@click.argument("name", metavar="BACKBONE")
@click.option("--weights", "wanted", metavar="NAME", help="Which (V1, V2, ...); torchvision's default where not given.")
@click.option("-o", "--output", type=FOLDER, help="Folder for the file; by default where torch, and penult, look for it.")
@json_option
def weights_fetch(name: str, wanted: str | None, output: Path | None, *, as_json: bool) -> None:
    """Download the weights of a backbone, unless they are there.

    The file is checked against the digest in its name.

    Example: penult weights fetch resnet50 --weights V2 -o /media/usb
    """
    from extractor.backbones import choose_weights
    from extractor.weights import WeightsFile, fetch

    file = WeightsFile(name, choose_weights(name, wanted, "--weights"))
    path, digest, new = fetch(file, output, progress=sys.stderr.isatty() and not is_quiet())
    if as_json:
        facts = {"network": name, "weights": file.entry.name, "licence": file.licence, "source": file.entry.url}
        return print_json({"file": str(path), "bytes": path.stat().st_size, "sha256": digest, "downloaded": new, **facts})
    click.echo(f"{path}: {'downloaded' if new else 'already there and sound'}, {path.stat().st_size / 2**20:.1f} MiB")
    click.echo(f"sha256 {digest}")
    click.echo(f"{name} {file.entry.name}, licence {file.licence}")
    return click.echo(f"Bring this file to the other machine and run there: penult weights import {file.name}")


@weights.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FOLDER)
@json_option
def weights_import(files: Sequence[Path], *, as_json: bool) -> None:
    """Take weights from another machine to where torch looks.

    They are checked against torchvision's digests. Afterwards `penult extract -m BACKBONE` uses them without a flag. A file may
    have been renamed.

    Example: penult weights import /media/usb/resnet50-11ad3fa6.pth
    """
    from extractor.networks import import_weights

    done = []
    for path in files:
        file, target, new = import_weights(path)
        done.append({"file": str(target), "network": file.network, "weights": file.entry.name, "copied": new})
        if not as_json:
            what = "copied, checked" if new else "already there and sound"
            click.echo(f"{target}: {what}; {file.network} {file.entry.name}, licence {file.licence}")
    if as_json:
        print_json(done)


@weights.command("list")
@json_option
def weights_list(*, as_json: bool) -> None:
    """List which of torchvision's files are here, and whether they are sound.

    Example: penult weights list --json
    """
    from extractor.weights import survey_files

    found = survey_files()
    if as_json:
        return print_json(found)
    rows = [(Path(f["file"]).name, f["network"], f["weights"], f"{f['bytes'] / 2**20:.1f} MiB", f["state"]) for f in found]
    return print_table(("file", "backbone", "weights", "size", "state"), rows, left=3)


@cli.command(cls=SettingsCommand, model="extractor.settings.groups:ExtractSettings")
@click.argument("data", type=FOLDER)
@output_option("The cache, a folder.")
@observing_options
@overwrite_option
@json_option
def extract(data: Path, settings: ExtractSettings, output: Path, *, as_json: bool, overwrite: bool, **given: Any) -> int:
    """Pass images through a backbone once; cache the features.

    Run it again to resume or to update. DATA is a folder per class, train|val|test folders of these, a flat folder, a CSV or
    Parquet file with a column `path`, a .tar file or a folder of them, or torchvision:NAME@DIR.

    Example: penult extract photos/ -m resnet50 -o photos.cache
    """
    from extractor.pipeline import run_extract
    from extractor.plan import preview
    from extractor.progress import observed
    from extractor.settings.groups import Options

    source, backbone = settings.source(data), settings.network()
    chosen = settings.part(Options).replace(overwrite=overwrite, quiet=is_quiet())
    if given["dry_run"]:
        print_preview(preview(source, backbone, output, chosen), as_json=as_json)
        return 0
    with observed(log_json=given["log_json"], metrics=given["metrics"]) as seen:
        summary = run_extract(source, backbone, output, chosen)
        code = WITH_FAILURES if summary.failed else 0
        seen |= {"exit_code": code, "extract": summary.to_json()}
    if as_json:
        print_json(summary.to_json())
    else:
        click.echo(summary.text())
    return code


@cli.command()
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
    click.echo(f"{cache}: {facts['rows']} rows{each} of {facts['dim']} {facts['dtype']} features in {facts['shards']} shard(s)")
    click.echo(f"{counts['inputs']} inputs = {counts['ok']} ok + {counts['duplicates']} duplicates + {counts['failed']} failed")
    if len(facts["layers"]) > 1:
        click.echo(f"features of {', '.join(facts['layers'])}; these are those of {opened.layer} (--layer shows others)")
    splits = facts["splits"]
    labels = [(label, *(str(per.get(s, 0)) for s in splits), str(sum(per.values()))) for label, per in facts["labels"].items()]
    print_table(("label", *splits, "images"), labels)
    made = facts["facts"]
    if "weights" in made:
        click.echo(", ".join(filter(None, [f"weights {made['weights']}", made.get("source")])))
    if "calibration" in made:
        click.echo(calibration_text(made["calibration"]))
    for name, target in facts["targets"].items():
        click.echo(f"target {name}: {target['given']} given, {target['min']} to {target['max']}")
    if facts["failures"]:
        print_table(("failed", "code", "message"), [(f["path"], f["code"], f["message"]) for f in facts["failures"]], left=3)
    leaves = opened.fingerprint.leaves().items()
    return print_table(("fingerprint", "value"), [(key, short(value)) for key, value in leaves], left=2)


@cli.command()
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
        click.echo(f"{finding.file}\t{finding.problem}")
    if findings:
        message = f"{cache}: {len(findings)} finding(s); the extract command that made it repairs it"
        raise CorruptCacheError(message)
    if not as_json:
        click.echo(f"{cache}: sound")


@cli.command()
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


@cli.command()
@click.argument("cache", type=FOLDER)
@click.option("--against", required=True, type=FOLDER, help="The golden cache, a folder or a compact file.")
@click.option("--head", type=FOLDER, help="Also require that no decision of this bundle's head flips.")
@click.option("--tolerance", type=click.FloatRange(0), help="Relative L2 per row; by default what the fingerprints allow.")
@click.option("--update", is_flag=True, help="Show what changed, then make CACHE the golden one (a compact file).")
@one_layer_option
@json_option
def check(
    cache: Path,
    against: Path,
    head: Path | None,
    tolerance: float | None,
    layer: str | None,
    *,
    update: bool,
    as_json: bool,
) -> None:
    """Regression test on cached features: exit 65 on a change.

    CACHE must hold what the golden cache holds: images, labels, storage type, fingerprint and features; only CPU and GPU may
    differ.

    Example: penult check today.cache --against golden.h5 --head photos.head
    """
    from store.cache import FeatureCache
    from store.compact import write_compact
    from store.drift import compare_caches
    from store.errors import BadDataError

    found = FeatureCache(cache, layer)
    if update and not against.exists():
        rows = write_compact(found, against, dtype=str(found.dtype))
        if as_json:
            return print_json({"new": str(against), "rows": rows})
        return click.echo(f"{against}: new, {rows} rows")
    golden = FeatureCache(against, layer)
    drift = compare_caches(golden, found, predict=decisions(head, golden), bound=tolerance)
    print_drift(drift, as_json=as_json)
    if update:
        write_compact(found, against, dtype=str(found.dtype), overwrite=True)
        click.echo(f"{against} is replaced", err=True)
    elif not drift.passed:
        message = f"{cache} does not match {against}: {'; '.join(drift.causes) or 'see the table'}"
        raise BadDataError(message)
    return None


@cli.command()
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
    from store.atomic import require_free
    from store.cache import FeatureCache
    from store.compact import prune as prune_cache
    from store.compact import write_compact

    if not output and not prune:
        message = "pass -o FILE.h5, --prune, or both"
        raise click.UsageError(message)
    if output:
        require_free(output, overwrite=overwrite)
    if prune:
        removed, kept = prune_cache(cache)
        click.echo(f"{cache}: {removed} rows removed, {kept} kept")
    if output:
        rows = write_compact(FeatureCache(cache, layer), output, dtype=dtype, overwrite=overwrite)
        click.echo(f"{output}: {rows} rows, {output.stat().st_size / 2**20:.1f} MiB")


@cli.command(cls=SettingsCommand, model="classifiers.settings:train_settings")
@click.argument("cache", type=FOLDER)
@output_option("The bundle, a folder.")
@overwrite_option
@json_option
def train(cache: Path, settings: TrainSettings, output: Path, *, as_json: bool, overwrite: bool) -> None:
    """Train a head on cached features and save it as a bundle.

    The split stored in the cache is used; --val-fraction or --test-fraction make another one.

    Example: penult train photos.cache --head logistic -o photos.head
    """
    from classifiers.bundle_folder import refuse_existing
    from classifiers.train import train_head
    from extractor.settings.declaration import FLAGS
    from store.cache import FeatureCache

    refuse_existing(output, overwrite=overwrite)
    features = FeatureCache(cache, settings.layer)
    with FLAGS.here():
        head = settings.make(features.samples.task.name)
    bundle = train_head(features, output, head, settings, overwrite=overwrite)
    print_bundle(bundle, as_json=as_json)
    if bundle.few_shot and not as_json:
        from classifiers.tables import SHOT_COLUMNS, shot_cells

        click.echo(f"\nAccuracy on {bundle.split['reported_on']!r} by training images of each class")
        print_table(SHOT_COLUMNS, [shot_cells(point) for point in bundle.few_shot], left=0)


@cli.command(cls=SettingsCommand, model="classifiers.finetune_settings:FineTuneSettings")
@click.argument("data", type=FOLDER)
@output_option("The bundle, a folder.")
@overwrite_option
@json_option
def finetune(data: Path, settings: FineTuneSettings, output: Path, *, as_json: bool, overwrite: bool) -> None:
    """Fine-tune a backbone end to end on the same split.

    DATA is a cache, whose samples and split are taken over, or a dataset as `penult extract` takes it. Interrupted, the same
    command goes on after the last finished epoch. docs/finetune.md says what the flags do.

    Example: penult finetune photos.cache -m resnet50 -o photos-finetuned.head
    """
    from classifiers.bundle_folder import refuse_existing
    from classifiers.finetune import train_finetuned
    from extractor.settings.declaration import flag_of
    from extractor.sources import open_source
    from store.cache import FeatureCache, is_cache

    refuse_existing(output, overwrite=overwrite)
    if is_cache(data):
        unused = settings.given().keys() & {"val_fraction", "test_fraction", "group_by", "limit"}
        if unused:
            flags = ", ".join(sorted(flag_of(type(settings), name) for name in unused))
            message = f"{flags}: {data} is a cache, and fine-tuning takes its samples and its split over"
            raise click.UsageError(message)
        origin: Any = FeatureCache(data)
    else:
        origin = open_source(data, root=settings.root, follow_symlinks=settings.follow_symlinks, group_by=settings.group_by)
    bundle = train_finetuned(origin, output, settings.replace(quiet=is_quiet()), overwrite=overwrite)
    print_bundle(bundle, as_json=as_json)


@cli.command(cls=SettingsCommand, model="classifiers.bundle_settings:EvaluateSettings")
@click.argument("bundle", type=FOLDER)
@click.argument("data", type=FOLDER)
@click.option("--plot", type=FOLDER, help="Write the confusion matrix as .png, .svg or .pdf.")
@overwrite_option
@json_option
def evaluate(bundle: Path, data: Path, settings: EvaluateSettings, plot: Path | None, *, as_json: bool, overwrite: bool) -> int:
    """Evaluate a bundle on a cache or a dataset, with intervals.

    Every figure with its interval, per class, and the confusion matrix.

    Example: penult evaluate photos.head photos.cache --split test
    """
    from classifiers.bundle import Bundle
    from classifiers.gates import missed_gates
    from classifiers.heldout import evaluate_bundle
    from classifiers.plots import require_plot, save_confusion
    from classifiers.task import need_single_label
    from extractor.settings.declaration import FLAGS, flag_of
    from store.errors import GateError

    if plot:
        require_plot(plot, overwrite=overwrite)
    loaded = Bundle.load(bundle)
    with FLAGS.here():
        gates = settings.wanted(loaded.task)
    if plot:
        need_single_label(loaded.task, "--plot")
    result, _ = evaluate_bundle(loaded, data, split=settings.split, root=settings.root, **settings.runtime())
    if plot:
        save_confusion(result.to_json(), plot, overwrite=overwrite)
    if as_json:
        print_json(result.to_json())
    else:
        print_evaluation(result)
    if missed := missed_gates(gates, result.to_json(), lambda gate: flag_of(type(settings), gate.name)):
        raise GateError(missed)
    return WITH_FAILURES if result.failed else 0


@cli.command(cls=SettingsCommand, model="classifiers.bundle_settings:PredictSettings")
@click.argument("bundle", metavar="BUNDLE|CLASSIFIER.onnx", type=FOLDER)
@click.argument("images", nargs=-1, type=FOLDER)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
    help="Of predictions.",
)
@click.option("--selftest", "testing", is_flag=True, help="First check its weights, and what it gives for golden pictures.")
def predict(bundle: Path, images: Sequence[Path], settings: PredictSettings, form: str, *, testing: bool) -> int:
    """Predict label and probability of images, or of folders.

    A novelty above 1 is unlike the training images. With --selftest, exit 65 if a weight was changed, or if it computes
    something else here than where it was made.

    Example: penult predict photos.head new/ --format csv > predictions.csv
    """
    from classifiers.fuse import selftest
    from classifiers.predict import Predictor, list_images

    if not (images or testing):
        message = "which images? Name files or folders, or pass --selftest"
        raise click.UsageError(message)
    listed = list_images(images) if images else []
    if testing:
        click.echo(selftest(bundle, **settings.runtime()), err=bool(images))
        if not images:
            return 0
    predictor = Predictor.load(bundle, **settings.runtime())
    results = predictor.predict(listed)
    failed = 0
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        extra = ["novelty"] if predictor.recipe.novelty else []
        writer.writerow(["path", "label", "probability", "code", "message", *extra, *predictor.task.columns()])
    for p in results:
        failed += p.code is not None
        if form == "csv":
            best = "" if p.probability is None else f"{p.probability:.6f}"
            blank = [""] * len(predictor.task.columns())
            columns: list[Any] = blank if p.probabilities is None else predictor.task.cells(p.probabilities)
            if predictor.recipe.novelty:
                columns = ["" if p.novelty is None else f"{p.novelty:.4f}", *columns]
            writer.writerow([p.name, p.label or "", best, p.code or "", p.message, *columns])
        elif form == "jsonl":
            facts: dict[str, Any] = {
                "path": p.name,
                "label": p.label,
                "probability": p.probability,
                "code": p.code,
                "message": p.message,
            }
            if predictor.recipe.novelty:
                facts["novelty"] = None if p.novelty is None else round(p.novelty, 4)
            if predictor.pixel_drift:
                facts["pixel_drift"] = predictor.pixel_drift.to_json()
            click.echo(json_text.dumps({**facts, **predictor.task.facts(p.probabilities)}))
        else:
            unlike = " (unlike the training images)" if p.novelty and p.novelty > 1 else ""
            novelty = "" if p.novelty is None else f"\tnovelty {p.novelty:.2f}{unlike}"
            click.echo(f"{p.name}\t{p.code}: {p.message}" if p.code else f"{p.name}\t{predictor.task.text(p)}{novelty}")
    return WITH_FAILURES if failed else 0


@cli.command()
@click.argument("bundle", type=FOLDER)
@output_option("The ONNX file.")
@overwrite_option
def fuse(bundle: Path, output: Path, *, overwrite: bool) -> None:
    """Make one ONNX file of a bundle, for any program.

    From decoded pixels to probabilities, in ONNX Runtime. `penult predict CLASSIFIER.onnx` takes it like the bundle; --selftest
    there shows that it still gives what it gave.

    Example: penult fuse photos.head -o photos.onnx
    """
    from classifiers.bundle import Bundle
    from classifiers.fuse import fuse as fuse_bundle
    from extractor.onnxfile import data_files

    fused = fuse_bundle(Bundle.load(bundle), output, overwrite=overwrite)
    side, size = fused.preprocess.crop, sum(file.stat().st_size for file in (output, *data_files(output)))
    click.echo(f"{output}: {side} x {side} pixels to {len(fused.classes)} {fused.bound_task.plural}, {size / 2**20:.1f} MiB")


@cli.command(cls=SettingsCommand, model="classifiers.report_settings:ReportSettings")
@click.argument("bundle", type=FOLDER)
@click.argument("data", required=False, type=FOLDER)
@output_option("The page, an .html file.")
@overwrite_option
def report(bundle: Path, data: Path | None, settings: ReportSettings, output: Path, *, overwrite: bool) -> None:
    """Make the page of a bundle anew, or one about other images.

    Without DATA, a cache or a dataset, the page has no images and no map of features.

    Example: penult report photos.head photos.cache -o photos.html
    """
    from classifiers.bundle import Bundle
    from classifiers.page import write_output
    from classifiers.report import report_again
    from store.atomic import require_free

    require_free(output, overwrite=overwrite)
    if data is None and (settings.split or settings.root):
        message = "--split and --root are about images, and there is no DATA"
        raise click.UsageError(message)
    html = report_again(Bundle.load(bundle), data, settings)
    write_output(output, html.encode(), overwrite=overwrite)
    click.echo(f"report: {output}")


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="Also write an HTML report.")
@click.option("--against", metavar="NAME", help="The bundle to compare with; the first frozen one given by default.")
@click.option(
    "--worthwhile",
    type=click.FloatRange(0, 100, min_open=True),
    default=1.0,
    show_default=True,
    help="The smallest difference of accuracy that matters, points.",
)
@click.option("--curve", type=FOLDER, metavar="CACHE", help="Also refit the frozen head on 10, 25, 50 and 100 % of its images.")
@overwrite_option
@json_option
def compare(bundles: Sequence[Path], output: Path | None, *, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Compare bundles on the same held-out images.

    Differences with intervals, what each costs, and whether that is worth it.

    Example: penult compare photos.head photos-finetuned.head -o report.html
    """
    from classifiers.bundle import Bundle
    from classifiers.compare import compare as compare_bundles
    from classifiers.comparison import comparison_report, comparison_text
    from classifiers.page import write_output
    from store.atomic import require_free
    from store.cache import FeatureCache

    if output:
        require_free(output, overwrite=overwrite)
    curve = FeatureCache(given["curve"]) if given["curve"] else None
    loaded = [Bundle.load(path) for path in bundles]
    found = compare_bundles(loaded, against=given["against"], worthwhile=given["worthwhile"], curve=curve)
    if output:
        write_output(output, comparison_report(found).encode(), overwrite=overwrite)
    if as_json:
        return print_json(found.to_json())
    return click.echo(comparison_text(found, width=None if sys.stdout.isatty() else 160))


@cli.command(cls=SettingsCommand, model="classifiers.sweep_settings:SweepSettings")
@click.argument("data", type=FOLDER)
@click.option(
    "-m",
    "--backbone",
    "wanted",
    required=True,
    multiple=True,
    metavar="NAME[=WEIGHTS][@LAYER]...,...",
    help="Networks, or FILE.onnx; each with @LAYER for features of other layers. See docs/sweep.md.",
)
@output_option("Folder of the caches and of sweep.html.")
@click.option("--overwrite", is_flag=True, help="Extract anew.")
@json_option
def sweep(data: Path, wanted: Sequence[str], settings: SweepSettings, output: Path, *, as_json: bool, overwrite: bool) -> int:
    """Extract with several backbones, and rank them.

    The same images and the same split count for all. LogME and the H-score say, without training, how good features will be.

    Example: penult sweep photos/ -m resnet18,resnet50,resnet50@layer3,theirs.onnx -o photos.sweep
    """
    from classifiers.ranking import AGREEMENT_COLUMNS
    from classifiers.sweep import PAGE, parse_sources, require_ready, run_sweep
    from extractor.settings.groups import Options

    backbones = parse_sources(wanted, settings.network())
    options = settings.part(Options).replace(overwrite=overwrite, quiet=is_quiet())
    require_ready(backbones, output, options)
    source = settings.source(data)
    found = run_sweep(source, backbones, output, options, head=settings.head, seed=settings.seed, data=str(data))
    if as_json:
        print_json(found.to_json())
        return found.exit_code
    print_table(found.columns, found.rows(), left=2)
    for each in found.failed:
        click.echo(f"\nNo features of {each.source}: {each.error}")
    click.echo()
    for note in found.notes():
        click.echo(note)
    click.echo(f"\nRank correlation of the scores with the {found.figure} of trained heads, {len(found.lines)} sources")
    print_table(AGREEMENT_COLUMNS, [each.cells() for each in found.agreements()])
    click.echo(f"\nPage: {output / PAGE}\nNext: {found.advice()}")
    return found.exit_code


@cli.command()
@click.argument("job", type=FOLDER)
@observing_options
@json_option
def run(job: Path, *, as_json: bool, **given: Any) -> int:
    """Run a job file, as a scheduler does.

    Extract, train if anything changed, evaluate, and hold the result against its gates.

    Example: penult run nightly.toml --log-json nightly.jsonl --metrics nightly.prom
    """
    from classifiers.jobs import preview_job, run_job
    from extractor.progress import observed
    from store.errors import GateError

    if given["dry_run"]:
        would = preview_job(job)
        print_preview({**would["extract"], "train": would["train"]}, as_json=as_json)
        return 0
    with observed(log_json=given["log_json"], metrics=given["metrics"]) as seen:
        result = run_job(job, quiet=is_quiet(), record=seen)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.extract.text())
        print_evaluation(result.evaluation)
    if result.gate_missed:
        raise GateError(result.gate_missed)
    return result.exit_code


@cli.command()
@click.argument("job", type=FOLDER)
@click.option("-n", "--last", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@json_option
def runs(job: Path, last: int, *, as_json: bool) -> None:
    """Show the history of a job.

    When it ran, how it ended, what it computed, what came out.

    Example: penult runs nightly.toml
    """
    from classifiers.job_history import RUN_COLUMNS, read_runs, run_cells

    records = read_runs(job)[-last:]
    if as_json:
        return print_json(records)
    return print_table(RUN_COLUMNS, [run_cells(record) for record in records])


@cli.command()
@click.option("-o", "--output", type=FOLDER, default=Path("penult-demo"), show_default=True, help="Folder for all of it.")
@click.option("--weights", metavar="NAME|FILE.pth|random", help="Of resnet18; torchvision's if they can be had, else random.")
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True, help="Of fine-tuning.")
@overwrite_option
def demo(output: Path, weights: str | None, epochs: int, *, overwrite: bool) -> None:
    """Show the whole way on handwritten digits, in two minutes.

    Nothing is downloaded.

    Example: penult demo -o demo
    """
    from classifiers.comparison import comparison_text
    from classifiers.demo import run_demo

    result = run_demo(output, weights=weights, epochs=epochs, overwrite=overwrite)
    click.echo(f"\nFirst extraction   {result.first.text()}")
    click.echo(f"Second extraction  {result.second.text()}")
    click.echo("\nLogistic head on cached features")
    print_evaluation(result.evaluation)
    click.echo("\nSome predictions")
    print_table(
        ("image", "label", "probability"), [(p.name, p.label or "", f"{p.probability:.3f}") for p in result.predictions]
    )
    click.echo("\nFrozen features or fine-tuning?")
    click.echo(comparison_text(result.comparison, width=None if sys.stdout.isatty() else 160))
    for note in result.notes:
        click.echo(f"\n{note}")
    click.echo(f"\nReport: {result.report}   Bundles: {output}/*.head (each has a report.html)")


def decisions(bundle: Path | None, cache: FeatureCache) -> Any:
    """The class that a bundle's head decides for, as a function of features such as a cache holds; None without a bundle."""
    if bundle is None:
        return None
    from classifiers.bundle import Bundle
    from classifiers.figures import require_finite
    from classifiers.heldout import ACCEPTED
    from classifiers.task import need_single_label

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
        click.echo(f"cause: {cause}")
    return None


def calibration_text(found: dict[str, Any]) -> str:
    if "moved" in found:
        return f"float16, {len(found['float_layers'])} layer(s) in float32; features moved by {found['moved']:.1e} at most"
    return (
        f"int8 by {found['method']}, {len(found['float_layers'])} layer(s) in float, calibrated on {found['images']} training "
        f"images; cosine to float on {found['judged']} others: {found['min']:.4f} at worst, {found['mean']:.4f} on average"
    )


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def is_quiet() -> bool:
    return bool(click.get_current_context().meta["penult.quiet"])


def print_preview(would: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        return print_json(would)
    click.echo(f"{would['inputs']} inputs: {would['unchanged']} unchanged, {would['to_read']} to read (dry run, nothing done)")
    return click.echo(f"train: {would['train']}") if "train" in would else None


def print_json(facts: Any) -> None:
    click.echo(json_text.dumps(facts, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    from extractor.text_table import table

    click.echo(table(columns, rows, left=left, width=None if sys.stdout.isatty() else 160))


def print_bundle(bundle: Any, *, as_json: bool) -> None:
    if as_json:
        return print_json(bundle.to_json())
    from classifiers.bundle import task_of_bundle

    task, seconds = task_of_bundle(bundle), bundle.cost["train_seconds"]
    click.echo(f"{bundle.path}: {bundle.head} head, {len(bundle.classes)} {task.plural}, in {seconds:.1f} s")
    metrics = bundle.metrics
    if metrics:
        click.echo(f"{task.headline(metrics)} on {metrics['n']} images of {bundle.split['reported_on']!r}")
        for note in metrics["notes"]:
            click.echo(f"warning: {note}", err=True)
    return click.echo(f"report: {bundle.path / 'report.html'}")


def print_evaluation(result: Evaluation | Measured) -> None:
    from classifiers.text import evaluation_text

    click.echo(evaluation_text(result, width=None if sys.stdout.isatty() else 160))
    for note in result.notes:
        click.echo(f"warning: {note}", err=True)


def main() -> None:
    """Run a command and exit with the code of CONTRACTS: a PenultError's own, 2 for usage, 70 for a bug with its traceback."""
    # Tables of many thousand rows are no garbage; looking for some in them took a tenth of the time of an unchanged extract.
    gc.set_threshold(100_000, 20, 100)
    # Outside the pipeline, which finishes its batch, SIGTERM ends a command at once, with the code a scheduler expects.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    redirect_matplotlib()
    for stream in (sys.stdout, sys.stderr):  # a label in another script must not end a run under LANG=C
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # `penult predict ... | head`: nobody reads on, and Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except PenultError as error:
        click.echo(f"error: {error}", err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(note, err=True)
        code = error.exit_code
    except OSError as error:
        click.echo(f"error: {error.filename or 'I/O'}: {error.strerror or error}", err=True)
        code = 73 if error.errno in CANNOT_CREATE else 74
    except Exception:
        import traceback

        traceback.print_exc()
        code = 70
    # What is done is done. Python gives signals back to the system when it ends, and would die of one that comes then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
