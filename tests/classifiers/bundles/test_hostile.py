"""Bundles whose digests are valid and whose content is not: each command names the file and the reason, and exits with 65."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest

from classifiers.bundles import fused
from classifiers.bundles.bundle import Bundle
from classifiers.bundles.head_json import require_calibration
from classifiers.evaluation.registry import task_of
from extractor.graphs.backbone_facts import PREFIX
from store.errors import BadDataError
from store.format import hdf5

V1 = Path(__file__).resolve().parents[2] / "data/archives/v1"
IMAGE, CACHE = V1 / "extra.jpg", V1 / "photos.cache"
Penult = Callable[..., tuple[int, str, str]]
Change = Callable[[Any], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(V1 / "logistic.head", tmp_path / "hostile.head"))


def edit(bundle: Path, name: str, value: Any) -> None:
    """Change a field of head.json by its dotted name, where numbers are places in a list; ... removes it."""
    facts = json.loads((bundle / "head.json").read_text())
    *above, last = [int(part) if part.isdigit() else part for part in name.split(".")]
    inside = facts
    for key in above:
        inside = inside[key]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value(inside[last]) if callable(value) else value
    (bundle / "head.json").write_text(json.dumps(facts))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the datasets of an HDF5 file, which then has a digest that fits."""
    with h5py.File(path, "r") as file:
        datasets = {name: file[name][()] for name in file}
        attrs = {name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()}
    kind = str(attrs.pop("encoding-type"))
    del attrs["encoding-version"], attrs["payload-sha256"]
    change(datasets)
    path.write_bytes(hdf5.build(kind, datasets, attrs)[0])


