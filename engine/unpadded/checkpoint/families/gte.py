"""GTE: gte-base-en-v1.5, gte-large-en-v1.5, gte-multilingual-base, arctic-embed-m-v2.0.

Their tensors have the published code's names or those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families.bert import embedding_tensors
from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    flatten_rope,
    hidden_and_heads,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
    rope_keys,
    text,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, Rotary, TensorSpec, weight_and_bias
from unpadded.errors import ConfigError

MODEL_TYPES = ("new", "gte")
GATES: dict[str, Activation] = {"gelu": "geglu", "silu": "swiglu"}
DEFAULTS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
    "is_decoder": False,
    "add_cross_attention": False,
}
ROPE_KEYS = ("type", "rope_type", "rope_theta", "factor")
BASE = 160_000.0


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, or without one by the published name of the MLP's first linear."""
    model_type = config.get("model_type")
    return model_type in MODEL_TYPES or (
        model_type is None and any(name.endswith("layer.0.mlp.up_gate_proj.weight") for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, DEFAULTS)
    hidden, heads = hidden_and_heads(config)
    require_defaults(config, {"num_key_value_heads": heads})
    token_types = config.get("type_vocab_size")
    return EncoderSpec(
        family="gte",
        layers=required(config, ("num_hidden_layers",), integer),
        hidden=hidden,
        heads=heads,
        intermediate=required(config, ("intermediate_size",), integer),
        vocabulary=required(config, ("vocab_size",), integer),
        token_types=1 if token_types is None else integer(config, "type_vocab_size", minimum=0),
        position_rows=0,
        rotary=_rotary(config, hidden // heads),
        activation=GATES[one_of({"hidden_act": "gelu", **config}, "hidden_act", GATES)],
        norm_eps=consistent(config, ("layer_norm_eps",), positive) or 1e-12,
        qkv_bias=True,
        out_bias=True,
        up_bias=False,
        down_bias=True,
    )


def _rotary(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """Static NTK with factor f, independent of the text's length: base * f, frequencies divided by f ** (2 / d)."""
    flat = flatten_rope(config, ROPE_KEYS)
    rope_type = consistent(flat, rope_keys("type", "rope_type"), text) or "default"
    factor = consistent(flat, rope_keys("factor"), positive)
    if rope_type not in ("default", "ntk") or (rope_type == "default" and factor is not None):
        raise not_implemented("rope_type", (rope_type, factor), "default without a factor, ntk")
    if rope_type == "ntk" and factor is None:
        raise ConfigError("rope_type = 'ntk' without a factor; add rope_scaling.factor")
    factor = factor or 1.0
    return Rotary(
        base=factor * (consistent(flat, ("rope_theta", *rope_keys("rope_theta")), positive) or BASE),
        trained_length=consistent(config, ("max_position_embeddings",), integer) or 8192,
        frequency_scale=factor ** (-2 / head_dim),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return each tensor with its published name, then with that of transformers."""
    hidden, intermediate = spec.hidden, spec.intermediate
    found = embedding_tensors(spec)
    for index in range(spec.layers):
        layer, old = f"layers.{index}", f"encoder.layer.{index}"
        q, k, v = (f"{layer}.self_attn.{part}_proj" for part in "qkv")
        up, gate_and_up = f"{old}.mlp.up_gate_proj", (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        found |= {
            **weight_and_bias(f"{layer}.qkv", (3 * hidden, hidden), f"{old}.attention.qkv_proj", (q, k, v)),
            **weight_and_bias(f"{layer}.out", (hidden, hidden), f"{old}.attention.o_proj", f"{layer}.self_attn.o_proj"),
            **weight_and_bias(
                f"{layer}.attention_norm", (hidden,), f"{old}.attn_ln", f"{layer}.post_attention_layernorm"
            ),
            **weight_and_bias(f"{layer}.up", (spec.up_rows, hidden), up, gate_and_up, bias=False),
            **weight_and_bias(
                f"{layer}.down", (hidden, intermediate), f"{old}.mlp.down_proj", f"{layer}.mlp.down_proj"
            ),
            **weight_and_bias(f"{layer}.mlp_norm", (hidden,), f"{old}.mlp_ln", f"{layer}.post_mlp_layernorm"),
        }
        found[f"{layer}.up"] = replace(found[f"{layer}.up"], up_before_gate=(f"{up}.weight",))
    return found


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "new.", "gte."),
    ignored=("lm_head.*", "pooler.*", "classifier.*", "embeddings.position_ids", "*inv_freq"),
    max_length=8192,
)
