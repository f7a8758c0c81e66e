"""Texts that cannot be embedded raise an error with their index and value; unusual texts are embedded."""

import numpy as np
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


@pytest.mark.parametrize("texts", [None, 3, b"bytes"])
def test_texts_must_be_a_collection(engine, texts):
    with pytest.raises(InputError, match="texts are not a collection"):
        engine.encode(texts)


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
