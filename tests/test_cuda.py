"""The engine on CUDA: accuracy, independence and graphs. Without a GPU on the stand-in, with a small model."""

import itertools
import traceback
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import test_family_jina_v3 as jina_v3
import test_family_nomic_moe
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import REAL, change_json, write_bert, write_checkpoint, write_nomic
from support.devices import DEVICE, DTYPES, HAS_CUDA
from support.family_checks import assert_cuda_agrees, random_ids, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import NomicBertModel

import unpadded
from unpadded.execution import cuda_graphs
from unpadded.model.batch import SpannedIds, pack
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
    eager._pipeline.runner.graphs = None
    engine._pipeline.runner.pooling = eager._pipeline.runner.pooling = pooling
    draw = np.random.default_rng(2)
    for tokens, texts, _ in itertools.product(cuda_graphs.TOKEN_BUCKETS, cuda_graphs.TEXT_BUCKETS, range(2)):
        lengths = draw.integers(1, max(2, tokens // texts), draw.integers(1, texts + 1))
        texts = random_ids(lengths, seed=int(draw.integers(1 << 30)))
        np.testing.assert_allclose(engine.encode(texts), eager.encode(texts), atol=2e-3 * np.sqrt(768))
    graphs = engine._pipeline.runner.graphs.by_key
    assert len({bucket for bucket, *_ in graphs}) == len(graphs) > len(cuda_graphs.TOKEN_BUCKETS)


def test_vector_options_share_a_graph(folder, cuda):
    engine = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    eager = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    eager._pipeline.runner.graphs = None
    texts = random_ids((3, 4))
    for options in ({}, {"normalize": True}, {"dimensions": 32}, {"dimensions": 32, "normalize": False}, {}):
        np.testing.assert_allclose(engine.encode(texts, **options), eager.encode(texts, **options), atol=2e-2)
    assert len(engine._pipeline.runner.graphs.by_key) == 1


def test_a_device_without_an_index_is_the_current_one(folder, cuda):
    with torch.cuda.device(cuda):
        engine = unpadded.load(folder, device="cuda", dtype="float16")
        index = torch.cuda.current_device()
    assert engine.describe()["device"] == f"cuda:{index}"
    assert engine.encode(random_ids((5,))).shape == (1, engine.dimensions)  # where another device may be current


def test_an_engine_whose_cuda_context_is_broken_is_not_ready(folder, cuda, monkeypatch):
    runner = unpadded.load(folder, device=cuda, dtype="float16")._pipeline.runner
    assert runner.ready_devices == 1

    def query():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.encoder, "stream", SimpleNamespace(query=query))
    assert runner.ready_devices == 0


def test_random_requests_capture_no_more_graphs_and_compile_no_more_kernels(tmp_path, cuda, compiled, monkeypatch):
    """There is a graph per bucket, with and without an adapter; nothing else that a request chooses adds one."""
    if not HAS_CUDA:
        monkeypatch.setattr("support.stand_in.launch", lambda *_: None)  # compiles kernels but does not run them
    one = {"num_hidden_layers": 1}
    tensors = jina_v3.published_names(jina_v3.model_of(jina_v3.MODERN | one).state_dict())
    folder = write_checkpoint(tmp_path, jina_v3.SMALL | one, jina_v3.with_adapters(tensors))
    runner = unpadded.load(folder, device=cuda, dtype="float16")._pipeline.runner
    draw = np.random.default_rng(0)

    def request(tokens, texts, adapter):
        cuts = np.sort(draw.choice(np.arange(1, tokens), texts - 1, replace=False))
        lengths = np.diff(cuts, prepend=0, append=tokens)
        layer_norm, normalize = draw.integers(2, size=2).astype(bool).tolist()
        dimensions = int(draw.integers(1, runner.dimensions + 1))
        options = VectorOptions(layer_norm=layer_norm, dimensions=dimensions, normalize=normalize, adapter=adapter)
        vectors = runner.launch(random_ids(lengths, vocabulary=jina_v3.VOCABULARY), options)()
        assert vectors.shape == (texts, dimensions)

    buckets = list(itertools.product(cuda_graphs.TOKEN_BUCKETS, cuda_graphs.TEXT_BUCKETS))
    buckets = [(tokens, texts) for tokens, texts in buckets if texts <= tokens]
    most = cuda_graphs.TOKEN_BUCKETS[-1]
    for adapter in (None, jina_v3.TASKS[0]):
        request(most + 1, 3, adapter)
        for tokens, texts in buckets:
            request(tokens, texts, adapter)
    kernels = compiled()
    assert len(runner.graphs.by_key) == 2 * len(buckets)
    for _ in range(1000):
        tokens = int(draw.integers(1, 2 * most))
        texts = int(draw.integers(1, min(tokens, cuda_graphs.TEXT_BUCKETS[-1]) + 1))
        request(tokens, texts, draw.choice([None, *jina_v3.TASKS]))
    assert len(runner.graphs.by_key) == 2 * len(buckets) and compiled() == kernels


class OutOfMemoryIn:
    """An encoder whose calls of some numbers, counted from 1, do not fit the memory."""

    def __init__(self, encoder, *calls):
        self.failing, self.calls = calls, 0
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def __call__(self, batch, **options):
        self.calls += 1
        if self.calls in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return self._encoder(batch, **options)


@pytest.mark.parametrize("call", [2, 3])
def test_a_capture_that_does_not_fit_destroys_the_graphs_that_share_its_workspace(folder, cuda, call):
    """The first two calls of the encoder warm up; after an error there, the memory that they use must not be reused."""
    engine = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)
    runner = engine._pipeline.runner
    one, two = random_ids((5,)), random_ids((9, 5))
    graphs, runner.graphs = runner.graphs, None
    expected = np.concatenate([engine.encode(one), engine.encode(two)])
    runner.graphs = graphs
    engine.encode(one)
    ((key, graph),), pool = graphs.by_key.items(), graphs._pool
    runner.encoder = OutOfMemoryIn(runner.encoder, call)
    found = np.concatenate([engine.encode(two), engine.encode(one)])[[2, 0, 1]]
    np.testing.assert_allclose(found, expected, atol=2e-2)
    assert (graphs.by_key[key] is graph) == (call == 2)
    assert (graphs._pool is pool) == (call == 2), "the handle of a pool without graphs is not valid"


