"""Read a tokenizer from a checkpoint's files, with the token ids of transformers' AutoTokenizer.

tokenizer.json is not all of a tokenizer: a class such as BertTokenizer replaces its normalizer, pre-tokenizer and
post-processor by those of the class, and other files add tokens. The classes of most published checkpoints are rebuilt
here. Whatever else changes token ids is read by transformers, whose import takes 1.4 s (2026-11).
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from unpadded.checkpoint.json_config import allow_only, open_file, read_object
from unpadded.errors import CheckpointError, install_command

BERT, MPNET, ROBERTA, XLM_ROBERTA = "BertTokenizer", "MPNetTokenizer", "RobertaTokenizer", "XLMRobertaTokenizer"
UNCHANGED = ("PreTrainedTokenizer", "TokenizersBackend")  # classes that use tokenizer.json as it is
# by model_type
DEFAULT_CLASSES = {"bert": BERT, "distilbert": BERT, "mpnet": MPNET, "nomic_bert": BERT, "xlm-roberta": XLM_ROBERTA}
BERT_TOKENS = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "pad", "mask", "cls", "sep")}
ROBERTA_TOKENS = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
ROBERTA_TOKENS |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
TOKENS = {BERT: BERT_TOKENS, ROBERTA: ROBERTA_TOKENS, XLM_ROBERTA: ROBERTA_TOKENS}
TOKENS |= {MPNET: ROBERTA_TOKENS | {"unk_token": "[UNK]"}}
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
VOCABULARY_BYTES = 2**28  # far above any published vocabulary
# Keys of tokenizer_config.json, other than tokens, that this package applies or that change no token id.
_KEYS = """
    add_bos_token add_eos_token add_prefix_space added_tokens_decoder auto_map backend chat_template
    clean_up_tokenization_spaces do_basic_tokenize do_lower_case errors is_local legacy local_files_only max_len
    max_length model_input_names model_max_length name_or_path never_split pad_to_multiple_of pad_token_type_id
    padding_side processor_class sp_model_kwargs special_tokens_map_file split_special_tokens stride strip_accents
    tokenize_chinese_chars tokenizer_class tokenizer_file trim_offsets truncation_side truncation_strategy verbose
