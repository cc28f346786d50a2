"""Read every byte of a cache and say what is damaged, in a child process: a damaged HDF5 file can hang or kill its reader."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import calibration, compact, hdf5, samples, shard
from .errors import (
    CorruptCacheError,
    InputMissingError,
    InterruptedRunError,
    LockedError,
    NewerFormatError,
    PenultError,
    StorageError,
)

TIMEOUT = 60.0  # seconds for one file, plus what reading it takes at ..
SLOWEST = 10e6  # .. bytes per second


@dataclass(frozen=True)
class Finding:
    """One damaged file.

    Attributes:
        file: relative to the cache.
        problem: what is wrong with it.
    """

    file: str
    problem: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def verify_cache(cache: Path) -> list[Finding]:
    """Everything that is wrong with a cache: damaged files, a changed backbone, features that are missing.

    Raises:
        InputMissingError: there is no cache.
        LockedError: another run is just replacing it.
    """
    from .cache import FeatureCache, shard_paths

    if cache.is_file():
        return [Finding(cache.name, problem) for problem in verify_files([cache]).values()]
    shards = shard_paths(cache)
    table = cache / "samples.h5"
    if not shards and not table.exists():
        message = f"{cache} is not a penult cache"
        raise InputMissingError(message)
    files = [*shards, *(path for path in (table, cache / calibration.NAME) if path.exists())]
    findings = [Finding(str(path.relative_to(cache)), problem) for path, problem in verify_files(files).items()]
    if findings:
        return findings
    try:
        opened = FeatureCache(cache)
    except LockedError:
        raise
    except PenultError as error:
        return [Finding("", str(error))]
    return [*_derived(opened), *_backbone(opened), *_missing(opened)]


def _derived(cache: Any) -> Iterator[Finding]:
    from .cache import holds, ledger_bytes, meta_bytes

    for name, data in (("cache.json", meta_bytes(cache.meta)), ("ledger.jsonl", ledger_bytes(cache.samples))):
        if not holds(cache.path / name, data):
            yield Finding(name, "is missing or damaged; the same extract command makes it again from the rest")


def _backbone(cache: Any) -> Iterator[Finding]:
    try:
        cache.require_backbone()
    except (CorruptCacheError, InputMissingError) as error:
        yield Finding("backbone.onnx", str(error))


def _missing(cache: Any) -> Iterator[Finding]:
    for layer in cache.layers:
        there = {digest for s in cache.with_layer(layer).shards for digest in s.digests()}
        missing = [row for row in cache.rows() if row.sha256 not in there]
        if missing:
            of_layer = f" of {layer}" if len(cache.layers) > 1 else ""
            yield Finding(
                "shards", f"{len(missing)} images have no features{of_layer} (such as {missing[0].name}): a shard is missing"
            )


def verify_files(paths: Sequence[Path], *, timeout: float = TIMEOUT) -> dict[Path, str]:
    """Which of these HDF5 files are damaged, and how. Survives files that kill or hang the reader.

    Args:
        paths: shards and sample tables.
        timeout: seconds for one file, beyond the time its size takes.

    Returns:
        The problem of each damaged file; sound files are left out.

    Raises:
        NewerFormatError: a newer penult wrote one of them.
        StorageError: one cannot be read, which is not damage: a permission, a failing disk.
        InterruptedRunError: the child was ended by SIGINT or SIGTERM, which is not damage either.
    """
    pending, problems = list(paths), {}
    while pending:
        for path, problem in _in_child(pending, timeout):
            pending.remove(path)
            if problem:
                problems[path] = problem
    return problems


def _in_child(paths: Sequence[Path], timeout: float) -> list[tuple[Path, str]]:
    """Verify in one child, in order, until it is done, dies or hangs; the last result then is the file that did it."""
    code = "import json, sys; request = json.load(sys.stdin); sys.path[:] = request['sys.path']; "
    code += "from store.verify import _child; _child(request['paths'])"
    command = [sys.executable, "-P", "-c", code]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    assert child.stdin is not None
    assert child.stdout is not None
    results: list[tuple[Path, str]] = []
    with child:
        names = [os.fsencode(path).hex() for path in paths]
        with suppress(BrokenPipeError):  # it is dead already; that is seen below
            child.stdin.write(json.dumps({"paths": names, "sys.path": sys.path}).encode())
        child.stdin.close()
        for path in paths:
            patience = timeout + path.stat().st_size / SLOWEST
            ready, _, _ = select.select([child.stdout], [], [], patience)
            line = child.stdout.readline() if ready else b""
            if not line:
                child.kill()
                status = child.wait()
                if ready and -status in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd signal the children too
                    raise InterruptedRunError(-status)
                died = f"kills its reader (exit {status})" if ready else f"hangs its reader (more than {patience:.0f} s)"
                return [*results, (path, died)]
            answer = json.loads(line)
            if "error" in answer:
                kind = NewerFormatError if answer["error"] == "NewerFormatError" else StorageError
                raise kind(answer["message"])
            results.append((path, answer["problem"]))
    return results


def _child(names: list[str]) -> None:
    for name in names:
        path = Path(os.fsdecode(bytes.fromhex(name)))
        kind = samples.ENCODING_TYPE if path.name == "samples.h5" else shard.ENCODING_TYPE
        if path.name == calibration.NAME:
            kind = calibration.ENCODING_TYPE
        elif path.parent.name != "shards" and path.name != "samples.h5":
            kind = compact.ENCODING_TYPE
        try:
            path.open("rb").close()
            hdf5.verify(path, kind)
            if kind == shard.ENCODING_TYPE:
                shard.read_shard(path)
            elif kind == calibration.ENCODING_TYPE:
                calibration.read_calibration(path.parent)
            else:
                samples.SampleTable.read(path, kind)
            answer = {"problem": ""}
        except (NewerFormatError, OSError) as error:  # no damage: a newer penult, a permission, a failing disk
            answer = {"error": type(error).__name__, "message": str(error)}
        except CorruptCacheError as error:
            answer = {"problem": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
