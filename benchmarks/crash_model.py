"""What a disk may hold after a power loss: a recorder of file operations, and the states that POSIX allows after each.

The model is pessimistic. Data that was not fsynced may be lost, zero, cut or have holes. A name that was made, moved or
removed since the last fsync of its directory may be old or new, independently of every other file, in any combination that
keeps the order of the operations on one file. Nothing but fsync makes anything durable.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from store.format import atomic

SECTOR = 512
UNNAMED = getattr(os, "O_TMPFILE", -1)  # a file that never has a name, by which it is tried whether a folder is writable


class KilledError(BaseException):
    """Ends a recorded run where SIGKILL would."""


@dataclass(frozen=True)
class Operation:
    """One operation of the trace.

    Attributes:
        kind: ``mkdir``, ``create``, ``write``, ``fsync``, ``fsync directory``, ``rename``, ``unlink``; and, not an operation
            but a promise, ``committed``: from here on the file must survive.
        path: relative to the recorded folder, as it was then; ``.`` is the folder itself.
        node: number of the file or folder, which stays when it is renamed.
        data: what was written.
        target: new path of a rename.
        phase: which of the recorded runs did it.
    """

    kind: str
    path: str
    node: int
    data: bytes = b""
    target: str = ""
    phase: str = ""


class Recorder:
    """Records what happens below a folder, which must be empty at the start, while `recording`.

    Args:
        root: the folder; it is durable itself.
        fsync: ``all``, or as a control ``none``, ``files`` or ``directories``: which calls of fsync count.
    """

    def __init__(self, root: Path, *, fsync: str = "all") -> None:
        self.root, self.fsync = os.path.abspath(root), fsync  # noqa: PTH100 - prefix arithmetic on strings
        self.trace: list[Operation] = []
        self.phase = ""
        self.kill_at = ""  # a run is killed right after a file got a final name with this in it
        self._nodes = {".": 0}
        self._open: dict[int, str] = {}
        self._next = 1

    def _relative(self, path: Any) -> str | None:
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        return os.path.relpath(full, self.root) if (full + "/").startswith(self.root + "/") else None

    def _add(self, kind: str, path: str, node: int, **more: Any) -> None:
        self.trace.append(Operation(kind, path, node, phase=self.phase, **more))

    def _new(self, kind: str, path: str) -> None:
        self._nodes[path] = self._next
        self._next += 1
        self._add(kind, path, self._nodes[path])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Stand between the program and the operating system."""
        shims = {
            "mkdir": self._mkdir,
            "open": self._os_open,
            "write": self._write,
            "fsync": self._fsync,
            "close": self._close,
            "rename": self._rename,
            "replace": self._rename,
            "unlink": self._unlink,
        }
        with ExitStack() as stack:
            for name, shim in shims.items():
                stack.enter_context(patch.object(os, name, self._shim(shim, getattr(os, name))))
            commit = atomic.commit

            def committed(path: Path, data: bytes) -> None:
                commit(path, data)
                name = self._relative(path)
                if name is not None:
                    self._add("committed", name, self._nodes[name])

            stack.enter_context(patch.object(atomic, "commit", committed))
            yield

    @staticmethod
    def _shim(shim: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: shim(real, *args, **kwargs)

    def _mkdir(self, real: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        real(path, *args, **kwargs)
        name = self._relative(path)
        if name is not None:
            self._new("mkdir", name)

    def _os_open(self, real: Any, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor: int = real(path, flags, *args, **kwargs)
        name = self._relative(path)
        if name is not None and flags & UNNAMED != UNNAMED:
            self._open[descriptor] = name
            if name not in self._nodes:
                self._new("create", name)
            elif flags & (os.O_WRONLY | os.O_RDWR) and not name.endswith(".lock"):
                message = f"{name} was opened for writing while it existed"
                raise AssertionError(message)
        return descriptor

    def _write(self, real: Any, descriptor: int, data: Any) -> int:
        count: int = real(descriptor, data)
        if descriptor in self._open:
            name = self._open[descriptor]
            self._add("write", name, self._nodes[name], data=bytes(data[:count]))
        return count

    def _fsync(self, real: Any, descriptor: int) -> None:
        name = self._open.get(descriptor)
        if name is None:
            real(descriptor)
            return
        folder = Path(self.root, name).is_dir()
        if self.fsync == "all" or self.fsync == ("directories" if folder else "files"):
            self._add("fsync directory" if folder else "fsync", name, self._nodes[name])

    def _close(self, real: Any, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        real(descriptor)

    def _rename(self, real: Any, source: Any, target: Any, **kwargs: Any) -> None:
        real(source, target, **kwargs)
        old, new = self._relative(source), self._relative(target)
        if old is not None and new is not None:
            assert Path(old).parent == Path(new).parent, "a rename across folders is not modelled"
            self._nodes[new] = self._nodes.pop(old)
            self._add("rename", old, self._nodes[new], target=new)
            if self.kill_at and self.kill_at in new and not hidden(new):
                raise KilledError

    def _unlink(self, real: Any, path: Any, **kwargs: Any) -> None:
        real(path, **kwargs)
        name = self._relative(path)
        if name is not None:
            self._add("unlink", name, self._nodes.pop(name))


@dataclass
class _File:
    durable: bytes = b""
    current: bytes = b""


@dataclass
class _Folder:
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[Operation] = field(default_factory=list)


@dataclass
class Crash:
    """A state of the disk.

    Attributes:
        at: how many operations had been done.
        phase: which run was under way.
        files: content by path; ``folders`` are the paths of the folders.
    """

    at: int
    phase: str
    files: dict[str, bytes]
    folders: list[str]

    def write(self, folder: Path) -> None:
        """Make it real, in an existing folder."""
        for name in self.folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def crash(trace: list[Operation], at: int, rng: random.Random) -> Crash:
    """One of the states the disk may be in when the power fails after ``at`` operations."""
    files: dict[int, _File] = defaultdict(_File)
    folders: dict[int, _Folder] = {0: _Folder()}
    where = {".": 0}
    for op in trace[:at]:
        parent = where.get(os.path.dirname(op.path) or ".", 0)  # noqa: PTH120
        if op.kind in ("mkdir", "create", "rename", "unlink"):
            folders[parent].pending.append(op)
        if op.kind == "mkdir":
            where[op.path] = op.node
            folders[op.node] = _Folder()
        elif op.kind == "write":
            files[op.node].current += op.data
        elif op.kind == "fsync":
            files[op.node].durable = files[op.node].current
        elif op.kind == "fsync directory":
            for done in folders[op.node].pending:
                _apply(folders[op.node].durable, done)
            folders[op.node].pending.clear()
    found: dict[str, bytes] = {}
    there: list[str] = []
    luck = rng.choice(["lost", "kept", "names only", "random", "random", "random"])
    pending = [(0, "")]
    while pending:
        number, prefix = pending.pop()
        for name, node in _entries(folders[number], luck, rng).items():
            if node in folders:
                there.append(prefix + name)
                pending.append((node, f"{prefix}{name}/"))
            else:
                found[prefix + name] = _content(files[node], luck, rng)
    return Crash(at, trace[at - 1].phase if at else trace[0].phase, found, sorted(there))


def _apply(names: dict[str, int], op: Operation) -> None:
    name = os.path.basename(op.path)  # noqa: PTH119
    if op.kind in ("mkdir", "create"):
        names[name] = op.node
    else:
        if names.get(name) == op.node:
            del names[name]
        if op.kind == "rename":
            names[os.path.basename(op.target)] = op.node  # noqa: PTH119


def _entries(folder: _Folder, luck: str, rng: random.Random) -> dict[str, int]:
    """The names in a folder after a crash: of the pending operations on each file, the first few."""
    names = dict(folder.durable)
    if luck == "lost":
        return names
    left: dict[int, int] = {}
    for node in dict.fromkeys(op.node for op in folder.pending):
        count = sum(op.node == node for op in folder.pending)
        left[node] = count if luck in ("kept", "names only") else rng.choice([0, count, rng.randint(0, count)])
    for op in folder.pending:
        if left[op.node]:
            left[op.node] -= 1
            _apply(names, op)
    return names


def _content(file: _File, luck: str, rng: random.Random) -> bytes:
    """What a file holds after a crash: what was fsynced, and some of what was written after."""
    if luck == "kept" or file.durable == file.current:
        return file.current
    tail = file.current[len(file.durable) :]
    how = "none" if luck in ("lost", "names only") else rng.choice(["none", "all", "zeros", "cut", "holes"])
    if how == "all":
        return file.current
    if how == "zeros":
        return file.durable + bytes(len(tail))
    if how == "cut":
        return file.durable + tail[: rng.randrange(len(tail))]
    if how == "holes":
        sectors = [tail[i : i + SECTOR] for i in range(0, len(tail), SECTOR)]
        return file.durable + b"".join(s if rng.random() < 0.7 else bytes(len(s)) for s in sectors)
    return file.durable


def promises(trace: list[Operation], at: int) -> dict[str, list[bytes | None]]:
    """What may stand under each final name after ``at`` operations; None: it may be missing.

    A committed file must be there until the program itself begins to replace or remove it. A committed ``samples.h5``
    promises all that stands beside it and in ``shards`` at that moment, whoever wrote it: readers take the whole.
    """
    names: dict[str, int] = {}
    content: dict[int, bytes] = defaultdict(bytes)
    may: dict[str, list[bytes | None]] = {}
    for op in trace[:at]:
        if op.kind == "write":
            content[op.node] += op.data
        elif op.kind == "rename":
            may.setdefault(op.target, [None]).append(content[op.node])
            names[op.target] = op.node
        elif op.kind == "committed":
            may[op.path] = [content[op.node]]
            if op.path.endswith("/samples.h5"):
                may |= {name: [content[node]] for name, node in names.items()}
        elif op.kind == "unlink":
            may.setdefault(op.path, []).append(None)
            names.pop(op.path, None)
    return {name: allowed for name, allowed in may.items() if not hidden(name)}


def losses(trace: list[Operation], state: Crash) -> list[str]:
    """What a crash state breaks: committed files that are lost, and anything but a complete file under a final name."""
    may = promises(trace, state.at)
    broken = [f"{name} is lost" for name, allowed in may.items() if name not in state.files and None not in allowed]
    broken += [
        f"{name} holds what was never complete"
        for name, data in state.files.items()
        if not hidden(name) and data not in may.get(name, [])
    ]
    return broken


def hidden(name: str) -> bool:
    """Whether no reader looks at a file of this name."""
    return os.path.basename(name).startswith(".")  # noqa: PTH119


def final(trace: list[Operation]) -> dict[str, bytes]:
    """What the disk holds when nothing is lost; equal to the real folder if the trace is complete."""
    content: dict[int, bytes] = defaultdict(bytes)
    names: dict[str, int] = {}
    for op in trace:
        if op.kind == "create":
            names[op.path] = op.node
        elif op.kind == "write":
            content[op.node] += op.data
        elif op.kind in ("rename", "unlink"):
            del names[op.path]
            if op.kind == "rename":
                names[op.target] = op.node
    return {name: content[node] for name, node in names.items()}
