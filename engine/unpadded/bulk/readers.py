"""Rows of files, read as a stream: each a text with the columns beside it, or what is wrong with it.

.jsonl (an object with the column, or a string, per line), .csv (with a header), .parquet (row groups one by one), `-`
and any other file (a text per line; an empty line is an empty text). All but .parquet may be gzipped, and then end in
.gz.
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

from unpadded.bulk.progress import Meter
from unpadded.errors import InputError, OptionError

DEFAULT_COLUMN = "text"
STDIN = "-"
TABLES = (".jsonl", ".csv", ".parquet")  # what has columns
PARQUET_BATCH_ROWS = 1024


class Place(NamedTuple):
    """Where reading goes on: rows of all inputs behind it, the input, and the rows of that input behind it."""

    number: int = 0
    source: int = 0
    row: int = 0


class Row(NamedTuple):
    number: int  # among the rows of all inputs, from 0
    source: int  # which input
    row: int  # rows of that input, this one included
    text: str
    beside: list[Any]  # the values of the columns asked for
    reject_bytes: int = 0  # of the rejects before it; set by the job


class Broken(NamedTuple):
    number: int
    source: str  # the input's name
    row: int  # as the error names it: a line from 1, or a row of .parquet from 0
    error: str


class _Fault(NamedTuple):
    row: int
    error: str


_Values: TypeAlias = "list[Any] | _Fault"  # the text, then the columns beside it


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Files for folders (all that are known by their ending, sorted) and patterns. Raises InputError."""
    files: list[str] = []
    for name in inputs:
        if name == STDIN or os.path.isfile(name):
            files.append(name)
        elif os.path.isdir(name):
            found = sorted(str(path) for path in Path(name).rglob("*") if path.is_file() and _is_offered(path, name))
            if not found:
                raise InputError(
                    f"the input is a folder: {name!r} without .txt, .jsonl, .csv or .parquet; give another, or files"
                )
            files += found
        elif not os.path.exists(name) and glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                raise InputError(f"no file is named like the input: {name!r}; check the pattern")
            files += found
        elif os.path.exists(name):
            files.append(name)  # a pipe or a device
        else:
            raise InputError(f"the input does not exist: {name!r}; give a file, or - for standard input")
    return files


def ending(name: str) -> str:
    """How a file is read: its ending in lower case, before .gz."""
    root, last = os.path.splitext(name.lower())
    return os.path.splitext(root)[1] if last == ".gz" else last


def is_gzip(name: str) -> bool:
    return name.lower().endswith(".gz")


def read_rows(
    inputs: Sequence[str],
    column: str = DEFAULT_COLUMN,
    beside: Sequence[str] = (),
    start: Place | None = None,
    meter: Meter | None = None,
) -> Iterator[Row | Broken]:
    """Yield the rows of each input, in order, from a place on. Raises InputError for a file that cannot be read."""
    start = start or Place()
    meter = meter or Meter(inputs)
    number = start.number
    columns = [column, *beside]
    for source in range(start.source, len(inputs)):
        meter.enter(source)
        skip = start.row if source == start.source else 0
        for row, values in enumerate(_read(inputs[source], columns, skip, meter), skip + 1):
            if isinstance(values, _Fault):
                yield Broken(number, inputs[source], values.row, values.error)
            else:
                yield Row(number, source, row, values[0], values[1:])
            number += 1
    meter.enter(len(inputs))


def column_types(inputs: Sequence[str], columns: Sequence[str]) -> list[Any]:
    """The Arrow type of each column: that of .parquet inputs, else string."""
    import pyarrow as pa

    if not columns:
        return []
    parquet = [name for name in inputs if ending(name) == ".parquet"]
    other = [name for name in inputs if ending(name) != ".parquet"]
    if not parquet:
        return [pa.string()] * len(columns)
    if other:
        raise OptionError(
            f"columns of .parquet and of another kind cannot be carried together: {parquet[0]!r}, {other[0]!r}; "
            "run them one after the other"
        )
    first = _parquet_types(parquet[0], columns)
    for name in parquet[1:]:
        for column, kind, expected in zip(columns, _parquet_types(name, columns), first, strict=True):
            if kind != expected:
                raise InputError(
                    f"column {column!r} is {kind} in {name!r} and {expected} in {parquet[0]!r}; give them one type"
                )
    return first


