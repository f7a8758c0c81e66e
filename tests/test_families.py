"""Reading config.json and tensor names, against published configurations and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VOCABULARY, nomic_tensors, transformers_names, write_bert, write_nomic
from test_family_distilbert import DISTILBERT_BASE
from test_family_eurobert import EUROBERT_210M
from test_family_gte import GTE_BASE
from test_family_jina_bert import JINA_BASE
from test_family_jina_v3 import JINA_V3
from test_family_modernbert import MODERNBERT_EMBED
from test_family_mpnet import ALL_MPNET
from test_family_xlm_roberta import BGE_M3
from transformers import BertModel, NomicBertModel

from unpadded.checkpoint.families import FAMILIES, bert, nomic_bert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.spec import BIASES, EncoderSpec, Rotary
from unpadded.errors import ConfigError
from unpadded.model.weights import load_weights

CPU = torch.device("cpu")

NOMIC_V1_5 = {  # the published keys, legacy and transformers'
    "model_type": "nomic_bert",
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "causal": False,
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "layer_norm_epsilon": 1e-12,
    "max_position_embeddings": 2048,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 12,
    "n_positions": 8192,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rope_parameters": {"rope_theta": 1000, "rope_type": "default"},
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "scale_attn_weights": True,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 30528,
}
MODERN_KEYS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rope_parameters",
)
SHARED_KEYS = ("model_type", "type_vocab_size", "vocab_size")
LEGACY = {key: value for key, value in NOMIC_V1_5.items() if key not in MODERN_KEYS}
MODERN = {key: value for key, value in NOMIC_V1_5.items() if key in MODERN_KEYS + SHARED_KEYS}
BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
NOMIC_SPEC = EncoderSpec(
    family="nomic_bert",
    layers=12,
    hidden=768,
    heads=12,
    intermediate=3072,
    vocabulary=30528,
    token_types=2,
    position_rows=0,
    rotary=Rotary(base=1000.0, trained_length=2048),
    activation="swiglu",
    norm_eps=1e-12,
    biases=("norm",),
)


def nomic(config: dict[str, Any], **changes: Any) -> EncoderSpec:
    changed = {key: value for key, value in (config | changes).items() if value is not ...}
    return nomic_bert.read_config(changed)


@pytest.mark.parametrize("config", [NOMIC_V1_5, LEGACY, MODERN], ids=["both", "legacy", "transformers"])
def test_the_published_configuration_has_one_spec_under_all_keys(config: dict[str, Any]) -> None:
    assert nomic(config) == NOMIC_SPEC


def test_bert() -> None:
    spec = bert.read_config(BERT)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (6, 384, 12, 32, 1536)
    assert (spec.vocabulary, spec.token_types, spec.position_rows, spec.rotary) == (30522, 2, 512, None)
    assert spec.biases == BIASES and not spec.gated


@pytest.mark.parametrize(
    ("legacy", "value", "modern", "other"),
    [
        ("n_embd", 768, "hidden_size", 384),
        ("n_layer", 12, "num_hidden_layers", 6),
        ("n_head", 12, "num_attention_heads", 6),
        ("n_inner", 3072, "intermediate_size", 2048),
        ("layer_norm_epsilon", 1e-12, "layer_norm_eps", 1e-5),
        ("activation_function", "swiglu", "hidden_act", "gelu"),
        ("rotary_emb_base", 1000.0, "rope_theta", 10000.0),
        ("max_trained_positions", 2048, "rope_parameters.original_max_position_embeddings", 512),
        ("rotary_scaling_factor", 2.0, "rope_parameters.factor", 4.0),
    ],
)
def test_contradictory_keys_raise_with_both_values(legacy: str, value: Any, modern: str, other: Any) -> None:
    config = NOMIC_V1_5 | {legacy: value}
    if modern.startswith("rope_parameters."):
        config["rope_parameters"] = {"rope_theta": 1000, "rope_type": "dynamic", "factor": 2.0} | {
            modern.removeprefix("rope_parameters."): other
        }
    else:
        config[modern] = other
    with pytest.raises(ConfigError) as error:
        nomic(config)
    assert f"{legacy} = {value!r}" in str(error.value) and f"{modern} = {other!r}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prenorm", True),
        ("parallel_block", True),
        ("causal", True),
        ("use_rms_norm", True),
        ("norm_mlp", True),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_fraction", 0.5),
        ("rotary_emb_scale_base", 512),
        ("num_experts", 8),
        ("scale_attn_weights", False),
        ("num_heads_kv", 4),
        ("head_dim", 32),
        ("activation_function", "glu"),
        ("activation_function", "silu"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"type": "dynamic", "beta_fast": 2.0}),
    ],
)
def test_unsupported_nomic_settings_raise(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        nomic(LEGACY, **{key: value})
    assert ("rope_type" if value == {"type": "yarn", "factor": 2.0} else key) in str(error.value)
    assert "is not implemented" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "alibi"),  # jina-embeddings-v2, whose model_type is bert
        ("position_embedding_type", "relative_key"),
        ("feed_forward_type", "geglu"),
        ("is_decoder", True),
        ("hidden_act", "relu"),
        ("auto_map", {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}),
    ],
)
def test_unsupported_bert_settings_raise(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}.* = .*is not implemented"):
        bert.read_config(BERT | {key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("n_embd", 0), ("n_embd", 767.5), ("n_layer", True), ("n_inner", "3072"), ("n_head", 7)]
)
def test_invalid_values_raise(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}"):
        nomic(LEGACY, **{key: value})


@pytest.mark.parametrize("key", ["n_embd", "n_layer", "n_head", "vocab_size"])
def test_missing_sizes_raise(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {key}"):
        nomic(LEGACY, **{key: ...})


@pytest.mark.parametrize(
    ("activation", "n_inner", "width"),
    [
        ("swiglu", 3072.0, 3072),
        ("swiglu", 3000, 3072),
        ("geglu", 2049, 2304),
        ("swiglu", None, 2048),  # 8 * 768 / 3
        ("swiglu", ..., 2048),
        ("gelu", 3000, 3000),
        ("gelu", None, 3072),  # 4 * 768
    ],
)
def test_mlp_width(activation: str, n_inner: Any, width: int) -> None:
    spec = nomic(LEGACY, activation_function=activation, n_inner=n_inner)
    assert spec.intermediate == width
    assert spec.up_rows == width * (1 if activation == "gelu" else 2)


def test_intermediate_size_is_not_rounded() -> None:
    assert nomic(MODERN, intermediate_size=3000).intermediate == 3000
    with pytest.raises(ConfigError, match=r"n_inner = 3000.* 3072.* but intermediate_size"):
        nomic(LEGACY, n_inner=3000, intermediate_size=3000)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_activations(name: str, activation: str) -> None:
    assert nomic(LEGACY, activation_function=name).activation == activation
    assert bert.read_config(BERT | {"hidden_act": name}).activation == activation


def test_hidden_act_is_the_activation_of_the_gate() -> None:
    assert nomic(MODERN, hidden_act="gelu").activation == "geglu"
    with pytest.raises(ConfigError, match="hidden_act = 'gelu_new' is not implemented"):
        nomic(MODERN, hidden_act="gelu_new")


@pytest.mark.parametrize(
    ("config", "changes", "trained"),
    [
        (LEGACY, {"max_trained_positions": 512}, 512),
        (LEGACY, {"max_trained_positions": ...}, 2048),
        (LEGACY, {"max_trained_positions": ..., "max_position_embeddings": 8192}, 2048),  # nomic-embed-text-v1
        (NOMIC_V1_5, {"max_trained_positions": ..., "max_position_embeddings": 8192}, 2048),
        (MODERN, {"max_position_embeddings": 512}, 512),  # from which transformers scales
        (MODERN, {"max_position_embeddings": 8192, "max_trained_positions": 2048}, 2048),
        (MODERN, {"max_position_embeddings": ...}, 2048),
    ],
)
def test_trained_length(config: dict[str, Any], changes: dict[str, Any], trained: int) -> None:
    rotary = nomic(config, **changes).rotary
    assert rotary is not None and rotary.trained_length == trained


@pytest.mark.parametrize(
    ("config", "changes", "factor"),
    [
        (LEGACY, {"rotary_scaling_factor": ...}, None),
        (LEGACY, {"rotary_scaling_factor": 2}, 2.0),
        (LEGACY, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000, "factor": 2.0}}, 2.0),
        (MODERN, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000, "factor": 4.0}}, 4.0),
        (MODERN, {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000}, 2.0),
    ],
)
def test_scaling_factor(config: dict[str, Any], changes: dict[str, Any], factor: float | None) -> None:
    assert nomic(config, **changes).rotary == Rotary(base=1000.0, trained_length=2048, scaling_factor=factor)


def test_rope_type_and_factor_must_fit() -> None:
    with pytest.raises(ConfigError, match="'default' but rotary_scaling_factor = 2"):
        nomic(NOMIC_V1_5, rotary_scaling_factor=2)
    with pytest.raises(ConfigError, match="'dynamic' without a factor"):
        nomic(MODERN, rope_parameters={"rope_type": "dynamic", "rope_theta": 1000})


def test_a_legacy_configuration_has_the_defaults_of_its_class() -> None:
    absent = dict.fromkeys(
        ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "rotary_emb_base", "layer_norm_epsilon"), ...
    )
    spec = nomic(LEGACY, **absent)
    assert spec.biases == BIASES
    assert spec.norm_eps == 1e-5
    assert spec.rotary is not None and spec.rotary.base == 10000.0
    with pytest.raises(ConfigError, match=r"rotary_emb_fraction = 0\.0"):
        nomic(LEGACY, rotary_emb_fraction=...)


def test_token_types_are_optional() -> None:
    spec = nomic(LEGACY, type_vocab_size=0)
    assert spec.token_types == 0 and "token_type" not in nomic_bert.tensors(spec)


@pytest.mark.parametrize("model_type", ["albert", "deberta-v2"])
def test_an_unknown_model_type_raises(model_type: str, tmp_path: Path) -> None:
    folder = write_bert(tmp_path, vocabulary=64, tokenizer=False)
    config = (folder / "config.json").read_text().replace('"model_type": "bert"', f'"model_type": "{model_type}"')
    (folder / "config.json").write_text(config)
    with pytest.raises(
        ConfigError, match=f"model_type = '{model_type}' is not implemented, only '{', '.join(FAMILIES)}'"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("write", [write_bert, write_nomic])
def test_tensor_names_decide_without_a_model_type(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, vocabulary=64, tokenizer=False)
    stated = open_checkpoint(folder).spec
    config = (folder / "config.json").read_text().replace('"model_type"', '"unused"')
    (folder / "config.json").write_text(config)
    assert open_checkpoint(folder).spec == stated


@pytest.mark.parametrize("names", ["legacy", "transformers"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_nomic_weights_equal_those_of_transformers(names: str, activation: str, tmp_path: Path) -> None:
    folder = write_nomic(tmp_path / names, names=names, activation=activation, vocabulary=128, tokenizer=False, seed=3)
    reference_folder = write_nomic(
        tmp_path / "reference", names="transformers", activation=activation, vocabulary=128, tokenizer=False, seed=3
    )
    reference = NomicBertModel.from_pretrained(reference_folder).state_dict()
    weights = load_weights(open_checkpoint(folder), device=CPU, dtype=torch.float32)

    assert torch.equal(weights.word, reference["embeddings.word_embeddings.weight"])
    assert weights.token_type is not None and weights.position is None
    assert torch.equal(weights.token_type, reference["embeddings.token_type_embeddings.weight"])
    assert torch.equal(weights.norm.weight, reference["embeddings.LayerNorm.weight"])
    assert torch.equal(weights.norm.bias, reference["embeddings.LayerNorm.bias"])
    assert len(weights.layers) == 2
    for index, layer in enumerate(weights.layers):
        prefix = f"layers.{index}."
        qkv = [reference[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(layer.qkv.linear.weight, torch.cat(qkv))
        assert torch.equal(layer.out.weight, reference[f"{prefix}self_attn.o_proj.weight"])
        gate_and_up = [reference[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(layer.mlp.up.weight, torch.cat(gate_and_up))
        assert torch.equal(layer.mlp.down.weight, reference[f"{prefix}mlp.down_proj.weight"])
        assert torch.equal(layer.attention_norm.weight, reference[f"{prefix}post_attention_layernorm.weight"])
        assert torch.equal(layer.attention_norm.bias, reference[f"{prefix}post_attention_layernorm.bias"])
        assert torch.equal(layer.mlp_norm.weight, reference[f"{prefix}post_mlp_layernorm.weight"])
        assert torch.equal(layer.mlp_norm.bias, reference[f"{prefix}post_mlp_layernorm.bias"])
        assert [linear.bias for linear in layer.linears.values()] == [None] * 4


def test_bert_weights_equal_those_of_transformers(tmp_path: Path) -> None:
    folder = write_bert(tmp_path, vocabulary=128, tokenizer=False)
    reference = BertModel.from_pretrained(folder).state_dict()
    weights = load_weights(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    assert weights.position is not None
    assert torch.equal(weights.position, reference["embeddings.position_embeddings.weight"])
    for index, layer in enumerate(weights.layers):
        prefix = f"encoder.layer.{index}."
        for suffix, qkv in (("weight", layer.qkv.linear.weight), ("bias", layer.qkv.linear.bias)):
            parts = [reference[f"{prefix}attention.self.{part}.{suffix}"] for part in ("query", "key", "value")]
            assert qkv is not None and torch.equal(qkv, torch.cat(parts))
        for module, loaded in (
            ("attention.output.dense", layer.out),
            ("attention.output.LayerNorm", layer.attention_norm),
            ("intermediate.dense", layer.mlp.up),
            ("output.dense", layer.mlp.down),
            ("output.LayerNorm", layer.mlp_norm),
        ):
            assert torch.equal(loaded.weight, reference[f"{prefix}{module}.weight"])
            assert torch.equal(loaded.bias, reference[f"{prefix}{module}.bias"])


def test_every_stored_tensor_is_used_once() -> None:
    """Every tensor of a NomicBERT is part of one tensor of the encoder, under both kinds of names."""
    small = {"layers": 2, "hidden": 128, "intermediate": 256, "vocabulary": VOCABULARY}
    tensors = nomic_tensors(**small, gated=True, biases=True)
    spec = nomic(LEGACY, n_layer=2, n_embd=128, n_head=2, n_inner=256, **dict.fromkeys(BIAS_KEYS, True))
    assert len(nomic_bert.tensors(NOMIC_SPEC)) == 112 - 12  # of the 112 published tensors, fc11 and fc12 are stacked
    for stored in (tensors, transformers_names(tensors)):
        covered = [
            name
            for tensor in nomic_bert.tensors(spec).values()
            for names in tensor.alternatives
            if all(name in stored for name in names)
            for name in names
        ]
        assert sorted(covered) == sorted(stored)


BIAS_KEYS = ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")


def test_the_first_family_that_matches_reads_the_configuration() -> None:
    configs = {
        "eurobert": EUROBERT_210M,
        "jina_v3": JINA_V3,
        "nomic_bert": NOMIC_V1_5,
        "modernbert": MODERNBERT_EMBED,
        "gte": GTE_BASE,
        "jina_bert": JINA_BASE,
        "distilbert": DISTILBERT_BASE,
        "mpnet": ALL_MPNET,
        "xlm_roberta": BGE_M3,
        "bert": BERT,
    }
    assert configs.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        config = configs[name]
        assert family.read_config(config).family == name
        assert next(other for other, family in FAMILIES.items() if family.matches(config, ())) == name
