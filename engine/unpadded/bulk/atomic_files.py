"""Files that appear under their final name only when they are complete and on disk."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unpadded.errors import OutputError


class AtomicFile:
    """A file that has a temporary name until it is committed. Error messages call it `display_name`."""

    def __init__(self, final: Path, temporary: Path, display_name: str) -> None:
        self._final = final
        self._temporary = temporary
        self._display_name = display_name
        self.file = io.BufferedWriter(OutputFile(temporary, display_name))

    def commit(self) -> None:
        """Sync the file to disk, then rename it to its final name."""
        with write_errors(self._display_name):
            sync_file(self.file, self._display_name)
            self.file.close()
            os.replace(self._temporary, self._final)
            sync_folder(self._final.parent)

    def abandon(self) -> None:
        """Remove the file unless it was committed."""
        with contextlib.suppress(OutputError, OSError):  # a failed write fails again when the buffer is flushed
            self.file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(final: Path, temporary: Path, display_name: str) -> Iterator[BinaryIO]:
    """Open a file that is committed when the block succeeds and removed when it raises."""
    output = AtomicFile(final, temporary, display_name)
    try:
        yield output.file
        output.commit()
    finally:
        output.abandon()


def sync_file(file: BinaryIO | io.BufferedWriter, display_name: str) -> None:
    """Flush a file and wait until its contents are on disk."""
    with write_errors(display_name):
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk; without this, a power failure may undo a rename."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, display_name: str) -> int | None:
    """Return a descriptor that locks the folder until it is closed, or None where locks are not available.

    The system closes the descriptor of a killed process. Raises OutputError if another run holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(
            f"another run is writing the output: {display_name!r}; wait until it has finished, or pass another folder"
        ) from error
    except OSError:  # the file system does not support locks
        os.close(descriptor)
        return None
    return descriptor


class OutputFile(io.FileIO):
    """An unbuffered file that raises OutputError, to tell its failures from those of inputs and models."""

    def __init__(self, path: Path, display_name: str, mode: str = "wb") -> None:
        self._display_name = display_name
        with write_errors(display_name):
            super().__init__(path, mode)

    def write(self, data: Any) -> int:
        with write_errors(self._display_name):
            return super().write(data)


@contextlib.contextmanager
def write_errors(display_name: str) -> Iterator[None]:
    """Raise OutputError for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise write_error(display_name, error) from error


def write_error(display_name: str, error: OSError) -> OutputError:
    """Return the OutputError for a failed write."""
    return OutputError(
        f"the output cannot be written: {display_name!r} ({error.strerror or error}); "
        "check its folder and the free disk space"
    )
