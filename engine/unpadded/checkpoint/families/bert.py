"""BERT with absolute positions: all-MiniLM, bge, e5, gte (v1), arctic-embed (v1); and families that resemble it.

XLM-RoBERTa and RoBERTa differ in positions: bge-m3, multilingual-e5, arctic-embed-l-v2. MPNet also has a bias
by distance in attention: all-mpnet-base-v2, multi-qa-mpnet, paraphrase-mpnet. DistilBERT has other names and no token
types: msmarco-distilbert, multi-qa-distilbert.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.family import TRANSFORMERS, Family, by_type_or_name, choice, cls_head, encoder_tensors, sizes
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
MPNET_LAYOUT = {
    **LAYOUT,
    "position_bias": "encoder.relative_attention_bias",
    "qkv": tuple(f"{LAYER}.attention.attn.{part}" for part in "qkv"),
    "out": f"{LAYER}.attention.attn.o",
    "attention_norm": f"{LAYER}.attention.LayerNorm",
}
DISTIL_LAYER = "transformer.layer.{layer}"
DISTIL_LAYOUT = {
    **TRANSFORMERS,
    "qkv": tuple(f"{DISTIL_LAYER}.attention.{part}_lin" for part in "qkv"),
    "out": f"{DISTIL_LAYER}.attention.out_lin",
    "attention_norm": f"{DISTIL_LAYER}.sa_layer_norm",
    "up": f"{DISTIL_LAYER}.ffn.lin1",
    "down": f"{DISTIL_LAYER}.ffn.lin2",
    "mlp_norm": f"{DISTIL_LAYER}.output_layer_norm",
}
DISTIL_SIZES = {"dim": "hidden_size", "hidden_dim": "intermediate_size"}
DISTIL_SIZES |= {"n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}


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


def read_mpnet_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, {"relative_attention_num_buckets": 32})
    # transformers' model has padding id 1, whatever the configuration states
    return replace(read_config(config), family="mpnet", token_types=0, padding_id=1, position_bias=True)


def read_distilbert_config(config: Mapping[str, Any]) -> EncoderSpec:
    renamed = {key: required(config, (old, key), int) for old, key in DISTIL_SIZES.items()}
    activation = choice(config, "activation", ACTIVATIONS, default="gelu")
    spec = read_config({**config, **renamed, "hidden_act": None, "layer_norm_eps": None})
    return replace(spec, family="distilbert", token_types=0, activation=activation)


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
    score=cls_head("pooler.dense", "classifier"),
    mlm=lambda spec, _: mlm_layers(spec, f"{TRANSFORM}.dense", f"{TRANSFORM}.LayerNorm", "cls.predictions.bias"),
)
ROBERTA_FAMILY = replace(
    FAMILY,
    matches=by_type_or_name("xlm-roberta", "roberta"),
    read_config=read_roberta_config,
    score=cls_head("classifier.dense", "classifier.out_proj"),
    mlm=lambda spec, _: mlm_layers(spec, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "gelu"),
)
MPNET_FAMILY = replace(
    ROBERTA_FAMILY,
    matches=by_type_or_name("mpnet", suffixes=("encoder.layer.0.attention.attn.q.weight",)),
    read_config=read_mpnet_config,
    tensors=lambda spec: encoder_tensors(spec, MPNET_LAYOUT),
)
DISTILBERT_FAMILY = Family(
    matches=by_type_or_name("distilbert", suffixes=("transformer.layer.0.attention.q_lin.weight",)),
    read_config=read_distilbert_config,
    tensors=lambda spec: encoder_tensors(spec, DISTIL_LAYOUT),
    score=cls_head("pre_classifier", "classifier", "relu"),
    mlm=lambda spec, _: mlm_layers(spec, "vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
)
