"""The interface of nomic's Python client in its local mode: `from unpadded import embed; embed.text(...)`.

A text is split into chunks of 2048 tokens, each with the task's prefix; "truncate" embeds the first chunk, "mean"
averages the vectors of all. Each vector gets a layer norm if the model was trained for matryoshka, is cut and
L2-normalized, and the mean is normalized again.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from unpadded.engine import Engine
from unpadded.errors import InputError, OptionError
from unpadded.loading import load
from unpadded.options import LongText
from unpadded.tokenization.windows import CHUNK_OVERLAP, CHUNK_TOKENS, iterate

logger = logging.getLogger("unpadded")

TaskType = Literal["search_query", "search_document", "classification", "clustering"]

RECOMMENDED_DIMENSIONALITY = 64  # the client warns below it
MAX_MEAN_TOKENS = 8192  # the longest text that "mean" supports
PLACEHOLDER = "24df574ea1c998de59d5be15e769658e"  # the client's text in place of an empty one: MD5 of "nomic empty"
DEVICES = {None: "auto", "gpu": "cuda", "nvidia": "cuda"}  # the client's names -> those of `unpadded.load`


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
    """Embed texts on this machine; return {"embeddings", "usage", "model", "inference_mode"} as nomic's client does.

    model: a name of a nomic model, a hub id or a folder; the last model stays loaded. task_type: search_query,
    search_document, classification or clustering. dimensionality: fewer dimensions, for models trained for it.
    long_text_mode: "truncate" or "mean". inference_mode: "local" or "dynamic"; no text leaves the machine either way.
    device: "gpu", or a name of torch. Other keywords are passed to `unpadded.load`.
    usage counts the texts' tokens without prefixes and special tokens.
    """
    if isinstance(texts, str):
        raise TypeError("'texts' parameter must be list[str], not str")
    if inference_mode not in ("local", "dynamic"):
        raise OptionError(
            f"inference_mode is not supported: {inference_mode!r}; use 'local' or 'dynamic', or nomic's client"
        )
    _check_choice("task_type", task_type, TaskType)
    _check_choice("long_text_mode", long_text_mode, LongText)
    result = {"embeddings": [], "usage": {}, "model": model, "inference_mode": "local"}
    if len(texts) == 0:
        return result
    engine = _engine(model, DEVICES.get(device, device), tuple(sorted(kwargs.items())))
    _check_dimensionality(dimensionality, engine)
    embeddings = engine.embed(
        [*(PLACEHOLDER if isinstance(one, str) and not one.strip() else one for one in iterate(texts)), ""],
        task=task_type,
        dimensions=dimensionality or engine.dimensions,
        long_text=long_text_mode,  # type: ignore[arg-type]  # checked above
        show_progress=False,
    )
    *token_counts, added_tokens = embeddings.token_counts.tolist()  # of the empty text: prefix and special tokens
    tokens = _count_own_tokens(token_counts, added_tokens, engine.checkpoint.max_length, long_text_mode)
    return result | {
        "embeddings": embeddings.vectors[:-1].tolist(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def free_embedding_model() -> None:
    """Free the model that stays loaded."""
    _engine.cache_clear()


@lru_cache(maxsize=1)
def _engine(model: str, device: str, options: tuple[tuple[str, Any], ...]) -> Engine:
    name = model if "/" in model or Path(model).is_dir() else f"nomic-ai/{model}"
    return load(name, device=device, **{"max_length": CHUNK_TOKENS} | dict(options))


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise OptionError(f"{name} is unknown: {value!r}; use one of {', '.join(get_args(choices))}")


def _check_dimensionality(dimensionality: int | None, engine: Engine) -> None:
    if dimensionality is None or dimensionality == engine.dimensions:
        return
    if not engine.checkpoint.matryoshka or not 1 <= dimensionality <= engine.dimensions:
        supported = f"1 to {engine.dimensions}" if engine.checkpoint.matryoshka else f"{engine.dimensions}"
        raise OptionError(
            f"dimensionality is not supported by {engine.checkpoint.name}: {dimensionality}; use {supported}"
        )
    if dimensionality < RECOMMENDED_DIMENSIONALITY:
        logger.warning("dimensionality %d reduces quality; use %d or more", dimensionality, RECOMMENDED_DIMENSIONALITY)


def _count_own_tokens(token_counts: list[int], added: int, max_length: int, long_text_mode: str) -> int:
    """Sum the texts' tokens without `added` per chunk; tokens that two chunks share count twice, as in the client.

    InputError for a text that is too long for "mean".
    """
    total = 0
    for index, count in enumerate(token_counts):
        chunks = -(-count // min(CHUNK_TOKENS, max_length))  # all but the last are full
        own = count - chunks * added
        length = own - (chunks - 1) * CHUNK_OVERLAP
        if long_text_mode == "mean" and length > MAX_MEAN_TOKENS:
            raise InputError(
                f"text {index} is too long: {length} tokens; 'mean' supports {MAX_MEAN_TOKENS}, so shorten it"
            )
        total += own
    return total
