"""The progress of a job through its inputs, and an estimate of the number of texts."""

from __future__ import annotations

import logging
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

logger = logging.getLogger("unpadded")

REPORT_SECONDS = 30.0


class ReadProgress:
    """The fraction of the inputs' bytes that has been read; the reader of each input reports its own position."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.known = all(map(os.path.isfile, inputs))  # False for standard input and pipes
        self._bytes_before = [0, *accumulate(os.path.getsize(name) if self.known else 0 for name in inputs)]
        self._input_index = 0
        self.blank_lines = 0  # left out; set by the readers
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


@contextmanager
def periodic_reports(texts: EstimatedTexts) -> Iterator[Callable[[int, int], None]]:
    """Log the progress every 30 s; yield the function that is called with each batch's numbers of texts and tokens."""
    stop = threading.Event()
    done = tokens = total = 0
    first = (0.0, 0, 0)  # the end of the first batch, whose time includes warm-up: the time, its texts and its tokens

    def advance(done_texts: int, done_tokens: int) -> None:
        nonlocal done, tokens, total, first
        if not done:
            first = time.perf_counter(), done_texts, done_tokens
        done, tokens, total = done + done_texts, tokens + done_tokens, operator.length_hint(texts)

    def report() -> None:
        while not stop.wait(REPORT_SECONDS):
            seconds, texts_after, tokens_after = time.perf_counter() - first[0], done - first[1], tokens - first[2]
            if texts_after > 0:  # below 0 while `advance` changes them
                left = f" of about {total:,}, {max(0, total - done) * seconds / texts_after:,.0f} s left" * bool(total)
                logger.info("%s", f"{done:,} texts{left}, {tokens_after / seconds:,.0f} tokens/s")
            elif not sys.stderr.isatty():  # a terminal has a bar
                logger.info("computing the first batch, which also prepares the kernels")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        stop.set()
        thread.join()
