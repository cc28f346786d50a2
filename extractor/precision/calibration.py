"""Calibration of an int8 backbone on a few hundred training images, always the same ones."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from extractor.backbones import prepared
from extractor.data.reader import Reader, WorkerPool
from extractor.data.samples import Sample
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.cpu_session import int8_saturates
from extractor.machine import cores, versions_of
from extractor.pixels.images import ImageError
from store.errors import BadDataError, InterruptedRunError, PenultError
from store.fingerprint import file_digest
from store.format.calibration import NAME, Calibration, encode_calibration, read_calibration
from store.format.samples import Row
from store.progress.stages import Stage
from store.splits import assign_splits

from .int8 import BOUND, quantise
from .quantiser import Pixels
from .registry import Conversion, TrainingImages

log = logging.getLogger("penult.extractor")

CALIBRATED, JUDGED = 64, 192  # images that give the ranges, and others that judge them; more would not give better ranges
FEWEST = 8
MAX_PIXEL_BYTES = 2**29  # with large crops, fewer images are taken
METHOD = 1  # version of the calibration: raised when the same images give another network, so that kept ones go
DECIDING = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu")  # libraries that decide the network
CLEARANCE = 0.5  # of the training images: those whose rank is nearest to another split are not taken


def conversion(images: TrainingImages) -> Conversion:
    """The `Conversion` to int8."""
    return Calibrator(**vars(images))


def describe(calibration: dict[str, Any]) -> str:
    """The outcome in words."""
    floats = len(calibration["float_layers"])
    return (
        f"int8 by {calibration['method']}, {floats} layer(s) in float, calibrated on {calibration['images']} training images; "
        f"cosine to float on {calibration['judged']} others: {calibration['min']:.4f} at worst, "
        f"{calibration['mean']:.4f} on average"
    )


@dataclass(frozen=True)
class Calibrator(TrainingImages):
    """The `Conversion` to int8, calibrated on training images."""

    def __call__(self, source: Path, out: Path, facts: BackboneFacts) -> tuple[BackboneFacts, Calibration]:
        """Write the int8 file; return its facts, and the float and int8 features of the images that were used.

        The store of prepared backbones keeps all of that for the same network and images.

        Raises:
            BadDataError: int8 is too coarse for this network, or there are too few images.
            InterruptedRunError: a signal came.
        """
        limit = max(min(CALIBRATED + JUDGED, MAX_PIXEL_BYTES // (3 * facts.preprocess.crop**2)), FEWEST)
        images, pixels = self._decoded(facts, limit)
        digests = list(images)
        if len(digests) < FEWEST:
            message = (
                f"--precision int8 is calibrated on at least {FEWEST} training images, and finds {len(digests)} here that can "
                f"be decoded and that no damaged file can move into another split. Add images, or use --precision fp32"
            )
            raise BadDataError(message)
        count = min(CALIBRATED, len(digests) // 2)
        self.report.paths, request = images, _request(source, facts, digests, pixels)
        if taken := _take(request, out):
            log.info("using the int8 conversion as prepared before, from the same %d images", len(digests))
            self.report.prepared = "store"
            return taken
        made = self._made(source, out, facts, digests, pixels, count)
        prepared.keep(request, out, made[0], {NAME: encode_calibration(made[1])})
        return made

    def _made(
        self, source: Path, out: Path, facts: BackboneFacts, digests: list[bytes], pixels: Pixels, count: int
    ) -> tuple[BackboneFacts, Calibration]:
        """Calibrate on the first ``count`` images and judge on the others."""
        log.info("calibrating int8 on %d training images, judging it on %d others", count, len(digests) - count)
        begin = time.process_time()
        with Stage("calibrating int8"):
            made = quantise(source, out, facts, pixels[:count], pixels[count:], self._check)
        self.report.rates, self.report.prepared = made.rates, "calibrated"
        spent_anyway = len(digests) / made.rates[1]  # on features that the run needs and does not compute again
        self.report.core_seconds = max(time.process_time() - begin - spent_anyway, 0.0)
        calibration = made.facts.calibration
        log.info(
            "int8 by %s, %d layer(s) in float: cosine to float %.4f at worst, %.4f on average",
            *(calibration["method"], len(calibration["float_layers"]), calibration["min"], calibration["mean"]),
        )
        order = [*digests[count:], *digests[:count]]
        layers = [each.layer for each in facts.layers]
        return made.facts, Calibration(calibration["sha256"], layers, order, made.exact, made.rounded)

    def _check(self) -> None:
        if self.stop:
            raise InterruptedRunError(self.stop.signum)

    def _decoded(self, facts: BackboneFacts, limit: int) -> tuple[dict[bytes, bytes], Pixels]:
        """The paths of the images by their content digests, and their pixels, in the same order."""
        workers = self.workers or cores()
        reader = Reader(self.source.files, facts.preprocess, set(), WorkerPool(workers))
        images: dict[bytes, bytes] = {}
        pixels = []
        todo = list(enumerate(self._candidates(workers)))
        with (
            closing(reader.stream(todo, self.stop)) as stream,
            Stage("reading images for int8", min(limit, len(todo)), "images") as stage,
        ):
            for outcome in stage.each(stream):
                if outcome.row.ok and outcome.pixels is not None:
                    images[outcome.row.sha256] = outcome.row.path
                    pixels.append(outcome.pixels)
                if len(images) == limit:
                    break
        self._check()
        side = facts.preprocess.crop
        return images, np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)

    def _candidates(self, workers: int) -> list[Sample]:
        """The training samples, ordered by the hash of their paths, or of their content if `extract` will split them.

        That split is by hash rank: it depends on the content of all samples, and on which of them turn out to be damaged. So
        samples whose rank is near another split are left out.
        """
        targets = self.source.task.targets
        if any(sample.split for sample in self.samples):
            train = [sample for sample in self.samples if sample.split == "train"]
        elif (not targets and any(sample.label is None for sample in self.samples)) or not (self.val or self.test):
            train = list(self.samples)
        else:
            return self._clear_of_other_splits(workers)
        return sorted(train, key=lambda sample: hashlib.sha256(sample.path).digest())

    def _clear_of_other_splits(self, workers: int) -> list[Sample]:
        log.info("reading %d files to know which will be training images", len(self.samples))
        known: dict[bytes, Sample] = {}
        rows = []
        count = len(self.samples)
        with ThreadPoolExecutor(workers, "penult-hash") as pool, Stage("looking for training images", count, "files") as stage:
            for sample, digest in zip(self.samples, stage.each(self._in_turn(pool)), strict=False):
                if digest is not None:
                    known.setdefault(digest, sample)
                    rows.append(Row(sample.path, sample.label, None, sample.group, sha256=digest))
        self._check()
        train = set(known)
        for val in (self.val, self.val + (1 - self.val - self.test) * CLEARANCE):
            names = assign_splits(rows, val=val, test=self.test, seed=self.seed, stratify=self.source.task.stratifies)
            train &= {row.sha256 for row, name in zip(rows, names, strict=True) if name == "train"}
        return [known[digest] for digest in sorted(train)]

    def _in_turn(self, pool: ThreadPoolExecutor) -> Iterator[bytes | None]:
        """Digests in the order of the samples, a bounded number of files at a time; ends early when ``stop`` is set."""
        for begin in range(0, len(self.samples), 1024):
            if self.stop:
                return
            yield from pool.map(self._digest, self.samples[begin : begin + 1024])

    def _digest(self, sample: Sample) -> bytes | None:
        try:
            return hashlib.sha256(self.source.files.read(sample.path)[0]).digest()
        except ImageError:  # it will fail again when it is extracted, and be reported then
            return None


def _request(source: Path, facts: BackboneFacts, digests: Sequence[bytes], pixels: Pixels) -> dict[str, Any]:
    """Everything that decides an int8 file and its calibration, as JSON; the float file has its facts inside."""
    return {
        "name": facts.name,
        "weights": facts.weights,
        "precision": "int8",
        "float_sha256": file_digest(source),
        "images_sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "method": [METHOD, BOUND],
        "saturates": int8_saturates(),
        "libraries": versions_of(DECIDING),
    }


def _take(request: dict[str, Any], out: Path) -> tuple[BackboneFacts, Calibration] | None:
    """The conversion as it was kept; None if there is none."""
    with tempfile.TemporaryDirectory(prefix="penult-") as folder:
        model, calibration = Path(folder, "int8.onnx"), Path(folder, NAME)
        taken = prepared.take(request, model)  # not beside the float file, which it would take for a leftover
        if taken is None or NAME not in taken.others:
            return None
        calibration.write_bytes(taken.others[NAME])
        onnx_file.save(onnx_file.read_model(model), out)
        return taken.facts, read_calibration(calibration.parent)


def without(facts: BackboneFacts) -> BackboneFacts:
    """The facts of an int8 file, turned into those of its float file."""
    return replace(facts, precision="fp32", calibration={})


def count_moved(cache: Path, rows: Sequence[Row]) -> int:
    """How many calibration images of a cache are in validation or held out now: added or deleted files may move others."""
    try:
        calibrated = set(read_calibration(cache).sha256)
    except PenultError:  # nothing depends on it; `verify` says what is wrong with it
        return 0
    return len({row.sha256 for row in rows if row.ok and row.split in ("val", "test") and row.sha256 in calibrated})
