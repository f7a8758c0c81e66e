"""Settings of a tokenizer outside tokenizer.json: applied as in transformers, or rejected by name; no code is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import change_json, write_bert, write_json
from test_families import LEGACY
from test_family_gte import GTE_BASE
from test_family_jina_bert import JINA_BASE
from test_family_jina_v3 import JINA_V3
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

import unpadded
from unpadded.errors import CheckpointError, ConfigError, InputError
from unpadded.tokenization.tokenizer import Tokenizer

TEXTS = [
    *("hello who is <ent> here", "Héllo WHO", "cafe\u0301 日本 Qa", " two  spaces\tand\n", "", "x<ent>y <ENT>z"),
    *("a [MASK] b[SEP]c [mask]", "a <mask> b</s>c <s>", "antidisestablishment " + "y" * 120, "zzz 日 ÿ"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = [*LETTERS, *LETTERS.upper(), *"é日本<>/[]\u0301"]


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
    pieces += [(piece, -9.0) for piece in ("▁", "▁hello", "▁who", *CHARACTERS, "<mask>")]
    backend = Backend(models.Unigram(pieces, unk_id=3))
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
    "model": "config.json",
}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
NO_CLASS = {"tokenizer_class": ...}
NO_PARTS = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))  # a class makes its own
LEFT_TRUNCATION = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0}
PADDING |= {"pad_type_id": 0, "pad_token": "[PAD]"}
DROPOUT = {"model": json.loads(roberta().to_str())["model"] | {"dropout": 0.5}}


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


@pytest.mark.parametrize(
    ("name", "message", "files"),
    [
        (B, "auto_map in .* is not implemented", {"cfg": {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}}),
        (B, "auto_map in .* is not implemented", {"cfg": {"auto_map": ["own.Tokenizer", None]}}),
        (B, "split_special_tokens in .* = True is not implemented", {"cfg": {"split_special_tokens": True}}),
        (B, "split_special_tokens in .* = True is not implemented", {"map": {"split_special_tokens": True}}),
        (B, "truncation_side in .* = 'left' is not implemented", {"tok": {"truncation": LEFT_TRUNCATION}}),
        (B, "truncation_side in .* = 'left' is not implemented", {"cfg": {"truncation_side": "left"}}),
        (R, "dropout in .* = 0.5 is not implemented", {"tok": DROPOUT, "cfg": GENERIC}),
        (B, "tokenizer_class in .* = 'AutoModel' is not implemented", {"cfg": {"tokenizer_class": "AutoModel"}}),
        (
            B,
            "tokenizer_class in .* = 'RagTokenizer' is not implemented",
            {"cfg": NO_CLASS, "model": {"tokenizer_class": "RagTokenizer"}},
        ),
        (B, "transformers cannot read .*CanineTokenizer has no", {"cfg": {"tokenizer_class": "CanineTokenizer"}}),
        (B, "transformers cannot read", {"cfg": {"tokenizer_class": X}}),
        (B, "transformers cannot read .*TypeError", {"cfg": {"tokenizer_class": 5}}),
        (B, "transformers cannot read .*TypeError", {"cfg": {"do_lower_case": "yes"}}),
        (B, "transformers cannot read .*AttributeError", {"cfg": {"added_tokens_decoder": ["<ent>"]}}),
        (B, "transformers cannot read .*TypeError", {"model": {"model_type": []}}),
    ],
    ids=str,
)
def test_a_setting_is_rejected(tmp_path: Path, name: str, message: str, files: dict[str, Any]) -> None:
    write(tmp_path, name, files)
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {"cfg": {"auto_map": {"AutoConfig": "own.Config"}}},
        {"cfg": {"split_special_tokens": False}},
        {"tok": {"truncation": LEFT_TRUNCATION | {"direction": "Right"}, "padding": PADDING}},
        {"cfg": {"truncation_side": "right"}, "tok": {"truncation": LEFT_TRUNCATION}},
    ],
    ids=str,
)
def test_a_setting_without_effect(tmp_path: Path, files: dict[str, Any]) -> None:
    assert ids(write(tmp_path / "changed", B, files)) == ids(write(tmp_path / "unchanged", B, {}))


@pytest.mark.parametrize(
    ("name", "cfg", "model"),
    [
        (B, {}, {}),
        (B, NO_CLASS, {"model_type": "bert"}),
        (B, NO_CLASS, {"model_type": "nomic_bert"}),
        (B, NO_CLASS, {"model_type": "new", "tokenizer_class": B}),
        (B, NO_CLASS, {"model_type": "new"}),
        (B, {}, {"model_type": "xlm-roberta"}),
        (B, {}, {"model_type": "modernbert"}),
        (B, GENERIC, {"model_type": "bert"}),
        (X, NO_CLASS, {"model_type": "xlm-roberta"}),
        (X, NO_CLASS, {"model_type": "jina_embeddings_v3"}),
        (R, NO_CLASS, {"model_type": "roberta"}),
    ],
    ids=str,
)
def test_the_class_is_found_as_in_transformers(tmp_path: Path, name: str, cfg: Any, model: Any) -> None:
    """Without parts in tokenizer.json, each class gives other ids."""
    write(tmp_path, name, {"tok": NO_PARTS, "cfg": cfg, "model": model})
    assert ids(tmp_path) == reference(tmp_path)


CODE = {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
READ = """
import json, sys
from pathlib import Path
from unpadded.errors import ConfigError
from unpadded.tokenization.tokenizer import Tokenizer

