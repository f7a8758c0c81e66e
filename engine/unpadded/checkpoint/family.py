"""The interface of a family module: how checkpoints of one architecture are recognized and read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from unpadded.checkpoint.spec import EncoderSpec, TensorSpec

PREFIXES = ("0.auto_model.", "auto_model.", "module.", "model.")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Functions and defaults for the checkpoints of one architecture."""

    matches: Callable[[Mapping[str, Any], Collection[str]], bool]  # from config.json and the stored tensors' names
    read_config: Callable[[Mapping[str, Any]], EncoderSpec]  # raises ConfigError for what is not implemented
    tensors: Callable[[EncoderSpec], dict[str, TensorSpec]]  # by field of the weights, such as layers.0.qkv_bias
    prefixes: tuple[str, ...] = PREFIXES  # removed from stored names, repeatedly
    ignored: tuple[str, ...]  # patterns of stored names, without prefix, that the encoder does not need
    max_length: int | None = None  # tokens, if no file states a length; None: as many as there are learned positions
    prompts: Mapping[str, str] = field(default_factory=dict)  # task -> prompt, if no file states any
    matryoshka: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # published model -> trained dimensions
    matryoshka_layer_norm: bool = False  # apply LayerNorm without weights before vectors are cut
