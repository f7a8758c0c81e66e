"""A LoRA adapter in PEFT's files next to the weights, or alone with base_model_name_or_path, is merged when loading.

The reference is the same checkpoint with W + scale * B @ A, in fp32, in its weight file. On 2026-11-29 PEFT 0.21.2 in
sentence-transformers 6.2 gave the same vectors within 4.1e-7 for BERT (all linear layers, use_rslora) and NomicBERT.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_family_gte
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    add_sentence_transformers_files,
    change_json,
    nomic_tensors,
    transformers_names,
    write_bert,
    write_checkpoint,
    write_json,
    write_nomic,
)
from test_family_gte import GTE_BASE
from torch import Tensor

import unpadded
from unpadded.errors import CheckpointError, ConfigError, WeightsError
from unpadded.integrations.sentence_transformers import SentenceTransformer
from unpadded.integrations.transformers import UnpaddedModel

RANK = 4
SIZES: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "intermediate": 256,
    "vocabulary": 64,
    "tokenizer": False,
}
IDS = [[2, 17, 33, 3], [2, 9, 3]]
BERT_MODULES = [f"encoder.layer.{i}.{name}" for i in (0, 1) for name in ("attention.self.value", "output.dense")]
NOMIC_MODULES = [
    "layers.0.self_attn.k_proj",
    "layers.1.self_attn.o_proj",
    "layers.1.mlp.gate_proj",
    "layers.0.mlp.up_proj",
]


def factors(tensors: dict[str, Tensor], modules: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random (A, B) by module."""
    random = torch.Generator().manual_seed(1)
    shapes = {module: tensors[f"{module}.weight"].shape for module in modules}
    return {
        module: (torch.randn(RANK, columns, generator=random), torch.randn(rows, RANK, generator=random) / 8)
        for module, (rows, columns) in shapes.items()
    }


def write_adapter(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], **config: object) -> None:
    stored = {f"base_model.model.{module}.lora_A.weight": a for module, (a, _) in pairs.items()}
    stored |= {f"base_model.model.{module}.lora_B.weight": b for module, (_, b) in pairs.items()}
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in pairs})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": targets, "bias": "none"}
    write_json(folder / "adapter_config.json", settings | config)


