"""Writers that append blocks of vectors to an open file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from unpadded.bulk.atomic_files import write_error
from unpadded.bulk.results import arrow_columns
from unpadded.bulk.rows import RejectedRow, Row
from unpadded.errors import OptionError

GROUP_ROWS = 4096  # texts per Parquet row group: small groups make files slow to read
LARGE_GROUP_ROWS = 256  # of spans and token vectors, of which a text has many
DESCRIPTION_KEY = "unpadded"  # in the metadata of a Parquet schema


class Block(NamedTuple):
    """Consecutive rows and their results."""

    rows: Sequence[Row]
    values: Any  # np.ndarray [rows, dimensions] or Ragged
    token_counts: np.ndarray  # [rows]
    truncated: np.ndarray  # [rows]

    def slice(self, start: int, stop: int) -> Block:
        return Block._make(part[start:stop] for part in self)


class Writer(Protocol):
    def write(self, block: Block) -> None:
        """Append the rows of a block."""

    def finish(self) -> None:
        """Write what completes the file."""


class OutputColumns(NamedTuple):
    """The columns of an output that are copied from the inputs, and what its results are."""

    id_column: str | None = None  # None: the id is the row's number among all inputs
    carried_columns: tuple[str, ...] = ()
    types: tuple[Any, ...] = ()  # Arrow types of `extra_columns`
    precision: str = "float32"
    result: str = "vectors"  # a key of RESULT_COLUMNS
    description: Any = None  # of the results, for a search: a dict that run_job fills when the model is loaded

    @property
    def extra_columns(self) -> list[str]:
        """The columns to read in addition to the text: the ids, if they have a column, then the carried ones."""
        return [*([] if self.id_column is None else [self.id_column]), *self.carried_columns]


class NpyWriter:
    """Writes rows after a header, which is rewritten once the number of rows is known; numpy pads it for that."""

    def __init__(self, file: BinaryIO, columns: OutputColumns) -> None:
        self._file = file
        self._header: dict[str, Any] = {}
        self._rows = 0

    def write(self, block: Block) -> None:
        vectors = np.ascontiguousarray(block.values)
        if not self._header:
            descr = np.lib.format.dtype_to_descr(vectors.dtype)
            self._header = {"descr": descr, "fortran_order": False, "shape": (0, *vectors.shape[1:])}
            np.lib.format.write_array_header_1_0(self._file, self._header)
        self._file.write(vectors.data)
        self._rows += len(vectors)

    def finish(self) -> None:
        self._header["shape"] = (self._rows, *self._header["shape"][1:])
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, self._header)


class JsonlWriter:
    """Writes one JSON object per text: index (the row's number among all inputs), embedding, tokens, truncated."""

    def __init__(self, file: BinaryIO, columns: OutputColumns) -> None:
        self._file = file

    def write(self, block: Block) -> None:
        try:
            for row, vector, tokens, truncated in zip(*block, strict=True):
                counts = {"tokens": int(tokens), "truncated": bool(truncated)}
                written = {"index": row.number, "embedding": vector.tolist(), **counts}
                self._file.write(json.dumps(written).encode() + b"\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # from stdout; other files raise OutputError themselves
            raise write_error("stdout", error) from error

    def finish(self) -> None:
        pass


class ParquetWriter:
    """Writes the columns of the results and the carried ones, in row groups of equally many texts."""

    def __init__(self, file: BinaryIO, columns: OutputColumns) -> None:
        self._file = file
        self._columns = columns
        self._group_rows = LARGE_GROUP_ROWS if columns.result in ("spans", "tokens") else GROUP_ROWS
        self._parquet: Any = None
        self._blocks: list[Block] = []
        self._buffered_rows = 0  # in _blocks

    def write(self, block: Block) -> None:
        while len(block.token_counts) >= (missing := self._group_rows - self._buffered_rows):
            self._blocks.append(block.slice(0, missing))
            self._write_group()
            block = block.slice(missing, len(block.token_counts))
        self._blocks.append(block)
        self._buffered_rows += len(block.token_counts)

    def finish(self) -> None:
        if self._buffered_rows or self._parquet is None:
            self._write_group()
        self._parquet.close()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = self._columns
        rows = [row for block in self._blocks for row in block.rows]
        try:
            extra = [pa.array([row.extra_values[i] for row in rows], kind) for i, kind in enumerate(columns.types)]
        except pa.ArrowException as error:
            raise OptionError(
                f"a column cannot be copied to the output: {columns.extra_columns!r} ({error}); omit it"
            ) from error
        ids = pa.array([row.number for row in rows], pa.int64()) if columns.id_column is None else extra.pop(0)
        _, values, counts, truncated = zip(*self._blocks, strict=True)
        results, sources = arrow_columns(columns.result, values, np.concatenate(counts), np.concatenate(truncated))
        if sources is not None:
            ids, *extra = (column.take(pa.array(sources)) for column in (ids, *extra))
        table = pa.table({"id": ids, **results, **dict(zip(columns.carried_columns, extra, strict=True))})
        schema = table.schema
        if "embedding" in results:  # the Arrow type does not tell packed bits from int8 and uint8
            field = schema.field("embedding").with_metadata({"precision": columns.precision})
            schema = schema.set(schema.names.index("embedding"), field)
        table = table.cast(schema.with_metadata({DESCRIPTION_KEY: json.dumps(columns.description)}))
        if self._parquet is None:
            # A dictionary for the embedding column would store every vector twice.
            dictionary = ["id", *columns.carried_columns]
            self._parquet = pq.ParquetWriter(
                self._file,
                table.schema,
                compression="zstd",
                use_dictionary=dictionary,
                write_page_checksum=True,
            )
        self._parquet.write_table(table, row_group_size=max(1, len(table)))
        self._blocks.clear()
        self._buffered_rows = 0


def reject_line(row: RejectedRow) -> bytes:
    """Return a rejected row as a line of JSON with its file, row and error."""
    return json.dumps(row._asdict()).encode() + b"\n"
