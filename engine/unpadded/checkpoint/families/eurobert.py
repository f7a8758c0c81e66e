"""EuroBERT: EuroBERT-210m, -610m, -2.1B and models trained from them. Pre-norm with RMSNorm, grouped-query attention.

Loading the weights copies each shared key and value head once per query head, so that every kernel sees as many keys as
queries. With three query heads per key the qkv linear then has 1.8 times the rows it needs, a tenth of a layer's work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import (
    consistent,
    hidden_and_heads,
    integer,
    one_of,
    positive,
    require_defaults,
    required,
    rope_theta,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, Rotary, TensorSpec, weight_and_bias
from unpadded.errors import ConfigError

GATES: dict[str, Activation] = {"silu": "swiglu", "gelu": "geglu"}
DEFAULTS: dict[str, Any] = {
    "is_decoder": False,
    "is_causal": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type alone: many decoders have tensors of the same names."""
    return config.get("model_type") == "eurobert"


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, DEFAULTS)
    hidden, heads = hidden_and_heads(config)
    kv_heads = consistent(config, ("num_key_value_heads",), integer) or heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}; correct config.json"
        )
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
    hidden, intermediate = spec.hidden, spec.intermediate
    # Names of the modules, none of which has a bias. As in ModernBERT, each norm is the last of the block before it.
    modules: dict[str, tuple[tuple[int, ...], str | tuple[str, ...]]] = {
        "word": ((spec.vocabulary, hidden), "embed_tokens"),
        "norm": ((hidden,), "layers.0.input_layernorm"),
    }
    for index in range(spec.layers):
        layer = f"layers.{index}"
        q, k, v = (f"{layer}.self_attn.{part}_proj" for part in "qkv")
        if spec.kv_heads is None:
            modules[f"{layer}.qkv"] = (3 * hidden, hidden), (q, k, v)
        else:
            modules[f"{layer}.q"] = (hidden, hidden), q
            modules[f"{layer}.kv"] = (2 * spec.kv_heads * spec.head_dim, hidden), (k, v)
        next_norm = "norm" if index == spec.layers - 1 else f"layers.{index + 1}.input_layernorm"
        modules |= {
            f"{layer}.out": ((hidden, hidden), f"{layer}.self_attn.o_proj"),
            f"{layer}.attention_norm": ((hidden,), f"{layer}.post_attention_layernorm"),
            f"{layer}.up": ((2 * intermediate, hidden), (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")),
            f"{layer}.down": ((hidden, intermediate), f"{layer}.mlp.down_proj"),
            f"{layer}.mlp_norm": ((hidden,), next_norm),
        }
    found: dict[str, TensorSpec] = {}
    for name, (shape, stored) in modules.items():
        found |= weight_and_bias(name, shape, stored, bias=False)
    return found


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    ignored=("lm_head.*", "dense.*", "classifier.*", "*inv_freq"),
    max_length=8192,
)
