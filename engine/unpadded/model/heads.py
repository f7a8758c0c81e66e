"""Heads: the last hidden states of a packed batch -> one row per text, span or token, such as its vector or scores."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from unpadded.model.batch import PackedBatch, SelectedTokens
from unpadded.model.encoder import Encoder
from unpadded.model.layer import HeadLayer
from unpadded_kernels import mean_pool, vocabulary_max
from unpadded_kernels.tiles import attention_block_m


class Head(NamedTuple):
    """A pooling and the layers after it."""

    pooling: str  # "mean", "cls", "last", "none" for one row per token, or "vocabulary" for `vocabulary_max`
    layers: tuple[HeadLayer, ...] = ()  # with "vocabulary" the weight of the last one is its bias

    def to(self, device: torch.device) -> Self:
        return self._replace(layers=tuple(layer.to(device) for layer in self.layers))

    def width(self, hidden: int) -> int:
        """Length of a row; hidden: that of a hidden state."""
        return self.layers[-1].weight.shape[0] if self.layers else hidden


def stacked(layers: Sequence[HeadLayer]) -> HeadLayer:
    """Return one layer that gives the hidden state, then the rows of all layers before their activation."""
    weight = layers[0].weight
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    every = [HeadLayer(identity, None), *layers]
    biases = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in every]
    return HeadLayer(torch.cat([layer.weight for layer in every]), torch.cat(biases))


def head_rows(encoder: Encoder, batch: PackedBatch, adapter: str | None, head: Head) -> Tensor:
    """Encode and pool a batch on the device: [rows, width] fp32, the input of `matryoshka`; spans are mean-pooled."""
    if head.pooling in ("none", "vocabulary"):
        rows = encoder(batch, adapter=adapter)
    elif batch.span_tokens is not None:
        rows = mean_pool(encoder(batch, adapter=adapter)[batch.span_tokens], batch.cu_spans)
    elif head.pooling == "mean" or len(batch.input_ids) == 0:
        rows = mean_pool(encoder(batch, adapter=adapter), batch.cu_seqlens)
    else:
        block_m = attention_block_m(encoder.weights.word.dtype, encoder.spec.head_dim, batch.cu_seqlens.device)
        rows = encoder(batch, adapter=adapter, selected=select_pooled_tokens(batch.cu_seqlens, head.pooling, block_m))
        rows = rows.masked_fill((batch.cu_seqlens.diff() == 0)[:, None], 0)  # texts without tokens
    rows, word = rows.float(), encoder.weights.word
    for layer in head.layers[:-1] if head.pooling == "vocabulary" else head.layers:
        rows = layer(rows, encoder.linear)
    if head.pooling == "vocabulary":
        rows = vocabulary_max(rows.to(word.dtype), word, head.layers[-1].weight, batch.cu_seqlens)
    return rows.float()


def select_pooled_tokens(cu_seqlens: Tensor, pooling: str, block_m: int) -> SelectedTokens:
    """Return the token of each text that pooling reads; for a text without tokens, a token of another text.

    cu_seqlens: [batch + 1] int32.
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    places = torch.zeros_like(lengths) if pooling == "cls" else (lengths - 1).clamp(min=0)
    rows = (starts + places).minimum(cu_seqlens[-1] - 1)
    return SelectedTokens(rows, torch.stack((starts, lengths, places // block_m), dim=1))
