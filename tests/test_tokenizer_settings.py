"""Settings of a tokenizer outside tokenizer.json: the ids of transformers' AutoTokenizer, or an error by name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import change_json, write_bert, write_json
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

import unpadded
from unpadded.errors import CheckpointError, ConfigError, InputError
from unpadded.tokenization import tokenizer_files
from unpadded.tokenization.tokenizer import Tokenizer

TEXTS = [
    *("hello who is <ent> here", "Héllo WHO", "cafe\u0301 日本 Qa", " two  spaces\tand\n", "", "x<ent>y <ENT>z"),
    *("a [MASK] b[SEP]c [mask]", "a <mask> b</s>c <s>", "antidisestablishment " + "y" * 120, "zzz 日 ÿ"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = [*LETTERS, *LETTERS.upper(), *"é日本<>/[]\u0301"]


def charsmap() -> bytes:
    """Return a SentencePiece normalization that maps a tab to a space and Q to kw: a double-array trie and strings."""
    offset, leaf = 16, 1 << 8
    units = [0] * 256
    units[0] = offset << 10
    for byte, node, value in ((0x09, 24, 0), (0x51, 66, 2)):
        units[offset ^ byte] = byte | leaf | (offset ^ byte ^ node) << 10
        units[node] = 1 << 31 | value
    trie = struct.pack("<256I", *units)
    return struct.pack("<I", len(trie)) + trie + b" \0kw\0"


def bert() -> Backend:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "hello", "who", *CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    backend = Backend(models.WordPiece(dict(zip(words, range(len(words)), strict=True)), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(special)
    return backend


def xlm_roberta() -> Backend:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(token, 0.0) for token in special]
    pieces += [(piece, -9.0) for piece in ("▁", "▁hello", "▁who", "kw", *CHARACTERS, "<mask>")]
    backend = Backend(models.Unigram(pieces, unk_id=3))
    backend.normalizer = normalizers.Precompiled(charsmap())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    backend.add_special_tokens([*special, AddedToken("<mask>", lstrip=True)])
    return backend


def roberta() -> Backend:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll"]
    vocabulary = dict(zip(words, range(len(words)), strict=True))
    model = models.BPE(vocabulary, [("h", "e"), ("l", "l")], continuing_subword_prefix="", end_of_word_suffix="")
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.add_special_tokens([*special[:4], AddedToken("<mask>", lstrip=True)])
    return backend


BASES = {"BertTokenizer": bert, "XLMRobertaTokenizer": xlm_roberta, "RobertaTokenizer": roberta}
B, X, R = BASES
FILES = {
    "tok": "tokenizer.json",
    "cfg": "tokenizer_config.json",
    "map": "special_tokens_map.json",
    "added": "added_tokens.json",
    "model": "config.json",
}
STORED_TOKENS = {name: json.loads(make().to_str())["added_tokens"] for name, make in BASES.items()}


def decoder(name: str, *more: dict[str, Any], **flags: bool) -> dict[str, Any]:
    """Return added_tokens_decoder as transformers writes it; flags change the first token."""
    first, *rest = STORED_TOKENS[name]
    tokens = [first | flags, *rest, *more]
    return {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}


def ent(name: str, **flags: bool) -> dict[str, Any]:
    token = {"id": BASES[name]().get_vocab_size(), "content": "<ent>", "special": True, "normalized": False}
    return token | {"lstrip": False, "rstrip": False, "single_word": False} | flags


def with_state(name: str, **changes: Any) -> dict[str, Any]:
    """Return changes of tokenizer.json; those of "model" are inside it."""
    state = json.loads(BASES[name]().to_str())
    return {key: state[key] | value if key == "model" else value for key, value in changes.items()}


# How the tokenizer must be read: without transformers, with it, or not at all (the pattern of a ConfigError).
OWN, LIBRARY = "own code", "transformers"
LEFT_TRUNCATION = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
LEFT_PADDING = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0}
LEFT_PADDING |= {"pad_type_id": 0, "pad_token": "[PAD]"}
NULL = ("normalizer", "pre_tokenizer", "post_processor")
WITH_ENT = {"added_tokens": [*STORED_TOKENS[B], ent(B)]}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}

# tokenizer_class, how it is read, whether ids differ from those without the changes, changes by file
Case = tuple[str, str, bool, dict[str, Any]]
CASES: list[Case] = [
    (B, OWN, False, {}),
    # BERT's normalizer
    (B, OWN, True, {"cfg": {"do_lower_case": False}}),
    (B, OWN, True, {"cfg": {"strip_accents": False}}),
    (B, OWN, True, {"cfg": {"do_lower_case": False, "strip_accents": True}}),
    (B, OWN, True, {"cfg": {"tokenize_chinese_chars": False}}),
    (B, "transformers cannot read .*TypeError", False, {"cfg": {"do_lower_case": "yes"}}),
    # parts of tokenizer.json that the class replaces: absent or different
    *((B, OWN, False, {"tok": {part: None}}) for part in NULL),
    (B, OWN, False, {"tok": {"normalizer": {"type": "Lowercase"}}}),
    (B, OWN, True, {"tok": {"normalizer": {"type": "Lowercase"}}, "cfg": {"do_lower_case": False}}),
    (B, OWN, False, {"tok": {"pre_tokenizer": {"type": "WhitespaceSplit"}}}),
    (B, LIBRARY, False, {"tok": with_state(B, model={"max_input_chars_per_word": 8})}),
    # classes
    (B, OWN, False, {"cfg": {"tokenizer_class": "BertTokenizerFast"}}),
    (B, OWN, False, {"cfg": {"tokenizer_class": ...}, "model": {"model_type": "bert"}}),
    (B, OWN, False, {"cfg": {"tokenizer_class": ...}, "model": {"model_type": "nomic_bert"}}),
    (B, OWN, False, {"cfg": {"tokenizer_class": ...}, "model": {"model_type": "new", "tokenizer_class": B}}),
    (B, OWN, False, {"model": {"model_type": "xlm-roberta"}}),
    (B, OWN, True, {"cfg": GENERIC, "tok": dict.fromkeys(NULL)}),
    (B, OWN, True, {"cfg": GENERIC, "tok": dict.fromkeys(NULL), "model": {"model_type": "bert"}}),
    (B, OWN, True, {"model": {"model_type": "modernbert"}, "tok": {"normalizer": None}}),
    (B, LIBRARY, True, {"cfg": {"tokenizer_class": ...}, "tok": {"normalizer": None}, "model": {"model_type": "new"}}),
    (B, LIBRARY, False, {"cfg": {"tokenizer_class": "ElectraTokenizer"}}),
    (B, LIBRARY, True, {"cfg": {"tokenizer_class": "ElectraTokenizer", "do_lower_case": False}}),
    (B, LIBRARY, True, {"cfg": {"tokenizer_class": "NoSuchTokenizer"}, "tok": {"normalizer": None}}),
    (B, "CanineTokenizer has no attribute backend", False, {"cfg": {"tokenizer_class": "CanineTokenizer"}}),
    (B, "transformers cannot read", False, {"cfg": {"tokenizer_class": "XLMRobertaTokenizer"}}),
    (B, "auto_map in .* is not implemented", False, {"cfg": {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}}),
    (B, "auto_map in .* is not implemented", False, {"cfg": {"auto_map": ["own.Tokenizer", None]}}),
    (B, OWN, False, {"cfg": {"auto_map": {"AutoConfig": "own.Config"}}}),
    # special tokens of the class
    (B, OWN, True, {"cfg": {"cls_token": "[MASK]"}}),
    (B, OWN, True, {"cfg": {"sep_token": {"__type": "AddedToken", "content": "[MASK]", "lstrip": True}}}),
    (B, OWN, True, {"map": {"cls_token": "[MASK]"}, "cfg": {"cls_token": "[SEP]"}}),
    (B, OWN, True, {"map": {"cls_token": {"content": "[MASK]", "lstrip": False}}}),
    (B, OWN, False, {"map": {"cls_token": "[MASK]"}, "cfg": {"added_tokens_decoder": decoder(B)}}),
    (B, OWN, False, {"cfg": {"pad_token": "[UNK]"}}),
    (B, LIBRARY, True, {"cfg": {"unk_token": "[PAD]"}}),
    (B, LIBRARY, True, {"cfg": {"mask_token": "<ent>"}}),
    (B, LIBRARY, True, {"cfg": {"cls_token": "hello"}}),
    (B, LIBRARY, False, {"tok": {"added_tokens": STORED_TOKENS[B][:4]}}),
    # added tokens
    (B, OWN, True, {"tok": WITH_ENT}),
    *((B, LIBRARY, True, {"cfg": {key: ["<ent>"]}}) for key in tokenizer_files.TOKEN_LISTS[:2]),
    *((B, OWN, True, {"cfg": {key: ["<ent>"]}, "tok": WITH_ENT}) for key in tokenizer_files.TOKEN_LISTS[:2]),
    (B, LIBRARY, True, {"cfg": {"extra_special_tokens": {"entity_token": "<ent>"}}}),
    (B, OWN, False, {"cfg": {"extra_special_tokens": {}, "additional_special_tokens": None}}),
    (B, LIBRARY, True, {"cfg": {"model_specific_special_tokens": {"entity_token": "<ent>"}}}),
    (B, LIBRARY, True, {"cfg": {"image_token": "<ent>"}}),
    (B, LIBRARY, True, {"map": {"additional_special_tokens": ["<ent>"]}}),
    (B, "transformers cannot read .*TypeError", False, {"map": {"additional_special_tokens": [{"content": "<ent>"}]}}),
    (B, LIBRARY, True, {"map": {"extra_special_tokens": ["<ent>"]}, "cfg": {"extra_special_tokens": []}}),
    (B, LIBRARY, True, {"added": {"<ent>": BASES[B]().get_vocab_size()}}),
    (B, LIBRARY, True, {"added": {"<ent>": 5}, "tok": WITH_ENT}),
    (B, OWN, True, {"added": {"<ent>": ent(B)["id"]}, "tok": WITH_ENT}),
    (B, OWN, False, {"cfg": {"added_tokens_decoder": decoder(B)}}),
    (B, OWN, False, {"cfg": {"added_tokens_decoder": decoder(B)}, "added": {"<ent>": 999}}),
    (B, OWN, True, {"cfg": {"added_tokens_decoder": decoder(B, ent(B))}, "tok": WITH_ENT}),
    (B, LIBRARY, True, {"cfg": {"added_tokens_decoder": decoder(B, ent(B))}}),
    (B, LIBRARY, False, {"cfg": {"added_tokens_decoder": decoder(B)}, "tok": WITH_ENT}),
    (B, LIBRARY, True, {"cfg": {"added_tokens_decoder": decoder(B, ent(B, normalized=True))}, "tok": WITH_ENT}),
    (B, LIBRARY, False, {"cfg": {"added_tokens_decoder": decoder(B, lstrip=True)}}),
    (B, LIBRARY, True, {"cfg": {"added_tokens_decoder": decoder(B, ent(B)), **GENERIC}}),
    (B, "transformers cannot read .*AttributeError", False, {"cfg": {"added_tokens_decoder": ["<ent>"]}}),
    (B, "split_special_tokens in .* = True is not implemented", False, {"cfg": {"split_special_tokens": True}}),
    (B, OWN, False, {"cfg": {"split_special_tokens": False}}),
    # truncation and padding
    (B, OWN, False, {"tok": {"truncation": LEFT_TRUNCATION | {"direction": "Right"}, "padding": LEFT_PADDING}}),
    (B, "truncation_side in .* = 'left' is not implemented", False, {"tok": {"truncation": LEFT_TRUNCATION}}),
    (B, "truncation_side in .* = 'left' is not implemented", False, {"cfg": {"truncation_side": "left"}}),
    (B, OWN, False, {"cfg": {"truncation_side": "right"}, "tok": {"truncation": LEFT_TRUNCATION}}),
    # XLM-RoBERTa
    (X, OWN, False, {}),
    (X, OWN, False, {"cfg": {"tokenizer_class": ...}, "model": {"model_type": "xlm-roberta"}}),
    (X, LIBRARY, False, {"cfg": {"tokenizer_class": ...}, "model": {"model_type": "new"}}),
    (X, OWN, True, {"cfg": {"add_prefix_space": False}}),
    (X, OWN, True, {"tok": {"normalizer": None}}),
    *((X, OWN, False, {"tok": {part: None}}) for part in NULL[1:]),
    (X, OWN, False, {"tok": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}}}),
    (X, OWN, True, {"cfg": {"bos_token": "<mask>"}}),
    (X, OWN, False, {"cfg": {"cls_token": "<mask>"}}),
    (X, LIBRARY, False, {"tok": with_state(X, model={"unk_id": 5})}),
    (X, LIBRARY, False, {"tok": with_state(X, model={"byte_fallback": True})}),
    (X, LIBRARY, True, {"cfg": {"additional_special_tokens": ["<ent>"]}}),
    (X, OWN, True, {"cfg": GENERIC, "tok": {"post_processor": None}}),
    # RoBERTa
    (R, OWN, False, {}),
    (R, LIBRARY, False, {"cfg": {"tokenizer_class": ...}, "model": {"model_type": "roberta"}}),
    (R, OWN, True, {"cfg": {"add_prefix_space": True}}),
    *((R, OWN, False, {"tok": {part: None}}) for part in NULL[1:]),
    (R, OWN, False, {"tok": {"normalizer": {"type": "Lowercase"}}}),
    (R, OWN, True, {"cfg": {"cls_token": "<mask>"}}),
    (R, OWN, False, {"cfg": {"bos_token": "<mask>"}}),
    (R, "dropout in .* = 0.5 is not", False, {"tok": with_state(R, model={"dropout": 0.5}), "cfg": GENERIC}),
    # other classes
    (R, LIBRARY, True, {"cfg": {"tokenizer_class": "Qwen2Tokenizer"}}),
    (R, LIBRARY, True, {"cfg": {"tokenizer_class": "GemmaTokenizer"}}),
    (R, LIBRARY, False, {"cfg": {"tokenizer_class": "LlamaTokenizer"}}),
]
# keys of tokenizer_config.json, with values that change no id
WITHOUT_EFFECT = {
    "add_bos_token": True,
    "add_eos_token": True,
    "backend": "tokenizers",
    "chat_template": "{{ messages }}",
    "clean_up_tokenization_spaces": True,
    "do_basic_tokenize": False,
    "errors": "strict",
    "is_local": False,
    "legacy": True,
    "local_files_only": False,
    "max_len": 4,
    "max_length": 4,
    "model_input_names": ["input_ids"],
    "model_max_length": 4,
    "name_or_path": "owner/model",
    "never_split": ["hello"],
    "pad_to_multiple_of": 8,
    "pad_token_type_id": 1,
    "padding_side": "left",
    "processor_class": "BertProcessor",
    "sp_model_kwargs": {"enable_sampling": True},
    "special_tokens_map_file": "/none",
    "stride": 2,
    "tokenizer_file": "/none",
    "trim_offsets": False,
    "truncation_strategy": "only_first",
    "verbose": True,
}


def write(folder: Path, name: str, files: dict[str, Any]) -> Path:
    """Write a tokenizer of a class, with changes by file; a value of `...` removes a key."""
    state = json.loads(BASES[name]().to_str())
    content = {"tok": state, "cfg": {"tokenizer_class": name}} | {key: {} for key in files if key not in ("tok", "cfg")}
    for key, value in content.items():
        write_json(folder / FILES[key], value)
        change_json(folder / FILES[key], **files.get(key, {}))
    return folder


def ids(folder: Path) -> list[list[int]]:
    return [row.ids.tolist() for row in Tokenizer.from_folder(folder).encode(TEXTS, max_length=512)]


def reference(folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return found


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each use of transformers adds its reason."""
    reasons: list[str] = []
    real = tokenizer_files._from_transformers
    monkeypatch.setattr(
        tokenizer_files, "_from_transformers", lambda folder, why: (reasons.append(why), real(folder, why))[1]
    )
    return reasons


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {json.dumps(case[3], default=str):.90}")
def test_a_setting_is_applied_as_in_transformers(tmp_path: Path, case: Case, route: list[str]) -> None:
    name, how, differs, files = case
    write(tmp_path, name, files)
    if how not in (OWN, LIBRARY):
        with pytest.raises(CheckpointError, match=how):
            Tokenizer.from_folder(tmp_path)
        return
    found = ids(tmp_path)
    assert found == reference(tmp_path)
    assert [OWN, LIBRARY][len(route)] == how, route
    assert (found != ids(write(tmp_path / "unchanged", name, {}))) == differs


