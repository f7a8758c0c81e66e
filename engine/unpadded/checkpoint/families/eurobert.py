"""EuroBERT: EuroBERT-210m, -610m, -2.1B and models trained from them. Pre-norm with RMSNorm, grouped-query attention.

Loading copies each shared key and value head once per query head, so that kernels see as many keys as queries.
"""

from collections.abc import Mapping
from typing import Any

from unpadded.checkpoint.family import GATES, TRANSFORMERS, Family, by_type_or_name, choice, encoder_tensors, sizes
from unpadded.checkpoint.json_config import allow_only, not_implemented, optional, unscaled_rotary
from unpadded.checkpoint.spec import EncoderSpec
from unpadded.errors import ConfigError

# each norm is the last of the block before it, as in ModernBERT
LAYOUT = {
    **TRANSFORMERS,
    "word": "embed_tokens",
    "norm": "layers.0.input_layernorm",
    "q": "layers.{layer}.self_attn.q_proj",
    "kv": ("layers.{layer}.self_attn.k_proj", "layers.{layer}.self_attn.v_proj"),
    "mlp_norm": "layers.{next}.input_layernorm",
}


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, dict.fromkeys(("is_causal", "attention_bias", "mlp_bias"), False) | {"rope_scaling": None})
    if "eurobert" not in str(config.get("auto_map") or "eurobert").lower():  # such as jina-embeddings-v5-text-nano
        raise not_implemented("auto_map", config["auto_map"], "EuroBERT's own code")
    shape = sizes(config)
    heads = shape["heads"]
    kv_heads = optional(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}; correct config.json"
        )
    return EncoderSpec(
        family="eurobert",
        **shape,
        kv_heads=kv_heads if kv_heads < heads else None,
        rotary=unscaled_rotary(config, "rope_theta"),
        activation=choice(config, "hidden_act", GATES, default="silu"),
        norm_eps=optional(config, "rms_norm_eps", 1e-5),
        biases=(),
        prenorm=True,
        rms_norm=True,
    )


FAMILY = Family(
    matches=by_type_or_name("eurobert"),  # many decoders have tensors of the same names
    read_config=read_config,
    tensors=lambda spec: encoder_tensors(spec, LAYOUT, last_mlp_norm="norm"),
    max_length=8192,
)
