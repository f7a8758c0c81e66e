"""One output file, or stdout, and beside it the rows that were left out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from unpadded.bulk.atomic_files import AtomicFile
from unpadded.bulk.dataset_output import reject_line
from unpadded.bulk.readers import Broken
from unpadded.bulk.writers import Block, Columns, JsonlWriter, NpyWriter, ParquetWriter, Writer
from unpadded.errors import OptionError, OutputError

_WRITERS: dict[str, Callable[[BinaryIO, Columns], Writer]] = {
    ".npy": NpyWriter,
    ".jsonl": JsonlWriter,
    ".parquet": ParquetWriter,
}
OUTPUT_ENDINGS = tuple(_WRITERS)


class Single:
    """A file that takes its name when it is finished."""

    reject_bytes = 0  # as of a dataset, where a run that goes on needs them

    def __init__(self, writer: Writer, file: AtomicFile | None, rejects: AtomicFile | None) -> None:
        self._writer = writer
        self._files = [opened for opened in (rejects, file) if opened is not None]
        self._rejects = rejects

    def write(self, block: Block) -> None:
        self._writer.write(block)

    def write_none(self, block: Block) -> None:
        self._writer.write(block)

    def reject(self, broken: Broken) -> None:
        assert self._rejects is not None, broken
        self._rejects.file.write(reject_line(broken))

    def finish(self) -> None:
        self._writer.finish()
        for opened in self._files:
            opened.commit()

    def abandon(self) -> None:
        for opened in self._files:
            opened.abandon()


@contextmanager
def open_single(path: str | None, columns: Columns, *, rejects: bool) -> Iterator[Single]:
    """Open a file by its ending, or stdout; with `rejects`, NAME.rejects.jsonl beside it."""
    if path is None:
        yield Single(JsonlWriter(sys.stdout.buffer, columns), None, None)
        return
    final = Path(path).resolve()
    if final.is_dir():
        raise OutputError(f"the output is a folder: {path!r}; give a file name, or a folder as {path + '/'!r}")
    file = _temporary(final, path)
    try:
        beside = final.with_name(f"{final.name}.rejects.jsonl")
        single = Single(
            _WRITERS[output_ending(path)](file.file, columns), file, _temporary(beside, path) if rejects else None
        )
    except OutputError:
        file.abandon()
        raise
    try:
        yield single
    finally:
        single.abandon()


def output_ending(path: str) -> str:
    """How a file is written."""
    return os.path.splitext(path)[1].lower()


def import_pyarrow(purpose: str) -> None:
    """Raise OptionError where the extra is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OptionError(f"pyarrow is not installed: {purpose} needs it; pip install 'unpadded[parquet]'") from error


def _temporary(final: Path, shown: str) -> AtomicFile:
    return AtomicFile(final, final.with_name(f".{final.name}.{os.getpid()}.tmp"), shown)