def test_every_known_key_has_a_case() -> None:
    tested = {key for case in CASES for key in case[3].get("cfg", {})}
    assert WITHOUT_EFFECT.keys() | (tested & tokenizer_files.KNOWN_KEYS) == tokenizer_files.KNOWN_KEYS


@pytest.mark.parametrize("name", BASES)
def test_a_key_without_effect_does_not_need_transformers(tmp_path: Path, name: str, route: list[str]) -> None:
    expected = ids(write(tmp_path, name, {}))
    for key, value in WITHOUT_EFFECT.items():
        write(tmp_path, name, {"cfg": {key: value}})
        assert ids(tmp_path) == reference(tmp_path) == expected, key
    assert route == []


def test_a_token_without_word_embedding_raises(tmp_path: Path) -> None:
    """On the host, before a batch is launched: CUDA would read out of bounds."""
    write_bert(tmp_path, layers=1, hidden=32, heads=2, intermediate=64, vocabulary=30522)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<image>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    engine = unpadded.load(tmp_path, device="cpu")
    texts = ["fine", [101, 30521, 102], "see <image> here"]
    assert np.isfinite(engine.encode(texts[:2])).all()
    message = r"text 2 contains the token '<image>', whose id 30522 is beyond the model's 30522 word embeddings; remove"
    for call in (engine.encode, engine.token_embeddings, lambda texts: engine.encode(texts, long_text="mean")):
        with pytest.raises(InputError, match=message):
            call(texts)
    with pytest.raises(InputError, match="text 1 has a token id out of range: 30522"):
        engine.encode(["fine", [101, 30522, 102]])


