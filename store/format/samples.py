"""The sample table: path, content hash, label, split, group and outcome of every input of a dataset."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import BadDataError, CorruptCacheError, display
from store.tasks import MISSING, ONE_LABEL, TASKS, RegressionTask, Task

from . import hdf5, json_text

ENCODING_TYPE = "penult-samples"
FACTS = {  # what is read of the facts
    "root": str,
    "source?": (str, None),
    "task?": str,
    "split?": dict,
    "group_by?": str,
    "budget_exceeded?": bool,
    "extract_seconds?": float,
    "extract_cost?": ({"peak_memory?": (float, None), "energy?": (float, None)}, None),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One input and its outcome. ``code`` is None if it is ok; ``sha256`` is 32 bytes, or empty if the file was not read."""

    path: bytes
    label: str | None = None
    split: str | None = None
    group: bytes = b""
    sha256: bytes = b""
    code: str | None = None
    message: str = ""
    stat: tuple[int, int, int] = (0, 0, 0)
    targets: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        return self.code is None

    @property
    def name(self) -> str:
        """The path as printable text, for messages and JSON: undecodable bytes and control characters are escaped."""
        return display(self.path)

    def with_split(self, split: str | None) -> Row:
        """The row in another split (`dataclasses.replace` takes three times as long, which matters for 200,000 rows)."""
        return Row(self.path, self.label, split, self.group, self.sha256, self.code, self.message, self.stat, self.targets)


