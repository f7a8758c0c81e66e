"""Checks that an engine computes what loaded modules of sentence-transformers would compute, in their current state."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TokenizersBackend

from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.checkpoint.spec import EncoderSpec
from unpadded.errors import ConfigError, UnpaddedError

logger = logging.getLogger("unpadded")

# Keywords of the hub, which sentence-transformers adds to model_kwargs and others; the folder is already downloaded.
HUB_KEYWORDS = {"token", "trust_remote_code", "revision", "local_files_only", "cache_dir"}
# Attributes of a Transformer module that change the token ids.
PREPROCESSING = ("processing_kwargs", "query_length", "document_length", "query_expansion")
# Attributes of the model part of a tokenizer, which a caller may change.
TOKENIZER_MODEL = ("unk_token", "max_input_chars_per_word", "continuing_subword_prefix", "dropout", "byte_fallback")
METHODS = ("forward", "preprocess", "tokenize")


def open_supported(model: str, **options: Any) -> Checkpoint | None:
    """Return the checkpoint, or None if it is not supported (the reason is logged). options: those of `find_folder`."""
    folder = find_folder(model, **options)
    try:
        return open_checkpoint(folder)
    except ConfigError as error:
        log_unsupported(model, error)
        return None


def find_folder(model: str, **options: Any) -> Path:
    """Return the folder of a model, which is downloaded if it is a hub id. options: as sentence-transformers takes."""
    if Path(model).is_dir():
        return Path(model)
    keywords = {"cache_dir": options["cache_folder"], "token": options["token"]}
    return fetch(model, options["revision"], local_files_only=options["local_files_only"], **keywords)


def log_unsupported(model: str, error: UnpaddedError) -> None:
    logger.warning("%s runs as sentence-transformers loads it, without speedup: %s", model, error)


def without_hub_keywords(keywords: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (keywords or {}).items() if name not in HUB_KEYWORDS}


def is_modified(model: nn.Module) -> bool:
    """Return whether a module has hooks, or methods that were set on the object."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or not vars(module).keys().isdisjoint(METHODS)
        for module in model.modules()
    )


def tokenizer_state(tokenizer: Any) -> tuple[object, ...]:
    """Return what makes the tokenizer's token ids of a text; a caller may change it."""
    backend = tokenizer.backend_tokenizer
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    return (
        tokenizer.name_or_path,
        len(tokenizer),
        [getattr(backend.model, name, None) for name in TOKENIZER_MODEL],
        [step and step.__getstate__() for step in steps],
        [(index, repr(token)) for index, token in backend.get_added_tokens_decoder().items()],
    )


def tokenizes_as_engine(
    transformer: Any, spec: EncoderSpec, *, padded: bool = False, preprocessing: bool = False
) -> bool:
    """Return whether a Transformer module, as it is, makes the inputs that the engine makes of its tokenizer.

    padded: the order of padding and tokens matters to the caller. preprocessing: so do the settings in PREPROCESSING.
    """
    length, tokenizer = transformer.max_seq_length, transformer.tokenizer
    column_positions = spec.position_rows > 0 and spec.padding_id is None  # they count padding on the left
    return (
        isinstance(length, int)
        and not (spec.position_limit and length > spec.position_limit)
        and (preprocessing or not any(getattr(transformer, name) for name in PREPROCESSING))
        and "message" not in transformer.modality_config
        and isinstance(tokenizer, TokenizersBackend)
        and not tokenizer.split_special_tokens
        and tokenizer.truncation_side == "right"
        and (tokenizer.padding_side == "right" or not (padded or column_positions))
        and "attention_mask" in tokenizer.model_input_names
    )
