"""The formats of inputs, selected by the endings of their names, and the files of folders and patterns."""

from __future__ import annotations

import bz2
import errno
import glob
import gzip
import io
import logging
import lzma
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from unpadded.bulk.rows import unreadable
from unpadded.errors import InputError

logger = logging.getLogger("unpadded")

STDIN = "-"
TEXT_EXTENSIONS = ("", ".txt", ".text")  # one text per line
JSON_EXTENSIONS = (".jsonl", ".ndjson", ".json")
TABLE_EXTENSIONS = (*JSON_EXTENSIONS, ".csv", ".tsv", ".parquet")  # the formats that have columns
KNOWN = ".txt, .jsonl, .ndjson, .json, .csv, .tsv and .parquet"


def _open_zstd(file: BinaryIO) -> BinaryIO:
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(file, "zstd")
    return io.BufferedReader(stream)


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def extension(name: str) -> str:
    """Return the extension that selects the reader: in lower case, without that of a compression."""
    root, last = os.path.splitext(name.lower())
    return os.path.splitext(root)[1] if last in COMPRESSIONS else last


def compression(name: str) -> str | None:
    """Return the extension of a compressed file, such as .gz."""
    last = os.path.splitext(name.lower())[1]
    return last if last in COMPRESSIONS else None


@contextmanager
def open_input(name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file and yield its decompressed contents and the file itself, whose position is the progress."""
    with open(name, "rb") as stored:
        ending = compression(name)
        if ending is None:
            yield stored, stored
            return
        with COMPRESSIONS[ending](stored) as file:
            yield file, stored


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Replace folders (by their files of known endings, sorted) and patterns by files.

    Raises InputError for a file or a folder that cannot be read, and for an unknown ending.
    """
    files: list[str] = []
    for name in inputs:
        if name == STDIN:
            files.append(name)
        elif os.path.isdir(name):
            files += _folder_files(name)
        elif glob.has_magic(name) and not os.path.exists(name):
            files += map(_check_file, _matching_files(name))
        else:
            files.append(_check_file(name))
    return files


def check_ending(name: str) -> None:
    """Raise InputError for an ending that no reader has."""
    if extension(name) not in (*TEXT_EXTENSIONS, *TABLE_EXTENSIONS):
        raise InputError(
            f"the input has an unknown ending: {name!r}; the formats are {KNOWN}, each but the last also compressed "
            f"as {', '.join(COMPRESSIONS)}; pass lines of any other file as - on standard input"
        )
    if extension(name) == ".parquet" and compression(name):
        raise InputError(f"a compressed Parquet file cannot be read in parts: {name!r}; decompress it")


def _check_file(name: str, *, regular: bool = False) -> str:
    """Return the name. Raise InputError for a file that cannot be opened, before the model is loaded."""
    try:
        mode = os.stat(name).st_mode
        if not os.access(name, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unreadable(name, error) from error
    check_ending(name)
    if regular and not stat.S_ISREG(mode):
        raise InputError(f"a folder has an input that is not a regular file: {name!r}; remove it, or pass files")
    return name


def _folder_files(folder: str) -> list[str]:
    """Return the files of known endings, and log how many of each kind there are and which are left out."""
    found: list[str] = []
    kinds: Counter[str] = Counter()
    left_out: Counter[str] = Counter()

    def fail(error: OSError) -> None:
        raise unreadable(error.filename, error) from error

    for parent, folders, names in os.walk(folder, onerror=fail):
        left_out["hidden"] += sum(map(_is_hidden, (*folders, *names)))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        left_out["linked folders"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for name in (name for name in names if not _is_hidden(name)):
            path, kind = os.path.join(parent, name), extension(name)
            if kind not in (".txt", *TABLE_EXTENSIONS) or (kind == ".parquet" and compression(name)):
                left_out[os.path.splitext(name)[1] or "without ending"] += 1
            else:
                found.append(_check_file(path, regular=True))
                kinds[kind] += 1
    if not found:
        raise InputError(f"no file in a known format in the input folder: {folder!r} ({KNOWN}); pass another, or files")
    logger.info("%s: %s%s", folder, _counts(kinds), f"; left out: {_counts(left_out)}" if +left_out else "")
    return sorted(found)


def _matching_files(pattern: str) -> list[str]:
    """Return the files that match a pattern. A folder on the way that cannot be listed raises InputError."""
    for folder in glob.iglob(os.path.dirname(pattern) or ".", recursive=True):
        try:
            if os.path.isdir(folder):
                os.scandir(folder).close()
        except OSError as error:
            raise unreadable(folder, error) from error
    matches = sorted(glob.glob(pattern, recursive=True))
    found = [path for path in matches if not os.path.isdir(path)]
    if not found:
        raise InputError(f"no file matches the input pattern: {pattern!r}; check it")
    left_out = f"; left out: {len(matches) - len(found)} folders" if len(found) < len(matches) else ""
    logger.info("%s: %s%s", pattern, _counts(Counter(map(extension, found))), left_out)
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind or 'without ending'}" for kind, count in sorted((+kinds).items()))
