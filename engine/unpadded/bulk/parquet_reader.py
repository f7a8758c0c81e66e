"""Rows of Parquet files, read one batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from unpadded.bulk.progress import ReadProgress
from unpadded.bulk.rows import Place, RowValues, check_columns
from unpadded.errors import InputError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BATCH_ROWS = 1024


def read_parquet(name: str, columns: list[str], skip: int, progress: ReadProgress) -> Iterator[RowValues]:
    """Yield the values of the columns of each row."""
    with open_parquet(name) as file:
        kind = column_types_of(file, name, columns)[0]
        if str(kind) not in ("string", "large_string", "string_view"):
            raise InputError(f"not a text column: {columns[0]!r} of {name!r} is {kind}; pass another with --column")
        row, size = 0, os.path.getsize(name)
        progress.track(lambda: size * row / (file.metadata.num_rows or 1))
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if row + group_rows <= skip:
                row += group_rows
                continue
            group_end = row + group_rows
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                first, skipped = row, min(max(0, skip - row), batch.num_rows)
                row += skipped
                for values in _batch_rows(batch, name, columns, first, skipped):
                    row += 1
                    yield values
            _check_count(name, row, group_end)
        _check_count(name, row, file.metadata.num_rows)


def _check_count(name: str, row: int, expected: int) -> None:
    if row != expected:  # page headers have no checksum
        raise InputError(f"the input is damaged: {name!r} ends a group at row {row} instead of {expected}; restore it")


def read_column_types(name: str, columns: Sequence[str]) -> list[Any]:
    """Return the Arrow types of columns."""
    with open_parquet(name) as file:
        return column_types_of(file, name, columns)


def column_types_of(file: pq.ParquetFile, name: str, columns: Sequence[str]) -> list[Any]:
    """Return the Arrow types of columns; of a dictionary, the type of its values."""
    schema = file.schema_arrow
    check_columns(name, columns, schema.names)
    types = [schema.field(column).type for column in columns]
    return [getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind for kind in types]


@contextmanager
def open_parquet(name: str) -> Iterator[pq.ParquetFile]:
    """Open a file and verify its pages' checksums. What pyarrow raises in the block becomes InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # The path as bytes: pyarrow encodes names strictly, and a name need not be UTF-8.
        with (
            pa.OSFile(os.fsencode(name)) as stored,
            pq.ParquetFile(stored, page_checksum_verification=True) as file,
        ):
            yield file
    except InputError:
        raise
    except pa.ArrowInvalid as error:
        raise InputError(f"not a Parquet file: {name!r} ({_one_line(error)}); check the file") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"the input cannot be read: {name!r} ({_one_line(error)}); check the file") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _batch_rows(batch: Any, name: str, columns: list[str], first_row: int, skip: int) -> Iterator[RowValues]:
    # By index, as a nested column can bring others of the same path.
    arrays = [batch.column(batch.schema.get_field_index(column)) for column in columns]
    for row in range(first_row + skip, first_row + batch.num_rows):
        place = Place(name, "row", row)
        try:
            values = [array[row - first_row].as_py() for array in arrays]
        except UnicodeDecodeError as error:
            yield place.reject(f"not UTF-8 ({error})", "; fix the text")
        except (ValueError, OverflowError) as error:  # such as a time that Python cannot represent
            yield place.reject(f"a value cannot be read ({error})", "; omit its column")
        else:
            null = place.reject("not a text", f" of {columns[0]!r} is null; use a string")
            yield null if values[0] is None else values
