"""Equal texts of a window are tokenized and run once, on every way through the engine, and each is answered."""

import asyncio

import numpy as np
import pytest
from support.checkpoints import write_nomic

import unpadded

TEXTS = ["one", "two words", "one", "a long text " * 300, [101, 2028, 102], "one", "", "a long text " * 300, ""]
TEXTS += [np.array([101, 2028, 102]), [101, 2028, 102]]
DISTINCT = 5


class Counting:
    """Passes on to a runner or a tokenizer, and keeps what it was given."""

    def __init__(self, inner, name):
        self.given = []
        self._inner, self._name = inner, name

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if name != self._name:
            return found

        def counted(texts, *arguments, **options):
            self.given += texts
            return found(texts, *arguments, **options)

        return counted


@pytest.fixture(scope="module")
def nomic(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("window"))


@pytest.fixture
def engine(nomic):
    return unpadded.load(nomic, device="cpu", max_length=256)


@pytest.fixture
def apart(engine):
    """What each text gives alone."""
    found = [engine.embed([text], prompt="") for text in TEXTS]
    return [np.concatenate([getattr(one, name) for one in found]) for name in ("vectors", "token_counts", "truncated")]


def count(engine, monkeypatch, method):
    runner = Counting(engine._pipeline.backend, method)
    monkeypatch.setattr(engine._pipeline, "backend", runner)
    tokenizer = Counting(engine.tokenizer, "encode")
    monkeypatch.setattr(engine._pipeline._reader, "_tokenizer", tokenizer)
    return runner, tokenizer


def check(found, apart):
    for name, expected in zip(("vectors", "token_counts", "truncated"), apart, strict=True):
        assert np.array_equal(getattr(found, name), expected), name


def test_embed(engine, apart, monkeypatch):
    runner, tokenizer = count(engine, monkeypatch, "launch")
    check(engine.embed(TEXTS, prompt=""), apart)
    assert len(runner.given) == DISTINCT
    assert tokenizer.given == ["one", "two words", TEXTS[3], ""]


def test_stream_tells_windows_apart(engine, apart, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WINDOW_TEXTS", 4)
    runner, _ = count(engine, monkeypatch, "launch")
    blocks = list(engine.stream(TEXTS, prompt=""))
    assert [len(block.vectors) for block in blocks] == [4, 4, 3]
    assert np.array_equal(np.concatenate([block.vectors for block in blocks]), apart[0])
    assert len(runner.given) == 3 + 4 + 2


def test_aembed(engine, apart, monkeypatch):
    runner, tokenizer = count(engine, monkeypatch, "launch")
    check(asyncio.run(engine.aembed(TEXTS, prompt="")), apart)
    assert len(runner.given) == DISTINCT and len(tokenizer.given) == 4


@pytest.mark.parametrize("texts", [3, 4, 5, 8, 11])
def test_aembed_takes_every_window(engine, apart, monkeypatch, texts):
    monkeypatch.setattr("unpadded.tokenization.windows.WINDOW_TEXTS", 4)
    found = asyncio.run(engine.aembed(TEXTS[:texts], prompt=""))
    assert np.array_equal(found.vectors, apart[0][:texts])


def test_token_embeddings(engine, monkeypatch):
    expected = [engine.token_embeddings([text], prompt="")[0] for text in TEXTS]
    runner, _ = count(engine, monkeypatch, "hidden_states")
    found = engine.token_embeddings(TEXTS, prompt="")
    assert all(np.array_equal(rows, one) for rows, one in zip(found, expected, strict=True))
    assert len(runner.given) == DISTINCT


def test_chunks(nomic, monkeypatch):
    engine = unpadded.load(nomic, device="cpu")
    texts = ["w " * 3000, "short", "w " * 3000, "short"]
    runner, _ = count(engine, monkeypatch, "launch")
    found = engine.embed(texts, prompt="", long_text="mean")
    assert len(runner.given) == 3
    assert np.array_equal(found.vectors[:2], found.vectors[2:]) and not np.array_equal(*found.vectors[:2])
    assert found.token_counts.tolist() == found.token_counts[:2].tolist() * 2


def test_the_progress_counts_every_text(engine):
    advanced = []
    plan = engine._pipeline.plan(prompt="")
    list(engine._pipeline.blocks(TEXTS, plan, lambda texts, tokens: advanced.append((texts, tokens))))
    assert sum(texts for texts, _ in advanced) == len(TEXTS)


@pytest.mark.parametrize(
    ("bad", "message"), [("\ud800", "text 5 holds a lone"), (7, "text 5 is neither"), ([-1], "text 5 has")]
)
def test_errors_count_the_texts_as_they_were_given(engine, bad, message):
    with pytest.raises(unpadded.InputError, match=message):
        engine.embed(["one", "one", "two", "one", "two", bad], prompt="")


def test_too_long_counts_the_texts_as_they_were_given(engine):
    with pytest.raises(unpadded.InputError, match="text 3 is too long"):
        engine.embed(["one", "one", "one", TEXTS[3], TEXTS[3]], prompt="", truncation="error")


def test_what_is_raised_names_the_texts(engine, monkeypatch):
    error = unpadded.WorkerError("a batch ended 2 workers in a row")

    def launch(sequences, options):
        raise error

    monkeypatch.setattr(engine._pipeline.backend, "launch", launch)
    with pytest.raises(unpadded.WorkerError, match=r"2 workers in a row \(it came with texts 0, 2\)"):
        engine.embed(["one", "one", "two"], prompt="")
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as raised:
        engine.embed([f"text {i % 20}" for i in range(40)], prompt="")
    assert raised.value.__notes__ == ["it came with texts 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"]
