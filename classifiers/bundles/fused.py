"""The file format of a fused classifier: one ONNX file from pixels to probabilities that describes and can test itself.

The description is in its metadata, as JSON under ``penult.`` names: the fields of `Fused`, the format's version, and a digest
of all of these, so that a changed class name is noticed like a changed weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.evaluation.registry import task_of
from classifiers.evaluation.task import HeadTask
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import PREFIX
from extractor.pixels.preprocess import Preprocess
from store.errors import BadDataError, InputMissingError, require_format
from store.fingerprint import Fingerprint
from store.format.json_text import misfit
from store.format.metadata import FINGERPRINT

from .head_json import NUMBER, PIXELS, require_calibration, require_names, require_pixels

FORMAT_VERSION = 1
INPUT, LABEL = "pixels", "label"
OPTIONAL = ("conformal", "features", "probe_image", "graph_sha256")
NO_LABEL = -1  # of an image for which the network gives NaN or infinity
GOLDEN = 16  # images
RECIPE = "shake-blocks-1"
WIDEST = 2**20  # features; those of networks are a few thousand
SHAPE = {  # of the metadata
    "classes": [str],
    "task": str,
    "kind": str,
    "head": str,
    "preprocessing": PIXELS,
    "fingerprint": FINGERPRINT,
    "golden": {"recipe": str, "pixels_sha256": str, "probabilities": [[NUMBER]]},
    "weights_sha256": str,
    "conformal": (dict, None),
    "features": ({"tensor": str, "width": int}, None),
    "probe_image": (dict, None),
    "graph_sha256": (str, None),
}


@dataclass(frozen=True)
class Golden:
    """Outputs of a classifier for `golden_images` when it was made, on the CPU.

    Attributes:
        recipe: name of the method that makes the images.
        pixels_sha256: of their bytes.
        probabilities: ``(16, k)``, rounded to seven digits; for a regression, the numbers, rounded to 10^-7 of the largest.
            None for NaN and infinity.
    """

    recipe: str
    pixels_sha256: str
    probabilities: list[list[float | None]]


@dataclass(frozen=True)
class Fused:
    """The description of a fused classifier, from its metadata.

    Attributes:
        classes: labels in the order of the probabilities.
        task: ``single-label``, ``multi-label`` or ``regression``.
        kind: ``frozen`` or ``fine-tuned``.
        head: such as ``logistic``.
        preprocessing: from a file to the pixels it takes (resize, crop, interpolation, pixel path), and what the graph then
            does to them (mean, std, input range, channels).
        fingerprint: of the features inside it.
        golden: the outputs that it must give.
        weights_sha256: `onnx_file.weights_digest` of the file.
        conformal: how wide the intervals of a regression are; None, and not in the file, for other tasks.
        features: ``tensor`` and ``width`` of the features inside, which the self-test replaces; None in older files.
        probe_image: pixels of the test image on the machine that made the features, see `ProbeImage`; None if unknown.
        graph_sha256: `onnx_file.graph_digest` of the file; None in older files.
    """

    classes: list[str]
    task: str
    kind: str
    head: str
    preprocessing: dict[str, Any]
    fingerprint: dict[str, Any]
    golden: Golden
    weights_sha256: str
    conformal: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    probe_image: dict[str, Any] | None = None
    graph_sha256: str | None = None

    @property
    def bound_task(self) -> HeadTask:
        """Its task, with the names of its outputs."""
        return task_of(self.task, self.classes, self.conformal)

    @property
    def output(self) -> str:
        """The name of the graph's output."""
        return self.bound_task.output

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_facts(self.preprocessing)

    @property
    def precision(self) -> str:
        return precision_name(Fingerprint(self.fingerprint))

    def metadata(self) -> dict[str, str]:
        """Its entries in the file's metadata, as JSON texts."""
        facts = {name: value for name, value in asdict(self).items() if name not in OPTIONAL or value is not None}
        entries = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
        entries["format"] = json.dumps(FORMAT_VERSION)
        return {**entries, "facts_sha256": json.dumps(_facts_digest(entries))}

    @classmethod
    def load(cls, path: Path) -> Fused:
        """Read the description of a file, after checking that neither it nor a weight was changed; nothing is computed.

        Raises:
            InputMissingError: there is no such file, or its external data is missing.
            BadDataError: it is not a fused classifier, has a newer format, uses operators that are not standard, or is not the
                file that was saved.
        """
        from extractor.backbones.custom_onnx import require_domains

        model = onnx_file.read_model(path)
        metadata = {str(entry.key): str(entry.value) for entry in model.metadata_props}
        entries = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
        if "golden" not in entries:
            message = f"{path} is not a fused classifier; `penult fuse BUNDLE -o CLASSIFIER.onnx` makes one"
            raise BadDataError(message)
        require_domains(model, path)
        onnx_file.data_files(path, model)  # names a missing file, and refuses files outside the folder
        fused = cls._parse(entries, path)
        if fused.weights_sha256 != onnx_file.weights_digest(model, path.resolve().parent):
            message = f"{path} is not the file that was saved (the digest of its weights differs); fuse the bundle again"
            raise BadDataError(message)
        if fused.graph_sha256 not in (None, onnx_file.graph_digest(model)):
            message = f"{path} is not the file that was saved (the digest of its graph differs); fuse the bundle again"
            raise BadDataError(message)
        side, classes = fused.preprocess.crop, len(fused.classes)
        ends = (*model.graph.input, *model.graph.output)[:2]
        shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in ends]
        if shapes != [[side, side, 3], [classes]]:
            message = f"{path}: its metadata says {side} x {side} x 3 pixels, {classes} {fused.output}; its graph has {shapes}"
            raise BadDataError(message)
        if [len(row) for row in fused.golden.probabilities] != [classes] * GOLDEN:
            message = f"{path}: 'golden.probabilities' in its metadata is not {GOLDEN} x {classes}"
            raise BadDataError(message)
        return fused

    def require_loaded(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Refuse a session on a file other than the one described here, which another run may have replaced in between.

        Raises:
            BadDataError: the session runs another file.
        """
        if metadata.get(f"{PREFIX}facts_sha256") != self.metadata()["facts_sha256"]:
            message = f"{path} was replaced while it was opened; run the same command again"
            raise BadDataError(message)

    @classmethod
    def _parse(cls, entries: dict[str, str], path: Path) -> Fused:
        try:
            require_format(path, json.loads(entries["format"]), FORMAT_VERSION)
            if json.loads(entries.pop("facts_sha256")) != _facts_digest(entries):
                message = f"{path} is not the file that was saved (the digest of its metadata differs); fuse the bundle again"
                raise BadDataError(message)
            entries = {**dict.fromkeys(OPTIONAL, "null"), **entries}
            facts = {field.name: json.loads(entries[field.name]) for field in fields(cls)}
            _require_shape(facts)
            fused = cls(**{**facts, "golden": Golden(**facts["golden"])})
            require_pixels(fused.preprocess)
            require_calibration(fused.conformal, fused.bound_task)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, BadDataError):
                raise
            message = f"{path}: the description of the classifier in its metadata cannot be read: {error}"
            raise BadDataError(message) from error
        return fused


def _require_shape(facts: Mapping[str, Any]) -> None:
    """Refuse metadata that no classifier has.

    Raises:
        ValueError: says what differs.
    """
    reason = misfit(facts, SHAPE)
    if not reason and facts["features"] and not 1 <= facts["features"]["width"] <= WIDEST:
        reason = f"'features.width' is {facts['features']['width']}; expected 1 to {WIDEST}"
    if reason:
        raise ValueError(reason)
    require_names(facts["classes"])


def is_fused(path: Path) -> bool:
    """Whether a path is a file, as a fused classifier is; bundles are folders.

    Raises:
        InputMissingError: the path does not exist.
    """
    if not path.exists():
        message = f"{path} does not exist; expected a bundle, or a file made by `penult fuse`"
        raise InputMissingError(message)
    return path.is_file()


def precision_name(fingerprint: Fingerprint) -> str:
    return str(fingerprint.fields.get("precision", "fp32"))


def golden_images(side: int) -> NDArray[np.uint8]:
    """Sixteen images of coloured squares, from coarse to fine: ``(16, side, side, 3)`` uint8.

    They are made from SHAKE-256 with integers, so they are the same bytes with every version of every library.
    """
    return np.stack([(3 * _squares(i, 2 + i, side) + _squares(i, 8 * (2 + i), side)) // 4 for i in range(GOLDEN)]).astype(
        np.uint8
    )


def _squares(number: int, cells: int, side: int) -> NDArray[np.uint16]:
    noise = hashlib.shake_256(f"penult golden {number} {cells}".encode()).digest(cells * cells * 3)
    values = np.frombuffer(noise, np.uint8).reshape(cells, cells, 3).astype(np.uint16)
    width = -(-side // cells)
    return values.repeat(width, axis=0).repeat(width, axis=1)[:side, :side]


def _facts_digest(entries: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(entries.items())).encode()).hexdigest()
