"""Vectors into an open file, block by block."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from unpadded.bulk.atomic_files import unwritable
from unpadded.bulk.readers import Row
from unpadded.errors import OptionError

GROUP_ROWS = 4096  # rows of a Parquet row group: small groups make slow files
OWN_COLUMNS = ("id", "embedding", "tokens", "truncated")


class Block(NamedTuple):
    """Consecutive rows and what became of them."""

    rows: Sequence[Row]
    vectors: np.ndarray  # [rows, dimensions]
    token_counts: np.ndarray  # [rows]
    truncated: np.ndarray  # [rows]

    def cut(self, start: int, stop: int) -> Block:
        return Block(
            self.rows[start:stop],
            self.vectors[start:stop],
            self.token_counts[start:stop],
            self.truncated[start:stop],
        )


class Writer(Protocol):
    def write(self, block: Block) -> None:
        """Append the rows of a block."""

    def finish(self) -> None:
        """Write what makes the file whole."""


class Columns(NamedTuple):
    """The columns that come from the inputs, and how the vectors are written beside them."""

    id_column: str | None = None  # None: the row's number among all inputs
    carry: tuple[str, ...] = ()
    types: tuple[Any, ...] = ()  # the Arrow type of each of `beside`
    precision: str = "float32"

    @property
    def beside(self) -> list[str]:
        """What is read beside the text."""
        return [*([] if self.id_column is None else [self.id_column]), *self.carry]


class NpyWriter:
    """Rows behind a header that is written again once their number is known; numpy pads it so that it fits."""

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        self._file = file
        self._header: dict[str, Any] = {}
        self._rows = 0

    def write(self, block: Block) -> None:
        vectors = np.ascontiguousarray(block.vectors)
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
    """An object per text: index (its row among all inputs), embedding, tokens, truncated."""

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
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
        except OSError as error:  # of stdout: those of a file are OutputErrors already
            raise unwritable("stdout", error) from error

    def finish(self) -> None:
        pass


class ParquetWriter:
    """Columns id, embedding (fixed-size list), tokens, truncated and those carried along, in groups of equal rows."""

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        self._file = file
        self._columns = columns
        self._parquet: Any = None
        self._blocks: list[Block] = []
        self._waiting = 0  # rows of _blocks

    def write(self, block: Block) -> None:
        while len(block.vectors) >= (room := GROUP_ROWS - self._waiting):
            self._blocks.append(block.cut(0, room))
            self._write_group()
            block = block.cut(room, len(block.vectors))
        self._blocks.append(block)
        self._waiting += len(block.vectors)

    def finish(self) -> None:
        if self._waiting or self._parquet is None:
            self._write_group()
        self._parquet.close()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [row for block in self._blocks for row in block.rows]
        vectors = np.concatenate([block.vectors for block in self._blocks])
        try:
            beside = [
                pa.array([row.beside[place] for row in rows], kind) for place, kind in enumerate(self._columns.types)
            ]
        except pa.ArrowException as error:
            raise OptionError(
                f"a column cannot be carried: {self._columns.beside!r} ({error}); leave it out"
            ) from error
        ids = pa.array([row.number for row in rows], pa.int64()) if self._columns.id_column is None else beside.pop(0)
        table = pa.table(
            {
                "id": ids,
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
                "tokens": pa.array(np.concatenate([block.token_counts for block in self._blocks]), pa.int32()),
                "truncated": pa.array(np.concatenate([block.truncated for block in self._blocks])),
                **dict(zip(self._columns.carry, beside, strict=True)),
            }
        )
        # The type alone does not tell packed bits from int8 and uint8.
        field = table.schema.field("embedding").with_metadata({"precision": self._columns.precision})
        table = table.cast(table.schema.set(table.schema.names.index("embedding"), field))
        if self._parquet is None:
            # A dictionary of vectors holds each of them once more.
            dictionary = ["id", *self._columns.carry]
            self._parquet = pq.ParquetWriter(self._file, table.schema, compression="zstd", use_dictionary=dictionary)
        self._parquet.write_table(table, row_group_size=GROUP_ROWS)
        self._blocks.clear()
        self._waiting = 0
