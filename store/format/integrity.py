"""Verification of HDF5 files in a child process, because a damaged file can hang or kill its reader."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from store.environment import end_with_parent, python
from store.errors import CorruptCacheError, InterruptedRunError, NewerFormatError, StorageError, answer_of, raise_answered
from store.progress.stages import Stage

from . import calibration, compact_file, hdf5, samples, shard

TIMEOUT = 60.0  # seconds for one file, plus what reading it takes at ..
SLOWEST = 10e6  # .. bytes per second


def verify_files(paths: Sequence[Path], *, timeout: float = TIMEOUT) -> dict[Path, str]:
    """Find which of these HDF5 files are damaged, and how. A file may kill or hang its reader.

    Args:
        paths: shards and sample tables.
        timeout: seconds for one file, beyond the time its size takes.

    Returns:
        The problem of each damaged file; sound files are left out.

    Raises:
        NewerFormatError: a newer penult wrote one of them.
        StorageError: one cannot be read for another reason than damage: a permission, a failing disk.
        InterruptedRunError: the child was ended by SIGINT or SIGTERM, which is not damage either.
    """
    pending, problems = list(paths), {}
    with Stage("verifying", len(paths), "files") as stage:
        while pending:
            for path, problem in _in_child(pending, timeout, stage):
                pending.remove(path)
                if problem:
                    problems[path] = problem
    return problems


def _in_child(paths: Sequence[Path], timeout: float, stage: Stage) -> list[tuple[Path, str]]:
    """Verify in one child, in order, until it ends, dies or hangs; the last result then is for the file that caused it."""
    command = python(f"from store.format.integrity import _child; _child({os.getpid()})")
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    assert reader.stdin is not None
    assert reader.stdout is not None
    results: list[tuple[Path, str]] = []
    with reader, ExitStack() as stack:
        stack.callback(reader.kill)  # whatever ends this: the context waits for it, and it may hang
        names = [os.fsencode(path).hex() for path in paths]
        with suppress(BrokenPipeError):  # it is dead already, which is noticed below
            reader.stdin.write(json.dumps(names).encode())
        reader.stdin.close()
        for path in paths:
            patience = timeout + path.stat().st_size / SLOWEST
            ready, _, _ = select.select([reader.stdout], [], [], patience)
            line = reader.stdout.readline() if ready else b""
            stage.step()
            if not line:
                reader.kill()
                status = reader.wait()
                if ready and -status in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and systemd signal the children too
                    raise InterruptedRunError(-status)
                died = f"kills its reader (exit {status})" if ready else f"hangs its reader (more than {patience:.0f} s)"
                return [*results, (path, died)]
            answer = json.loads(line)
            raise_answered(answer)
            results.append((path, answer["problem"]))
    return results


def _child(parent: int) -> None:
    end_with_parent(parent)
    for name in json.load(sys.stdin):
        path = Path(os.fsdecode(bytes.fromhex(name)))
        kind = samples.ENCODING_TYPE if path.name == "samples.h5" else shard.ENCODING_TYPE
        if path.name == calibration.NAME:
            kind = calibration.ENCODING_TYPE
        elif path.parent.name != "shards" and path.name != "samples.h5":
            kind = compact_file.ENCODING_TYPE
        try:
            path.open("rb").close()
            hdf5.verify(path, kind)
            if kind == shard.ENCODING_TYPE:
                shard.require_sound(shard.read_shard(path), digest=False)
            elif kind == calibration.ENCODING_TYPE:
                calibration.read_calibration(path.parent)
            else:
                samples.SampleTable.read(path, kind)
                if kind == compact_file.ENCODING_TYPE:
                    shard.require_sound(compact_file.open_compact(path)[0], digest=False)
            answer = {"problem": ""}
        except NewerFormatError as error:  # not damage; neither is a permission or a failing disk
            answer = answer_of(error)
        except OSError as error:
            answer = answer_of(StorageError(str(error)))
        except CorruptCacheError as error:
            answer = {"problem": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