@dataclass(frozen=True)
class SampleTable:
    """All rows, ordered by path.

    Attributes:
        rows: one per input.
        facts: JSON facts about the table: ``root``, ``source``, ``task``, ``split`` (how it was made), ``group_by``,
            ``budget_exceeded``.
        target_names: of the numbers in each row's ``targets``.
    """

    rows: Sequence[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    target_names: Sequence[str] = ()

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return Path(os.fsdecode(bytes.fromhex(self.facts["root"])))

    @property
    def counts(self) -> dict[str, int]:
        """inputs, ok, duplicates, failed; ok + duplicates + failed = inputs, always."""
        good = [row.sha256 for row in self.rows if row.ok]
        unique = len(set(good))
        return {
            "inputs": len(self.rows),
            "ok": unique,
            "duplicates": len(good) - unique,
            "failed": len(self.rows) - len(good),
        }

    @cached_property
    def task(self) -> Task:
        """The prediction task of the labels.

        Raises:
            BadDataError: a newer penult wrote the table, with a task that this one does not know.
        """
        name = str(self.facts.get("task", ONE_LABEL.name))
        if name not in TASKS:
            message = f"the task {name!r} is none of {', '.join(TASKS)}; a newer penult may know it"
            raise BadDataError(message)
        return TASKS[name](tuple(self.target_names))

    @property
    def classes(self) -> list[str]:
        """The distinct labels of the ok rows, sorted."""
        return sorted({label for row in self.rows if row.ok for label in self.task.labels_of(row)})

    @property
    def outputs(self) -> list[str]:
        """The names of a head's outputs: the labels, or the numeric targets."""
        return self.task.outputs(self.classes)

    def truth(self, rows: Sequence[Row], names: Sequence[str] | None = None) -> NDArray[Any]:
        """`Task.truth` of rows of this table; the names are `outputs` by default."""
        return self.task.truth(rows, self.outputs if names is None else names)

    def splits(self) -> list[str]:
        """The distinct splits of the ok rows, in the order train, val, test, others."""
        order = {"train": 0, "val": 1, "test": 2}
        return sorted({row.split for row in self.rows if row.ok and row.split}, key=lambda s: (order.get(s, 3), s))

    def to_bytes(self) -> bytes:
        """The complete HDF5 file."""
        facts = json.dumps(self.facts, sort_keys=True)
        return hdf5.build(ENCODING_TYPE, self.datasets(), {"rows": len(self.rows), "facts": facts})[0]

    def datasets(self) -> dict[str, NDArray[Any]]:
        """The columns as FORMAT.md specifies them."""
        rows = self.rows
        digests = b"".join(row.sha256 or bytes(32) for row in rows)
        datasets: dict[str, NDArray[Any]] = {
            "status": np.array([not row.ok for row in rows], np.uint8),
            "sha256": np.frombuffer(digests, np.uint8).reshape(len(rows), 32),
            "stat": np.array([row.stat for row in rows], np.int64).reshape(len(rows), 3),
            **hdf5.pack_strings("path", [row.path for row in rows]),
            **hdf5.pack_strings("group", [row.group for row in rows]),
            **hdf5.pack_strings("message", [row.message.encode() for row in rows]),
        }
        for name in ("label", "split", "code"):
            values = [getattr(row, name) for row in rows]
            names = sorted({value for value in values if value is not None})
            index = {value: i for i, value in enumerate(names)}
            datasets[name] = np.array([index.get(value, -1) for value in values], np.int32)
            datasets |= hdf5.pack_strings(f"{name}-names", [value.encode() for value in names])
        if self.target_names:
            datasets["targets"] = np.array([row.targets for row in rows], np.float64).reshape(len(rows), len(self.target_names))
            datasets |= hdf5.pack_strings("target-names", [name.encode() for name in self.target_names])
        return datasets

    @classmethod
    def read(cls, path: Path, encoding_type: str = ENCODING_TYPE) -> SampleTable:
        """Read ``samples.h5``, or the same columns of a compact file, and check its digest.

        Raises:
            InputMissingError: there is none.
            CorruptCacheError: it is damaged or its columns disagree.
        """
        hdf5.verify(path, encoding_type)
        with hdf5.open_checked(path, encoding_type) as (datasets, attrs):
            n = int(attrs["rows"])
            paths, groups, messages = (hdf5.unpack_strings(datasets, name) for name in ("path", "group", "message"))
            digests = datasets["sha256"][()].tobytes()
            stats = datasets["stat"][()].tolist()
            columns = {}
            for name in ("label", "split", "code"):
                names = [None, *(value.decode() for value in hdf5.unpack_strings(datasets, f"{name}-names"))]
                places = datasets[name][()]
                if places.shape != (n,) or places.dtype.kind not in "iu":
                    message = f"{path}: {name!r} has type {places.dtype} and shape {places.shape}; expected {n} whole numbers"
                    raise CorruptCacheError(message)
                if places.size and not -1 <= places.min() <= places.max() < len(names) - 1:
                    message = f"{path}: {name!r} points outside its {len(names) - 1} names"
                    raise CorruptCacheError(message)
                columns[name] = [names[i + 1] for i in places.tolist()]
            shapes = (datasets["sha256"].shape, datasets["stat"].shape, datasets["status"].shape)
            failed = [code is not None for code in columns["code"]]
            if shapes != ((n, 32), (n, 3), (n,)) or datasets["status"][()].astype(bool).tolist() != failed:
                message = f"{path}: its columns of shapes {shapes} and its {sum(failed)} failures do not fit together"
                raise CorruptCacheError(message)
            names_of_targets, targets = _targets(path, datasets, n)
            facts = json.loads(str(attrs["facts"]))
            _require_facts(path, facts, names_of_targets)
            lengths = {
                len(paths),
                len(groups),
                len(messages),
                len(digests) // 32,
                len(stats),
                *map(len, columns.values()),
            }
            if lengths != {n}:
                message = f"{path}: columns of {sorted(lengths)} rows; expected {n}"
                raise CorruptCacheError(message)
            rows = [
                Row(
                    path=check_relative(paths[i]),
                    label=columns["label"][i],
                    split=columns["split"][i],
                    group=groups[i],
                    sha256=digests[32 * i : 32 * i + 32] if any(digests[32 * i : 32 * i + 32]) else b"",
                    code=columns["code"][i],
                    message=messages[i].decode(),
                    stat=tuple(stats[i]),
                    targets=targets[i],
                )
                for i in range(n)
            ]
            _require_rows(path, paths, datasets["sha256"][()].any(axis=1) | np.array(failed, bool))
            return cls(sorted(rows, key=lambda row: row.path), facts, names_of_targets)


def _targets(path: Path, datasets: Any, n: int) -> tuple[list[str], list[tuple[float, ...]]]:
    """Names of the numeric targets and the numbers of each row; both empty in a table without any."""
    if "targets" not in datasets:
        return [], [()] * n
    names = [name.decode() for name in hdf5.unpack_strings(datasets, "target-names")]
    values = datasets["targets"]
    if values.shape != (n, len(names)) or values.dtype != np.float64:
        message = f"{path}: targets {values.shape} of type {values.dtype} do not fit {n} rows and {len(names)} names"
        raise CorruptCacheError(message)
    if np.isinf(values[()]).any():
        message = f"{path}: the targets {', '.join(map(repr, names))} have an infinite number"
        raise CorruptCacheError(message)
    return names, [tuple(MISSING if v != v else v for v in row) for row in values[()].tolist()]


def _require_facts(path: Path, facts: Any, targets: Sequence[str]) -> None:
    """Refuse facts about a table that are not what its readers rely on."""
    reason = json_text.misfit(facts, FACTS, "facts")
    if not reason:
        task, root = facts.get("task", ONE_LABEL.name), facts["root"]
        if task not in TASKS:
            reason = f"the task {task!r} is none of {', '.join(TASKS)}; a newer penult may know it"
        elif TASKS[task] is RegressionTask and not targets:
            reason = f"the task {task!r} needs a target, and the table has none"
        elif len(set(targets)) < len(targets):
            reason = f"it names a target twice: {', '.join(map(repr, targets))}"
        elif re.fullmatch("(?:[0-9a-fA-F]{2})*", root) is None or b"\0" in bytes.fromhex(root):
            reason = f"the root {root[:80]!r} is not a folder's name in hexadecimal digits"
    if reason:
        message = f"{path}: {reason}"
        raise CorruptCacheError(message)


def _require_rows(path: Path, paths: Sequence[bytes], known: NDArray[np.bool_]) -> None:
    """Refuse a table that has a path twice, or an image without the digest that its features are found by."""
    if len(set(paths)) < len(paths):
        counts = Counter(paths)
        message = f"{path} has the path {display(next(each for each in paths if counts[each] > 1))!r} twice"
        raise CorruptCacheError(message)
    if not known.all():
        message = f"{path}: {display(paths[int(np.argmin(known))])!r} is ok and has no digest of its content"
        raise CorruptCacheError(message)


def check_relative(path: bytes) -> bytes:
    """Return a stored path if it stays below the root.

    Raises:
        CorruptCacheError: it is empty, absolute, has a NUL or a ``..``.
    """
    if not path or path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/"):
        message = f"the path {display(path)!r} leaves the dataset's root; refused"
        raise CorruptCacheError(message)
    return path
