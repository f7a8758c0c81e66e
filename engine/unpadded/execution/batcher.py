"""Dynamic batching: concurrent callers share batches, and none waits for the whole work of another.

Each batch is formed from the calls that wait and may share it (`scheduler.next_batch`). A call that is cancelled leaves
the queue. A call that could not finish in time is rejected when it comes. A batch that fails is run again call by call,
so that only the call at fault fails.
"""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeAlias

import numpy as np

from unpadded.errors import OutputError, OverloadedError, TooLargeError, UnpaddedError
from unpadded.execution.scheduler import Backlog, CallerQueue, is_short, next_batch
from unpadded.model.batch import Ids
from unpadded.tokenization.windows import Window

Rows: TypeAlias = Sequence[np.ndarray] | np.ndarray  # one row per sequence
Parts: TypeAlias = list[tuple["Call", list[int]]]  # a batch: the indices of the sequences of each call
Observe: TypeAlias = Callable[[int, int, float], object]  # called with the texts, tokens and seconds of a batch

MAX_READERS = 2  # threads that tokenize large inputs; each call of the tokenizer may use several cores
# Inputs up to this size have a thread of their own: 0.06 s of English prose (Xeon, 2026-11).
QUICK_CHARACTERS = 1 << 16
RATE_SMOOTHING = 0.2  # weight of the latest batch in the moving average of tokens per second
# Share of the time until a deadline that a call's estimate may take, which leaves out pauses between batches.
SAFETY = 0.65


@dataclass(frozen=True)
class Work:
    """A computation on sequences. Calls with equal `key` may share a batch, which the `run` of any of them computes."""

    key: Hashable
    run: Callable[[list[Ids]], Rows]
    min_tokens: int = 0  # as which a shorter sequence counts in a batch


@dataclass
class Timing:
    """Seconds that one caller's texts spent in each stage, summed over its windows."""

    tokenize: float = 0.0
    queue: float = 0.0
    inference: float = 0.0


@dataclass(frozen=True)
class Limits:
    """When a call is rejected instead of queued."""

    queued_tokens: int  # that may wait, this call's included; an empty queue accepts any call
    deadline: float = math.inf  # time.perf_counter() at which the caller stops waiting


