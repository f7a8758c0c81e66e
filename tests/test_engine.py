"""From texts to vectors: options, order, streaming and warnings, on real weights or on a seeded NomicBERT."""

import asyncio
import copy
import itertools
import logging
import pickle
import pydoc_data.topics
import threading
import traceback

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.checkpoints import add_sentence_transformers_files, change_json, write_nomic

import unpadded
from unpadded.integrations.langchain import UnpaddedEmbeddings

TEXTS = ["What is TSNE?", "Who is Laurens van der Maaten?", "", "   ", "naïve café 漢字 🙂", "a b " * 700]


@pytest.fixture(scope="module")
def engine(minilm):
    return unpadded.load(minilm, device="cpu")


@pytest.fixture(scope="module")
def nomic(tmp_path_factory):
    folder = write_nomic(tmp_path_factory.mktemp("nomic"))
    change_json(folder / "config.json", matryoshka_dimensions=[128, 64], matryoshka_layer_norm=True)
    add_sentence_transformers_files(folder, normalize=False, max_seq_length=8192)
    return unpadded.load(folder, device="cpu")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def paragraphs(count):
    blocks = (" ".join(block.split()) for text in pydoc_data.topics.topics.values() for block in text.split("\n\n"))
    return list(itertools.islice((block for block in blocks if len(block) >= 40), count))


def test_real_weights_match_sentence_transformers(minilm, engine):
    texts = paragraphs(300)
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts, show_progress_bar=False)
    assert (engine.encode(texts) * expected).sum(1).min() >= 0.999999
    bf16 = unpadded.load(minilm, device="cpu", dtype="bfloat16").encode(texts)
    assert (bf16 * expected).sum(1).min() >= 0.9995


def test_outputs_agree(engine):
    vectors = engine.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), engine.dimensions) and vectors.dtype == np.float32
    assert np.array_equal(engine.encode(TEXTS, output="torch").numpy(), vectors)
    assert engine.encode(TEXTS, output="list") == vectors.tolist()
    assert np.array_equal(engine.encode(TEXTS[0]), vectors[0])
    assert np.array_equal(engine.encode(text for text in TEXTS), vectors)


def test_embed_returns_token_counts_and_truncation(engine):
    found = engine.embed(TEXTS)
    assert found.token_counts.tolist() == [7, 12, 2, 2, 7, 256]
    assert found.truncated.tolist() == [False] * 5 + [True]
    left = engine.encode(["b " * 300 + "the end"], truncation="left")
    right = engine.encode(["b " * 300 + "the end"])
    assert not np.allclose(left, right, atol=1e-3)
    with pytest.raises(unpadded.InputError, match=r"text 5 is too long: more than 256 tokens.*truncation="):
        engine.embed(TEXTS, truncation="error")


def test_token_ids_are_embedded_unchanged(engine):
    ids = [101, 2054, 2003, 24529, 2638, 1029, 102]
    mixed = engine.encode([TEXTS[0], ids, np.array(ids), TEXTS[0]])
    assert all(np.array_equal(row, mixed[0]) for row in mixed)


def test_engines_and_results_have_short_reprs(minilm, engine):
    assert repr(engine) == f"Engine({engine.checkpoint.name!r}, bert, 384 dimensions, 256 tokens, cpu float32)"
    found = engine.embed(TEXTS[:2])
    assert repr(found) == "Embeddings(2 x 384, 19 tokens, 0 truncated)"
    assert repr(engine.embed("a " * 900)) == "Embeddings(1 x 384, 256 tokens, 1 truncated)"
    assert repr(engine.embed([])) == "Embeddings(0 x 384, 0 tokens, 0 truncated)"


