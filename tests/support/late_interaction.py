"""Seeded late-interaction models in the published formats."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from tokenizers import AddedToken, Tokenizer
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, XLMRobertaConfig, XLMRobertaModel

from support.checkpoints import MINILM, write_colbert, write_json
from support.rerankers import BERT_IDS, SIZES, spread

VOCABULARY, DIMENSIONS, POSITIONS = 30524, 16, 64  # two tokens more than MiniLM's
PYLATE = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 24, "prompts": {}}
PYLATE |= {"attend_to_expansion_tokens": False, "do_query_expansion": True, "similarity_fn_name": "MaxSim"}


def write_backbone(folder: Path, model: torch.nn.Module, *, markers: bool = False, **settings: Any) -> Path:
    """Write an encoder with MiniLM's tokenizer; markers: with PyLate's two tokens, as PyLate saves them."""
    spread(model).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    if markers:
        tokenizer.add_tokens([AddedToken("[Q] ", normalized=True), AddedToken("[D] ", normalized=True)])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "pad", "mask", "cls", "sep")}
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 48} | tokens
    write_json(folder / "tokenizer_config.json", config | settings)
    return folder


def bert() -> BertModel:
    return BertModel(BertConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS))


def modernbert() -> ModernBertModel:
    """Return a model whose windows are shorter than its queries: some [MASK] see no token of the query."""
    windows = {"local_attention": 8, "global_attn_every_n_layers": 2, "norm_bias": True}
    sizes = {**SIZES, "num_hidden_layers": 3}
    return ModernBertModel(ModernBertConfig(**sizes, **windows, **BERT_IDS | {"vocab_size": VOCABULARY}))


def write_stanford(folder: Path, **metadata: Any) -> Path:
    """Write an HF_ColBERT."""
    shape = {"layers": 2, "hidden": 32, "heads": 2, "intermediate": 64, "positions": POSITIONS}
    return write_colbert(
        folder, dimensions=DIMENSIONS, metadata={"query_maxlen": 12, "doc_maxlen": 24} | metadata, **shape
    )


def write_pylate(
    folder: Path, model: torch.nn.Module, *, dense: tuple[int, ...] = (DIMENSIONS,), **config: Any
) -> Path:
    """Write a model with the modules that PyLate lists: a Transformer and linear layers of these widths."""
    write_backbone(folder, model, markers=True)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    width = 32
    for index, rows in enumerate(dense, 1):
        path = f"{index}_Dense"
        modules.append({"idx": index, "name": str(index), "path": path, "type": "pylate.models.Dense.Dense"})
        function = "torch.nn.modules.linear.Identity"
        settings = {"in_features": width, "out_features": rows, "bias": False, "activation_function": function}
        write_json(folder / path / "config.json", settings)
        save_file({"linear.weight": torch.randn(rows, width)}, folder / path / "model.safetensors")
        width = rows
    write_json(folder / "modules.json", modules)
    config = {"model_type": "ColBERT"} | PYLATE | config
    stated = {key: value for key, value in config.items() if value is not ...}
    write_json(folder / "config_sentence_transformers.json", stated)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 47, "do_lower_case": False})
    return folder


def save(folder: Path, *, pooling: HierarchicalTokenPooling | None = None, mask: Any = None, **settings: Any) -> Path:
    """Write a model as sentence-transformers saves it."""
    backbone = write_backbone(folder / "backbone", bert())
    modules = [
        Transformer(str(backbone), **settings),
        spread(Dense(32, DIMENSIONS, activation_function=torch.nn.Tanh(), module_input_name="token_embeddings")),
        mask or MultiVectorMask(skiplist_words=list(string.punctuation)),
        Normalize(module_input_name="token_embeddings"),
        *([pooling] if pooling else []),
    ]
    model = MultiVectorEncoder(modules=modules, prompts={"query": "search: ", "document": ""}, device="cpu")
    model.save_pretrained(str(folder / "saved"))
    return folder / "saved"


def write_bge(folder: Path) -> Path:
    """Write an encoder as bge-m3's with its head for token vectors."""
    config = XLMRobertaConfig(**SIZES, max_position_embeddings=POSITIONS + 2, vocab_size=VOCABULARY, pad_token_id=1)
    write_backbone(folder, XLMRobertaModel(config), model_input_names=["input_ids", "attention_mask"])
    linear = {"weight": torch.randn(32, 32), "bias": torch.randn(32)}
    save_file(linear, folder / "colbert_linear.safetensors")
    return folder


def write_late_interaction(root: Path) -> dict[str, Path]:
    """Write all models; return their folders by name."""
    torch.manual_seed(0)
    expansion = {"strategy": "min", "length": 10, "attend": True, "token": "[unused5]"}
    return {
        "stanford": write_stanford(root / "stanford"),
        "stanford, attended": write_stanford(root / "stanford-2", attend_to_mask_tokens=True, mask_punctuation=False),
        "pylate": write_pylate(root / "pylate", bert(), skiplist_words=["of", "the", "not-in-the-vocabulary"]),
        "pylate, attended": write_pylate(
            root / "pylate-2",
            bert(),
            dense=(24, DIMENSIONS),
            attend_to_expansion_tokens=True,
            model_type=...,
            prompts={"query": "[Q] ask: "},
        ),
        "pylate, not expanded": write_pylate(root / "pylate-3", bert(), do_query_expansion=False),
        "modernbert": write_pylate(root / "modernbert", modernbert(), query_length=30),
        "saved": save(root / "st", document_length=20, query_expansion={"strategy": "fixed", "length": 14}),
        "saved, pooled": save(
            root / "st-2",
            pooling=HierarchicalTokenPooling(2.5, num_protected_tokens=2),
            mask=MultiVectorMask(["tide"], skiplist_tasks=["query", "document"]),
            query_length=21,
            query_expansion=expansion,
        ),
    }
