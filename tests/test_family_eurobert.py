"""EuroBERT against transformers: RMSNorm and grouped-query attention."""

import json

import pytest
from support.checkpoints import add_sentence_transformers_files, change_json, write_checkpoint
from support.family_checks import (
    VOCABULARY,
    assert_cuda_agrees,
    assert_independent,
    assert_parity,
    last_hidden_state,
    random_ids,
    relative_error,
    seeded,
)
from transformers import EuroBertConfig, EuroBertForMaskedLM, EuroBertModel

import unpadded
from unpadded.checkpoint.families import eurobert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.spec import Rotary
from unpadded.errors import ConfigError
from unpadded.integrations.accelerate import accelerate

EUROBERT_2B = {  # the published keys of EuroBERT-2.1B
    "architectures": ["EuroBertForMaskedLM"],
    "auto_map": {"AutoModel": "modeling_eurobert.EuroBertModel"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 2304,
    "intermediate_size": 6144,
    "is_decoder": False,
    "mask_token_id": 128002,
    "max_position_embeddings": 8192,
    "model_type": "eurobert",
    "num_attention_heads": 18,
    "num_hidden_layers": 32,
    "num_key_value_heads": 6,
    "pad_token_id": 128001,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
EUROBERT_210M = EUROBERT_2B | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
}
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
SMALL = EUROBERT_2B | SIZES


def model_of(config, kind=EuroBertModel):
    return seeded(kind(EuroBertConfig(**{key: value for key, value in config.items() if key != "auto_map"})))


@pytest.fixture(scope="module")
def model():
    return model_of(SMALL)


@pytest.fixture
def folder(model, tmp_path):
    return write_checkpoint(tmp_path, SMALL, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def test_the_published_configurations():
    spec = eurobert.read_config(EUROBERT_2B)
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (32, 2304, 18, 6, 128)
    assert (spec.intermediate, spec.vocabulary, spec.token_types, spec.position_rows) == (6144, 128256, 0, 0)
    assert spec.activation == "swiglu" and spec.prenorm and spec.rms_norm
    assert spec.biases == ()
    assert (spec.norm_eps, spec.rotary) == (1e-5, Rotary(base=250000.0, trained_length=8192))
    assert eurobert.read_config(EUROBERT_210M).kv_heads is None


def test_matches_transformers(model, folder):
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model))


def test_one_key_per_head_and_a_configuration_of_transformers_5(tmp_path):
    model = model_of(SMALL | {"num_key_value_heads": 6}, EuroBertForMaskedLM)
    config = json.loads(model.config.to_json_string())
    assert "rope_theta" not in config and config["head_dim"] == 32
    folder = write_checkpoint(tmp_path, config, model.state_dict())
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model.model), (1, 7, 65, 513))


@pytest.mark.slow
def test_real_width_and_length_match_transformers(tmp_path):
    """The head_dim of 128 and three heads per key of EuroBERT-2.1B, and the width of EuroBERT-610M."""
    sizes = {"hidden_size": 1152, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 4096}
    config = EUROBERT_2B | sizes | {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "pad_token_id": 0}
    model = model_of(config)
    engine = unpadded.load(write_checkpoint(tmp_path, config, model.state_dict()), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 512, 2500))


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)


def test_the_vocabulary_is_padded(folder):
    change_json(folder / "config.json", vocab_size=VOCABULARY - 5)
    assert open_checkpoint(folder).spec.vocabulary == VOCABULARY


def test_accelerate_supports_it_without_shared_heads(model):
    with pytest.raises(unpadded.OptionError, match="its 6 heads share 2 keys and values"):
        accelerate(model)
    other = model_of(SMALL | {"num_key_value_heads": 6})
    (ids,) = random_ids([65])
    expected = last_hidden_state(other)(ids)
    assert relative_error(last_hidden_state(accelerate(other))(ids), expected) <= 1e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("is_decoder", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("head_dim", 64),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters.rope_type", "yarn"),
        ("rope_parameters.factor", 4.0),
    ],
)
def test_unsupported_settings_raise(key, value):
    outer, _, inner = key.partition(".")
    changed = {outer: {inner: value}} if inner else {key: value}
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        eurobert.read_config(EUROBERT_2B | changed)


def test_the_code_of_another_model_raises(folder):
    """As of jina-embeddings-v5-text-nano, which adds adapters to EuroBERT."""
    auto_map = {"AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"}
    with pytest.raises(ConfigError, match=r"auto_map = .*JinaEmbeddingsV5Model.* is not implemented, .*EuroBERT's own"):
        eurobert.read_config(EUROBERT_2B | {"auto_map": auto_map})
    add_sentence_transformers_files(folder, pooling="lasttoken")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"modules.json = 'custom_st.Transformer' is not implemented"):
        open_checkpoint(folder)


def test_indivisible_heads_raise():
    with pytest.raises(ConfigError, match="num_key_value_heads = 5"):
        eurobert.read_config(EUROBERT_2B | {"num_key_value_heads": 5})


def test_contradictory_bases_raise():
    with pytest.raises(ConfigError, match=r"rope_theta = 250000.0 but rope_parameters.rope_theta = 10000.0"):
        eurobert.read_config(EUROBERT_2B | {"rope_parameters": {"rope_theta": 10000.0}})