connections = []
sys.addaudithook(lambda event, _: connections.append(event) if event in ("socket.connect", "socket.getaddrinfo") else 0)
found = []
for folder in sys.argv[2:]:
    try:
        rows = Tokenizer.from_folder(Path(folder)).encode(json.loads(sys.argv[1]), max_length=512)
        found.append([row.ids.tolist() for row in rows])
    except ConfigError as error:
        found.append(type(error).__name__)
print(json.dumps([found, connections]))
"""


def test_code_of_a_checkpoint_is_neither_run_nor_offered(tmp_path: Path) -> None:
    """The published configurations name code; tokenizer_class can name a class that asks on stdin whether to run it."""
    published = [(B, LEGACY, {}), (B, GTE_BASE, {}), (B, GTE_BASE, NO_CLASS), (B, JINA_BASE, {}), (X, JINA_V3, {})]
    classes = ["AutoTokenizer", "AutoTokenizerFast", "AutoConfig", "AutoModel"]
    hostile = [(B, {"model_type": "own"}, {"tokenizer_class": name}) for name in classes]
    folders = [tmp_path / str(index) for index in range(len(published + hostile))]
    for folder, (name, model, cfg) in zip(folders, published + hostile, strict=True):
        write(folder, name, {"model": model | CODE, "cfg": cfg})
        (folder / "own.py").write_text("print('the code ran')\nclass Config: pass\nclass Model: pass\n")
    command = [sys.executable, "-c", READ, json.dumps(TEXTS), *folders]
    ran = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, check=False)
    expected = [[encoding.ids for encoding in BASES[name]().encode_batch(TEXTS)] for name, *_ in published]
    assert ran.stderr == ""
    assert json.loads(ran.stdout) == [[*expected, *["ConfigError"] * len(hostile)], []]


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
    for call in (engine.encode, engine.token_embeddings):
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


def test_a_vocabulary_without_tokenizer_json(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": B, "do_lower_case": False})
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary := bert().get_vocab(), key=vocabulary.get)))
    backend = bert()
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert ids(tmp_path) == [encoding.ids for encoding in backend.encode_batch(TEXTS)]


def test_token_types_of_a_post_processor_raise(tmp_path: Path) -> None:
    template = processors.TemplateProcessing(single="[CLS] $A:1 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    write(tmp_path, B, {"cfg": GENERIC, "tok": {"post_processor": json.loads(template.__getstate__())}})
    with pytest.raises(ConfigError, match=r"token types .* = \[0, 1, 0\] is not implemented, only 0"):
        Tokenizer.from_folder(tmp_path)
