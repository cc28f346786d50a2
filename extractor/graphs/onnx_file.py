"""ONNX files on disk: reading, writing, replacing and copying models with their external data, and digests."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from store.errors import BadDataError, InputMissingError, LockedError, PenultError
from store.fingerprint import file_digest
from store.format import atomic
from store.format.lock import output_lock

from .reasons import reason

log = logging.getLogger("penult.extractor")

MAX_INLINE = 2_000_000_000  # bytes; protobuf refuses messages of 2 GiB, so larger weights go into a second file
DATA_NAME = re.compile(r"[^/\0]*-[0-9a-f]{8}\.data")
MARKER = b"penult external data\n".ljust(64, b"\0")  # the beginning of penult's external data; its length keeps tensors aligned
IR_VERSION = b"\x08"  # an ONNX file begins with this field
BLOCK = 1 << 20
SHOWN = 3  # names in a message; a hostile file can have any number


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
        message = f"{path} is not an ONNX file: {reason(error)}"
        raise BadDataError(message) from error
    if not model.graph.node:
        message = f"{path} is not an ONNX file: it holds no graph"
        raise BadDataError(message)
    texts = [text for node in model.graph.node for text in (node.op_type, node.domain, *node.input, *node.output)]
    texts += [each.name for each in (*model.graph.input, *model.graph.output, *model.graph.initializer)]
    if not all(isinstance(text, str) for text in texts):  # protobuf gives what is no UTF-8 as bytes
        message = f"{path} is damaged: a name in it is no text"
        raise BadDataError(message)
    return model


def external_files(model: Any) -> list[str]:
    """Names of the files in which a model keeps external data, sorted."""
    from onnx import TensorProto

    tensors = itertools.chain.from_iterable(map(_tensors, (model.graph, *model.functions)))
    held = [tensor.external_data for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    return sorted({entry.value for entries in held for entry in entries if entry.key == "location"})


def _tensors(graph: Any) -> Iterator[Any]:
    """All constants of a graph or function: its own, those of its nodes (Constant), and of the graphs in these (If, Loop)."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
            for sparse in [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


def _weight_bytes(model: Any) -> int:
    """Size of the constants; protobuf's own ByteSize fails if a message is too large."""
    return sum(len(tensor.raw_data) or 8 * math.prod(tensor.dims) for tensor in _tensors(model.graph))


def fits_inline(model: Any) -> bool:
    """Whether the weights of a model, which are in memory, fit into one file."""
    return _weight_bytes(model) < MAX_INLINE


def data_files(path: Path, model: Any | None = None) -> list[Path]:
    """Paths of the files with a model's external data.

    Raises:
        BadDataError: one lies outside the model's folder.
        InputMissingError: one is missing; names it.
    """
    files = []
    folder = path.resolve().parent  # beside the file itself, if this is a link to it
    for name in external_files(model if model is not None else read_model(path)):
        file = folder / name
        if not file.resolve().is_relative_to(folder):
            message = f"{path} keeps weights in {name}, outside its own folder; refused"
            raise BadDataError(message)
        if not file.is_file():
            message = f"{path} keeps weights in {name}, which is not beside it; copy it there too (`cp -L` follows links)"
            raise InputMissingError(message)
        files.append(file)
    return files


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

    sha = hashlib.sha256()
    try:
        for tensor in sorted(_tensors(model.graph), key=lambda each: str(each.name)):
            sha.update(json.dumps([tensor.name, tensor.data_type, list(tensor.dims)]).encode())
            texts = tensor.data_type == TensorProto.STRING
            values = b"\0".join(tensor.string_data) if texts else numpy_helper.to_array(tensor, str(folder)).tobytes()
            sha.update(values)
    except Exception as error:  # onnx's ValidationError, and what NumPy raises for bytes that do not fit their shape
        message = f"the weights cannot be read: {reason(error)}"
        raise BadDataError(message) from error
    return sha.hexdigest()


def graph_digest(model: Any) -> str:
    """SHA-256 over what a model computes with its weights, hexadecimal: its nodes, inputs, outputs, functions and opsets.

    Together with `weights_digest` it is of everything that decides the outputs. Values of constants count only inside nodes.
    """
    sha = hashlib.sha256()
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *model.functions, *model.opset_import):
        data = part.SerializeToString(deterministic=True)
        sha.update(len(data).to_bytes(8) + data)
    return sha.hexdigest()


