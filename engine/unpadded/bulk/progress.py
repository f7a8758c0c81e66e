"""The progress of a job through its inputs, and an estimate of the number of texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate


class ReadProgress:
    """The fraction of the inputs' bytes that has been read; the reader of each input reports its own position."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.known = all(map(os.path.isfile, inputs))  # False for standard input and pipes
        self._bytes_before = [0, *accumulate(os.path.getsize(name) if self.known else 0 for name in inputs)]
        self._input_index = 0
        self._position: Callable[[], float] = float

    def start_input(self, index: int) -> None:
        """Mark all inputs before `index` as read."""
        self._input_index, self._position = index, float

    def track(self, position: Callable[[], float]) -> None:
        """Use `position` as the number of bytes read of the current input."""
        self._position = position

    def fraction(self) -> float:
        """Return the fraction of all inputs that has been read, from 0 to 1."""
        return (self._bytes_before[self._input_index] + self._position()) / (self._bytes_before[-1] or 1)


class EstimatedTexts:
    """An iterable of texts; its length hint is their total number, estimated from the progress of reading."""

    def __init__(self, texts: Iterable[str], progress: ReadProgress) -> None:
        self._texts = texts
        self._progress = progress
        self._count = 0
        self._first_fraction = 0.0  # read before the first text: a resumed job starts in the middle

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not self._count:
                self._first_fraction = self._progress.fraction()
            self._count += 1
            yield text

    def __length_hint__(self) -> int:
        """Return the estimated total, or 0 if the inputs' sizes are not known."""
        if not self._progress.known or not self._count:
            return 0
        read = self._progress.fraction() - self._first_fraction
        if read <= 0:
            return self._count
        return round(self._count + (self._count - 1) * (1 - self._first_fraction - read) / read)
