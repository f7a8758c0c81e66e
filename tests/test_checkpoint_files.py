"""Files and keys that sentence-transformers or transformers read from a folder: honored, rejected by name or harmless.

Tokenizer files have a table of their own, and so have the keys of config.json that a family reads (test_family_*).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
from support.checkpoints import add_sentence_transformers_files, change_json, write_bert, write_json

from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.errors import CheckpointError, ConfigError, WeightsError
from unpadded.integrations.sentence_transformers import Transformer

HONORED, HARMLESS = "honored", "harmless"
MODEL, MODULE = "config_sentence_transformers.json", "sentence_bert_config.json"

# (file, key or "" for the file as a whole, value) -> HONORED, HARMLESS, or the error that rejects it; with the reason
DECISIONS: list[tuple[str, str, Any, str | type[CheckpointError], str]] = [
    ("modules.json", "", None, HONORED, "without it: mean pooling, not normalized, no prompts"),
    ("1_Pooling/config.json", "pooling_mode", "cls", HONORED, ""),
    ("1_Pooling/config.json", "pooling_mode", "max", ConfigError, ""),
    ("1_Pooling/config.json", "include_prompt", False, ConfigError, ""),
    ("1_Pooling/config.json", "embedding_dimension", 7, HARMLESS, "only reported; the encoder states it"),
    ("2_Dense/config.json", "bias", False, HONORED, "the file's bias is then surplus when the weights are loaded"),
    ("2_Dense/config.json", "use_residual", True, ConfigError, ""),
    ("2_Dense/config.json", "module_input_name", "token_embeddings", ConfigError, ""),
    (MODEL, "prompts", {"query": "q: "}, HONORED, ""),
    (MODEL, "default_prompt_name", "query", HONORED, ""),
    (MODEL, "truncate_dim", 8, ConfigError, "pass dimensions=; the reference does not normalize after cutting"),
    (MODEL, "model_type", "SparseEncoder", ConfigError, "another kind of model"),
    (MODEL, "model_type", "CrossEncoder", ConfigError, "another kind of model"),
    (MODEL, "model_type", "SentenceTransformer", HONORED, ""),
    (MODEL, "similarity_fn_name", "euclidean", HARMLESS, "compares vectors, does not change them"),
    (MODEL, "requirements", {"torch": ">=99"}, HARMLESS, "for the versions of other packages"),
    (MODEL, "__version__", {"sentence_transformers": "99.0"}, HARMLESS, "the reference warns"),
    (MODULE, "max_seq_length", 17, HONORED, ""),
    (MODULE, "do_lower_case", True, HONORED, ""),
    (MODULE, "transformer_task", "fill-mask", ConfigError, ""),
    (MODULE, "model_kwargs", {"dtype": "bfloat16"}, HARMLESS, "dtype= decides, fp32 by default on a CPU"),
    (MODULE, "config_kwargs", {"num_hidden_layers": 1}, ConfigError, ""),
    (MODULE, "module_output_name", "sentence_embedding", ConfigError, ""),
    (MODULE, "modality_config", {"message": {"method": "forward", "format": "flat"}}, ConfigError, "chat templates"),
    ("config.json", "quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, ConfigError, ""),
    ("config.json", "dtype", "bfloat16", HARMLESS, "dtype= decides; the drop-ins honor it"),
    ("config.json", "architectures", ["BertForMaskedLM"], HARMLESS, "the head is not loaded"),
    ("config.json", "is_decoder", True, ConfigError, ""),
    ("adapter_config.json", "", {"peft_type": "LORA"}, ConfigError, "merged by peft first"),
    ("model.safetensors.index.json", "", {"weight_map": {"a": "absent"}}, HARMLESS, "model.safetensors comes first"),
    ("pytorch_model.bin", "", "pickle", HARMLESS, "safetensors come first, also in transformers"),
    ("generation_config.json", "", {"max_length": 5}, HARMLESS, "for decoders that generate"),
    ("chat_template.jinja", "", "{{ messages }}", HARMLESS, "for inputs that are messages"),
    ("preprocessor_config.json", "", {"image_size": 1}, HARMLESS, "for images and sound"),
    ("README.md", "", "---\nmodel-index: 1\n---", HARMLESS, "kept in the model card only"),
    ("modeling_bert.py", "", "raise SystemExit", HARMLESS, "code is never run; auto_map decides per family"),
    ("0_Router/router_config.json", "", {"types": {}}, HARMLESS, "read only if modules.json names a Router"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 32, "positions": 64}
    folder = write_bert(tmp_path_factory.mktemp("files") / "bert", **sizes)
    return add_sentence_transformers_files(folder, dense=(32, 16))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "bert")


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what decides about the vectors, without the folder's path."""
    names = ("spec", "pooling", "normalize", "prompts", "default_prompt", "lower_case", "max_length", "matryoshka")
    dense = [(one.shape, one.bias, one.activation) for one in checkpoint.dense]
    return {name: getattr(checkpoint, name) for name in names} | {"dense": dense}


