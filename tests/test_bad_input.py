"""Texts that cannot be embedded raise an error with their index and value; unusual texts are embedded."""

import array
import collections
import threading

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_nomic

import unpadded
from unpadded.errors import CheckpointError, InputError, OutputError, WeightsError


@pytest.fixture(scope="module")
def engine(minilm):
    return unpadded.load(minilm, device="cpu")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "text 613 is neither a string nor token ids: None"),
        (7, "text 613 is neither a string nor token ids: 7"),
        (["a", "b"], "text 613 is neither a string nor token ids: \\['a', 'b'\\]"),
        ([[1], [2, 3]], "text 613 is neither"),
        ([1.5], "text 613 is neither"),
        (b"bytes", "text 613 is neither a string nor token ids: b'bytes'"),
        (bytearray(b"bytes"), "text 613 is neither"),
        (bytearray(), "text 613 is neither"),
        (memoryview(b"bytes"), "text 613 is neither"),
        (array.array("b", [5, 6]), "text 613 is neither"),
        (np.array([5, 6], np.uint8), "text 613 is neither"),
        (pa.scalar("a string"), "text 613 is neither"),
        (pa.array(["a string"]), "text 613 is neither"),
        ({5: 6}, "text 613 is neither"),
        ({5, 6}, "text 613 is neither"),
        (torch.tensor(5), "text 613 is neither"),
        (torch.tensor([5.0]), "text 613 is neither"),
        (torch.zeros(1, device="meta", dtype=torch.int32), "text 613 is neither"),
        ([True, False], "text 613 is neither"),
        (threading.Lock(), "text 613 is neither"),
        ([], "text 613 has 0 token ids; pass 1 to 256"),
        ([5] * 257, "text 613 has 257 token ids; pass 1 to 256"),
        ([5, 30522], "text 613 has a token id out of range: 30522; use ids from 0 to 30521"),
        ([-1], "text 613 has a token id out of range: -1"),
        ("lone \ud800 surrogate", "text 613 contains a lone surrogate: U\\+D800 at character 5"),
    ],
)
def test_the_error_names_one_bad_text_among_a_thousand(engine, bad, message):
    texts = ["fine"] * 1000
    texts[613] = bad
    with pytest.raises(InputError, match=message):
        engine.encode(texts)
    assert np.isfinite(engine.encode(["still works"])).all()


@pytest.mark.parametrize(
    "texts",
    [
        None,
        3,
        b"bytes",
        {"a": "text"},
        collections.UserDict(a="text"),  # as transformers' BatchEncoding is
        {"text", "another"},
        pd.DataFrame({"a": ["text"]}),
        pl.DataFrame({"a": ["text"]}),
        pa.table({"a": ["text"]}),
        pa.record_batch({"a": ["text"]}),
        np.array("text"),
        torch.tensor(5),
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_texts_must_be_a_sequence(engine, texts):
    with pytest.raises(InputError, match=f"texts are not a sequence: {type(texts).__name__}; .* one column of a table"):
        engine.encode(texts)


@pytest.mark.parametrize("texts", [bytearray(b"text"), array.array("i", [5, 6]), np.array([5, 6]), pa.array([5, 6])])
def test_one_sequence_of_integers_is_not_a_list_of_texts(engine, texts):
    with pytest.raises(InputError, match="text 0 is neither a string nor token ids"):
        engine.encode(texts)


def test_the_tokenizer_rejects_a_single_string(engine):
    with pytest.raises(InputError, match="texts are one string: 'text'"):
        engine.tokenizer.encode("text", max_length=9)


TEXTS = ["what is a tide", "how bread is made", "", "what is a tide"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
        pd.Series(TEXTS, index=[3, 2, 1, 0]),
        pd.Series(TEXTS, dtype="category"),
        pd.Series(TEXTS, dtype="string[pyarrow]"),
        pd.Index(TEXTS),
        pl.Series(TEXTS),
        pl.Series(TEXTS, dtype=pl.Categorical),
        np.array(TEXTS),
        np.array(TEXTS, object),
        np.array(TEXTS, np.dtypes.StringDType()),
        dict(enumerate(TEXTS)).values(),
        collections.deque(TEXTS),
    ],
    ids=lambda column: f"{type(column).__module__}.{type(column).__name__}",
)
def test_a_column_of_strings_is_its_strings(engine, column, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 3)  # pyarrow's are read in slices
    assert np.array_equal(engine.encode(column), engine.encode(TEXTS))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[101, 2054, 102], [101, 102]]),
        pl.Series([[101, 2054, 102], [101, 102]]),
        pd.Series([[101, 2054, 102], [101, 102]]),
        [torch.tensor([101, 2054, 102]), array.array("i", [101, 102])],
        [(101, 2054, 102), range(101, 103)],
    ],
    ids=lambda column: f"{type(column).__module__}.{type(column).__name__}",
)
def test_sequences_of_integers_are_token_ids(engine, column):
    assert np.array_equal(engine.encode(column), engine.encode([[101, 2054, 102], [101, 102]]))


@pytest.mark.parametrize("missing", [pa.array(["a", None]), pd.Series(["a", None]), pl.Series(["a", None])])
def test_the_error_names_a_missing_value_of_a_column(engine, missing):
    with pytest.raises(InputError, match=r"text 1 is neither a string nor token ids: (None|nan)"):
        engine.encode(missing)


def test_unusual_texts_are_embedded(engine):
    unusual = ["", " ", "\n\t", "\x00\x01\x7f", "\u200b\ufeff", "a" * 1_000_000, "word " * 200_000, "漢" * 10_000]
    vectors = engine.encode(unusual)
    assert np.isfinite(vectors).all()
    empty = engine.encode([""])[0]
    assert all(np.array_equal(row, empty) for row in vectors[:3]), "a text without tokens equals the empty text"


def test_without_a_tokenizer_only_token_ids_are_embedded(tmp_path):
    engine = unpadded.load(write_nomic(tmp_path, tokenizer=False), device="cpu")
    assert np.isfinite(engine.encode([[101, 2054, 102]])).all()
    with pytest.raises(CheckpointError, match=r"tokenizer.json"):
        engine.encode(["text"])


def test_the_error_names_weights_that_are_nan(tmp_path):
    folder = write_nomic(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layers.1.mlp.fc2.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"encoder\.layers\.1\.mlp\.fc2\.weight .*not finite"):
        unpadded.load(folder, device="cpu")


def test_the_error_names_the_text_of_a_vector_that_is_not_finite(tmp_path):
    """The weights are finite, but one row of the word table is so large that LayerNorm's variance overflows."""
    engine = unpadded.load(write_nomic(tmp_path), device="cpu")
    engine._pipeline.runner.encoder.weights.word[7] = torch.finfo(torch.float32).max
    with pytest.raises(OutputError, match="the vector of text 2 is not finite"):
        engine.encode([[5], [6], [7], [8]])
    assert np.isfinite(engine.encode([[5], [6], [8]])).all()
