"""GTE: gte-base-en-v1.5, gte-large-en-v1.5, gte-multilingual-base, arctic-embed-m-v2.0.

Their tensors have the published code's names or those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.families.bert import embedding_slots
from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
    text,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, Rotary, TensorSpec
from unpadded.errors import ConfigError

MODEL_TYPES = ("new", "gte")
GATES: dict[str, Activation] = {"gelu": "geglu", "silu": "swiglu"}
OFFERED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
    "is_decoder": False,
    "add_cross_attention": False,
}
ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", "factor"})
BASE = 160_000.0


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By model_type, or without one by the names of its MLP and norms."""
    model_type = config.get("model_type")
    return model_type in MODEL_TYPES or (
        model_type is None and any(name.endswith("layer.0.mlp.up_gate_proj.weight") for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for what is not implemented."""
    require_defaults(config, OFFERED)
    hidden, heads = required(config, ("hidden_size",), integer), required(config, ("num_attention_heads",), integer)
    if hidden % heads or hidden // heads % 2:
        raise ConfigError(
            f"hidden_size = {hidden} does not make num_attention_heads = {heads} of an even width; correct config.json"
        )
    require_defaults(config, {"head_dim": hidden // heads, "num_key_value_heads": heads})
    token_types = config.get("type_vocab_size")
    return EncoderSpec(
        family="gte",
        layers=required(config, ("num_hidden_layers",), integer),
        hidden=hidden,
        heads=heads,
        intermediate=required(config, ("intermediate_size",), integer),
        vocabulary=required(config, ("vocab_size",), integer),
        token_types=1 if token_types is None else integer(config, "type_vocab_size", least=0),
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
    """Static NTK with factor f, whatever the text's length: base * f, and every frequency divided by f ** (2 / d)."""
    rope: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling"):
        inside = config.get(source) or {}
        if not isinstance(inside, dict) or {key for key in inside.keys() - ROPE_KEYS if inside[key] is not None}:
            raise not_implemented(source, inside, sorted(ROPE_KEYS))
        rope |= {f"{source}.{key}": value for key, value in inside.items()}
    stated = {**config, **rope}

    def spelled(*keys: str) -> tuple[str, ...]:
        return tuple(f"{source}.{key}" for source in ("rope_parameters", "rope_scaling") for key in keys)

    rope_type = consistent(stated, spelled("type", "rope_type"), text) or "default"
    factor = consistent(stated, spelled("factor"), positive)
    if rope_type not in ("default", "ntk") or (rope_type == "default" and factor is not None):
        raise not_implemented("rope_type", (rope_type, factor), "default without a factor, ntk")
    if rope_type == "ntk" and factor is None:
        raise ConfigError("rope_type = 'ntk' without a factor; add rope_scaling.factor")
    factor = factor or 1.0
    return Rotary(
        base=factor * (consistent(stated, ("rope_theta", *spelled("rope_theta")), positive) or BASE),
        trained_length=consistent(config, ("max_position_embeddings",), integer) or 8192,
        frequency_scale=factor ** (-2 / head_dim),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder: the published names, then transformers'."""
    hidden = spec.hidden
    modules: dict[str, tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = {
        "qkv": ((3 * hidden, hidden), ("attention.qkv_proj",), tuple(f"self_attn.{part}_proj" for part in "qkv")),
        "out": ((hidden, hidden), ("attention.o_proj",), ("self_attn.o_proj",)),
        "attention_norm": ((hidden,), ("attn_ln",), ("post_attention_layernorm",)),
        "up": ((spec.up_rows, hidden), ("mlp.up_gate_proj",), ("mlp.gate_proj", "mlp.up_proj")),
        "down": ((hidden, spec.intermediate), ("mlp.down_proj",), ("mlp.down_proj",)),
        "mlp_norm": ((hidden,), ("mlp_ln",), ("post_mlp_layernorm",)),
    }
    found = embedding_slots(spec)
    for index in range(spec.layers):
        for field, (shape, published, modern) in modules.items():
            for part, slot in (("weight", field), ("bias", f"{field}_bias")):
                names = (
                    tuple(f"encoder.layer.{index}.{module}.{part}" for module in published),
                    tuple(f"layers.{index}.{module}.{part}" for module in modern),
                )
                swapped = names[0] if field == "up" else ()
                found[f"layers.{index}.{slot}"] = TensorSpec(shape if part == "weight" else shape[:1], names, swapped)
        del found[f"layers.{index}.up_bias"]
    return found


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "new.", "gte."),
    ignored=("lm_head.*", "pooler.*", "classifier.*", "embeddings.position_ids", "*inv_freq"),
    max_length=8192,
)
