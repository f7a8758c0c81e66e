"""BERT with absolute positions: all-MiniLM, bge, e5, gte (v1), arctic-embed (v1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    hidden_and_heads,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec, weight_and_bias

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
DEFAULTS: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "feed_forward_type": "original",
    "is_decoder": False,
    "add_cross_attention": False,
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, which Jina's ALiBi models share, or without one by the names of BERT's layers."""
    model_type = config.get("model_type")
    if config.get("position_embedding_type") == "alibi":
        return False
    return model_type == "bert" or (
        model_type is None and any(name.endswith("encoder.layer.0.attention.self.query.weight") for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, DEFAULTS)
    if "AutoModel" in (config.get("auto_map") or {}):
        raise not_implemented("auto_map.AutoModel", config["auto_map"]["AutoModel"], "the BERT of transformers")
    hidden, heads = hidden_and_heads(config, rotary=False)
    return EncoderSpec(
        family="bert",
        layers=required(config, ("num_hidden_layers",), integer),
        hidden=hidden,
        heads=heads,
        intermediate=required(config, ("intermediate_size",), integer),
        vocabulary=required(config, ("vocab_size",), integer),
        token_types=consistent(config, ("type_vocab_size",), integer) or 2,
        position_rows=required(config, ("max_position_embeddings",), integer),
        rotary=None,
        activation=ACTIVATIONS[one_of({"hidden_act": "gelu", **config}, "hidden_act", ACTIVATIONS)],
        norm_eps=consistent(config, ("layer_norm_eps",), positive) or 1e-12,
        qkv_bias=True,
        out_bias=True,
        up_bias=True,
        down_bias=True,
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    hidden, intermediate = spec.hidden, spec.intermediate
    found = embedding_tensors(spec)
    for index in range(spec.layers):
        layer, stored = f"layers.{index}", f"encoder.layer.{index}"
        found |= {
            **attention_tensors(layer, stored, hidden),
            **norm_tensors(f"{layer}.attention_norm", hidden, f"{stored}.attention.output.LayerNorm"),
            **weight_and_bias(f"{layer}.up", (intermediate, hidden), f"{stored}.intermediate.dense"),
            **weight_and_bias(f"{layer}.down", (hidden, intermediate), f"{stored}.output.dense"),
            **norm_tensors(f"{layer}.mlp_norm", hidden, f"{stored}.output.LayerNorm"),
        }
    return found


def embedding_tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    tables = {"word": spec.vocabulary, "token_type": spec.token_types, "position": spec.position_rows}
    found = norm_tensors("norm", spec.hidden, "embeddings.LayerNorm")
    for name, rows in tables.items():
        if rows:
            found |= weight_and_bias(name, (rows, spec.hidden), f"embeddings.{name}_embeddings", bias=False)
    return found


def attention_tensors(layer: str, stored: str, hidden: int) -> dict[str, TensorSpec]:
    """Return the qkv and out linears of a layer; stored: the layer's name in the checkpoint."""
    qkv = tuple(f"{stored}.attention.self.{part}" for part in ("query", "key", "value"))
    return {
        **weight_and_bias(f"{layer}.qkv", (3 * hidden, hidden), qkv),
        **weight_and_bias(f"{layer}.out", (hidden, hidden), f"{stored}.attention.output.dense"),
    }


def norm_tensors(name: str, hidden: int, stored: str) -> dict[str, TensorSpec]:
    # checkpoints converted from TensorFlow, such as bert-base-uncased, keep its gamma and beta
    return {
        name: TensorSpec((hidden,), ((f"{stored}.weight",), (f"{stored}.gamma",))),
        f"{name}_bias": TensorSpec((hidden,), ((f"{stored}.bias",), (f"{stored}.beta",))),
    }


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "bert."),
    ignored=("cls.*", "pooler.*", "classifier.*", "embeddings.position_ids", "embeddings.token_type_ids"),
)
