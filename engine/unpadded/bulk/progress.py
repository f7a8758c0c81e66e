"""How far the inputs of a job are read, and so how many texts there will be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate


class Meter:
    """The share of the inputs' bytes that is read; a reader says where it is in the input that it has open."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.known = all(map(os.path.isfile, inputs))  # not of standard input or of a pipe
        self._before = [0, *accumulate(os.path.getsize(name) if self.known else 0 for name in inputs)]
        self._source = 0
        self._place: Callable[[], float] = float

    def enter(self, source: int) -> None:
        """All inputs before this one are read."""
        self._source, self._place = source, float

    def follow(self, place: Callable[[], float]) -> None:
        """`place` gives how many bytes of the open input are read."""
        self._place = place

    def share(self) -> float:
        """Of all inputs, from 0 to 1."""
        return (self._before[self._source] + self._place()) / (self._before[-1] or 1)


class Metered:
    """Texts that say, as their length hint, how many they will have been, going by the share that is read."""

    def __init__(self, texts: Iterable[str], meter: Meter) -> None:
        self._texts = texts
        self._meter = meter
        self._given = 0
        self._first = 0.0  # the share that was read when the first was given: a job may go on in the middle

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not self._given:
                self._first = self._meter.share()
            self._given += 1
            yield text

    def __length_hint__(self) -> int:
        """0 where nothing can be known."""
        if not self._meter.known or not self._given:
            return 0
        read = self._meter.share() - self._first
        return round(self._given + (self._given - 1) * (1 - self._first - read) / read) if read > 0 else self._given
