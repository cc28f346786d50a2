"""Weight files: torchvision's, downloaded or imported and checked by the digest in their names; and custom state dicts.

Torchvision names a file after the beginning of its SHA-256, as in ``resnet50-11ad3fa6.pth``. Every check here relies on that,
wherever the file comes from and whatever its name is now.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import http.client
import logging
import os
import re
import ssl
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import BadDataError, InputMissingError
from store.fingerprint import file_digest
from store.format import atomic
from store.format.lock import tidy
from store.format.output import written
from store.progress.stages import Stage, staged

log = logging.getLogger("penult.extractor")

CHUNK = 1 << 20
UNFINISHED = re.compile(r"\.[0-9a-f]{12}\.tmp\.[0-9a-f]{32}\.partial")  # what torch adds to the temporary name of a download
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
SHOWN = 3  # names of tensors in a message; there can be hundreds


@dataclass(frozen=True)
class WeightsFile:
    """One of torchvision's weight files. Nothing is opened.

    Attributes:
        network: the classification network it is for.
        entry: torchvision's weights entry.
    """

    network: str
    entry: Any

    @property
    def name(self) -> str:
        return Path(self.entry.url).name

    @property
    def prefix(self) -> str:
        """The beginning of its SHA-256, hexadecimal, from its name (8 digits, sometimes more)."""
        return Path(self.name).stem.rpartition("-")[2]

    @property
    def size(self) -> str:
        return f"{self.entry.meta['_file_size']:.0f} MiB"

    @property
    def licence(self) -> str:
        return str(self.entry.meta.get("license", "BSD-3-Clause"))  # torchvision's own, unless the weights say otherwise

    @property
    def fetch_command(self) -> str:
        return f"penult weights fetch {self.network} --weights {self.entry.name}"

    @property
    def place(self) -> Path:
        """Where torch, and therefore penult, looks for it."""
        return checkpoints() / self.name


def checkpoints() -> Path:
    """Torch's folder of downloaded weights; the environment variable ``TORCH_HOME`` moves it."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def all_files() -> list[WeightsFile]:
    """Torchvision's files for all of its classification networks. Imports torchvision (seconds)."""
    from torchvision import models

    known = sorted(models.list_models(module=models))
    return [WeightsFile(network, entry) for network in known for entry in models.get_model_weights(network)]


def fetch(file: WeightsFile, folder: Path | None = None) -> tuple[Path, str, bool]:
    """Download one of torchvision's files, unless a sound one is there; a damaged one is replaced.

    The final name appears only when the content is complete and its digest is right.

    Args:
        file: the one to download.
        folder: of the result; None for `checkpoints`.

    Returns:
        Where it is, its SHA-256, and whether it was downloaded now.

    Raises:
        InputMissingError: it cannot be downloaded.
        BadDataError: the download is not this file.
        LockedError: another run fetches it.
        OutputError, StorageError: it cannot be written.
    """
    path = (folder or checkpoints()) / file.name
    if path.is_file():
        digest = file_digest(path)
        if digest.startswith(file.prefix):
            tidy(path)
            return path, digest, False
        log.warning("%s is damaged (its SHA-256 begins with %s) and is fetched again", path, digest[:8])
    _make_folder(path)
    with written(path, overwrite=True):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            if UNFINISHED.fullmatch(left.name.removeprefix(f".{path.name}")):
                with suppress(OSError):  # it may belong to another user
                    left.unlink()
        return path, _download(file, path), True


