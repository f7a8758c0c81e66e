"""Output to a single file or to stdout, with an optional file of rejected rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from unpadded.bulk.atomic_files import AtomicFile
from unpadded.bulk.readers import RejectedRow
from unpadded.bulk.writers import Block, JsonlWriter, NpyWriter, OutputColumns, ParquetWriter, Writer, reject_line
from unpadded.errors import OptionError, OutputError

_WRITERS: dict[str, Callable[[BinaryIO, OutputColumns], Writer]] = {
    ".npy": NpyWriter,
    ".jsonl": JsonlWriter,
    ".parquet": ParquetWriter,
}
OUTPUT_EXTENSIONS = tuple(_WRITERS)


class FileOutput:
    """A file that gets its name when it is finished; without `file`, the writer writes to stdout."""

    reject_bytes = 0  # only a resumable dataset counts them

    def __init__(self, writer: Writer, file: AtomicFile | None, rejects: AtomicFile | None) -> None:
        self._writer = writer
        self._files = [opened for opened in (rejects, file) if opened is not None]
        self._rejects = rejects

    def write(self, block: Block) -> None:
        self._writer.write(block)

    def write_empty(self, block: Block) -> None:
        """Write a block without rows, which has the dimensions and the dtype of the vectors."""
        self._writer.write(block)

    def reject(self, row: RejectedRow) -> None:
        assert self._rejects is not None, row
        self._rejects.file.write(reject_line(row))

    def finish(self) -> None:
        self._writer.finish()
        for opened in self._files:
            opened.commit()

    def abandon(self) -> None:
        """Remove what is not finished."""
        for opened in self._files:
            opened.abandon()


@contextmanager
def open_file_output(path: str | None, columns: OutputColumns, *, rejects: bool) -> Iterator[FileOutput]:
    """Open a file in the format of its extension, or stdout; `rejects` also opens PATH.rejects.jsonl."""
    if path is None:
        yield FileOutput(JsonlWriter(sys.stdout.buffer, columns), None, None)
        return
    final = Path(path).resolve()
    if final.is_dir():
        raise OutputError(f"the output is a folder: {path!r}; pass a file name, or a folder such as {path + '/'!r}")
    file = _temporary(final, path)
    try:
        rejects_file = _temporary(final.with_name(f"{final.name}.rejects.jsonl"), path) if rejects else None
    except OutputError:
        file.abandon()
        raise
    output = FileOutput(_WRITERS[output_extension(path)](file.file, columns), file, rejects_file)
    try:
        yield output
    finally:
        output.abandon()


def output_extension(path: str) -> str:
    """Return the extension in lower case, which selects the output format."""
    return os.path.splitext(path)[1].lower()


def import_pyarrow(purpose: str) -> None:
    """Raise OptionError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OptionError(f"pyarrow is not installed: {purpose} needs it; pip install 'unpadded[parquet]'") from error


def _temporary(final: Path, display_name: str) -> AtomicFile:
    return AtomicFile(final, final.with_name(f".{final.name}.{os.getpid()}.tmp"), display_name)
