"""Equal texts of a window are tokenized and embedded once, and each gets its vector."""

import asyncio

import numpy as np
import pytest
from support.checkpoints import write_nomic

import unpadded
from unpadded.tokenization.windows import WindowReader

TEXTS = ["one", "two words", "one", "a long text " * 300, [101, 2028, 102], "one", "", "a long text " * 300, ""]
TEXTS += [np.array([101, 2028, 102]), [101, 2028, 102]]
DISTINCT = 5
FIELDS = ("vectors", "token_counts", "truncated")


class Recorder:
    """Calls a method of a backend or a tokenizer and records the texts or sequences passed to it."""

    def __init__(self, method):
        self.method = method
        self.inputs = []

    def __call__(self, inputs, *arguments, **options):
        self.inputs += inputs
        return self.method(inputs, *arguments, **options)


@pytest.fixture(scope="module")
def nomic(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("window"))


@pytest.fixture
def engine(nomic):
    return unpadded.load(nomic, device="cpu", max_length=256)


@pytest.fixture
def expected(engine):
    """The embeddings of each text alone."""
    alone = [engine.embed([text], prompt="") for text in TEXTS]
    return [np.concatenate([getattr(one, name) for one in alone]) for name in FIELDS]


def record(engine, monkeypatch, method):
    """Record the sequences passed to a method of the backend, and the texts passed to the tokenizer."""
    backend = Recorder(getattr(engine._pipeline.backend, method))
    monkeypatch.setattr(engine._pipeline.backend, method, backend)
    tokenizer = Recorder(engine.tokenizer.encode)
    monkeypatch.setattr(engine.tokenizer, "encode", tokenizer)
    return backend, tokenizer


def check(embeddings, expected):
    for name, values in zip(FIELDS, expected, strict=True):
        assert np.array_equal(getattr(embeddings, name), values), name


def test_embed(engine, expected, monkeypatch):
    backend, tokenizer = record(engine, monkeypatch, "launch")
    check(engine.embed(TEXTS, prompt=""), expected)
    assert len(backend.inputs) == DISTINCT
    assert tokenizer.inputs == ["one", "two words", TEXTS[3], ""]


def test_stream_yields_one_block_per_window(engine, expected, monkeypatch):
    monkeypatch.setattr(WindowReader, "max_texts", 4)
    backend, _ = record(engine, monkeypatch, "launch")
    blocks = list(engine.stream(TEXTS, prompt=""))
    assert [len(block.vectors) for block in blocks] == [4, 4, 3]
    assert np.array_equal(np.concatenate([block.vectors for block in blocks]), expected[0])
    assert len(backend.inputs) == 3 + 4 + 2


def test_aembed(engine, expected, monkeypatch):
    backend, tokenizer = record(engine, monkeypatch, "launch")
    check(asyncio.run(engine.aembed(TEXTS, prompt="")), expected)
    assert len(backend.inputs) == DISTINCT and len(tokenizer.inputs) == 4


@pytest.mark.parametrize("texts", [3, 4, 5, 8, 11])
def test_aembed_reads_every_window(engine, expected, monkeypatch, texts):
    monkeypatch.setattr(WindowReader, "max_texts", 4)
    found = asyncio.run(engine.aembed(TEXTS[:texts], prompt=""))
    assert np.array_equal(found.vectors, expected[0][:texts])


def test_token_embeddings(engine, monkeypatch):
    expected = [engine.token_embeddings([text], prompt="")[0] for text in TEXTS]
    backend, _ = record(engine, monkeypatch, "launch")
    found = engine.token_embeddings(TEXTS, prompt="")
    assert all(np.array_equal(rows, one) for rows, one in zip(found, expected, strict=True))
    assert len(backend.inputs) == DISTINCT


def test_windows_are_cut_by_tokens_and_the_first_ones_are_small(engine):
    def sizes(texts, **options):
        plan = engine._pipeline.plan(prompt="")
        groups = list(engine._pipeline.reader.groups(texts, plan, **options))
        assert all(map(np.array_equal, [text for group in groups for text in group.texts], texts))
        assert [group.first_index for group in groups] == [
            sum(len(g.texts) for g in groups[:i]) for i in range(len(groups))
        ]
        assert [group.last for group in groups[:-1]] == [False] * (len(groups) - 1)
        return [len(group.texts) for group in groups]

    short = ["x" * 392] * 40  # 100 tokens by estimate
    assert sizes(short) == [40]
    assert sizes(short, max_tokens=800) == [1, 2, 4, 8, 8, 8, 8, 1]
    assert sizes(short, max_tokens=800, first=2) == [1, 1, 2, 2, 4, 4, 7, 5, 4, 3, 2, 2, 1, 1, 1]
    assert sizes([np.full(100, 7)] * 9, max_tokens=800) == [1, 2, 4, 2]
    long = ["x" * 4000] * 9  # 256 tokens
    assert sizes(long, max_tokens=2048) == [1, 2, 4, 2]


def test_a_device_starts_while_the_next_texts_are_tokenized(engine, expected, monkeypatch):
    """On a CPU, whose batches are not in flight, a window has as many texts as possible."""
    engine._pipeline.token_budget = 16
    assert len(list(engine.stream(TEXTS, prompt=""))) == 1
    monkeypatch.setattr(engine._pipeline.runner, "depth", 3)
    check(engine.embed(TEXTS, prompt=""), expected)
    blocks = list(engine.stream(TEXTS, prompt=""))
    assert [len(block) for block in blocks] == [3, 1, 4, 3]


def test_progress_counts_every_text(engine):
    advanced = []
    plan = engine._pipeline.plan(prompt="")
    list(engine._pipeline.blocks(TEXTS, plan, lambda texts, tokens: advanced.append((texts, tokens))))
    assert sum(texts for texts, _ in advanced) == len(TEXTS)


@pytest.mark.parametrize(
    ("text", "message"), [("\ud800", "text 5 contains a lone"), (7, "text 5 is neither"), ([-1], "text 5 has")]
)
def test_errors_name_the_index_of_the_text(engine, text, message):
    with pytest.raises(unpadded.InputError, match=message):
        engine.embed(["one", "one", "two", "one", "two", text], prompt="")


def test_a_truncation_error_names_the_index_of_the_text(engine):
    with pytest.raises(unpadded.InputError, match="text 3 is too long"):
        engine.embed(["one", "one", "one", TEXTS[3], TEXTS[3]], prompt="", truncation="error")


def test_errors_of_a_batch_name_its_texts(engine, monkeypatch):
    error = unpadded.WorkerError("a batch crashed 2 workers in a row")

    def launch(sequences, options):
        raise error

    monkeypatch.setattr(engine._pipeline.backend, "launch", launch)
    with pytest.raises(unpadded.WorkerError, match=r"2 workers in a row \(raised for texts 0, 2\)"):
        engine.embed(["one", "one", "two"], prompt="")
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as raised:
        engine.embed([f"text {i % 20}" for i in range(40)], prompt="")
    assert raised.value.__notes__ == ["raised for texts 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"]
