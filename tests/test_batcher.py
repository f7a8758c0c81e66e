"""Concurrent callers share batches: the bits are the same, shares are fair, and an error fails one caller only."""

import asyncio
import contextlib
import math
import sys
import threading
from collections import deque
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
from support.corpus import PARAGRAPHS
from support.serving import wait_until

import unpadded
from unpadded.errors import DeadlineError, InputError, OutputError, OverloadedError
from unpadded.execution.batcher import Batcher, Limits, Work

HANG = 60  # seconds after which a wait fails; no test computes that long


@pytest.fixture(scope="module")
def engine(minilm):
    return unpadded.load(minilm, device="cpu")


class Gate:
    """The work of a batcher: blocks until it is opened and records each batch."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.batches = []

    def __call__(self, sequences):
        self.entered.set()
        assert self.opened.wait(HANG)
        self.batches.append([int(ids[0]) for ids in sequences])
        if any(ids[0] < 0 for ids in sequences):
            raise RuntimeError("a negative id")
        return np.stack([[ids[0], len(ids)] for ids in sequences])


def sequences(name, lengths):
    return [np.full(length, name) for length in lengths]


@pytest.fixture
def batcher():
    batcher = Batcher(token_budget=100)
    yield batcher
    batcher.close()


def run_together(lengths, token_budget):
    """Run calls that are submitted while the device is busy; return the batches as lists of (name, length)."""
    batcher, gate, batches = Batcher(token_budget), Gate(), []

    def record(sequences):
        batches.append([(int(ids[0]), len(ids)) for ids in sequences])
        return gate(sequences)

    work = Work("a", record)
    calls = [batcher.submit(sequences(-1, [1]), work)]
    assert gate.entered.wait(HANG)
    calls += [batcher.submit(sequences(name, one), work) for name, one in lengths.items()]
    gate.opened.set()
    for call in calls[1:]:
        call.future.result(HANG)
    batcher.close()
    assert batcher.queued_tokens == batcher.queued_calls == 0
    return batches[1:]


def test_a_query_is_in_the_next_batch_however_many_texts_are_queued():
    batches = run_together({1: [30] * 1000, 2: [60] * 1000, 3: [9]}, 100)
    assert (3, 9) in batches[0]


def test_every_text_runs_once_within_the_budget():
    lengths = {name: [(7 * name + 13 * i) % 50 + 1 for i in range(20 + name)] for name in range(9)}
    lengths[3][4] = 170  # longer than a batch
    batches = run_together(lengths, 64)
    assert sorted(text for batch in batches for text in batch) == sorted(
        (name, length) for name, one in lengths.items() for length in one
    )
    for batch in batches:
        assert sum(length for _, length in batch) <= 64 or batch == [(3, 170)]
    assert len(batches) <= sum(map(sum, lengths.values())) / 64 * 1.25


def test_a_long_text_is_not_starved_by_short_ones():
    """Neither the oldest call's nor the shortest call's."""
    batches = run_together({1: [90] * 2, 2: [10] * 100, 3: [95]}, 100)
    assert any((1, 90) in batch for batch in batches[:3])
    assert any((3, 95) in batch for batch in batches[:4])


def test_equal_calls_finish_one_after_another():
    batches = run_together({name: [5] * 100 for name in range(4)}, 100)
    assert batches == [[(name, 5)] * 20 for name in range(4) for _ in range(5)]


def test_only_short_calls_overtake_older_ones():
    batches = run_together({0: [5] * 100, 1: [5] * 99, 2: [5] * 98}, 100)
    assert all(batch.count((0, 5)) >= 19 for batch in batches[:5])


def test_short_calls_and_the_oldest_share_each_batch():
    batches = run_together({0: [5] * 100} | {name: [5] for name in range(1, 200)}, 100)
    assert all(9 <= batch.count((0, 5)) <= 11 for batch in batches[:10])


class Simulation:
    """A batcher and a device of fixed speed in simulated time, so that the result does not depend on the machine."""

    def __init__(self, monkeypatch, seconds_per_token):
        monkeypatch.setattr("unpadded.execution.batcher.time", SimpleNamespace(perf_counter=lambda: self.now))
        self.now, self.seconds_per_token = 0.0, seconds_per_token
        self.batches = []  # the tokens of each
        self._end = math.inf  # of the running batch
        self._started, self._ended = threading.Semaphore(0), threading.Semaphore(0)
        self.batcher, self._work = Batcher(2048), Work("a", self._run)
        self.submit([np.zeros(2048, np.int32)])
        self.advance(1)  # measures the device
        self.batches.clear()

    def _run(self, sequences):
        self.batches.append(sum(map(len, sequences)))
        self._end = self.now + self.batches[-1] * self.seconds_per_token
        self._started.release()
        assert self._ended.acquire(timeout=HANG)
        return [np.zeros(1)] * len(sequences)

    def submit(self, sequences, deadline=math.inf):
        call = self.batcher.submit(sequences, self._work, limits=Limits(10**9, deadline))
        if self._end == math.inf:
            assert self._started.acquire(timeout=HANG)
        return call

    def advance(self, until):
        """Run batches until a time."""
        while self._end <= until:
            self.now, self._end, another = self._end, math.inf, self.batcher.queued_tokens > 0
            self._ended.release()
            if another:
                assert self._started.acquire(timeout=HANG)
            else:
                wait_until(lambda: not self.batcher._running)
        self.now = until

    def close(self):
        self._ended.release()  # if a batch runs
        self.batcher.close()


def overload(simulation, load):
    """Submit calls of similar sizes faster than the device can compute, each cancelled at its deadline.

    Return the answered and the computed tokens, the share of the time that the device was busy, and the rejected calls.
    """
    sizes, tokens, deadline = cycle((72, 60, 64, 56, 68)), 60, 0.5
    calls, rejected, pending = [], 0, deque()

    def advance(until):
        while pending and pending[0][0] <= until:
            end, call = pending.popleft()
            simulation.advance(end)
            call.future.cancel()
        simulation.advance(until)

    start = simulation.now
    while simulation.now < start + 2:
        texts, end = next(sizes), simulation.now + deadline
        try:
            calls.append(simulation.submit([np.zeros(tokens, np.int32)] * texts, end))
            pending.append((end, calls[-1]))
        except OverloadedError as error:
            assert "deadline would pass" in str(error)
            rejected += 1
        advance(simulation.now + texts * tokens * simulation.seconds_per_token / load)
    advance(simulation.now + deadline)
    answered = sum(len(call.sequences) * tokens for call in calls if call.future.done() and not call.future.cancelled())
    simulation.close()
    computed = sum(simulation.batches)
    return answered, computed, computed * simulation.seconds_per_token / 2, rejected


@pytest.mark.parametrize("load", [1.25, 4])
def test_above_capacity_accepted_calls_are_done_in_time(load, monkeypatch):
    answered, computed, busy, rejected = overload(Simulation(monkeypatch, 5e-6), load)
    assert answered >= 0.98 * computed and busy > 0.95 and rejected > 0


def test_a_burst_is_answered_as_far_as_time_allows(monkeypatch):
    """1.2 s of work with a deadline of 0.8 s, then a query."""
    simulation = Simulation(monkeypatch, 20e-6)
    start, calls = simulation.now, []
    for _ in range(60):
        with contextlib.suppress(OverloadedError):
            calls.append(simulation.submit([np.zeros(50, np.int32)] * 20, start + 0.8))
    query = simulation.submit([np.zeros(5, np.int32)], start + 0.8)  # accepted: it is in the next batch
    simulation.advance(start + 0.4)
    assert query.future.done()
    simulation.advance(start + 0.8)
    assert sum(call.future.done() for call in calls) == len(calls) >= 0.6 * 0.8 / 0.02
    simulation.close()


def test_the_cost_of_a_call_does_not_grow_with_those_that_wait():
    def functions_per_call(calls):
        """Return how many functions run per call, Python's and C's: a measure without a clock."""
        ran = 0

        def count(frame, event, argument):
            nonlocal ran
            ran += event in ("call", "c_call")

        threading.setprofile(count)  # of the batcher's threads
        sys.setprofile(count)
        try:
            batcher, gate = Batcher(32768), Gate()
            batcher.submit(sequences(1, [10]), Work("a", gate))
            assert gate.entered.wait(HANG)
            waiting = [batcher.submit(sequences(2, [16]), Work("a", gate), limits=Limits(10**9)) for _ in range(calls)]
            gate.opened.set()
            for call in waiting:
                call.future.result(HANG)
            batcher.close()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        return ran / calls

    assert functions_per_call(4000) < 1.5 * functions_per_call(250)


def test_waiting_calls_share_a_batch(batcher):
    gate = Gate()
    work = Work("a", gate)
    first = batcher.submit(sequences(1, [10]), work)
    assert gate.entered.wait(HANG)  # it starts at once, alone
    others = [batcher.submit(sequences(name, [20]), work) for name in (2, 3, 4)]
    gate.opened.set()
    for name, call in enumerate([first, *others], 1):
        assert [row.tolist() for row in call.future.result(HANG)] == [[name, 10 if name == 1 else 20]]
    assert gate.batches == [[1], [2, 3, 4]]


def test_calls_with_different_keys_do_not_share_a_batch(batcher):
    gate, other = Gate(), Gate()
    calls = [batcher.submit(sequences(1, [10]), Work("a", gate))]
    assert gate.entered.wait(HANG)
    calls += [
        batcher.submit(sequences(name, [10]), Work(key, run)) for name, key, run in [(2, "a", gate), (3, "b", other)]
    ]
    gate.opened.set(), other.opened.set()
    for call in calls:
        call.future.result(HANG)
    assert gate.batches == [[1], [2]] and other.batches == [[3]]


def test_a_failing_call_fails_alone(batcher):
    gate = Gate()
    work = Work("a", gate)
    first = batcher.submit(sequences(1, [10]), work)
    assert gate.entered.wait(HANG)
    calls = [batcher.submit(sequences(name, [20]), work) for name in (2, -3, 4)]
    gate.opened.set()
    with pytest.raises(OutputError, match="a negative id"):
        calls[1].future.result(HANG)
    for name, call in ((1, first), (2, calls[0]), (4, calls[2])):
        assert call.future.result(HANG)[0][0] == name
    assert gate.batches[:2] == [[1], [2, -3, 4]] and sorted(gate.batches[2:]) == [[-3], [2], [4]]


def test_a_cancelled_call_leaves_the_queue(batcher):
    gate = Gate()
    work = Work("a", gate)
    first = batcher.submit(sequences(1, [90, 90]), work)
    assert gate.entered.wait(HANG)
    call = batcher.submit(sequences(2, [50] * 4), work)
    assert batcher.queued_tokens == 90 + 200
    assert call.future.cancel()
    assert batcher.queued_tokens == 90
    gate.opened.set()
    first.future.result(HANG)
    assert gate.batches == [[1], [1]]


def test_a_full_queue_rejects_calls(batcher):
    gate = Gate()
    work = Work("a", gate)
    batcher.submit(sequences(1, [10]), work)
    assert gate.entered.wait(HANG)
    accepted = batcher.submit(sequences(2, [500]), work, limits=Limits(300))  # the queue is empty
    with pytest.raises(OverloadedError, match="500 tokens wait, 10 more exceed the limit of 300"):
        batcher.submit(sequences(3, [10]), work, limits=Limits(300))
    gate.opened.set()
    accepted.future.result(HANG)
    assert batcher.submit(sequences(3, [10]), work, limits=Limits(300)).future.result(HANG)[0][0] == 3


def test_batches_run_in_parallel():
    batcher, meeting = Batcher(token_budget=100, devices=2), threading.Barrier(2, timeout=HANG)

    def run(sequences):
        meeting.wait()  # for the other batch
        return np.stack([[ids[0], len(ids)] for ids in sequences])

    found = batcher.submit(sequences(1, [90, 70, 80, 95]), Work("a", run)).future.result(HANG)
    assert [row.tolist() for row in found] == [[1, 90], [1, 70], [1, 80], [1, 95]]
    batcher.close()


@pytest.mark.parametrize(("devices", "seconds", "error"), [(1, [1, 2, 3, 4, 5], 1e-9), (2, [1, 1, 2, 2, 3], 0.2)])
def test_the_throughput_is_that_of_all_devices(devices, seconds, error, monkeypatch):
    """Three batches of 100 tokens are in flight per device, and each device computes one per second."""
    clock, started, ends = [0], threading.Semaphore(0), [threading.Event() for _ in seconds]
    monkeypatch.setattr("unpadded.execution.batcher.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    batcher = Batcher(token_budget=100, devices=devices, depth=3)

    def run(sequences):
        started.release()
        assert ends[int(sequences[0][0])].wait(HANG)
        return np.zeros((1, 1))

    assert batcher.tokens_per_second == 0
    calls = [batcher.submit(sequences(name, [100]), Work("a", run)) for name in range(len(seconds))]
    in_flight = min(3 * devices, len(seconds))
    for _ in range(in_flight):
        assert started.acquire(timeout=HANG)
    for index, (call, end) in enumerate(zip(calls, ends, strict=True)):
        clock[0] = seconds[index]
        end.set()
        call.future.result(HANG)
        if index + in_flight < len(seconds):
            assert started.acquire(timeout=HANG)  # the next batch starts when one is done
    batcher.close()
    assert batcher.queued_tokens == 0 and batcher.tokens_per_second == pytest.approx(100 * devices, rel=error)


def test_the_throughput_of_idle_devices_counts(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("unpadded.execution.batcher.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    batcher = Batcher(token_budget=100, devices=4, depth=3)
    batcher.submit(sequences(1, [100]), Work("a", lambda sequences: np.zeros((1, 1)))).future.result(HANG)
    batcher.close()
    assert batcher.tokens_per_second == 4 * 100


def test_a_call_fails_if_one_of_its_batches_fails():
    batcher = Batcher(token_budget=100, devices=2)

    def run(sequences):
        if len(sequences[0]) == 70:
            raise RuntimeError("seventy")
        return np.stack([[ids[0], len(ids)] for ids in sequences])

    work = Work("a", run)
    with pytest.raises(OutputError, match="seventy"):
        batcher.submit(sequences(1, [90, 70, 80, 95]), work).future.result(HANG)
    assert batcher.submit(sequences(2, [10]), work).future.result(HANG)[0].tolist() == [2, 10]
    batcher.close()  # waits for the threads, one of which may still drop the rest of the failed call
    assert batcher.queued_tokens == 0


def test_texts_without_tokens_run(batcher):
    """They do not fit behind a text that takes the whole budget."""
    work = Work("a", lambda sequences: np.array([[len(ids)] for ids in sequences]))
    found = batcher.submit(sequences(1, [100, 0, 150, 0]), work).future.result(HANG)
    assert np.concatenate(found).tolist() == [100, 0, 150, 0]


def test_close_completes_every_call():
    batcher, gate = Batcher(token_budget=100), Gate()
    running = batcher.submit(sequences(1, [10]), Work("a", gate))
    assert gate.entered.wait(HANG)
    waiting = batcher.submit(sequences(2, [10]), Work("a", gate))
    gate.opened.set()
    batcher.close()
    assert running.future.done() and waiting.future.done()


def test_concurrent_calls_return_the_bits_of_embed(engine):
    calls = [PARAGRAPHS[start : start + size] for start, size in zip(range(0, 60, 3), [1, 2, 3, 7] * 5, strict=True)]
    options = [{}, {"dimensions": 128}, {"normalize": False}, {"precision": "ubinary"}]

    async def all_at_once():
        return await asyncio.gather(
            *(engine.aembed(texts, **options[i % 3 if i < 12 else 3]) for i, texts in enumerate(calls))
        )

    for i, found in enumerate(asyncio.run(all_at_once())):
        expected = engine.embed(calls[i], **options[i % 3 if i < 12 else 3])
        assert np.array_equal(found.vectors, expected.vectors) and found.vectors.dtype == expected.vectors.dtype
        assert np.array_equal(found.token_counts, expected.token_counts)
        assert np.array_equal(found.truncated, expected.truncated)


def test_aencode_returns_the_shapes_of_encode(engine):
    async def three():
        return await engine.aencode("one"), await engine.aencode(["one"]), await engine.aencode([])

    one, listed, none = asyncio.run(three())
    assert one.shape == (384,) and np.array_equal(listed, one[None]) and none.shape == (0, 384)


def test_a_query_overtakes_a_corpus(engine, monkeypatch):
    """The query is queued while the first batch of the corpus runs, and is in the next one."""
    query, batches, queued, launch = "What is a coroutine?", [], threading.Event(), engine._pipeline.backend.launch

    def launch_when_queued(sequences, *arguments, **options):
        batches.append([ids.tolist() for ids in sequences])
        assert queued.wait(HANG)
        return launch(sequences, *arguments, **options)

    monkeypatch.setattr(engine._pipeline.backend, "launch", launch_when_queued)

    async def race():
        corpus = asyncio.create_task(engine.aembed(PARAGRAPHS[:200]))
        while not batches:
            await asyncio.sleep(0.001)
        asked = asyncio.create_task(engine.aembed(query))
        while engine._batcher.queued_calls < 2:
            await asyncio.sleep(0.001)
        queued.set()
        await asked
        overtaken = not corpus.done()
        await corpus
        return overtaken

    assert asyncio.run(race()) and len(batches) > 3
    assert engine.tokenizer.encode([query], max_length=256)[0].ids.tolist() in batches[1]


def test_a_bad_text_fails_only_its_caller(engine):
    async def together():
        return await asyncio.gather(
            engine.aembed(["good"]), engine.aembed(["good", "\ud800"]), engine.aembed(["fine"]), return_exceptions=True
        )

    good, bad, fine = asyncio.run(together())
    assert isinstance(bad, InputError) and "text 1 " in str(bad)
    assert np.array_equal(good.vectors, engine.embed(["good"]).vectors)
    assert np.array_equal(fine.vectors, engine.embed(["fine"]).vectors)


def test_a_vector_that_is_not_finite_fails_only_its_caller(minilm):
    engine = unpadded.load(minilm, device="cpu")
    texts = ["about coroutines", "zebra crossing", "about threads"]
    expected = engine.encode([texts[0], texts[2]])
    zebra = engine.tokenizer.encode(["zebra"], max_length=8)[0].ids[1]
    engine._pipeline.runner.encoder.weights.word[int(zebra)] = float("nan")

    async def together():
        return await asyncio.gather(*(engine.aencode(["a word", text]) for text in texts), return_exceptions=True)

    first, bad, last = asyncio.run(together())
    assert isinstance(bad, OutputError) and "text 1 is not finite" in str(bad)
    assert np.array_equal([first[1], last[1]], expected)


def test_a_deadline_drops_the_remaining_texts(engine):
    async def late():
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            await engine.aembed(PARAGRAPHS[:2000], deadline=0.05)
        while engine._batcher.queued_tokens:  # a window that is being tokenized is dropped afterwards
            await asyncio.sleep(0.01)
        return await engine.aencode("after")

    assert np.array_equal(asyncio.run(late()), engine.encode("after"))
