"""Parts of a batch on one core each: the same bits, errors by the text's index, and torch's number of threads."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import test_family_jina_v3 as jina_v3
import torch
from support.checkpoints import write_checkpoint, write_nomic

import unpadded
from unpadded.execution.cpu_threads import BALANCED, MAX_CORES, MIN_TOKENS, CpuThreads, split
from unpadded.options import VectorOptions
from unpadded_kernels import avx512
from unpadded_kernels.linear_cpu import bits_follow_threads

LENGTHS = (1, 30, 40, 40, 65, 7, 100, 31, 32, 33, 300, 5, 9, 200, 128, 129, 64, 64, 64, 64, 257, 90)
AMX = pytest.mark.skipif(bits_follow_threads(torch.bfloat16), reason="with AMX, batches in bf16 have no parts")
DTYPES = ["float32", pytest.param("bfloat16", marks=AMX)]
DTYPES += [pytest.param("int8", marks=pytest.mark.skipif(not avx512.supports(torch.int8), reason="VNNI"))]


@pytest.fixture(autouse=True)
def cores():
    """Set the number of threads that torch may use; the machine's number of cores does not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("nomic"), tokenizer=False)


@pytest.fixture
def engine(folder):
    return unpadded.load(folder, device="cpu")


def record_parts(engine):
    """Return a list of the number of parts that each later batch is computed in."""
    found, threads = [], engine._pipeline.runner._threads
    run = threads.map

    def recorded(*arguments):
        results = run(*arguments)
        found.append(len(results))
        return results

    threads.map = recorded
    return found


@pytest.fixture
def parts(engine):
    return record_parts(engine)


def draw(lengths, seed=0):
    ids = np.random.default_rng(seed)
    return [ids.integers(5, 30000, length, dtype=np.int32) for length in lengths]


def new_thread_count():
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


def test_parts_are_consecutive_and_balanced():
    random, counts = np.random.default_rng(0), set()
    for _ in range(3000):
        cores, longest = int(random.integers(1, 20)), int(random.integers(1, 600))
        lengths = random.integers(0, longest, random.integers(1, 200)).tolist()
        parts = split(lengths, cores)
        assert [i for part in parts for i in part] == list(range(len(lengths)))
        assert all(parts), "a part without texts"
        tokens, largest = sum(lengths), max(sum(lengths[i] for i in part) for part in parts)
        assert len(parts) <= cores
        if len(parts) > 1:
            assert tokens >= MIN_TOKENS * cores**2 and largest <= BALANCED * tokens / cores
        elif tokens >= MIN_TOKENS * cores**2:  # otherwise a text is long, because each end is rounded to a text
            assert cores == 1 or max(lengths) > (BALANCED - 1) * tokens / cores
        counts.add(len(parts))
    assert counts >= set(range(1, 13))


@pytest.mark.parametrize(
    ("lengths", "cores", "expected"),
    [
        ([64, 64, 64, 64], 2, [range(2), range(2, 4)]),
        ([64, 64, 64, 63], 2, [range(4)]),  # too few tokens
        ([500, 500, 500], 2, [range(3)]),  # the largest part would have 4/3 of the mean
        ([500, 500, 500], 3, [range(1), range(1, 2), range(2, 3)]),
        ([500, 250, 250, 600], 2, [range(2), range(2, 4)]),
        ([1200] * 15, 16, [range(i, i + 1) for i in range(15)]),  # one core has no text
        ([0, 0], 2, [range(2)]),
        ([9000], 2, [range(1)]),
        ([9000, 9000], 1, [range(2)]),
    ],
)
def test_parts_of_given_lengths(lengths, cores, expected):
    assert split(lengths, cores) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_threads_do_not_change_the_bits(tmp_path, dtype, pooling, cores):
    engine = unpadded.load(write_nomic(tmp_path, tokenizer=False), device="cpu", dtype=dtype, token_budget=10_000)
    engine._pipeline.runner.pooling = pooling
    texts, parts = draw(LENGTHS * 4), record_parts(engine)
    expected, expected_states = [], []
    for count in (1, 2, 3, 5):
        cores(count)
        vectors, states = engine.encode(texts), engine.token_embeddings(texts)
        assert parts[-2:] == [count, count]
        expected, expected_states = (vectors, states) if count == 1 else (expected, expected_states)
        assert np.array_equal(vectors, expected)
        assert all(map(np.array_equal, states, expected_states))


