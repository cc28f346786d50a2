"""Manifests: lists of images as CSV, TSV or Parquet tables."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from store.errors import BadDataError, InputMissingError, UsageError, display
from store.tasks import ONE_LABEL, Task

from .files import Files, FolderFiles
from .samples import Sample, as_bytes, as_group, as_label, as_split, finished, in_words, leaves_root

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
log = logging.getLogger("penult.extractor")

COLUMNS = ("path", "label", "split", "group")
SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}

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

    @property
    def _is_parquet(self) -> bool:
        return Path(self.path).suffix.lower() == ".parquet"

    def samples(self) -> list[Sample]:
        names, records = self._parquet() if self._is_parquet else self._csv()
        header = self._known(names)
        if not Path(self.root).is_dir():
            message = f"the root {self.root} is not a folder"
            raise InputMissingError(message)
        samples: list[Sample] = []
        unit = "row" if self._is_parquet else "line"
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
        names = [name.strip() for name in names]
        header = [name.lower() if name.lower() in COLUMNS and name not in kept else name for name in names]
        for name in COLUMNS:
            if header.count(name) > 1:
                spelt = sorted({each for each, own in zip(names, header, strict=True) if own == name})
                message = f"{self.path}: two columns are called {' and '.join(map(repr, spelt))}; rename or remove one of them"
                raise BadDataError(message)
        return header

    def _group_column(self, header: Sequence[str]) -> str:
        """The name of the column of groups, which may not be there; empty if there is none.

        Raises:
            UsageError: ``group_by`` is a column but for its case.
        """
        if self.group_by is None:
            return "" if "group" in self.task.targets else "group"
        near = [name for name in header if name.lower() == self.group_by.lower()]
        if near and self.group_by not in header:
            message = f"--group-by {self.group_by!r}: {self.path} has the column {near[0]!r}; write it like that"
            raise UsageError(message)
        return self.group_by if self.group_by in header else ""

    def _reader(self, header: Sequence[str]) -> Any:
        """The function from the fields of one record to its sample; it raises ValueError saying what is wrong with them."""
        if "path" not in header:
            used = [word for mark, word in SEPARATORS.items() if len(header) == 1 and mark in header[0]]
            hint = f"; its columns look separated by {used[0]}: save it with commas" if used else ""
            where = "" if self._is_parquet else " in its first line"
            message = f"{self.path}: no column 'path'{where} (found: {', '.join(header) or 'nothing'}){hint}"
            raise BadDataError(message)
        if quoted := [name for name in header if name.startswith('"')]:
            message = f"{self.path}: a column is called {quoted[0]}: remove the blanks between its commas and quotation marks"
            raise BadDataError(message)
        columns = ("path", "label", "split", self._group_column(header))
        for name in (*columns, *self.task.targets):
            if header.count(name) > 1:
                message = f"{self.path}: two columns are called {name!r}"
                raise BadDataError(message)
        unused = [name for name in header if name not in (*columns, *self.task.targets)]
        if unused:
            log.warning("%s: these columns are not used: %s", self.path, in_words(list(map(repr, unused))))
        missing = [name for name in self.task.targets if name not in header]
        if missing:
            message = f"{self.path}: no column {missing[0]!r} for --target (found: {', '.join(header)})"
            raise BadDataError(message)
        path, label, split, group = (header.index(name) if name in header else None for name in columns)
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
                label=None if label is None else as_label(fields[label], self.task),
                split=None if split is None else as_split(fields[split]),
                group=b"" if group is None else as_group(fields[group]),
                targets=tuple(number(name, fields[place]) for name, place in targets),
            )

        return read

    def _checked(self, value: object) -> bytes:
        path = as_bytes(value)
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
        """The header, and the records with the line each ends in; blank lines are left out."""
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
        return list(header), rest

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
        """The header, and the records with the row each is, from 1; columns that are not used are not read, and are None."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                header: list[str] = list(file.schema_arrow.names)
                used = {*self.task.targets, self.group_by}
                columns: list[Iterable[Any]] = [
                    file.read(columns=[name]).column(0).to_pylist()
                    if name.strip() in used or name.strip().lower() in COLUMNS
                    else itertools.repeat(None, file.metadata.num_rows)
                    for name in header
                ]
        except OSError as error:
            message = f"cannot read {self.path}: {error.strerror or error}"
            raise (BadDataError if error.errno is None else InputMissingError)(message) from error
        except (pyarrow.ArrowException, ValueError) as error:
            message = f"{self.path} is not a valid Parquet file: {error}"
            raise BadDataError(message) from error
        return header, enumerate(zip(*columns, strict=True), start=1)
