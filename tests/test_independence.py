"""A text's bits depend on that text alone: not on its batch, its place there, or earlier texts."""

import numpy as np
import pytest
import torch
from support.checkpoints import write_bert, write_nomic

import unpadded
from unpadded_kernels.linear_cpu import onednn_supports

LENGTHS = (1, 1, 2, 3, 7, 8, 40, 40, 64, 65, 130, 255, 385, 513, 769, 1025, 2048, 2500)


def nomic(folder, **shape):
    return write_nomic(folder, scaling_factor=2.0, trained_length=512, **shape)


def assert_independent_of_batches(engine, lengths, batches):
    """Compare each text alone, in shuffled batches of random token budgets, and alone again."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(5, 30000, length, dtype=np.int32) for length in lengths]
    alone = np.concatenate([engine.encode([text]) for text in texts])
    for _ in range(batches):
        order = draw.permutation(len(texts))
        engine._pipeline.token_budget = int(draw.integers(1, sum(lengths)))
        assert np.array_equal(engine.encode([texts[i] for i in order]), alone[order])
    assert np.array_equal(engine.encode(texts[:1]), alone[:1])


@pytest.fixture(params=[2, 3])
def threads(request):
    """Torch's number of threads; parts of a batch may then be computed on one core each."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_layers_in_several_threads(tmp_path, dtype):
    shape = {"layers": 1, "hidden": 768, "heads": 12, "intermediate": 3072}
    engine = unpadded.load(nomic(tmp_path, **shape), device="cpu", dtype=dtype)
    assert_independent_of_batches(engine, (150, 140, 9, 150, 130, 40, 60), batches=6)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [2, 4])  # head_dim 64 and 32
def test_nomic_bert(tmp_path, dtype, heads, threads):
    engine = unpadded.load(nomic(tmp_path, heads=heads), device="cpu", dtype=dtype, max_length=8192)
    assert_independent_of_batches(engine, LENGTHS, batches=10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bert(tmp_path, dtype):
    engine = unpadded.load(write_bert(tmp_path, positions=2560), device="cpu", dtype=dtype, max_length=2560)
    assert_independent_of_batches(engine, LENGTHS, batches=10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8192_tokens_and_real_width(tmp_path, dtype):
    engine = unpadded.load(
        nomic(tmp_path, layers=1, hidden=768, heads=12, intermediate=3072), device="cpu", dtype=dtype, max_length=8192
    )
    lengths = (8192, 1, 40, 700, 40, 900, 9)
    if dtype == "bfloat16" and not onednn_supports(torch.bfloat16):  # emulated, at a seventh of the rate of fp32
        lengths = (1200, 1, 40, 700, 40, 900, 9)
    assert_independent_of_batches(engine, lengths, batches=2)


def test_paragraphs_of_real_weights(minilm):
    texts = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    engine = unpadded.load(minilm, device="cpu", dtype="bfloat16")
    alone = np.concatenate([engine.encode([text]) for text in texts])
    assert np.array_equal(engine.encode(texts), alone)
    assert np.array_equal(engine.encode(texts[::-1]), alone[::-1])
