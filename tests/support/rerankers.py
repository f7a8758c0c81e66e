"""Seeded rerankers in the published formats, and pairs of texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GteConfig,
    GteForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    NomicBertConfig,
    NomicBertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from support.checkpoints import MINILM

WORDS = ["tide", "bread", "coroutine", "of", "the", "7", "what", "is", "a", "window", "[SEP]", "unbelievable"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT_IDS = {"vocab_size": 30522, "pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102}
BERT_IDS |= {"bos_token_id": 101, "eos_token_id": 102}
LENGTH = 48
PAIRS = [("tide of", "bread 7"), ("what is", "")]


def draw_pairs(count: int) -> list[tuple[str, str]]:
    """Return pairs of 0 to 60 words, some of which exceed LENGTH, and queries that repeat."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.choice([1, 2, 5, 20, 45, 60, 61]))) for _ in range(12)]
    return [(draw.choice(texts[:6]), draw.choice(["", *texts])) for _ in range(count)]


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    positions = {"max_position_embeddings": 64}
    modern, bert = {**SIZES, **BERT_IDS, **positions}, {**SIZES, **positions, "vocab_size": 30522}
    return {
        "bert": BertForSequenceClassification(BertConfig(**bert, num_labels=1)),
        "bert, 3 labels": BertForSequenceClassification(
            BertConfig(**SIZES, **positions, vocab_size=30522, num_labels=3)
        ),
        "xlm_roberta": XLMRobertaForSequenceClassification(
            XLMRobertaConfig(**SIZES, max_position_embeddings=66, vocab_size=30522, pad_token_id=1, num_labels=1)
        ),
        "gte": GteForSequenceClassification(GteConfig(**SIZES, vocab_size=30522, num_labels=1)),
        "modernbert": ModernBertForSequenceClassification(ModernBertConfig(**modern, num_labels=1)),
        "modernbert, mean": ModernBertForSequenceClassification(
            ModernBertConfig(**modern, num_labels=2, classifier_pooling="mean", classifier_bias=True, norm_bias=True)
        ),
        "nomic_bert": NomicBertForSequenceClassification(NomicBertConfig(**SIZES, vocab_size=30522, num_labels=1)),
    }


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Draw biases and norms too, which are 0 and 1 in a new model, and larger weights, so that scores differ."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif "embeddings" not in name:
            parameter.data.mul_(5)
    return model


def write_reranker(folder: Path, name: str, model: torch.nn.Module) -> Path:
    """Write one of the models with MiniLM's tokenizer; return the folder."""
    spread(model).save_pretrained(folder)
    for file in ("tokenizer.json", "vocab.txt"):
        if (MINILM / file).exists():
            (folder / file).write_bytes((MINILM / file).read_bytes())
    config: dict[str, object] = {"tokenizer_class": "BertTokenizer", "model_max_length": LENGTH}
    if name in ("xlm_roberta", "gte"):  # which have one token type
        config["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_rerankers(root: Path) -> dict[str, Path]:
    """Write all models, one as sentence-transformers saves it, and a reranker of several modules."""
    found = {name: write_reranker(root / name, name, model) for name, model in models().items()}
    saved = root / "saved by sentence-transformers"
    CrossEncoder(str(found["bert"]), device="cpu").save_pretrained(str(saved))
    backbone = spread(ModernBertModel(ModernBertConfig(**SIZES, **BERT_IDS, max_position_embeddings=64)))
    backbone.save_pretrained(root / "backbone")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (root / "backbone" / file).write_bytes((found["bert"] / file).read_bytes())
    gelu, identity = torch.nn.GELU(), torch.nn.Identity()
    modules = [
        Transformer(str(root / "backbone")),
        Pooling(32, "mean"),
        Dense(32, 24, bias=False, activation_function=gelu),
        LayerNorm(24),
        Dense(24, 1, activation_function=identity, module_output_name="scores"),
    ]
    CrossEncoder(modules=[spread(module) for module in modules], device="cpu").save_pretrained(str(root / "modular"))
    return found | {"saved": saved, "modular": root / "modular"}
