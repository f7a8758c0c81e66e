"""ModernBERT: modernbert-embed-base, gte-modernbert-base, ModernBERT. Pre-norm, with local attention in most layers."""

from collections.abc import Mapping
from typing import Any

from unpadded.checkpoint.family import GATES, Family, Layout, by_type_or_name, choice, encoder_tensors, sizes
from unpadded.checkpoint.json_config import allow_only, consistent, contradiction, not_implemented, optional, section
from unpadded.checkpoint.modules import Dense, Pooling
from unpadded.checkpoint.spec import EncoderSpec, LocalAttention, Rotary

BIASES = {"attention_bias": ("qkv", "out"), "mlp_bias": ("up", "down"), "norm_bias": ("norm",)}
LAYER_TYPES = ("full_attention", "sliding_attention")
# Each norm is the last of the block before it: the checkpoint's mlp_norm is attention's, and the next layer's attn_norm
# the MLP's. The norm of the embeddings is the only one before the first layer.
LAYOUT: Layout = {
    "word": "embeddings.tok_embeddings",
    "norm": "embeddings.norm",
    "qkv": "layers.{layer}.attn.Wqkv",
    "out": "layers.{layer}.attn.Wo",
    "attention_norm": "layers.{layer}.mlp_norm",
    "up": "layers.{layer}.mlp.Wi",
    "down": "layers.{layer}.mlp.Wo",
    "mlp_norm": "layers.{next}.attn_norm",
}


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, {"rope_scaling": None})
    shape = sizes(config)
    return EncoderSpec(
        family="modernbert",
        **shape,
        rotary=_rotary(config, "full_attention", "global_rope_theta", 160_000.0),
        activation=choice(config, "hidden_activation", GATES, default="gelu"),
        norm_eps=consistent(config, ("norm_eps", "layer_norm_eps"), float) or 1e-5,
        biases=tuple(bias for key, biases in BIASES.items() if optional(config, key, False) for bias in biases),
        prenorm=True,
        local_attention=LocalAttention(
            layers=_local_layers(config, shape["layers"]),
            # config.json states the whole window; a token at half of it to either side is inside
            window=optional(config, "local_attention", 128) // 2,
            rotary=_rotary(config, "sliding_attention", "local_rope_theta", 10_000.0),
        ),
    )


def _local_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return the layers that `layer_types` names, or without it every layer except each n-th."""
    every = consistent(config, ("global_attn_every_n_layers",), int)
    regular = tuple(index for index in range(layers) if index % (every or 3))
    types = config.get("layer_types")
    if types is None:
        return regular
    if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
        raise not_implemented("layer_types", types, f"{layers} of {', '.join(LAYER_TYPES)}")
    named = tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")
    if every is not None and named != regular:
        raise contradiction({"layer_types": types, "global_attn_every_n_layers": every})
    return named


def _rotary(config: Mapping[str, Any], layer_type: str, base_key: str, default: float) -> Rotary:
    source, inside = f"rope_parameters.{layer_type}", section(section(config, "rope_parameters"), layer_type)
    rope = {f"{source}.{key}": value for key, value in inside.items()}
    theta = f"{source}.rope_theta"
    allow_only(rope, dict.fromkeys(rope.keys() - {theta}) | {f"{source}.rope_type": "default"})
    base = consistent({**config, **rope}, (base_key, theta), float)
    return Rotary(base=base or default, trained_length=optional(config, "max_position_embeddings", 8192))


def _score_layers(spec: EncoderSpec, config: Mapping[str, Any], labels: int) -> tuple[Pooling, tuple[Dense, ...]]:
    allow_only(config, {"classifier_activation": "gelu"})
    pooling = optional(config, "classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise not_implemented("classifier_pooling", pooling, "cls, mean")
    square, bias = (spec.hidden, spec.hidden), optional(config, "classifier_bias", False)
    dense = Dense(name="head.dense", shape=square, bias=bias, activation="gelu")
    norm = Dense(name="head.norm", shape=(spec.hidden,), bias="norm" in spec.biases, eps=spec.norm_eps)
    return "cls" if pooling == "cls" else "mean", (dense, norm, Dense(name="classifier", shape=(labels, spec.hidden)))


def _mlm_layers(spec: EncoderSpec, config: Mapping[str, Any]) -> tuple[Dense, ...]:
    allow_only(config, {"decoder_bias": True})
    *layers, _ = _score_layers(spec, config, 1)[1]
    return *layers, Dense(name="decoder.bias", shape=(spec.vocabulary,), bias=False)


FAMILY = Family(
    matches=by_type_or_name("modernbert", suffixes=("embeddings.tok_embeddings.weight",)),
    read_config=read_config,
    tensors=lambda spec: encoder_tensors(spec, LAYOUT, last_mlp_norm="final_norm"),
    score=_score_layers,
    mlm=_mlm_layers,
    max_length=8192,
    matryoshka={"modernbert-embed-base": (768, 256)},
)
