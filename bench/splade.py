"""Texts, seeded models and sentence-transformers' SparseEncoder for the benchmark of sparse weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wordpiece

from unpadded.cli.benchmark.workloads import TextSampler
from unpadded.engine import Engine

TEXT = (20, 300)  # tokens
DEVIATIONS = 4  # of a logit, by which the bias of all logits is below zero: a few hundred weights of a text are not


def draw_texts(sampler: TextSampler, draw: np.random.Generator, count: int) -> list[str]:
    """Return texts with `TEXT` tokens."""
    return sampler.sample(draw.integers(TEXT[0], TEXT[1] + 1, count))


def token_counts(engine: Engine, texts: Sequence[str]) -> np.ndarray:
    found = engine.tokenizer.encode(texts, max_length=engine.checkpoint.max_length)
    return np.array([len(row.ids) for row in found], np.int64)


def sparse_encoder(folder: Path, device: torch.device, dtype: str) -> Callable[[int], Callable[[Sequence[str]], Any]]:
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder), device=str(device), model_kwargs={"dtype": getattr(torch, dtype)})
    return lambda batch: lambda texts: model.encode(texts, batch_size=batch, show_progress_bar=False)


def write(folder: Path, small: bool, **shape: int) -> None:
    """Write a BertForMaskedLM; small: with two layers of 64."""
    from transformers import BertConfig, BertForMaskedLM

    shape = {"layers": 2, "hidden": 64, "heads": 2, "intermediate": 128} if small else shape
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["intermediate"],
        vocab_size=wordpiece.VOCABULARY,
    )
    model = BertForMaskedLM(config)
    model.cls.predictions.bias.data.fill_(-DEVIATIONS * config.initializer_range * shape["hidden"] ** 0.5)
    model.save_pretrained(folder)
    wordpiece.write_tokenizer(folder, 512)
