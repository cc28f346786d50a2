"""ONNX files on disk: the facts about a backbone in their metadata, external data, digests."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from store import atomic
from store.errors import BadDataError, InputMissingError, PenultError, UsageError
from store.fingerprint import Fingerprint, file_digest
from store.lock import folder_lock

from .pixel_drift import ProbeImage
from .preprocess import Preprocess

log = logging.getLogger("penult.extractor")

PREFIX = "penult."
PROBE_IMAGE = f"{PREFIX}probe_image"
POOLINGS = ("average", "max", "token")
MAX_INLINE = 2_000_000_000  # bytes; protobuf refuses messages of 2 GiB, so larger weights lie in a file beside
DATA_NAME = re.compile(r"[^/\0]*-[0-9a-f]{8}\.data")
MARKER = b"penult external data\n".ljust(64, b"\0")  # its file begins so, or it is not ours; the length keeps tensors aligned
IR_VERSION = b"\x08"  # an ONNX file begins with this field
BLOCK = 1 << 20
SHOWN = 3  # names in a message; a hostile file can have any number


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
        precision: ``fp32``, ``int8`` where `quantise` made it, or ``fp16`` where `half` did.
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


def read_model(path: Path, data: bytes | None = None) -> Any:
    """The ``onnx.ModelProto`` of a file, or of its content, the external data left on the disk.

    Raises:
        InputMissingError: no such file.
        BadDataError: it is not an ONNX file.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(path.read_bytes() if data is None else data)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputMissingError(message) from error
    except Exception as error:  # protobuf's DecodeError is not public
        message = f"{path} is not an ONNX file: {error}"
        raise BadDataError(message) from error
    if not model.graph.node:
        message = f"{path} is not an ONNX file: it holds no graph"
        raise BadDataError(message)
    return model


def external_files(model: Any) -> list[str]:
    """The files beside it in which a model keeps tensors, as it names them, sorted."""
    from onnx import TensorProto

    held = [tensor.external_data for tensor in _tensors(model.graph) if tensor.data_location == TensorProto.EXTERNAL]
    return sorted({entry.value for entries in held for entry in entries if entry.key == "location"})


def _tensors(graph: Any) -> Iterator[Any]:
    """All constants of a graph and of the graphs in its nodes (If, Loop)."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


def _weight_bytes(model: Any) -> int:
    """Size of the constants; protobuf's own ByteSize fails where a message is too large."""
    return sum(len(tensor.raw_data) or 8 * math.prod(tensor.dims) for tensor in _tensors(model.graph))


def data_files(path: Path, model: Any | None = None) -> list[Path]:
    """The files with external data of a model.

    Raises:
        BadDataError: one lies outside the model's folder.
        InputMissingError: one is missing; names it.
    """
    found = []
    folder = path.resolve().parent  # beside the file itself, if this is a link to it
    for name in external_files(model if model is not None else read_model(path)):
        file = folder / name
        if not file.resolve().is_relative_to(folder):
            message = f"{path} keeps weights in {name}, outside its own folder; refused"
            raise BadDataError(message)
        if not file.is_file():
            message = f"{path} keeps weights in {name}, which is not beside it; copy it there too (`cp -L` follows links)"
            raise InputMissingError(message)
        found.append(file)
    return found


def digest(path: Path) -> str:
    """`file_digest` of an ONNX file and its external data.

    Raises:
        InputMissingError: a file cannot be read.
    """
    return file_digest(path, *data_files(path))


def weights_digest(model: Any, folder: Path) -> str:
    """SHA-256 over all constants of a model, hexadecimal: in the order of their names, each name, type, shape and values.

    How a file stores them, inside or in external data, does not matter.

    Args:
        model: ``onnx.ModelProto``.
        folder: where its external data is.

    Raises:
        BadDataError: they cannot be read.
    """
    from onnx import TensorProto, numpy_helper

    found = hashlib.sha256()
    try:
        for tensor in sorted(_tensors(model.graph), key=lambda each: str(each.name)):
            found.update(json.dumps([tensor.name, tensor.data_type, list(tensor.dims)]).encode())
            texts = tensor.data_type == TensorProto.STRING
            values = b"\0".join(tensor.string_data) if texts else numpy_helper.to_array(tensor, str(folder)).tobytes()
            found.update(values)
    except Exception as error:  # onnx's ValidationError, and whatever NumPy says of bytes that do not fit their shape
        message = f"the weights cannot be read: {error}"
        raise BadDataError(message) from error
    return found.hexdigest()


def require_writable(target: Path) -> None:
    """Find out before minutes of work whether a file can be made there.

    Raises:
        OutputError, StorageError: it cannot.
    """
    atomic.require_replaceable(target)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            return
    except OSError as error:
        message = f"cannot create {target}: {error.strerror}"
        raise atomic.write_error(error)(message) from error