def test_embeddings_are_a_sequence_of_vectors(engine):
    found = engine.embed(TEXTS)
    assert len(found) == len(TEXTS) and len(engine.embed("a")) == 1
    assert np.array_equal(found[1], found.vectors[1]) and np.array_equal(found[-2:], found.vectors[-2:])
    assert np.array_equal(np.stack(list(found)), found.vectors)
    assert np.array_equal(np.asarray(found), found.vectors) and np.asarray(found).dtype == np.float32
    assert np.asarray(found, np.float64).dtype == np.float64
    assert np.array_equal(np.asarray(engine.embed(TEXTS[1])), found.vectors[1:2])
    assert np.array(found, copy=True) is not found.vectors and np.asarray(found, copy=False) is found.vectors


def test_tracebacks_of_unusable_texts_are_short(engine):
    """They have the caller's frame, those of the two methods, and nothing after the message."""
    for call in (
        lambda: engine.encode(["a", 5]),
        lambda: engine.encode({"a": "b"}),
        lambda: asyncio.run(engine.aencode([None])),
    ):
        with pytest.raises(unpadded.InputError) as raised:
            call()
        files = [frame.filename for frame in traceback.extract_tb(raised.value.__traceback__)]
        ours = [file for file in files if "unpadded" in file.split("/")[-2:]]
        assert len(ours) == 2 and files[-1] == ours[-1]
        lines = traceback.format_exception(raised.value)
        assert lines[-1].startswith("unpadded.errors.InputError: text") and raised.value.__suppress_context__


def test_engines_and_results_can_be_pickled_and_copied(tmp_path, monkeypatch):
    """An engine loads its model again with the same options, from any folder; a copy shares the weights."""
    write_nomic(tmp_path / "model", layers=1)
    monkeypatch.chdir(tmp_path)
    engine = unpadded.load("model", device="cpu", max_length=9, dtype="bfloat16")
    found = engine.embed(TEXTS)
    embeddings = UnpaddedEmbeddings(engine)
    pickled = pickle.dumps((engine, embeddings, found))
    monkeypatch.chdir("/")
    for one in (pickle.loads(pickled)[:2], copy.deepcopy((engine, embeddings)), copy.copy([engine, embeddings])):
        again, wrapper = one
        assert again.describe() == engine.describe() and wrapper.embed_query("x") == embeddings.embed_query("x")
        assert np.array_equal(again.encode(TEXTS), found.vectors)
    for copied in (copy.copy(engine), copy.deepcopy(engine)):
        assert copied is not engine and copied._pipeline is engine._pipeline
    for one in (pickle.loads(pickled)[2], copy.deepcopy(found)):
        assert all(np.array_equal(value, getattr(one, name)) for name, value in vars(found).items())
    with pytest.raises(unpadded.OptionError, match=r"cannot be pickled: .*; pickle the module"):
        pickle.dumps(unpadded.Engine(engine._pipeline))
    for error in (unpadded.InputError("text 3"), unpadded.TooLargeError(3, 8192, "cuda:0"), unpadded.DeadlineError()):
        for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert (type(again), str(again)) == (type(error), str(error))


def test_no_texts_give_empty_results(engine):
    assert engine.encode([]).shape == (0, 384)
    assert engine.encode([], precision="ubinary").shape == (0, 48)
    assert engine.token_embeddings([]) == []
    assert list(engine.stream([])) == []


def test_stream_reads_one_window_ahead(engine, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 50)
    texts = (f"text number {index}" for index in itertools.count())
    blocks = engine.stream(texts)
    first, second = next(blocks), next(blocks)
    assert int(next(texts).split()[-1]) == 150, "two windows were returned and one was read ahead"
    expected = engine.encode(f"text number {index}" for index in range(100))
    assert np.array_equal(np.concatenate([first.vectors, second.vectors]), expected)


def test_texts_are_read_in_the_callers_thread(engine, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 2)
    threads = set()

    def texts():
        for index in range(5):
            threads.add(threading.get_ident())
            yield str(index)

    assert len(engine.encode(texts())) == 5
    assert threads == {threading.get_ident()}


def test_texts_of_one_window_start_no_thread(engine, monkeypatch):
    """Starting a thread takes three times as long as tokenizing a query."""
    expected = engine.encode(["a", "b"])

    def fail(thread):
        raise AssertionError(thread.name)

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert np.array_equal(engine.encode(["a", "b"]), expected)
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 2)
    with pytest.raises(AssertionError, match="unpadded-tokenize"):
        engine.encode(["a", "b", "c"])


