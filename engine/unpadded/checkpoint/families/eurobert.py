"""EuroBERT: EuroBERT-210m, -610m, -2.1B and what is trained from them. Pre-norm with RMSNorm, grouped keys and values.

Heads that share a key and a value get a copy each when the weights are loaded: every kernel then sees as many keys as
queries, and the qkv product has 1.8 times the rows it needs where three heads share, a tenth of a layer's work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.families.bert import named
from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import (
    consistent,
    integer,
    one_of,
    positive,
    require_defaults,
    required,
    rope_theta,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, Rotary, TensorSpec
from unpadded.errors import ConfigError

GATES: dict[str, Activation] = {"silu": "swiglu", "gelu": "geglu"}
OFFERED: dict[str, Any] = {
    "is_decoder": False,
    "is_causal": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By model_type alone: the tensors have the names of many decoders."""
    return config.get("model_type") == "eurobert"


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for what is contradictory or not implemented."""
    require_defaults(config, OFFERED)
    hidden, heads = required(config, ("hidden_size",), integer), required(config, ("num_attention_heads",), integer)
    kv_heads = consistent(config, ("num_key_value_heads",), integer) or heads
    if hidden % heads or hidden // heads % 2 or heads % kv_heads:
        raise ConfigError(
            f"hidden_size = {hidden} does not make num_attention_heads = {heads} of an even width, "
            f"a multiple of num_key_value_heads = {kv_heads}; correct config.json"
        )
    require_defaults(config, {"head_dim": hidden // heads})
    return EncoderSpec(
        family="eurobert",
        layers=required(config, ("num_hidden_layers",), integer),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads if kv_heads < heads else None,
        intermediate=required(config, ("intermediate_size",), integer),
        vocabulary=required(config, ("vocab_size",), integer),
        token_types=0,
        position_rows=0,
        rotary=Rotary(
            base=rope_theta(config, "rope_theta"),
            trained_length=consistent(config, ("max_position_embeddings",), integer) or 8192,
        ),
        activation=GATES[one_of({"hidden_act": "silu", **config}, "hidden_act", GATES)],
        norm_eps=consistent(config, ("rms_norm_eps",), positive) or 1e-5,
        qkv_bias=False,
        out_bias=False,
        up_bias=False,
        down_bias=False,
        prenorm=True,
        norm_bias=False,
        rms_norm=True,
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder.

    Each LayerNorm is assigned to the block before it, as in ModernBERT.
    """
    hidden, intermediate = spec.hidden, spec.intermediate
    found = {
        "word": named((spec.vocabulary, hidden), "embed_tokens.weight"),
        "norm": named((hidden,), "layers.0.input_layernorm.weight"),
    }
    for index in range(spec.layers):
        layer = f"layers.{index}"
        q, k, v = (f"{layer}.self_attn.{part}_proj.weight" for part in "qkv")
        if spec.kv_heads is None:
            found[f"{layer}.qkv"] = named((3 * hidden, hidden), q, k, v)
        else:
            found[f"{layer}.q"] = named((hidden, hidden), q)
            found[f"{layer}.kv"] = named((2 * spec.kv_heads * spec.head_dim, hidden), k, v)
        closing = "norm" if index == spec.layers - 1 else f"layers.{index + 1}.input_layernorm"
        found |= {
            f"{layer}.out": named((hidden, hidden), f"{layer}.self_attn.o_proj.weight"),
            f"{layer}.attention_norm": named((hidden,), f"{layer}.post_attention_layernorm.weight"),
            f"{layer}.up": named(
                (2 * intermediate, hidden), f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"
            ),
            f"{layer}.down": named((hidden, intermediate), f"{layer}.mlp.down_proj.weight"),
            f"{layer}.mlp_norm": named((hidden,), f"{closing}.weight"),
        }
    return found


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    ignored=("lm_head.*", "dense.*", "classifier.*", "*inv_freq"),
    max_length=8192,
)
