"""File to file: texts are read as a stream and vectors written as they come, so neither is ever held whole.

Inputs   .jsonl (an object with the column, or a string, per line), .parquet (the column), `-` or any other file (a
         text per line; an empty line is an empty text)
Outputs  .npy (the vectors), .jsonl and .parquet (vectors, token counts, truncated), or JSON lines on stdout

An output file has a temporary name beside its own until it is whole.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from unpadded.errors import InputError, OptionError, OutputError

if TYPE_CHECKING:
    from unpadded.engine import Embeddings, Engine

OUTPUT_ENDINGS = (".npy", ".jsonl", ".parquet")
DEFAULT_COLUMN = "text"
STDIN = "-"
PARQUET_BATCH_ROWS = 1024
PARQUET_GROUP_ROWS = 4096  # rows of an output row group: small groups make slow files


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What one run did; `seconds` leaves the loading of the model out."""

    texts: int
    tokens: int
    truncated: int
    seconds: float


class Writer(Protocol):
    def write(self, block: Embeddings) -> None:
        """Append the rows of a block."""

    def finish(self) -> None:
        """Write what makes the file whole."""


def check_inputs(inputs: Sequence[str], column: str | None, output: str | None) -> None:
    """Raise for what would only fail after the model is loaded."""
    for name in inputs:
        if name == STDIN:
            continue
        if not os.path.exists(name):
            raise InputError(f"the input does not exist: {name!r}; give a file, or - for standard input")
        if os.path.isdir(name):
            raise InputError(f"the input is a folder: {name!r}; give the files in it")
        if output is not None and os.path.exists(output) and os.path.samefile(name, output):
            raise OptionError(f"the output would replace an input: {output!r}; give another name")
        if _ending(name) == ".parquet":
            _import_pyarrow(f"reading {name!r}")
    if column is not None and not any(_ending(name) in (".jsonl", ".parquet") for name in inputs):
        raise OptionError(f"--column {column!r} was given, but no input is .jsonl or .parquet; leave it out")


def read_texts(inputs: Sequence[str], column: str = DEFAULT_COLUMN) -> Iterator[str]:
    """Yield the texts of each input, in order. Raises InputError naming the file and the line or row."""
    for name in inputs:
        try:
            if name == STDIN:
                yield from _read_lines(sys.stdin.buffer, "standard input")
            elif _ending(name) == ".parquet":
                yield from _read_parquet(name, column)
            else:
                with open(name, "rb") as file:
                    yield from _read_jsonl(file, name, column) if _ending(name) == ".jsonl" else _read_lines(file, name)
        except OSError as error:
            raise InputError(
                f"the input cannot be read: {name!r} ({error.strerror or error}); check the file"
            ) from error


