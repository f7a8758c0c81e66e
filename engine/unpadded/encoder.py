"""The forward pass of an encoder over packed tokens, read top-down.

x = r = LayerNorm(embedding(ids)), then in every layer
    r = r + out(attention(rotary(qkv(x)))),     x = LayerNorm(r)
    r = r + down(activation(up(x))),            x = LayerNorm(r)
and in a post-norm encoder r = x after each LayerNorm; a pre-norm one carries the sum on.
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
    expert_mlp,
    linear,
    linear_activation,
    linear_invariant,
    pre_layer_norm,
    qk_norm_,
    rotary_,
    rotary_cos_sin,
)


class Encoder:
    """One encoder for every family: an `EncoderSpec` says what it is, `EncoderWeights` hold its tensors.

    attention: over packed qkv, see `backends`.
    row_block: tokens that go through out-projection and MLP together, so that their activations stay in the caches of a
    CPU; None for all at once.
    batch_invariant: products whose bits for a row do not depend on how many rows there are, on CUDA too.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: EncoderWeights,
        *,
        attention: Attention,
        row_block: int | None,
        batch_invariant: bool,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.row_block = row_block
        self.linear = linear_invariant if batch_invariant else linear
        self.linear_activation = linear_invariant if batch_invariant else linear_activation
        self.scale = spec.head_dim**-0.5
        self.alibi_slopes = torch.tensor(spec.alibi_slopes, device=weights.word.device) if spec.alibi else None

    def __call__(self, batch: PackedBatch, states: list[Tensor] | None = None) -> Tensor:
        """The last hidden state of every token: [total_tokens, hidden] in the weights' dtype.

        states: takes the embeddings and what each layer gives, each of the same shape.
        """
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
        residual = x
        if states is not None:
            states.append(x)
        inv_freqs = () if batch.inv_freq is None else batch.inv_freq
        tables = [rotary_cos_sin(batch.positions, inv_freq, batch.cu_seqlens) for inv_freq in inv_freqs]
        for layer, (window, rotary) in zip(weights.layers, self.spec.scopes, strict=True):
            attended = self._attend(x, layer, batch, window, tables[rotary] if tables else None)
            x, residual = self._close(attended, residual, layer)
            if states is not None:
                states.append(residual)
        if states is not None:
            states[-1] = x  # a pre-norm encoder's own differs from its residual
        return x

    def _attend(
        self, x: Tensor, layer: LayerWeights, batch: PackedBatch, window: int | None, cos_sin: Tensor | None
    ) -> Tensor:
        qkv = self.linear(x, layer.qkv, layer.qkv_bias).view(-1, 3, self.spec.heads, self.spec.head_dim)
        if layer.qk_norm is not None:
            qk_norm_(qkv, layer.qk_norm, layer.qk_norm_bias, self.spec.norm_eps)
        if cos_sin is not None:
            rotary_(qkv, cos_sin)
        return self.attention.attend(qkv, batch, self.scale, window, self.alibi_slopes)

    def _close(self, attended: Tensor, residual: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor]:
        """What follows attention, each row by itself, so by blocks of rows: (x, residual) of the next layer."""
        block = self.row_block or len(residual)
        if len(residual) <= block:
            return self._close_block(attended, residual, layer)
        blocks = zip(attended.split(block), residual.split(block), strict=True)
        xs, residuals = zip(*(self._close_block(*rows, layer) for rows in blocks), strict=True)
        x = torch.cat(xs)
        return x, torch.cat(residuals) if self.spec.prenorm else x

    def _close_block(self, attended: Tensor, residual: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor]:
        out = self.linear(attended, layer.out, layer.out_bias)
        if layer.inner_norm is not None:
            out = add_layer_norm(out, residual, layer.inner_norm, layer.inner_norm_bias, self.spec.norm_eps)
        x, residual = self._add_and_norm(out, residual, layer.attention_norm, layer.attention_norm_bias)
        return self._add_and_norm(self._mlp(x, layer), residual, layer.mlp_norm, layer.mlp_norm_bias)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        down: Tensor
        if layer.router is not None and self.spec.experts is not None:
            experts = (layer.router, layer.up, layer.down, layer.down_bias)
            down = expert_mlp(x, *experts, self.spec.experts.top, self.spec.activation)
        else:
            up = self.linear_activation(x, layer.up, layer.up_bias, self.spec.activation)
            down = self.linear(up, layer.down, layer.down_bias)
        return down

    def _add_and_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.prenorm:
            normed, residual = pre_layer_norm(x, residual, weight, bias, self.spec.norm_eps)
            return normed, residual
        x = add_layer_norm(x, residual, weight, bias, self.spec.norm_eps)
        return x, x
