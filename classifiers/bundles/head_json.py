"""The content of a bundle's files, checked where they are read: a digest says what was written, and not that it makes sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classifiers.evaluation.task import HeadTask
from extractor.pixels.preprocess import FILTERS, Preprocess, require_sizes
from store.errors import BadDataError
from store.format.json_text import misfit
from store.format.metadata import FINGERPRINT

if TYPE_CHECKING:
    from .bundle import Bundle, Predictions

NUMBER = (float, None)  # JSON has null for what is not defined
BOUNDS = [float, float]
SCORES = {"*": {"value": NUMBER, "interval": (BOUNDS, None)}}
METRICS = {"split": str, "n": int, "notes": [str], "scores?": SCORES}
CLASS = {"label": str, "n": int, "precision": NUMBER, "recall": NUMBER, "recall_interval": (BOUNDS, None), "f1": NUMBER}
SINGLE_LABEL = {  # of an `Evaluation`
    **METRICS,
    "correct": int,
    "accuracy": float,
    "accuracy_interval": BOUNDS,
    "macro_f1": float,
    "per_class": [CLASS],
    "confusion": [[int]],
    "classes": [str],
    "sets?": ({"target": float, "marginal": {"decided": int, "decided_right": int}}, None),
    "novelty?": ({"share": float, "expected": float}, None),
}
OUTPUTS = {**METRICS, "scores": SCORES, "per_output": [{"name": str, "n": int, "scores": SCORES}]}  # of a `Measured`
PIXELS = {"resize": int, "crop": int, "interpolation": str, "mean": [float], "std": [float], "input_range?": float}
BACKBONE = {
    "name": str,
    "weights": str,
    "weights_sha256": str,
    "layers": [{"layer": str, "pooling": str, "dim": int, "output?": str}],
    "preprocess": PIXELS,
    "precision?": str,
    "calibration?": dict,
}
SHAPE = {  # what is read of head.json
    "kind": str,
    "head": str,
    "task?": str,
    "classes": [str],
    "backbone": BACKBONE,
    "fingerprint": FINGERPRINT,
    "split": {"reported_on": (str, None), "override?": (bool, None)},
    "hyperparameters": {"temperature?": NUMBER, "asked?": dict, "tried?": (int, None, [dict])},
    "history": [dict],
    "metrics": (dict, None),
    "cost": {"train_seconds": float, "extract_seconds": float, "images": int, "peak_memory?": NUMBER, "energy?": NUMBER},
    "conformal?": (dict, None),
    "rounding?": (dict, None),
    "few_shot?": ([{"shots": int, "accuracy": float, "accuracy_interval": BOUNDS, "accuracies": [float]}], None),
    "files?": {"*": str},
}
EPOCHS = [{"epoch": int, "train_loss": NUMBER, "val_loss": NUMBER}]
SPLIT_AGAIN = {"val": float, "test": float, "seed": int}
INTERVALS = {"coverage": float, "n": int, "half_width": [NUMBER]}
SETS = {"coverage": float, "n": int, "marginal": float, "per_class": [float]}
MORE_THAN_CERTAIN = 1.001  # sums of float32 may exceed 1 a little


def require_shape(facts: Any) -> None:
    """Refuse JSON that no head writes.

    Raises:
        ValueError: says what differs.
    """
    if reason := misfit(facts, SHAPE):
        raise ValueError(reason)


def require_head(bundle: Bundle, task: HeadTask) -> None:
    """Refuse facts that do not fit each other: the lists that have an entry for each output, and numbers out of range.

    Raises:
        ValueError: says what does not fit.
    """
    require_names(bundle.classes)
    require_pixels(bundle.backbone.preprocess)
    require_calibration(bundle.conformal, task)
    reason = ""
    if not bundle.backbone.layers:
        reason = "'backbone.layers' is empty"
    elif bundle.backbone.precision != "fp32":
        reason = misfit(bundle.backbone.calibration, {"sha256": str}, "backbone.calibration")
    if bundle.split.get("override"):
        reason = reason or misfit(bundle.split, SPLIT_AGAIN, "split") or _no_fractions(bundle.split)
    if bundle.kind == "fine-tuned":
        reason = reason or misfit(bundle.history, EPOCHS, "history")
    temperature = bundle.hyperparameters.get("temperature")
    if temperature is not None and temperature <= 0:
        reason = reason or f"'hyperparameters.temperature' is {temperature:g}; expected more than 0"
    if any(Path(name).name != name for name in bundle.files):
        reason = reason or "'files' names files outside the bundle"
    if any(point["shots"] < 1 or not point["accuracies"] for point in bundle.few_shot or ()):
        reason = reason or "'few_shot' has a point without images, or without a draw"
    if bundle.metrics is not None:
        reason = reason or _metrics(bundle.metrics, bundle.classes, task, scaled=temperature is not None)
    if reason:
        raise ValueError(reason)


def require_names(classes: Sequence[Any]) -> None:
    """Refuse names of outputs that are none, no text, or not different.

    Raises:
        ValueError: says what is wrong with them.
    """
    reason = misfit(classes, [str], "classes")
    if not reason and not classes:
        reason = "'classes' is empty"
    if not reason and len(set(classes)) < len(classes):
        reason = f"'classes' names {next(name for name in classes if classes.count(name) > 1)!r} twice"
    if reason:
        raise ValueError(reason)


def require_pixels(pixels: Preprocess) -> None:
    """Refuse a preprocessing that no image goes through.

    Raises:
        ValueError: says why.
    """
    require_sizes(pixels.resize, pixels.crop)
    if pixels.interpolation not in FILTERS or len(pixels.mean) != 3 or len(pixels.std) != 3:
        message = f"no image is preprocessed with {pixels.interpolation!r}, mean {pixels.mean} and std {pixels.std}"
        raise ValueError(message)


def require_calibration(conformal: dict[str, Any] | None, task: HeadTask) -> None:
    """Refuse prediction sets or intervals that are not those of the outputs.

    Raises:
        ValueError: says what differs.
    """
    if not conformal or not (task.intervals or task.exclusive):
        return
    shape, key = (INTERVALS, "half_width") if task.intervals else (SETS, "per_class")
    reason = misfit(conformal, shape, "conformal")
    if not reason and set(conformal) != set(shape):
        reason = f"'conformal' has {', '.join(sorted(map(repr, conformal)))}; expected {', '.join(sorted(map(repr, shape)))}"
    if not reason and len(conformal[key]) != len(task.names):
        reason = f"'conformal.{key}' is for {len(conformal[key])} {task.plural}, and the head has {len(task.names)}"
    if reason:
        raise ValueError(reason)


def _no_fractions(split: Mapping[str, Any]) -> str:
    val, test = split["val"], split["test"]
    return "" if 0 <= val and 0 <= test and val + test < 1 else f"'split' has the fractions val {val:g} and test {test:g}"


def _metrics(metrics: dict[str, Any], classes: Sequence[str], task: HeadTask, *, scaled: bool) -> str:
    """What is wrong with a held-out evaluation, in words; empty if it is one of this head."""
    reason = misfit(metrics, SINGLE_LABEL if task.exclusive else OUTPUTS, "metrics")
    if reason:
        return reason
    if metrics["n"] < 1:
        return "'metrics.n' is no number of images"
    return _of_classes(metrics, classes, scaled=scaled) if task.exclusive else _of_outputs(metrics, classes, task)


def _of_classes(metrics: dict[str, Any], classes: Sequence[str], *, scaled: bool) -> str:
    if metrics["classes"] != list(classes) or [each["label"] for each in metrics["per_class"]] != list(classes):
        return "the classes of 'metrics' are not those of the head"
    if [len(line) for line in metrics["confusion"]] != [len(classes)] * len(classes):
        return f"'metrics.confusion' is not {len(classes)} x {len(classes)}"
    if any(each["n"] and None in (each["recall"], each["recall_interval"]) for each in metrics["per_class"]):
        return "'metrics.per_class' lacks the recall of a class that has images"
    scores = metrics.get("scores", {})
    needed = ["ece", "ece_by_chance", *(["ece_before"] if scaled else [])] if "ece" in scores else []
    lacking = [name for name in needed if name not in scores or scores[name]["value"] is None]
    return f"'metrics.scores' lacks {lacking[0]!r}" if lacking else ""


def _of_outputs(metrics: dict[str, Any], classes: Sequence[str], task: HeadTask) -> str:
    if task.metric not in metrics["scores"]:
        return f"'metrics.scores' lacks {task.metric!r}"
    if metrics.get("task") != task.name or [each["name"] for each in metrics["per_output"]] != list(classes):
        return f"the {task.plural} of 'metrics' are not those of the head"
    names = [list(each["scores"]) for each in metrics["per_output"]]
    return "" if all(each == names[0] for each in names) else f"'metrics.per_output' has other scores for some {task.plural}"


def require_predictions(predictions: Predictions, bundle: Bundle, task: HeadTask) -> None:
    """Refuse predictions for held-out images that are not those of a head: other columns, other images, unknown labels.

    Raises:
        BadDataError: says what does not fit.
    """
    n, k, outputs = len(predictions.paths), len(bundle.classes), predictions.probabilities
    truth = (n,) if task.exclusive else (n, k)
    reason = ""
    if outputs.shape != (n, k) or len(predictions.sha256) != n or predictions.labels.shape != truth:
        reason = (
            f"its {len(predictions.sha256)} digests, truth {predictions.labels.shape} and outputs {outputs.shape} do not fit "
            f"{n} images and {k} {task.plural}"
        )
    elif bundle.metrics is not None and bundle.metrics["n"] != n:
        reason = f"it has {n} images, and head.json was measured on {bundle.metrics['n']}"
    elif task.exclusive and (unknown := set(predictions.labels.tolist()) - set(bundle.classes)):
        reason = f"it has the label {min(unknown)!r}, which the head does not know"
    elif not task.exclusive and not np.isfinite(predictions.labels).all():
        reason = "its truth has NaN or infinity"
    elif not task.intervals and ((outputs < 0) | (outputs > MORE_THAN_CERTAIN)).any():
        reason = "it has probabilities that are not between 0 and 1"
    if reason:
        message = f"{bundle.path}/predictions.h5: {reason}"
        raise BadDataError(message)
