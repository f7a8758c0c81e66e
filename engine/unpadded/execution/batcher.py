"""Dynamic batching: concurrent callers share batches, and none waits for the whole work of another.

A `Call` is one caller's tokenized texts. The `Batcher` runs the model on threads of its own, one per device. Each batch
is formed from all calls that wait (`scheduler.next_batch`). A call that is cancelled leaves the queue. A batch that
fails is run again call by call, so that only the call at fault fails.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from unpadded.errors import OutputError, OverloadedError, TooLargeError, UnpaddedError
from unpadded.execution.scheduler import Backlog, next_batch
from unpadded.tokenization.windows import Window

Rows: TypeAlias = Sequence[np.ndarray] | np.ndarray  # one row per sequence
Parts: TypeAlias = list[tuple["Call", list[int]]]  # a batch: the indices of the sequences of each call
Observe: TypeAlias = Callable[[int, int, float], object]  # called with the texts, tokens and seconds of a batch

MAX_READERS = 4  # threads that tokenize; each call of the tokenizer uses several cores


@dataclass(frozen=True)
class Work:
    """A computation on sequences. Calls with equal `key` may share a batch, which the `run` of any of them computes."""

    key: Hashable
    run: Callable[[list[np.ndarray]], Rows]


@dataclass
class Timing:
    """Seconds that one caller's texts spent in each stage, summed over its windows."""

    tokenize: float = 0.0
    queue: float = 0.0
    inference: float = 0.0


class Call:
    """One caller's sequences and the rows computed so far."""

    def __init__(self, sequences: Sequence[np.ndarray], work: Work) -> None:
        self.sequences = sequences
        self.work = work
        self.backlog = Backlog([len(ids) for ids in sequences])
        self.future: Future[Rows] = Future()  # set when every row is there, or to the first error
        self.submitted = self.started = time.perf_counter()  # started is set again by the first batch
        self._rows: list[np.ndarray | None] = [None] * len(sequences)
        self._missing = len(sequences)
        self._lock = threading.Lock()  # its batches may finish at the same time

    def add(self, indices: Sequence[int], rows: Rows) -> None:
        """Store the rows of some sequences; the last ones set the future's result."""
        with self._lock:
            for index, row in zip(indices, rows, strict=True):
                self._rows[index] = row
            self._missing -= len(indices)
            if not self._missing and self.future.set_running_or_notify_cancel():
                self.future.set_result([row for row in self._rows if row is not None])

    def fail(self, indices: Sequence[int], error: BaseException) -> None:
        """Set the future's exception to the error of some of its sequences."""
        if isinstance(error, TooLargeError):
            error = error.at(indices[error.index])
        elif not isinstance(error, UnpaddedError):
            failed = OutputError(f"the model failed on these texts: {error!r}; send them one by one to find the cause")
            failed.__cause__ = error
            error = failed
        with self._lock:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)