def merge(tensors: dict[str, Tensor], pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    return tensors | {f"{m}.weight": tensors[f"{m}.weight"] + scale * b @ a for m, (a, b) in pairs.items()}


def vectors(folder: Path) -> np.ndarray:
    return np.asarray(unpadded.load(folder, device="cpu").encode(IDS, prompt=""))


def assert_close(actual: np.ndarray, expected: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(base - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return add_sentence_transformers_files(write_bert(tmp_path / "bert", **SIZES))


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / RANK), (True, 6 / RANK**0.5)])
def test_an_adapter_next_to_the_weights(use_rslora: bool, scale: float, bert: Path) -> None:
    base, tensors = vectors(bert), load_file(bert / "model.safetensors")
    pairs = factors(tensors, [*BERT_MODULES, "pooler.dense"])  # the pooler does not change the vectors
    save_file(merge(tensors, pairs, scale), bert / "model.safetensors")
    expected = vectors(bert)
    save_file(tensors, bert / "model.safetensors")
    write_adapter(bert, pairs, use_rslora=use_rslora)
    assert_close(vectors(bert), expected, base)
    engine = unpadded.load(bert, device="cpu", dtype="bfloat16")
    assert engine.describe()["adapter"] == f"LoRA of rank 4, scale {scale:g}"
    assert np.abs(np.asarray(engine.encode(IDS)) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("names", ["transformers", "legacy"])
def test_fused_and_renamed_weights(names: str, tmp_path: Path) -> None:
    """The adapter has the names of transformers; legacy checkpoints store qkv in one tensor."""
    folder = write_nomic(tmp_path / "nomic", names=names, **SIZES)
    tensors = transformers_names(nomic_tensors(2, 64, 256, 64, gated=True, biases=False))
    pairs = factors(tensors, NOMIC_MODULES)
    reference = write_nomic(tmp_path / "reference", names="transformers", **SIZES)
    save_file(merge(tensors, pairs, 1.5), reference / "model.safetensors")
    base = vectors(folder)
    write_adapter(folder, pairs)
    assert_close(vectors(folder), vectors(reference), base)


def test_a_weight_that_is_stored_up_before_gate(tmp_path: Path) -> None:
    tensors = test_family_gte.published_names(test_family_gte.model_of().state_dict())
    folder = write_checkpoint(tmp_path / "gte", GTE_BASE | test_family_gte.SIZES | {"type_vocab_size": 1}, tensors)
    base, stored = vectors(folder), load_file(folder / "model.safetensors")
    prefix = next(name for name in stored if name.endswith("0.mlp.up_gate_proj.weight")).partition("encoder.")[0]
    module = "encoder.layer.0.mlp.up_gate_proj"
    pairs = factors({f"{module}.weight": stored[f"{prefix}{module}.weight"]}, [module])
    a, b = pairs[module]
    changed = stored[f"{prefix}{module}.weight"] + 1.5 * b @ a
    save_file(stored | {f"{prefix}{module}.weight": changed}, folder / "model.safetensors")
    expected = vectors(folder)
    save_file(stored, folder / "model.safetensors")
    write_adapter(folder, pairs)
    assert_close(vectors(folder), expected, base)


def test_an_adapter_with_the_name_of_its_base_model(bert: Path, tmp_path: Path) -> None:
    base = vectors(bert)
    pairs = factors(load_file(bert / "model.safetensors"), BERT_MODULES)
    alone = tmp_path / "alone"
    write_adapter(alone, pairs, base_model_name_or_path=str(bert))
    for name in ("modules.json", "sentence_bert_config.json"):
        shutil.copy(bert / name, alone / name)
    shutil.copytree(bert / "1_Pooling", alone / "1_Pooling")
    write_adapter(bert, pairs)
    expected = vectors(bert)
    assert_close(vectors(alone), expected, base)
    UnpaddedModel.from_pretrained(alone).save_pretrained(alone / "copy")
    for name in ("modules.json", "1_Pooling"):
        (alone / "copy" / name).symlink_to(alone / name)
    assert np.array_equal(vectors(alone / "copy"), vectors(alone))
    change_json(alone / "adapter_config.json", base_model_name_or_path=str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"there is no folder .*absent"):
        unpadded.load(alone, device="cpu")


def test_the_drop_in_applies_it(tmp_path: Path) -> None:
    folder = add_sentence_transformers_files(write_bert(tmp_path, layers=1, hidden=32, heads=2, intermediate=32))
    write_adapter(folder, factors(load_file(folder / "model.safetensors"), BERT_MODULES[:1]))
    texts = ["hello world", "another text"]
    expected = np.asarray(unpadded.load(folder, device="cpu").encode(texts))
    assert np.allclose(SentenceTransformer(str(folder), device="cpu").encode(texts), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"rank_pattern": {"value": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"value": 2}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_other_features_of_peft_are_rejected_by_name(changes: dict[str, object], message: str, bert: Path) -> None:
    write_adapter(bert, factors(load_file(bert / "model.safetensors"), BERT_MODULES), **changes)
    with pytest.raises(ConfigError, match=rf"{message} in .*adapter_config\.json = .* is not implemented"):
        unpadded.load(bert, device="cpu")


def test_tensors_that_do_not_fit_are_listed(bert: Path) -> None:
    pairs = factors(load_file(bert / "model.safetensors"), BERT_MODULES)
    write_adapter(bert, pairs)
    file = bert / "adapter_model.safetensors"
    stored = load_file(file)
    del stored["base_model.model.encoder.layer.0.attention.self.value.lora_B.weight"]
    stored["base_model.model.encoder.layer.1.output.dense.lora_A.weight"] = torch.ones(8, 256)
    for name in ("encoder.layer.9.output.dense.lora_A.weight", "embeddings.word_embeddings.lora_embedding_A"):
        stored[f"base_model.model.{name}"] = torch.ones(4, 4)
    save_file(stored, file)
    with pytest.raises(WeightsError) as error:
        unpadded.load(bert, device="cpu")
    for problem in (
        "missing: encoder.layer.0.attention.self.value.lora_B.weight (64, 4)",
        "mis-shaped: base_model.model.encoder.layer.1.output.dense.lora_A.weight (8, 256) instead of (4, 256)",
        "surplus: base_model.model.encoder.layer.9.output.dense.lora_A.weight",
        "surplus: base_model.model.embeddings.word_embeddings.lora_embedding_A",
        str(file),
    ):
        assert problem in str(error.value)
    write_adapter(bert, {module: (a, 1e30 * b) for module, (a, b) in pairs.items()}, lora_alpha=1e10)
    with pytest.raises(WeightsError, match=r"layers\.\d\.\w+ with .* does not fit torch.float32"):
        unpadded.load(bert, device="cpu")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors is absent, and pickled adapters are never"):
        unpadded.load(bert, device="cpu")


def test_the_folder_of_the_whole_model_needs_its_weights(bert: Path) -> None:
    write_adapter(bert, factors(load_file(bert / "model.safetensors"), BERT_MODULES))
    (bert / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"contains neither model\.safetensors nor"):  # as in transformers
        unpadded.load(bert, device="cpu")
    assert json.loads((bert / "adapter_config.json").read_text())["r"] == RANK
