"""Manifests: lists of images as CSV, TSV or Parquet tables."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from store.errors import BadDataError, InputMissingError, display
from store.tasks import ONE_LABEL, Task, as_text

from .files import Files, FolderFiles
from .samples import SHOWN, Sample, as_split, finished, leaves_root

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
log = logging.getLogger("penult.extractor")

COLUMNS = ("path", "label", "split", "group")
NAN = {"nan", "NaN"}  # how pandas writes an empty cell
NAN_LABEL = "the label is nan, which pandas writes for an empty cell: leave the cell empty, or rename the class"

Record = tuple[int, Sequence[Any]]  # line or row, from 1, and its fields


@dataclass(frozen=True)
class Manifest:
    """A CSV or Parquet file with columns ``path``, and optionally ``label``, ``split``, ``group`` and numeric targets.

    The case of these four names does not matter. Other columns are ignored, and named in a warning. Text is UTF-8, with or
    without a byte-order mark, or UTF-16 with one; bytes that are not UTF-8 survive in paths. A Parquet column of paths may be
    binary.

    Args:
        path: the file.
        root: the folder that paths are relative to; by default the folder of the manifest.
        group_by: a column, or a regular expression over the path.
        follow_symlinks: read images outside the root that symbolic links lead to.
        task: what labels mean, and which columns are numeric targets.
    """

    path: Path
    root: Path
    group_by: str | None = None
    follow_symlinks: bool = False
    task: Task = ONE_LABEL

    @property
    def files(self) -> Files:
        return FolderFiles(self.root, confined=not self.follow_symlinks)

    @property
    def origin(self) -> None:
        return None

    def samples(self) -> list[Sample]:
        parquet = Path(self.path).suffix.lower() == ".parquet"
        names, records = self._parquet() if parquet else self._csv()
        header = self._known(names)
        if not Path(self.root).is_dir():
            message = f"the root {self.root} is not a folder"
            raise InputMissingError(message)
        samples: list[Sample] = []
        unit = "row" if parquet else "line"
        lines: dict[bytes, int] = {}
        read = self._reader(header)
        for line, fields in records:
            if len(fields) != len(header):
                self._refuse(f"{unit} {line}", f"{'more' if len(fields) > len(header) else 'fewer'} fields than the header has")
            try:
                sample = read(fields)
            except ValueError as error:
                self._refuse(f"{unit} {line}", str(error))
            first = lines.setdefault(sample.path, line)
            if first != line:
                self._refuse(f"{unit} {line}", f"{display(sample.path)} is already in {unit} {first}")
            samples.append(sample)
        return finished(samples, self.path, None if self.group_by in header else self.group_by, self.task)

    def _refuse(self, place: str, what: str) -> NoReturn:
        message = f"{self.path}, {place}: {what}"
        raise BadDataError(message)

    def _known(self, names: Sequence[str]) -> list[str]:
        """The header with our own columns in lower case: a spreadsheet may call them ``Path`` or ``SPLIT``.

        Raises:
            BadDataError: two columns would be the same.
        """
        kept = {*self.task.targets, self.group_by}  # these are asked for as they are written
        header = [name.lower() if name.lower() in COLUMNS and name not in kept else name for name in names]
        for name in COLUMNS:
            if header.count(name) > 1:
                spelt = sorted({each for each, own in zip(names, header, strict=True) if own == name})
                message = f"{self.path}: two columns are called {' and '.join(map(repr, spelt))}; rename or remove one of them"
                raise BadDataError(message)
        return header

    def _reader(self, header: Sequence[str]) -> Any:
        """The function from the fields of one record to its sample; it raises ValueError saying what is wrong with them."""
        if "path" not in header:
            hint = "; its columns look separated by ';': save it with commas" if len(header) == 1 and ";" in header[0] else ""
            message = f"{self.path}: no column 'path' in its first line (found: {', '.join(header) or 'nothing'}){hint}"
            raise BadDataError(message)
        group_column = self.group_by if self.group_by and self.group_by in header else "group"
        for name in (group_column, *self.task.targets):
            if header.count(name) > 1:
                message = f"{self.path}: two columns are called {name!r}"
                raise BadDataError(message)
        unused = [name for name in header if name not in (*COLUMNS, group_column, *self.task.targets)]
        if unused:
            shown = ", ".join(map(repr, unused[:SHOWN])) + (f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else "")
            log.warning("%s: these columns are not used: %s", self.path, shown)
        missing = [name for name in self.task.targets if name not in header]
        if missing:
            message = f"{self.path}: no column {missing[0]!r} for --target (found: {', '.join(header)})"
            raise BadDataError(message)
        path, label, split, group = (
            header.index(name) if name in header else None for name in ("path", "label", "split", group_column)
        )
        targets = [(name, header.index(name)) for name in self.task.targets]

        def number(name: str, value: object) -> float:
            try:
                return self.task.number(value)
            except ValueError as error:
                message = f"{name}: {error}"
                raise ValueError(message) from None

        def read(fields: Sequence[Any]) -> Sample:
            return Sample(
                path=self._checked(fields[path or 0]),
                label=None if label is None else self._label(fields[label]),
                split=None if split is None else as_split(fields[split]),
                group=b"" if group is None else _raw(fields[group]).strip(),
                targets=tuple(number(name, fields[place]) for name, place in targets),
            )

        return read

    def _label(self, value: object) -> str | None:
        """The label of a cell, which is a name or empty; where numbers are predicted it may be any text."""
        is_nan = isinstance(value, float) and math.isnan(value)
        label = None if is_nan else self.task.label(value)
        if is_nan or (not self.task.targets and not NAN.isdisjoint(self.task.labels_of(Sample(b"", label)))):
            raise ValueError(NAN_LABEL)
        return label

    def _checked(self, value: object) -> bytes:
        path = _raw(value)
        if b"//" in path or b"./" in path:  # two spellings of one path are one path
            path = b"/" * path.startswith(b"/") + b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
        if not path.strip():
            message = "empty path"
            raise ValueError(message)
        if leaves_root(path):
            message = f"{display(path)} leaves the root; paths are relative to {self.root} (see --root)"
            raise ValueError(message)
        return path

    def _csv(self) -> tuple[list[str], Iterable[Record]]:
        """The header, its names stripped, and the records with the line each ends in; blank lines are left out."""
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            message = f"cannot read {self.path}: {error.strerror}"
            raise InputMissingError(message) from error
        # Neither str.splitlines nor universal newlines: names may hold U+2028 or, in quotes, a carriage return.
        delimiter = "\t" if Path(self.path).suffix.lower() == ".tsv" else ","
        reader = csv.reader(io.StringIO(self._decoded(data), newline=""), delimiter=delimiter, strict=True)

        def records() -> Iterator[Record]:
            try:
                for fields in reader:
                    if fields:
                        yield reader.line_num, fields
            except csv.Error as error:
                self._refuse(f"line {reader.line_num}", str(error))

        rest = records()
        _, header = next(rest, (0, []))
        return [name.strip() for name in header], rest

    def _decoded(self, data: bytes) -> str:
        wide = data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))  # the former begins like UTF-16's
        if not wide and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            try:
                return data.decode("utf-16")
            except UnicodeDecodeError as error:
                message = f"{self.path} begins like UTF-16 but is not valid ({error.reason}); save it as UTF-8"
                raise BadDataError(message) from error
        if wide or b"\0" in data[:4]:
            message = f"{self.path} looks like UTF-32, or like UTF-16 without a byte-order mark; save it as UTF-8"
            raise BadDataError(message)
        return data.decode("utf-8-sig", "surrogateescape")

    def _parquet(self) -> tuple[list[str], Iterable[Record]]:
        """The header, and the records with the row each is, from 1."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                known = {*self.task.targets, self.group_by}
                header = [name for name in file.schema_arrow.names if name in known or name.lower() in COLUMNS]
                if "path" not in map(str.lower, header):
                    return list(file.schema_arrow.names), []
                columns = [file.read(columns=[name]).column(0).to_pylist() for name in header]
        except OSError as error:
            message = f"cannot read {self.path}: {error.strerror or error}"
            raise (BadDataError if error.errno is None else InputMissingError)(message) from error
        except (pyarrow.ArrowException, ValueError) as error:
            message = f"{self.path} is not a valid Parquet file: {error}"
            raise BadDataError(message) from error
        return header, enumerate(zip(*columns, strict=True), start=1)


def _raw(value: object) -> bytes:
    """A path or a group: the bytes as they are."""
    if isinstance(value, bytes):
        return value
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else as_text(value).encode()