def save(model: Any, path: Path) -> None:
    """Write a model; weights that are too large for one file go into ``<name>-<random>.data`` beside it.

    The random part lets an old and a new model share a folder during a replacement; ``path`` may be temporary. Afterwards
    the weights of a large model are no longer in memory: ``model`` refers to the data file, which begins with `MARKER`.

    Raises:
        StorageError: it cannot be written.
    """
    from onnx import external_data_helper

    if fits_inline(model):
        atomic.commit(path, model.SerializeToString())
        return
    while os.path.lexists(data := path.with_name(f"{_stem(path)}-{os.urandom(4).hex()}.data")):
        pass
    partial = atomic.temporary(data)
    external_data_helper.convert_model_to_external_data(model, location=partial.name)
    try:
        with partial.open("xb") as file:
            file.write(MARKER)
        try:
            external_data_helper.write_external_data_tensors(model, str(path.parent))  # appends
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            for entry in [entry for tensor in _tensors(model.graph) for entry in tensor.external_data]:
                if entry.key == "location":
                    entry.value = data.name
            atomic.commit(path, model.SerializeToString())  # before the rename, so that a model always names the data file
            partial.rename(data)
            atomic.fsync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        if isinstance(error, PenultError):
            raise
        message = f"cannot write {path}: {error.strerror}"
        raise atomic.write_error(error)(message) from error


def save_beside(model: Any, path: Path, data: Mapping[str, Iterable[bytes]]) -> None:
    """Write a model whose external data comes in blocks; its files get new names beside it, as those of `save`.

    Args:
        model: ``onnx.ModelProto``; it refers to the new files afterwards.
        path: of the file; it may be temporary.
        data: the content of each file that the model names.

    Raises:
        OutputError, StorageError: it cannot be written; nothing is left.
    """
    names = {name: path.with_name(f"{_stem(path)}-{os.urandom(4).hex()}.data") for name in data}
    partials = {name: atomic.temporary(new) for name, new in names.items()}
    try:
        for name, blocks in data.items():
            atomic.commit(partials[name], blocks)
        for tensor in itertools.chain.from_iterable(map(_tensors, (model.graph, *model.functions))):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = names[entry.value].name
        atomic.commit(path, model.SerializeToString())  # before the renames, so that a model always names its data files
        for name, partial in partials.items():
            partial.rename(names[name])
        atomic.fsync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            for partial in partials.values():
                partial.unlink(missing_ok=True)
        raise


def _stem(path: Path) -> str:
    """How the name of a model's external data begins."""
    return atomic.final_name(path.name).partition(".onnx")[0]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside a model; the file there replaces the model when the block ends without an exception.

    Raises:
        LockedError: another process is replacing it.
        OutputError, StorageError: it cannot be written.
    """
    atomic.require_replaceable(path)
    with output_lock(_named(path)):
        _remove_leftovers(path)
        new = atomic.temporary(path)
        try:
            yield new
        except BaseException:
            with suppress(OSError):
                remove(new)
            raise
        install(new, path)


def remove_unfinished(path: Path) -> None:
    """Delete the leftovers of processes that were killed while `replacing` this model, unless one is replacing it now."""
    with suppress(LockedError, OSError), output_lock(_named(path)):
        _remove_leftovers(path)


def _named(path: Path) -> Path:
    """The model that a path belongs to, which may be temporary."""
    return path.with_name(atomic.final_name(path.name))


def _remove_leftovers(path: Path) -> None:
    folder, model, prefix = path.parent, _named(path).name, f"{_stem(path)}-"
    models = atomic.leftovers(folder, model.__eq__)
    for name in {name for left in models for name in _named_data(left)}:
        _discard(folder, name, models)
    atomic.remove_leftovers(folder, lambda name: name == model or (name.startswith(prefix) and DATA_NAME.fullmatch(name)))


def remove(path: Path) -> None:
    """Delete a model that penult wrote, if it exists, and its external data."""
    for name in _named_data(path):
        _discard(path.parent, name, [path])
    path.unlink(missing_ok=True)


def install(new: Path, target: Path) -> None:
    """Give a new model its final name in the same folder, and delete the external data of the old one.

    Only files that penult wrote and that no other model names are deleted; the others are left and named in a warning.

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
        with suppress(OSError):
            old.unlink()
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
    """Whether a file begins as all external data that penult writes does, or was cut off before that."""
    with path.open("rb") as file:
        return MARKER.startswith(file.read(len(MARKER)))


def _discard(folder: Path, name: str, models: Collection[Path]) -> bool:
    """Delete a file if it is external data that penult wrote and only these models of its folder name; return whether."""
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
    """Whether a file is a model that names a data file: it is searched, not parsed. Any file that begins like ONNX counts."""
    with file.open("rb") as opened:
        window = opened.read(BLOCK)
        if not window.startswith(IR_VERSION) and ".onnx" not in file.name.lower():
            return False
        while data not in window:
            block = opened.read(BLOCK)
            if not block:
                return False
            window = window[-len(data) :] + block
    return True


def copy(source: Path, target: Path) -> None:
    """Copy a model that penult wrote, with its external data.

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
