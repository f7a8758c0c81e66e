"""MPNet against transformers: RoBERTa's positions, and a bias by distance in attention."""

import copy

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from support.checkpoints import add_sentence_transformers_files, change_json, write_checkpoint, write_json
from support.family_checks import (
    VOCABULARY,
    assert_cuda_agrees,
    assert_independent,
    assert_parity,
    last_hidden_state,
    relative_error,
    seeded,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MPNetConfig, MPNetForSequenceClassification, MPNetModel
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import unpadded
from unpadded.checkpoint.families import bert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.errors import ConfigError, OptionError
from unpadded.integrations.accelerate import accelerate
from unpadded.integrations.transformers import UnpaddedModel

ALL_MPNET = {  # the published keys of all-mpnet-base-v2
    "architectures": ["MPNetForMaskedLM"],
    "model_type": "mpnet",
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "relative_attention_num_buckets": 32,
    "vocab_size": 30527,
}
SMALL = ALL_MPNET | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}
LENGTHS = (1, 2, 7, 64, 65, 91, 92, 93, 130, 512)  # all distances from 91 on have the same bias


def model_of(kind, **changes):
    """Return a seeded model whose biases have the spread of trained ones."""
    model = seeded(kind(MPNetConfig(**SMALL, **changes)))
    with torch.no_grad():
        model.base_model.encoder.relative_attention_bias.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of(MPNetModel)


@pytest.fixture
def folder(model, tmp_path):
    return write_checkpoint(tmp_path, SMALL, {f"mpnet.{name}": tensor for name, tensor in model.state_dict().items()})


def test_the_published_configuration():
    spec = bert.read_mpnet_config(ALL_MPNET)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (12, 768, 12, 64, 3072)
    assert (spec.vocabulary, spec.token_types, spec.norm_eps) == (30527, 0, 1e-5)
    assert (spec.position_rows, spec.padding_id, spec.position_limit) == (514, 1, 512)
    assert spec.position_bias and not spec.alibi


def test_the_buckets_are_those_of_transformers():
    buckets = bert.read_mpnet_config(ALL_MPNET).distance_buckets
    distances = torch.arange(-2000, 2001)
    found = torch.tensor(buckets)[distances.clamp(-91, 91) + 91]
    assert torch.equal(found, MPNetEncoder.relative_position_bucket(distances))
    assert len(buckets) == 183 and buckets[0] != buckets[1]  # no shorter table would do


def test_matches_transformers(model, folder):
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model), LENGTHS)


def test_positions_skip_tokens_with_the_padding_id(model, folder):
    ids = np.array([0, 9, 1, 1, 30, 1, 7, 2], np.int32)
    change_json(folder / "config.json", pad_token_id=3)  # which transformers' model ignores
    hidden = unpadded.load(folder, device="cpu").token_embeddings([ids, ids[:2]])
    assert relative_error(hidden[0], last_hidden_state(model)(ids)) <= 1e-5


def write_tokenizer(folder, lines):
    """Train a WordPiece vocabulary on the lines, and write it as all-mpnet-base-v2's files are."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    tokens |= {"unk_token": "[UNK]", "pad_token": "<pad>", "mask_token": "<mask>"}
    settings = {"do_lower_case": True, "model_max_length": 512, "strip_accents": None, "tokenize_chinese_chars": True}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "MPNetTokenizer", **tokens, **settings})


def test_real_text_matches_sentence_transformers(folder, minilm):
    """All the files of all-mpnet-base-v2: mean pooling, normalized, at most 384 tokens."""
    lines = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    write_tokenizer(folder, lines)
    add_sentence_transformers_files(folder, max_seq_length=384)
    texts = [*lines[:40], "", "a", "<pad> in a <mask>", "naïve\u3000ﬁne 中文 🙂", " ".join(lines)]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    found = unpadded.load(folder, device="cpu").embed(texts)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5, rtol=0)
    assert list(np.flatnonzero(found.truncated)) == [len(texts) - 1]


def test_scores_match_the_cross_encoder(tmp_path, minilm):
    model = model_of(MPNetForSequenceClassification, num_labels=1)
    config = SMALL | {"architectures": ["MPNetForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write_tokenizer(write_checkpoint(tmp_path, config, model.state_dict()), (minilm / "README.md").read_text().split())
    pairs = [("What is a model?", "A sentence transformers model."), ("a", ""), ("text " * 100, "vector " * 300)]
    logits = unpadded.load(tmp_path, device="cpu").score(pairs, activation="none")
    expected = CrossEncoder(str(tmp_path), device="cpu").predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@torch.no_grad()
def test_an_accelerated_model_uses_its_current_biases(model):
    accelerated, ids = accelerate(copy.deepcopy(model)), torch.randint(5, VOCABULARY, (2, 30))
    before = accelerated(ids)[0]
    for one in (accelerated, changed := copy.deepcopy(model)):
        one.encoder.relative_attention_bias.weight.mul_(-1)
    expected = changed(ids)[0]
    assert relative_error(accelerated(ids)[0].numpy(), expected.numpy()) <= 1e-5
    assert relative_error(before.numpy(), expected.numpy()) > 1e-2


def test_gaps_in_the_mask_raise(folder):
    """They would change the distances."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])
    with pytest.raises(unpadded.InputError, match=r"text 0 has zeros between ones, .* in mpnet, does not support"):
        UnpaddedModel.from_pretrained(folder)(torch.full((2, 4), 7), mask)


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("attention", ["torch", "flash-attn"])
def test_attention_of_other_libraries_raises(folder, cuda, attention, monkeypatch):
    monkeypatch.setattr("unpadded.model.attention._flash_attn", lambda: None)  # as if it were installed
    with pytest.raises(OptionError, match=f"attention='{attention}' has no bias by distance for .*; use 'auto'"):
        unpadded.load(folder, device=cuda, attention=attention)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype, (1, 1, 2, 3, 7, 8, 40, 40, 64, 65, 130, 255, 385, 500, 512))


def test_tensor_names_decide_without_a_model_type(folder):
    stated = open_checkpoint(folder).spec
    change_json(folder / "config.json", model_type=...)
    assert open_checkpoint(folder).spec == stated


def test_max_length_is_limited_by_learned_positions(folder):
    assert open_checkpoint(folder).max_length == 512
    with pytest.raises(OptionError, match="max_length = 513 exceeds the 512"):
        open_checkpoint(folder, max_length=513)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("relative_attention_num_buckets", 64),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("hidden_act", "relu"),
    ],
)
def test_unsupported_settings_raise(key, value):
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        bert.read_mpnet_config(ALL_MPNET | {key: value})