@pytest.mark.parametrize(
    "normalizer", [None, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}]
)
def test_lower_case_is_applied_as_in_sentence_transformers(tmp_path: Path, normalizer: dict[str, Any] | None) -> None:
    folder = write(tmp_path, R, {"cfg": GENERIC, "tok": {"normalizer": normalizer}})
    lowered = Tokenizer.from_folder(folder, lower_case=True)
    expected = reference(folder, [text.lower() for text in TEXTS])
    assert [row.ids.tolist() for row in lowered.encode(TEXTS, max_length=512)] == expected
    assert str(lowered.backend.normalizer).count("Lowercase") == 1


@pytest.mark.parametrize("added", [None, {"<ent>": 999}])
def test_a_vocabulary_without_tokenizer_json(tmp_path: Path, added: dict[str, int] | None) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": B, "do_lower_case": False})
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary := bert().get_vocab(), key=vocabulary.get)))
    if added:
        write_json(tmp_path / "added_tokens.json", added)
    assert ids(tmp_path) == reference(tmp_path)


def test_token_types_of_a_post_processor_raise(tmp_path: Path) -> None:
    template = processors.TemplateProcessing(single="[CLS] $A:1 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    write(tmp_path, B, {"cfg": GENERIC, "tok": {"post_processor": json.loads(template.__getstate__())}})
    with pytest.raises(ConfigError, match=r"token types .* = \[0, 1, 0\] is not implemented, only 0"):
        Tokenizer.from_folder(tmp_path)


def test_the_published_minilm_is_read_without_transformers(minilm: Path, tmp_path: Path) -> None:
    """And without a setting that needs it, an absent transformers is not noticed."""
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "from pathlib import Path; from unpadded.tokenization.tokenizer import Tokenizer\n"
    code += "for folder in sys.argv[1:]: print(Tokenizer.from_folder(Path(folder)).encode(['Hé'], max_length=8)[0].ids)"
    write(tmp_path, B, {"cfg": {"image_token": "<ent>"}})
    ran = subprocess.run([sys.executable, "-c", code, minilm, tmp_path], capture_output=True, text=True, check=False)
    assert ran.stdout == "[ 101 2002  102]\n"
    assert f"cannot read the tokenizer of {tmp_path} (tokenizer.json lacks the token <ent>): ModuleNot" in ran.stderr
