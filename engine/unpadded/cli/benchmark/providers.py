"""Functions from texts to vectors: unpadded and other libraries, each used as its documentation shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from unpadded.engine import Engine

Encode: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # texts -> [texts, dimensions]

BATCH = 32  # texts, the default of sentence-transformers and of most examples
REFERENCE = "sentence-transformers"  # in fp32; every speedup and cosine is relative to it


@dataclass(frozen=True)
class Model:
    """A model to measure, by name and as loaded by unpadded."""

    name: str  # as the user gave it: a folder or a hub id
    engines: dict[str, Engine]  # by dtype
    half: torch.dtype  # the fast 16-bit dtype of the device

    @property
    def engine(self) -> Engine:
        return next(iter(self.engines.values()))

    @property
    def device(self) -> torch.device:
        return self.engine._pipeline.runner.device


def make_providers(model: Model, names: Sequence[str]) -> tuple[dict[str, Encode], dict[str, str]]:
    """Return unpadded in each dtype and the named providers, and the reason for each that does not run here."""
    made = {f"unpadded, {dtype}": _unpadded(engine) for dtype, engine in model.engines.items()}
    reasons = {}
    for name in names:
        try:
            encode = PROVIDERS[name](model)
            encode(["some text"])
            made[name] = encode
        except ModuleNotFoundError:
            reasons[name] = "not installed"
        except Exception as error:  # one library that raises must not stop the others
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
    return made, reasons


def _unpadded(engine: Engine) -> Encode:
    return lambda texts: engine.embed(texts, prompt="").vectors


def _sentence_transformers(
    model: Model, backend: Literal["torch", "onnx", "openvino"] = "torch", **options: Any
) -> Encode:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(model.name, device=str(model.device), backend=backend, model_kwargs=options or None)
    loaded.max_seq_length = model.engine.checkpoint.max_length
    return partial(loaded.encode, prompt="", show_progress_bar=False)


def _sentence_transformers_best(model: Model) -> Encode:
    return _sentence_transformers(model, dtype=model.half, attn_implementation="sdpa")


def _transformers(model: Model) -> Encode:
    """Follow the example of the model cards: batches in the given order, padded, pooled over the mask."""
    from transformers import AutoModel, AutoTokenizer

    checkpoint = model.engine.checkpoint
    if checkpoint.dense:
        raise ValueError(f"{checkpoint.name} has Dense modules after its pooling, which this provider does not run")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    encoder = AutoModel.from_pretrained(checkpoint.folder).to(model.device).eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=checkpoint.max_length,
                return_tensors="pt",
            ).to(model.device)
            hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            if checkpoint.pooling == "mean":
                pooled = (hidden * mask).sum(1) / mask.sum(1)
            else:
                last = batch["attention_mask"].sum(1) - 1 if checkpoint.pooling == "last" else 0
                pooled = hidden[torch.arange(len(hidden)), last]
            rows.append((F.normalize(pooled, dim=1) if checkpoint.normalize else pooled).cpu())
        return torch.cat(rows).numpy()

    return encode


PROVIDERS: dict[str, Callable[[Model], Encode]] = {
    REFERENCE: _sentence_transformers,
    "sentence-transformers-best": _sentence_transformers_best,
    "sentence-transformers-onnx": partial(_sentence_transformers, backend="onnx"),
    "sentence-transformers-openvino": partial(_sentence_transformers, backend="openvino"),
    "transformers": _transformers,
}
