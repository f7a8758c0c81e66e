"""DistilBERT against transformers: BERT's layers under other keys and names, without token types."""

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from support.checkpoints import add_sentence_transformers_files, change_json, write_checkpoint
from support.family_checks import (
    VOCABULARY,
    assert_cuda_agrees,
    assert_independent,
    assert_parity,
    last_hidden_state,
    seeded,
)
from transformers import DistilBertConfig, DistilBertForMaskedLM, DistilBertForSequenceClassification, DistilBertModel

import unpadded
from unpadded.checkpoint.families import bert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.errors import ConfigError, OptionError

DISTILBERT_BASE = {  # the published keys of distilbert-base-uncased
    "activation": "gelu",
    "architectures": ["DistilBertForMaskedLM"],
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "model_type": "distilbert",
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "vocab_size": 30522,
}
SMALL = DISTILBERT_BASE | {"dim": 64, "hidden_dim": 128, "n_heads": 2, "n_layers": 2, "vocab_size": VOCABULARY}


@pytest.fixture(scope="module")
def model():
    return seeded(DistilBertModel(DistilBertConfig(**SMALL)))


@pytest.fixture
def folder(model, tmp_path):
    return write_checkpoint(tmp_path, SMALL, model.state_dict())


def write_with_tokenizer(folder, kind, **changes):
    """Write a seeded model with a vocabulary that fits MiniLM's tokenizer."""
    config = SMALL | {"vocab_size": 30522} | changes
    model = seeded(kind(DistilBertConfig(**config)))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # that of the words is tied
    write_checkpoint(folder, config, tensors, tokenizer_length=512)
    change_json(folder / "tokenizer_config.json", tokenizer_class="DistilBertTokenizer", model_input_names=...)
    return folder


def test_the_published_configuration():
    spec = bert.read_distilbert_config(DISTILBERT_BASE)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (6, 768, 12, 64, 3072)
    assert (spec.vocabulary, spec.token_types, spec.position_rows, spec.rotary) == (30522, 0, 512, None)
    assert (spec.activation, spec.norm_eps) == ("gelu", 1e-12)
    assert bert.read_distilbert_config(DISTILBERT_BASE | {"activation": "gelu_new"}).activation == "gelu_tanh"
    # transformers' model reads neither of these keys
    assert bert.read_distilbert_config(DISTILBERT_BASE | {"hidden_act": "relu", "layer_norm_eps": 1e-5}) == spec
    renamed = {bert.DISTIL_SIZES.get(key, key): value for key, value in DISTILBERT_BASE.items()}
    assert bert.read_distilbert_config(renamed) == spec  # transformers reads these keys, too


def test_matches_transformers(model, folder):
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model), (1, 2, 7, 64, 65, 512))


def test_sinusoidal_positions_are_stored(tmp_path):
    config = SMALL | {"sinusoidal_pos_embds": True}
    model = DistilBertModel(DistilBertConfig(**config)).eval()
    engine = unpadded.load(write_checkpoint(tmp_path, config, model.state_dict()), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 65))


def test_real_text_matches_sentence_transformers(tmp_path, minilm):
    """From a checkpoint with the head for masked words, as distilbert-base-uncased is."""
    folder = write_with_tokenizer(tmp_path, DistilBertForMaskedLM)
    add_sentence_transformers_files(folder, max_seq_length=100)
    lines = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    texts = [*lines[:40], "", "a", "[PAD] in a [MASK]", "naïve\u3000ﬁne 中文 🙂", " ".join(lines)]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(unpadded.load(folder, device="cpu").encode(texts), expected, atol=1e-5, rtol=0)


def test_scores_match_the_cross_encoder(tmp_path):
    labels = {"id2label": {str(index): f"LABEL_{index}" for index in range(3)}}
    kind = DistilBertForSequenceClassification
    folder = write_with_tokenizer(tmp_path, kind, architectures=[kind.__name__], **labels)
    pairs = [("What is a model?", "A sentence transformers model."), ("a", ""), ("text " * 100, "vector " * 500)]
    logits = unpadded.load(folder, device="cpu").score(pairs)
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs, activation_fn=torch.nn.Identity())
    assert logits.shape == (3, 3)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype, (1, 1, 2, 3, 7, 8, 40, 40, 64, 65, 130, 255, 385, 512))


def test_tensor_names_decide_without_a_model_type(folder):
    stated = open_checkpoint(folder).spec
    change_json(folder / "config.json", model_type=...)
    assert open_checkpoint(folder).spec == stated


def test_max_length_is_limited_by_learned_positions(folder):
    with pytest.raises(OptionError, match="max_length = 513 exceeds the 512"):
        open_checkpoint(folder, max_length=513)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation = 'relu' is not implemented"),
        ({"is_decoder": True}, "is_decoder = True is not implemented"),
        ({"hidden_size": 512}, "dim = 768 but hidden_size = 512"),
        ({"n_layers": 2**31}, "n_layers = 2147483648 is not a whole number from 1 to 1000"),
        ({"dim": None}, "lacks dim or hidden_size"),
        ({"n_heads": 7}, "hidden_size = 768 does not divide into num_attention_heads = 7 heads"),
    ],
)
def test_unsupported_settings_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        bert.read_distilbert_config(DISTILBERT_BASE | changes)
