"""ModernBERT: modernbert-embed-base, gte-modernbert-base, ModernBERT. Pre-norm, with local attention in most layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import (
    consistent,
    contradiction,
    flag,
    hidden_and_heads,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, LocalAttention, Rotary, TensorSpec, weight_and_bias

GATES: dict[str, Activation] = {"gelu": "geglu", "silu": "swiglu"}
LAYER_TYPES = ("full_attention", "sliding_attention")
BASES = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
BASE_KEYS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, or without one by the name of the word embeddings."""
    model_type = config.get("model_type")
    return model_type == "modernbert" or (
        model_type is None and any(name.endswith("embeddings.tok_embeddings.weight") for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, {"is_decoder": False, "rope_scaling": None})
    hidden, heads = hidden_and_heads(config)
    layers = required(config, ("num_hidden_layers",), integer)
    attention_bias, mlp_bias = consistent(config, ("attention_bias",), flag), consistent(config, ("mlp_bias",), flag)
    return EncoderSpec(
        family="modernbert",
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=required(config, ("intermediate_size",), integer),
        vocabulary=required(config, ("vocab_size",), integer),
        token_types=0,
        position_rows=0,
        rotary=_rotary(config, "full_attention"),
        activation=GATES[one_of({"hidden_activation": "gelu", **config}, "hidden_activation", GATES)],
        norm_eps=consistent(config, ("norm_eps", "layer_norm_eps"), positive) or 1e-5,
        qkv_bias=bool(attention_bias),
        out_bias=bool(attention_bias),
        up_bias=bool(mlp_bias),
        down_bias=bool(mlp_bias),
        prenorm=True,
        norm_bias=bool(consistent(config, ("norm_bias",), flag)),
        local_attention=LocalAttention(
            layers=_local_layers(config, layers),
            # config.json states the whole window; a token at half of it to either side is inside
            window=(consistent(config, ("local_attention",), integer) or 128) // 2,
            rotary=_rotary(config, "sliding_attention"),
        ),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the tensors of the encoder, with each norm as the last of the block before it.

    The checkpoint's `mlp_norm` is then attention's, the next layer's `attn_norm` (`final_norm` in the last layer) the
    MLP's, and the norm of the embeddings the only one before the first layer.
    """
    hidden = spec.hidden
    found = {
        **weight_and_bias("word", (spec.vocabulary, hidden), "embeddings.tok_embeddings", bias=False),
        **weight_and_bias("norm", (hidden,), "embeddings.norm", bias=spec.norm_bias),
    }
    for index in range(spec.layers):
        layer = f"layers.{index}"
        next_norm = "final_norm" if index == spec.layers - 1 else f"layers.{index + 1}.attn_norm"
        found |= {
            **weight_and_bias(f"{layer}.qkv", (3 * hidden, hidden), f"{layer}.attn.Wqkv", bias=spec.qkv_bias),
            **weight_and_bias(f"{layer}.out", (hidden, hidden), f"{layer}.attn.Wo", bias=spec.out_bias),
            **weight_and_bias(f"{layer}.attention_norm", (hidden,), f"{layer}.mlp_norm", bias=spec.norm_bias),
            **weight_and_bias(f"{layer}.up", (spec.up_rows, hidden), f"{layer}.mlp.Wi", bias=spec.up_bias),
            **weight_and_bias(f"{layer}.down", (hidden, spec.intermediate), f"{layer}.mlp.Wo", bias=spec.down_bias),
            **weight_and_bias(f"{layer}.mlp_norm", (hidden,), next_norm, bias=spec.norm_bias),
        }
    return found


def _local_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return the layers that `layer_types` names, or without it every layer except each n-th."""
    every = consistent(config, ("global_attn_every_n_layers",), integer)
    regular = tuple(index for index in range(layers) if index % (every or 3))
    types = config.get("layer_types")
    if types is None:
        return regular
    if not isinstance(types, list) or len(types) != layers or set(types) - set(LAYER_TYPES):
        raise not_implemented("layer_types", types, f"{layers} of {', '.join(LAYER_TYPES)}")
    named = tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")
    if every is not None and named != regular:
        raise contradiction({"layer_types": types, "global_attn_every_n_layers": every})
    return named


def _rotary(config: Mapping[str, Any], layer_type: str) -> Rotary:
    rope = (config.get("rope_parameters") or {}).get(layer_type) or {}
    source = f"rope_parameters.{layer_type}"
    require_defaults(rope, dict.fromkeys(rope.keys() - {"rope_theta"}) | {"rope_type": "default"}, source)
    bases = {**config, f"{source}.rope_theta": rope.get("rope_theta")}
    base = consistent(bases, (BASE_KEYS[layer_type], f"{source}.rope_theta"), positive)
    trained = consistent(config, ("max_position_embeddings",), integer)
    return Rotary(base=base or BASES[layer_type], trained_length=trained or 8192)


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    ignored=("head.*", "decoder.*", "classifier.*", "*inv_freq"),
    max_length=8192,
    matryoshka={"modernbert-embed-base": (768, 256)},
)
