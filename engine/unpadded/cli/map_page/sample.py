"""Rows of a Parquet file or dataset, drawn at random: their vectors, their texts, and the column of their colors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unpadded.bulk.file_output import import_pyarrow
from unpadded.errors import InputError, OptionError

if TYPE_CHECKING:
    import pyarrow as pa

EMBEDDING = "embedding"
ID = "id"
TEXT = "text"
BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Points:
    """Some rows, in a random order, so that none of them always lies on top."""

    rows: int  # of the source
    vectors: np.ndarray  # [n, dimensions] fp32
    dimensions: int  # of the model's vectors: of binary ones eight in a byte
    ids: list[str]
    texts: list[str] | None
    colors: pa.Array | None  # [n]


def read_sample(
    source: str, *, vector_column: str, text_column: str | None, color_column: str | None, sample: int
) -> Points:
    """At most `sample` rows, the same at each call; the columns are read batch by batch."""
    import_pyarrow(f"reading {source!r}")
    import pyarrow as pa

    dataset = _open(source)
    schema = dataset.schema
    for name in (vector_column, text_column, color_column):
        if name is not None and name not in schema.names:
            raise OptionError(f"no column {name!r}: {source!r} has {', '.join(map(repr, schema.names))}; name another")
    _check_vectors(source, schema.field(vector_column))
    text_column = text_column or _first_text(schema, apart_from=(vector_column, ID))
    columns = {name for name in (vector_column, text_column, color_column, ID) if name and name in schema.names}
    try:
        rows = dataset.count_rows()
        if not rows:
            raise InputError(f"there are no vectors: {source!r} has 0 rows; embed some texts")
        chosen = np.random.default_rng(0).choice(rows, min(rows, sample), replace=False)
        table = _take(dataset, sorted(columns), np.sort(chosen))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"the vectors cannot be read: {source!r} ({error}); write them again") from error
    table = table.take(np.argsort(np.argsort(chosen)))
    stored = _matrix(source, table[vector_column].combine_chunks())
    metadata = schema.field(vector_column).metadata or {}
    vectors = _as_floats(stored, metadata.get(b"precision", b"").decode())
    return Points(
        rows=rows,
        vectors=vectors,
        dimensions=vectors.shape[1],
        ids=_strings(table[ID]) if ID in columns else [str(row) for row in chosen],
        texts=None if text_column is None else _strings(table[text_column]),
        colors=None if color_column is None else table[color_column].combine_chunks(),
    )


def _open(source: str) -> Any:
    import pyarrow as pa
    import pyarrow.dataset

    if not os.path.exists(source):
        raise InputError(f"the vectors do not exist: {source!r}; give a .parquet file or a folder of them")
    try:
        dataset = pyarrow.dataset.dataset(source, format="parquet")
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not Parquet: {source!r} ({error}); give what unpadded embed wrote as .parquet") from error
    if not dataset.files:
        raise InputError(f"the folder has no .parquet: {source!r}; give a file, or a folder that unpadded embed wrote")
    return dataset


def _check_vectors(source: str, field: Any) -> None:
    import pyarrow as pa

    kind = field.type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise OptionError(f"not a column of vectors: {field.name!r} of {source!r} is {kind}; name another")


def _first_text(schema: Any, *, apart_from: Sequence[str]) -> str | None:
    import pyarrow as pa

    names = [
        field.name
        for field in schema
        if (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)) and field.name not in apart_from
    ]
    return TEXT if TEXT in names else next(iter(names), None)


def _take(dataset: Any, columns: list[str], chosen: np.ndarray) -> Any:
    """The rows of these sorted numbers."""
    import pyarrow as pa

    first = 0
    taken = []
    for batch in dataset.to_batches(columns=columns, batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1):
        start, stop = np.searchsorted(chosen, [first, first + batch.num_rows])
        taken.append(batch.take(pa.array(chosen[start:stop] - first)))
        first += batch.num_rows
    return pa.Table.from_batches(taken, dataset.schema.empty_table().select(columns).schema)


def _matrix(source: str, column: Any) -> np.ndarray:
    """[n, width] in the numbers that are stored."""
    import pyarrow.compute as pc

    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] in (None, 0):
        raise InputError(f"the vectors are not of one length: {source!r} has {lengths!r:.80}; embed the texts again")
    vectors: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise InputError(f"a vector is not finite: {int((~finite).sum())} of {source!r}; embed the texts again")
    return vectors


def _as_floats(stored: np.ndarray, precision: str) -> np.ndarray:
    """fp32 of the same directions, as near as the precision holds them."""
    if precision in ("binary", "ubinary"):
        packed = stored.astype(np.int16) + (128 if precision == "binary" else 0)
        return np.unpackbits(packed.astype(np.uint8), axis=1).astype(np.float32) * 2 - 1
    vectors = stored.astype(np.float32)
    return vectors - 128 if stored.dtype == np.uint8 else vectors


def _strings(column: Any) -> list[str]:
    return ["" if value is None else str(value) for value in column.to_pylist()]