FACTS: dict[str, tuple[str, Any, str]] = {
    "classes are numbers": ("classes", [1, 2, 3], "'classes[0]' is a number; expected text"),
    "classes are text": ("classes", "abc", "'classes' is text; expected a list"),
    "no classes": ("classes", [], "'classes' is empty"),
    "a class twice": ("classes", ["blue", "green", "green"], "'classes' names 'green' twice"),
    "too many classes": ("classes", ["blue", "green", "red", "white"], "'conformal.per_class' is for 3 classes"),
    "other classes": ("classes", ["blue", "green", "white"], "the classes of 'metrics' are not those of the head"),
    "metrics are a list": ("metrics", [1], "'metrics' is a list; expected an object"),
    "metrics are empty": ("metrics", {}, "'metrics.split' is missing"),
    "accuracy is text": ("metrics.accuracy", "0.9", "'metrics.accuracy' is text; expected a number"),
    "accuracy is NaN": ("metrics.accuracy", float("nan"), "'metrics.accuracy' is not finite"),
    "accuracy is enormous": ("metrics.accuracy", 10**400, "'metrics.accuracy' is not finite"),
    "interval of one number": ("metrics.accuracy_interval", [0.5], "'metrics.accuracy_interval' has 1 elements; expected 2"),
    "no images": ("metrics.n", 0, "'metrics.n' is no number of images"),
    "notes are numbers": ("metrics.notes", [1], "'metrics.notes[0]' is a number"),
    "scores are a list": ("metrics.figures", [1], "'metrics.scores' is a list"),
    "a score is a number": ("metrics.figures.accuracy", 1, "'metrics.scores.accuracy' is a number; expected an object"),
    "a score lacks its interval": ("metrics.figures.accuracy", {"value": 1.0}, "'metrics.scores.accuracy.interval' is missing"),
    "ECE without that by chance": ("metrics.figures.ece_by_chance", ..., "'metrics.scores' lacks 'ece_by_chance'"),
    "a smaller matrix": ("metrics.confusion", [[1, 2], [3, 4]], "'metrics.confusion' is not 3 x 3"),
    "a class is missing": ("metrics.per_class", lambda each: each[:2], "the classes of 'metrics'"),
    "recall is unknown": ("metrics.per_class.0.recall", None, "lacks the recall of a class"),
    "novelty is a list": ("metrics.novelty", [1], "'metrics.novelty' is a list"),
    "sets are a list": ("metrics.sets", [1], "'metrics.sets' is a list"),
    "split is a list": ("split", [1], "'split' is a list; expected an object"),
    "split lacks what was reported": ("split", {}, "'split.reported_on' is missing"),
    "split of its own without fractions": ("split.override", True, "'split.val' is missing"),
    "split of impossible fractions": (
        "split",
        {"reported_on": "test", "override": True, "val": 3, "test": 0.2, "seed": 0},
        "'split' has the fractions val 3 and test 0.2",
    ),
    "cost is a list": ("cost", [1], "'cost' is a list"),
    "cost lacks the training": ("cost.train_seconds", ..., "'cost.train_seconds' is missing"),
    "cost is text": ("cost.extract_seconds", "long", "'cost.extract_seconds' is text"),
    "memory is text": ("cost.peak_memory", "x", "'cost.peak_memory' is text"),
    "fingerprint is a list": ("fingerprint", [1], "'fingerprint' is a list"),
    "views are of the wrong number": ("fingerprint.views", {"count": 10**6}, "1000000 views"),
    "views without a seed": ("fingerprint.views", {"count": 2}, "seed"),
    "augmentation is out of range": (
        "fingerprint.views",
        {"count": 2, "seed": 0, "augmentation": {"flip": 7}},
        "flip of an augmentation is 7",
    ),
    "conformal is a list": ("conformal", [1], "'conformal' is a list"),
    "conformal is shorter": ("conformal.per_class", [0.1], "'conformal.per_class' is for 1 classes, and the head has 3"),
    "conformal has another key": ("conformal.more", 1, "'conformal' has 'coverage', 'marginal', 'more'"),
    "conformal lacks a key": ("conformal.marginal", ..., "'conformal.marginal' is missing"),
    "hyperparameters are a list": ("hyperparameters", [1], "'hyperparameters' is a list"),
    "temperature is text": ("hyperparameters.temperature", "hot", "'hyperparameters.temperature' is text"),
    "temperature is 0": ("hyperparameters.temperature", 0.0, "'hyperparameters.temperature' is 0"),
    "history is an object": ("history", {}, "'history' is an object; expected a list"),
    "history holds numbers": ("history", [1, 2], "'history[0]' is a number"),
    "few-shot points without draws": (
        "few_shot",
        [{"shots": 1, "accuracy": 0.5, "accuracy_interval": [0, 1], "accuracies": []}],
        "'few_shot' has a point without images, or without a draw",
    ),
    "task is unknown": ("task", "ranking", "unknown task 'ranking'"),
    "task is a list": ("task", [], "'task' is a list"),
    "head is a number": ("head", 1, "'head' is a number"),
    "files are a list": ("files", [1], "'files' is a list"),
    "files are elsewhere": ("files", lambda files: {**files, "../x": "0"}, "names files outside the bundle"),
    "backbone is a list": ("backbone", [1], "'backbone' is a list"),
    "backbone without layers": ("backbone.layers", [], "'backbone.layers' is empty"),
    "crop is text": ("backbone.preprocess.crop", "16", "'backbone.preprocess.crop' is text"),
    "crop is enormous": ("backbone.preprocess.crop", 10**9, "preprocess.crop is 1000000000"),
    "an unknown interpolation": ("backbone.preprocess.interpolation", "magic", "'magic'"),
    "an unknown field": ("surprise", 1, "surprise"),
}
COMMANDS = {
    "evaluate": lambda bundle: (bundle, CACHE),
    "report": lambda bundle: (bundle, "-o", bundle.parent / "page.html"),
    "predict": lambda bundle: (bundle, IMAGE),
    "compare": lambda bundle: (V1 / "knn.head", bundle),
    "diff": lambda bundle: (CACHE, CACHE, "--head", bundle),
    "fuse": lambda bundle: (bundle, "-o", bundle.parent / "one.onnx"),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_make_no_sense_are_named_by_every_command(name: str, bundle: Path, penult: Penult) -> None:
    field, value, reason = FACTS[name]
    edit(bundle, field, value)
    for command, arguments in COMMANDS.items():
        code, _, err = penult(command, *arguments(bundle))
        assert "Traceback" not in err, (command, err)
        assert code == 65, (command, code, err)
        assert reason in err, command
        assert str(bundle) in err, command


def columns(count: int) -> Change:
    return lambda datasets: datasets.update(probabilities=np.full((len(datasets["sha256"]), count), 1 / count, np.float32))


PREDICTIONS: dict[str, tuple[Change, str]] = {
    "more columns": (columns(4), "do not fit 12 images and 3 classes"),
    "fewer columns": (columns(2), "do not fit 12 images and 3 classes"),
    "fewer rows": (lambda d: d.update(probabilities=d["probabilities"][:5]), "do not fit 12 images"),
    "fewer labels": (lambda d: d.update(label=d["label"][:5]), "do not fit 12 images"),
    "a label out of range": (lambda d: d.update(label=d["label"] + 90), "is damaged"),
    "a negative label": (lambda d: d.update(label=d["label"] - 1), "4 images have no label"),
    "labels of another kind": (lambda d: d.update(label=d["label"] + 0.5), "is damaged"),
    "an unknown label": (
        lambda d: d.update(hdf5.pack_strings("label-names", [b"a", b"b", b"c"])),
        "which the head does not know",
    ),
    "another number of images": (
        lambda d: d.update(
            {name: d[name][:-1] for name in ("sha256", "probabilities", "label")},
            **hdf5.pack_strings("path", hdf5.unpack_strings(d, "path")[:-1]),
        ),
        "it has 11 images, and head.json was measured on 12",
    ),
    "not probabilities": (
        lambda d: d.update(probabilities=d["probabilities"] * 7),
        "as a probability; expected numbers between 0 and 1",
    ),
    "NaN": (lambda d: d.update(probabilities=d["probabilities"] * np.float32("nan")), "NaN or infinity"),
    "digests of another width": (lambda d: d.update(sha256=d["sha256"][:, :5]), "expected 32 bytes each"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_that_are_not_those_of_the_head_are_refused(name: str, bundle: Path, penult: Penult) -> None:
    change, reason = PREDICTIONS[name]
    rewrite(bundle / "predictions.h5", change)
    for command in ("report", "compare"):
        code, _, err = penult(command, *COMMANDS[command](bundle))
        assert "Traceback" not in err, (command, err)
        assert code == 65, (command, code, err)
        assert reason in err, command
        assert f"{bundle}/predictions.h5" in err, command


def sign(bundle: Path, name: str) -> None:
    """Record the digest of a changed file in head.json."""
    edit(bundle, "files", lambda files: {**files, name: hashlib.sha256((bundle / name).read_bytes()).hexdigest()})


def test_digests_of_fitted_images_of_another_width_are_refused(bundle: Path, penult: Penult) -> None:
    rewrite(bundle / "predictions.h5", lambda datasets: datasets.update(fitted=datasets["fitted"][:, :5]))
    code, _, err = penult("evaluate", bundle, CACHE)
    assert code == 65, err
    assert "predictions.h5: digests of shape" in err


@pytest.mark.parametrize("other", ["layer.head", "tags.head"])
def test_a_head_of_other_features_or_outputs_is_refused(other: str, bundle: Path, penult: Penult) -> None:
    shutil.copy(V1 / other / "head.onnx", bundle)
    sign(bundle, "head.onnx")
    for command in ("evaluate", "predict", "diff", "fuse"):
        code, _, err = penult(command, *COMMANDS[command](bundle))
        assert "Traceback" not in err, (command, err)
        assert code == 65, (command, code, err)
        assert "head.onnx" in err, command


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(reference=d["reference"][:, :3]),
        lambda d: d.update(reference=d["reference"][:2]),
        lambda d: d.update(reference=d["reference"] * np.float16("nan")),
        lambda d: d.update(usual=np.array([0.0])),
        lambda d: d.update(usual=np.array([np.nan])),
    ],
)
def test_a_novelty_reference_for_other_features_is_refused(change: Change, bundle: Path, penult: Penult) -> None:
    rewrite(bundle / "novelty.h5", change)
    sign(bundle, "novelty.h5")
    for command in ("evaluate", "predict"):
        code, _, err = penult(command, *COMMANDS[command](bundle))
        assert code == 65, (command, code, err)
        assert "are no reference for these features" in err


@pytest.mark.parametrize(
    ("name", "reason"),
    [("half_width", "'conformal.half_width' is for 0 targets"), ("per_output", "of 'metrics' are not those")],
)
def test_a_regression_whose_lists_do_not_fit_its_targets_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(V1 / "sizes.head", tmp_path / "sizes.head"))
    edit(bundle, {"half_width": "conformal.half_width", "per_output": "metrics.per_output"}[name], [])
    with pytest.raises(BadDataError, match=reason):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"half_width": [[1.0], [2.0]]}, "'conformal.half_width' is for 2 targets, and the head has 1"),
        ({"edges": [[3.0, 2.0]]}, "'conformal.edges' are not those between the parts"),
        ({"edges": [[2.0]]}, "'conformal.edges' are not those between the parts"),
        ({"edges": []}, "'conformal.edges' are not those between the parts"),
        ({"half_width": [1.0]}, r"'conformal.half_width\[0\]' is a number; expected a list"),
        ({"effective": -1.0}, "'conformal' is of -1 images for a coverage of 0.9"),
        ({"more": 1}, "'conformal' has 'coverage', .* expected "),
    ],
)
def test_intervals_whose_parts_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    facts = {"coverage": 0.9, "n": 150, "half_width": [[1.0, 2.0, None]], "edges": [[2.0, 3.0]], "effective": 40.0}
    if not reason:
        require_calibration(facts, task_of("regression", ["a"]))
        return
    with pytest.raises(ValueError, match=reason):
        require_calibration({**facts, **changes}, task_of("regression", ["a"]))