"""
KNOWN_KEYS = frozenset(_KEYS.split())


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
    config, settings, token_map, added = (
        read_object(folder / name, optional=True)
        for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if "added_tokens_decoder" in settings:  # then transformers does not read these files
        token_map, added = {}, {}
    merged = settings | token_map
    if isinstance(merged.get("auto_map"), dict):
        merged["auto_map"] = merged["auto_map"].get("AutoTokenizer")
    path, backend = folder / "tokenizer.json", None
    reason: str | None = "it has no tokenizer.json"
    if path.exists():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no subclass
            raise CheckpointError(f"{path} is not a tokenizer: {error}; download it again") from error
        merged.setdefault("truncation_side", (backend.truncation or {}).get("direction"))
        merged.setdefault("dropout", getattr(backend.model, "dropout", None))
    supported = {"auto_map": None, "dropout": None, "split_special_tokens": False, "truncation_side": "right"}
    allow_only(merged, supported, folder)
    if backend is not None:
        try:
            reason = _unknown_setting(backend, settings, token_map, added) or _apply_class(backend, config, merged)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a value of a wrong type
            reason = f"{type(error).__name__}: {error}"
    if backend is None or reason is not None:
        backend = _from_transformers(folder, str(reason))
    backend.no_truncation()
    backend.no_padding()
    if lower_case and "Lowercase" not in part_names(backend.normalizer):
        existing = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *existing])
    return backend


def part_names(part: Normalizer | PreTokenizer | None) -> set[str]:
    """Return the types of which a normalizer or pre-tokenizer consists, as named in tokenizer.json."""
    return set(re.findall(r'"type":"(\w+)"', part.__getstate__().decode())) - {"Sequence"} if part else set()


def _from_transformers(folder: Path, reason: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return cast(Tokenizer, tokenizer.backend_tokenizer)
    except Exception as error:  # of many types: packages may be absent, and files broken in many ways
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {folder} ({reason}): {type(error).__name__}: {error}; "
            f"{install_command('transformers')}, or correct the tokenizer's files"
        ) from error


def _unknown_setting(
    backend: Tokenizer, settings: Mapping[str, Any], token_map: Mapping[str, Any], added: Mapping[str, int]
) -> str | None:
    """Return which setting is unknown, or which token tokenizer.json lacks or has with other flags; None if none."""
    mentioned = set(added)
    for key, value in (*settings.items(), *token_map.items()):
        if key in TOKEN_LISTS:
            mentioned |= {*map(_content, value.values() if isinstance(value, dict) else value or ())}
        elif key.endswith("_token") and key not in KNOWN_KEYS:
            mentioned |= {_content(value)} - {None}
        elif key not in KNOWN_KEYS:
            return f"it has the setting {key}"
    tokens = {index: repr(token) for index, token in backend.get_added_tokens_decoder().items()}
    ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    if absent := mentioned - ids.keys():
        return f"tokenizer.json lacks the token {min(absent)}"
    stated = settings.get("added_tokens_decoder")
    if stated is not None and {int(index): repr(AddedToken(**token)) for index, token in stated.items()} != tokens:
        return "added_tokens_decoder differs from tokenizer.json"
    return None if added.items() <= ids.items() else "added_tokens.json differs from tokenizer.json"


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _apply_class(backend: Tokenizer, config: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Replace the parts that the tokenizer's class builds; return why that takes transformers, or None."""
    default = DEFAULT_CLASSES.get(str(config.get("model_type")))
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or default).removesuffix("Fast")
    name = BERT if name == "DistilBertTokenizer" else name
    if name in UNCHANGED or config.get("model_type") == "modernbert":  # some of whose files name wrong classes
        return None
    if name not in TOKENS:
        return f"its class is {name}"
    ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    tokens = {role: _content(settings.get(role, token)) for role, token in TOKENS[name].items()}
    if absent := set(tokens.values()) - ids.keys():
        return f"tokenizer.json lacks the token {min(absent)} of {name}"
    special = {role: (token, ids[token]) for role, token in tokens.items()}
    cls, sep = special["cls_token"], special["sep_token"]
    if name in (BERT, MPNET):
        model = f'WordPiece\\(unk_token="{re.escape(tokens["unk_token"])}", continuing_subword_prefix="##", '
        model += "max_input_chars_per_word=100, .*"
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),
            lowercase=settings.get("do_lower_case", True),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        text = f"{cls[0]}:0 $A:0 {sep[0]}:0"
        bert = TemplateProcessing(text, f"{text} $B:1 {sep[0]}:1", [cls, sep])
        backend.post_processor = bert if name == BERT else RobertaProcessing(sep, cls, add_prefix_space=False)
    elif name == ROBERTA:
        model = r'BPE\(dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", '
        model += "fuse_unk=False, byte_fallback=False, ignore_merges=False, .*"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
        backend.post_processor = RobertaProcessing(sep, cls)
    else:
        model = r"Unigram\(unk_id=3, .*, byte_fallback=False\)"
        state = backend.normalizer.__getstate__() if backend.normalizer else b""  # as in tokenizer.json
        charsmap = re.search(rb'"precompiled_charsmap":"([^"]+)"', state)
        backend.normalizer = normalizers.Precompiled(base64.b64decode(charsmap[1])) if charsmap else None
        scheme = "always" if settings.get("add_prefix_space", True) else "never"
        spaces = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
        bos, eos = special["bos_token"], special["eos_token"]
        text = f"{bos[0]} $A {eos[0]}"
        backend.post_processor = TemplateProcessing(text, f"{text} {eos[0]} $B:0 {eos[0]}:0", [bos, eos])
    return None if re.fullmatch(model, repr(backend.model), re.DOTALL) else f"{name} builds another model"
