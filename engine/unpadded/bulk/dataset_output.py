"""A folder of Parquet parts that can be gone on with after a kill at any moment.

Parts are cut by rows alone. One is written under a temporary name, synced and renamed; then the rejects, which are
appended as they are read, are synced; then the manifest is replaced, which names the part and how many of the rejects
lie before its last row. So what the manifest names is on the disk, and what it does not name is written again, to the
same bytes.

Readers of Parquet folders pass over names that begin with _ or a dot.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unpadded.bulk.atomic_files import AtomicFile, OutputFile, lock_folder, sync_file, sync_folder, unwritable
from unpadded.bulk.manifest import check_same, read_manifest, write_manifest
from unpadded.bulk.readers import Broken, Place, Row
from unpadded.bulk.writers import Block, Columns, ParquetWriter
from unpadded.errors import OutputError

MANIFEST = "_manifest.json"
REJECTS = "_rejects.jsonl"
TEMPORARY = ".part.parquet.tmp"
PART_ROWS = 65536


class Dataset:
    """Writes the parts; `begin` says from which row on."""

    def __init__(self, name: str, columns: Columns, *, part_rows: int, resume: bool) -> None:
        self._name = name
        self._folder = Path(name)
        self._columns = columns
        self._part_rows = part_rows
        self._manifest: dict[str, Any] = {"run": {}, "parts": [], "rejects": 0, "finished": False}
        self._rejects: io.BufferedWriter | None = None  # opened by the first reject
        self.reject_bytes = 0  # of the rejects that were read
        self._part: AtomicFile | None = None  # the open one
        self._writer: ParquetWriter | None = None
        self._rows = self._tokens = self._truncated = 0  # of the open part
        self._last: Row | None = None  # of the open part
        self._lock: int | None = None  # a descriptor of the folder
        self._existed = self._folder.exists()
        try:
            self._check_folder(resume)
        except OutputError:
            self.abandon()
            raise

    def begin(self, run: dict[str, Any]) -> Place:
        """Compare what is about to run with what is there; the place where reading goes on."""
        parts = self._manifest["parts"]
        if parts:
            check_same(self._manifest["run"], run, self._name)
        for part in parts:
            path = self._folder / part["file"]
            if not path.exists() or path.stat().st_size != part["bytes"]:
                raise OutputError(
                    f"a finished part is missing or changed: {str(path)!r}; write the dataset to another folder"
                )
        self._cut_rejects()
        self.reject_bytes = self._manifest["rejects"]
        self._manifest["run"] = run
        return Place(*parts[-1]["next"]) if parts else Place()

    @property
    def finished(self) -> bool:
        """Nothing is left to do."""
        return bool(self._manifest["finished"])

    @property
    def rows(self) -> int:
        """Rows in finished parts."""
        return sum(part["rows"] for part in self._manifest["parts"])

    def write(self, block: Block) -> None:
        while len(block.vectors):
            room = self._part_rows - self._rows
            self._append(block.cut(0, room))
            if self._rows == self._part_rows:
                self._close_part()
            block = block.cut(room, len(block.vectors))

    def write_none(self, block: Block) -> None:
        """A part without rows, so that a dataset of none opens too."""
        if not self._manifest["parts"]:
            self._append(block)

    def reject(self, broken: Broken) -> None:
        """Append a row that was left out, as it is read: before the rows that are still on their way."""
        if self._rejects is None:
            self._make_folder()
            self._rejects = io.BufferedWriter(OutputFile(self._folder / REJECTS, self._name, "ab"))
            sync_folder(self._folder)
        line = reject_line(broken)
        self._rejects.write(line)
        self.reject_bytes += len(line)

    def finish(self) -> None:
        if self._writer is not None:
            self._close_part()
        self._sync_rejects(self.reject_bytes)
        self._manifest["finished"] = True
        self._write_manifest()

    def abandon(self) -> None:
        """Remove the part that is not whole and the rejects behind it, and let others write."""
        if self._part is not None:
            self._part.abandon()
        if self._rejects is not None:
            with contextlib.suppress(OutputError):  # what it could not take before
                self._rejects.close()
            self._cut_rejects()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_folder(self, resume: bool) -> None:
        if self._existed and not self._folder.is_dir():
            raise OutputError(f"the output is a file: {self._name!r}; give a folder")
        if not self._existed:
            return
        self._lock = lock_folder(self._folder, self._name)
        if (self._folder / MANIFEST).exists():
            if not resume:
                raise OutputError(
                    f"the output is a dataset already: {self._name!r}; go on with --resume, or give another folder"
                )
            self._manifest = read_manifest(self._folder / MANIFEST, self._name)
            return
        # Without a manifest no part counts: the first one may have got its name just before a kill.
        ours = {TEMPORARY, f".{MANIFEST}.tmp", REJECTS} | ({_part_name(0)} if resume else set())
        others = sorted({path.name for path in self._folder.iterdir()} - ours)
        if others:
            raise OutputError(f"the output folder is not empty: {self._name!r} has {others[0]!r}; give a new one")

    def _append(self, block: Block) -> None:
        if self._writer is None:
            self._make_folder()
            part = self._folder / _part_name(len(self._manifest["parts"]))
            self._part = AtomicFile(part, self._folder / TEMPORARY, self._name)
            self._writer = ParquetWriter(self._part.file, self._columns)
        self._writer.write(block)
        self._rows += len(block.vectors)
        self._tokens += int(block.token_counts.sum())
        self._truncated += int(block.truncated.sum())
        if block.rows:
            self._last = block.rows[-1]

    def _close_part(self) -> None:
        assert self._writer is not None and self._part is not None
        name = _part_name(len(self._manifest["parts"]))
        self._writer.finish()
        self._part.commit()
        self._part = self._writer = None
        counts = {"rows": self._rows, "tokens": self._tokens, "truncated": self._truncated}
        size = (self._folder / name).stat().st_size
        last = self._last
        behind = Place() if last is None else Place(last.number + 1, last.source, last.row)
        self._manifest["parts"].append({"file": name, "bytes": size, **counts, "next": behind})
        self._sync_rejects(0 if last is None else last.reject_bytes)
        self._rows = self._tokens = self._truncated = 0
        self._write_manifest()

    def _sync_rejects(self, reach: int) -> None:
        """Have the manifest name the rejects up to there."""
        if self._rejects is not None:
            sync_file(self._rejects, self._name)
        self._manifest["rejects"] = reach

    def _cut_rejects(self) -> None:
        """Drop the rejects that the manifest does not name."""
        path = self._folder / REJECTS
        if path.exists() and self._manifest["rejects"] == 0:
            path.unlink()
        elif self._manifest["rejects"]:
            if not path.exists() or path.stat().st_size < self._manifest["rejects"]:
                raise OutputError(f"the rejects are missing or cut: {str(path)!r}; write the dataset to another folder")
            with OutputFile(path, self._name, "r+b") as file:
                file.truncate(self._manifest["rejects"])

    def _make_folder(self) -> None:
        if self._existed:
            return
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise unwritable(self._name, error) from error
        self._existed = True
        self._lock = lock_folder(self._folder, self._name)

    def _write_manifest(self) -> None:
        self._make_folder()
        write_manifest(self._folder / MANIFEST, self._manifest, self._name)


@contextlib.contextmanager
def open_dataset(name: str, columns: Columns, *, part_rows: int, resume: bool) -> Iterator[Dataset]:
    """A dataset that is finished by its writer, or left so that it can be gone on with."""
    dataset = Dataset(name, columns, part_rows=part_rows, resume=resume)
    try:
        yield dataset
    finally:
        dataset.abandon()


def reject_line(broken: Broken) -> bytes:
    """A row that was left out, as a line of JSON."""
    return json.dumps({"file": broken.source, "row": broken.row, "error": broken.error}).encode() + b"\n"


def _part_name(index: int) -> str:
    return f"part-{index:06}.parquet"
