"""XLM-RoBERTa and RoBERTa, BERT with other positions: bge-m3 (dense), multilingual-e5, arctic-embed-l-v2.0."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.family import Family, by_type_or_name, score_layers
from unpadded.checkpoint.json_config import optional
from unpadded.checkpoint.spec import EncoderSpec


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    padding_id = optional(config, "pad_token_id", 1, minimum=0)
    return replace(bert.read_config(config), family="xlm_roberta", padding_id=padding_id)


FAMILY = Family(
    matches=by_type_or_name("xlm-roberta", "roberta"),
    read_config=read_config,
    tensors=bert.FAMILY.tensors,
    score=score_layers("classifier.dense", "classifier.out_proj"),
)
