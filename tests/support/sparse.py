"""Seeded models with a head for sparse weights, in the published formats, and texts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SparseEncoder
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GteConfig,
    GteForTokenClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from support.checkpoints import change_json
from support.rerankers import BERT_IDS, SIZES, WORDS, write_reranker

END = {"__type": "AddedToken", "content": "[SEP]", "lstrip": False, "normalized": False, "rstrip": False}
TOKENS = {"cls_token": "[CLS]", "eos_token": {**END, "single_word": False, "special": True}}
TOKENS |= {"pad_token": "[PAD]", "unk_token": "[UNK]"}
OLD = "sentence_transformers.sparse_encoder.models."


def draw_texts(count: int) -> list[str]:
    """Return texts of 0 to 60 words, some of which exceed the models' 48 tokens."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.choice([0, 1, 2, 5, 20, 45, 60]))) for _ in range(count)]


def write_models(root: Path) -> dict[str, Path]:
    """Write masked language models, some as sentence-transformers saves them, and models with weights of tokens."""
    torch.manual_seed(0)
    bert, roberta = {**SIZES, "vocab_size": 30522}, {**SIZES, "vocab_size": 30522, "pad_token_id": 1}
    modern = {**SIZES, **BERT_IDS, "max_position_embeddings": 64}
    models = {
        "bert": BertForMaskedLM(BertConfig(**bert, max_position_embeddings=64)),
        "bert, tanh": BertForMaskedLM(BertConfig(**bert, max_position_embeddings=64, hidden_act="gelu_new")),
        "xlm_roberta": XLMRobertaForMaskedLM(XLMRobertaConfig(**roberta, max_position_embeddings=66)),
        "modernbert": ModernBertForMaskedLM(ModernBertConfig(**modern)),
        "bge-m3": XLMRobertaModel(XLMRobertaConfig(**roberta, max_position_embeddings=66)),
        "gte": GteForTokenClassification(GteConfig(**bert, num_labels=1)),
    }
    found = {name: write_reranker(root / name, name, model) for name, model in models.items()}
    for name in ("bge-m3", "gte"):
        change_json(found[name] / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"], **TOKENS)
    save_file({"weight": torch.randn(1, 32), "bias": torch.randn(1)}, found["bge-m3"] / "sparse_linear.safetensors")
    found["saved"] = root / "saved"
    SparseEncoder(str(found["bert"]), device="cpu").save_pretrained(str(found["saved"]))
    found["old"] = shutil.copytree(found["saved"], root / "old")
    (found["old"] / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    write_modules(found["old"], "MLMTransformer", "SpladePooling")
    pooling = {"activation_function": "log1p_relu", "word_embedding_dimension": 30522, "embedding_dimension": ...}
    change_json(found["old"] / "1_SpladePooling/config.json", **pooling)
    return found


def write_modules(folder: Path, *kinds: str) -> None:
    """Write a modules.json as sentence-transformers 5 did, the first module in the folder itself."""
    modules: list[dict[str, Any]] = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": OLD + kind}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
