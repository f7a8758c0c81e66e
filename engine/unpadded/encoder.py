"""The forward pass of a post-norm encoder over packed tokens, read top-down.

x = embedding(ids), then in every layer
    x = LayerNorm(x + out(attention(rotary(qkv(x)))))
    x = LayerNorm(x + down(activation(up(x))))
"""

from __future__ import annotations

import torch
from torch import Tensor

from unpadded.backends import Attention
from unpadded.batch import PackedBatch
from unpadded.spec import EncoderSpec
from unpadded.weights import EncoderWeights, LayerWeights
from unpadded_kernels import (
    add_layer_norm,
    embedding,
    linear,
    linear_activation,
    rotary_,
    rotary_cos_sin,
)


class Encoder:
    """One encoder for every family: an `EncoderSpec` says what it is, `EncoderWeights` hold its tensors.

    attention: over packed qkv, see `backends`.
    row_block: tokens that go through out-projection and MLP together, so that their activations stay in the caches of a
    CPU; None for all at once.
    """

    def __init__(
        self, spec: EncoderSpec, weights: EncoderWeights, *, attention: Attention, row_block: int | None
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.row_block = row_block
        self.scale = spec.head_dim**-0.5

    def __call__(self, batch: PackedBatch) -> Tensor:
        """The last hidden state of every token: [total_tokens, hidden] in the weights' dtype."""
        weights = self.weights
        x: Tensor = embedding(
            batch.input_ids,
            batch.positions,
            weights.word,
            None if weights.token_type is None else weights.token_type[0],
            weights.position,
            weights.norm,
            weights.norm_bias,
            self.spec.norm_eps,
        )
        cos_sin = None
        if batch.inv_freq is not None:
            cos_sin = rotary_cos_sin(batch.positions, batch.inv_freq, batch.cu_seqlens)
        for layer in weights.layers:
            attended = self._attend(x, layer, batch, cos_sin)
            x = self._close(attended, x, layer)
        return x

    def _attend(self, x: Tensor, layer: LayerWeights, batch: PackedBatch, cos_sin: Tensor | None) -> Tensor:
        qkv = linear(x, layer.qkv, layer.qkv_bias).view(-1, 3, self.spec.heads, self.spec.head_dim)
        if cos_sin is not None:
            rotary_(qkv, cos_sin)
        return self.attention.attend(qkv, batch, self.scale)

    def _close(self, attended: Tensor, x: Tensor, layer: LayerWeights) -> Tensor:
        """What follows attention, each row by itself, so by blocks of rows."""
        block = self.row_block or len(x)
        if len(x) <= block:
            return self._close_block(attended, x, layer)
        blocks = zip(attended.split(block), x.split(block), strict=True)
        return torch.cat([self._close_block(*rows, layer) for rows in blocks])

    def _close_block(self, attended: Tensor, x: Tensor, layer: LayerWeights) -> Tensor:
        eps = self.spec.norm_eps
        out = linear(attended, layer.out, layer.out_bias)
        x = add_layer_norm(out, x, layer.attention_norm, layer.attention_norm_bias, eps)
        up = linear_activation(x, layer.up, layer.up_bias, self.spec.activation)
        down = linear(up, layer.down, layer.down_bias)
        x = add_layer_norm(down, x, layer.mlp_norm, layer.mlp_norm_bias, eps)
        return x
