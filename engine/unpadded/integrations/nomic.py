"""The interface of nomic's Python client in its local mode: `from unpadded import embed; embed.text(...)`.

A text is embedded with the task's prefix, and truncated after 2048 tokens. Its vector gets a layer norm if the model
was trained for matryoshka, is cut and L2-normalized.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from unpadded.engine import Engine
from unpadded.errors import OptionError
from unpadded.loading import load
from unpadded.options import check_choice
from unpadded.tokenization.windows import iterate

TASK_TYPES = ("search_query", "search_document", "classification", "clustering")
PLACEHOLDER = "24df574ea1c998de59d5be15e769658e"  # the client's text in place of an empty one: MD5 of "nomic empty"
MAX_LENGTH = 2048  # tokens of a text, including prefix and special tokens
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
    long_text_mode: "truncate"; "mean" raises OptionError. inference_mode: "local" or "dynamic"; no text leaves the
    machine either way. device: "gpu", or a name of torch. Other keywords are passed to `unpadded.load`.
    usage counts the texts' tokens without prefixes and special tokens.
    """
    if isinstance(texts, str):
        raise TypeError("'texts' parameter must be list[str], not str")
    if inference_mode not in ("local", "dynamic"):
        raise OptionError(
            f"inference_mode is not supported: {inference_mode!r}; use 'local' or 'dynamic', or nomic's client"
        )
    check_choice("task_type", task_type, TASK_TYPES)
    if long_text_mode != "truncate":
        raise OptionError(
            f"long_text_mode is not supported: {long_text_mode!r}; use 'truncate' and pass max_length=8192, split long "
            "texts, or call encode_spans of an engine for one vector per part"
        )
    result = {"embeddings": [], "usage": {}, "model": model, "inference_mode": "local"}
    if len(texts) == 0:
        return result
    engine = _engine(model, DEVICES.get(device, device), tuple(sorted(kwargs.items())))
    embeddings = engine.embed(
        [*(PLACEHOLDER if isinstance(one, str) and not one.strip() else one for one in iterate(texts)), ""],
        task=task_type,
        dimensions=engine.dimensions if dimensionality is None else dimensionality,
        show_progress=False,
    )
    counts, added = embeddings.token_counts[:-1], embeddings.token_counts[-1]  # of the empty text: what a text adds
    tokens = int((counts - added).sum())
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
    return load(name, device=device, **{"max_length": MAX_LENGTH} | dict(options))
