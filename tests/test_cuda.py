"""The engine on CUDA: accuracy, independence and graphs. Without a GPU on the stand-in, with a small model."""

import itertools

import numpy as np
import pytest
import test_family_nomic_moe
import torch
from support.checkpoints import REAL, write_bert, write_checkpoint, write_nomic
from support.devices import DEVICE, DTYPES, HAS_CUDA
from support.family_checks import assert_cuda_agrees, random_ids, relative_error
from transformers import NomicBertModel

import unpadded
from unpadded.execution import cuda_graphs
from unpadded.options import VectorOptions

LENGTHS = (1, 2, 7, 64, 65, 130, 513, 2048, 3000) if HAS_CUDA else (1, 2, 7, 9)
SMALL = {} if HAS_CUDA else {"layers": 1, "hidden": 64, "heads": 4, "intermediate": 256}
SHAPE = REAL | {"layers": 4} if HAS_CUDA else SMALL
EXPERT_LAYERS = 4 if HAS_CUDA else 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("nomic"), names="transformers", tokenizer=False, **SHAPE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A checkpoint with experts in every second MLP."""
    config = test_family_nomic_moe.SMALL | {"n_positions": 8192, "max_trained_positions": 8192}
    config |= {"n_layer": EXPERT_LAYERS}
    tensors = test_family_nomic_moe.make_tensors(EXPERT_LAYERS)
    return write_checkpoint(tmp_path_factory.mktemp("experts"), config, tensors)


@pytest.fixture(params=["folder", "experts"])
def either(request):
    return request.getfixturevalue(request.param)


def hidden_on_the_cpu(folder, texts):
    return unpadded.load(folder, device="cpu", max_length=8192).token_embeddings(texts)


@pytest.mark.parametrize("write", [write_nomic, write_bert])
def test_fp32_matches_the_cpu(tmp_path, cuda, write):
    assert_cuda_agrees(write(tmp_path, tokenizer=False, **SMALL), cuda)


def test_dynamic_ntk_scales_each_text_by_its_length(tmp_path, cuda):
    assert_cuda_agrees(write_nomic(tmp_path, trained_length=6, scaling_factor=2.0, tokenizer=False, **SMALL), cuda)


def test_experts_match_the_cpu(experts, cuda):
    assert_cuda_agrees(experts, cuda)


@torch.inference_mode()
def test_the_fp16_error_is_at_most_twice_that_of_transformers(folder, cuda):
    """The criterion of the published reference's tests: the error against that of transformers in the same dtype."""
    texts = random_ids(LENGTHS)
    expected = hidden_on_the_cpu(folder, texts)
    found = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192).token_embeddings(texts)
    model = NomicBertModel.from_pretrained(folder, dtype=torch.float16).to(DEVICE).eval()
    for ids, ours, exact in zip(texts, found, expected, strict=True):
        theirs = model(torch.from_numpy(ids).long()[None].to(DEVICE)).last_hidden_state[0].float().cpu().numpy()
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + 1e-4, len(ids)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_vectors_are_close_to_fp32(folder, cuda, dtype):
    texts = random_ids(LENGTHS)
    expected = unpadded.load(folder, device="cpu", max_length=8192).encode(texts, normalize=True)
    found = unpadded.load(folder, device=cuda, dtype=dtype, max_length=8192).encode(texts, normalize=True)
    assert (found * expected).sum(1).min() >= (0.99999 if dtype == torch.float16 else 0.999)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.gpu), *DTYPES[1:]])
