"""The forward pass of an encoder over packed tokens, read top-down.

x = r = LayerNorm(embedding(ids)), then in every layer
    r = r + out(attention(rotary(qkv(x)))),     x = LayerNorm(r)
    r = r + down(activation(up(x))),            x = LayerNorm(r)
and in a post-norm encoder r = x after each LayerNorm; a pre-norm one carries the sum on. With RMSNorm in its place the
first r is embedding(ids) as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.checkpoint.spec import EncoderSpec
from unpadded.model.attention import Attention
from unpadded.model.batch import PackedBatch, SelectedTokens
from unpadded.model.lora import AdaptedWeights
from unpadded.model.weights import EncoderWeights, LayerWeights, Matrix
from unpadded_kernels import (
    add_layer_norm,
    add_layer_norm_fp8,
    embedding,
    expert_mlp,
    linear,
    linear_activation,
    linear_fp8,
    linear_invariant,
    linear_rotary,
    pre_layer_norm,
    qk_norm_,
    quantize_rows,
    rms_norm,
    rotary_,
    rotary_cos_sin,
)
from unpadded_kernels.linear_prepacked import PrepackedWeight, linear_prepacked

# What the product of a LayerNorm's rows reads: the rows, or their e4m3 and its scales where its weight is in e4m3.
Rows: TypeAlias = Tensor | tuple[Tensor, Tensor]


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
        self.float8 = weights.layers[0].qkv_scale is not None
        self._adapted = AdaptedWeights(spec.lora, weights) if spec.lora and weights.lora else None
        self.attention = attention
        self.row_block = row_block
        self.batch_invariant = batch_invariant
        self.linear = linear_invariant if batch_invariant else linear
        self.linear_activation = linear_invariant if batch_invariant else linear_activation
        self.scale = spec.head_dim**-0.5
        self.alibi_slopes = torch.tensor(spec.alibi_slopes, device=weights.word.device) if spec.alibi else None

    def prepare(self, adapter: str | None) -> None:
        """Write the weights of a task's adapter, which calls with another one overwrite. `__call__` does it too."""
        if adapter is not None:
            self.weights_of(adapter)

    def __call__(
        self,
        batch: PackedBatch,
        states: list[Tensor] | None = None,
        *,
        adapter: str | None = None,
        embeds: Tensor | None = None,
        selected: SelectedTokens | None = None,
    ) -> Tensor:
        """The last hidden state of every token: [total_tokens, hidden] in the weights' dtype.

        states: takes the embeddings and what each layer gives, each of the same shape. adapter: a task of the
        checkpoint's adapters; None leaves them out. embeds: [rows, hidden] in the weights' dtype, the rows that
        input_ids point to in place of the word table's. selected: return the states of these tokens only, [n, hidden];
        not together with `states`.
        """
        weights = self.weights_of(adapter)
        if embeds is not None:
            weights = replace(weights, word=embeds)
        x, residual = self._embed(batch, weights)
        if states is not None:
            states.append(residual)
        inv_freqs = () if batch.inv_freq is None else batch.inv_freq
        tables = [rotary_cos_sin(batch.positions, inv_freq, batch.cu_seqlens) for inv_freq in inv_freqs]
        for layer, (window, rotary) in zip(weights.layers, self.spec.layer_attention, strict=True):
            rows = None
            if selected is not None and layer is weights.layers[-1]:
                rows = selected.indices
                batch = replace(batch, tile_map=selected.tile_map)
            attended = self._attend(x, layer, batch, window, tables[rotary] if tables else None)
            if rows is not None:
                attended, residual = attended[rows], residual[rows]
            x, residual = self._close(attended, residual, layer)
            if states is not None:
                states.append(residual)
        assert isinstance(x, Tensor), "no product follows the last layer"
        if states is not None:
            states[-1] = x  # a pre-norm encoder's own differs from its residual
        return x

    def weights_of(self, adapter: str | None) -> EncoderWeights:
        """Return the weights with a task's LoRA applied, valid until another task is asked for; None: without LoRA."""
        if adapter is None:
            return self.weights
        assert self._adapted is not None, adapter
        return self._adapted.of(adapter)

    def _embed(self, batch: PackedBatch, weights: EncoderWeights) -> tuple[Rows, Tensor]:
        """(x, residual) of the first layer."""
        if self.spec.rms_norm:
            x, residual = rms_norm(F.embedding(batch.input_ids, weights.word), None, weights.norm, self.spec.norm_eps)
            return quantize_rows(x) if self.float8 else x, residual
        x = embedding(
            batch.input_ids,
            batch.positions,
            batch.token_types,
            weights.word,
            weights.token_type,
            weights.position,
            weights.norm,
            weights.norm_bias,
            self.spec.norm_eps,
        )
        return quantize_rows(x) if self.float8 else x, x

    def _attend(
        self, x: Rows, layer: LayerWeights, batch: PackedBatch, window: int | None, cos_sin: Tensor | None
    ) -> Tensor:
        qkv = self._qkv(x, layer, cos_sin)
        return self.attention.attend(qkv, batch, self.scale, window, self.alibi_slopes)

    def _qkv(self, x: Rows, layer: LayerWeights, cos_sin: Tensor | None) -> Tensor:
        """Packed qkv with q and k normalized and turned: [total_tokens, 3, heads, head_dim]."""
        qkv: Tensor
        plain = layer.qkv_scale is None and isinstance(layer.qkv, Tensor)
        if cos_sin is not None and layer.qk_norm is None and plain:
            qkv = linear_rotary(x, layer.qkv, layer.qkv_bias, cos_sin, self.spec.heads, self.batch_invariant)
            return qkv
        qkv = self._product(x, layer.qkv, layer.qkv_scale, layer.qkv_bias)
        qkv = qkv.view(-1, 3, self.spec.heads, self.spec.head_dim)
        if layer.qk_norm is not None:
            qk_norm_(qkv, layer.qk_norm, layer.qk_norm_bias, self.spec.norm_eps)
        if cos_sin is not None:
            rotary_(qkv, cos_sin)
        return qkv

    def _close(self, attended: Tensor, residual: Tensor, layer: LayerWeights) -> tuple[Rows, Tensor]:
        """What follows attention, each row by itself, so by blocks of rows: (x, residual) of the next layer."""
        block = self.row_block or len(residual)
        if len(residual) <= block:
            return self._close_block(attended, residual, layer)
        blocks = zip(attended.split(block), residual.split(block), strict=True)
        xs, residuals = zip(*(self._close_block(*rows, layer) for rows in blocks), strict=True)
        residual = torch.cat(residuals)
        if xs[0] is residuals[0]:
            return residual, residual
        if isinstance(xs[0], tuple):
            rows, scales = zip(*xs, strict=True)
            return (torch.cat(rows), torch.cat(scales)), residual
        return torch.cat(xs), residual

    def _close_block(self, attended: Tensor, residual: Tensor, layer: LayerWeights) -> tuple[Rows, Tensor]:
        out = self._product(attended, layer.out, None, layer.out_bias)
        if layer.inner_norm is not None:
            out = add_layer_norm(out, residual, layer.inner_norm, layer.inner_norm_bias, self.spec.norm_eps)
        norm = layer.attention_norm, layer.attention_norm_bias
        x, residual = self._add_and_norm(out, residual, *norm, float8=layer.up_scale is not None)
        another = self.float8 and layer is not self.weights.layers[-1]
        norm = layer.mlp_norm, layer.mlp_norm_bias
        return self._add_and_norm(self._mlp(x, layer), residual, *norm, float8=another)

    def _mlp(self, x: Rows, layer: LayerWeights) -> Tensor:
        down: Tensor
        if layer.router is not None and self.spec.experts is not None:
            experts = (layer.router, layer.up, layer.down, layer.down_bias)
            down = expert_mlp(x, *experts, self.spec.experts.top_k, self.spec.activation)
        else:
            up = self._product(x, layer.up, layer.up_scale, layer.up_bias, self.spec.activation)
            down = self._product(up, layer.down, None, layer.down_bias)
        return down

    def _product(
        self, x: Rows, weight: Matrix, scale: Tensor | None, bias: Tensor | None, kind: str | None = None
    ) -> Tensor:
        y: Tensor
        if isinstance(weight, PrepackedWeight):
            assert isinstance(x, Tensor), "no weight in e4m3 is prepacked"
            y = linear_prepacked(x, weight, bias)
        elif isinstance(x, tuple):
            y = linear_fp8(*x, weight, scale, bias, kind, self.weights.word.dtype)
        elif kind is None:
            y = self.linear(x, weight, bias)
        else:
            y = self.linear_activation(x, weight, bias, kind)
        return y

    def _add_and_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, float8: bool
    ) -> tuple[Rows, Tensor]:
        """(x, residual) of what follows. float8: whether that is a product of e4m3."""
        if self.spec.rms_norm:
            x, residual = rms_norm(x, residual, weight, self.spec.norm_eps)
        elif self.spec.prenorm:
            x, residual = pre_layer_norm(x, residual, weight, bias, self.spec.norm_eps)
        elif float8:
            residual, rows, scale = add_layer_norm_fp8(x, residual, weight, bias, self.spec.norm_eps)
            return (rows, scale), residual
        else:
            x = residual = add_layer_norm(x, residual, weight, bias, self.spec.norm_eps)
        return quantize_rows(x) if float8 else x, residual
