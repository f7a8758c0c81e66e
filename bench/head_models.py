"""Write the seeded checkpoints that `heads` measures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import wordpiece
from support import checkpoints

DOCUMENT = (20, 300)  # tokens of a document for late interaction


def write_bert(folder: Path, small: bool, **shape: int) -> None:
    checkpoints.write_bert_reranker(folder, **shape)


def modernbert(small: bool) -> Any:
    """Return the configuration of ModernBERT-base, which is also that of Ettin-150m."""
    from transformers import ModernBertConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return ModernBertConfig(**sizes if small else {}, **ids, num_labels=1, classifier_pooling="mean")


def write_gte(folder: Path, small: bool) -> None:
    """Write a ModernBertForSequenceClassification."""
    from transformers import ModernBertForSequenceClassification

    torch.manual_seed(0)
    ModernBertForSequenceClassification(modernbert(small)).save_pretrained(folder)
    wordpiece.write_tokenizer(folder, 8192)


def write_ettin(folder: Path, small: bool) -> None:
    """Write a reranker of modules: Transformer, Pooling, Dense, LayerNorm, Dense."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
    from transformers import ModernBertModel

    torch.manual_seed(0)
    config = modernbert(small)
    width = config.hidden_size
    with tempfile.TemporaryDirectory() as backbone:
        ModernBertModel(config).save_pretrained(backbone)
        wordpiece.write_tokenizer(Path(backbone), 8192)
        modules = [
            Transformer(backbone),
            Pooling(width, "cls"),
            Dense(width, width, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(width),
            Dense(width, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ]
        CrossEncoder(modules=modules, device="cpu").save_pretrained(str(folder))


def write_colbert(folder: Path, small: bool, **shape: int) -> None:
    """Write a BERT of Stanford's ColBERT, with a tokenizer that needs no package."""
    shape = {"layers": 2, "hidden": 64, "heads": 2, "intermediate": 96} if small else shape
    checkpoints.write_colbert(folder, dimensions=128, metadata={"doc_maxlen": DOCUMENT[1]}, tokenizer=False, **shape)
    wordpiece.write_tokenizer(folder, 512)
