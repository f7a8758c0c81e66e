"""XLM-RoBERTa and RoBERTa against transformers."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support.checkpoints import add_sentence_transformers_files, write_checkpoint, write_json
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
from transformers import RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel

import unpadded
from unpadded.checkpoint.families import bert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.errors import ConfigError, OptionError

BGE_M3 = {  # the published keys
    "model_type": "xlm-roberta",
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "classifier_dropout": None,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 8194,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 250002,
}
SMALL = BGE_M3 | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 2050,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}


@pytest.fixture(scope="module")
def model():
    return seeded(XLMRobertaModel(XLMRobertaConfig(**SMALL)))


@pytest.fixture
def folder(model, tmp_path):
    return write_checkpoint(tmp_path, SMALL, model.state_dict())


def test_the_published_configuration():
    spec = bert.read_roberta_config(BGE_M3)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (24, 1024, 16, 64, 4096)
    assert (spec.vocabulary, spec.token_types, spec.norm_eps) == (250002, 1, 1e-5)
    assert (spec.position_rows, spec.padding_id, spec.position_limit) == (8194, 1, 8192)


def test_matches_transformers(model, folder):
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model))


def test_roberta_matches_transformers(tmp_path):
    config = SMALL | {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1}
    model = seeded(RobertaModel(RobertaConfig(**config)))
    tensors = {f"roberta.{name}": tensor for name, tensor in model.state_dict().items()}
    engine = unpadded.load(write_checkpoint(tmp_path, config, tensors), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 2, 65, 512))


def test_positions_skip_tokens_with_the_padding_id(model, folder):
    ids = np.array([0, 9, 1, 1, 30, 1, 7, 2], np.int32)
    other = np.array([0, 5, 2], np.int32)
    hidden = unpadded.load(folder, device="cpu").token_embeddings([other, ids, other])
    assert relative_error(hidden[1], last_hidden_state(model)(ids)) <= 1e-5
    assert relative_error(hidden[2], last_hidden_state(model)(other)) <= 1e-5


def write_tokenizer(folder, lines):
    """Train a SentencePiece vocabulary on the lines, and write it as XLM-RoBERTa's tokenizer.json is."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", settings)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_real_text_matches_sentence_transformers(folder, minilm, pooling):
    lines = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    write_tokenizer(folder, lines)
    add_sentence_transformers_files(folder, pooling=pooling, max_seq_length=40)
    texts = [*lines, "", "a", "<pad> in a text <pad>", "naïve\u3000ﬁne 中文 🙂", " ".join(lines)]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    found = unpadded.load(folder, device="cpu").encode(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_real_width_and_length_match_transformers(tmp_path):
    config = BGE_M3 | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
    model = seeded(XLMRobertaModel(XLMRobertaConfig(**config)))
    engine = unpadded.load(write_checkpoint(tmp_path, config, model.state_dict()), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 512, 2500))


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)


def test_max_length_is_limited_by_learned_positions(folder):
    assert open_checkpoint(folder).max_length == 2048
    with pytest.raises(OptionError, match="max_length = 2049 exceeds the 2048"):
        open_checkpoint(folder, max_length=2049)


@pytest.mark.parametrize(
    ("key", "value"), [("position_embedding_type", "relative_key"), ("is_decoder", True), ("hidden_act", "relu")]
)
def test_unsupported_settings_raise(key, value):
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        bert.read_roberta_config(BGE_M3 | {key: value})
