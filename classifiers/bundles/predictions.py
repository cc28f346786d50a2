"""The held-out predictions of a bundle, and the file that holds them, ``predictions.h5``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.probabilities import why_no_probabilities
from classifiers.evaluation.scores import require_finite
from classifiers.evaluation.task import HeadTask
from classifiers.evaluation.units import Units
from store.errors import BadDataError
from store.format import hdf5

PREDICTIONS = "predictions.h5"
ENCODING_TYPE = "penult-predictions"


@dataclass(frozen=True)
class Predictions:
    """Predictions for held-out images.

    Attributes:
        sha256: content digest of each image, 32 bytes.
        paths: relative path of each.
        labels: the truth: labels ``(n,)``, or for other tasks `SampleTable.truth` ``(n, k)``.
        probabilities: ``(n, k)`` float32, in the order of the bundle's classes; for a regression, the numbers.
        split: the split they were held out as.
        novelty: novelty scores ``(n,)``, see `Novelty`; not saved, and None if the bundle has none.
        features: of the images ``(n, d)``; not saved, and None if they are not from a cache.
        groups: the group of each, see `store.splits.groups_of`; bundles from before have none.
    """

    sha256: Sequence[bytes]
    paths: Sequence[bytes]
    labels: NDArray[Any]
    probabilities: NDArray[np.float32]
    split: str = ""
    novelty: NDArray[np.float32] | None = None
    features: NDArray[np.floating[Any]] | None = None
    groups: Sequence[bytes] = ()

    @property
    def units(self) -> Units:
        """Which images belong together: those of one group, and copies."""
        return Units.of_groups(self.groups or self.sha256)

    @property
    def ids(self) -> str:
        """SHA-256 over the sorted (content, label) pairs: equal ids mean the same images with the same labels."""
        pairs = sorted(zip(self.sha256, map(str, self.labels.tolist()), strict=True))
        return hashlib.sha256(b"".join(digest + label.encode() + b"\0" for digest, label in pairs)).hexdigest()


def predictions_file(predictions: Predictions | None, fitted: Sequence[bytes]) -> bytes:
    """The content of ``predictions.h5``.

    Args:
        predictions: on held-out images; None if there were none.
        fitted: content digests of everything that was fitted or chosen on.
    """
    held = predictions or Predictions([], [], np.array([], dtype=str), np.zeros((0, 0), np.float32))
    truth: dict[str, NDArray[Any]]
    if held.labels.ndim == 2:
        truth, label_names = {"truth": held.labels.astype(np.uint8 if held.labels.dtype == bool else np.float64)}, {}
    else:
        names, labels = np.unique(held.labels, return_inverse=True)
        truth = {"label": labels.astype(np.int32)}
        label_names = hdf5.pack_strings("label-names", [str(name).encode() for name in names])
    datasets: dict[str, NDArray[Any]] = {
        "sha256": np.frombuffer(b"".join(held.sha256), np.uint8).reshape(-1, 32),
        **truth,
        "probabilities": held.probabilities.astype(np.float32),
        "fitted": np.frombuffer(b"".join(sorted(set(fitted))), np.uint8).reshape(-1, 32),
        **hdf5.pack_strings("path", held.paths),
        **hdf5.pack_strings("group", held.groups),
        **label_names,
    }
    return hdf5.build(ENCODING_TYPE, datasets, {"rows": len(held.paths), "split": held.split})[0]


def predictions_of(
    path: Path, datasets: Mapping[str, Any], split: str, task: HeadTask, metrics: Mapping[str, Any]
) -> Predictions:
    """The held-out predictions in an opened ``predictions.h5``.

    Args:
        path: of the file, for messages.
        datasets: by name, as `hdf5.open_checked` gives them.
        split: the split they were held out as.
        task: of the head, with the names of its outputs.
        metrics: the evaluation of the head on these images, as in ``head.json``.

    Raises:
        BadDataError: they are not those of this head.
    """
    require_finite(datasets["probabilities"][()], str(path))
    if "truth" in datasets:
        labels: NDArray[Any] = datasets["truth"][()]
    else:
        names = [value.decode() for value in hdf5.unpack_strings(datasets, "label-names")]
        places = datasets["label"][()]
        if (places < 0).any():  # which NumPy would count from the end
            message = f"{int((places < 0).sum())} images have no label"
            raise ValueError(message)
        labels = np.array(names, dtype=str)[places]
    predictions = Predictions(
        sha256=digests_in(path, datasets["sha256"]),
        paths=hdf5.unpack_strings(datasets, "path"),
        labels=labels,
        probabilities=datasets["probabilities"][()],
        split=split,
        groups=hdf5.unpack_strings(datasets, "group") if "group" in datasets else (),
    )
    if reason := _misfit(predictions, task, metrics):
        message = f"{path}: {reason}"
        raise BadDataError(message)
    return predictions


def digests_in(path: Path, dataset: Any) -> list[bytes]:
    """The content digests in a dataset of ``predictions.h5``.

    Raises:
        BadDataError: they are none.
    """
    if dataset.shape[1:] != (32,) or dataset.dtype != np.uint8:
        message = f"{path}: digests of shape {dataset.shape} and type {dataset.dtype}; expected 32 bytes each"
        raise BadDataError(message)
    raw = dataset[()].tobytes()
    return [raw[i : i + 32] for i in range(0, len(raw), 32)]


def _misfit(held: Predictions, task: HeadTask, metrics: Mapping[str, Any]) -> str:
    """Why these predictions are not those of a head, in words: other columns, other images, other labels; empty if they are."""
    n, k, outputs = len(held.paths), len(task.names), held.probabilities
    truth = (n,) if task.exclusive else (n, k)
    if outputs.shape != (n, k) or len(held.sha256) != n or held.labels.shape != truth or len(held.groups) not in (0, n):
        return (
            f"its {len(held.sha256)} digests, truth {held.labels.shape} and outputs {outputs.shape} do not fit "
            f"{n} images and {k} {task.plural}"
        )
    if n != metrics["n"]:
        return f"it has {n} images, and head.json was measured on {metrics['n']}"
    if task.exclusive and (unknown := set(held.labels.tolist()) - set(task.names)):
        return f"it has the label {min(unknown)!r}, which the head does not know"
    if not task.exclusive and not np.isfinite(held.labels).all():
        return "its truth has NaN or infinity"
    if not task.intervals and (why := why_no_probabilities(outputs, exclusive=task.exclusive)):
        return f"it has {why}"
    if task.exclusive:
        correct = int((np.array(task.names)[outputs.argmax(axis=1)] == held.labels).sum())
        if correct != metrics["correct"]:
            return f"{correct} of its {n} labels are right, and in head.json {metrics['correct']} are: it is of another head"
    return ""