def read_ranges(path: str) -> np.ndarray:
    """The [2, dimensions] array of an .npy file."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the ranges cannot be read: {path!r} ({error}); give an .npy of [2, dimensions]") from error
    if not isinstance(ranges, np.ndarray) or ranges.ndim != 2 or len(ranges) != 2:
        raise InputError(f"the ranges have the wrong shape: {path!r} {np.shape(ranges)}; give [2, dimensions]")
    return ranges


@contextmanager
def open_output(path: str | None) -> Iterator[Writer]:
    """Open a writer for `path` by its ending, or for stdout; the file takes its name when the block ends well."""
    if path is None:
        yield JsonlWriter(sys.stdout.buffer)
        return
    if _ending(path) not in OUTPUT_ENDINGS:
        raise OptionError(f"the output has an unknown ending: {path!r}; use one of {', '.join(OUTPUT_ENDINGS)}")
    if _ending(path) == ".parquet":
        _import_pyarrow(f"writing {path!r}")
    final = Path(path).resolve()
    if final.is_dir():
        raise OutputError(f"the output is a folder: {path!r}; give a file name")
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        with io.BufferedWriter(_OutputFile(temporary, path)) as file:
            writer = _WRITERS[_ending(path)](file)
            yield writer
            writer.finish()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


class _OutputFile(io.FileIO):
    """A file whose failures are OutputErrors, so that those of inputs and models are not taken for its own."""

    def __init__(self, temporary: Path, path: str) -> None:
        self._path = path
        try:
            super().__init__(temporary, "wb")
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _unwritable(self._path, error) from error


def embed_texts(engine: Engine, texts: Iterator[str], writer: Writer, **options: Any) -> Totals:
    """Stream texts through the engine into the writer; `options` are those of `Engine.stream`."""
    count = tokens = truncated = 0
    started = time.perf_counter()
    for block in engine.stream(texts, show_progress=None, **options):
        writer.write(block)
        count += len(block.vectors)
        tokens += int(block.token_counts.sum())
        truncated += int(block.truncated.sum())
    if count == 0:
        writer.write(engine.embed([], show_progress=False, **options))
    return Totals(texts=count, tokens=tokens, truncated=truncated, seconds=time.perf_counter() - started)


class NpyWriter:
    """Rows behind a header that is written again once their number is known; numpy pads it so that it fits."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._header: dict[str, Any] = {}
        self._rows = 0

    def write(self, block: Embeddings) -> None:
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
    """An object per text: index, embedding, tokens, truncated."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rows = 0

    def write(self, block: Embeddings) -> None:
        try:
            for vector, tokens, truncated in zip(block.vectors, block.token_counts, block.truncated, strict=True):
                counts = {"tokens": int(tokens), "truncated": bool(truncated)}
                row = {"index": self._rows, "embedding": vector.tolist(), **counts}
                self._file.write(json.dumps(row).encode() + b"\n")
                self._rows += 1
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # of stdout: those of a file are OutputErrors already
            raise _unwritable("stdout", error) from error

    def finish(self) -> None:
        pass


class ParquetWriter:
    """Columns embedding (fixed-size list), tokens, truncated; blocks are gathered into row groups."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._parquet: Any = None
        self._blocks: list[Embeddings] = []

    def write(self, block: Embeddings) -> None:
        self._blocks.append(block)
        if sum(len(held.vectors) for held in self._blocks) >= PARQUET_GROUP_ROWS:
            self._write_group()

    def finish(self) -> None:
        if self._blocks:
            self._write_group()
        self._parquet.close()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        vectors = np.concatenate([block.vectors for block in self._blocks])
        table = pa.table(
            {
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
                "tokens": pa.array(np.concatenate([block.token_counts for block in self._blocks]), pa.int32()),
                "truncated": pa.array(np.concatenate([block.truncated for block in self._blocks])),
            }
        )
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._file, table.schema)
        self._parquet.write_table(table)
        self._blocks.clear()


_WRITERS: dict[str, Callable[[BinaryIO], Writer]] = {
    ".npy": NpyWriter,
    ".jsonl": JsonlWriter,
    ".parquet": ParquetWriter,
}


def _read_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        yield _decode(line, name, number)


def _read_jsonl(file: BinaryIO, name: str, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        text = _decode(line, name, number)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON ({error}): {name!r} line {number}: {text[:80]!r}; mend the line") from error
        if isinstance(row, dict):
            if column not in row:
                fields = ", ".join(map(repr, row)) or "none"
                raise InputError(f"no field {column!r}: {name!r} line {number} has {fields}; name one with --column")
            row = row[column]
        if not isinstance(row, str):
            raise InputError(f"not a text: {name!r} line {number}: {str(row)[:80]!r}; give a string in {column!r}")
        yield row


def _read_parquet(name: str, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                fields = ", ".join(map(repr, schema.names)) or "none"
                raise InputError(f"no column {column!r}: {name!r} has {fields}; name one with --column")
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"not a column of texts: {column!r} of {name!r} is {kind}; name another with --column")
            row = 0
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise InputError(f"not a text: {name!r} row {row} of {column!r} is null; give a string")
                    yield text
                    row += 1
    except pa.ArrowInvalid as error:
        raise InputError(f"not a parquet file: {name!r} ({error}); write it again") from error


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error}): {name!r} line {number}; save the file as UTF-8") from error
    return text.removeprefix("\ufeff") if number == 1 else text


def _import_pyarrow(purpose: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OptionError(f"pyarrow is not installed: {purpose} needs it; pip install 'unpadded[parquet]'") from error


def _unwritable(path: str, error: OSError) -> OutputError:
    return OutputError(
        f"the output cannot be written: {path!r} ({error.strerror or error}); check its folder and space"
    )


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