class Batcher:
    """Runs calls in shared batches of at most `token_budget` tokens on `parallelism` threads.

    Any thread may submit.
    """

    def __init__(self, token_budget: int, observe: Observe | None = None, *, parallelism: int = 1) -> None:
        self.token_budget = token_budget
        self.observe = observe
        self.readers = ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1), "unpadded-tokenize")
        self._parallelism = parallelism
        self._device = ThreadPoolExecutor(parallelism, "unpadded-run")
        self._lock = threading.Lock()
        self._calls: list[Call] = []  # those with a backlog; the first comes first
        self._retries: list[Parts] = []
        self._running = 0  # number of batches
        self._closed = False

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a batch."""
        with self._lock:
            return sum(call.backlog.tokens for call in self._calls)

    @property
    def queued_calls(self) -> int:
        """Calls that have texts waiting for a batch."""
        return len(self._calls)

    def submit(self, sequences: Sequence[np.ndarray], work: Work, *, max_queued_tokens: int | None = None) -> Call:
        """Queue sequences. The call's future returns their rows in order; cancelling it drops what has not run.

        Raises OverloadedError if more than `max_queued_tokens` would wait; an empty queue accepts any call.
        """
        call = Call(sequences, work)
        if not sequences:
            call.future.set_result([])
            return call
        with self._lock:
            queued = sum(other.backlog.tokens for other in self._calls)
            if max_queued_tokens is not None and queued and queued + call.backlog.tokens > max_queued_tokens:
                raise OverloadedError(
                    f"the queue is full: {queued} tokens wait, {call.backlog.tokens} more exceed the limit of "
                    f"{max_queued_tokens}; try again later or send fewer texts"
                )
            self._calls.append(call)
        call.future.add_done_callback(partial(self._drop, call))
        self._advance()
        return call

    def close(self) -> None:
        """Wait for the running batches and cancel all other calls."""
        with self._lock:
            self._closed = True
            calls = [*self._calls, *(call for parts in self._retries for call, _ in parts)]
            self._calls, self._retries = [], []
        for call in calls:
            call.future.cancel()
        self.readers.shutdown(wait=False, cancel_futures=True)
        self._device.shutdown(wait=True)

    def _drop(self, call: Call, future: Future[Rows]) -> None:
        """Remove a call that finished before all of its texts ran."""
        with self._lock:
            if call in self._calls:
                self._calls.remove(call)

    def _advance(self) -> None:
        while True:
            with self._lock:
                if self._running == self._parallelism or not (self._retries or self._calls):
                    return
                parts = self._retries.pop() if self._retries else self._next_parts()
                self._running += 1
            self._device.submit(self._run, parts).add_done_callback(partial(self._finish, parts))

    def _next_parts(self) -> Parts:
        mates = [call for call in self._calls if call.work.key == self._calls[0].work.key]
        shares = next_batch([call.backlog for call in mates], self.token_budget)
        parts = [(call, indices) for call, indices in zip(mates, shares, strict=True) if indices]
        served = [call for call, _ in parts]
        self._calls = [call for call in self._calls if call not in served]
        self._calls += [call for call in served if call.backlog.tokens]
        return parts

    def _run(self, parts: Parts) -> Rows:
        start = time.perf_counter()
        for call, _ in parts:
            call.started = call.started if call.started > call.submitted else start
        sequences = [call.sequences[index] for call, indices in parts for index in indices]
        rows = parts[0][0].work.run(sequences)
        if self.observe is not None:
            self.observe(len(sequences), sum(map(len, sequences)), time.perf_counter() - start)
        return rows

    def _finish(self, parts: Parts, ran: Future[Rows]) -> None:
        error = ran.exception()
        if error is None:
            rows, start = ran.result(), 0
            for call, indices in parts:
                call.add(indices, rows[start : start + len(indices)])
                start += len(indices)
        elif len(parts) == 1:
            call, indices = parts[0]
            call.fail(indices, error)
        with self._lock:
            self._running -= 1
            again = error is not None and len(parts) > 1
            if again and not self._closed:
                self._retries += [[part] for part in parts]
        if again and self._closed:
            for call, _ in parts:
                call.future.cancel()
        self._advance()


async def run_windows(
    batcher: Batcher,
    windows: Iterator[Window],
    work: Work,
    *,
    max_queued_tokens: int | None = None,
    timing: Timing | None = None,
) -> list[tuple[Window, Rows]]:
    """Tokenize off the event loop and run through the batcher, tokenizing one window ahead.

    Cancelling drops what has not run. `max_queued_tokens` applies to the first window only: an accepted call is
    finished.
    """
    timing = timing or Timing()
    done: list[tuple[Window, Rows]] = []
    ahead: tuple[Window, Call] | None = None

    async def finish(window: Window, call: Call) -> None:
        with window.naming(range(len(window.sequences))):
            rows = await asyncio.wrap_future(call.future)
        done.append((window, rows))
        timing.queue += call.started - call.submitted
        timing.inference += time.perf_counter() - call.started

    try:
        while True:
            start = time.perf_counter()
            window = await asyncio.get_running_loop().run_in_executor(batcher.readers, next, windows, None)
            timing.tokenize += time.perf_counter() - start
            if window is None:
                break
            accepted = done or ahead
            call = batcher.submit(window.sequences, work, max_queued_tokens=None if accepted else max_queued_tokens)
            if ahead is not None:
                behind, ahead = ahead, (window, call)
                await finish(*behind)
            else:
                ahead = (window, call)
            if window.last:
                break
        if ahead is not None:
            await finish(*ahead)
    finally:
        if ahead is not None:
            ahead[1].future.cancel()
    return done
