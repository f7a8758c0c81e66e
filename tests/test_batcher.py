"""Concurrent callers share batches: the bits are the same, shares are fair, and an error fails one caller only."""

import asyncio
import threading
import time

import numpy as np
import pytest
from support.corpus import PARAGRAPHS

import unpadded
from unpadded.errors import DeadlineError, InputError, OutputError, OverloadedError
from unpadded.execution.batcher import Batcher, Work
from unpadded.execution.scheduler import Backlog, next_batch


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
        assert self.opened.wait(10)
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


def drain(backlogs, token_budget):
    """Form batches until nothing is left; a caller without texts in a batch comes first in the next."""
    batches, order = [], list(backlogs)
    while order:
        shares = next_batch([backlogs[name] for name in order], token_budget)
        batches.append({name: indices for name, indices in zip(order, shares, strict=True) if indices})
        order = [name for name in order if name not in batches[-1]] + [name for name in order if name in batches[-1]]
        order = [name for name in order if backlogs[name].tokens]
    return batches


def test_a_query_is_in_the_next_batch_however_many_texts_are_queued():
    backlogs = {"corpus": Backlog([60] * 1000), "query": Backlog([9])}
    assert next_batch(list(backlogs.values()), 100) == [[0], [0]]


def test_every_text_runs_once_within_the_budget():
    lengths = {name: [(7 * name + 13 * i) % 50 + 1 for i in range(20 + name)] for name in range(9)}
    lengths[3][4] = 170  # longer than a batch
    batches = drain({name: Backlog(one) for name, one in lengths.items()}, 64)
    for name, one in lengths.items():
        assert sorted(i for batch in batches for i in batch.get(name, [])) == list(range(len(one)))
    for batch in batches:
        tokens = sum(lengths[name][i] for name, indices in batch.items() for i in indices)
        assert tokens <= 64 or batch == {3: [4]}
    total = sum(map(sum, lengths.values()))
    assert len(batches) <= total / 64 * 1.25


def test_a_long_text_is_not_starved_by_short_ones():
    batches = drain({"long": Backlog([90]), "short": Backlog([10] * 100), "other": Backlog([10] * 100)}, 100)
    assert any("long" in batch for batch in batches[:2])


def test_equal_shares_for_equal_callers():
    shares = next_batch([Backlog([5] * 100) for _ in range(4)], 100)
    assert [len(indices) for indices in shares] == [5, 5, 5, 5]


def test_waiting_calls_share_a_batch(batcher):
    gate = Gate()
    work = Work("a", gate)
    first = batcher.submit(sequences(1, [10]), work)
    assert gate.entered.wait(10)  # it starts at once, alone
    others = [batcher.submit(sequences(name, [20]), work) for name in (2, 3, 4)]
    gate.opened.set()
    for name, call in enumerate([first, *others], 1):
        assert [row.tolist() for row in call.future.result(10)] == [[name, 10 if name == 1 else 20]]
    assert gate.batches == [[1], [2, 3, 4]]


def test_calls_with_different_keys_do_not_share_a_batch(batcher):
    gate, other = Gate(), Gate()
    calls = [batcher.submit(sequences(1, [10]), Work("a", gate))]
    assert gate.entered.wait(10)
    calls += [
        batcher.submit(sequences(name, [10]), Work(key, run)) for name, key, run in [(2, "a", gate), (3, "b", other)]
    ]
    gate.opened.set(), other.opened.set()
    for call in calls:
        call.future.result(10)
    assert gate.batches == [[1], [2]] and other.batches == [[3]]


def test_a_failing_call_fails_alone(batcher):
    gate = Gate()
    work = Work("a", gate)
    first = batcher.submit(sequences(1, [10]), work)
    assert gate.entered.wait(10)
    calls = [batcher.submit(sequences(name, [20]), work) for name in (2, -3, 4)]
    gate.opened.set()
    with pytest.raises(OutputError, match="a negative id"):
        calls[1].future.result(10)
    for name, call in ((1, first), (2, calls[0]), (4, calls[2])):
        assert call.future.result(10)[0][0] == name
    assert gate.batches[:2] == [[1], [2, -3, 4]] and sorted(gate.batches[2:]) == [[-3], [2], [4]]


def test_a_cancelled_call_leaves_the_queue(batcher):
    gate = Gate()
    work = Work("a", gate)
    first = batcher.submit(sequences(1, [90, 90]), work)
    assert gate.entered.wait(10)
    call = batcher.submit(sequences(2, [50] * 4), work)
    assert batcher.queued_tokens == 90 + 200
    assert call.future.cancel()
    assert batcher.queued_tokens == 90
    gate.opened.set()
    first.future.result(10)
    assert gate.batches == [[1], [1]]


def test_a_full_queue_rejects_calls(batcher):
    gate = Gate()
    work = Work("a", gate)
    batcher.submit(sequences(1, [10]), work)
    assert gate.entered.wait(10)
    accepted = batcher.submit(sequences(2, [500]), work, max_queued_tokens=300)  # the queue is empty
    with pytest.raises(OverloadedError, match="500 tokens wait, 10 more exceed the limit of 300"):
        batcher.submit(sequences(3, [10]), work, max_queued_tokens=300)
    gate.opened.set()
    accepted.future.result(10)
    assert batcher.submit(sequences(3, [10]), work, max_queued_tokens=300).future.result(10)[0][0] == 3


def test_batches_run_in_parallel():
    batcher, meeting = Batcher(token_budget=100, parallelism=2), threading.Barrier(2, timeout=10)

    def run(sequences):
        meeting.wait()  # for the other batch
        return np.stack([[ids[0], len(ids)] for ids in sequences])

    found = batcher.submit(sequences(1, [90, 70, 80, 95]), Work("a", run)).future.result(10)
    assert [row.tolist() for row in found] == [[1, 90], [1, 70], [1, 80], [1, 95]]
    batcher.close()


def test_a_call_fails_if_one_of_its_batches_fails():
    batcher = Batcher(token_budget=100, parallelism=2)

    def run(sequences):
        if len(sequences[0]) == 70:
            raise RuntimeError("seventy")
        return np.stack([[ids[0], len(ids)] for ids in sequences])

    work = Work("a", run)
    with pytest.raises(OutputError, match="seventy"):
        batcher.submit(sequences(1, [90, 70, 80, 95]), work).future.result(10)
    assert batcher.submit(sequences(2, [10]), work).future.result(10)[0].tolist() == [2, 10]
    assert batcher.queued_tokens == 0
    batcher.close()


def test_close_completes_every_call():
    batcher, gate = Batcher(token_budget=100), Gate()
    running = batcher.submit(sequences(1, [10]), Work("a", gate))
    assert gate.entered.wait(10)
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


def test_aencode_averages_long_texts(engine):
    text = " ".join(PARAGRAPHS[:80])
    found = asyncio.run(engine.aencode([text, "short"], long_text="mean"))
    assert np.array_equal(found, engine.encode([text, "short"], long_text="mean"))


def test_a_query_overtakes_a_corpus(engine):
    async def race():
        corpus = asyncio.create_task(engine.aembed(PARAGRAPHS[:600]))
        await asyncio.sleep(0.2)
        start = time.perf_counter()
        await engine.aembed("What is a coroutine?")
        waited, overtaken = time.perf_counter() - start, not corpus.done()
        await corpus
        return waited, time.perf_counter() - start, overtaken

    waited, whole, overtaken = asyncio.run(race())
    assert overtaken and waited < whole / 3


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
