"""The content of head.json, checked where it is read: a digest says what was written, and not that it makes sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from classifiers.evaluation.registry import task_of
from classifiers.evaluation.task import HeadTask
from extractor.pixels.preprocess import FILTERS, Preprocess, require_sizes
from store.format.json_text import misfit
from store.format.metadata import FINGERPRINT
from store.tasks import ONE_LABEL

NUMBER = (float, None)  # JSON has null for what is not defined
BOUNDS = [float, float]
SCORES = {"*": {"value": NUMBER, "interval": (BOUNDS, None)}}
METRICS = {"split": str, "n": int, "groups?": (int, None), "notes": [str], "scores?": SCORES}
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
    "hyperparameters": {
        "temperature?": NUMBER,
        "asked?": dict,
        "tried?": (int, None, [dict]),
        "refit?": bool,
        "views?": {"count": int},
    },
    "history": [dict],
    "metrics": (dict, None),
    "cost": {
        "train_seconds": float,
        "extract_seconds": float,
        "images": int,
        "peak_memory?": NUMBER,
        "energy?": NUMBER,
        "extract_energy?": NUMBER,
        "init_head?": {"extract_seconds": float, "train_seconds": float, "images": int, "energy": NUMBER},
    },
    "conformal?": (dict, None),
    "rounding?": (dict, None),
    "few_shot?": ([{"shots": int, "accuracy": float, "accuracy_interval": BOUNDS, "accuracies": [float]}], None),
    "files?": {"*": str},
}
EPOCHS = [{"epoch": int, "train_loss": NUMBER, "val_loss": NUMBER}]
SPLIT_AGAIN = {"val": float, "test": float, "seed": int}
INTERVALS = {"coverage": float, "n": int, "half_width": [[NUMBER]], "edges": [[float]], "effective?": float}
ONE_WIDTH = {"coverage": float, "n": int, "half_width": [NUMBER]}  # of older files
SETS = {"coverage": float, "n": int, "marginal": float, "per_class": [float], "effective?": float}


def require_head(facts: dict[str, Any]) -> None:
    """Refuse the content of a head.json that is none, or whose lists and numbers do not fit each other.

    Raises:
        ValueError: says what is wrong with it.
        BadDataError: its task is unknown.
    """
    metrics, chosen, split = facts["metrics"], facts["hyperparameters"], facts["split"]
    task = task_of(facts.get("task", ONE_LABEL.name), facts["classes"])
    require_names(facts["classes"])
    require_pixels(Preprocess.from_facts(facts["backbone"]["preprocess"]))
    require_calibration(facts.get("conformal"), task)
    temperature, reason = chosen.get("temperature"), ""
    if split.get("override"):
        reason = misfit(split, SPLIT_AGAIN, "split") or _no_fractions(split)
    if facts["kind"] == "fine-tuned":
        reason = reason or misfit(facts["history"], EPOCHS, "history")
    if temperature is not None and temperature <= 0:
        reason = reason or f"'hyperparameters.temperature' is {temperature:g}; expected more than 0"
    if any(Path(name).name != name for name in facts.get("files", ())):
        reason = reason or "'files' names files outside the bundle"
    if any(point["shots"] < 1 or not point["accuracies"] for point in facts.get("few_shot") or ()):
        reason = reason or "'few_shot' has a point without images, or without a draw"
    reason = reason or _backbone(facts["backbone"])
    if metrics is not None:
        reason = reason or _metrics(metrics, facts["classes"], task, scaled=temperature is not None)
    if reason:
        raise ValueError(reason)


def require_shape(facts: Any) -> None:
    """Refuse JSON whose parts are of other kinds than those of a head.json.

    Raises:
        ValueError: names the first.
    """
    if reason := misfit(facts, SHAPE):
        raise ValueError(reason)


def _backbone(facts: dict[str, Any]) -> str:
    if not facts["layers"]:
        return "'backbone.layers' is empty"
    converted = facts.get("precision", "fp32") != "fp32"
    return misfit(facts.get("calibration"), {"sha256": str}, "backbone.calibration") if converted else ""


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
    require_sizes(None if pixels.squash else pixels.resize, None, "preprocess.{}".format)
    require_sizes(None, pixels.crop, "preprocess.{}".format)
    if pixels.interpolation not in FILTERS or not {len(pixels.mean), len(pixels.std)} <= {1, 3}:
        message = f"no image is preprocessed with {pixels.interpolation!r}, mean {pixels.mean} and std {pixels.std}"
        raise ValueError(message)


def require_calibration(conformal: dict[str, Any] | None, task: HeadTask) -> None:
    """Refuse prediction sets or intervals that are not those of the outputs.

    Raises:
        ValueError: says what differs.
    """
    if not conformal or not (task.intervals or task.exclusive):
        return
    shape: dict[str, Any]
    shape, key = (INTERVALS if "edges" in conformal else ONE_WIDTH, "half_width") if task.intervals else (SETS, "per_class")
    reason, known = misfit(conformal, shape, "conformal"), {name.removesuffix("?") for name in shape}
    if not reason and set(conformal) - known:
        reason = f"'conformal' has {', '.join(sorted(map(repr, conformal)))}; expected {', '.join(sorted(map(repr, known)))}"
    if not reason and len(conformal[key]) != len(task.names):
        reason = f"'conformal.{key}' is for {len(conformal[key])} {task.plural}, and the head has {len(task.names)}"
    if not reason and "edges" in conformal:
        parts = [len(each) for each in conformal[key]], [len(each) + 1 for each in conformal["edges"]]
        rising = all(each == sorted(each) for each in conformal["edges"])
        reason = "" if parts[0] == parts[1] and rising else "'conformal.edges' are not those between the parts of 'half_width'"
    if not reason and "effective" in conformal and not (conformal["effective"] > 0 and 0 < conformal["coverage"] < 1):
        reason = f"'conformal' is of {conformal['effective']:g} images for a coverage of {conformal['coverage']:g}"
    if reason:
        raise ValueError(reason)


def _no_fractions(split: Mapping[str, Any]) -> str:
    val, test = split["val"], split["test"]
    return "" if min(val, test) >= 0 and val + test < 1 else f"'split' has the fractions val {val:g} and test {test:g}"


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