def _download(file: WeightsFile, path: Path) -> str:
    """Download a file to its place, which is held; return its SHA-256."""
    import torch

    temporary, megabytes = atomic.temporary(path), round(file.entry.meta["_file_size"])

    def arrived() -> int:
        return sum(part.stat().st_size for part in path.parent.glob(f"{glob.escape(temporary.name)}*")) >> 20

    try:
        with Stage(f"downloading {file.name}", megabytes, "MiB", measure=arrived):
            torch.hub.download_url_to_file(file.entry.url, str(temporary), file.prefix, progress=False)
        digest = file_digest(temporary)
        with temporary.open("rb") as complete:
            os.fsync(complete.fileno())
        temporary.rename(path)
        atomic.fsync_directory(path.parent)
    except NETWORK_ERRORS as error:
        reason = getattr(error, "reason", None) or error
        message = f"cannot download {file.name} from {file.entry.url} ({reason}); nothing was kept"
        raise InputMissingError(message) from error
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; nothing was kept"
        raise atomic.write_error(error)(message) from error
    except RuntimeError as error:  # torch's answer to a wrong digest
        message = (
            f"the download of {file.entry.url} is not {file.name}: its SHA-256 does not begin with {file.prefix}. The transfer "
            f"was cut short, or a proxy answered in the server's place; nothing was kept, try again"
        )
        raise BadDataError(message) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return digest


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; TORCH_HOME=FOLDER in the environment chooses another place"
        raise atomic.write_error(error)(message) from error


def torchvision_state(file: WeightsFile) -> tuple[dict[str, Any], str]:
    """The state dict in one of torchvision's files, which is downloaded if it is not here, and its SHA-256.

    Raises:
        InputMissingError: it is not here and cannot be downloaded; says which file to bring, from where, and how.
        BadDataError: the one that is here is damaged; says how to repair it.
        OutputError, StorageError: it cannot be kept.
    """
    path = file.place
    try:
        digest = file_digest(path) if path.is_file() else fetch(file)[1]
    except InputMissingError as error:
        message = (
            f"{error}. On a machine with internet run `{file.fetch_command}`, bring the file here and run `penult weights "
            f"import {file.name}`. Without penult there, download that address by hand ({file.size}; its SHA-256 begins "
            f"with {file.prefix}) and put the file into {path.parent}. Or pass --weights FILE.pth or --weights random"
        )
        raise InputMissingError(message) from error
    if not digest.startswith(file.prefix):
        message = (
            f"{path} is damaged or cut short: its SHA-256 begins with {digest[:8]} instead of {file.prefix}. "
            f"`{file.fetch_command}` replaces it, or, without internet, `penult weights import` of a sound copy"
        )
        raise BadDataError(message)
    return read_state(path), digest


def recognise(path: Path) -> WeightsFile:
    """Which of torchvision's files this is, by its content, whatever its name.

    Raises:
        InputMissingError: it cannot be read.
        BadDataError: it is none of them, or a damaged one; says which.
    """
    digest, known = file_digest(path), all_files()
    for file in known:
        if digest.startswith(file.prefix):
            return file
    named = re.findall(r"-([0-9a-f]{8,})", path.name)
    meant = next((file for file in known if file.prefix in named), None)
    if meant is None:
        message = (
            f"{path} (SHA-256 {digest[:8]}..) is none of torchvision's files for classification, so its digest is not known; "
            f"use it where it is, with --weights {path} --preset NAME"
        )
        raise BadDataError(message)
    size = path.stat().st_size / 2**20
    message = (
        f"{path} is called like {meant.name}, but its SHA-256 begins with {digest[:8]}: it is damaged, or incomplete "
        f"({size:.0f} MiB; the sound one has {meant.size}). Bring it again: `{meant.fetch_command}` makes a checked copy"
    )
    raise BadDataError(message)


def install(path: Path, file: WeightsFile) -> tuple[Path, bool]:
    """Copy one of torchvision's files to where torch looks for it, and check it again while it is copied.

    Returns:
        Where it is now, and whether it was copied (False if a sound one was there).

    Raises:
        BadDataError: it changed since it was recognised.
        LockedError: another run writes it.
        OutputError, StorageError: it cannot be written; no partial file remains.
    """
    target = file.place
    _make_folder(target)
    if target.is_file():
        digest = file_digest(target)
        if digest.startswith(file.prefix):
            tidy(target)
            return target, False
        log.warning("%s was damaged (its SHA-256 began with %s) and is replaced", target, digest[:8])
    with written(target, overwrite=True), Stage(f"copying {file.name}"):
        atomic.commit(target, _checked(path, file.prefix))
    return target, True


def _checked(path: Path, prefix: str) -> Iterator[bytes]:
    sha = hashlib.sha256()
    try:
        with path.open("rb") as source:
            while block := source.read(CHUNK):
                sha.update(block)
                yield block
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputMissingError(message) from error
    if not sha.hexdigest().startswith(prefix):
        message = f"{path} changed while it was read; nothing was kept"
        raise BadDataError(message)


