"""Pooling heads: the last hidden states of a packed batch -> one vector per text."""

from typing import TypeAlias

import torch
from torch import Tensor

from unpadded.model.batch import PackedBatch, SelectedTokens
from unpadded.model.encoder import Encoder
from unpadded_kernels import mean_pool
from unpadded_kernels.tiles import attention_block_m

# A Dense module of sentence-transformers: weight [out_features, in_features], bias, activation.
Dense: TypeAlias = tuple[Tensor, Tensor | None, str]


def pooled_rows(
    encoder: Encoder, batch: PackedBatch, adapter: str | None, *, pooling: str, dense: tuple[Dense, ...]
) -> Tensor:
    """Encode and pool a batch on the device: [batch, dimensions] fp32, the input of `matryoshka`."""
    if pooling == "mean" or len(batch.input_ids) == 0:
        rows: Tensor = mean_pool(encoder(batch, adapter=adapter), batch.cu_seqlens)
    else:
        block_m = attention_block_m(encoder.weights.word.dtype, encoder.spec.head_dim, batch.cu_seqlens.device)
        rows = encoder(batch, adapter=adapter, selected=select_pooled_tokens(batch.cu_seqlens, pooling, block_m))
        rows = rows.masked_fill((batch.cu_seqlens.diff() == 0)[:, None], 0)  # texts without tokens
    for weight, bias, activation in dense:
        rows = encoder.linear(rows.to(weight.dtype), weight, bias)
        rows = rows.tanh() if activation == "tanh" else rows
    return rows.float()


def select_pooled_tokens(cu_seqlens: Tensor, pooling: str, block_m: int) -> SelectedTokens:
    """Return the token of each text that pooling reads; for a text without tokens, a token of another text.

    cu_seqlens: [batch + 1] int32.
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    places = torch.zeros_like(lengths) if pooling == "cls" else (lengths - 1).clamp(min=0)
    rows = (starts + places).minimum(cu_seqlens[-1] - 1)
    return SelectedTokens(rows, torch.stack((starts, lengths, places // block_m), dim=1))
