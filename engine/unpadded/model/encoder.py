"""The forward pass of an encoder over packed tokens: embeddings, then one layer after the other.

One layer is, with x = r in the first one,
    x, r = attention_norm(out(attention(rotary(qkv(x)))), r)
    x, r = mlp_norm(down(activation(up(x))), r)
where a norm returns its result and the next residual: the result too in a post-norm encoder, the sum before it in a
pre-norm one. How a linear is computed, what a family adds to a norm or an MLP, and whether a layer is one call, is in
the objects of `layer`.
"""

import threading
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.checkpoint.spec import EncoderSpec
from unpadded.model.attention import Attention
from unpadded.model.batch import PackedBatch, SelectedTokens
from unpadded.model.layer import RMSNorm
from unpadded.model.lora import TaskWeights
from unpadded.model.weights import EncoderWeights, invariant_weights
from unpadded_kernels import embedding, linear, linear_invariant, rotary_cos_sin
from unpadded_kernels.attention_cpu import biases_by_distance
from unpadded_kernels.avx512 import PackedLinear


class Encoder:
    """One encoder for every family: an `EncoderSpec` describes it, `EncoderWeights` contain its layers.

    attention: over packed qkv, see `attention_backend`.
    batch_invariant: a row's bits do not depend on the number of rows, on CUDA too.

    A runner holds `lock` and runs on `stream`, because the next batch overwrites the weights of a LoRA task and the
    memory of packed layers, which is as large as the largest batch needed.
    """

    def __init__(
        self, spec: EncoderSpec, weights: EncoderWeights, attention: Attention, *, batch_invariant: bool = False
    ) -> None:
        self.spec = spec
        self.weights = invariant_weights(weights) if batch_invariant else weights
        self.linear = linear_invariant if batch_invariant else linear  # for Dense modules after the encoder
        qkv = weights.layers[0].qkv.linear
        int8 = isinstance(qkv, PackedLinear) and qkv.int8
        self.dtype_name = "int8" if int8 else str(weights.word.dtype).removeprefix("torch.")
        self.attention = attention
        self._tasks = TaskWeights(spec.lora, self.weights) if spec.lora else None
        self._scale = spec.head_dim**-0.5
        self._memory = torch.empty(0)
        self.lock = threading.RLock()
        self.stream = torch.cuda.Stream(weights.word.device) if weights.word.is_cuda else None
        self._alibi_slopes = torch.tensor(spec.alibi_slopes, device=weights.word.device) if spec.alibi else None
        self._buckets = torch.tensor(spec.distance_buckets, device=weights.word.device)

    def weights_of(self, adapter: str | None) -> EncoderWeights:
        """Return the weights for a LoRA task, valid until another task is asked for; None: without LoRA."""
        if adapter is None:
            return self.weights
        assert self._tasks is not None, adapter
        return self._tasks.of(adapter)

    def __call__(
        self,
        batch: PackedBatch,
        states: list[Tensor] | None = None,
        *,
        adapter: str | None = None,
        embeds: Tensor | None = None,
        selected: SelectedTokens | None = None,
    ) -> Tensor:
        """Return the last hidden state of every token: [total_tokens, hidden] in the weights' dtype.

        states: a list to which the embeddings and each layer's result are appended, all of the same shape.
        adapter: a LoRA task of the checkpoint. embeds: [rows, hidden] in the weights' dtype, the table that input_ids
        index instead of the word embeddings. selected: return these tokens' states only, [n, hidden]; not together
        with `states`.
        """
        weights = self.weights_of(adapter)
        x, residual = self._embed(batch, weights if embeds is None else replace(weights, word=embeds))
        if states is not None:
            states.append(residual)
        inv_freqs = () if batch.inv_freq is None else batch.inv_freq
        tables = [rotary_cos_sin(batch.positions, inv_freq, batch.cu_seqlens) for inv_freq in inv_freqs]
        bias = weights.position_bias
        if bias is not None:  # in every pass, because the parameters that `accelerate` shares may change
            bias = bias.mT.float().index_select(1, self._buckets)
        for layer, (window, rotary) in zip(weights.layers, self.spec.layer_attention, strict=True):
            cos_sin = tables[rotary] if tables else None
            chosen = selected if layer is weights.layers[-1] else None
            if chosen is not None:
                batch = replace(batch, tile_map=chosen.tile_map)
            if states is None and (packed := layer.packed) is not None:
                if self._memory.numel() < 4 * x.numel():
                    self._memory = torch.empty(4 * x.numel())
                biases = biases_by_distance(batch.max_seqlen, window, self._alibi_slopes, bias)
                mask = batch.cu_seqlens, self._scale, window, biases, batch.key_lengths
                x, residual = packed(
                    x, residual, cos_sin, None if chosen is None else chosen.indices, self._memory, *mask
                )
            else:
                x = self.attention.attend(layer.qkv(x, cos_sin), batch, self._scale, window, self._alibi_slopes, bias)
                if chosen is not None:
                    x, residual = x[chosen.indices], residual[chosen.indices]
                x, residual = layer.attention_norm(layer.out(x), residual)
                x, residual = layer.mlp_norm(layer.mlp(x), residual)
            if states is not None:
                states.append(residual)
        if states is not None:
            states[-1] = x  # the residual of a pre-norm encoder is not normalized
        return x

    def _embed(self, batch: PackedBatch, weights: EncoderWeights) -> tuple[Tensor, Tensor]:
        """Return (x, residual) of the first layer."""
        norm = weights.norm
        if isinstance(norm, RMSNorm):
            return norm(F.embedding(batch.input_ids, weights.word), None)
        tables = (weights.word, weights.token_type, weights.position)
        x = embedding(batch.input_ids, batch.positions, batch.token_types, *tables, norm.weight, norm.bias, norm.eps)
        return x, x
