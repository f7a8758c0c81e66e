"""jina-embeddings-v2-base-code: Jina's ALiBi BERT with LayerNorm on q and k, and one more after attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import jina_bert
from unpadded.checkpoint.families.bert import attention_tensors, embedding_tensors, norm_tensors
from unpadded.checkpoint.spec import EncoderSpec, TensorSpec, weight_and_bias


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    return replace(jina_bert.read_config(config), family="jina_code", qk_norm=True, inner_norm=True)


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    hidden, intermediate = spec.hidden, spec.intermediate
    found = embedding_tensors(spec)
    for index in range(spec.layers):
        layer, stored = f"layers.{index}", f"encoder.layer.{index}"
        q_and_k = (f"{stored}.attention.self.layer_norm_q", f"{stored}.attention.self.layer_norm_k")
        up = f"{stored}.mlp.up_gated_layer.weight"
        found |= {
            **attention_tensors(layer, stored, hidden),
            **weight_and_bias(f"{layer}.qk_norm", (2 * hidden,), q_and_k),
            **norm_tensors(f"{layer}.inner_norm", hidden, f"{stored}.attention.output.LayerNorm"),
            **norm_tensors(f"{layer}.attention_norm", hidden, f"{stored}.layer_norm_1"),
            f"{layer}.up": TensorSpec((spec.up_rows, hidden), ((up,),), up_before_gate=(up,)),
            **weight_and_bias(f"{layer}.down", (hidden, intermediate), f"{stored}.mlp.down_layer"),
            **norm_tensors(f"{layer}.mlp_norm", hidden, f"{stored}.layer_norm_2"),
        }
    return found


FAMILY = replace(jina_bert.FAMILY, matches=jina_bert.normalizes_q_and_k, read_config=read_config, tensors=tensors)
