"""nomic's client in its local mode: `from unpadded import embed; embed.text(...)`.

A text is prefix + tokens in chunks of 2048; "truncate" keeps the first, "mean" averages all. Each chunk's vector has a
layer norm where the model was trained for matryoshka, is cut and L2-normalized, and so is the mean.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from unpadded.engine import Engine
from unpadded.errors import InputError, OptionError
from unpadded.loading import load
from unpadded.options import LongText
from unpadded.tokenization.windows import CHUNK_OVERLAP, CHUNK_TOKENS

logger = logging.getLogger("unpadded")

TaskType = Literal["search_query", "search_document", "classification", "clustering"]

LEAST_DIMENSIONALITY = 64  # below it the client warns
LONGEST_MEAN = 8192  # tokens of a text that "mean" takes
PLACEHOLDER = "24df574ea1c998de59d5be15e769658e"  # what the client embeds for an empty text: MD5 of "nomic empty"
DEVICES = {None: "auto", "gpu": "cuda", "nvidia": "cuda"}  # the client's words


def text(
    texts: list[str],
    *,
    model: str = "nomic-embed-text-v1.5",
    task_type: str = "search_document",
    dimensionality: int | None = None,
    long_text_mode: str = "truncate",
    inference_mode: str = "local",
    device: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Embed texts on this machine: {"embeddings", "usage", "model", "inference_mode"}, as nomic's client gives them.

    model: a name of nomic's, a hub id or a folder; the last one used stays loaded. task_type: search_query,
    search_document, classification or clustering. dimensionality: fewer dimensions, of models trained for it.
    long_text_mode: "truncate" or "mean". inference_mode: "local" or "dynamic"; nothing is sent anywhere. device: "gpu",
    or torch's words. The rest goes to `unpadded.load`. usage counts the texts' tokens without prefix and special ones.
    """
    if isinstance(texts, str):
        raise TypeError("'texts' parameter must be list[str], not str")
    if inference_mode not in ("local", "dynamic"):
        raise OptionError(
            f"inference_mode is not offered: {inference_mode!r}; use 'local' or 'dynamic', or nomic's client"
        )
    _check_offered("task_type", task_type, TaskType)
    _check_offered("long_text_mode", long_text_mode, LongText)
    result = {"embeddings": [], "usage": {}, "model": model, "inference_mode": "local"}
    if len(texts) == 0:
        return result
    engine = _engine(model, DEVICES.get(device, device), tuple(sorted(kwargs.items())))
    _check_dimensionality(dimensionality, engine)
    embeddings = engine.embed(
        [PLACEHOLDER if isinstance(one, str) and not one.strip() else one for one in texts],
        task=task_type,
        dimensions=dimensionality or engine.dimensions,
        long_text=long_text_mode,  # type: ignore[arg-type]  # checked above
        show_progress=False,
    )
    tokens = _own_tokens(embeddings.token_counts, engine, task_type, long_text_mode)
    return result | {
        "embeddings": embeddings.vectors.tolist(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def free_embedding_model() -> None:
    """Let go of the model that stays loaded."""
    _engine.cache_clear()


@lru_cache(maxsize=1)
def _engine(model: str, device: str, options: tuple[tuple[str, Any], ...]) -> Engine:
    known = model if "/" in model or Path(model).is_dir() else f"nomic-ai/{model}"
    return load(known, device=device, **{"max_length": CHUNK_TOKENS} | dict(options))


def _check_offered(name: str, value: str, offered: Any) -> None:
    if value not in get_args(offered):
        raise OptionError(f"{name} is unknown: {value!r}; use one of {', '.join(get_args(offered))}")


def _check_dimensionality(dimensionality: int | None, engine: Engine) -> None:
    if dimensionality is None or dimensionality == engine.dimensions:
        return
    if not engine.checkpoint.matryoshka or not 1 <= dimensionality <= engine.dimensions:
        offered = f"1 to {engine.dimensions}" if engine.checkpoint.matryoshka else engine.dimensions
        raise OptionError(f"dimensionality is not offered: {dimensionality}; {engine.checkpoint.name} gives {offered}")
    if dimensionality < LEAST_DIMENSIONALITY:
        logger.warning("dimensionality %d is below %d, and costs quality", dimensionality, LEAST_DIMENSIONALITY)


def _own_tokens(counts: np.ndarray, engine: Engine, task_type: str, long_text_mode: str) -> int:
    """The texts' tokens, those that two chunks share counted twice; InputError for one too long to average."""
    around = len(
        next(engine._pipeline.windows([""], engine._pipeline.plan(task=task_type, long_text="mean"))).sequences[0]
    )
    chunks = -(-counts // min(CHUNK_TOKENS, engine.checkpoint.max_length))  # all but the last are full
    own = counts - chunks * around
    lengths = own - (chunks - 1) * CHUNK_OVERLAP
    if long_text_mode == "mean" and (longest := int(lengths.max())) > LONGEST_MEAN:
        raise InputError(
            f"text {int(lengths.argmax())} is too long: {longest} tokens, and 'mean' takes {LONGEST_MEAN}; shorten it"
        )
    return int(own.sum())