def save(model: Any, path: Path) -> None:
    """Write a model; where its weights are too large for one file, they lie in ``<name>-<random>.data`` beside it.

    The random part lets two models be in one folder while one takes the place of the other; ``path`` may be temporary. The
    weights of a large model have left memory then, and ``model`` refers to the file. It begins with `MARKER`.

    Raises:
        StorageError: it cannot be written.
    """
    from onnx import external_data_helper

    if _weight_bytes(model) < MAX_INLINE:
        atomic.commit(path, model.SerializeToString())
        return
    while os.path.lexists(data := path.with_name(f"{_stem(path)}-{secrets.token_hex(4)}.data")):
        pass
    begun = atomic.temporary(data)
    external_data_helper.convert_model_to_external_data(model, location=begun.name)
    try:
        with begun.open("xb") as file:
            file.write(MARKER)
        try:
            external_data_helper.write_external_data_tensors(model, str(path.parent))  # appends
            with begun.open("rb") as file:
                os.fsync(file.fileno())
            for entry in [entry for tensor in _tensors(model.graph) for entry in tensor.external_data]:
                if entry.key == "location":
                    entry.value = data.name
            atomic.commit(path, model.SerializeToString())  # before the data has its name: there is always something that tells
            begun.rename(data)  # whose it is
            atomic.fsync_directory(path.parent)
        except BaseException:
            begun.unlink(missing_ok=True)
            raise
    except OSError as error:
        if isinstance(error, PenultError):
            raise
        message = f"cannot write {path}: {error.strerror}"
        raise atomic.write_error(error)(message) from error


def _stem(path: Path) -> str:
    """What the name of a model's external data begins with."""
    return atomic.final_name(path.name).partition(".onnx")[0]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside a model: what is there when the block ends takes its place, unless an exception ends it."""
    atomic.require_replaceable(path)
    remove_unfinished(path)
    new = atomic.temporary(path)
    with folder_lock(path.parent):
        try:
            yield new
        except BaseException:
            remove(new)
            raise
        install(new, path)


def remove_unfinished(path: Path) -> None:
    """Delete what processes that were killed in the middle of `replacing` this model have left, unless one is at it now."""
    folder, model, begun = path.parent, atomic.final_name(path.name), f"{_stem(path)}-"
    with folder_lock(folder, alone=True) as alone:
        if alone:
            models = atomic.leftovers(folder, model.__eq__)
            for name in {name for left in models for name in _named_data(left)}:
                _discard(folder, name, models)
            ours = lambda name: name == model or (name.startswith(begun) and DATA_NAME.fullmatch(name))  # noqa: E731
            atomic.remove_leftovers(folder, ours)


def remove(path: Path) -> None:
    """Delete a model that was written here, if it is there, and its external data."""
    for name in _named_data(path):
        _discard(path.parent, name, [path])
    path.unlink(missing_ok=True)


def install(new: Path, target: Path) -> None:
    """Give a model of the same folder its final name, delete the external data of the one that had it, and say what is left.

    Anybody may have written what that one names, and two models may share a file: what goes is ours and no other model's.

    Raises:
        StorageError: it cannot be written.
    """
    folder, named, old = target.parent, _named_data(target), atomic.temporary(target)
    try:
        if named:
            with suppress(OSError):  # a second name, by which the next process finds its data if this one is killed
                old.hardlink_to(target)
        new.replace(target)
        atomic.fsync_directory(folder)
        left = [name for name in named if not _discard(folder, name, [old]) and os.path.lexists(folder / name)]
    except OSError as error:
        message = f"cannot write {target}: {error.strerror}"
        raise atomic.write_error(error)(message) from error
    finally:
        old.unlink(missing_ok=True)
    if left:
        log.warning(
            "the file that was %s named %s as its data: left there, because another model names it too, or nothing in it says "
            "that penult wrote it",
            target,
            ", ".join(map(repr, left[:SHOWN])) + (f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""),
        )


def _named_data(path: Path) -> list[str]:
    try:
        return external_files(read_model(path)) if path.is_file() else []
    except PenultError:  # it is damaged
        return []


def is_marked(path: Path) -> bool:
    """Whether a file begins as all external data that penult writes does."""
    with path.open("rb") as file:
        return file.read(len(MARKER)) == MARKER


def _discard(folder: Path, name: str, models: Collection[Path]) -> bool:
    """Delete a file if it is external data that penult wrote and only these models of its folder name; tell whether."""
    if not DATA_NAME.fullmatch(name):
        return False
    data = folder / name
    try:
        status = data.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return False
        if not is_marked(data):
            return False
        if any(_names(each, os.fsencode(name)) for each in folder.iterdir() if each not in models and each.is_file()):
            return False
        data.unlink()
    except OSError:
        return False
    return True


def _names(file: Path, data: bytes) -> bool:
    """Whether a model names a file: it is searched, not parsed. What begins as ONNX does is one, whatever it is called."""
    with file.open("rb") as opened:
        seen = opened.read(BLOCK)
        if not seen.startswith(IR_VERSION) and ".onnx" not in file.name.lower():
            return False
        while data not in seen:
            block = opened.read(BLOCK)
            if not block:
                return False
            seen = seen[-len(data) :] + block
    return True


def copy(source: Path, target: Path) -> None:
    """Copy one of penult's own files, with its external data.

    Raises:
        StorageError: it cannot be written.
    """
    for file in data_files(source):
        try:
            shutil.copyfile(file, target.with_name(file.name))
        except OSError as error:
            message = f"cannot write {target.with_name(file.name)}: {error.strerror}"
            raise atomic.write_error(error)(message) from error
    atomic.commit(target, source.read_bytes())


def name_outputs(count: int) -> Sequence[str]:
    """Names of the outputs of a backbone with so many feature sets."""
    return ["features", *(f"features_{i}" for i in range(1, count))]
