"""ModernBERT: modernbert-embed-base, gte-modernbert-base, ModernBERT-base and -large. Pre-norm, most layers local."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import (
    consistent,
    contradiction,
    flag,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, LocalAttention, Rotary, TensorSpec
from unpadded.errors import ConfigError

GATES: dict[str, Activation] = {"gelu": "geglu", "silu": "swiglu"}
LAYER_TYPES = ("full_attention", "sliding_attention")
BASES = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
BASE_KEYS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By model_type, or without one by the names of its embeddings."""
    model_type = config.get("model_type")
    return model_type == "modernbert" or (
        model_type is None and any(name.endswith("embeddings.tok_embeddings.weight") for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for what is contradictory or not implemented."""
    require_defaults(config, {"is_decoder": False, "rope_scaling": None})
    hidden, heads = required(config, ("hidden_size",), integer), required(config, ("num_attention_heads",), integer)
    if hidden % heads or hidden // heads % 2:
        raise ConfigError(
            f"hidden_size = {hidden} does not make num_attention_heads = {heads} of an even width; correct config.json"
        )
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
            # stated as the whole window; a token at half of it to either side is still seen
            window=(consistent(config, ("local_attention",), integer) or 128) // 2,
            rotary=_rotary(config, "sliding_attention"),
        ),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder.

    A norm closes what stands before it: `mlp_norm` of the checkpoint closes attention, the next layer's `attn_norm` the
    MLP, `final_norm` the last one; the embeddings' norm is all that the first layer reads through.
    """
    hidden = spec.hidden
    found = {
        "word": _slot((spec.vocabulary, hidden), "embeddings.tok_embeddings.weight"),
        **_slots("norm", (hidden,), "embeddings.norm", spec.norm_bias),
    }
    for index in range(spec.layers):
        slot, name = f"layers.{index}", f"layers.{index}"
        closing = "final_norm" if index == spec.layers - 1 else f"layers.{index + 1}.attn_norm"
        found |= {
            **_slots(f"{slot}.qkv", (3 * hidden, hidden), f"{name}.attn.Wqkv", spec.qkv_bias),
            **_slots(f"{slot}.out", (hidden, hidden), f"{name}.attn.Wo", spec.out_bias),
            **_slots(f"{slot}.attention_norm", (hidden,), f"{name}.mlp_norm", spec.norm_bias),
            **_slots(f"{slot}.up", (spec.up_rows, hidden), f"{name}.mlp.Wi", spec.up_bias),
            **_slots(f"{slot}.down", (hidden, spec.intermediate), f"{name}.mlp.Wo", spec.down_bias),
            **_slots(f"{slot}.mlp_norm", (hidden,), closing, spec.norm_bias),
        }
    return found


def _slots(slot: str, shape: tuple[int, ...], module: str, bias: bool) -> dict[str, TensorSpec]:
    found = {slot: _slot(shape, f"{module}.weight")}
    return found | {f"{slot}_bias": _slot(shape[:1], f"{module}.bias")} if bias else found


def _slot(shape: tuple[int, ...], name: str) -> TensorSpec:
    return TensorSpec(shape, ((name,),))


def _local_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """By `layer_types`, or every layer but each n-th."""
    every = consistent(config, ("global_attn_every_n_layers",), integer)
    local = tuple(index for index in range(layers) if index % (every or 3))
    types = config.get("layer_types")
    if types is None:
        return local
    if not isinstance(types, list) or len(types) != layers or set(types) - set(LAYER_TYPES):
        raise not_implemented("layer_types", types, f"{layers} of {', '.join(LAYER_TYPES)}")
    stated = tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")
    if every is not None and stated != local:
        raise contradiction({"layer_types": types, "global_attn_every_n_layers": every})
    return stated


def _rotary(config: Mapping[str, Any], layer_type: str) -> Rotary:
    start = f"rope_parameters.{layer_type}."
    rope = (config.get("rope_parameters") or {}).get(layer_type) or {}
    stated = {**config, **{start + key: value for key, value in rope.items()}}
    require_defaults(
        stated, {start + key: "default" if key == "rope_type" else None for key in rope if key != "rope_theta"}
    )
    base = consistent(stated, (BASE_KEYS[layer_type], f"{start}rope_theta"), positive)
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
