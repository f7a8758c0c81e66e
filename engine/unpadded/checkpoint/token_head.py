"""The head of late-interaction models (ColBERT): one vector per token, and how queries and documents become tokens.

Read as sentence-transformers' MultiVectorEncoder reads its own folders, PyLate's and Stanford ColBERT's; bge-m3 has the
weights in a file of their own.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unpadded.checkpoint.json_config import (
    Config,
    allow_only,
    contradiction,
    not_implemented,
    optional,
    read_object,
    required,
    section,
)
from unpadded.checkpoint.modules import (
    COLBERT,
    MULTI_VECTOR,
    PYLATE_KEYS,
    TOKEN_KEYS,
    Dense,
    Modules,
    output_width,
    read_linear,
)
from unpadded.checkpoint.spec import EncoderSpec

UNATTENDED = 1 << 30  # added to the id of a token that is no key of attention; such tokens are the last ones of a text
BGE_LINEAR = "colbert_linear"  # name of bge-m3's file
KINDS = ("query", "document")


class Expansion(NamedTuple):
    """Tokens that are appended to queries, and whose vectors count."""

    length: int  # tokens of a query, at least
    attend: bool  # they are keys of attention
    tokens: tuple[str, ...]  # the first one that the tokenizer has is appended


class TokenPooling(NamedTuple):
    """Clusters of a text's vectors, of which the means are kept."""

    factor: float  # vectors per cluster, about
    protected: int = 1  # first vectors, which are kept
    normalize: bool = True


@dataclass(frozen=True, kw_only=True)
class TokenHead:
    """The layers that give a vector per token, and settings by kind of text."""

    dense: tuple[Dense, ...]
    dimensions: int
    normalize: bool
    max_lengths: Mapping[str, int]  # in tokens
    expansion: Expansion | None  # of queries
    markers: Mapping[str, str]  # texts before the prompts; one token each if the vocabulary has it
    skip_words: Mapping[str, tuple[str, ...]]  # tokens whose vectors are dropped
    skip_first: bool  # the vector of the first token is dropped
    pooling: Mapping[str, TokenPooling]


def read_token_head(
    modules: Modules, config: Config, spec: EncoderSpec, files: tuple[Path, ...], max_length: int, requested: int | None
) -> TokenHead | None:
    """Return the head of a late-interaction model or of bge-m3; None without one.

    files: the encoder's weights. max_length: tokens per text if no file states another number for its kind; requested:
    the number that a caller wants.
    """
    folder, dense, settings = modules.transformer, modules.token_dense, modules.model_config
    bge_file = folder / f"{BGE_LINEAR}.safetensors"
    if dense is None and "HF_ColBERT" in str(config.get("architectures")):
        dense = (read_linear(files, "linear"),)
        settings = _stanford_settings(folder / "artifact.metadata", dense[0].shape[0])
    elif dense is None and bge_file.exists():
        dense, settings = (read_linear((bge_file,)),), {}
    elif dense is None:
        return None
    after, model_type = modules.token_configs, settings.get("model_type")
    markers = {kind: optional(settings, f"{kind}_prefix", "") for kind in KINDS if f"{kind}_prefix" in settings}
    if model_type != MULTI_VECTOR:  # the other formats have no modules after the linear layers
        words = list(string.punctuation) if markers or model_type == COLBERT else []
        stated = settings.get("skiplist_words")
        after = {"MultiVectorMask": {"skiplist_words": words if stated is None else stated}, "Normalize": {}}
    mask, pooling = after.get("MultiVectorMask", {}), after.get("HierarchicalTokenPooling", {})
    allow_only(mask, {"keep_only_token_ids": None}, "MultiVectorMask")
    if not isinstance(words := mask.get("skiplist_words") or [], list):
        raise not_implemented("skiplist_words", words, "a list of tokens")
    clusters = TokenPooling(
        optional(pooling, "pool_factor", 1.0),
        optional(pooling, "num_protected_tokens", 1, minimum=0),
        optional(pooling, "normalize_embeddings", False),
    )
    lengths, expansion = _lengths(settings, modules, max_length)
    lengths |= {"document": requested} if requested else {}
    limit = requested or spec.position_limit
    if expansion and "MultiVectorMask" not in after:
        raise not_implemented("query_expansion", expansion, "null without the module MultiVectorMask")
    return TokenHead(
        dense=dense,
        dimensions=output_width(dense, spec.hidden),
        normalize="Normalize" in after,
        max_lengths={kind: min(length, limit or length) for kind, length in lengths.items()},
        expansion=expansion,
        markers=markers,
        skip_words=dict.fromkeys(_kinds(mask, "skiplist_tasks"), tuple(map(str, words))),
        skip_first=not settings,  # bge-m3
        pooling=dict.fromkeys(_kinds(pooling, "tasks"), clusters),
    )


