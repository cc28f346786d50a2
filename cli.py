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
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from classifiers.gates import GATES
from store import json_text
from store.environment import redirect_matplotlib
from store.errors import PenultError

if TYPE_CHECKING:
    from classifiers.task import Evaluation, Measured
    from extractor.augment import Augmentation
    from extractor.backbones import Backbone
    from store.cache import FeatureCache

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, readable=False)  # what cannot be read is said by the command, with its own code
SEED = click.IntRange(0, 2**32 - 1)
WITH_FAILURES = 3
MAX_SHOTS = 10**6  # images of a class
MAX_WIDTH = 65536  # of a hidden layer
CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class Memory(click.ParamType[int]):
    """A number of bytes, such as 4GB or 500MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            return int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            return self.fail(f"{value!r} is no size; expected a number of bytes such as 4GB or 500MiB", param, ctx)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order of the help text."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


pixel_options = options(
    click.option("--preset", metavar="NAME", help="Torchvision weights whose preprocessing a .pth file goes with."),
    click.option("--resize", type=click.IntRange(1), help="Shorter side after resizing, pixels (the preset's)."),
    click.option("--crop", type=click.IntRange(1), help="Side of the centred crop, pixels (the preset's)."),
    click.option(
        "--pixel-path",
        type=click.Choice(["pillow", "pillow-crop", "pillow-draft"]),
        help="How files become pixels; pillow, the reference, by default. The others are faster and not quite equal.",
    ),
)
weights_options = options(
    click.option("--weights", metavar="NAME|FILE.pth|random", help="Weights; torchvision's default where not given."),
    pixel_options,
)
pooling_option = click.option(
    "--pooling",
    type=click.Choice(["average", "max", "token"]),
    help="How a layer that is no vector becomes one; average by default, token is a transformer's class token.",
)
layer_options = options(
    click.option(
        "--layer",
        "layers",
        multiple=True,
        metavar="NAME",
        help="A layer to take features from, instead of the penultimate one; several give several feature sets.",
    ),
    pooling_option,
)
input_options = options(
    click.option("--mean", metavar="R[,G,B]", help="Of an ONNX file: subtracted from pixels in 0..1 (see --input-range)."),
    click.option("--std", metavar="R[,G,B]", help="Of an ONNX file: what they are then divided by."),
    click.option("--input-range", type=click.Choice(["1", "255"]), help="Of an ONNX file: 255 where it takes raw values."),
    click.option("--interpolation", metavar="NAME", help="Of an ONNX file: bilinear, bicubic, nearest, lanczos, box."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), help="Of an ONNX file: their order."),
    click.option("--squash", is_flag=True, help="Of an ONNX file: resize to the square itself, without a crop."),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), help="Of an ONNX file, where its shape does not tell."),
)
one_layer_option = click.option("--layer", metavar="NAME", help="Which feature set, where the cache has several.")
backbone_options = options(
    click.option("-m", "--backbone", required=True, metavar="NAME|FILE.onnx", help="Network; see `penult backbones`."),
    weights_options,
)
run_options = options(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute; see docs/gpu.md.",
    ),
    click.option("-b", "--batch-size", default="auto", show_default=True, metavar="N|auto", help="Images per batch."),
    click.option("-j", "--workers", default="auto", show_default=True, metavar="N|auto", help="Decoding threads."),
)
gate_options = options(
    *(click.option(gate.flag, type=click.FloatRange(gate.least, gate.most), help=gate.help) for gate in GATES)
)
accept_pixels_option = click.option(
    "--accept-pixels",
    is_flag=True,
    help="Go on where this machine decodes images otherwise than the training did, and say how much that changes.",
)
split_options = options(
    click.option("--val-fraction", type=click.FloatRange(0, 1, max_open=True), help="Share for validation."),
    click.option("--test-fraction", type=click.FloatRange(0, 1, max_open=True), help="Share held out."),
)
source_options = options(
    click.option("--root", type=FOLDER, help="What the paths of a manifest are relative to."),
    click.option("--group-by", metavar="COLUMN|REGEX", help="What must stay in one split: a column, or a pattern over paths."),
    click.option("--follow-symlinks", is_flag=True, help="Follow symbolic links."),
    click.option("--limit", type=click.IntRange(1), help="Only the first N inputs."),
)
task_options = options(
    click.option(
        "--task",
        type=click.Choice(["single-label", "multi-label", "regression"]),
        default="single-label",
        show_default=True,
        help="What labels mean; multi-label separates them by |.",
    ),
    click.option("--target", "targets", multiple=True, metavar="COLUMN", help="regression: a numeric column; repeatable."),
)
max_failures_option = click.option(
    "--max-failures", default="1%", show_default=True, metavar="N|P%", help="How many may fail; a share is at least 3."
)
head_option = click.option(
    "--head",
    type=click.Choice(["logistic", "mlp", "ridge", "knn", "centroid"]),
    help="Kind of head; logistic by default, and ridge for numbers to predict.",
)
observing_options = options(
    click.option("--log-json", type=FOLDER, help="Append every message as one JSON object per line; the last is `summary`."),
    click.option("--metrics", type=FOLDER, help="Write a Prometheus textfile (.prom), replaced whole."),
    click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
)
pictures_option = click.option(
    "--thumbnails/--no-thumbnails", "pictures", default=True, show_default=True, help="Whether the report shows images."
)
augment_options = options(
    click.option(
        "--augment",
        type=click.Choice(["standard", "trivialaugment", "randaugment", "autoaugment", "augmix", "none"]),
        default="standard",
        show_default=True,
        help="Random changes of images: standard is crops and flips; policies come on top of these.",
    ),
    click.option("--no-augment", is_flag=True, help="The same as --augment none."),
    click.option("--crop-area", type=click.FloatRange(0, 1, min_open=True), help="Least share of an image in a random crop."),
    click.option("--no-flip", is_flag=True, help="No mirror images: where left and right mean something, as in text."),
    click.option("--vertical-flip", is_flag=True, help="Also upside down: where there is no up, as from above."),
    click.option("--rotation", type=click.FloatRange(0, 180), help="Degrees, either way."),
    click.option("--translation", type=click.FloatRange(0, 1), help="Share of the side."),
    click.option("--shear", type=click.FloatRange(0, 90, max_open=True), help="Degrees."),
    click.option("--zoom", type=click.FloatRange(0), help="0.25: from 1/1.25 to 1.25 times the size."),
    click.option("--brightness", type=click.FloatRange(0, 1), help="0.2: a factor from 0.8 to 1.2."),
    click.option("--contrast", type=click.FloatRange(0, 1), help="0.2: a factor from 0.8 to 1.2."),
)
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
    from extractor.backbones import row, rows
    from extractor.layers import list_layers

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


@cli.command()
@click.argument("name", metavar="BACKBONE")
@weights_options
@layer_options
@input_options
@output_option("The ONNX file.")
@overwrite_option
def export(name: str, output: Path, *, overwrite: bool, **chosen: Any) -> None:
    """Export a backbone to ONNX, cut at its penultimate layer and checked against torch.

    BACKBONE is a torchvision network, or somebody's ONNX file, which becomes one that says itself what it takes.

    Example: penult export resnet50 -o resnet50.onnx
    """
    from extractor.export import export as export_backbone
    from store.atomic import require_free

    require_free(output, overwrite=overwrite)
    facts = export_backbone(backbone_from({**chosen, "backbone": name}), output)
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
    """Download the file of weights of a backbone, checked against the digest in its name, unless it is there.

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
    """Take files brought from another machine to where torch looks for them, checked against torchvision's digests.

    Afterwards `penult extract -m BACKBONE` uses them without a flag. A file may have been renamed.

    Example: penult weights import /media/usb/resnet50-11ad3fa6.pth
    """
    from extractor.backbones import import_weights

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


