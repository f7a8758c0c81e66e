"""Families of checkpoints, each a value in a module. No other code depends on a family's name."""

from unpadded.checkpoint.families import bert, eurobert, gte, jina_bert, jina_v3, modernbert, nomic_bert
from unpadded.checkpoint.family import Family

# modernbert before nomic_bert, whose tensor names it shares; Jina's families before those whose model_type they share
FAMILIES: dict[str, Family] = {
    "eurobert": eurobert.FAMILY,
    "modernbert": modernbert.FAMILY,
    "nomic_bert": nomic_bert.FAMILY,
    "gte": gte.FAMILY,
    "jina_code": jina_bert.CODE_FAMILY,
    "jina_bert": jina_bert.FAMILY,
    "jina_v3": jina_v3.FAMILY,
    "distilbert": bert.DISTILBERT_FAMILY,
    "mpnet": bert.MPNET_FAMILY,
    "xlm_roberta": bert.ROBERTA_FAMILY,
    "bert": bert.FAMILY,
}
