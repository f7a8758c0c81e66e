"""NomicBERT: nomic-embed-text v1, v1.5 and v2-moe, nomic-bert-2048, CodeRankEmbed, arctic-embed-m-long.

Checkpoints use the keys and tensor names of the published code ("legacy"), those of transformers 5, or both; where both
are present, they must agree. In a configuration with a legacy key, an absent key has the default of the published
configuration class; without any legacy key, that of transformers' NomicBertConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    ROPE_OBJECTS,
    consistent,
    contradiction,
    flag,
    flatten_rope,
    hidden_and_heads,
    integer,
    not_implemented,
    number,
    one_of,
    positive,
    require_defaults,
    required,
    rope_keys,
    text,
)
from unpadded.checkpoint.spec import GATED, Activation, EncoderSpec, Experts, Rotary, TensorSpec, weight_and_bias
from unpadded.errors import ConfigError

LEGACY_KEYS = ("n_embd", "n_layer", "n_head", "activation_function", "rotary_emb_fraction", "qkv_proj_bias")
TRAINED_LENGTH = 2048
WIDTH_MULTIPLE = 256  # the published code rounds the width of a gated MLP up to a multiple of this

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": "swiglu",
    "geglu": "geglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# the MLP of transformers is always gated, and its activation is the gate's
GATES: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
DEFAULTS: dict[str, Any] = {
    "prenorm": False,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "causal": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "use_rms_norm": False,
    "norm_mlp": False,
    "num_shared_experts": 0,
    "expert_choice_router": False,
    "moe_normalize_expert_weights": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_head_dim": False,
}
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings")


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, or without one by tensor names of the published code, also ModernBERT's."""
    model_type = config.get("model_type")
    return model_type == "nomic_bert" or (
        model_type is None and any(name.endswith(("layers.0.attn.Wqkv.weight", "emb_ln.weight")) for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, DEFAULTS)
    legacy = any(key in config for key in LEGACY_KEYS)
    hidden, heads = hidden_and_heads(config, ("n_embd", "hidden_size"), ("n_head", "num_attention_heads"))
    require_defaults(config, {"num_heads_kv": heads, "num_key_value_heads": heads})
    activation = _activation(config, legacy)
    attention_bias = _bias(config, "qkv_proj_bias", legacy)
    layers = required(config, ("n_layer", "num_hidden_layers"), integer)
    return EncoderSpec(
        family="nomic_bert",
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=_intermediate(config, legacy, hidden, activation in GATED),
        vocabulary=_vocabulary(config),
        token_types=2 if config.get("type_vocab_size") is None else integer(config, "type_vocab_size", minimum=0),
        position_rows=0,
        rotary=_rotary(config, legacy),
        activation=activation,
        norm_eps=consistent(config, ("layer_norm_epsilon", "layer_norm_eps"), positive) or (1e-5 if legacy else 1e-12),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        up_bias=_bias(config, "mlp_fc1_bias", legacy),
        down_bias=_bias(config, "mlp_fc2_bias", legacy),
        experts=_experts(config, layers, activation),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    hidden = spec.hidden
    found = {
        **weight_and_bias("word", (spec.vocabulary, hidden), "embeddings.word_embeddings", bias=False),
        **weight_and_bias("norm", (hidden,), "emb_ln", "embeddings.LayerNorm"),
    }
    if spec.token_types:
        found |= weight_and_bias(
            "token_type", (spec.token_types, hidden), "embeddings.token_type_embeddings", bias=False
        )
    for index in range(spec.layers):
        found |= _attention_tensors(spec, index)
        if spec.experts and index in spec.experts.layers:
            found |= _expert_tensors(spec, spec.experts.num_experts, index)
        else:
            found |= _mlp_tensors(spec, index)
    return found


def _attention_tensors(spec: EncoderSpec, index: int) -> dict[str, TensorSpec]:
    """Return the tensors of attention and of both norms."""
    layer, hidden = f"layers.{index}", spec.hidden
    qkv = _spellings(index, "attn.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    out = _spellings(index, "attn.out_proj", "self_attn.o_proj")
    attention_norm = _spellings(index, "norm1", "post_attention_layernorm")
    mlp_norm = _spellings(index, "norm2", "post_mlp_layernorm")
    return {
        **weight_and_bias(f"{layer}.qkv", (3 * hidden, hidden), *qkv, bias=spec.qkv_bias),
        **weight_and_bias(f"{layer}.out", (hidden, hidden), *out, bias=spec.out_bias),
        **weight_and_bias(f"{layer}.attention_norm", (hidden,), *attention_norm),
        **weight_and_bias(f"{layer}.mlp_norm", (hidden,), *mlp_norm),
    }


def _mlp_tensors(spec: EncoderSpec, index: int) -> dict[str, TensorSpec]:
    layer, hidden = f"layers.{index}", spec.hidden
    gate_and_up = product(("mlp.fc12", "mlp.gate_proj"), ("mlp.fc11", "mlp.up_proj"))
    up = _spellings(index, *gate_and_up) if spec.gated else _spellings(index, "mlp.fc1")
    down = _spellings(index, "mlp.fc2", "mlp.down_proj")
    return {
        **weight_and_bias(f"{layer}.up", (spec.up_rows, hidden), *up, bias=spec.up_bias),
        **weight_and_bias(f"{layer}.down", (hidden, spec.intermediate), *down, bias=spec.down_bias),
    }


def _expert_tensors(spec: EncoderSpec, num_experts: int, index: int) -> dict[str, TensorSpec]:
    """Return the tensors of a mixture-of-experts MLP. Its only bias is added to the sum of the experts' outputs."""
    rows = num_experts * spec.intermediate
    tensors: dict[str, tuple[tuple[int, ...], str]] = {
        "router": ((num_experts, spec.hidden), "mlp.router.layer.weight"),
        "up": ((rows, spec.hidden), "mlp.experts.mlp.w1"),
        "down": ((rows, spec.hidden), "mlp.experts.mlp.w2"),
        "down_bias": ((spec.hidden,), "mlp.experts.bias"),
    }
    return {
        f"layers.{index}.{name}": TensorSpec(shape, _spellings(index, stored))
        for name, (shape, stored) in tensors.items()
    }


def _spellings(index: int, *names: str | tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the names inside a layer with both of the layer's names before them."""
    layers = (f"encoder.layers.{index}", f"layers.{index}")
    stacked = [(name,) if isinstance(name, str) else name for name in names]
    return tuple(tuple(f"{layer}.{name}" for name in parts) for parts in stacked for layer in layers)


def _activation(config: Mapping[str, Any], legacy: bool) -> Activation:
    """Read `activation_function`, which names the whole MLP, and `hidden_act`, which names its gate's activation."""
    if config.get("activation_function") is None:
        if config.get("hidden_act") is not None or not legacy:
            return GATES[one_of({"hidden_act": "silu", **config}, "hidden_act", GATES)]
        return "gelu_tanh"
    activation = ACTIVATIONS[one_of(config, "activation_function", ACTIVATIONS)]
    if config.get("hidden_act") is not None:
        stated = text(config, "hidden_act")
        meant = GATES.get(stated) if activation in GATED else ACTIVATIONS.get(stated)
        if meant != activation:
            raise contradiction({key: config[key] for key in ("activation_function", "hidden_act")})
    return activation


def _bias(config: Mapping[str, Any], key: str, legacy: bool) -> bool:
    return legacy if config.get(key) is None else flag(config, key)


def _intermediate(config: Mapping[str, Any], legacy: bool, hidden: int, gated: bool) -> int:
    exact = consistent(config, ("intermediate_size",), integer)
    stated = consistent(config, ("n_inner",), integer)
    if stated is None and exact is not None:
        return exact
    if stated is None and not legacy:
        raise ConfigError("config.json lacks intermediate_size (n_inner); add it")
    width = stated or (8 * hidden // 3 if gated else 4 * hidden)
    width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE if gated else width
    if exact not in (None, width):
        rounding = f", which the published code rounds to {width}," if width != stated else ""
        raise ConfigError(
            f"config.json contradicts itself: n_inner = {stated!r}{rounding} but intermediate_size = {exact!r}; "
            "keep the one the tensors have"
        )
    return width


def _experts(config: Mapping[str, Any], layers: int, activation: Activation) -> Experts | None:
    """Return the experts of every n-th layer, starting with the second one."""
    every = None if config.get("moe_every_n_layers") is None else integer(config, "moe_every_n_layers", minimum=0)
    num_experts = None if config.get("num_experts") is None else integer(config, "num_experts", minimum=0)
    if not num_experts or every == 0:
        return None
    if activation in GATED:
        raise not_implemented("num_experts", num_experts, f"0 with the activation {activation}")
    if every is None:
        raise ConfigError(f"num_experts = {num_experts} without moe_every_n_layers; add it")
    top_k = required(config, ("moe_top_k",), integer)
    if top_k > num_experts:
        raise ConfigError(f"moe_top_k = {top_k} exceeds num_experts = {num_experts}; correct config.json")
    expert_layers = tuple(index for index in range(layers) if index % every == 1)
    return Experts(layers=expert_layers, num_experts=num_experts, top_k=top_k)


def _vocabulary(config: Mapping[str, Any]) -> int:
    stated = required(config, ("vocab_size",), integer)
    multiple = consistent(config, ("pad_vocab_size_multiple",), integer) or 1
    return -(-stated // multiple) * multiple


def _rotary(config: Mapping[str, Any], legacy: bool) -> Rotary:
    flat = flatten_rope(config, ROPE_KEYS)
    legacy_defaults = legacy and not any(config.get(source) for source in ROPE_OBJECTS)
    fraction_keys = ("rotary_emb_fraction", "partial_rotary_factor", *rope_keys("partial_rotary_factor"))
    fraction = consistent(flat, fraction_keys, number)
    if fraction is None:
        fraction = 0.0 if legacy_defaults else 1.0  # the published class has no rotary embedding by default
    if fraction != 1:
        raise not_implemented("rotary_emb_fraction", fraction, 1.0)
    base = consistent(flat, ("rotary_emb_base", "rope_theta", *rope_keys("rope_theta")), positive)
    return Rotary(
        base=base or (10000.0 if legacy_defaults else 1000.0),
        trained_length=_trained_length(flat, legacy),
        scaling_factor=_scaling_factor(flat),
    )


def _trained_length(flat: Mapping[str, Any], legacy: bool) -> int:
    """Return the trained length, which a legacy max_position_embeddings is not.

    nomic-embed-text-v1 was trained with 2048 tokens and has max_position_embeddings = 8192.
    """
    trained = consistent(flat, ("max_trained_positions", *rope_keys("original_max_position_embeddings")), integer)
    if trained is None and not legacy:
        trained = consistent(flat, ("max_position_embeddings",), integer)
    return trained or TRAINED_LENGTH


def _scaling_factor(flat: Mapping[str, Any]) -> float | None:
    """Return `rotary_scaling_factor`, or if it is null the factor of rope type "dynamic", which is the same formula."""
    type_keys, factor_keys = rope_keys("rope_type", "type"), ("rotary_scaling_factor", *rope_keys("factor"))
    rope_type = consistent(flat, type_keys, text)
    if rope_type not in (None, "default", "dynamic"):
        raise not_implemented("rope_type", rope_type, "default, dynamic")
    factor = consistent(flat, factor_keys, positive)
    if rope_type == "dynamic" and factor is None:
        raise ConfigError("rope_type = 'dynamic' without a factor; add rope_parameters.factor")
    if rope_type == "default" and factor is not None:
        raise contradiction({key: flat[key] for key in (*type_keys, *factor_keys) if flat.get(key) is not None})
    return factor


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "bert.", "nomic_bert."),
    ignored=(
        "cls.*",
        "pooler.*",
        "classifier.*",
        "embeddings.position_ids",
        "embeddings.token_type_ids",
        "*inv_freq",
    ),
    max_length=8192,
    prompts={task: f"{task}: " for task in ("search_query", "search_document", "clustering", "classification")},
    matryoshka={
        "nomic-embed-text-v1.5": (768, 512, 256, 128, 64),
        "nomic-embed-text-v2-moe": (768, 256),
    },
    matryoshka_layer_norm=True,
)
