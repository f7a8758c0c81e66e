"""Rows of text files, JSON lines, JSON arrays, CSV and TSV, read as a stream.

One set of rules holds for all of them. A line ends with LF, CRLF or CR. A byte order mark at the start of a line is
removed, because files may be concatenated. A blank line is not a row, and is counted. Text that is not UTF-8 is a fault
of its row if earlier lines of the file have other UTF-8 characters than ASCII; otherwise of the file, which then has
another encoding.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

from unpadded.bulk.progress import ReadProgress
from unpadded.bulk.rows import Place, RejectedRow, RowValues, check_columns, quoted, text_file_columns
from unpadded.errors import InputError

MAX_CHARACTERS = 2**26  # of a line, a CSV field and a JSON value; bounds the memory that a broken file uses
CHUNK = 2**16  # characters of a JSON array read at once
BOM = "\ufeff"


def read_lines(file: BinaryIO, name: str, columns: list[str], skip: int, progress: ReadProgress) -> Iterator[RowValues]:
    """Yield the lines of a text file, whose only column is the text."""
    check_columns(name, columns[1:], text_file_columns(columns[0]))
    for number, line in _numbered_lines(file, name, skip, progress):
        yield _check_unicode([line] * len(columns), Place(name, "line", number))


def read_json_lines(
    file: BinaryIO, name: str, columns: list[str], skip: int, progress: ReadProgress
) -> Iterator[RowValues]:
    """Yield the values of the columns of one JSON object, or string, per line."""
    for number, line in _numbered_lines(file, name, skip, progress):
        place = Place(name, "line", number)
        try:
            row = _parse_json(line)
        except (ValueError, RecursionError) as error:
            yield place.reject(f"not JSON ({error})", f": {line[:80]!r}; fix the line")
        else:
            yield _json_values(row, place, columns)


def read_json(
    file: io.BufferedReader, name: str, columns: list[str], skip: int, progress: ReadProgress
) -> Iterator[RowValues]:
    """Yield the rows of one JSON array, or of JSON lines."""
    if not file.peek(CHUNK).removeprefix(BOM.encode()).lstrip().startswith(b"["):
        yield from read_json_lines(file, name, columns, skip, progress)
        return
    with _decoded(file, name, "\n", chunks=True) as chunks:
        try:
            for number, row in enumerate(_array_elements(chunks), 1):
                if number > skip:
                    yield _json_values(row, Place(name, "element", number), columns)
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"not JSON ({error}): {name!r}; use one array of objects, or one object per line"
            ) from error


def read_csv(
    file: BinaryIO, name: str, columns: list[str], skip: int, progress: ReadProgress, *, delimiter: str = ","
) -> Iterator[RowValues]:
    """Yield the values of the columns of a CSV file with a header."""
    csv.field_size_limit(MAX_CHARACTERS)
    with _decoded(file, name, "") as lines:
        records = _csv_records(lines, name, delimiter)
        header: Any = next((fields for _, fields in records if not _is_blank_record(fields)), [])
        if isinstance(header, RejectedRow):
            raise InputError(header.error)
        check_columns(name, columns, header)
        indices = [header.index(column) for column in columns]
        for number, fields in _without_blank(records, _is_blank_record, skip, progress):
            place = Place(name, "line", number)
            if isinstance(fields, RejectedRow):
                yield fields
            elif len(fields) == len(header):
                yield _check_unicode([fields[index] for index in indices], place)
            else:
                counts = f"{len(fields)} fields for {len(header)} columns"
                yield place.reject(counts, f"; fix the line, or quote the field that has {delimiter!r}")


read_tsv = partial(read_csv, delimiter="\t")


@contextmanager
def _decoded(file: BinaryIO, name: str, newline: str | None, *, chunks: bool = False) -> Iterator[Iterator[str]]:
    """Yield the lines or chunks of a file, with bytes that are not UTF-8 as lone surrogates.

    newline: as for `open`. Raises InputError for a file in another encoding and for a line that is too long.
    """
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline=newline)

    def pieces() -> Iterator[str]:
        is_utf8 = False  # known from a character that is not ASCII
        read: Callable[[int], str] = text.read if chunks else text.readline
        for number, piece in enumerate(iter(partial(read, CHUNK if chunks else MAX_CHARACTERS), ""), 1):
            if len(piece) == MAX_CHARACTERS:
                raise InputError(f"a line is longer than {MAX_CHARACTERS:,} characters: {name!r} line {number}; cut it")
            # UTF-16 has a NUL for every ASCII character, so in the first line or after its line end.
            if not is_utf8 and (not piece.isascii() or (number <= 2 and "\0" in piece)):
                problem = "it has NUL bytes" if "\0" in piece else _encoding_error(piece)
                if problem:
                    place = "" if chunks else f" line {number}"
                    raise InputError(f"the file is not UTF-8 ({problem}): {name!r}{place}; convert it to UTF-8")
                is_utf8 = True
            yield piece.removeprefix(BOM) if number == 1 or not chunks else piece

    try:
        yield pieces()
    finally:
        if not file.closed:
            text.detach()  # the caller closes the file


def _numbered_lines(file: BinaryIO, name: str, skip: int, progress: ReadProgress) -> Iterator[tuple[int, str]]:
    with _decoded(file, name, None) as lines:
        numbered = ((number, line.removesuffix("\n")) for number, line in enumerate(lines, 1))
        yield from _without_blank(numbered, lambda line: not line.strip(), skip, progress)


def _without_blank(
    records: Iterator[tuple[int, Any]], is_blank: Callable[[Any], bool], skip: int, progress: ReadProgress
) -> Iterator[tuple[int, Any]]:
    """Yield the numbered records after the first `skip` that are not blank; count the blank ones among them."""
    for number, record in records:
        if is_blank(record):
            progress.blank_lines += not skip
        elif skip:
            skip -= 1
        else:
            yield number, record


def _csv_records(lines: Iterator[str], name: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield the last line number and the fields of each record, or a RejectedRow for a line with a misplaced quote.

    A quote that is not closed on its line, and is misplaced, has made other rows part of its field, so it is a fault of
    the file, which raises InputError.
    """
    ended = False

    def source() -> Iterator[str]:
        nonlocal ended
        yield from lines
        ended = True

    records = csv.reader(source(), delimiter=delimiter, strict=True)
    while True:
        first = records.line_num + 1
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            last = records.line_num
            if ended or last > first:
                raise InputError(
                    f"not CSV ({error}): {name!r} lines {first} to {last}; close the quote that opens there"
                ) from error
            place = Place(name, "line", last)
            yield last, place.reject(f"not CSV ({error})", "; quote the whole field and double the quotes in it")
        else:
            yield records.line_num, fields