@torch.no_grad()
def test_forward_replays_graphs_and_its_result_stays(either, cuda):
    runner = unpadded.load(either, device=cuda, dtype="float16", batch_invariant=True)._pipeline.runner
    batches = [pack(random_ids(lengths, seed=seed), runner.encoder.spec) for seed, lengths in enumerate(((5,), (4,)))]
    found = [runner.forward(batch) for batch in batches]
    assert len(runner.graphs.by_key) == 1
    runner.graphs = None
    for hidden, batch in zip(found, batches, strict=True):
        assert hidden.shape == (*batch.input_ids.shape, runner.encoder.spec.hidden)
        assert not hidden.is_inference(), "a head on it can be trained"
        assert torch.equal(hidden.cpu(), runner.forward(batch).cpu())


def test_engines_on_two_devices_capture_on_their_own(folder, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    engines = [unpadded.load(folder, device=f"cuda:{index}", dtype="float16", batch_invariant=True) for index in (0, 1)]
    for seed in range(2):
        texts = random_ids((5,), seed=seed)
        assert np.array_equal(*(engine.encode(texts) for engine in engines))


def test_experts_in_a_graph(experts, cuda):
    """With batch_invariant a token's bits do not depend on the batch, nor on the padding of a graph's bucket."""
    options = {"device": cuda, "dtype": "float16", "batch_invariant": True}
    engine, eager = unpadded.load(experts, **options), unpadded.load(experts, **options)
    eager._pipeline.runner.graphs = None
    batches = ((5,), (40, 1), (7, 20, 30), (60,), (200, 300), (900,)) if HAS_CUDA else ((5,), (7, 1), (4, 3, 6), (16,))
    for seed, lengths in enumerate(batches):
        texts = random_ids(lengths, seed=seed)
        assert np.array_equal(engine.encode(texts), eager.encode(texts)), lengths
    assert engine._pipeline.runner.graphs.by_key


def test_scores_of_pairs_in_a_graph(tmp_path, cuda):
    """Tokens of type 1 have the id ~id."""
    folder = write_bert(tmp_path, tokenizer=False, **SMALL)
    tensors, hidden = load_file(folder / "model.safetensors"), SMALL.get("hidden", 128)
    for name, rows in (("pooler.dense", hidden), ("classifier", 2)):
        tensors |= {f"{name}.weight": torch.randn(rows, hidden), f"{name}.bias": torch.randn(rows)}
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b"})
    pairs = [
        np.concatenate((ids, ~other)) for ids, other in zip(random_ids((1, 5, 9)), random_ids((3, 1, 7)), strict=True)
    ]
    pairs += random_ids((4,))  # a text alone
    options = VectorOptions(layer_norm=False, dimensions=2, normalize=False, head="score")
    expected = unpadded.load(folder, device="cpu")._pipeline.runner.launch(pairs, options)()
    runner = unpadded.load(folder, device=cuda, dtype="float32")._pipeline.runner
    for rows in ([0, 1, 2, 3], [3, 2, 1, 0], [1], [3]):
        found = runner.launch([pairs[i] for i in rows], options)()
        assert relative_error(found, expected[rows]) <= 1e-4
    assert {key[-2:] for key in runner.graphs.by_key} == {("score", True), ("score", False)}


def test_spans_match_the_cpu(folder, cuda):
    bounds = [[(0, 1)], [(3, 7), (0, 9), (2, 5)], [], [(1, 2), (0, 4)]]
    texts = [
        SpannedIds(ids, np.array(spans, np.int32).reshape(-1, 2), np.zeros((len(spans), 4), np.int64))
        for ids, spans in zip(random_ids((1, 9, 3, 4)), bounds, strict=True)
    ]
    runners = [unpadded.load(folder, device=device, dtype="float32")._pipeline.runner for device in ("cpu", cuda)]
    options = VectorOptions(layer_norm=False, dimensions=runners[0].dimensions, normalize=True, rows="span")
    expected = runners[0].launch(texts, options)()
    assert expected.shape[0] == 6
    assert relative_error(runners[1].launch(texts, options)(), expected) <= 1e-4
    assert relative_error(runners[1].launch(texts[3:], options)(), expected[4:]) <= 1e-4
    assert runners[1].launch(texts[2:3], options)().shape == (0, runners[0].dimensions), "a text without spans"


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
    before = [runner.launch(batch, options)() for batch in batches]
    assert len(runner.graphs.by_key) == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [runner.launch(batch, options) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for vectors, one in zip(before, launched, strict=True):
        np.testing.assert_allclose(one(), vectors, atol=1e-3)


class NoHostOperations(TorchDispatchMode):
    """Rejects operations that compute on tensors of the host: allocations, views and copies to the device do not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        views = not function._schema.is_mutable and len({one.data_ptr() for one in tensors}) == 1
        if function._schema.name != "aten::empty" and not views and all(one.device.type == "cpu" for one in tensors):
            callers = traceback.extract_stack()
            passed_on = "return function(*args, **kwargs)"
            assert any("stand_in" in one.filename and one.line != passed_on for one in callers), function
        return result


def test_launch_runs_no_operation_of_torch_on_the_host(folder, cuda):
    """Its threads would wait for those of the tokenizer. Vectors that arrive are not in pinned memory."""
    runner = unpadded.load(folder, device=cuda, dtype="float16", max_length=8192)._pipeline.runner
    options = VectorOptions(layer_norm=False, dimensions=runner.dimensions, normalize=True)
    for batch in (random_ids((700, 800, 4000) if HAS_CUDA else (7, 10)), random_ids((3, 4))):
        runner.launch(batch, options)()
        with NoHostOperations():
            pending = runner.launch(batch, options)
        assert pending().flags.owndata
    assert runner.launch(batch, replace(options, head="states", normalize=False))().flags.owndata


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["torch"])
def test_library_attention_agrees(folder, attention):
    texts = random_ids(LENGTHS)
    ours = unpadded.load(folder, device="cuda", dtype="float16", max_length=8192).encode(texts, normalize=True)
    other = unpadded.load(folder, device="cuda", dtype="float16", max_length=8192, attention=attention)
    assert (other.encode(texts, normalize=True) * ours).sum(1).min() >= 0.99999