def _is_offered(path: Path, folder: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    name = str(path)
    return not hidden and ending(name) in (".txt", *TABLES) and not (is_gzip(name) and ending(name) == ".parquet")


def _parquet_types(name: str, columns: Sequence[str]) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(name)
    except pa.ArrowInvalid as error:
        raise InputError(f"not a parquet file: {name!r} ({error}); write it again") from error
    _check_names(name, columns, schema.names)
    return [schema.field(column).type for column in columns]


def _check_names(name: str, columns: Sequence[str], names: Sequence[str]) -> None:
    for column in columns:
        if column not in names:
            fields = ", ".join(map(repr, names)) or "none"
            raise InputError(f"no column {column!r}: {name!r} has {fields}; name one of them")


def _read(name: str, columns: list[str], skip: int, meter: Meter) -> Iterator[_Values]:
    try:
        if name == STDIN:
            yield from _from_lines(sys.stdin.buffer, "standard input", skip)
        elif ending(name) == ".parquet":
            yield from _from_parquet(name, columns, skip, meter)
        else:
            with open(name, "rb") as stored, gzip.open(stored) if is_gzip(name) else stored as file:
                meter.follow(lambda: 0 if stored.closed else stored.tell())
                if ending(name) == ".jsonl":
                    yield from _from_jsonl(file, name, columns, skip)
                elif ending(name) == ".csv":
                    yield from _from_csv(file, name, columns, skip)
                else:
                    yield from _from_lines(file, name, skip)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the input cannot be read: {name!r} ({reason}); check the file") from error


def _from_lines(file: Iterable[bytes], name: str, skip: int) -> Iterator[_Values]:
    for number, line in enumerate(islice(file, skip, None), skip + 1):
        text = _decode(line, name, number)
        yield text if isinstance(text, _Fault) else [text]


def _from_jsonl(file: Iterable[bytes], name: str, columns: list[str], skip: int) -> Iterator[_Values]:
    for number, line in enumerate(islice(file, skip, None), skip + 1):
        text = _decode(line, name, number)
        yield text if isinstance(text, _Fault) else _from_json(text, name, number, columns)


def _from_json(line: str, name: str, number: int, columns: list[str]) -> _Values:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Fault(number, f"not JSON ({error}): {name!r} line {number}: {line[:80]!r}; mend the line")
    if isinstance(row, str) and len(columns) == 1:
        row = {columns[0]: row}
    if not isinstance(row, dict):
        return _Fault(number, f"not a text: {name!r} line {number}: {str(row)[:80]!r}; give a string in {columns[0]!r}")
    for column in columns:
        if column not in row:
            fields = ", ".join(map(repr, row)) or "none"
            return _Fault(
                number, f"no field {column!r}: {name!r} line {number} has {fields}; name one of them, such as --column"
            )
    text, *beside = (row[column] for column in columns)
    if not isinstance(text, str):
        return _Fault(
            number, f"not a text: {name!r} line {number}: {str(text)[:80]!r}; give a string in {columns[0]!r}"
        )
    values = [text, *(value if value is None or isinstance(value, str) else json.dumps(value) for value in beside)]
    return _encodable(values, f"{name!r} line {number}", number)


def _from_csv(file: BinaryIO | gzip.GzipFile, name: str, columns: list[str], skip: int) -> Iterator[_Values]:
    csv.field_size_limit(sys.maxsize)  # of 131,072 characters: a document may be longer
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as lines:
        records = csv.reader(lines)
        try:
            header = next(records, [])
            _check_names(name, columns, header)
            places = [header.index(column) for column in columns]
            for fields in islice((fields for fields in records if fields), skip, None):
                number = records.line_num
                if len(fields) != len(header):
                    yield _Fault(
                        number,
                        f"{len(fields)} fields under {len(header)} columns: {name!r} line {number}; mend or quote it",
                    )
                else:
                    yield _encodable([fields[place] for place in places], f"{name!r} line {number}", number)
        except csv.Error as error:
            raise InputError(f"not CSV ({error}): {name!r} line {records.line_num}; mend the file") from error


def _from_parquet(name: str, columns: list[str], skip: int, meter: Meter) -> Iterator[_Values]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            schema = file.schema_arrow
            _check_names(name, columns, schema.names)
            kind = schema.field(columns[0]).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(
                    f"not a column of texts: {columns[0]!r} of {name!r} is {kind}; name another with --column"
                )
            row, size = 0, os.path.getsize(name)
            meter.follow(lambda: size * row / (file.metadata.num_rows or 1))
            for group in range(file.num_row_groups):
                group_rows = file.metadata.row_group(group).num_rows
                if row + group_rows <= skip:
                    row += group_rows
                    continue
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    first, behind = row, min(max(0, skip - row), batch.num_rows)
                    row += behind
                    for values in _from_batch(batch, name, columns, first, behind):
                        row += 1
                        yield values
    except pa.ArrowInvalid as error:
        raise InputError(f"not a parquet file: {name!r} ({error}); write it again") from error


def _from_batch(batch: Any, name: str, columns: list[str], first_row: int, skip: int) -> Iterator[_Values]:
    for index in range(skip, batch.num_rows):
        where = f"{name!r} row {first_row + index}"
        try:
            values = [batch.column(column)[index].as_py() for column in columns]
        except UnicodeDecodeError as error:
            yield _Fault(first_row + index, f"not UTF-8 ({error}): {where}; write it again")
            continue
        if values[0] is None:
            yield _Fault(first_row + index, f"not a text: {where} of {columns[0]!r} is null; give a string")
        else:
            yield values


def _decode(line: bytes, name: str, number: int) -> str | _Fault:
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        return _Fault(number, f"not UTF-8 ({error}): {name!r} line {number}; save the file as UTF-8")
    return text.removeprefix("\ufeff") if number == 1 else text


def _encodable(values: list[Any], where: str, number: int) -> _Values:
    """The values, unless one holds a surrogate alone: from a JSON escape, or in place of a byte that is not UTF-8."""
    for value in values:
        try:
            if value is not None:
                value.encode()
        except UnicodeEncodeError as error:
            return _Fault(number, f"not UTF-8 ({error}): {where}: {value[:80]!r}; mend the text")
    return values
