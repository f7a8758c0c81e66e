"""Families of checkpoints, each a value in a module. No other code depends on a family's name."""

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.families import bert, eurobert, gte, jina_bert, jina_v3, modernbert, nomic_bert
from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import not_implemented
from unpadded.errors import ConfigError

# modernbert before nomic_bert, whose tensor names it shares; Jina's families before those whose model_type they share
FAMILIES: dict[str, Family] = {
    "eurobert": eurobert.FAMILY,
    "modernbert": modernbert.FAMILY,
    "nomic_bert": nomic_bert.FAMILY,
    "gte": gte.FAMILY,
    "jina_bert": jina_bert.FAMILY,
    "jina_v3": jina_v3.FAMILY,
    "distilbert": bert.DISTILBERT_FAMILY,
    "mpnet": bert.MPNET_FAMILY,
    "xlm_roberta": bert.ROBERTA_FAMILY,
    "bert": bert.FAMILY,
}


def find_family(config: Mapping[str, Any], names: Collection[str]) -> Family:
    """Return the family of a model, from config.json and the stored tensors' names; ConfigError if none fits."""
    model_type = config.get("model_type")
    if model_type == "jina_embeddings_v3":
        raise ConfigError(f"model_type = {model_type!r} is not supported; use jinaai/jina-embeddings-v3")
    norm = "attention.self.layer_norm_q.weight"
    if "jina-bert-v2-qk-post-norm" in str(config.get("auto_map")) or any(name.endswith(norm) for name in names):
        raise ConfigError(
            "jina-bert-v2-qk-post-norm, of jina-embeddings-v2-base-code, is not supported; use another model for code, "
            "such as nomic-ai/CodeRankEmbed"
        )
    for family in FAMILIES.values():
        if family.matches(config, names):
            return family
    raise not_implemented("model_type", model_type, ", ".join(FAMILIES))
