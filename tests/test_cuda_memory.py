"""On a GPU: the memory that a batch takes, batches that do not fit, and several processes."""

import numpy as np
import pytest
import torch
from support.checkpoints import REAL, write_nomic
from support.family_checks import random_ids

import unpadded
from unpadded.execution.memory import bytes_per_token

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("nomic"), tokenizer=False, **REAL | {"layers": 4})


def test_a_batch_takes_the_memory_that_was_computed(folder):
    engine = unpadded.load(folder, device="cuda", dtype="float16")
    texts = random_ids([512] * (engine._pipeline.token_budget // 512))
    engine.encode(texts)  # libraries allocate their workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.encode(texts)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.05 * bytes_per_token(engine.checkpoint.spec, 2) * engine._pipeline.token_budget


def test_a_batch_that_does_not_fit_is_split(folder, caplog):
    engine = unpadded.load(folder, device="cuda", dtype="float16", batch_invariant=True)
    texts = random_ids([2048] * 64)
    expected = engine.encode(texts)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    engine._pipeline.token_budget = 64 * 2048
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        assert np.array_equal(engine.encode(texts), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "a batch of 131072 tokens does not fit the memory of cuda" in caplog.text


def test_two_processes_return_the_bits_of_one(folder):
    texts = random_ids([1, 7, 40, 512, 2048, 300] * 20)
    options = {"dtype": "float16", "batch_invariant": True, "token_budget": 4096}
    with unpadded.load(folder, device="cuda:0,cuda:0", **options) as engine:
        found = engine.encode(texts)
    assert np.array_equal(found, unpadded.load(folder, device="cuda", **options).encode(texts))
