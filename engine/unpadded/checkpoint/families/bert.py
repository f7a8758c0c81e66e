"""BERT with absolute positions: all-MiniLM, bge, e5, gte (v1), arctic-embed (v1).

XLM-RoBERTa and RoBERTa, a family of their own, differ in positions: bge-m3, multilingual-e5, arctic-embed-l-v2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.family import TRANSFORMERS, Family, by_type_or_name, choice, encoder_tensors, sizes, tanh_head
from unpadded.checkpoint.json_config import allow_only, not_implemented, optional, required
from unpadded.checkpoint.modules import Dense
from unpadded.checkpoint.spec import Activation, EncoderSpec

TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_python": "gelu", **dict.fromkeys(TANH, "gelu_tanh")}
LAYER = "encoder.layer.{layer}"
LAYOUT = {
    **TRANSFORMERS,
    "qkv": tuple(f"{LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    "out": f"{LAYER}.attention.output.dense",
    "attention_norm": f"{LAYER}.attention.output.LayerNorm",
    "up": f"{LAYER}.intermediate.dense",
    "down": f"{LAYER}.output.dense",
    "mlp_norm": f"{LAYER}.output.LayerNorm",
}


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, {"position_embedding_type": "absolute", "feed_forward_type": "original"})
    if "'AutoModel'" in str(config.get("auto_map")):
        raise not_implemented("auto_map", config["auto_map"], "the BERT of transformers")
    return EncoderSpec(
        family="bert",
        **sizes(config, rotary=False),
        token_types=optional(config, "type_vocab_size", 2),
        position_rows=required(config, ("max_position_embeddings",), int),
        activation=choice(config, "hidden_act", ACTIVATIONS, default="gelu"),
        norm_eps=optional(config, "layer_norm_eps", 1e-12),
    )


def read_roberta_config(config: Mapping[str, Any]) -> EncoderSpec:
    padding_id = optional(config, "pad_token_id", 1, minimum=0)
    return replace(read_config(config), family="xlm_roberta", padding_id=padding_id)


def mlm_layers(spec: EncoderSpec, dense: str, norm: str, bias: str, activation: str | None = None) -> tuple[Dense, ...]:
    """Return the layers of a `Family.mlm` by their stored names; activation: None for the encoder's."""
    transform = Dense(name=dense, shape=(spec.hidden, spec.hidden), activation=activation or spec.activation)
    layer_norm = Dense(name=norm, shape=(spec.hidden,), eps=spec.norm_eps)
    return transform, layer_norm, Dense(name=bias, shape=(spec.vocabulary,), bias=False)


TRANSFORM = "cls.predictions.transform"
FAMILY = Family(
    matches=by_type_or_name("bert", suffixes=("encoder.layer.0.attention.self.query.weight",)),
    read_config=read_config,
    tensors=lambda spec: encoder_tensors(spec, LAYOUT),
    score=tanh_head("pooler.dense", "classifier"),
    mlm=lambda spec, _: mlm_layers(spec, f"{TRANSFORM}.dense", f"{TRANSFORM}.LayerNorm", "cls.predictions.bias"),
)
ROBERTA_FAMILY = replace(
    FAMILY,
    matches=by_type_or_name("xlm-roberta", "roberta"),
    read_config=read_roberta_config,
    score=tanh_head("classifier.dense", "classifier.out_proj"),
    mlm=lambda spec, _: mlm_layers(spec, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "gelu"),
)
