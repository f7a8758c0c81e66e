"""Output to a folder of Parquet parts; a job that was killed at any moment can be resumed.

A part ends after a fixed number of rows. It is written under a temporary name, synced and renamed; then the rejects,
which are appended as they are read, are synced; then the manifest is replaced, which lists the part and the size of the
rejects that precede its last row. So everything that the manifest lists is on disk, and a resumed run writes the rest
again, with the same bytes.

Readers of Parquet folders ignore names that begin with _ or a dot.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unpadded.bulk.atomic_files import AtomicFile, OutputFile, lock_folder, sync_file, sync_folder, write_errors
from unpadded.bulk.manifest import check_same_run, read_manifest, write_manifest
from unpadded.bulk.rows import ReadPosition, RejectedRow, Row
from unpadded.bulk.writers import Block, OutputColumns, ParquetWriter, reject_line
from unpadded.errors import OutputError

MANIFEST = "_manifest.json"
REJECTS = "_rejects.jsonl"
TEMPORARY = ".part.parquet.tmp"
PART_ROWS = 65536


class DatasetOutput:
    """Writes the parts. `begin` must be called first; it returns the position at which reading starts."""

    def __init__(self, name: str, columns: OutputColumns, *, part_rows: int, resume: bool) -> None:
        self._name = name
        self._folder = Path(name)
        self._columns = columns
        self._part_rows = part_rows
        self._manifest: dict[str, Any] = {"run": {}, "parts": [], "rejects": 0, "finished": False}
        self._rejects: io.BufferedWriter | None = None  # opened by the first reject
        self.reject_bytes = 0  # size of all rejects so far
        # The open part, its writer, counts and last row.
        self._part: AtomicFile | None = None
        self._writer: ParquetWriter | None = None
        self._rows = self._tokens = self._truncated = 0
        self._last_row: Row | None = None
        self._lock: int | None = None  # a descriptor of the folder
        self._exists = os.path.lexists(self._folder)
        try:
            with write_errors(name):
                self._open_folder(resume)
        except OutputError:
            self.abandon()
            raise

    def begin(self, run: dict[str, Any]) -> ReadPosition:
        """Check that `run` and the parts match the manifest, and drop the rejects that it does not list."""
        parts = self._manifest["parts"]
        if parts:
            check_same_run(self._manifest["run"], run, self._name)
        with write_errors(self._name):
            for part in parts:
                path = self._folder / part["file"]
                if not path.exists() or path.stat().st_size != part["bytes"]:
                    raise OutputError(f"a finished part is missing or changed: {str(path)!r}; write to another folder")
            self._truncate_rejects()
        self.reject_bytes = self._manifest["rejects"]
        self._manifest["run"] = run
        return ReadPosition(*parts[-1]["next"]) if parts else ReadPosition()

    @property
    def finished(self) -> bool:
        """True if an earlier run finished the job."""
        return bool(self._manifest["finished"])

    @property
    def rows(self) -> int:
        """The number of rows in finished parts."""
        return sum(part["rows"] for part in self._manifest["parts"])

    def write(self, block: Block) -> None:
        while len(block.token_counts):
            missing = self._part_rows - self._rows
            self._append(block.slice(0, missing))
            if self._rows == self._part_rows:
                self._finish_part()
            block = block.slice(missing, len(block.token_counts))

    def write_empty(self, block: Block) -> None:
        """Write a part without rows, unless there are parts, so that an empty dataset can be opened."""
        if not self._manifest["parts"]:
            self._append(block)

    def reject(self, row: RejectedRow) -> None:
        """Append a row to the rejects when it is read, which is before earlier rows are embedded and written."""
        if self._rejects is None:
            self._make_folder()
            self._rejects = io.BufferedWriter(OutputFile(self._folder / REJECTS, self._name, "ab"))
            with write_errors(self._name):
                sync_folder(self._folder)
        line = reject_line(row)
        self._rejects.write(line)
        self.reject_bytes += len(line)

    def finish(self) -> None:
        """Write the last part and mark the job as finished."""
        if self._writer is not None:
            self._finish_part()
        self._sync_rejects(self.reject_bytes)
        self._manifest["finished"] = True
        self._write_manifest()

    def abandon(self) -> None:
        """Remove the unfinished part and the rejects that the manifest does not list, and unlock the folder."""
        if self._part is not None:
            self._part.abandon()
        if self._rejects is not None:
            with contextlib.suppress(OutputError):  # a failed write fails again when the buffer is flushed
                self._rejects.close()
            with write_errors(self._name):
                self._truncate_rejects()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_folder(self, resume: bool) -> None:
        """Lock the folder and read its manifest. Raise OutputError if it holds anything but a job to resume."""
        if not self._exists:
            return
        if not self._folder.is_dir():
            raise OutputError(f"the output is a file: {self._name!r}; pass a folder")
        self._lock = lock_folder(self._folder, self._name)
        if (self._folder / MANIFEST).exists():
            if not resume:
                raise OutputError(
                    f"the output folder already holds a dataset: {self._name!r}; pass --resume to continue it, or "
                    "another folder"
                )
            self._manifest = read_manifest(self._folder / MANIFEST, self._name)
            return
        # Without a manifest no part counts: the first one may have been renamed just before a kill.
        known = {TEMPORARY, f".{MANIFEST}.tmp", REJECTS} | ({_part_name(0)} if resume else set())
        others = sorted({path.name for path in self._folder.iterdir()} - known)
        if others:
            raise OutputError(f"the output folder is not empty: {self._name!r} has {others[0]!r}; pass a new folder")

    def _append(self, block: Block) -> None:
        if self._writer is None:
            self._make_folder()
            part = self._folder / _part_name(len(self._manifest["parts"]))
            self._part = AtomicFile(part, self._folder / TEMPORARY, self._name)
            self._writer = ParquetWriter(self._part.file, self._columns)
        self._writer.write(block)
        self._rows += len(block.token_counts)
        self._tokens += int(block.token_counts.sum())
        self._truncated += int(block.truncated.sum())
        if block.rows:
            self._last_row = block.rows[-1]

    def _finish_part(self) -> None:
        assert self._writer is not None and self._part is not None
        name = _part_name(len(self._manifest["parts"]))
        self._writer.finish()
        self._part.commit()
        self._part = self._writer = None
        counts = {"rows": self._rows, "tokens": self._tokens, "truncated": self._truncated}
        size = (self._folder / name).stat().st_size
        last = self._last_row
        position = ReadPosition() if last is None else last.next_position
        self._manifest["parts"].append({"file": name, "bytes": size, **counts, "next": position})
        self._sync_rejects(0 if last is None else last.reject_bytes)
        self._rows = self._tokens = self._truncated = 0
        self._write_manifest()

    def _sync_rejects(self, size: int) -> None:
        """Sync the rejects and set their size in the manifest."""
        if self._rejects is not None:
            sync_file(self._rejects, self._name)
        self._manifest["rejects"] = size

    def _truncate_rejects(self) -> None:
        """Remove the rejects that the manifest does not list."""
        path, size = self._folder / REJECTS, self._manifest["rejects"]
        if size == 0:
            path.unlink(missing_ok=True)
            return
        if not path.exists() or path.stat().st_size < size:
            raise OutputError(f"the file of rejects is missing or changed: {str(path)!r}; write to another folder")
        with OutputFile(path, self._name, "r+b") as file:
            file.truncate(size)

    def _make_folder(self) -> None:
        if self._exists:
            return
        with write_errors(self._name):
            self._folder.mkdir(parents=True)
            self._exists = True
            self._lock = lock_folder(self._folder, self._name)

    def _write_manifest(self) -> None:
        self._make_folder()
        write_manifest(self._folder / MANIFEST, self._manifest, self._name)


@contextlib.contextmanager
def open_dataset_output(name: str, columns: OutputColumns, *, part_rows: int, resume: bool) -> Iterator[DatasetOutput]:
    """Open a dataset that the caller finishes, or that is left so that it can be resumed."""
    output = DatasetOutput(name, columns, part_rows=part_rows, resume=resume)
    try:
        yield output
    finally:
        output.abandon()


def _part_name(index: int) -> str:
    return f"part-{index:06}.parquet"