@pytest.mark.parametrize(("file", "key", "value", "decision", "reason"), DECISIONS)
def test_decisions(
    file: str, key: str, value: Any, decision: str | type[CheckpointError], reason: str, original: Path, folder: Path
) -> None:
    before, path = settings(open_checkpoint(original)), folder / file
    if (file, key) == (MODEL, "default_prompt_name"):
        change_json(path, prompts={value: "q: "})
        before = settings(open_checkpoint(folder))
    if key:
        change_json(path, **{key: value})
    elif value is None:
        path.unlink()
    elif isinstance(value, str):
        path.write_text(value)
    else:
        write_json(path, value)
    if isinstance(decision, str):
        after = settings(open_checkpoint(folder))
        assert (after == before) is (decision == HARMLESS or value == "SentenceTransformer")
    else:
        with pytest.raises(decision, match=key or file):
            open_checkpoint(folder)


def test_an_adapter_is_rejected_and_left_to_the_original(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one without its base model's files in the folder."""
    loaded: list[str] = []
    monkeypatch.setattr(Transformer.__base__, "load", lambda name, **_: loaded.append(name))
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "owner/name"})
    for complete in (True, False):
        if not complete:
            (folder / "config.json").unlink()
        with pytest.raises(ConfigError, match=r"PEFT adapters .*adapter_config\.json; call PEFT's merge_and_unload"):
            open_checkpoint(folder)
    Transformer.load(str(folder), token=None, cache_folder=None, revision=None, local_files_only=True)
    assert loaded == [str(folder)] and "runs as sentence-transformers loads it" in caplog.text


def test_modules_of_other_kinds_are_rejected(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    for kind in ("Router", "Asym", "WeightedLayerPooling", "CLIPModel", "BoW", "StaticEmbedding", "LSTM"):
        write_json(folder / "modules.json", [modules[0], modules[1] | {"type": f"sentence_transformers.models.{kind}"}])
        with pytest.raises(ConfigError, match=rf"the module type in .* = '.*{kind}' is not implemented"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("absent", "loads"),
    [
        ("1_Pooling", False),
        ("1_Pooling/config.json", False),
        ("2_Dense", False),
        ("2_Dense/config.json", False),
        ("2_Dense/model.safetensors", False),
        ("3_Normalize", True),  # published checkpoints have no such folder
        ("config.json", False),
        ("model.safetensors", False),
        (MODULE, True),
        (MODEL, True),
    ],
)
def test_absent_files_are_an_error_as_in_sentence_transformers(absent: str, loads: bool, folder: Path) -> None:
    path = folder / absent
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if loads:
        sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        open_checkpoint(folder)
    else:
        with pytest.raises((TypeError, OSError, ValueError)):
            sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        with pytest.raises(CheckpointError, match=absent):
            open_checkpoint(folder)


def test_files_are_not_read_without_modules_json(folder: Path) -> None:
    """sentence-transformers then pools the mean and has neither prompts nor a max_seq_length from a file."""
    change_json(folder / "1_Pooling" / "config.json", pooling_mode="cls")
    change_json(folder / MODULE, max_seq_length=9)
    change_json(folder / MODEL, prompts={"query": "q: "}, default_prompt_name="query")
    (folder / "modules.json").unlink()
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    checkpoint = open_checkpoint(folder)
    assert (model[1].pooling_mode, len(model), model.default_prompt_name) == ("mean", 2, None)
    assert (checkpoint.pooling, checkpoint.normalize, checkpoint.default_prompt) == ("mean", False, None)
    assert checkpoint.max_length == model.max_seq_length == 64 and checkpoint.dense == ()


def test_an_index_names_shards_that_must_exist(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    with pytest.raises(WeightsError, match=r"model-00001-of-00001\.safetensors, absent"):
        open_checkpoint(folder)
