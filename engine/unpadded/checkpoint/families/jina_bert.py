"""Jina's ALiBi BERT: jina-embeddings-v2-base-en, -small-en, -base-de, -base-zh, -base-es."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.families.bert import attention_slots, embedding_slots, named, norm_slots
from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import not_implemented, require_defaults
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec

GATES: dict[str, Activation] = {"geglu": "geglu"}
BERT_KEYS = ("auto_map", "position_embedding_type", "feed_forward_type", "max_position_embeddings")


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By ALiBi or by the names of its MLP, and no norm of q and k."""
    if normalizes_q_and_k(config, names):
        return False
    gated = any(name.endswith("layer.0.mlp.gated_layers.weight") for name in names)
    return gated or (config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi")


def normalizes_q_and_k(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether it is the other of Jina's ALiBi models, which only its tensors and the name of its code tell apart."""
    by_name = any(name.endswith("attention.self.layer_norm_q.weight") for name in names)
    return by_name or "jina-bert-v2-qk-post-norm" in str(config.get("auto_map"))


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for another position embedding or MLP."""
    require_defaults(config, {"position_embedding_type": "alibi"})
    stated = config.get("feed_forward_type", "geglu")
    if stated not in GATES:
        raise not_implemented("feed_forward_type", stated, ", ".join(GATES))
    shared = {key: value for key, value in config.items() if key not in BERT_KEYS}
    spec = bert.read_config(shared | {"max_position_embeddings": 1})  # a table that ALiBi does without
    return replace(spec, family="jina_bert", position_rows=0, alibi=True, activation=GATES[stated], up_bias=False)


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder."""
    found = embedding_slots(spec)
    for index in range(spec.layers):
        slot, name = f"layers.{index}", f"encoder.layer.{index}"
        found |= {
            **attention_slots(slot, name, spec.hidden),
            **norm_slots(f"{slot}.attention_norm", spec.hidden, f"{name}.attention.output.LayerNorm"),
            f"{slot}.up": named((spec.up_rows, spec.hidden), f"{name}.mlp.gated_layers.weight"),
            f"{slot}.down": named((spec.hidden, spec.intermediate), f"{name}.mlp.wo.weight"),
            f"{slot}.down_bias": named((spec.hidden,), f"{name}.mlp.wo.bias"),
            **norm_slots(f"{slot}.mlp_norm", spec.hidden, f"{name}.mlp.layernorm"),
        }
    return found


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=bert.FAMILY.prefixes,
    ignored=bert.FAMILY.ignored,
    max_length=8192,
)
