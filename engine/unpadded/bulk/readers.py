"""Rows of files, read as a stream: each row is a text with its extra columns, or a rejected row with the reason.

Formats: .jsonl (per line, an object that has the text column, or a string), .csv (with a header), .parquet (one row
group at a time), and any other file or `-` (one text per line; an empty line is an empty text). All except .parquet can
be gzipped, with the extension .gz.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from unpadded.bulk.progress import ReadProgress
from unpadded.errors import InputError, OptionError

DEFAULT_COLUMN = "text"
STDIN = "-"
TABLE_EXTENSIONS = (".jsonl", ".csv", ".parquet")  # the formats that have columns
PARQUET_BATCH_ROWS = 1024


class ReadPosition(NamedTuple):
    """The position at which reading starts or resumes."""

    rows_read: int = 0  # from all inputs
    input_index: int = 0
    row_in_input: int = 0  # rows read from that input


class Row(NamedTuple):
    number: int  # among the rows of all inputs, from 0
    input_index: int
    row_in_input: int  # from 1
    text: str
    extra_values: list[Any]  # of the extra columns
    reject_bytes: int = 0  # size of the rejects that precede it; set by the job

    @property
    def next_position(self) -> ReadPosition:
        """The position after this row."""
        return ReadPosition(self.number + 1, self.input_index, self.row_in_input)


class RejectedRow(NamedTuple):
    file: str
    row: int  # as in the error: a line from 1, or a row of .parquet from 0
    error: str


class _RowError(NamedTuple):
    row: int
    message: str


_RowValues: TypeAlias = "list[Any] | _RowError"  # the text, then the values of the extra columns


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Replace folders (by their files of known extensions, sorted) and patterns by files. Raises InputError."""
    files: list[str] = []
    for name in inputs:
        if name == STDIN or os.path.isfile(name):
            files.append(name)
        elif os.path.isdir(name):
            found = sorted(str(path) for path in Path(name).rglob("*") if path.is_file() and _is_input(path, name))
            if not found:
                raise InputError(
                    f"no .txt, .jsonl, .csv or .parquet file in the input folder: {name!r}; pass another, or files"
                )
            files += found
        elif os.path.exists(name):
            files.append(name)  # a pipe or a device
        elif glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                raise InputError(f"no file matches the input pattern: {name!r}; check it")
            files += found
        else:
            raise InputError(f"the input does not exist: {name!r}; pass a file, or - for standard input")
    return files


def extension(name: str) -> str:
    """Return the extension that selects the reader: in lower case, without .gz."""
    root, last = os.path.splitext(name.lower())
    return os.path.splitext(root)[1] if last == ".gz" else last


def is_gzip(name: str) -> bool:
    return name.lower().endswith(".gz")


def read_rows(
    inputs: Sequence[str],
    column: str = DEFAULT_COLUMN,
    extra_columns: Sequence[str] = (),
    start: ReadPosition | None = None,
    progress: ReadProgress | None = None,
) -> Iterator[Row | RejectedRow]:
    """Yield the rows of each input in order, from `start` on. Raises InputError for a file that cannot be read."""
    start = start or ReadPosition()
    progress = progress or ReadProgress(inputs)
    number = start.rows_read
    columns = [column, *extra_columns]
    for index in range(start.input_index, len(inputs)):
        progress.start_input(index)
        skip = start.row_in_input if index == start.input_index else 0
        for row_in_input, values in enumerate(_read(inputs[index], columns, skip, progress), skip + 1):
            if isinstance(values, _RowError):
                yield RejectedRow(inputs[index], values.row, values.message)
            else:
                yield Row(number, index, row_in_input, values[0], values[1:])
            number += 1
    progress.start_input(len(inputs))


def column_types(inputs: Sequence[str], columns: Sequence[str]) -> list[Any]:
    """Return the Arrow type of each column: its type in .parquet inputs, and string in others."""
    import pyarrow as pa

    if not columns:
        return []
    parquet = [name for name in inputs if extension(name) == ".parquet"]
    other = [name for name in inputs if extension(name) != ".parquet"]
    if not parquet:
        return [pa.string()] * len(columns)
    if other:
        raise OptionError(
            f"columns cannot be copied from .parquet and another format in one job: {parquet[0]!r}, {other[0]!r}; "
            "embed them in two jobs"
        )
    first = _parquet_types(parquet[0], columns)
    for name in parquet[1:]:
        for column, kind, expected in zip(columns, _parquet_types(name, columns), first, strict=True):
            if kind != expected:
                raise InputError(
                    f"column {column!r} is {kind} in {name!r} and {expected} in {parquet[0]!r}; convert one of them"
                )
    return first


