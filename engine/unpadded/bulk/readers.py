"""Rows of files, read as a stream: each row is a text with its extra columns, or a rejected row with the reason."""

from __future__ import annotations

import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from unpadded.bulk.formats import STDIN, TEXT_EXTENSIONS, check_ending, extension, open_input
from unpadded.bulk.parquet_reader import read_column_types, read_parquet
from unpadded.bulk.progress import ReadProgress
from unpadded.bulk.rows import DEFAULT_COLUMN, ReadPosition, RejectedRow, Row, RowValues, unreadable
from unpadded.bulk.text_readers import read_csv, read_json, read_json_lines, read_lines, read_tsv
from unpadded.errors import InputError, OptionError

Reader: TypeAlias = Callable[[Any, str, list[str], int, ReadProgress], Iterator[RowValues]]
READERS: dict[str, Reader] = {
    **dict.fromkeys(TEXT_EXTENSIONS, read_lines),
    **dict.fromkeys((".jsonl", ".ndjson"), read_json_lines),
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}


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
            if isinstance(values, RejectedRow):
                yield values
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
    first = read_column_types(parquet[0], columns)
    for name in parquet[1:]:
        for column, kind, expected in zip(columns, read_column_types(name, columns), first, strict=True):
            if kind != expected:
                raise InputError(
                    f"column {column!r} is {kind} in {name!r} and {expected} in {parquet[0]!r}; convert one of them"
                )
    return first


def _read(name: str, columns: list[str], skip: int, progress: ReadProgress) -> Iterator[RowValues]:
    try:
        if name == STDIN:
            yield from read_lines(sys.stdin.buffer, "standard input", columns, skip, progress)
        elif extension(name) == ".parquet":
            yield from read_parquet(name, columns, skip, progress)
        else:
            check_ending(name)
            with open_input(name) as (file, stored):
                progress.track(lambda: 0 if stored.closed else stored.tell())
                yield from READERS[extension(name)](file, name, columns, skip, progress)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(name, error) from error


def read_ranges(path: str) -> np.ndarray:
    """Read the ranges [2, dimensions] of an .npy file."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the ranges cannot be read: {path!r} ({error}); pass an .npy of [2, dimensions]") from error
    if not isinstance(ranges, np.ndarray) or ranges.ndim != 2 or len(ranges) != 2:
        raise InputError(f"the ranges have the wrong shape: {path!r} {np.shape(ranges)}; pass [2, dimensions]")
    return ranges
