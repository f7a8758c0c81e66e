"""ModernBERT against transformers: pre-norm, and local layers with their own rotary embedding."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from support.checkpoints import add_sentence_transformers_files, change_json, write_checkpoint, write_json
from support.family_checks import (
    VOCABULARY,
    assert_cuda_agrees,
    assert_independent,
    assert_parity,
    last_hidden_state,
    seeded,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

import unpadded
from unpadded.checkpoint.families import modernbert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.spec import LocalAttention, Rotary
from unpadded.errors import ConfigError

MODERNBERT_EMBED = {  # the published keys of modernbert-embed-base
    "model_type": "modernbert",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "vocab_size": 50368,
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_hidden_layers": 5,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
SMALL = MODERNBERT_EMBED | SIZES

# Keys of models trained from ModernBERT or as it was, as transformers 4 and 5 write them, in small sizes.
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 4}
TINY |= {"vocab_size": VOCABULARY, "pad_token_id": 0}
BY_TRANSFORMERS_4 = MODERNBERT_EMBED | {
    "architectures": ["ModernBertModel"],
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "cls_token_id": 50281,
    "deterministic_flash_attn": False,
    "eos_token_id": 50282,
    "gradient_checkpointing": False,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "mlp_dropout": 0.0,
    "position_embedding_type": "sans_pos",
    "reference_compile": False,
    "repad_logits_with_grad": False,
    "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "torch_dtype": "bfloat16",
    **TINY,
}
LEGACY_KEYS = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "layer_norm_eps")
BY_TRANSFORMERS_5 = {key: value for key, value in BY_TRANSFORMERS_4.items() if key not in LEGACY_KEYS} | {
    "dtype": "bfloat16",
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_theta": 160000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "tie_word_embeddings": True,
}
MASKED = {"architectures": ["ModernBertForMaskedLM"]}
NEWER = {
    "granite-embedding-english-r2": BY_TRANSFORMERS_4 | {"global_rope_theta": 80000.0},
    "granite-embedding-small-english-r2": BY_TRANSFORMERS_4 | {"global_rope_theta": 80000.0, "intermediate_size": 256},
    "granite-embedding-97m-multilingual-r2": BY_TRANSFORMERS_5
    | {"max_position_embeddings": 32768, "intermediate_size": 256},
    "granite-embedding-311m-multilingual-r2": BY_TRANSFORMERS_5 | {"max_position_embeddings": 32768},
    "DenseOn": BY_TRANSFORMERS_5 | {"classifier_pooling": "cls"},
    "ettin-encoder": BY_TRANSFORMERS_4
    | MASKED
    | {"local_rope_theta": 160000.0, "max_position_embeddings": 7999, "causal_mask": False, "is_causal": False},
    "mmBERT": BY_TRANSFORMERS_4
    | MASKED
    | {"local_rope_theta": 160000.0, "bos_token_id": 2, "cls_token_id": 1, "eos_token_id": 1, "sep_token_id": 1},
}


def model_of(**changes):
    return seeded(ModernBertModel(ModernBertConfig(**SMALL | changes)))


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture
def folder(model, tmp_path):
    return write_checkpoint(tmp_path, SMALL, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def test_the_published_configuration():
    spec = modernbert.read_config(MODERNBERT_EMBED)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (22, 768, 12, 64, 1152)
    assert (spec.vocabulary, spec.token_types, spec.position_rows, spec.norm_eps) == (50368, 0, 0, 1e-5)
    assert spec.activation == "geglu" and spec.prenorm
    assert spec.biases == ()
    assert spec.rotary == Rotary(base=160000.0, trained_length=8192)
    local = tuple(index for index in range(22) if index not in (0, 3, 6, 9, 12, 15, 18, 21))
    assert spec.local_attention == LocalAttention(
        layers=local, window=64, rotary=Rotary(base=10000.0, trained_length=8192)
    )


def test_matches_transformers(model, folder):
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model))


def test_biases_and_the_configuration_of_transformers_5(tmp_path):
    """All biases, another window, layers by `layer_types` and rotary bases by layer type."""
    model = model_of(
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        local_attention=32,
        layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        global_rope_theta=80000.0,
        hidden_activation="silu",
    )
    config = json.loads(model.config.to_json_string())
    assert "rope_parameters" in config and "global_rope_theta" not in config
    config.pop("global_attn_every_n_layers", None)
    folder = write_checkpoint(tmp_path, config, model.state_dict())
    assert open_checkpoint(folder).spec.local_attention.layers == (1, 4)
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model), (1, 7, 65, 513))


def test_a_scaling_factor_applies_to_global_layers_only(folder):
    spec = open_checkpoint(folder, rotary_scaling_factor=2.0).spec
    assert spec.rotary.scaling_factor == 2.0 and spec.local_attention.rotary.scaling_factor is None


def write_newer(folder, name):
    """Return the model and its folder."""
    config = NEWER[name]
    kind = ModernBertForMaskedLM if "MaskedLM" in config["architectures"][0] else ModernBertModel
    model = seeded(kind(ModernBertConfig(**config)))
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != "decoder.weight"}  # tied
    return model.base_model, write_checkpoint(folder, config, tensors)


@pytest.mark.parametrize("name", NEWER)
def test_newer_models_match_transformers(name, tmp_path):
    """Also for a text far longer than the window of local attention."""
    model, folder = write_newer(tmp_path, name)
    engine = unpadded.load(folder, device="cpu")
    rotary = engine.checkpoint.spec.rotary_embeddings
    assert [one.trained_length for one in rotary] == [NEWER[name]["max_position_embeddings"]] * 2
    rope = model.config.rope_parameters
    assert [one.base for one in rotary] == [rope[kind]["rope_theta"] for kind in modernbert.LAYER_TYPES]
    assert_parity(engine, last_hidden_state(model), (1, 7, 65, 700))


@pytest.mark.slow
def test_a_text_of_more_than_8192_tokens_matches_transformers(tmp_path):
    model, folder = write_newer(tmp_path, "granite-embedding-97m-multilingual-r2")
    add_sentence_transformers_files(folder, pooling="cls", max_seq_length=32768)
    engine = unpadded.load(folder, device="cpu")
    assert engine.checkpoint.max_length == 32768
    assert_parity(engine, last_hidden_state(model), (9000,))


@pytest.mark.slow
def test_real_width_and_length_match_transformers(tmp_path):
    config = MODERNBERT_EMBED | {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
    model = seeded(ModernBertModel(ModernBertConfig(**config)))
    engine = unpadded.load(write_checkpoint(tmp_path, config, model.state_dict()), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 512, 8192))


def write_tokenizer(folder, lines):
    """Train a byte-level BPE on the lines, and write it as ModernBERT's tokenizer.json is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "pad_token": "[PAD]",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def test_real_text_matches_sentence_transformers(folder, minilm):
    lines = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    write_tokenizer(folder, lines)
    prompts = {"query": "search_query: ", "document": "search_document: "}
    add_sentence_transformers_files(folder, max_seq_length=100, prompts=prompts)
    texts = [*lines, "", "a", "naïve\u3000ﬁne 中文 🙂", " ".join(lines)]
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), unpadded.load(folder, device="cpu")
    for task in (None, "query"):
        expected = theirs.encode(texts, prompt_name=task)
        np.testing.assert_allclose(ours.encode(texts, task=task), expected, atol=1e-5, rtol=0)


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)