class Call(Backlog):
    """One caller's sequences and the rows computed so far."""

    def __init__(self, sequences: Sequence[Ids], work: Work) -> None:
        super().__init__([max(len(ids), work.min_tokens) for ids in sequences])
        self.sequences = sequences
        self.work = work
        self.future: Future[Rows] = Future()  # set when every row is there, or to the first error
        self.submitted = self.started = time.perf_counter()  # started is set again by the first batch
        self._rows: dict[int, np.ndarray] = {}  # by the index of the sequence
        self._lock = threading.Lock()  # its batches may finish at the same time

    def add(self, indices: Sequence[int], rows: Rows) -> None:
        """Store the rows of some sequences; the last ones set the future's result."""
        with self._lock:
            self._rows |= zip(indices, rows, strict=True)
            if len(self._rows) == len(self.sequences) and self.future.set_running_or_notify_cancel():
                self.future.set_result([self._rows[index] for index in range(len(self.sequences))])

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
    """Runs calls in shared batches of at most `token_budget` tokens, of which `depth` are in flight per device.

    Any thread may submit.
    """

    def __init__(self, token_budget: int, observe: Observe | None = None, *, devices: int = 1, depth: int = 1) -> None:
        self.token_budget = token_budget
        self.observe = observe
        self._quick_reader = ThreadPoolExecutor(1, "unpadded-tokenize-quick")
        self._readers = ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1), "unpadded-tokenize")
        self._devices = devices
        self._max_running = devices * depth
        self._device = ThreadPoolExecutor(self._max_running, "unpadded-run")
        self._lock = threading.RLock()
        self._queues: dict[Hashable, CallerQueue[Call]] = {}  # by the key of the calls' work
        self._numbers = count()
        self._batches = 0  # number formed so far
        self._running = self._running_tokens = 0  # batches in flight, and their tokens
        self.queued_tokens = 0  # that wait for a batch
        # Moving average of the throughput of all devices, of batches that are at least half full; 0 before the first.
        self.tokens_per_second = 0.0

    @property
    def queued_calls(self) -> int:
        """Calls that have texts waiting for a batch."""
        return sum(map(len, self._queues.values()))

    def reader(self, size: int | None) -> ThreadPoolExecutor:
        """Return the threads that tokenize an input of this many characters or token ids; None if it is unknown."""
        return self._readers if size is None or size > QUICK_CHARACTERS else self._quick_reader

    def check(self, tokens: int, limits: Limits) -> None:
        """Raise OverloadedError if a call of this many tokens would be rejected."""
        with self._lock:
            queued, shorter = self.queued_tokens, sum(queue.count_up_to(tokens) for queue in self._queues.values())
        if not queued:
            return
        if queued + tokens > limits.queued_tokens:
            raise OverloadedError(
                f"the queue is full: {queued} tokens wait, {tokens} more exceed the limit of "
                f"{limits.queued_tokens}; try again later or send fewer texts"
            )
        ahead = queued
        if is_short(tokens, self.token_budget):  # it runs in the half of every batch that goes to short calls
            ahead = min(queued, (2 * shorter + 1) * tokens)
        needed = (ahead + tokens) / (self.tokens_per_second or math.inf)
        left = limits.deadline - time.perf_counter()
        if needed > SAFETY * left:
            raise OverloadedError(
                f"the deadline would pass: {queued} tokens wait, and {tokens} more would take about {needed:.1f} s of "
                f"the {left:.1f} s left; try again later or send fewer texts"
            )

    def submit(self, sequences: Sequence[Ids], work: Work, *, limits: Limits | None = None) -> Call:
        """Queue sequences. The call's future returns their rows in order; cancelling it drops what has not run.

        Raises OverloadedError for a call that exceeds the limits.
        """
        call = Call(sequences, work)
        with self._lock:
            if limits is not None:
                self.check(call.tokens, limits)
            self._queues.setdefault(work.key, CallerQueue()).add(call, next(self._numbers))
            self.queued_tokens += call.tokens
        call.future.add_done_callback(partial(self._drop, call))
        self._advance()
        return call

    def close(self) -> None:
        """Wait for the running batches and cancel all other calls."""
        with self._lock:
            calls = [call for queue in self._queues.values() for call in queue.oldest()]
        for call in calls:
            call.future.cancel()
        for reader in (self._quick_reader, self._readers):
            reader.shutdown(wait=False, cancel_futures=True)
        self._device.shutdown(wait=True)

    def _drop(self, call: Call, future: Future[Rows]) -> None:
        """Remove a call that finished before all of its texts ran."""
        with self._lock:
            queue = self._queues.get(call.work.key)
            if queue is not None and call in queue:
                queue.update(call, dropped=True)
                self.queued_tokens -= call.tokens
                if not len(queue):
                    del self._queues[call.work.key]

    def _advance(self) -> None:
        while True:
            with self._lock:
                if self._running == self._max_running or not self._queues:
                    return
                parts = self._next_parts()
                tokens = sum(len(call.sequences[index]) for call, indices in parts for index in indices)
                self._running += 1
                self._running_tokens += tokens
                # The devices compute these while the batch runs, and idle devices could compute as many.
                in_flight = self._running_tokens * max(1.0, self._devices / self._running)
            self._device.submit(self._run, parts, in_flight).add_done_callback(partial(self._finish, tokens))

    def _next_parts(self) -> Parts:
        """Form a batch that starts with the oldest and the shortest call in turn, so that neither waits for long."""
        self._batches += 1
        if self._batches % 2:
            first = min((next(queue.oldest()) for queue in self._queues.values()), key=lambda call: call.rank[1])
        else:
            first = min((next(queue.shortest()) for queue in self._queues.values()), key=lambda call: call.rank)
        queue = self._queues[first.work.key]
        parts: dict[Call, list[int]] = {}
        for call, index in next_batch(first, queue.shortest(), queue.oldest(), self.token_budget):
            parts.setdefault(call, []).append(index)
        for call in parts:
            self.queued_tokens -= call.rank[0] - call.tokens
            queue.update(call)
        if not len(queue):
            del self._queues[first.work.key]
        return list(parts.items())

    def _run(self, parts: Parts, in_flight: float) -> None:
        """Compute the rows of a batch; if that fails, those of each call alone.

        in_flight: tokens that all devices can compute until it is done, or 0 if that is not known.
        """
        start = time.perf_counter()
        for call, _ in parts:
            call.started = call.started if call.started > call.submitted else start
        sequences = [call.sequences[index] for call, indices in parts for index in indices]
        tokens = sum(map(len, sequences))
        try:
            rows = parts[0][0].work.run(sequences)
            seconds = time.perf_counter() - start
            if in_flight and 2 * tokens >= self.token_budget:  # a smaller batch's time depends on more than the tokens
                rate, known = in_flight / max(seconds, 1e-6), self.tokens_per_second
                self.tokens_per_second += RATE_SMOOTHING * (rate - known) if known else rate
            if self.observe is not None:
                self.observe(len(sequences), tokens, seconds)
        except BaseException as error:  # of any type: the caller raises it
            if len(parts) == 1:
                parts[0][0].fail(parts[0][1], error)
            else:
                for part in parts:
                    self._run([part], 0)
            return
        end = 0
        for call, indices in parts:
            first, end = end, end + len(indices)
            call.add(indices, rows[first:end])

    def _finish(self, tokens: int, ran: Future[None]) -> None:
        with self._lock:
            self._running -= 1
            self._running_tokens -= tokens
        self._advance()


async def run_windows(
    batcher: Batcher,
    windows: Iterator[Window],
    work: Work,
    *,
    size: int | None = None,
    limits: Limits | None = None,
    timing: Timing | None = None,
) -> list[tuple[Window, Rows]]:
    """Tokenize off the event loop and run through the batcher, tokenizing one window ahead.

    size: characters and token ids of all windows, if known. Cancelling drops what has not run, and the windows that
    are not tokenized yet. `limits` apply to the first window only: an accepted call is finished.
    """
    timing = timing or Timing()
    calls: list[tuple[Window, Call]] = []

    async def finish(window: Window, call: Call) -> None:
        with window.naming(range(len(window.sequences))):
            await asyncio.wrap_future(call.future)
        timing.queue += call.started - call.submitted
        timing.inference += time.perf_counter() - call.started

    try:
        while not (calls and calls[-1][0].last):
            start = time.perf_counter()
            window = await asyncio.get_running_loop().run_in_executor(batcher.reader(size), next, windows, None)
            timing.tokenize += time.perf_counter() - start
            if window is None:
                break
            calls.append((window, batcher.submit(window.sequences, work, limits=None if calls else limits)))
            if len(calls) > 1:
                await finish(*calls[-2])
        if calls:
            await finish(*calls[-1])
    finally:
        for _, call in calls:
            call.future.cancel()  # has no effect on a call that has finished
    return [(window, call.future.result()) for window, call in calls]