def survey_files() -> list[dict[str, Any]]:
    """The weight files of torchvision's networks in torch's folder, as JSON: file, network, weights, bytes, state.

    ``state`` is ``sound``, ``damaged``, or ``incomplete`` for what a killed download left behind.
    """
    rows = []
    for file in all_files():
        path = file.place
        facts = {"network": file.network, "weights": file.entry.name}
        if path.is_file():
            sound = file_digest(path).startswith(file.prefix)
            rows.append({"file": str(path), **facts, "bytes": path.stat().st_size, "state": "sound" if sound else "damaged"})
        left = sorted([*path.parent.glob(f"{path.name}.*.partial"), *path.parent.glob(f".{path.name}.*.tmp*")])
        rows += [{"file": str(part), **facts, "bytes": part.stat().st_size, "state": "incomplete"} for part in left]
    return rows


@staged("loading the weights")
def read_state(path: Path) -> dict[str, Any]:
    """The state dict in a ``.pth`` file, loaded without executing anything in it (``weights_only``).

    Raises:
        InputMissingError: no such file.
        BadDataError: it is not a state dict; says what it is, and how to make one.
    """
    import torch

    if not path.is_file():
        message = f"cannot read {path}: no such file"
        raise InputMissingError(message)
    refuse_other_formats(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ...
        raise BadDataError(_unloadable(path, str(error) or type(error).__name__)) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        message = f"{path} holds no state dict (names to tensors); torch.save(model.state_dict(), ...) writes one"
        raise BadDataError(message)
    return {key.removeprefix("module."): value for key, value in state.items()}


def refuse_other_formats(path: Path) -> None:
    """Refuse files that are often mistaken for a ``.pth`` file, by their first bytes.

    Raises:
        BadDataError: it is a safetensors file, a web page or a pointer of Git LFS; says what to do.
        InputMissingError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputMissingError(message) from error
    if path.suffix == ".safetensors" or head[8:9] == b"{":  # eight bytes of length, then JSON
        wrong = (
            f"a safetensors file, which is not supported; convert it: python -c 'import torch, safetensors.torch as s; "
            f'torch.save(s.load_file("{path.name}"), "{path.stem}.pth")\''
        )
    elif head.startswith(b"version https://git-lfs"):
        wrong = "only Git LFS's pointer to the weights; `git lfs pull` brings them"
    elif head.lstrip()[:1] == b"<":
        wrong = "a web page, not weights; download the file itself"
    else:
        return
    message = f"{path} is {wrong}"
    raise BadDataError(message)


def _unloadable(path: Path, reason: str) -> str:
    objects = re.search(r"GLOBAL (\S+)", reason) or re.search("TorchScript", reason)
    if objects:
        return (
            f"{path} is not a state dict that can be loaded safely: it holds Python objects ({objects[objects.lastindex or 0]})"
            f', which would execute code. Where it was made, torch.save(model.state_dict(), "{path.stem}-state.pth") writes '
            f"the tensors alone; pass that file"
        )
    first = reason.strip().splitlines()[0][:120]
    return (
        f"{path} is not a state dict that can be loaded safely: it is damaged, cut short, or no file of torch.save ({first}). "
        f"Compare its size and SHA-256 with the original, and bring it again"
    )


def misfit(error: RuntimeError) -> str:
    """The reasons that ``load_state_dict`` gives, with a few names of each kind instead of all of them."""
    parts, shapes = [], []
    for line in map(str.strip, str(error).splitlines()[1:]):
        kind, _, listing = line.partition(": ")
        if kind.startswith(("Missing", "Unexpected")):
            names = re.findall(r'"([^"]+)"', listing)
            parts.append(f"{len(names)} tensors {'missing' if kind.startswith('M') else 'unexpected'} ({_some(names)})")
        elif kind.startswith("size mismatch for "):
            shapes.append(kind.removeprefix("size mismatch for "))
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    return "; ".join(parts) or str(error).strip().splitlines()[-1].strip()[:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
