"""Pooling heads: the last hidden states of a packed batch -> one vector per text."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from unpadded.model.batch import PackedBatch, SelectedTokens
from unpadded.model.encoder import Encoder
from unpadded.options import VectorOptions
from unpadded_kernels import pool
from unpadded_kernels.pooling import matryoshka
from unpadded_kernels.tiles import attention_block_m

# A Dense module of sentence-transformers: weight [out_features, in_features], bias, activation.
Dense: TypeAlias = tuple[Tensor, Tensor | None, str]


def text_vectors(
    encoder: Encoder, batch: PackedBatch, options: VectorOptions, *, pooling: str, dense: tuple[Dense, ...]
) -> Tensor:
    """Encode and pool a batch on the device: [batch, dimensions] fp32."""
    hidden, cu_seqlens = _hidden_to_pool(encoder, batch, pooling, options.adapter)
    matryoshka_options = (options.layer_norm, options.dimensions, options.normalize)
    if not dense:
        vectors: Tensor = pool(hidden, cu_seqlens, pooling, *matryoshka_options)
        return vectors
    vectors = pool(hidden, cu_seqlens, pooling, False, hidden.shape[1], False)
    for weight, bias, activation in dense:
        vectors = encoder.linear(vectors.to(weight.dtype), weight, bias)
        vectors = vectors.tanh() if activation == "tanh" else vectors
    return matryoshka(vectors.float(), *matryoshka_options)


def _hidden_to_pool(encoder: Encoder, batch: PackedBatch, pooling: str, adapter: str | None) -> tuple[Tensor, Tensor]:
    """Return the last hidden states that pooling reads and their cu_seqlens: all tokens for mean, else one per text."""
    if pooling == "mean" or len(batch.input_ids) == 0:
        return encoder(batch, adapter=adapter), batch.cu_seqlens
    block_m = attention_block_m(encoder.weights.word.dtype, encoder.spec.head_dim, batch.cu_seqlens.device)
    hidden = encoder(batch, adapter=adapter, selected=select_pooled_tokens(batch.cu_seqlens, pooling, block_m))
    hidden = hidden.masked_fill((batch.cu_seqlens.diff() == 0)[:, None], 0)  # texts without tokens
    return hidden, torch.arange(len(batch.cu_seqlens), dtype=torch.int32, device=hidden.device)


def select_pooled_tokens(cu_seqlens: Tensor, pooling: str, block_m: int) -> SelectedTokens:
    """Return the token of each text that pooling reads; for a text without tokens, a token of another text.

    cu_seqlens: [batch + 1] int32.
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    places = torch.zeros_like(lengths) if pooling == "cls" else (lengths - 1).clamp(min=0)
    rows = (starts + places).minimum(cu_seqlens[-1] - 1)
    return SelectedTokens(rows, torch.stack((starts, lengths, places // block_m), dim=1))