def _kinds(config: Config, key: str) -> list[str]:
    """Return the kinds of text that a module applies to, by default documents."""
    stated = "document" if config.get(key) is None else config[key]
    return [kind for kind in KINDS if kind in str(stated)]


def _stanford_settings(path: Path, dimensions: int) -> dict[str, Any]:
    """Return the settings in artifact.metadata by PyLate's names."""
    metadata = read_object(path, optional=True)
    allow_only(metadata, {"dim": dimensions, "interaction": "colbert", "relu": False, "similarity": "cosine"}, path)
    return {
        "model_type": COLBERT,
        "query_prefix": optional(metadata, "query_token_id", "[unused0]") + " ",
        "document_prefix": optional(metadata, "doc_token_id", "[unused1]") + " ",
        "query_length": metadata.get("query_maxlen"),
        "document_length": metadata.get("doc_maxlen"),
        "attend_to_expansion_tokens": metadata.get("attend_to_mask_tokens"),
        "skiplist_words": None if metadata.get("mask_punctuation", True) else [],
    }


def _lengths(settings: Config, modules: Modules, max_length: int) -> tuple[dict[str, int], Expansion | None]:
    """Return the maximum number of tokens by kind, and the expansion of queries."""
    found = {key: settings.get(key) for key in TOKEN_KEYS}
    expands = not PYLATE_KEYS.isdisjoint(settings) and settings.get("do_query_expansion") is not False
    if expands and "query_expansion" not in settings:  # of PyLate and Stanford, whose default is 32 tokens
        attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
        length = found.pop("query_length") or 32
        found["query_expansion"] = {"strategy": "fixed", "attend": attend, "length": length}
    found |= {key: modules.transformer_config[key] for key in TOKEN_KEYS if key in modules.transformer_config}
    lengths = {kind: optional(found, f"{kind}_length", max_length) for kind in KINDS}
    if not (config := section(found, "query_expansion")):
        return lengths, None
    allow_only(config, dict.fromkeys(config.keys() - {"strategy", "attend", "token", "length"}), "query_expansion")
    length, strategy = required(config, ("length",), int, "query_expansion"), config.get("strategy")
    if strategy not in ("fixed", "min"):
        raise not_implemented("the strategy of query_expansion", strategy, "fixed, min")
    if optional(found, "query_length", length) < length:
        raise contradiction(found)
    lengths["query"] = length if strategy == "fixed" else max(lengths["query"], length)
    files = (modules.transformer / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    tokenizer = {key: value for file in files for key, value in read_object(file, optional=True).items()}
    allow_only(tokenizer, {"padding_side": "right"}, "tokenizer_config.json")
    mask = tokenizer.get("mask_token")
    masks = mask["content"] if isinstance(mask, dict) else mask, "[MASK]", "<mask>"
    tokens = (config["token"],) if config.get("token") else masks
    return lengths, Expansion(length, optional(config, "attend", False), tuple(map(str, tokens)))