def test_tensor_names_decide_without_a_model_type(folder):
    stated = open_checkpoint(folder).spec
    change_json(folder / "config.json", model_type=...)
    assert open_checkpoint(folder).spec == stated


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_activation", "relu", "hidden_activation"),
        ("layer_types", ["chunked_attention"] * 22, "layer_types"),
        ("layer_types", ["full_attention"] * 3, "layer_types"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "rope_scaling"),
        (
            "rope_parameters",
            {"full_attention": {"rope_type": "yarn", "rope_theta": 160000.0}},
            "rope_parameters.full_attention.rope_type",
        ),
        (
            "rope_parameters",
            {"sliding_attention": {"rope_type": "default", "factor": 4.0}},
            "rope_parameters.sliding_attention.factor",
        ),
    ],
)
def test_unsupported_settings_raise(key, value, named):
    with pytest.raises(ConfigError, match=f"{named} = .* is not implemented"):
        modernbert.read_config(MODERNBERT_EMBED | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 22}, "layer_types = .* but global_attn_every_n_layers = 3"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1000.0}}},
            r"global_rope_theta = 160000.0 but rope_parameters.full_attention.rope_theta = 1000.0",
        ),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06 but layer_norm_eps = 1e-05"),
    ],
)
def test_contradictory_keys_raise_with_both_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        modernbert.read_config(MODERNBERT_EMBED | changes)
