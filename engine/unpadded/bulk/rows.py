"""Rows of inputs, and the positions and errors of reading them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from unpadded.errors import InputError

DEFAULT_COLUMN = "text"  # also the only column of a text file


class ReadPosition(NamedTuple):
    """The position at which reading starts or resumes."""

    rows_read: int = 0  # from all inputs
    input_index: int = 0
    row_in_input: int = 0  # rows read from that input


class Row(NamedTuple):
    number: int  # among the rows of all inputs, from 0
    input_index: int
    row_in_input: int  # from 1
    text: str
    extra_values: list[Any]  # of the extra columns
    reject_bytes: int = 0  # size of the rejects that precede it; set by the job

    @property
    def next_position(self) -> ReadPosition:
        """The position after this row."""
        return ReadPosition(self.number + 1, self.input_index, self.row_in_input)


class RejectedRow(NamedTuple):
    file: str
    row: int  # as in the error: a line or an element of an array from 1, or a row of .parquet from 0
    error: str


class Place(NamedTuple):
    """The place of a row in its file."""

    name: str
    unit: str  # line, element or row
    number: int

    def reject(self, problem: str, rest: str) -> RejectedRow:
        return RejectedRow(self.name, self.number, f"{problem}: {self.name!r} {self.unit} {self.number}{rest}")


RowValues: TypeAlias = "list[Any] | RejectedRow"  # the text, then the values of the extra columns


def check_columns(name: str, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise InputError unless each column is exactly one of the names."""
    for column in columns:
        if column not in names:
            raise InputError(f"no column {column!r}: {name!r} has {quoted(names)}; use one of these names")
        if names.count(column) > 1:
            raise InputError(f"two columns are named {column!r}: {name!r} has {quoted(names)}; rename one of them")


def text_file_columns(column: str) -> list[str]:
    """Return the names that the only column of a text file has; `column` is that of the texts of other inputs."""
    return list(dict.fromkeys((DEFAULT_COLUMN, column)))


def quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def unreadable(name: str, error: Exception) -> InputError:
    """Return the InputError for an input that cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return InputError(f"the input cannot be read: {name!r} ({reason}); check the file")
