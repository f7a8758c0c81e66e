"""Read a tokenizer from a checkpoint's files: tokenizer.json, or else BERT's vocab.txt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Normalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, PreTokenizer
from tokenizers.processors import TemplateProcessing

from unpadded.errors import CheckpointError


def read_tokenizer(folder: Path, *, lower_case: bool) -> Tokenizer | None:
    """Return the folder's tokenizer without truncation and padding, or None if it has neither file.

    lower_case: lower texts before the tokenizer's own normalization, as sentence-transformers does if
    `do_lower_case` is set.
    """
    settings = _read_settings(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        backend = _from_json(folder / "tokenizer.json", settings)
    elif (folder / "vocab.txt").exists():
        backend = _from_vocabulary(folder / "vocab.txt", settings)
    else:
        return None
    if lower_case:
        existing = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *existing])
    return backend


def part_names(part: Normalizer | PreTokenizer | None) -> set[str]:
    """Return the types of which a normalizer or pre-tokenizer consists, as named in tokenizer.json."""
    return _names(_state(part)) if part else set()


def _names(state: dict[str, Any]) -> set[str]:
    members = state.get("normalizers", []) + state.get("pretokenizers", [])
    return set().union(*map(_names, members)) if members else {state["type"]}


def _state(part: Normalizer | PreTokenizer) -> dict[str, Any]:
    """Return a part as it is written in tokenizer.json, which is also its pickled form."""
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is not a JSON object: {type(settings).__name__}; download it again")
    return settings


def _from_json(path: Path, settings: dict[str, Any]) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no subclass
        raise CheckpointError(f"{path} is not a tokenizer: {error}; download it again") from error
    backend.no_truncation()
    backend.no_padding()
    normalizer = _state(backend.normalizer) if backend.normalizer else {}
    if normalizer.pop("type", None) == "BertNormalizer" and "Bert" in str(settings.get("tokenizer_class") or "Bert"):
        # the BertTokenizer of transformers builds its normalizer from these settings, not from tokenizer.json
        backend.normalizer = _bert_normalizer(normalizer, settings, path)
    return backend


def _from_vocabulary(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Build BERT's WordPiece from a vocabulary with one token per line."""
    try:
        with path.open(encoding="utf-8") as lines:
            vocabulary = {line.rstrip("\n"): index for index, line in enumerate(lines)}
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}; download it again") from error
    special: dict[str, str] = {}
    for role in ("unk", "sep", "pad", "cls", "mask"):
        token = settings.get(f"{role}_token") or f"[{role.upper()}]"
        special[role] = token["content"] if isinstance(token, dict) else token
    missing = [special[role] for role in ("unk", "cls", "sep") if special[role] not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{path} lacks special tokens: {', '.join(missing)} among {len(vocabulary)} lines; "
            "name those of the checkpoint in tokenizer_config.json"
        )
    backend = Tokenizer(WordPiece(vocabulary, unk_token=special["unk"]))
    backend.normalizer = _bert_normalizer({}, settings, path)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.add_special_tokens([token for token in special.values() if token in vocabulary])
    cls, sep = special["cls"], special["sep"]
    backend.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])]
    )
    return backend


def _bert_normalizer(defaults: dict[str, Any], settings: dict[str, Any], path: Path) -> BertNormalizer:
    arguments = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    stated = {argument: settings[key] for key, argument in arguments.items() if key in settings}
    try:
        return BertNormalizer(**defaults | stated)
    except TypeError as error:
        raise CheckpointError(
            f"the settings of BERT's normalizer for {path} are invalid: {stated}; "
            "use true or false in tokenizer_config.json"
        ) from error
