"""Jina's ALiBi BERT: jina-embeddings-v2-base-en, -small-en, -base-de, -base-zh, -base-es."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.families.bert import attention_tensors, embedding_tensors, norm_tensors
from unpadded.checkpoint.json_config import not_implemented, require_defaults
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec, weight_and_bias

GATES: dict[str, Activation] = {"geglu": "geglu"}
OVERRIDDEN_KEYS = ("auto_map", "position_embedding_type", "feed_forward_type", "max_position_embeddings")


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by ALiBi or by the names of the MLP, unless q and k are normalized."""
    if normalizes_q_and_k(config, names):
        return False
    gated = any(name.endswith("layer.0.mlp.gated_layers.weight") for name in names)
    return gated or (config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi")


def normalizes_q_and_k(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether this is `jina_code`, which differs by its tensors and by the name of its code only."""
    by_name = any(name.endswith("attention.self.layer_norm_q.weight") for name in names)
    return by_name or "jina-bert-v2-qk-post-norm" in str(config.get("auto_map"))


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, {"position_embedding_type": "alibi"})
    feed_forward = config.get("feed_forward_type", "geglu")
    if feed_forward not in GATES:
        raise not_implemented("feed_forward_type", feed_forward, ", ".join(GATES))
    as_bert = {key: value for key, value in config.items() if key not in OVERRIDDEN_KEYS}
    spec = bert.read_config(as_bert | {"max_position_embeddings": 1})  # required by BERT, unused with ALiBi
    return replace(spec, family="jina_bert", position_rows=0, alibi=True, activation=GATES[feed_forward], up_bias=False)


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    hidden, intermediate = spec.hidden, spec.intermediate
    found = embedding_tensors(spec)
    for index in range(spec.layers):
        layer, stored = f"layers.{index}", f"encoder.layer.{index}"
        found |= {
            **attention_tensors(layer, stored, hidden),
            **norm_tensors(f"{layer}.attention_norm", hidden, f"{stored}.attention.output.LayerNorm"),
            **weight_and_bias(f"{layer}.up", (spec.up_rows, hidden), f"{stored}.mlp.gated_layers", bias=False),
            **weight_and_bias(f"{layer}.down", (hidden, intermediate), f"{stored}.mlp.wo"),
            **norm_tensors(f"{layer}.mlp_norm", hidden, f"{stored}.mlp.layernorm"),
        }
    return found


FAMILY = replace(bert.FAMILY, matches=matches, read_config=read_config, tensors=tensors, max_length=8192)
