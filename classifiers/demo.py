"""The demo: every step on scikit-learn's 1,797 handwritten digits, as image files; nothing is downloaded."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.bundle_folder import refuse_existing
from classifiers.bundles.held_out import evaluate_bundle
from classifiers.bundles.predictions import Predictions
from classifiers.bundles.predictor import Predictor, list_images
from classifiers.comparison.compare import Comparison, Entrant, compare_entrants
from classifiers.comparison.compare_page import comparison_report
from classifiers.evaluation.single_label import score
from classifiers.evaluation.task import Evaluation, Prediction
from classifiers.finetuning.finetune import finetune
from classifiers.finetuning.settings import FineTuneSettings
from classifiers.heads.logistic import LogisticHead
from classifiers.training.train import train
from extractor.backbones.networks import load
from extractor.backbones.registry import Backbone, check_request
from extractor.data.folders import ImageFolder
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from extractor.pipeline.summary import Summary
from store.cache import FeatureCache, Subset
from store.errors import InputMissingError, OutputExistsError
from store.format.output import write_output
from store.progress.stages import Stage

log = logging.getLogger("penult.classifiers")

BACKBONE = "resnet18"
MARKER = ".penult-demo"
BUNDLES = ("logistic.head", "mlp.head", "finetuned.head")
SIDE = 64  # pixels; the digits have 8 x 8, so nothing is lost, and everything is ten times faster than at 224


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo: first and second extraction, scores, the comparison, some predictions, caveats."""

    first: Summary
    second: Summary
    evaluation: Evaluation
    comparison: Comparison
    predictions: list[Prediction]
    notes: list[str]
    report: Path


def write_digits(folder: Path, *, limit: int | None = None) -> int:
    """Write the digits as 8-bit grey PNG files, 8 x 8 pixels, in a folder per class.

    The images are the test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak 1998), which
    comes with scikit-learn.

    Returns:
        The number of images.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    chosen = list(zip(digit_files(folder), load_digits().images, strict=True))[:limit]
    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for path, image in chosen:
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(path)
    return len(chosen)


def digit_files(folder: Path) -> list[Path]:
    """The files that `write_digits` makes without a limit, in their order."""
    from sklearn.datasets import load_digits

    return [folder / str(label) / f"{number:04d}.png" for number, label in enumerate(load_digits().target)]


def choose_backbone(weights: str | None) -> tuple[Backbone, list[str]]:
    """The demo's backbone with ImageNet weights if available, else untrained; and what that means, in words."""
    if weights is None:
        try:
            load(Backbone(BACKBONE))
            return Backbone(BACKBONE, resize=SIDE, crop=SIDE), [
                f"{BACKBONE} with ImageNet weights: its frozen features are those used in practice."
            ]
        except InputMissingError as error:
            log.warning("%s", error)
            weights = "random:0"
    backbone = Backbone(BACKBONE, weights, resize=SIDE, crop=SIDE)
    if backbone.seed is None:
        return backbone, [f"{BACKBONE} with the weights {weights}."]
    note = (
        f"{BACKBONE} has random weights here (seed {backbone.seed}): its features are a random projection of the image. "
        f"The numbers show that everything works; they do not show what ImageNet features are worth. "
        f"Compare with the row of raw pixels."
    )
    return backbone, [note]