@cli.command()
@click.argument("data", type=FOLDER)
@backbone_options
@layer_options
@input_options
@output_option("The cache, a folder.")
@run_options
@source_options
@task_options
@split_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the split, and of views.")
@click.option("--views", type=click.IntRange(1), default=1, show_default=True, help="Of each image; see docs/views.md.")
@augment_options
@click.option(
    "--storage",
    type=click.Choice(["auto", "float32"]),
    default="auto",
    show_default=True,
    help="float16 where the values fit, or float32 always.",
)
@click.option(
    "--on-error", type=click.Choice(["skip", "fail"]), default="skip", show_default=True, help="What a bad file does."
)
@max_failures_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="int8 is faster on a CPU (calibrated once, on training images), fp16 on a GPU; refused where it is too coarse.",
)
@click.option("--tf32", is_flag=True, help="Let a GPU round products to 10 bits: faster, and other features.")
@click.option("--retry-failed", is_flag=True, help="Try recorded failures again.")
@click.option("--verify-content", is_flag=True, help="Read every file, even if size, time and inode are unchanged.")
@observing_options
@overwrite_option
@json_option
def extract(data: Path, output: Path, *, as_json: bool, **given: Any) -> int:
    """Pass every image through a backbone once and cache its features. Run it again to resume or to update.

    DATA is a folder per class, train|val|test folders of these, a flat folder, a CSV or Parquet file with a column `path`,
    a .tar file or a folder of them, or torchvision:NAME@DIR.

    Example: penult extract photos/ -m resnet50 -o photos.cache
    """
    from extractor.options import Options
    from extractor.pipeline import preview, run_extract
    from extractor.progress import observed
    from extractor.sources import open_source

    source = open_source(data, **{key: given[key] for key in ("root", "follow_symlinks", "group_by", "task", "targets")})
    chosen = Options(
        device=given["device"],
        **sizes(given),
        fail_fast=given["on_error"] == "fail",
        val_fraction=0.2 if given["val_fraction"] is None else given["val_fraction"],
        test_fraction=0.2 if given["test_fraction"] is None else given["test_fraction"],
        quiet=is_quiet(),
        **{
            key: given[key]
            for key in (
                *("storage", "seed", "max_failures", "retry_failed", "verify_content", "limit", "overwrite"),
                *("precision", "tf32", "views"),
            )
        },
        augmentation=augmentation_from(given),
    )
    if given["dry_run"]:
        print_preview(preview(source, output, chosen), as_json=as_json)
        return 0
    with observed(log_json=given["log_json"], metrics=given["metrics"]) as seen:
        summary = run_extract(source, backbone_from(given), output, chosen)
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
    """Show what is in a cache: fingerprint, rows, labels by split, failures.

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
    """Check every file of a cache against its checksum, and that every sample has its features. Exit 65 if not.

    `penult extract` computes again what is damaged, and nothing else.

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
    """Show what changed from one cache to another, image by image, and why.

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
    """Regression test on cached features: exit 65 unless CACHE holds what the golden cache holds.

    Images, labels, storage type, fingerprint and features must agree; only CPU and GPU may differ.

    Example: penult check today.cache --against golden.h5 --head photos.head
    """
    from store.cache import FeatureCache
    from store.compact import write_compact
    from store.drift import compare_caches
    from store.errors import BadDataError

    found = FeatureCache(cache, layer)
    if update and not against.exists():
        click.echo(f"{against}: new, {write_compact(found, against, dtype=str(found.dtype))} rows", err=as_json)
        return
    golden = FeatureCache(against, layer)
    drift = compare_caches(golden, found, predict=decisions(head, golden), bound=tolerance)
    print_drift(drift, as_json=as_json)
    if update:
        write_compact(found, against, dtype=str(found.dtype), overwrite=True)
        click.echo(f"{against} is replaced", err=True)
    elif not drift.passed:
        message = f"{cache} does not match {against}: {'; '.join(drift.causes) or 'see the table'}"
        raise BadDataError(message)


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
    from store.cache import FeatureCache
    from store.compact import prune as prune_cache
    from store.compact import write_compact

    if not output and not prune:
        message = "pass -o FILE.h5, --prune, or both"
        raise click.UsageError(message)
    if prune:
        removed, kept = prune_cache(cache)
        click.echo(f"{cache}: {removed} rows removed, {kept} kept")
    if output:
        rows = write_compact(FeatureCache(cache, layer), output, dtype=dtype, overwrite=overwrite)
        click.echo(f"{output}: {rows} rows, {output.stat().st_size / 2**20:.1f} MiB")


@cli.command()
@click.argument("cache", type=FOLDER)
@output_option("The bundle, a folder.")
@head_option
@click.option("--C", "C", type=click.FloatRange(0, min_open=True), help="logistic: one value instead of a search.")
@click.option("--class-weight", type=click.Choice(["balanced"]), help="logistic: as if every class had as many images.")
@click.option(
    "--select", type=click.Choice(["log-loss", "accuracy"]), help="logistic: what C is chosen by.  [default: log-loss]"
)
@click.option("--l1-ratio", type=click.FloatRange(0, 1), help="logistic: elastic net (slow): the share of |w| in its penalty.")
@click.option("--alpha", type=click.FloatRange(0, min_open=True), help="ridge: one value instead of a search.")
@click.option("--k", "k", type=click.IntRange(1), help="knn: how many neighbours vote, instead of a search.")
@click.option("--hidden", metavar="N,N", help="mlp: width of each hidden layer, instead of a search.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="mlp: learning rate, instead of a search.")
@click.option("--schedule", type=click.Choice(["constant", "cosine"]), help="mlp: of the learning rate.  [default: constant]")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="mlp: probability.")
@click.option("--weight-decay", type=click.FloatRange(0), help="mlp: of AdamW.")
@click.option(
    "--leaks",
    type=click.Choice(["warn", "refuse", "allow"]),
    default="warn",
    show_default=True,
    help="Images on both sides of the split, or under two labels.",
)
@click.option("--few-shot", metavar="N,N", help="Also measure the head with so many training images of each class.")
@click.option("--repeats", type=click.IntRange(2), default=20, show_default=True, help="--few-shot: draws for each number.")
@click.option("--max-memory", type=Memory(), help="More features than fit stay on disk.  [default: half of what is free]")
@click.option("--average-views", is_flag=True, help="Predict the mean over the views of an image, which are fitted anyway.")
@split_options
@one_layer_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the training, and of a split of its own.")
@pictures_option
@overwrite_option
@json_option
def train(cache: Path, output: Path, head: str | None, *, as_json: bool, overwrite: bool, **given: Any) -> None:
    """Train a head on cached features and save it as a bundle.

    The split stored in the cache is used; --val-fraction or --test-fraction make another one.

    Example: penult train photos.cache --head logistic -o photos.head
    """
    from classifiers.train import make_head, train_head
    from store.cache import FeatureCache

    hidden = [number(width, "--hidden", MAX_WIDTH) for width in given["hidden"].split(",")] if given["hidden"] else None
    shots: list[Any] = (
        [number(each, "--few-shot", MAX_SHOTS) for each in given["few_shot"].split(",")] if given["few_shot"] else []
    )
    names = ("C", "class_weight", "select", "l1_ratio", "alpha", "k", "dropout", "weight_decay", "lr", "schedule")
    settings = {"hidden": hidden, **{name: given[name] for name in names}}
    fractions = {"val": given["val_fraction"], "test": given["test_fraction"], "split_seed": given["seed"]}
    features = FeatureCache(cache, given["layer"])
    made = make_head(head, features.samples.task, seed=given["seed"], **settings)
    bundle = train_head(
        features,
        output,
        made,
        leaks=given["leaks"],
        few_shot=shots,
        repeats=given["repeats"],
        pictures=given["pictures"],
        max_memory=given["max_memory"],
        average_views=given["average_views"],
        overwrite=overwrite,
        **fractions,
    )
    print_bundle(bundle, as_json=as_json)
    if bundle.few_shot and not as_json:
        from classifiers.tables import SHOT_COLUMNS, shot_cells

        click.echo(f"\nAccuracy on {bundle.split['reported_on']!r} by training images of each class")
        print_table(SHOT_COLUMNS, [shot_cells(point) for point in bundle.few_shot], left=0)


@cli.command()
@click.argument("data", type=FOLDER)
@backbone_options
@output_option("The bundle, a folder.")
@click.option("--epochs", type=click.IntRange(1), help="At most so many.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate of the transferred layers.")
@click.option(
    "--head-lr-factor",
    type=click.FloatRange(0, min_open=True),
    help="The head learns so many times faster.  [default: 10; 1 with --init-head]",
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine", "step", "plateau"]),
    help="How the learning rates fall.  [default: cosine]",
)
@click.option("--warmup", type=click.FloatRange(0), metavar="EPOCHS", help="First let them rise for so many epochs.")
@click.option(
    "--freeze-until",
    metavar="LAYER",
    help="Freeze what runs before this layer, as `penult backbones NAME --layers` names it; `head` freezes everything.",
)
@click.option(
    "--init-head", type=FOLDER, metavar="BUNDLE", help="Start from this head, trained on cached features of the same split."
)
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="Which optimiser.  [default: sgd]")
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), help="Of sgd.  [default: 0.9]")
@click.option("--weight-decay", type=click.FloatRange(0), help="Of the optimiser.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="Of the features that the head sees.")
@click.option("--label-smoothing", type=click.FloatRange(0, 1, max_open=True), help="In the training loss.")
@click.option("--class-weight", type=click.Choice(["balanced"]), help="As if every class had as many images.")
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="DECAY",
    help="Validate and keep an average of the weights, with this decay per batch, such as 0.99.",
)
@click.option("--mixed-precision", type=click.Choice(["bf16", "fp16"]), help="Compute in it what torch finds safe.")
@click.option("--batch-statistics", is_flag=True, help="Let batch normalisation follow the new images where not frozen.")
@click.option("--log-dir", type=FOLDER, help="Folder for metrics.csv, and TensorBoard's events where it is installed.")
@click.option("--patience", type=click.IntRange(1), help="Epochs without improvement before it stops.")
@augment_options
@run_options
@source_options
@split_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the training, and of the split of DATA without one.")
@pictures_option
@overwrite_option
@json_option
def finetune(data: Path, output: Path, *, as_json: bool, overwrite: bool, **given: Any) -> None:
    """Fine-tune a backbone end to end on the same split, to compare with frozen features.

    DATA is a cache, whose samples and split are taken over, or a dataset as `penult extract` takes it. Interrupted, the same
    command goes on after the last finished epoch. docs/finetune.md says what the flags do.

    Example: penult finetune photos.cache -m resnet50 -o photos-finetuned.head
    """
    from classifiers.bundle import Bundle
    from classifiers.finetune_options import FineTuneOptions
    from classifiers.train import train_finetuned
    from extractor.options import Options
    from extractor.sources import open_source
    from store.cache import FeatureCache, is_cache

    names = (
        "epochs",
        "lr",
        "head_lr_factor",
        "schedule",
        "warmup",
        "freeze_until",
        "optimizer",
        "momentum",
        "weight_decay",
        "dropout",
        "label_smoothing",
        "class_weight",
        "ema",
        "mixed_precision",
        "batch_statistics",
        "patience",
        "seed",
        "device",
    )
    settings = {name: given[name] for name in names if given[name] is not None}
    settings |= {name: value for name, value in sizes(given).items() if value}
    if is_cache(data):
        unused = [name for name in ("val_fraction", "test_fraction", "group_by", "limit") if given[name] is not None]
        if unused:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            message = f"{flags}: {data} is a cache, and fine-tuning takes its samples and its split over"
            raise click.UsageError(message)
        origin: Any = FeatureCache(data)
    else:
        origin = open_source(data, root=given["root"], follow_symlinks=given["follow_symlinks"], group_by=given["group_by"])
    fractions = {key: given[key] for key in ("val_fraction", "test_fraction") if given[key] is not None}
    split = Options(seed=given["seed"], limit=given["limit"], **fractions)
    quiet = is_quiet()
    bundle = train_finetuned(
        origin,
        output,
        backbone_from(given),
        FineTuneOptions(quiet=quiet, augment=augmentation_from(given), **settings),
        extract_options=split,
        root=given["root"],
        init_head=Bundle.load(given["init_head"]) if given["init_head"] else None,
        log_dir=given["log_dir"],
        pictures=given["pictures"],
        overwrite=overwrite,
    )
    print_bundle(bundle, as_json=as_json)


@cli.command()
@click.argument("bundle", type=FOLDER)
@click.argument("data", type=FOLDER)
@click.option("--split", help="Which part; by default the one that was held out in training.")
@gate_options
@click.option("--plot", type=FOLDER, help="Write the confusion matrix as .png, .svg or .pdf.")
@click.option("--root", type=FOLDER, help="Where the images are, if they moved.")
@accept_pixels_option
@run_options
@overwrite_option
@json_option
def evaluate(bundle: Path, data: Path, *, as_json: bool, overwrite: bool, **given: Any) -> int:
    """Evaluate a bundle on a cache or a dataset: every figure with its interval, per class, confusion matrix.

    Example: penult evaluate photos.head photos.cache --split test
    """
    from classifiers.bundle import Bundle
    from classifiers.gates import missed_gates, require_gates, wanted_gates
    from classifiers.heldout import evaluate_bundle
    from classifiers.report import save_confusion
    from classifiers.task import need_single_label
    from store.errors import GateError

    loaded, gates = Bundle.load(bundle), wanted_gates(given)
    require_gates(gates, loaded.task, lambda gate: gate.flag)
    if given["plot"] is not None:
        need_single_label(loaded.task, "--plot")
    result, _ = evaluate_bundle(loaded, data, split=given["split"], root=given["root"], **runtime(given))
    if given["plot"]:
        save_confusion(result.to_json(), given["plot"], overwrite=overwrite)
    if as_json:
        print_json(result.to_json())
    else:
        print_evaluation(result)
    if missed := missed_gates(gates, result.to_json(), lambda gate: gate.flag):
        raise GateError(missed)
    return WITH_FAILURES if result.failed else 0


@cli.command()
@click.argument("bundle", metavar="BUNDLE|CLASSIFIER.onnx", type=FOLDER)
@click.argument("images", nargs=-1, type=FOLDER)
@click.option(
    "--format", "form", type=click.Choice(["table", "csv", "jsonl"]), default="table", show_default=True, help="Output."
)
@click.option("--selftest", "testing", is_flag=True, help="First check its weights, and what it gives for golden pictures.")
@accept_pixels_option
@run_options
def predict(bundle: Path, images: Sequence[Path], form: str, *, testing: bool, **given: Any) -> int:
    """Predict label and probability of images, or of everything in a folder; a novelty above 1 is unlike the training images.

    With --selftest, exit 65 if a weight was changed, or if it computes something else here than where it was made.

    Example: penult predict photos.head new/ --format csv > predictions.csv
    """
    from classifiers.fuse import selftest
    from classifiers.predict import Predictor, list_images

    if testing:
        click.echo(selftest(bundle, **runtime(given)), err=bool(images))
    if not images:
        if testing:
            return 0
        message = "which images? Name files or folders, or pass --selftest"
        raise click.UsageError(message)
    predictor = Predictor.load(bundle, **runtime(given))
    results = predictor.predict(list_images(images))
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
    """Make one ONNX file of a bundle, from decoded pixels to probabilities, for any program with ONNX Runtime.

    `penult predict CLASSIFIER.onnx` takes it like the bundle; --selftest there shows that it still gives what it gave.

    Example: penult fuse photos.head -o photos.onnx
    """
    from classifiers.bundle import Bundle
    from classifiers.fuse import fuse as fuse_bundle
    from extractor.onnxfile import data_files

    fused = fuse_bundle(Bundle.load(bundle), output, overwrite=overwrite)
    side, size = fused.preprocess.crop, sum(file.stat().st_size for file in (output, *data_files(output)))
    click.echo(f"{output}: {side} x {side} pixels to {len(fused.classes)} {fused.bound_task.plural}, {size / 2**20:.1f} MiB")


@cli.command()
@click.argument("bundle", type=FOLDER)
@click.argument("data", required=False, type=FOLDER)
@output_option("The page, an .html file.")
@click.option("--split", help="Which part; by default the one that was held out in training.")
@click.option("--root", type=FOLDER, help="Where the images are, if they moved.")
@pictures_option
@accept_pixels_option
@run_options
@overwrite_option
def report(bundle: Path, data: Path | None, output: Path, *, overwrite: bool, **given: Any) -> None:
    """Make the page of a bundle anew, or another one about how it does on a cache or a dataset.

    Without DATA the page has no images and no map of features.

    Example: penult report photos.head photos.cache -o photos.html
    """
    from classifiers.bundle import Bundle
    from classifiers.page import write_output
    from classifiers.report import report_again

    asked = {key: given[key] for key in ("split", "root", "pictures")}
    html = report_again(Bundle.load(bundle), data, **asked, **runtime(given))
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
    """Compare bundles on the same held-out images: differences with intervals, cost, and whether that is worth it.

    Example: penult compare photos.head photos-finetuned.head -o report.html
    """
    from classifiers.bundle import Bundle
    from classifiers.compare import compare as compare_bundles
    from classifiers.comparison import comparison_report, comparison_text
    from classifiers.page import write_output
    from store.cache import FeatureCache

    curve = FeatureCache(given["curve"]) if given["curve"] else None
    loaded = [Bundle.load(path) for path in bundles]
    found = compare_bundles(loaded, against=given["against"], worthwhile=given["worthwhile"], curve=curve)
    if output:
        write_output(output, comparison_report(found).encode(), overwrite=overwrite)
    if as_json:
        return print_json(found.to_json())
    return click.echo(comparison_text(found, width=None if sys.stdout.isatty() else 160))


@cli.command()
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
@pixel_options
@pooling_option
@input_options
@output_option("Folder of the caches and of sweep.html.")
@head_option
@run_options
@source_options
@task_options
@split_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the split, and of the training.")
@max_failures_option
@click.option("--overwrite", is_flag=True, help="Extract anew.")
@json_option
def sweep(data: Path, wanted: Sequence[str], output: Path, head: str | None, *, as_json: bool, **given: Any) -> int:
    """Find the backbone for a dataset: extract with several, each cached, and rank them by the head on their features.

    The same images and the same split count for all. LogME and the H-score say, without training, how good features will be.

    Example: penult sweep photos/ -m resnet18,resnet50,resnet50@layer3,theirs.onnx -o photos.sweep
    """
    from classifiers.ranking import AGREEMENT_COLUMNS
    from classifiers.sweep import PAGE, parse_sources, run_sweep
    from extractor.options import Options
    from extractor.sources import open_source

    stated = backbone_from({**given, "backbone": "", "weights": None})
    backbones = parse_sources(wanted, stated)
    source = open_source(data, **{key: given[key] for key in ("root", "follow_symlinks", "group_by", "task", "targets")})
    fractions = {key: given[key] for key in ("val_fraction", "test_fraction") if given[key] is not None}
    kept = {key: given[key] for key in ("seed", "max_failures", "limit", "overwrite")}
    chosen = Options(**runtime(given), **fractions, **kept, quiet=is_quiet())
    found = run_sweep(source, backbones, output, chosen, head=head, seed=given["seed"], data=str(data))
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
    """Run a job file: extract, train if anything changed, evaluate, and hold the result against its gate.

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
    """Show the history of a job: when, how it ended, what it computed, what came out.

    Example: penult runs nightly.toml
    """
    from classifiers.jobs import RUN_COLUMNS, read_runs, run_cells

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
    """Show the whole way on handwritten digits that need no download, in about two minutes.

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


def backbone_from(given: dict[str, Any]) -> Backbone:
    from extractor.backbones import Backbone

    stated = {name: given.get(name) for name in ("interpolation", "channels", "layout", "pooling", "pixel_path")}
    return Backbone(
        given["backbone"],
        given["weights"],
        given["preset"],
        given["resize"],
        given["crop"],
        layers=tuple(given.get("layers", ())),
        mean=numbers(given.get("mean"), "--mean"),
        std=numbers(given.get("std"), "--std"),
        input_range=float(given["input_range"]) if given.get("input_range") else None,
        squash=given.get("squash") or None,
        **stated,
    )


def augmentation_from(given: dict[str, Any]) -> Augmentation:
    from dataclasses import replace

    from extractor.augment import Augmentation

    names = ("rotation", "translation", "shear", "zoom", "brightness", "contrast")
    changes: dict[str, Any] = {name: given[name] for name in names if given[name] is not None}
    if given["crop_area"] is not None:
        changes["area"] = (given["crop_area"], 1.0)
    if given["vertical_flip"]:
        changes["vertical_flip"] = 0.5
    if given["no_flip"]:
        changes["flip"] = 0.0
    return replace(Augmentation.named("none" if given["no_augment"] else given["augment"]), **changes)


def runtime(given: dict[str, Any]) -> dict[str, Any]:
    accepted = {"accept_pixels": given["accept_pixels"]} if "accept_pixels" in given else {}
    return {"device": given["device"], **sizes(given), **accepted}


def calibration_text(found: dict[str, Any]) -> str:
    if "moved" in found:
        return f"float16, {len(found['float_layers'])} layer(s) in float32; features moved by {found['moved']:.1e} at most"
    return (
        f"int8 by {found['method']}, {len(found['float_layers'])} layer(s) in float, calibrated on {found['images']} training "
        f"images; cosine to float on {found['judged']} others: {found['min']:.4f} at worst, {found['mean']:.4f} on average"
    )


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """Values separated by commas."""
    from store.errors import UsageError

    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        message = f"{flag} {text}: expected one number, or three separated by commas"
        raise UsageError(message) from None


def sizes(given: dict[str, Any]) -> dict[str, Any]:
    """``--batch-size`` and ``--workers``, None for ``auto``."""
    from extractor.session import MAX_BATCH, MAX_WORKERS

    batch = number(given["batch_size"], "--batch-size", MAX_BATCH, ", or auto")
    return {"batch_size": batch, "workers": number(given["workers"], "--workers", MAX_WORKERS, ", or auto")}


def number(text: str, flag: str, largest: int, otherwise: str = "") -> int | None:
    """An integer from 1 to ``largest``, or None for ``auto`` where that is possible."""
    if text == "auto" and otherwise:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= largest:
        message = f"{flag} {text}: expected a number from 1 to {largest}{otherwise}"
        raise click.UsageError(message)
    return int(text)


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
    from classifiers.text import table

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