def _is_blank_record(fields: Any) -> bool:
    return not fields or (isinstance(fields, list) and len(fields) == 1 and fields[0].isspace())


def _array_elements(chunks: Iterator[str]) -> Iterator[Any]:
    """Parse the elements of one JSON array that arrives in chunks. ValueError for anything else."""
    text = next(chunks, "").lstrip()[1:]
    start, ended = 0, False
    while True:
        start = _SPACE(text, start).end()
        try:
            if text.startswith("]", start):
                break
            element, end = _DECODER.raw_decode(text, start)
            end = _SPACE(text, end).end()
            if text[end : end + 1] not in (",", "]"):
                raise ValueError(f"no comma or bracket after an element: {text[end : end + 20]!r}")
        except ValueError:
            if ended or len(text) - start > MAX_CHARACTERS:
                raise
            # At least as much again, so that a long element is not parsed once per chunk.
            text, start, size = text[start:], 0, max(CHUNK, len(text) - start)
            while len(text) < 2 * size and not ended:
                piece = next(chunks, "")
                text, ended = text + piece, not piece
            continue
        yield element
        start = end + (text[end] == ",")
    rest = text[start + 1 :] + next(chunks, "")
    if rest.strip():
        raise ValueError(f"text after the array: {rest.strip()[:20]!r}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. ValueError for two fields of one name, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"two fields have the same name, of {quoted(name for name, _ in pairs)}")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_parse_json = _DECODER.decode
_SPACE: Callable[[str, int], re.Match[str]] = re.compile(r"\s*").match  # type: ignore[assignment]


def _json_values(row: Any, place: Place, columns: list[str]) -> RowValues:
    if isinstance(row, str):
        row = {columns[0]: row}
    text = row
    if isinstance(row, dict):
        for column in columns:
            if column not in row:
                return place.reject(f"no field {column!r}", f" has {quoted(row)}; use one of these names")
        text = row[columns[0]]
    if not isinstance(row, dict) or not isinstance(text, str):
        return place.reject("not a text", f": {str(text)[:80]!r}; use a string for {columns[0]!r}")
    extra = [row[column] for column in columns[1:]]
    values = [text, *(value if value is None or isinstance(value, str) else json.dumps(value) for value in extra)]
    return _check_unicode(values, place)


def _check_unicode(values: list[Any], place: Place) -> RowValues:
    """Return the values, or an error if one has a lone surrogate: a JSON escape, or a byte that is not UTF-8."""
    for value in values:
        if value is not None and (problem := _encoding_error(value)):
            return place.reject(f"not UTF-8 ({problem})", f": {value[:80]!r}; fix the text")
    return values


def _encoding_error(text: str) -> str:
    """Describe the first lone surrogate; empty if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        return f"{what} at character {error.start + 1}"
    return ""
