"""Jina's ALiBi BERT: jina-embeddings-v2-base-en, -small-en, -base-de, -base-zh, -base-es.

jina-embeddings-v2-base-code, a family of its own, has LayerNorm on q and k, and one more after attention.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.families.bert import LAYER
from unpadded.checkpoint.family import encoder_tensors
from unpadded.checkpoint.json_config import allow_only
from unpadded.checkpoint.spec import EncoderSpec

BIASES = ("qkv", "out", "down", "norm")
# max_position_embeddings is required by BERT, but unused with ALiBi
AS_BERT = {"auto_map": None, "position_embedding_type": None, "feed_forward_type": None, "max_position_embeddings": 1}
LAYOUT = {
    **bert.LAYOUT,
    "up": f"{LAYER}.mlp.gated_layers",
    "down": f"{LAYER}.mlp.wo",
    "mlp_norm": f"{LAYER}.mlp.layernorm",
}
CODE_LAYOUT = {
    **bert.LAYOUT,
    "qk_norm": (f"{LAYER}.attention.self.layer_norm_q", f"{LAYER}.attention.self.layer_norm_k"),
    "inner_norm": f"{LAYER}.attention.output.LayerNorm",
    "attention_norm": f"{LAYER}.layer_norm_1",
    "up": f"{LAYER}.mlp.up_gated_layer",
    "down": f"{LAYER}.mlp.down_layer",
    "mlp_norm": f"{LAYER}.layer_norm_2",
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by ALiBi or by the names of the MLP."""
    gated = any(name.endswith("layer.0.mlp.gated_layers.weight") for name in names)
    return gated or (config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi")


def matches_code(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by the names of the norms of q and k, or by that of the published code, the only other difference."""
    by_name = any(name.endswith("attention.self.layer_norm_q.weight") for name in names)
    return by_name or "jina-bert-v2-qk-post-norm" in str(config.get("auto_map"))


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, {"position_embedding_type": "alibi", "feed_forward_type": "geglu"})
    spec = bert.read_config({**config, **AS_BERT})
    return replace(spec, family="jina_bert", position_rows=0, alibi=True, activation="geglu", biases=BIASES)


FAMILY = replace(
    bert.FAMILY,
    matches=matches,
    read_config=read_config,
    tensors=lambda spec: encoder_tensors(spec, LAYOUT),
    mlm=None,
    max_length=8192,
)
CODE_FAMILY = replace(
    FAMILY,
    matches=matches_code,
    read_config=lambda config: replace(read_config(config), family="jina_code", qk_norm=True, inner_norm=True),
    tensors=lambda spec: encoder_tensors(spec, CODE_LAYOUT, up_before_gate=("up_gated_layer.weight",)),
)
