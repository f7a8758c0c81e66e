"""jina-embeddings-v2-base-code: Jina's ALiBi BERT with LayerNorm on q and k, and one more after attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import jina_bert
from unpadded.checkpoint.families.bert import attention_slots, embedding_slots, named, norm_slots
from unpadded.checkpoint.spec import EncoderSpec, TensorSpec


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By the norm of q and k."""
    return jina_bert.normalizes_q_and_k(config, names)


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for what jina_bert refuses."""
    return replace(jina_bert.read_config(config), family="jina_code", qk_norm=True, inner_norm=True)


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder."""
    found = embedding_slots(spec)
    for index in range(spec.layers):
        slot, name = f"layers.{index}", f"encoder.layer.{index}"
        q_and_k = [f"{name}.attention.self.layer_norm_{part}" for part in "qk"]
        up = f"{name}.mlp.up_gated_layer.weight"
        found |= {
            **attention_slots(slot, name, spec.hidden),
            f"{slot}.qk_norm": named((2 * spec.hidden,), *(f"{norm}.weight" for norm in q_and_k)),
            f"{slot}.qk_norm_bias": named((2 * spec.hidden,), *(f"{norm}.bias" for norm in q_and_k)),
            **norm_slots(f"{slot}.inner_norm", spec.hidden, f"{name}.attention.output.LayerNorm"),
            **norm_slots(f"{slot}.attention_norm", spec.hidden, f"{name}.layer_norm_1"),
            f"{slot}.up": TensorSpec((spec.up_rows, spec.hidden), ((up,),), up_before_gate=(up,)),
            f"{slot}.down": named((spec.hidden, spec.intermediate), f"{name}.mlp.down_layer.weight"),
            f"{slot}.down_bias": named((spec.hidden,), f"{name}.mlp.down_layer.bias"),
            **norm_slots(f"{slot}.mlp_norm", spec.hidden, f"{name}.layer_norm_2"),
        }
    return found


FAMILY = replace(jina_bert.FAMILY, matches=matches, read_config=read_config, tensors=tensors)
