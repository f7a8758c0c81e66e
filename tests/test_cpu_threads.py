"""Torch's number of threads changes no bit, and callers in several threads get their own vectors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.checkpoints import write_nomic

import unpadded
from unpadded_kernels import avx512

LENGTHS = (1, 30, 40, 40, 65, 7, 100, 31, 32, 33, 300, 5, 9, 200, 128, 129, 64, 64, 64, 64, 257, 90)
AMX = pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported() and not avx512.supports(torch.bfloat16),
    reason="with AMX, oneDNN's bits in bf16 depend on the threads",
)
DTYPES = ["float32", pytest.param("bfloat16", marks=AMX)]
DTYPES += [pytest.param("int8", marks=pytest.mark.skipif(not avx512.supports(torch.int8), reason="VNNI"))]


@pytest.fixture(autouse=True)
def cores():
    """Set the number of threads that torch may use; the machine's number of cores does not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(lengths, seed=0):
    ids = np.random.default_rng(seed)
    return [ids.integers(5, 30000, length, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_threads_do_not_change_the_bits(tmp_path, dtype, pooling, cores):
    engine = unpadded.load(write_nomic(tmp_path, tokenizer=False), device="cpu", dtype=dtype, token_budget=10_000)
    runner = engine._pipeline.runner
    runner.heads["vector"] = runner.heads["vector"]._replace(pooling=pooling)
    texts = draw(LENGTHS * 4)
    expected, expected_states = [], []
    for count in (1, 2, 3, 5):
        cores(count)
        vectors, states = engine.encode(texts), engine.token_embeddings(texts)
        expected, expected_states = (vectors, states) if count == 1 else (expected, expected_states)
        assert np.array_equal(vectors, expected)
        assert all(map(np.array_equal, states, expected_states))


def test_several_threads_get_their_own_vectors(tmp_path):
    engine = unpadded.load(write_nomic(tmp_path, tokenizer=False), device="cpu")
    batches = [draw([50 + i] * 30, seed=i) for i in range(6)]
    expected = [engine.encode(batch) for batch in batches]
    with ThreadPoolExecutor(6) as callers:
        for _ in range(3):
            found = callers.map(engine.encode, batches)
            assert all(map(np.array_equal, found, expected))
