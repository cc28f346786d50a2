"""A fused classifier on disk: one ONNX file from pixels to probabilities that says what it takes, and can prove what it gives.

What it says is in its metadata, as JSON under ``penult.`` names: the fields of `Fused`, the format's version, and a digest of
all of these, so that a changed class name is noticed like a changed weight.
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
from extractor.backbones.custom_onnx import require_domains
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import PREFIX
from extractor.pixels.preprocess import Preprocess
from store.errors import BadDataError, InputMissingError, require_format
from store.fingerprint import Fingerprint

FORMAT_VERSION = 1
INPUT, LABEL = "pixels", "label"
OPTIONAL = ("conformal", "features", "probe_image")
NO_LABEL = -1  # of an image for which the network gives NaN or infinity
GOLDEN = 16  # pictures
RECIPE = "shake-blocks-1"
# How far a probability (of a regression: a number, as a share of its largest) may be from the saved one, on another machine or
# device. Sums in another order move features by 1e-6, and now and then one of them to the next float16; int8 and float16
# networks round at every layer.
TOLERANCE = {"fp32": 1e-3, "int8": 1e-2, "fp16": 2e-2}


@dataclass(frozen=True)
class Golden:
    """What a classifier gave for `golden_pictures` when it was made, on the CPU.

    Attributes:
        recipe: how the pictures are made.
        pixels_sha256: of their bytes.
        probabilities: ``(16, k)``, rounded to seven digits; of a regression, its numbers, rounded to a 10^7th of the largest.
            None for what is no number.
    """

    recipe: str
    pixels_sha256: str
    probabilities: list[list[float | None]]


@dataclass(frozen=True)
class Fused:
    """What a fused classifier says of itself.

    Attributes:
        classes: labels in the order of the probabilities.
        task: ``single-label``, ``multi-label`` or ``regression``.
        kind: ``frozen`` or ``fine-tuned``.
        head: such as ``logistic``.
        preprocessing: from a file to the pixels it takes (resize, crop, interpolation, pixel path), and what the graph then
            does to them (mean, std, input range, channels).
        fingerprint: of the features inside it.
        golden: what it must give.
        weights_sha256: `onnx_file.weights_digest` of it.
        conformal: how wide the intervals of a regression are; None, and not in the file, for other tasks.
        features: ``tensor`` and ``width`` of the features inside, which the self-test replaces; None in files of old.
        probe_image: what the test image was where the features were made, see `ProbeImage`; None where that is not known.
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

    @property
    def bound_task(self) -> HeadTask:
        """Its task, with the names of its outputs."""
        return task_of(self.task, self.classes, self.conformal)

    @property
    def output(self) -> str:
        """What the graph's output is called."""
        return self.bound_task.output

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_facts(self.preprocessing)

    @property
    def precision(self) -> str:
        return precision_of(Fingerprint(self.fingerprint))

    def metadata(self) -> dict[str, str]:
        """Its entries in the file's metadata, as JSON texts."""
        given = {name: value for name, value in asdict(self).items() if name not in OPTIONAL or value is not None}
        entries = {name: json.dumps(value, ensure_ascii=False) for name, value in given.items()}
        entries["format"] = json.dumps(FORMAT_VERSION)
        return {**entries, "facts_sha256": json.dumps(_facts_digest(entries))}

    @classmethod
    def load(cls, path: Path) -> Fused:
        """Read what a file says of itself, after checking that neither that nor a weight was changed; nothing is computed.

        Raises:
            InputMissingError: there is no such file, or its external data is missing.
            BadDataError: it is no fused classifier, is of a newer format, asks for operators that are not standard ones, or is
                not what was saved.
        """
        model = onnx_file.read_model(path)
        said = {str(entry.key): str(entry.value) for entry in model.metadata_props}
        entries = {key.removeprefix(PREFIX): value for key, value in said.items() if key.startswith(PREFIX)}
        if "golden" not in entries:
            message = f"{path} is not a fused classifier; `penult fuse BUNDLE -o CLASSIFIER.onnx` makes one"
            raise BadDataError(message)
        require_domains(model, path)
        onnx_file.data_files(path, model)  # says which is missing, or refuses what lies outside the folder
        fused = cls._parse(entries, path)
        if fused.weights_sha256 != onnx_file.weights_digest(model, path.resolve().parent):
            message = f"{path} is not the file that was saved (the digest of its weights differs); fuse the bundle again"
            raise BadDataError(message)
        side, classes = fused.preprocess.crop, len(fused.classes)
        ends = (*model.graph.input, *model.graph.output)[:2]
        given = [[dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in ends]
        if given != [[side, side, 3], [classes]]:
            message = f"{path} says that it makes {classes} {fused.output} of {side} x {side} x 3 pixels; its graph has {given}"
            raise BadDataError(message)
        return fused

    def require_loaded(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Refuse a session that runs another file than this was read from: another run may have replaced it in between.

        Raises:
            BadDataError: it does.
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
            fused = cls(**{**facts, "golden": Golden(**facts["golden"])})
            fused.preprocess, fused.bound_task  # noqa: B018 - whether they can be read
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, BadDataError):
                raise
            message = f"{path}: what its metadata says of a classifier cannot be read: {error}"
            raise BadDataError(message) from error
        return fused


def is_fused(path: Path) -> bool:
    """Whether a path is meant as a fused classifier: bundles are folders.

    Raises:
        InputMissingError: there is nothing.
    """
    if not path.exists():
        message = f"{path} does not exist; expected a bundle, or what `penult fuse` makes of one"
        raise InputMissingError(message)
    return path.is_file()


def precision_of(fingerprint: Fingerprint) -> str:
    return str(fingerprint.fields.get("precision", "fp32"))


def golden_pictures(side: int) -> NDArray[np.uint8]:
    """Sixteen pictures of coloured squares, from coarse to fine: ``(16, side, side, 3)``.

    Made of SHAKE-256 and whole numbers, they are the same bytes with every version of every library.
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
