"""Jina's ALiBi BERT: jina-embeddings-v2-base-en, -small-en, -base-de, -base-zh, -base-es."""

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


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by ALiBi or by the names of the MLP."""
    gated = any(name.endswith("layer.0.mlp.gated_layers.weight") for name in names)
    return gated or (config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi")


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
