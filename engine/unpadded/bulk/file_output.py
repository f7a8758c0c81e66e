"""Output to a single file or to stdout, with an optional file of rejected rows."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from unpadded.bulk.atomic_files import AtomicFile
from unpadded.bulk.rows import RejectedRow
from unpadded.bulk.writers import Block, JsonlWriter, NpyWriter, OutputColumns, ParquetWriter, Writer, reject_line
from unpadded.errors import OptionError, OutputError, install_command

_WRITERS: dict[str, Callable[[BinaryIO, OutputColumns], Writer]] = {
    ".npy": NpyWriter,
    ".jsonl": JsonlWriter,
    ".parquet": ParquetWriter,
}
OUTPUT_EXTENSIONS = tuple(_WRITERS)
DESCRIPTION_ENDING = ".json"  # of the description of an .npy, which has no metadata of its own
REJECTS_ENDING = ".rejects.jsonl"
TEMPORARY_CHARACTERS = 40  # of the final name in the temporary one; 255 bytes are the usual maximum


class FileOutput:
    """A file that gets its name when it is finished; without `file`, the writer writes to stdout."""

    reject_bytes = 0  # only a resumable dataset counts them

    def __init__(
        self,
        writer: Writer,
        file: AtomicFile | None = None,
        rejects: AtomicFile | None = None,
        description: tuple[AtomicFile, Any] | None = None,
    ) -> None:
        self._writer = writer
        self._description = description  # a file and its contents
        self._files = [opened for opened in (rejects, description and description[0], file) if opened is not None]
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
        if self._description is not None:
            file, contents = self._description
            file.file.write(json.dumps(contents, indent=1).encode() + b"\n")
        for opened in self._files:
            opened.commit()


@contextmanager
def open_file_output(path: str | None, columns: OutputColumns, *, rejects: bool) -> Iterator[FileOutput]:
    """Open a file in the format of its extension, or stdout; `rejects` also opens PATH.rejects.jsonl."""
    if path is None:
        yield FileOutput(JsonlWriter(sys.stdout.buffer, columns))
        return
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise OutputError(f"the output is a folder: {path!r}; pass a file name, or a folder such as {path + '/'!r}")
    with ExitStack() as opened:

        def open_atomic(ending: str) -> AtomicFile:
            file = _temporary(Path(f"{final}{ending}"), path, ending)
            opened.callback(file.abandon)
            return file

        file = open_atomic("")
        description = (open_atomic(DESCRIPTION_ENDING), columns.description) if final.suffix.lower() == ".npy" else None
        writer = _WRITERS[output_extension(path)](file.file, columns)
        yield FileOutput(writer, file, open_atomic(REJECTS_ENDING) if rejects else None, description)


def output_extension(path: str) -> str:
    """Return the extension in lower case, which selects the output format."""
    return os.path.splitext(path)[1].lower()


def import_pyarrow(purpose: str) -> None:
    """Raise OptionError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise OptionError(f"pyarrow is not installed: {purpose} needs it; {install_command('parquet')}") from error


def _temporary(final: Path, display_name: str, ending: str) -> AtomicFile:
    """Return a file with a temporary name that is not too long even if the final one is as long as it may be."""
    short = final.name[:TEMPORARY_CHARACTERS]
    return AtomicFile(final, final.with_name(f".{short}.{os.getpid()}{ending}.tmp"), display_name)
