"""Read a tokenizer from a checkpoint's files, as transformers' AutoTokenizer does."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from unpadded.checkpoint.json_config import allow_only, not_implemented, open_file, read_object
from unpadded.errors import CheckpointError, ConfigError

VOCABULARY_BYTES = 2**28  # far above any published vocabulary


def read_tokenizer(folder: Path, *, lower_case: bool) -> Tokenizer | None:
    """Return the folder's tokenizer without truncation and padding, or None if it has no vocabulary.

    lower_case: lower texts before the tokenizer's own normalization, as sentence-transformers does if
    `do_lower_case` is set. ConfigError for settings that are not supported.
    """
    vocabularies = [path for pattern in ("tokenizer.json", "vocab.*", "*.model") for path in folder.glob(pattern)]
    if not vocabularies:
        return None
    for path in vocabularies:
        open_file(path, VOCABULARY_BYTES).close()  # reading another kind of file would block
    config, settings, *_ = (
        read_object(folder / name, optional=True)
        for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    try:
        backend = _from_transformers(folder, config, settings)
    except ConfigError:
        raise
    except Exception as error:  # of many types, as files can be broken in many ways
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {folder}: {type(error).__name__}: {error}; correct its files "
            "or download them again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    if lower_case and "Lowercase" not in part_names(backend.normalizer):
        existing = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *existing])
    return backend


def part_names(part: Normalizer | PreTokenizer | None) -> set[str]:
    """Return the types of which a normalizer or pre-tokenizer consists, as named in tokenizer.json."""
    return set(re.findall(r'"type":"(\w+)"', part.__getstate__().decode())) - {"Sequence"} if part else set()


def _from_transformers(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    own_code = settings.get("auto_map")
    if isinstance(own_code, dict):
        own_code = own_code.get("AutoTokenizer")
    allow_only({"auto_map": own_code}, {"auto_map": None}, folder)
    # A class such as AutoModel would ask on stdin whether to run the checkpoint's code.
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    found = tokenizer_class_from_name(name) if name else None
    if found is not None and PreTrainedTokenizerBase not in getattr(found, "__mro__", ()):
        raise not_implemented(f"tokenizer_class in {folder}", name, "a class of tokenizers")
    # AutoTokenizer uses nothing else of config.json, whose other keys may not be those of transformers.
    make_config: Any = PreTrainedConfig
    if config.get("model_type") in CONFIG_MAPPING:
        make_config = CONFIG_MAPPING[config["model_type"]]
    tokenizer = AutoTokenizer.from_pretrained(
        folder,
        config=make_config(tokenizer_class=config.get("tokenizer_class")),
        local_files_only=True,
        trust_remote_code=False,
    )
    backend: Tokenizer = tokenizer.backend_tokenizer
    used = {
        "dropout": getattr(backend.model, "dropout", None),
        "split_special_tokens": tokenizer.split_special_tokens,
        "truncation_side": tokenizer.truncation_side,
    }
    allow_only(used, {"dropout": None, "split_special_tokens": False, "truncation_side": "right"}, folder)
    return backend
