"""Files that take their name only when they are whole, and are then on the disk."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unpadded.errors import OutputError


class AtomicFile:
    """A file under a temporary name until it is committed."""

    def __init__(self, final: Path, temporary: Path, shown: str) -> None:
        self._final = final
        self._temporary = temporary
        self._shown = shown
        self.file = io.BufferedWriter(OutputFile(temporary, shown))

    def commit(self) -> None:
        """Give it its name once it is on the disk."""
        try:
            sync_file(self.file, self._shown)
            self.file.close()
            os.replace(self._temporary, self._final)
            sync_folder(self._final.parent)
        except OSError as error:
            raise unwritable(self._shown, error) from error

    def abandon(self) -> None:
        """Remove it, unless it was committed."""
        with contextlib.suppress(OutputError):  # what it could not take before
            self.file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(final: Path, temporary: Path, shown: str) -> Iterator[BinaryIO]:
    """Write a file that takes its name when the block ends well, and leaves nothing when it does not."""
    whole = AtomicFile(final, temporary, shown)
    try:
        yield whole.file
        whole.commit()
    finally:
        whole.abandon()


def sync_file(file: BinaryIO | io.BufferedWriter, shown: str) -> None:
    """Return when what was written is on the disk."""
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(shown, error) from error


def sync_folder(folder: Path) -> None:
    """Without it a power cut may undo a rename."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, shown: str) -> int | None:
    """A descriptor that keeps other runs out until it is closed, if only by a kill; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"another run writes the output: {shown!r}; wait for it, or give another folder") from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


class OutputFile(io.FileIO):
    """A file whose failures are OutputErrors, so that those of inputs and models are not taken for its own."""

    def __init__(self, path: Path, shown: str, mode: str = "wb") -> None:
        self._shown = shown
        try:
            super().__init__(path, mode)
        except OSError as error:
            raise unwritable(shown, error) from error

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise unwritable(self._shown, error) from error


def unwritable(shown: str, error: OSError) -> OutputError:
    """The error for an output that cannot be written."""
    return OutputError(
        f"the output cannot be written: {shown!r} ({error.strerror or error}); check its folder and space"
    )
