"""NomicBERT over packed tokens with PyTorch's operations only, to compare with: no kernel of this project runs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.engine import Engine
from unpadded.execution.scheduler import schedule
from unpadded.model.batch import PackedBatch, pack
from unpadded.model.weights import plain_weights
from unpadded_kernels.activation import activation_reference
from unpadded_kernels.embedding import embedding_reference
from unpadded_kernels.layer_norm import add_layer_norm_reference
from unpadded_kernels.pooling import mean_pool_reference
from unpadded_kernels.rotary import rotary_cos_sin_reference


class PackedBaseline:
    """Runs the batches of an engine with F.linear, PyTorch's variable-length attention and elementwise operations."""

    def __init__(self, engine: Engine) -> None:
        self.runner, self.token_budget = engine._pipeline.runner, engine._pipeline.token_budget
        self.weights = plain_weights(self.runner.encoder.weights)

    @torch.inference_mode()
    def __call__(self, ids: list[np.ndarray]) -> np.ndarray:
        batches = schedule([len(row) for row in ids], self.token_budget)
        pooled = torch.cat([self.forward([ids[i] for i in batch]) for batch in batches])
        return pooled.cpu().numpy()[np.argsort(np.concatenate(batches))]

    def forward(self, ids: list[np.ndarray]) -> Tensor:
        spec, weights = self.runner.encoder.spec, self.weights
        batch: PackedBatch = self.runner.to_device(pack(ids, spec))
        x = embedding_reference(
            *(batch.input_ids, batch.positions, None, weights.word, weights.token_type, None),
            *(weights.norm.weight, weights.norm.bias, spec.norm_eps),
        )
        assert batch.inv_freq is not None
        cos_sin = rotary_cos_sin_reference(batch.positions, batch.inv_freq[0], batch.cu_seqlens)
        for layer in weights.layers:
            qkv = F.linear(x, layer.qkv.linear.weight).view(-1, 3, spec.heads, spec.head_dim)
            rotate(qkv, cos_sin)
            out = F.linear(varlen_attention(qkv, batch, spec.head_dim**-0.5), layer.out.weight)
            x = add_layer_norm_reference(out, x, layer.attention_norm.weight, layer.attention_norm.bias, spec.norm_eps)
            up = activation_reference(F.linear(x, layer.mlp.up.weight), spec.activation)
            down = F.linear(up, layer.mlp.down.weight)
            x = add_layer_norm_reference(down, x, layer.mlp_norm.weight, layer.mlp_norm.bias, spec.norm_eps)
        return mean_pool_reference(x, batch.cu_seqlens)


def rotate(qkv: Tensor, cos_sin: Tensor) -> None:
    """Rotate q and k in place at once; `rotary_reference` does it in blocks, which suits a CPU only."""
    qk = qkv[:, :2]
    first, second = qk.float().chunk(2, dim=-1)
    cos, sin = cos_sin[:, None, None].chunk(2, dim=-1)
    qk.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def varlen_attention(qkv: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    longest = batch.max_seqlen
    if qkv.is_cuda:
        q, k, v = qkv.unbind(1)
        cu_seqlens = batch.cu_seqlens
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False, scale=scale)[0].flatten(1)
    texts = (text.permute(1, 2, 0, 3) for text in qkv.split(batch.lengths))
    return torch.cat([F.scaled_dot_product_attention(*text, scale=scale).transpose(0, 1) for text in texts]).flatten(1)
