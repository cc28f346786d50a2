"""Facts about a backbone (network, weights, layers, preprocessing), stored in the metadata of its ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from extractor.pixels.pixel_drift import ProbeImage, libraries
from extractor.pixels.preprocess import Preprocess, probe
from store.errors import BadDataError
from store.fingerprint import Fingerprint

from .onnx_file import read_model

PREFIX = "penult."
PROBE_IMAGE = f"{PREFIX}probe_image"


@dataclass(frozen=True)
class Layer:
    """One feature set of a backbone: the output of a layer, pooled to a vector.

    Attributes:
        layer: what the features are, such as ``input of fc`` or ``layer3``.
        pooling: ``none`` if the layer is a vector, else ``average`` or ``max`` over space or tokens, ``token`` (the class token
            of a vision transformer), ``patches after 5`` (the average of the tokens from the sixth on) or ``class+mean after
            5`` (the class token and that average, side by side).
        dim: length of a feature vector.
        output: name of the graph's output ``(n, dim)``.
    """

    layer: str
    pooling: str
    dim: int
    output: str = "features"


@dataclass(frozen=True)
class BackboneFacts:
    """The facts about a backbone that its ONNX file records.

    Attributes:
        name: the architecture; ``onnx`` for a custom ONNX file.
        weights: name of the weights, for people.
        weights_sha256: digest of the tensors, or of the ONNX file that the backbone was made from.
        layers: the feature sets, in the order of the request; by default the penultimate layer alone.
        preprocess: how images become its input.
        batch: images per call, if the graph fixes that number.
        source: where the weights came from, for people.
        precision: ``fp32``, ``int8`` (made by `int8`) or ``fp16`` (made by `float16`).
        calibration: how it was converted: ``sha256`` of what decided the numbers, layers kept in float, measurements. For int8
            also method, number of images, digest of their pixels, and every candidate that was tried. Empty for fp32.
        zero_padded_pooling: a max pooling has zeros around it, see `graph.keep_zero_padding`. Files from before that was known
            do not say so, and their features are others.
        reading: how a custom ONNX file was read: ``features`` (where each feature set was found), ``settings`` (where each was
            said), ``prefix_tokens`` (before the patches), ``doubtful`` (feature sets that may be others than one expects),
            ``scores`` (an output with class scores: ``output``, ``count``), ``warnings``. For people; empty for torchvision's
            networks, but for ``warnings``.
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
    zero_padded_pooling: bool = False
    reading: dict[str, Any] = field(default_factory=dict)

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
        """The facts with only one of the feature sets.

        Raises:
            BadDataError: no such layer; names those there are.
        """
        matches = [each for each in self.layers if each.layer == layer]
        if not matches:
            message = (
                f"the backbone has no features of layer {layer!r}; it has {', '.join(repr(each.layer) for each in self.layers)}"
            )
            raise BadDataError(message)
        return replace(self, layers=(matches[0],))

    def description(self) -> dict[str, Any]:
        """What the facts say to people, as JSON."""
        layers = [asdict(layer) for layer in self.layers]
        shown = {"name": self.name, "weights": self.weights, "layers": layers, "preprocess": self.preprocess.facts()}
        return {**shown, **{name: value for name, value in self.reading.items() if name != "warnings"}}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BackboneFacts:
        facts = json.loads(text)
        layers = tuple(Layer(**layer) for layer in facts["layers"])
        return cls(**{**facts, "layers": layers, "preprocess": Preprocess.from_facts(facts["preprocess"])})

    def fingerprints(self) -> list[dict[str, Any]]:
        """The backbone's part of the fingerprint of each feature set; the weights' name is for people and left out."""
        shared = {"backbone": self.name, "weights": self.weights_sha256, "pixels": self.preprocess.fingerprint()}
        if self.precision != "fp32":  # another calibration gives other features
            shared |= {"precision": self.precision, "calibration": self.calibration["sha256"]}
        if self.zero_padded_pooling:
            shared |= {"max_pool_padding": "zeros"}
        return [{**shared, "layer": each.layer, "pooling": each.pooling} for each in self.layers]


def require_features(facts: BackboneFacts, fingerprint: Fingerprint, *, mine: str, theirs: str) -> None:
    """Refuse a network that does not give the features that a fingerprint describes.

    Pixels are compared elsewhere (`pixel_drift`), so the test image as this machine decodes it does not count here.

    Args:
        facts: of the network.
        fingerprint: of the features.
        mine: name of the network, for the message.
        theirs: name of what has the fingerprint.

    Raises:
        FingerprintMismatchError: names every field that differs.
    """
    fields = next((each for each in facts.fingerprints() if each["layer"] == fingerprint.fields.get("layer")), {})
    fields = fields or facts.fingerprints()[0]
    expected = Fingerprint({name: fingerprint.fields.get(name) for name in fields})
    Fingerprint(fields).require(expected, mine=mine, theirs=theirs, ignore=("pixels.probe",))


def write_facts(model: Any, facts: BackboneFacts) -> None:
    """Write the facts into a model's metadata, one entry per field, with the test image as this machine decodes it."""
    entries = {PREFIX + name: value for name, value in json.loads(facts.to_json()).items()}
    entries[PROBE_IMAGE] = ProbeImage.here(facts.preprocess).to_json()
    for name, value in entries.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)


def renew_probe_image(model: Any, facts: BackboneFacts) -> bool:
    """Replace the test image in a model by the one that this machine decodes; return whether it was another."""
    entries = entries_in(model)
    image = ProbeImage.parse(entries.get(PROBE_IMAGE), probe(facts.preprocess))
    if image is not None and image.libraries == libraries():
        return False
    del model.metadata_props[:]
    for name, value in {**entries, PROBE_IMAGE: json.dumps(ProbeImage.here(facts.preprocess).to_json())}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    return True


def entries_in(model: Any) -> dict[str, str]:
    """A model's metadata."""
    return {str(entry.key): str(entry.value) for entry in model.metadata_props}


def facts_of(entries: Mapping[str, str]) -> BackboneFacts | None:
    """The facts in the metadata of a model, or of the session that runs it; None if penult did not write any.

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
    """The facts in a backbone file, without reading its external data.

    Args:
        path: of the file.
        data: its content, if it has been read.

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
    """Names for the outputs of a backbone with ``count`` feature sets."""
    return ["features", *(f"features_{i}" for i in range(1, count))]