@pytest.mark.parametrize(("name", "value"), [("history.0.C", ...), ("history.0.log_loss", "x"), ("hyperparameters.C", ...)])
def test_a_history_that_cannot_be_drawn_is_refused_by_the_report(name: str, value: Any, bundle: Path, penult: Penult) -> None:
    edit(bundle, name, value)
    code, _, err = penult("report", *COMMANDS["report"](bundle))
    assert code == 65, err
    assert f"{bundle}/head.json" in err


METADATA: dict[str, tuple[str, Any, str]] = {
    "classes are numbers": ("classes", [1, 2, 3], "'classes[0]' is a number"),
    "a class twice": ("classes", ["blue", "blue", "red"], "'classes' names 'blue' twice"),
    "too few golden outputs": (
        "golden",
        lambda golden: {**golden, "probabilities": []},
        "metadata is not 16 x 3",
    ),
    "golden outputs are text": ("golden", "x", "'golden' is text; expected an object"),
    "fingerprint is a list": ("fingerprint", [1], "'fingerprint' is a list"),
    "preprocessing is a list": ("preprocessing", [1], "'preprocessing' is a list"),
    "crop is enormous": ("preprocessing", lambda pixels: {**pixels, "crop": 10**9}, "preprocess.crop is 1000000000"),
    "features are a list": ("features", [1], "'features' is a list"),
    "kind is a number": ("kind", 1, "'kind' is a number"),
    "task is a list": ("task", [1], "'task' is a list"),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_fused_classifier_whose_metadata_make_no_sense_is_refused(name: str, tmp_path: Path, penult: Penult) -> None:
    field, value, reason = METADATA[name]
    model = onnx.load(V1 / "fused.onnx")
    texts = {entry.key.removeprefix(PREFIX): entry for entry in model.metadata_props if entry.key.startswith(PREFIX)}
    before = json.loads(texts[field].value) if field in texts else None
    if field not in texts:
        texts[field] = model.metadata_props.add(key=PREFIX + field)
    texts[field].value = json.dumps(value(before) if callable(value) else value)
    entries = {key: entry.value for key, entry in texts.items() if key != "facts_sha256"}
    texts["facts_sha256"].value = json.dumps(fused._facts_digest(entries))
    onnx.save(model, tmp_path / "one.onnx")
    for arguments in ((IMAGE,), ("--selftest",)):
        code, _, err = penult("predict", tmp_path / "one.onnx", *arguments)
        assert "Traceback" not in err, err
        assert code == 65, err
        assert reason in err
        assert str(tmp_path / "one.onnx") in err
