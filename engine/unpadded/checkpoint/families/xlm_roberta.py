"""XLM-RoBERTa and RoBERTa, BERT with other positions: bge-m3 (dense), multilingual-e5, arctic-embed-l-v2.0."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import integer
from unpadded.checkpoint.spec import EncoderSpec

MODEL_TYPES = ("xlm-roberta", "roberta")
PADDING_ID = 1


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, which jina-embeddings-v3 shares: the tensors have BERT's names."""
    return config.get("model_type") in MODEL_TYPES and config.get("position_embedding_type") != "rotary"


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    padding_id = PADDING_ID if config.get("pad_token_id") is None else integer(config, "pad_token_id", minimum=0)
    return replace(bert.read_config(config), family="xlm_roberta", padding_id=padding_id)


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=bert.tensors,
    prefixes=(*PREFIXES, "roberta."),
    ignored=(*bert.FAMILY.ignored, "lm_head.*"),
)
