"""GTE: gte-base-en-v1.5, gte-large-en-v1.5, gte-multilingual-base, arctic-embed-m-v2.0.

Their tensors have the published code's names or those of transformers 5.
"""

from collections.abc import Mapping
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.families.bert import LAYER
from unpadded.checkpoint.family import GATES, TRANSFORMERS, Family, by_type_or_name, choice, encoder_tensors, sizes
from unpadded.checkpoint.json_config import allow_only, consistent, flatten_rope, optional, rope_factor, rope_keys
from unpadded.checkpoint.spec import EncoderSpec, Rotary

DEFAULTS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
}
PUBLISHED = {
    **TRANSFORMERS,
    "qkv": f"{LAYER}.attention.qkv_proj",
    "out": f"{LAYER}.attention.o_proj",
    "attention_norm": f"{LAYER}.attn_ln",
    "up": f"{LAYER}.mlp.up_gate_proj",
    "down": f"{LAYER}.mlp.down_proj",
    "mlp_norm": f"{LAYER}.mlp_ln",
}


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, DEFAULTS)
    shape = sizes(config)
    allow_only(config, {"num_key_value_heads": shape["heads"]})
    flat = flatten_rope(config, ("type", "rope_type", "rope_theta", "factor"))
    # static NTK, independent of the text's length: base * factor, frequencies divided by factor ** (2 / head_dim)
    factor = rope_factor(flat, "ntk") or 1.0
    return EncoderSpec(
        family="gte",
        **shape,
        token_types=optional(config, "type_vocab_size", 1, minimum=0),
        rotary=Rotary(
            base=factor * (consistent(flat, ("rope_theta", *rope_keys("rope_theta")), float) or 160_000.0),
            trained_length=optional(config, "max_position_embeddings", 8192),
            frequency_scale=factor ** (-2 / (shape["hidden"] // shape["heads"])),
        ),
        activation=choice(config, "hidden_act", GATES, default="gelu"),
        norm_eps=optional(config, "layer_norm_eps", 1e-12),
        biases=("qkv", "out", "down", "norm"),
    )


FAMILY = Family(
    matches=by_type_or_name("new", "gte", suffixes=("layer.0.mlp.up_gate_proj.weight",)),
    read_config=read_config,
    tensors=lambda spec: encoder_tensors(spec, PUBLISHED, TRANSFORMERS, up_before_gate=("up_gate_proj.weight",)),
    score=bert.FAMILY.score,
    max_length=8192,
)
