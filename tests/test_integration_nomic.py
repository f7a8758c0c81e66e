"""`embed.text` against nomic's local mode, reimplemented here from its published description."""

import numpy as np
import pytest
import torch
from support.checkpoints import add_sentence_transformers_files, change_json, write_nomic
from tokenizers import Tokenizer
from transformers import NomicBertModel

import unpadded
from unpadded import embed
from unpadded.integrations.nomic import free_embedding_model

TEXTS = ["Nomic AI introduces Nomic Embed", "a longer text " * 1500, "", "tokens of a text that is longer still " * 700]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model trained for matryoshka, with the tensor names of transformers, which loads it too."""
    folder = add_sentence_transformers_files(
        write_nomic(tmp_path_factory.mktemp("matryoshka"), names="transformers"), normalize=False
    )
    change_json(folder / "config_sentence_transformers.json", matryoshka_dimensions=[128, 64])
    yield folder
    free_embedding_model()


def reference(folder, text, task_type, dimensionality):
    """Return the vector of a text's first 2048 tokens and their number.

    It gets a layer norm with the variance over n - 1, is cut and L2-normalized.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = NomicBertModel.from_pretrained(folder).eval()
    start = tokenizer.encode(f"{task_type}:").ids[:-1]
    ids = tokenizer.encode(text or "24df574ea1c998de59d5be15e769658e", add_special_tokens=False).ids
    kept = ids[: 2048 - len(start) - 1]
    with torch.inference_mode():
        vector = model(torch.tensor([[*start, *kept, 102]])).last_hidden_state[0].mean(0).double()
    vector = (vector - vector.mean()) / (vector.var() + 1e-5).sqrt()
    vector = vector[:dimensionality]
    return (vector / vector.norm()).numpy(), len(kept)


@pytest.mark.parametrize(("task_type", "dimensionality"), [("search_document", None), ("search_query", 64)])
def test_matches_the_local_mode(folder, task_type, dimensionality):
    output = embed.text(
        TEXTS,
        model=str(folder),
        task_type=task_type,
        dimensionality=dimensionality,
        long_text_mode="truncate",
        device="cpu",
    )
    total = 0
    for text, row in zip(TEXTS, output["embeddings"], strict=True):
        expected, tokens = reference(folder, text, task_type, dimensionality)
        total += tokens
        assert np.abs(np.array(row) - expected).max() <= 1e-5
    assert output["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert (output["model"], output["inference_mode"]) == (str(folder), "local")


def test_the_card_example_runs(folder, monkeypatch, tmp_path):
    """The example of the model card, unchanged: the model is found by its name."""
    (tmp_path / "nomic-embed-text-v1").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    output = embed.text(
        texts=["Nomic Embedding API", "#keepAIOpen"], model="nomic-embed-text-v1", task_type="search_document"
    )
    assert np.array(output["embeddings"]).shape == (2, 128)
    assert isinstance(output["embeddings"][0][0], float)


def test_no_texts_give_no_embeddings(folder):
    expected = {"embeddings": [], "usage": {}, "model": str(folder), "inference_mode": "local"}
    assert embed.text([], model=str(folder), inference_mode="dynamic") == expected


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"texts": "one text"}, TypeError, "must be list"),
        ({"task_type": "search"}, ValueError, "task_type is unknown: 'search'"),
        ({"long_text_mode": "mean"}, ValueError, "long_text_mode is not supported: 'mean'; use 'truncate'"),
        ({"inference_mode": "remote"}, ValueError, "inference_mode .*'remote'; use 'local'"),
        ({"dimensionality": 0}, ValueError, "dimensions .*: 0; .* supports 1 to 128"),
        ({"dimensionality": 129}, ValueError, "dimensions .*: 129; .* supports 1 to 128"),
        ({"model": "nomic-embed/text/none"}, unpadded.CheckpointError, "no folder"),
        ({"texts": ["fine", 3]}, unpadded.InputError, "text 1"),
        ({"texts": {"a": "text"}}, unpadded.InputError, "texts are not a sequence: dict"),
    ],
    ids=["string", "task", "mode", "remote", "zero", "too wide", "model", "not text", "mapping"],
)
def test_wrong_arguments_raise(folder, arguments, error, reason):
    with pytest.raises(error, match=reason):
        embed.text(**{"texts": ["some text"], "model": str(folder), "device": "cpu"} | arguments)
