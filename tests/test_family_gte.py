"""GTE against transformers, under the names of both, and static NTK against its formula."""

import json

import pytest
import torch
from support.checkpoints import change_json, write_checkpoint
from support.family_checks import (
    VOCABULARY,
    assert_cuda_agrees,
    assert_independent,
    assert_parity,
    last_hidden_state,
    of_transformers,
    seeded,
)

import unpadded
from unpadded.checkpoint.families import gte
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.spec import Rotary
from unpadded.errors import ConfigError

GTE_BASE = {  # the published keys of gte-base-en-v1.5
    "model_type": "new",
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "max_position_embeddings": 8192,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pack_qkv": True,
    "pad_token_id": 0,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "rope_theta": 500000,
    "type_vocab_size": 0,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 30528,
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}


def published_names(tensors):
    """Return tensors of transformers under the published names: q, k, v packed, and up before gate."""
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("layers.").partition(".")
        start = f"new.encoder.layer.{layer}."
        module, _, part = rest.rpartition(".")
        if name.startswith("embeddings."):
            renamed[f"new.{name}"] = tensor
        elif module == "self_attn.q_proj":
            qkv = [tensors[name.replace("q_proj", f"{other}_proj")] for other in "qkv"]
            renamed[f"{start}attention.qkv_proj.{part}"] = torch.cat(qkv)
        elif module == "mlp.up_proj":
            renamed[f"{start}mlp.up_gate_proj.{part}"] = torch.cat((tensor, tensors[name.replace("up_", "gate_")]))
        elif module not in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
            modules = {"post_attention_layernorm": "attn_ln", "post_mlp_layernorm": "mlp_ln"}
            renamed[start + modules.get(module, module.replace("self_attn", "attention")) + f".{part}"] = tensor
    return renamed


def model_of(token_types=1, base=160000.0, **sizes):
    config, model = of_transformers("GteConfig", "GteModel")
    rope = {"rope_type": "default", "rope_theta": base}
    return seeded(model(config(**SIZES | sizes, type_vocab_size=token_types, rope_parameters=rope)))


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(params=["published", "transformers"])
def folder(request, model, tmp_path):
    if request.param == "published":
        config = GTE_BASE | SIZES | {"type_vocab_size": 1, "rope_scaling": None, "rope_theta": 160000}
        return write_checkpoint(tmp_path, config, published_names(model.state_dict()))
    return write_checkpoint(tmp_path, json.loads(model.config.to_json_string()), model.state_dict())


def test_the_published_configuration():
    spec = gte.read_config(GTE_BASE)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (12, 768, 12, 64, 3072)
    assert (spec.vocabulary, spec.token_types, spec.position_rows, spec.norm_eps) == (30528, 0, 0, 1e-12)
    assert (spec.activation, spec.biases) == ("geglu", ("qkv", "out", "down", "norm"))
    assert spec.rotary == Rotary(base=1e6, trained_length=8192, frequency_scale=2 ** (-2 / 64))


def test_matches_transformers(model, folder):
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model))


def test_static_ntk_without_token_types(tmp_path):
    """As in gte-base-en-v1.5: the frequencies of twice the base, each divided by 2 ** (2 / head_dim)."""
    model = model_of(token_types=0)
    frequencies = (2 * 500000.0) ** -(torch.arange(0, 64, 2) / 64) / 2 ** (2 / 64)
    model.rotary_emb.inv_freq.copy_(frequencies)
    folder = write_checkpoint(tmp_path, GTE_BASE | SIZES, published_names(model.state_dict()))
    assert_parity(unpadded.load(folder, device="cpu"), last_hidden_state(model), (1, 65, 513))


def test_the_vocabulary_is_padded(model, tmp_path):
    config = GTE_BASE | SIZES | {"type_vocab_size": 1, "vocab_size": VOCABULARY - 7}
    assert (
        open_checkpoint(write_checkpoint(tmp_path, config, published_names(model.state_dict()))).spec.vocabulary
        == VOCABULARY
    )


@pytest.mark.slow
def test_real_width_and_length_match_transformers(tmp_path):
    sizes = {key: GTE_BASE[key] for key in SIZES} | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
    model = model_of(token_types=0, base=500000.0, **sizes)
    config = GTE_BASE | sizes | {"rope_scaling": None}
    engine = unpadded.load(write_checkpoint(tmp_path, config, published_names(model.state_dict())), device="cpu")
    assert_parity(engine, last_hidden_state(model), (1, 512, 2500))


@pytest.mark.parametrize("folder", ["published"], indirect=True)
def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)


def test_tensor_names_decide_without_a_model_type(model, tmp_path):
    folder = write_checkpoint(tmp_path, GTE_BASE | SIZES | {"type_vocab_size": 1}, published_names(model.state_dict()))
    stated = open_checkpoint(folder).spec
    change_json(folder / "config.json", model_type=...)
    assert open_checkpoint(folder).spec == stated


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_type", "rms_norm"),
        ("position_embedding_type", "absolute"),
        ("logn_attention_scale", True),
        ("logn_attention_clip1", True),
        ("pack_qkv", False),
        ("hidden_act", "relu"),
        ("num_key_value_heads", 4),
    ],
)
def test_unsupported_settings_raise(key, value):
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        gte.read_config(GTE_BASE | {key: value})


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"type": "ntk", "factor": 2.0, "mixed_b": 0.5}, "rope_scaling.mixed_b"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type"),
    ],
)
def test_unsupported_rope_scaling_raises(scaling, key):
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        gte.read_config(GTE_BASE | {"rope_scaling": scaling})


def test_rope_type_and_factor_must_fit():
    with pytest.raises(ConfigError, match="'ntk' without a factor"):
        gte.read_config(GTE_BASE | {"rope_scaling": {"type": "ntk"}})
    for scaling in ({"type": "default", "factor": 2.0}, {"factor": 2.0}):
        with pytest.raises(ConfigError, match=r"rope_type = 'default' but rope_scaling\.factor = 2"):
            gte.read_config(GTE_BASE | {"rope_scaling": scaling})