def run_demo(
    out: Path, *, weights: str | None = None, epochs: int = 3, limit: int | None = None, overwrite: bool = False
) -> DemoResult:
    """Run every step in one folder: images, features, heads, evaluation, predictions, fine-tuning and the comparison.

    Args:
        out: made here; holds ``digits/``, ``digits.cache/``, three bundles and ``comparison.html``.
        weights: as in `Backbone`; None tries torchvision's and falls back to random ones.
        epochs: of fine-tuning.
        limit: number of digits; None for all.
        overwrite: replace an earlier demo.

    Raises:
        OutputExistsError: the folder exists and is not an earlier demo, or may not be replaced.
    """
    check_request(Backbone(BACKBONE, weights))
    make_room(out, overwrite=overwrite)
    with Stage("writing the digits"):
        count = write_digits(out / "digits", limit=limit)
    log.info("wrote %d digits as PNG files into %s", count, out / "digits")
    backbone, notes = choose_backbone(weights)
    cache_path = out / "digits.cache"
    first = run_extract(ImageFolder(out / "digits"), backbone, cache_path, Options(overwrite=overwrite))
    log.info("extracted %d images with %d inference calls; extracting again", first.computed, first.inference_calls)
    second = run_extract(ImageFolder(out / "digits"), backbone, cache_path, Options())
    cache = FeatureCache(cache_path)
    bundles: list[Bundle] = []
    for name in ("logistic", "mlp"):
        bundles.append(train(cache, out / f"{name}.head", name, overwrite=overwrite))
        log.info("trained %s in %.1f s", name, bundles[-1].cost["train_seconds"])
    log.info("fine-tuning the whole network for %d epochs, for comparison", epochs)
    untrained = backbone.seed is not None  # then batch norm has no statistics worth keeping, and all layers must learn
    tuning = FineTuneSettings(
        backbone=backbone.name,
        weights=backbone.weights,
        resize=backbone.resize,
        crop=backbone.crop,
        epochs=epochs,
        batch_size=32,
        augment="none",  # flipped digits are other digits
    )
    if untrained:
        tuning = tuning.replace(optimizer="adamw", lr=1e-3, head_lr_factor=1.0, batch_statistics=True)
    bundles.append(finetune(cache, out / "finetuned.head", tuning, overwrite=overwrite))
    pixels, evaluation = raw_pixels(cache)
    comparison = compare_entrants([*map(Entrant.of, bundles), pixels])
    held_out = cache.rows("test")[:: max(len(cache.rows("test")) // 5, 1)][:5]
    shown = [out / "digits" / row.path.decode() for row in held_out]
    predictions = list(Predictor.of(bundles[0]).predict(list_images(shown)))
    report = out / "comparison.html"
    page = comparison_report(
        comparison, notes=[*notes, *evaluation.notes], title="Handwritten digits: frozen features or fine-tuning?"
    )
    write_output(report, page.encode(), overwrite=True)
    return DemoResult(
        first=first,
        second=second,
        evaluation=cast(Evaluation, evaluate_bundle(bundles[0], cache_path)[0]),
        comparison=comparison,
        predictions=predictions,
        notes=notes,
        report=report,
    )


def raw_pixels(cache: FeatureCache) -> tuple[Entrant, Evaluation]:
    """Logistic regression on the 64 pixel values, on the same split: the baseline that features must beat."""
    from PIL import Image

    def pixels(split: str) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], Subset]:
        subset = cache.subset(split)
        rows = [np.asarray(Image.open(cache.root / path.decode()), np.float32).ravel() / 255 for path in subset.paths]
        return np.stack(rows), subset

    (X, train), (Xv, val), (Xt, test) = (pixels(split) for split in ("train", "val", "test"))
    begin = time.perf_counter()
    head = LogisticHead().fit(X, train.y, validation=(Xv, val.y), groups=train.groups)
    seconds = time.perf_counter() - begin
    classes, probabilities = [str(label) for label in head.classes_], head.predict_proba(Xt)
    predictions = Predictions(test.sha256, test.paths, test.y, probabilities, "test", groups=test.groups)
    cost = {"train_seconds": round(seconds, 3), "extract_seconds": 0.0, "images": 0}
    evaluation = score(test.y, probabilities, classes, "test", units=predictions.units)
    return Entrant("raw pixels", "no backbone", predictions, classes, cost), evaluation


def make_room(out: Path, *, overwrite: bool) -> None:
    """Make the folder, or check that a demo can replace an earlier one: each part replaces its own files.

    Raises:
        OutputExistsError: it cannot; names what is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):  # a run that was killed early leaves an empty one
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("made by `penult demo`, which may replace what it wrote here\n")
        return
    ours = (out / MARKER).is_file()
    if not ours or not overwrite:
        reason = "choose another folder or pass --overwrite" if ours else "it is not an earlier demo; choose another folder"
        message = f"{out} exists; {reason}"
        raise OutputExistsError(message)
    for name in BUNDLES:
        refuse_existing(out / name, overwrite=True)
    digits = digit_files(out / "digits")
    known = {out / "digits", *digits, *(path.parent for path in digits)}
    for path in (out / "digits", *(out / "digits").rglob("*")):
        if path not in known or path.is_symlink():
            message = f"{path} is not part of the demo; move it away, or choose another folder"
            raise OutputExistsError(message)
    for path in digits:  # an earlier demo may have had more of them
        path.unlink(missing_ok=True)
