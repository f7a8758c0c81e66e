"""Checkpoints made to exhaust or to crash: every failure of `load` is a short CheckpointError, found in seconds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import add_sentence_transformers_files, write_bert, write_json
from test_families import BERT, LEGACY, MODERN
from test_family_eurobert import EUROBERT_210M
from test_family_gte import GTE_BASE
from test_family_jina_bert import JINA_BASE
from test_family_jina_v3 import JINA_V3
from test_family_modernbert import MODERNBERT_EMBED
from test_family_nomic_moe import V2_MOE
from test_family_xlm_roberta import BGE_M3

from unpadded.checkpoint.json_config import JSON_BYTES, read_json
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.errors import CheckpointError, ConfigError
from unpadded.model.weights import load_weights

CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "xlm_roberta": BGE_M3,
    "nomic legacy": LEGACY,
    "nomic": MODERN,
    "nomic moe": V2_MOE,
    "gte": GTE_BASE,
    "jina_bert": JINA_BASE,
    "jina_v3": JINA_V3,
    "modernbert": MODERNBERT_EMBED | {"layer_types": ["full_attention"] * 22, "local_attention": 128},
    "eurobert": EUROBERT_210M,
}
VALUES: list[Any] = [
    10**9,
    10**300,
    -(10**9),
    1e308,
    -1.5,
    0.5,
    True,
    "x" * 10**5,
    [],
    [[]],
    {},
    {"a": {}},
    [{"a": 1}] * 100,
    ["full_attention"] * 10**4,
    {"rope_theta": [], "rope_type": []},
    {"full_attention": [1]},
]


def short(error: CheckpointError) -> bool:
    return len(str(error)) <= 2000 and str(error).count("\n") < 24


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = write_bert(
        tmp_path / "bert", layers=1, hidden=32, heads=2, intermediate=32, vocabulary=64, tokenizer=False
    )
    return add_sentence_transformers_files(folder, dense=(32, 16))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_value_of_config_json(family: str, tmp_path: Path) -> None:
    """Each number, name and list of a published configuration, replaced by values that it must not have."""
    config = CONFIGS[family] | {"rope_parameters": None, "rope_scaling": None, "matryoshka_dimensions": None}
    config |= {"lora_rank": None, "lora_alpha": None, "pad_token_id": None, "auto_map": config.get("auto_map")}
    save_file({"unrelated": torch.ones(1)}, tmp_path / "model.safetensors")
    for key in config:
        for value in VALUES:
            (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
            start = time.process_time()
            try:
                load_weights(open_checkpoint(tmp_path), device=CPU, dtype=torch.float32)
            except CheckpointError as error:
                assert short(error), (key, value)
            else:
                raise AssertionError(f"{key} = {value!r:.80}: no error")
            assert time.process_time() - start < 5, (key, value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "not JSON: Out of range float"),
        (b'{"a": -Infinity}', "not JSON: Out of range float"),
        (b'{"a": 1e999}', "not JSON: Out of range float"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": "\\ud800"}', "not JSON: .*surrogates not allowed"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
        ('{"a": 1}'.encode("utf-16"), "not JSON: .*can't decode"),
        (b"[" * 10**6, "not JSON: "),
    ],
)
def test_json_is_read_strictly(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.json is {message}"):
        read_json(path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(JSON_BYTES + 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("replace", [fifo, endless, directory, loop, too_large])
@pytest.mark.parametrize("name", ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_files_that_are_none(replace: Callable[[Path], None], name: str, bert: Path) -> None:
    (bert / name).unlink()
    replace(bert / name)
    with pytest.raises(CheckpointError, match=name) as error:
        open_checkpoint(bert)
    assert short(error.value)


@pytest.mark.parametrize(
    "name", ["a" * 300, "/" + "b/" * 3000, "./" + "c" * 300, "~absent/x", "d\0e", "f/g" + "h" * 300]
)
def test_names_that_cannot_be_folders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(name)
    assert short(error.value)


# keys of the files of a checkpoint; every value of VALUES must be read, or rejected with a CheckpointError
KEYS = {
    "1_Pooling/config.json": ["pooling_mode", "include_prompt", "pooling_mode_cls_token"],
    "2_Dense/config.json": ["in_features", "out_features", "bias", "activation_function", "module_input_name"],
    "config_sentence_transformers.json": ["prompts", "default_prompt_name", "matryoshka_dimensions", "model_type"],
    "sentence_bert_config.json": ["max_seq_length", "do_lower_case", "config_args", "transformer_task"],
    "tokenizer_config.json": ["model_max_length"],
    "model.safetensors.index.json": ["weight_map"],
}


@pytest.mark.parametrize("file", KEYS)
def test_every_value_of_the_other_files(file: str, bert: Path) -> None:
    write_json(bert / "tokenizer_config.json", {})
    if file == "model.safetensors.index.json":
        (bert / "model.safetensors").unlink()
        write_json(bert / file, {})
    original = json.loads((bert / file).read_text())
    for key in KEYS[file]:
        for value in (None, *VALUES, {"a": 1}, {"a": "b"}, ["a"], [1.5]):
            for content in (value, original | {key: value}):
                (bert / file).write_text(json.dumps(content))
                try:
                    load_weights(open_checkpoint(bert), device=CPU, dtype=torch.float32)
                except CheckpointError as error:
                    assert short(error), (key, value)


@pytest.mark.parametrize("key", ["type", "path"])
def test_every_value_of_modules_json(key: str, bert: Path) -> None:
    modules = json.loads((bert / "modules.json").read_text())
    for index, module in enumerate(modules):
        for value in (None, *VALUES, "a" * 300, "b\0c", "d/" * 3000, "\u00e9"):
            changed = [*modules[:index], module | {key: value}, *modules[index + 1 :]]
            (bert / "modules.json").write_text(json.dumps(changed))
            try:
                open_checkpoint(bert)
            except CheckpointError as error:
                assert short(error), value
            else:
                assert key == "path" and index == len(modules) - 1, value  # Normalize has no files
