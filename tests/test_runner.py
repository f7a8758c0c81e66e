"""Transfer to a device, padding to a CUDA graph's bucket, and splitting of batches that do not fit the memory."""

import asyncio
import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.checkpoints import write_bert, write_nomic
from torch.utils._python_dispatch import TorchDispatchMode

import unpadded
from unpadded.execution.cuda_graphs import TEXT_BUCKETS, TOKEN_BUCKETS, bucket_of, fill
from unpadded.execution.memory import bytes_per_token
from unpadded.execution.runner import Runner
from unpadded.execution.transfer import from_words, to_words
from unpadded.model.batch import pack
from unpadded.model.heads import Head, select_pooled_tokens
from unpadded.model.weights import plain_weights
from unpadded.options import VectorOptions
from unpadded_kernels import activation, matryoshka
from unpadded_kernels.attention import make_tile_map


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = write_nomic(tmp_path_factory.mktemp("nomic"), scaling_factor=2.0, trained_length=100)
    return unpadded.load(folder, device="cpu")._pipeline.runner


def draw(lengths):
    ids = np.random.default_rng(0)
    return [ids.integers(5, 30000, length, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("lengths", [(1,), (7, 3, 40), (130, 5, 99)])
def test_a_batch_is_unchanged_after_the_transfer(runner, lengths, cuda):
    batch = replace(pack(draw(lengths), runner.encoder.spec), tile_map=make_tile_map(lengths, 64))
    assert from_words(to_words(batch), batch).token_types is None
    batch = replace(batch, token_types=batch.positions % 2)
    words = to_words(batch)
    arrived = from_words(words, batch)
    for name in ("input_ids", "positions", "token_types", "cu_seqlens", "inv_freq", "tile_map"):
        assert torch.equal(getattr(arrived, name), getattr(batch, name)), name
        assert (getattr(arrived, name).data_ptr() - words.data_ptr()) % 16 == 0, name


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("lengths", [(1,), (64,), (7, 3, 40), (60, 60, 60, 60), (99, 1)])
def test_padding_to_a_bucket_keeps_the_bits(runner, pooling, lengths):
    runner = Runner(runner.encoder, runner.device, {"vector": Head(pooling)})
    texts = draw(lengths)
    batch = pack(texts, runner.encoder.spec)
    tokens, count = bucket_of(batch)
    assert tokens == min(size for size in TOKEN_BUCKETS if size >= sum(lengths))
    assert count == min(size for size in TEXT_BUCKETS if size >= len(lengths))
    filled = fill(batch, (tokens, count), 64)
    assert (len(filled.input_ids), len(filled.cu_seqlens)) == (tokens, count + 1)
    options = VectorOptions(layer_norm=False, dimensions=128, normalize=True)
    with torch.inference_mode():
        rows = matryoshka(runner._run(filled, None, "vector"), False, 128, True)[: len(texts)]
    alone = np.concatenate([runner.launch([ids], options)() for ids in texts])
    assert np.array_equal(rows.numpy(), alone)


@pytest.mark.parametrize("pooling, places", [("cls", (0, 0, 0, 0, 0, 0)), ("last", (0, 0, 128, 299, 127, 0))])
def test_select_pooled_tokens_returns_tokens_and_their_tiles(pooling, places):
    lengths = (0, 1, 129, 300, 128, 0)
    cu_seqlens = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32)
    selected = select_pooled_tokens(cu_seqlens, pooling, 128)
    starts = cu_seqlens[:-1].tolist()
    assert selected.indices.tolist() == [min(start + place, 557) for start, place in zip(starts, places, strict=True)]
    assert selected.tile_map.dtype == torch.int32
    own = make_tile_map(lengths, 128).tolist()
    for tile, start, length, place in zip(selected.tile_map.tolist(), starts, lengths, places, strict=True):
        assert tile == [start, length, place // 128] and (tile in own or length == 0)


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_the_last_layer_computes_only_the_pooled_tokens(runner, pooling, monkeypatch):
    runner, maps, rows_of_out = Runner(runner.encoder, runner.device, {"vector": Head(pooling)}), [], []
    encoder = runner.encoder
    attention = encoder.attention

    def attend(qkv, batch, *rest):
        maps.append(batch.tile_map)
        return attention.attend(qkv, batch, *rest)

    def counted(layer):
        return replace(layer, out=lambda x: rows_of_out.append(len(x)) or layer.out(x))

    options = VectorOptions(layer_norm=False, dimensions=128, normalize=False)
    lengths = (0, 7, 3, 130, 0, 40, 700, 700, 1, 0, 900)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "attention", replace(attention, attend=attend))
        patch.setattr(encoder, "weights", replace(encoder.weights, layers=tuple(map(counted, encoder.weights.layers))))
        rows = runner.launch(draw(lengths), options)()
    *earlier, last = rows_of_out
    assert set(earlier) == {sum(lengths)} and last == len(lengths)
    assert set(maps[:-1]) == {None} and maps[-1].shape == (len(lengths), 3)
    states = runner.launch(draw(lengths), replace(options, head="states"))()
    states = np.split(states, np.cumsum(lengths)[:-1])
    for row, hidden in zip(rows, states, strict=True):
        assert np.array_equal(row, hidden[0 if pooling == "cls" else -1] if len(hidden) else np.zeros(128))
    assert not runner.launch(draw((0, 0)), options)().any()


def test_tiles_are_the_blocks_of_all_texts_longest_first():
    ids = np.random.default_rng(0)
    for texts in (0, 1, 2, 7, 300):
        lengths = ids.integers(0, 400, texts).tolist()
        texts = zip(itertools.accumulate(lengths, initial=0), lengths, strict=False)
        for block_m in (64, 128):
            texts = sorted(texts, key=lambda text: -text[1])  # equal lengths stay in order
            expected = [(*text, block) for text in texts for block in range(-(-text[1] // block_m))]
            assert make_tile_map(lengths, block_m).tolist() == list(map(list, expected))


def test_added_tiles_belong_to_no_tokens(runner):
    batch = replace(pack(draw((70, 3)), runner.encoder.spec), tile_map=make_tile_map((70, 3), 64))
    filled = fill(batch, (128, 8), 64)
    assert filled.tile_map.tolist() == [[0, 70, 0], [0, 70, 1], [70, 3, 0], *[[0, 0, 0]] * 7]


def test_a_bucket_holds_the_tiles_of_any_texts(runner):
    for lengths in ((65,) * 31 + (33,), (1,) * 8, (2048,), (64,) * 64, (65,) * 63 + (1,), (2, 62)):
        batch = replace(pack(draw(lengths), runner.encoder.spec), tile_map=make_tile_map(lengths, 64))
        tokens, count = bucket_of(batch)
        filled = fill(batch, (tokens, count), 64).tile_map
        assert len(filled) == tokens // 64 + count >= len(batch.tile_map)
        assert torch.equal(filled[: len(batch.tile_map)], batch.tile_map) and not filled[len(batch.tile_map) :].any()


def test_batches_without_a_bucket(runner):
    spec = runner.encoder.spec
    assert bucket_of(pack(draw([3] * (TEXT_BUCKETS[-1] + 1)), spec)) is None  # too many texts
    assert bucket_of(pack(draw([3] * TEXT_BUCKETS[-1]), spec)) == (1024, TEXT_BUCKETS[-1])
    assert bucket_of(pack(draw([99] * 42), spec)) is None  # too many tokens
    assert bucket_of(pack(draw([101, 5]), spec)) is None  # a text with rotary frequencies of its own
    batch = pack(draw([5]), spec)
    assert bucket_of(batch) == bucket_of(replace(batch, token_types=batch.positions)) == (64, 1)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


class Small:
    """An encoder on a device whose memory holds `tokens` at a time."""

    def __init__(self, encoder, tokens, error=OUT_OF_MEMORY):
        self.tokens, self.error, self.ran = tokens, error, []
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def __call__(self, batch, **options):
        self.ran.append(batch.lengths)
        if sum(batch.lengths) > self.tokens:
            raise self.error
        return self._encoder(batch, **options)


@pytest.fixture
def engine(tmp_path):
    """Return an engine that computes each batch on one core, so as a whole."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield unpadded.load(write_nomic(tmp_path, scaling_factor=2.0, trained_length=100), device="cpu", token_budget=800)
    torch.set_num_threads(threads)


def test_a_batch_that_does_not_fit_is_split(engine, caplog):
    texts = draw([5, 300, 80, 7, 7, 200, 90, 100, 11])
    expected = engine.encode(texts)
    rows = engine.token_embeddings(texts)
    engine._pipeline.runner.encoder = small = Small(engine._pipeline.runner.encoder, 320)
    assert np.array_equal(engine.encode(texts), expected)
    assert sum(small.ran[0]) == 800, "the whole batch is tried first"
    small.ran.clear()
    assert np.array_equal(engine.encode(texts), expected)
    assert all(np.array_equal(*pair) for pair in zip(engine.token_embeddings(texts), rows, strict=True))
    assert max(map(sum, small.ran)) <= 400, "later batches of this size are split at once"
    assert len(caplog.messages) == 1
    assert "a batch of 800 tokens does not fit the memory of cpu" in caplog.text


def test_of_other_errors_those_of_memory_split_a_batch(engine):
    texts = draw([5, 300, 80])
    expected = engine.encode(texts)
    encoder = engine._pipeline.runner.encoder
    engine._pipeline.runner.encoder = Small(encoder, 320, torch.AcceleratorError("CUDA error: out of memory"))
    assert np.array_equal(engine.encode(texts), expected)
    engine._pipeline.runner.encoder = Small(encoder, 320, torch.AcceleratorError("CUDA error: an illegal address"))
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        engine.encode(draw([400]))


def test_batches_grow_again_when_memory_is_free(engine):
    texts = draw([100] * 8)
    engine._pipeline.runner.encoder = small = Small(engine._pipeline.runner.encoder, 320)
    engine.encode(texts)
    small.tokens = math.inf
    for _ in range(80):
        engine.encode(draw([3]))
    small.ran.clear()
    engine.encode(texts)
    assert max(map(sum, small.ran)) == 200, "short batches do not show that there is memory"
    for _ in range(60):
        engine.encode(texts)
    assert sum(small.ran[-1]) == 800


def test_the_error_names_a_text_that_does_not_fit_alone(engine):
    engine._pipeline.runner.encoder = Small(engine._pipeline.runner.encoder, 320)
    texts = draw([5, 300, 5, 80, 321, 7])
    message = "text 4 does not fit the memory of cpu: 321 tokens; free memory, load with a max_length below 321"
    for attempt in (engine.encode, engine.token_embeddings, lambda texts: asyncio.run(engine.aencode(texts))):
        with pytest.raises(unpadded.TooLargeError, match=message):
            attempt(texts)
        assert np.isfinite(engine.encode(texts[:4])).all()


def test_a_text_that_does_not_fit_fails_only_its_caller(engine):
    expected = engine.encode(draw([5, 300]))
    engine._pipeline.runner.encoder = Small(engine._pipeline.runner.encoder, 320)

    async def together():
        calls = (engine.aencode(texts) for texts in (draw([5, 300]), draw([7, 400]), draw([9])))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, large, last = asyncio.run(together())
    assert np.array_equal(first, expected) and last.shape == (1, 128)
    assert isinstance(large, unpadded.TooLargeError) and "text 1 does not fit" in str(large)


class Live(TorchDispatchMode):
    """Records the maximum number of bytes that the results of operations take at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {id(tensor.untyped_storage()) for tensor in arguments if isinstance(tensor, torch.Tensor)}
        result = function(*arguments, **keywords or {})
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in given:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def unfused(layer):
    """The layer with the activation as a separate operation."""
    up = layer.mlp.up
    separate = replace(up, activation=None)
    return replace(layer, mlp=replace(layer.mlp, up=lambda x: activation(separate(x), up.activation)))


@pytest.mark.parametrize("write", [write_nomic, write_bert], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_per_token_bounds_the_peak_memory(tmp_path, write, dtype):
    """As on a GPU: the activation separate from the MLP's first linear layer, in which a layer needs most memory."""
    spec = unpadded.load(write(tmp_path, intermediate=512), device="cpu", dtype=dtype).checkpoint.spec
    encoder = unpadded.load(tmp_path, device="cpu", dtype=dtype)._pipeline.runner.encoder
    weights = plain_weights(encoder.weights)
    encoder.weights = replace(weights, layers=tuple(map(unfused, weights.layers)))
    itemsize = encoder.weights.word.dtype.itemsize
    peaks = []
    for tokens in (1000, 3000):
        batch = pack(draw([tokens // 20] * 20), spec)
        with torch.inference_mode(), Live() as live:
            encoder(batch)
        peaks.append(live.peak)
    counted = bytes_per_token(spec, itemsize)
    assert 0.8 * counted < (peaks[1] - peaks[0]) / 2000 <= counted


def test_an_automatic_budget_depends_on_the_free_memory(minilm, tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("unpadded.execution.memory.MEMINFO", meminfo)

    def budget(kibibytes, **options):
        meminfo.write_text(f"MemTotal:  99999999 kB\nMemAvailable:   {kibibytes} kB\n")
        return unpadded.load(minilm, device="cpu", **options).describe()["token_budget"]

    spec = unpadded.load(minilm, device="cpu").checkpoint.spec
    assert budget(10_000, token_budget="auto") == 10_000 * 1024 // 2 // bytes_per_token(spec, 4)
    assert budget(10_000, token_budget="auto", dtype="bfloat16") == 10_000 * 1024 // 2 // bytes_per_token(spec, 2)
    assert budget(1, token_budget="auto") == 1
    assert budget(10**8, token_budget="auto") == budget(10) == budget(10**8) == 2048
    assert budget(10, token_budget=512) == 512
    meminfo.unlink()
    assert unpadded.load(minilm, device="cpu", token_budget="auto").describe()["token_budget"] == 2048
    with pytest.raises(unpadded.OptionError, match="token_budget is unknown: 'max'; use auto"):
        unpadded.load(minilm, device="cpu", token_budget="max")
