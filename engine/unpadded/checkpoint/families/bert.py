"""BERT with absolute positions: all-MiniLM, bge, e5, gte (v1), arctic-embed (v1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
)
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec
from unpadded.errors import ConfigError

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
OFFERED: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "feed_forward_type": "original",
    "is_decoder": False,
    "add_cross_attention": False,
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By model_type, or without one by the names of BERT's layers. Jina's ALiBi models bear BERT's model_type too."""
    model_type = config.get("model_type")
    if config.get("position_embedding_type") == "alibi":
        return False
    return model_type == "bert" or (
        model_type is None and any(name.endswith("encoder.layer.0.attention.self.query.weight") for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for what is not BERT in spite of its model_type (Jina's ALiBi models), or not implemented."""
    require_defaults(config, OFFERED)
    if "AutoModel" in (config.get("auto_map") or {}):
        raise not_implemented("auto_map.AutoModel", config["auto_map"]["AutoModel"], "the BERT of transformers")
    hidden, heads = required(config, ("hidden_size",), integer), required(config, ("num_attention_heads",), integer)
    if hidden % heads:
        raise ConfigError(f"hidden_size = {hidden} does not make num_attention_heads = {heads}; correct config.json")
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
    """Return the shape and stored names of each tensor of the encoder."""
    hidden, intermediate = spec.hidden, spec.intermediate
    found = embedding_slots(spec)
    for index in range(spec.layers):
        slot, name = f"layers.{index}", f"encoder.layer.{index}"
        found |= {
            **attention_slots(slot, name, hidden),
            **norm_slots(f"{slot}.attention_norm", hidden, f"{name}.attention.output.LayerNorm"),
            f"{slot}.up": named((intermediate, hidden), f"{name}.intermediate.dense.weight"),
            f"{slot}.up_bias": named((intermediate,), f"{name}.intermediate.dense.bias"),
            f"{slot}.down": named((hidden, intermediate), f"{name}.output.dense.weight"),
            f"{slot}.down_bias": named((hidden,), f"{name}.output.dense.bias"),
            **norm_slots(f"{slot}.mlp_norm", hidden, f"{name}.output.LayerNorm"),
        }
    return found


def embedding_slots(spec: EncoderSpec) -> dict[str, TensorSpec]:
    tables = {"word": spec.vocabulary, "token_type": spec.token_types, "position": spec.position_rows}
    names = {"word": "word_embeddings", "token_type": "token_type_embeddings", "position": "position_embeddings"}
    found = {
        slot: named((rows, spec.hidden), f"embeddings.{names[slot]}.weight") for slot, rows in tables.items() if rows
    }
    return found | norm_slots("norm", spec.hidden, "embeddings.LayerNorm")


def attention_slots(slot: str, name: str, hidden: int) -> dict[str, TensorSpec]:
    """qkv and the projection that follows, of the layer that the checkpoint calls `name`."""
    qkv = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
    return {
        f"{slot}.qkv": named((3 * hidden, hidden), *(f"{part}.weight" for part in qkv)),
        f"{slot}.qkv_bias": named((3 * hidden,), *(f"{part}.bias" for part in qkv)),
        f"{slot}.out": named((hidden, hidden), f"{name}.attention.output.dense.weight"),
        f"{slot}.out_bias": named((hidden,), f"{name}.attention.output.dense.bias"),
    }


def norm_slots(slot: str, hidden: int, name: str) -> dict[str, TensorSpec]:
    # checkpoints converted from TensorFlow, bert-base-uncased among them, keep its gamma and beta
    return {
        slot: TensorSpec((hidden,), ((f"{name}.weight",), (f"{name}.gamma",))),
        f"{slot}_bias": TensorSpec((hidden,), ((f"{name}.bias",), (f"{name}.beta",))),
    }


def named(shape: tuple[int, ...], *names: str) -> TensorSpec:
    return TensorSpec(shape, (names,))


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "bert."),
    ignored=("cls.*", "pooler.*", "classifier.*", "embeddings.position_ids", "embeddings.token_type_ids"),
)
