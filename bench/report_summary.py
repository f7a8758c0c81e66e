"""The speedups of README.md and the checkpoints of docs/models.md, for bench/report.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]

SUMMARY_ROWS = 5
# Speedups for the README: (task, what it replaces, ratio).
HEADLINES: dict[str, Callable[[Result], list[tuple[str, str, float]]]] = {
    "throughput": lambda result: [
        (f"`Engine.encode`, {model['model']}, {found['workload']}", "sentence-transformers", row["speedup"])
        for model in result["models"]
        for found in model["workloads"]
        for row in found["rows"]
        if row["provider"] == "unpadded, float32"
    ],
    "server": lambda result: [
        ("`unpadded serve`, 16 clients, 8 paragraphs per request", "infinity", found["texts/s"])
        for found in [result.get("relative to infinity")]
        if found
    ],
    "drop_in": lambda result: [
        (f"`{call}`, {texts.rstrip(')')}", library, row["ratio"])
        for row in result["rows"]
        for library, call, texts in [re.fullmatch(r"(\S+), (\S+) \((.*)", row["drop_in"]).groups()]
    ],
    "loading": lambda result: [
        (
            f"`load`, a checkpoint of {result['bytes'] / 1e6:.0f} MB",
            "safetensors",
            times["load with safetensors"] / times["load"],
        )
        for times in [{row["way"]: row["seconds"] for row in result["rows"] if row["dtype"] == "float32"}]
    ],
}
CHECKPOINTS = {
    "bert": "all-MiniLM, bge, e5, gte, mxbai-embed-large, snowflake-arctic-embed (first generation), ms-marco-MiniLM",
    "distilbert": "msmarco-distilbert, multi-qa-distilbert, distilbert-base-uncased-finetuned-sst-2-english",
    "eurobert": "EuroBERT-210m, -610m, -2.1B and models trained from them",
    "gte": "gte-en-v1.5, gte-multilingual-base, snowflake-arctic-embed-m-v2.0, gte-multilingual-reranker",
    "jina_bert": "jina-embeddings-v2",
    "jina_v3": "jina-embeddings-v3, with its LoRA adapters",
    "modernbert": "modernbert-embed, gte-modernbert, granite-embedding-english-r2, -small-english-r2, "
    "-97m-multilingual-r2 and -311m-multilingual-r2 (32k tokens), DenseOn, Ettin encoders, models trained from mmBERT, "
    "gte-reranker, ettin-reranker",
    "mpnet": "all-mpnet-base-v2, multi-qa-mpnet-base, paraphrase-mpnet-base-v2",
    "nomic_bert": "nomic-embed-text-v1 and v1.5, nomic-bert-2048, CodeRankEmbed, snowflake-arctic-embed-m-long",
    "nomic_bert with experts": "nomic-embed-text-v2-moe",
    "xlm_roberta": "bge-m3 (dense, sparse), multilingual-e5, snowflake-arctic-embed-l-v2.0, bge-reranker",
}
