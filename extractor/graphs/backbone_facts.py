"""What a backbone file says of itself: its network, weights, layers and preprocessing, in the metadata of the ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from extractor.pixels.pixel_drift import ProbeImage
from extractor.pixels.preprocess import Preprocess
from store.errors import BadDataError, UsageError
from store.fingerprint import Fingerprint

from .onnx_file import read_model

PREFIX = "penult."
PROBE_IMAGE = f"{PREFIX}probe_image"
POOLINGS = ("average", "max", "token")


@dataclass(frozen=True)
class Layer:
    """One feature set that a backbone gives.

    Attributes:
        layer: what the features are, such as ``input of fc`` or ``layer3``.
        pooling: ``none`` where the layer is a vector, else ``average`` or ``max`` over space or tokens, or ``token`` (the
            first, which is the class token of a vision transformer).
        dim: length of a feature vector.
        output: name of the graph's output ``(n, dim)``.
    """

    layer: str
    pooling: str
    dim: int
    output: str = "features"


@dataclass(frozen=True)
class BackboneFacts:
    """What a backbone file says of itself.

    Attributes:
        name: the architecture; ``onnx`` for a file that somebody else made.
        weights: name of the weights, for people.
        weights_sha256: digest of the tensors, or of the file where the architecture is not ours.
        layers: the feature sets, in the order asked for; the penultimate layer alone by default.
        preprocess: what its input must have gone through.
        batch: images per call, where the graph has that number fixed.
        source: where the weights came from, for people.
        precision: ``fp32``, ``int8`` where `int8` made it, or ``fp16`` where `float16` did.
        calibration: how it was converted: ``sha256`` of what decided the numbers, layers kept in float, what was measured. For
            int8 also method, number of images and digest of their pixels, all that was tried. Empty for fp32.
    """

    name: str
    weights: str
    weights_sha256: str
    layers: tuple[Layer, ...]
    preprocess: Preprocess
    batch: int | None = None
    source: str = ""
    precision: str = "fp32"
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def layer(self) -> str:
        return self.layers[0].layer

    @property
    def pooling(self) -> str:
        return self.layers[0].pooling

    @property
    def dim(self) -> int:
        return self.layers[0].dim

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs, one per feature set."""
        return [layer.output for layer in self.layers]

    def only(self, layer: str) -> BackboneFacts:
        """The same with one of its feature sets.

        Raises:
            UsageError: it gives no such layer; names those it gives.
        """
        found = [each for each in self.layers if each.layer == layer]
        if not found:
            message = (
                f"no features of layer {layer!r}; there are those of {', '.join(repr(each.layer) for each in self.layers)}"
            )
            raise UsageError(message)
        return replace(self, layers=(found[0],))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BackboneFacts:
        facts = json.loads(text)
        layers = tuple(Layer(**layer) for layer in facts["layers"])
        return cls(**{**facts, "layers": layers, "preprocess": Preprocess.from_facts(facts["preprocess"])})

    def fingerprints(self) -> list[dict[str, Any]]:
        """Its part of the fingerprint of each feature set; the weights' name is for people and decides nothing."""
        shared = {"backbone": self.name, "weights": self.weights_sha256, "pixels": self.preprocess.fingerprint()}
        if self.precision != "fp32":  # those of another calibration are other features
            shared |= {"precision": self.precision, "calibration": self.calibration["sha256"]}
        return [{**shared, "layer": each.layer, "pooling": each.pooling} for each in self.layers]


def require_features(facts: BackboneFacts, fingerprint: Fingerprint, *, mine: str, theirs: str) -> None:
    """Refuse a network that does not give the features that a fingerprint is of. Their pixels are compared where pixels are
    made (`pixel_drift`), so what this machine makes of the test image does not count here.

    Args:
        facts: what the network says of itself.
        fingerprint: of the features.
        mine: the network, for the message.
        theirs: what has the fingerprint.

    Raises:
        FingerprintMismatchError: names every field that differs.
    """
    given = next((each for each in facts.fingerprints() if each["layer"] == fingerprint.fields.get("layer")), {})
    given = given or facts.fingerprints()[0]
    asked = Fingerprint({name: fingerprint.fields.get(name) for name in given})
    Fingerprint(given).require(asked, mine=mine, theirs=theirs, ignore=("pixels.probe",))


def write_facts(model: Any, facts: BackboneFacts) -> None:
    """Put the facts into the model's metadata, one entry per field, and what the test image is on this machine."""
    entries = {PREFIX + name: value for name, value in json.loads(facts.to_json()).items()}
    entries[PROBE_IMAGE] = ProbeImage.here(facts.preprocess).to_json()
    for name, value in entries.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)


def entries_in(model: Any) -> dict[str, str]:
    """A model's metadata."""
    return {str(entry.key): str(entry.value) for entry in model.metadata_props}


def facts_of(entries: Mapping[str, str]) -> BackboneFacts | None:
    """The facts in the metadata of a model, or of the session that runs it; None where penult did not write them.

    Raises:
        BadDataError: they are damaged.
    """
    names = [key for key in entries if key.startswith(PREFIX) and key != PROBE_IMAGE]
    if f"{PREFIX}preprocess" not in names:
        return None
    try:
        return BackboneFacts.from_json(json.dumps({key.removeprefix(PREFIX): json.loads(entries[key]) for key in names}))
    except (KeyError, TypeError, ValueError) as error:
        message = f"the metadata that penult wrote into the ONNX file cannot be read: {error}"
        raise BadDataError(message) from error


def facts_in(model: Any) -> BackboneFacts | None:
    """`facts_of` a model's metadata."""
    return facts_of(entries_in(model))


def read_facts(path: Path, data: bytes | None = None) -> BackboneFacts:
    """What a backbone file says of itself, without reading external data.

    Args:
        path: of the file.
        data: its content, where it has been read.

    Raises:
        InputMissingError: no such file.
        BadDataError: not an ONNX file, or one without penult's metadata.
    """
    facts = facts_in(read_model(path, data))
    if facts is None:
        message = f"{path} was not made by penult; `penult export` makes a backbone of it"
        raise BadDataError(message)
    return facts


def name_outputs(count: int) -> Sequence[str]:
    """Names of the outputs of a backbone with so many feature sets."""
    return ["features", *(f"features_{i}" for i in range(1, count))]