def test_encode_works_without_a_stderr(engine, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert engine.encode(["a"]).shape == (1, engine.dimensions)


def test_a_bad_text_of_a_later_window_keeps_the_earlier_blocks(engine, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 2)
    blocks = engine.stream(["a", "b", "c", None, "e"])
    assert len(next(blocks).vectors) == 2
    with pytest.raises(unpadded.InputError, match="text 3 is neither"):
        next(blocks)
    assert np.isfinite(engine.encode(["still works"])).all()


def test_interrupted_calls_stop_their_threads(engine, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 2)
    before = set(threading.enumerate())
    blocks = engine.stream(str(index) for index in itertools.count())
    next(blocks)
    blocks.close()
    assert set(threading.enumerate()) <= before

    def interrupted():
        yield from ("a", "b", "c")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.encode(interrupted())
    assert set(threading.enumerate()) <= before

    def fails(sequences, options):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(engine._pipeline.runner, "launch", fails)
        with pytest.raises(ZeroDivisionError):
            engine.encode(["a", "b", "c", "d", "e"])
    assert set(threading.enumerate()) <= before
    assert np.isfinite(engine.encode(["still works"])).all()


def test_any_token_budget_keeps_the_order(minilm):
    texts = paragraphs(60)
    expected = unpadded.load(minilm, device="cpu").encode(texts)
    for budget in (1, 300, 100_000):
        assert np.array_equal(unpadded.load(minilm, device="cpu", token_budget=budget).encode(texts), expected)


def test_precisions_quantize_the_fp32_vectors(engine):
    vectors = engine.encode(TEXTS)
    assert np.array_equal(engine.encode(TEXTS, precision="float16"), vectors.astype(np.float16))
    assert np.array_equal(engine.encode(TEXTS, precision="ubinary"), np.packbits(vectors > 0, axis=-1))
    ranges = np.stack([np.full(384, -0.2), np.full(384, 0.2)])
    whole = engine.encode(TEXTS, precision="int8", ranges=ranges)
    streamed = np.concatenate([block.vectors for block in engine.stream(TEXTS, precision="int8", ranges=ranges)])
    assert np.array_equal(whole, streamed)
    with pytest.raises(unpadded.OptionError, match="without ranges"):
        engine.stream(TEXTS, precision="int8")


def test_a_task_puts_its_prompt_before_the_text(nomic):
    with_task = nomic.encode(["What is TSNE?"], task="search_query")
    assert np.array_equal(with_task, nomic.encode(["search_query: What is TSNE?"]))
    assert np.array_equal(with_task, nomic.encode(["What is TSNE?"], prompt="search_query: "))
    assert not np.allclose(with_task, nomic.encode(["What is TSNE?"], task="clustering"))
    with pytest.raises(unpadded.OptionError, match=r"'query'; .* has search_query, search_document"):
        nomic.encode(["x"], task="query")
    with pytest.raises(unpadded.OptionError, match="both given"):
        nomic.encode(["x"], task="clustering", prompt="y")


def test_left_truncation_keeps_the_prompt(tmp_path):
    engine = unpadded.load(write_nomic(tmp_path), device="cpu", max_length=12)
    rows = [engine.token_embeddings([text], task="clustering", truncation="left")[0] for text in ("a " * 50, "b " * 50)]
    assert rows[0].shape == rows[1].shape == (12, 128)
    kept = engine.token_embeddings(["a a a a a a a"], task="clustering")[0]
    assert np.array_equal(rows[0], kept)


def test_matryoshka_is_layer_norm_cut_l2(nomic):
    full = nomic.encode(["x y z"], task="clustering").astype(np.float64)
    (hidden,) = nomic.token_embeddings(["x y z"], task="clustering")
    np.testing.assert_allclose(full[0], hidden.mean(0), atol=1e-5)
    assert abs(np.linalg.norm(full) - 1) > 0.01  # v1.5 has no Normalize module
    normed = (full - full.mean()) / np.sqrt(full.var() + 1e-5)
    cut = nomic.encode(["x y z"], task="clustering", dimensions=64)
    np.testing.assert_allclose(cut, unit(normed[:, :64]), atol=1e-6)
    np.testing.assert_allclose(nomic.encode(["x y z"], task="clustering", normalize=True), unit(full), atol=1e-6)


def test_cutting_a_model_without_matryoshka_normalizes_and_warns(engine, caplog):
    with caplog.at_level(logging.WARNING, "unpadded"):
        cut = engine.encode(TEXTS, dimensions=100)
    np.testing.assert_allclose(cut, unit(engine.encode(TEXTS)[:, :100]), atol=1e-6)
    assert "not known to be trained for matryoshka" in caplog.text


@pytest.mark.parametrize("mode", ["cls", "lasttoken"])
def test_pooling_and_dense_modules(tmp_path, mode):
    folder = write_nomic(tmp_path)
    add_sentence_transformers_files(folder, pooling=mode, normalize=True, dense=(128, 48))
    engine = unpadded.load(folder, device="cpu")
    assert engine.dimensions == 48
    rows = np.stack([hidden[0 if mode == "cls" else -1] for hidden in engine.token_embeddings(TEXTS, prompt="")])
    from safetensors.torch import load_file

    weights = load_file(next(folder.glob("*Dense/model.safetensors")))
    expected = torch.tanh(torch.from_numpy(rows) @ weights["linear.weight"].T + weights["linear.bias"]).numpy()
    np.testing.assert_allclose(engine.encode(TEXTS, prompt=""), unit(expected), atol=1e-5)


def test_each_warning_is_logged_once(tmp_path, caplog):
    engine = unpadded.load(write_nomic(tmp_path, trained_length=64), device="cpu")
    with caplog.at_level(logging.WARNING, "unpadded"):
        for _ in range(2):
            engine.encode(["search_query: fine", "no task", "word " * 100])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "text 1 has none; pass task='search_query'" in messages[0]
    assert "longer than the 64" in messages[1] and "rotary_scaling_factor=2" in messages[1]


def test_describe_returns_plain_values_and_the_assumed_defaults(tmp_path):
    import json

    engine = unpadded.load(write_nomic(tmp_path), device="cpu")
    description = json.loads(json.dumps(engine.describe()))
    assert description["pooling"] == "mean" and description["dtype"] == "float32"
    assert any("mean" in sentence for sentence in description["defaults"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dimensions": 0}, "dimensions are out of range: 0; .* supports 1 to 384"),
        ({"dimensions": 385}, "dimensions are out of range: 385"),
        ({"precision": "int4"}, "precision is unknown: 'int4'; use one of float32"),
        ({"truncation": "middle"}, "truncation is unknown: 'middle'; use one of right, left, error"),
        ({"output": "tf"}, "output is unknown: 'tf'; use one of numpy"),
        ({"task": "search_query"}, "task is unknown: 'search_query'"),
    ],
)
def test_wrong_options_raise(engine, option, message):
    with pytest.raises(unpadded.OptionError, match=message):
        engine.encode(["x"], **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "tpu-9"}, "device is unknown: 'tpu-9'"),
        ({"device": "cuda:7"}, "device does not exist: 'cuda:7'"),
        ({"dtype": "int4"}, "dtype is unknown: 'int4'"),
        ({"attention": "fast"}, "attention is unknown: 'fast'; use one of auto"),
        ({"attention": "flash-attn"}, "runs on CUDA in float16 or bfloat16 only"),
        ({"token_budget": 0}, "token_budget is not positive: 0"),
        ({"max_length": 513}, "513"),
        ({"rotary_scaling_factor": 2}, "rotary_scaling_factor"),
    ],
)
def test_wrong_loading_options_raise(minilm, option, message):
    with pytest.raises(unpadded.OptionError, match=message):
        unpadded.load(minilm, **({"device": "cpu"} | option))
