"""The head for sparse weights: of each text, a weight for every entry of the vocabulary, few of them above zero."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unpadded.checkpoint.family import Family, remove_prefixes
from unpadded.checkpoint.json_config import allow_only, consistent, optional, read_object, section
from unpadded.checkpoint.modules import Dense, Modules
from unpadded.checkpoint.spec import EncoderSpec

# Tokens to which bge-m3 and GTE give no weight, and their names in XLM-RoBERTa's tokenizer, which both have.
EXCLUDED = {"cls_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPARSE_LINEAR = "sparse_linear"  # name of bge-m3's file


@dataclass(frozen=True, kw_only=True)
class SparseHead:
    """Layers on every token: before a product with the word embeddings, or to one weight, that of the token's entry."""

    dense: tuple[Dense, ...]  # the last one is the bias of that product, if log1p is not 0
    log1p: int = 0  # how often it is applied to an entry's maximum logit
    top_k: int | None = None  # maximum number of entries per text
    excluded: tuple[str, ...] = ()  # tokens without a weight


def read_sparse_head(
    modules: Modules,
    config: Mapping[str, Any],
    family: Family,
    spec: EncoderSpec,
    weight_files: tuple[Path, ...],
    names: Collection[str],
) -> SparseHead | None:
    """Return the sparse head of a model; None without one. names: of the tensors in its weight files."""
    architectures, labels = str(config.get("architectures")), section(config, "id2label")
    if modules.splade or (modules.classifies is None and "ForMaskedLM" in architectures):
        layers = family.mlm(spec, config) if family.mlm else ()
        dense = tuple(replace(layer, weight_files=weight_files) for layer in layers)
        if not dense or f"{dense[0].name}.weight" not in map(remove_prefixes, names):
            return None
        allow_only(config, {"tie_word_embeddings": True})
        top_k = consistent(modules.model_config, ("max_active_dims",), int)
        return SparseHead(dense=dense, log1p=modules.splade or 1, top_k=top_k)
    file = modules.transformer / f"{SPARSE_LINEAR}.safetensors"
    linear = Dense(name="", shape=(1, spec.hidden), activation="relu", weight_files=(file,))
    if "ForTokenClassification" in architectures and (len(labels) or optional(config, "num_labels", 2)) == 1:
        linear = replace(linear, name="classifier", weight_files=weight_files)
    elif not file.exists():
        return None
    files = (modules.transformer / name for name in ("special_tokens_map.json", "tokenizer_config.json"))
    first, second = (read_object(file, optional=True) for file in files)
    tokens = ((EXCLUDED | first | second)[role] for role in EXCLUDED)
    contents = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return SparseHead(dense=(linear,), excluded=tuple(str(token) for token in contents if token))