def test_fewer_texts_than_cores(engine, parts, cores):
    texts = draw([400] * 4)
    cores(5)
    found, states = engine.encode(texts), engine.token_embeddings(texts)
    assert parts == [4, 4]
    cores(1)
    assert np.array_equal(found, engine.encode(texts))
    assert all(map(np.array_equal, states, engine.token_embeddings(texts)))


class Failing:
    """An encoder that raises `error` for a batch with a text of `length` tokens and records the batches that ended."""

    def __init__(self, encoder, length, error):
        self.length, self.error, self.ended, self._encoder = length, error, [], encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def __call__(self, batch, **options):
        if self.length in batch.lengths:
            raise self.error
        time.sleep(0.2)  # the error comes first
        self.ended.append(len(batch.lengths))
        return self._encoder(batch, **options)


def test_the_error_names_the_text_of_the_batch(engine):
    runner = engine._pipeline.runner
    runner.encoder = Failing(runner.encoder, 301, RuntimeError("out of memory"))
    engine._pipeline.token_budget = 3000
    for index in (0, 3, 5, 7, 8):
        lengths = [300] * 9
        lengths[index] = 301
        with pytest.raises(unpadded.TooLargeError) as raised:
            runner.launch(draw(lengths), VectorOptions(layer_norm=False, dimensions=128, normalize=False))
        assert (raised.value.index, raised.value.tokens) == (index, 301)
        with pytest.raises(unpadded.TooLargeError, match=f"text {index} does not fit the memory of cpu: 301 tokens"):
            engine.encode(draw(lengths))


def test_an_error_is_raised_after_the_other_parts_have_ended(engine):
    small = Failing(engine._pipeline.runner.encoder, 301, ValueError("a fault"))
    engine._pipeline.runner.encoder = small
    with pytest.raises(ValueError, match="a fault"):
        engine.encode(draw([300] * 5 + [301]))
    assert sorted(small.ended) == [2, 2]
    engine._pipeline.runner.encoder = small._encoder
    assert np.isfinite(engine.encode(draw([300] * 6))).all()


def test_torch_has_as_many_threads_as_before(cores):
    for count in (2, 3, MAX_CORES, 2):
        for _ in range(20):
            cores(count)
            threads = CpuThreads()
            assert threads.map(lambda part: torch.get_num_threads(), [MIN_TOKENS * count] * count) == [1] * count
            assert torch.get_num_threads() == count
            assert new_thread_count() == count


def test_a_part_runs_on_one_core(cores):
    """The first parallel operation of a thread reads torch's number of threads."""
    used = CpuThreads().map(
        lambda part: (torch.ones(1 << 20).mul_(2), torch.get_num_threads())[1], [MIN_TOKENS * 3] * 3
    )
    assert used == [1, 1, 1]


def test_a_new_number_of_threads_is_used_by_the_next_batch(engine, parts, cores):
    texts = draw([100] * 60)
    expected = engine.encode(texts)
    for count in (2, 1, 4, 3):
        cores(count)
        assert np.array_equal(engine.encode(texts), expected)
        assert parts[-1] == count
        assert new_thread_count() == count


def test_several_threads_get_their_own_vectors(engine, parts):
    batches = [draw([50 + i] * 30, seed=i) for i in range(6)]
    expected = [engine.encode(batch) for batch in batches]
    with ThreadPoolExecutor(6) as callers:
        for _ in range(3):
            found = callers.map(engine.encode, batches)
            assert all(map(np.array_equal, found, expected))
    assert max(parts) == 3


def test_a_model_with_adapters_has_no_threads(tmp_path, engine):
    tensors = jina_v3.with_adapters(jina_v3.published_names(jina_v3.model_of().state_dict()))
    folder = write_checkpoint(tmp_path, jina_v3.SMALL, tensors)
    runner = unpadded.load(folder, device="cpu")._pipeline.runner
    assert runner.encoder.spec.lora is not None and runner._threads is None
    assert engine._pipeline.runner._threads is not None