def test_batch_invariant_computes_the_same_bits_in_any_batch(either, cuda, dtype):
    engine = unpadded.load(either, device=cuda, dtype=dtype, max_length=8192, batch_invariant=True)
    lengths = (1, 2, 7, 40, 40, 64, 65, 130, 513, 2048, 2500) if HAS_CUDA else (1, 2, 5, 9)
    texts = random_ids(lengths)
    alone = np.concatenate([engine.encode([ids]) for ids in texts])
    draw = np.random.default_rng(1)
    for _ in range(5 if HAS_CUDA else 1):
        order = draw.permutation(len(texts))
        engine._pipeline.token_budget = int(draw.integers(1, sum(lengths)))
        assert np.array_equal(engine.encode([texts[i] for i in order]), alone[order])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_replayed_graphs_compute_new_contents(folder, cuda, pooling):
    """Every bucket is captured once, then replayed on other batches; eager passes over the same batches agree."""
    engine = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    eager = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    eager._pipeline.runner.captures_graphs = False
    engine._pipeline.runner.pooling = eager._pipeline.runner.pooling = pooling
    draw = np.random.default_rng(2)
    for tokens, texts, _ in itertools.product(cuda_graphs.TOKEN_BUCKETS, cuda_graphs.TEXT_BUCKETS, range(2)):
        lengths = draw.integers(1, max(2, tokens // texts), draw.integers(1, texts + 1))
        texts = random_ids(lengths, seed=int(draw.integers(1 << 30)))
        np.testing.assert_allclose(engine.encode(texts), eager.encode(texts), atol=2e-3 * np.sqrt(768))
    graphs = engine._pipeline.runner.graphs
    assert len({bucket for bucket, *_ in graphs}) == len(graphs) > len(cuda_graphs.TOKEN_BUCKETS)
    assert not eager._pipeline.runner.graphs


def test_a_graph_is_captured_per_vector_options(folder, cuda):
    engine = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    eager = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    eager._pipeline.runner.captures_graphs = False
    texts = random_ids((3, 4))
    for options in ({}, {"normalize": True}, {"dimensions": 32}, {"dimensions": 32, "normalize": False}, {}):
        np.testing.assert_allclose(engine.encode(texts, **options), eager.encode(texts, **options), atol=2e-2)
    assert len(engine._pipeline.runner.graphs) == 4


def test_experts_in_a_graph(experts, cuda):
    """With batch_invariant a token's bits do not depend on the batch, nor on the padding of a graph's bucket."""
    options = {"device": cuda, "dtype": "float16", "batch_invariant": True}
    engine, eager = unpadded.load(experts, **options), unpadded.load(experts, **options)
    eager._pipeline.runner.captures_graphs = False
    batches = ((5,), (40, 1), (7, 20, 30), (60,), (200, 300), (900,)) if HAS_CUDA else ((5,), (7, 1), (4, 3, 6), (16,))
    for seed, lengths in enumerate(batches):
        texts = random_ids(lengths, seed=seed)
        assert np.array_equal(engine.encode(texts), eager.encode(texts)), lengths
    assert engine._pipeline.runner.graphs and not eager._pipeline.runner.graphs


def test_no_batch_compiles_a_kernel_again(either, cuda, compiled):
    """The numbers of tokens and texts are of every kind that Triton specializes: 1, multiples of 16, others."""
    engine = unpadded.load(either, device=cuda, dtype="float16", batch_invariant=True)
    engine.encode(random_ids((9, 9)))  # exceeds the buckets of the stand-in
    engine.encode(random_ids((5,)))
    before = compiled()
    assert before > 0 or HAS_CUDA  # on a GPU the tests above have compiled them
    for lengths in ((1,), (16,), (17,), (1,) * 16):
        engine.encode(random_ids(lengths))
    assert compiled() == before


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_launch_does_not_wait_for_the_gpu(either, cuda, pooling):
    """Neither with a batch that exceeds every bucket, nor with a captured graph."""
    engine = unpadded.load(either, device=cuda, dtype="float16", max_length=8192)
    runner = engine._pipeline.runner
    options = VectorOptions(layer_norm=False, dimensions=runner.dimensions, normalize=True)
    runner.pooling = pooling
    batches = [random_ids(lengths) for lengths in (((700, 800, 900), (300,)) if HAS_CUDA else ((7, 10), (8,)))]
    before = [runner.launch(batch, options).wait() for batch in batches]
    assert len(runner.graphs) == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [runner.launch(batch, options) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for vectors, one in zip(before, launched, strict=True):
        np.testing.assert_allclose(one.wait(), vectors, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["torch"])
def test_library_attention_agrees(folder, attention):
    texts = random_ids(LENGTHS)
    ours = unpadded.load(folder, device="cuda", dtype="float16", max_length=8192).encode(texts, normalize=True)
    other = unpadded.load(folder, device="cuda", dtype="float16", max_length=8192, attention=attention)
    assert (other.encode(texts, normalize=True) * ours).sum(1).min() >= 0.99999