def _is_input(path: Path, folder: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    name = str(path)
    known = extension(name) in (".txt", *TABLE_EXTENSIONS)
    return known and not hidden and not (is_gzip(name) and extension(name) == ".parquet")


def _parquet_types(name: str, columns: Sequence[str]) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(name)
    except pa.ArrowInvalid as error:
        raise _not_parquet(name, error) from error
    _check_columns(name, columns, schema.names)
    return [schema.field(column).type for column in columns]


def _not_parquet(name: str, error: Exception) -> InputError:
    return InputError(f"not a Parquet file: {name!r} ({error}); check the file")


def _check_columns(name: str, columns: Sequence[str], names: Sequence[str]) -> None:
    for column in columns:
        if column not in names:
            raise InputError(f"no column {column!r}: {name!r} has {_quoted(names)}; use one of these names")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _read(name: str, columns: list[str], skip: int, progress: ReadProgress) -> Iterator[_RowValues]:
    try:
        if name == STDIN:
            yield from _from_lines(sys.stdin.buffer, "standard input", skip)
        elif extension(name) == ".parquet":
            yield from _from_parquet(name, columns, skip, progress)
        else:
            with open(name, "rb") as stored, gzip.open(stored) if is_gzip(name) else stored as file:
                progress.track(lambda: 0 if stored.closed else stored.tell())
                if extension(name) == ".jsonl":
                    yield from _from_jsonl(file, name, columns, skip)
                elif extension(name) == ".csv":
                    yield from _from_csv(file, name, columns, skip)
                else:
                    yield from _from_lines(file, name, skip)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the input cannot be read: {name!r} ({reason}); check the file") from error


def _from_lines(file: Iterable[bytes], name: str, skip: int) -> Iterator[_RowValues]:
    for number, line in enumerate(islice(file, skip, None), skip + 1):
        text = _decode(line, name, number)
        yield text if isinstance(text, _RowError) else [text]


def _from_jsonl(file: Iterable[bytes], name: str, columns: list[str], skip: int) -> Iterator[_RowValues]:
    for number, line in enumerate(islice(file, skip, None), skip + 1):
        text = _decode(line, name, number)
        yield text if isinstance(text, _RowError) else _from_json(text, name, number, columns)


def _from_json(line: str, name: str, number: int, columns: list[str]) -> _RowValues:
    where = f"{name!r} line {number}"

    def not_text(value: object) -> _RowError:
        return _RowError(number, f"not a text: {where}: {str(value)[:80]!r}; use a string for {columns[0]!r}")

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _RowError(number, f"not JSON ({error}): {where}: {line[:80]!r}; fix the line")
    if isinstance(row, str) and len(columns) == 1:
        row = {columns[0]: row}
    if not isinstance(row, dict):
        return not_text(row)
    for column in columns:
        if column not in row:
            return _RowError(number, f"no field {column!r}: {where} has {_quoted(row)}; use one of these names")
    text, *extra = (row[column] for column in columns)
    if not isinstance(text, str):
        return not_text(text)
    values = [text, *(value if value is None or isinstance(value, str) else json.dumps(value) for value in extra)]
    return _check_unicode(values, where, number)


def _from_csv(file: BinaryIO | gzip.GzipFile, name: str, columns: list[str], skip: int) -> Iterator[_RowValues]:
    csv.field_size_limit(sys.maxsize)  # the default is 131,072 characters; documents may be longer
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as lines:
        records = csv.reader(lines)
        try:
            header = next(records, [])
            _check_columns(name, columns, header)
            indices = [header.index(column) for column in columns]
            for fields in islice((fields for fields in records if fields), skip, None):
                number = records.line_num
                where = f"{name!r} line {number}"
                if len(fields) == len(header):
                    yield _check_unicode([fields[index] for index in indices], where, number)
                else:
                    counts = f"{len(fields)} fields for {len(header)} columns"
                    yield _RowError(number, f"{counts}: {where}; fix the line, or quote the field that has a comma")
        except csv.Error as error:
            raise InputError(f"not CSV ({error}): {name!r} line {records.line_num}; fix the file") from error


def _from_parquet(name: str, columns: list[str], skip: int, progress: ReadProgress) -> Iterator[_RowValues]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            schema = file.schema_arrow
            _check_columns(name, columns, schema.names)
            kind = schema.field(columns[0]).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"not a text column: {columns[0]!r} of {name!r} is {kind}; pass another with --column")
            row, size = 0, os.path.getsize(name)
            progress.track(lambda: size * row / (file.metadata.num_rows or 1))
            for group in range(file.num_row_groups):
                group_rows = file.metadata.row_group(group).num_rows
                if row + group_rows <= skip:
                    row += group_rows
                    continue
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    first, skipped = row, min(max(0, skip - row), batch.num_rows)
                    row += skipped
                    for values in _from_batch(batch, name, columns, first, skipped):
                        row += 1
                        yield values
    except pa.ArrowInvalid as error:
        raise _not_parquet(name, error) from error


def _from_batch(batch: Any, name: str, columns: list[str], first_row: int, skip: int) -> Iterator[_RowValues]:
    for row in range(first_row + skip, first_row + batch.num_rows):
        where = f"{name!r} row {row}"
        try:
            values = [batch.column(column)[row - first_row].as_py() for column in columns]
        except UnicodeDecodeError as error:
            yield _RowError(row, f"not UTF-8 ({error}): {where}; fix the text")
            continue
        if values[0] is None:
            yield _RowError(row, f"not a text: {where} of {columns[0]!r} is null; use a string")
        else:
            yield values


def _decode(line: bytes, name: str, number: int) -> str | _RowError:
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        return _RowError(number, f"not UTF-8 ({error}): {name!r} line {number}; save the file as UTF-8")
    return text.removeprefix("\ufeff") if number == 1 else text


def _check_unicode(values: list[Any], where: str, number: int) -> _RowValues:
    """Return the values, or an error if one has a lone surrogate: a JSON escape, or a byte that is not UTF-8."""
    for value in values:
        try:
            if value is not None:
                value.encode()
        except UnicodeEncodeError as error:
            return _RowError(number, f"not UTF-8 ({error}): {where}: {value[:80]!r}; fix the text")
    return values
