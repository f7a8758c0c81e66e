"""Masked mean over padded rows, optionally L2-normalized: a model card's `mean_pooling` and `F.normalize`.

    y[b] = sum_s mask[b, s] * hidden[b, s] / sum_s mask[b, s]

Sums are fp32, in the order of a text's tokens. Bound by memory: 2 * hidden bytes per unmasked token in 16 bits, read
once; masked tokens are not read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton

# Tokens per step, and columns per program: 256 bytes of a row in 16 bits.
_BLOCK_T, _BLOCK_H = 32, 128


def masked_mean_pool_reference(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Average the rows of each text.

    hidden: [batch, max_seqlen, hidden]; mask: [batch, max_seqlen], any dtype, 0 for padding. Returns [batch, hidden]
    fp32. The row of a text without tokens is zero. The values of masked tokens do not matter, NaN included.
    """
    counts = mask != 0
    sums = hidden.float().masked_fill(~counts[:, :, None], 0.0).sum(dim=1)
    pooled = sums / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize(pooled, dim=-1) if normalize else pooled


@triton.jit(do_not_specialize=["max_seqlen"])
def _masked_mean_kernel(
    hidden_ptr,
    mask_ptr,
    pooled_ptr,
    max_seqlen,
    stride_hb,
    stride_ht,
    stride_mb,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    text = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    counts = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, max_seqlen, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        counted = tl.load(mask_ptr + text * stride_mb + token, mask=token < max_seqlen, other=0) != 0
        counts += counted.to(tl.int32)
        hidden_ptrs = hidden_ptr + text * stride_hb + token[:, None] * stride_ht + h[None, :]
        mask = counted[:, None] & (h < HIDDEN)[None, :]
        sums += tl.load(hidden_ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(sums, axis=0) / tl.maximum(tl.sum(counts, axis=0), 1)
    tl.store(pooled_ptr + text * HIDDEN + h, mean, mask=h < HIDDEN)


def masked_mean_pool_triton(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Launch one program per text and block of columns. hidden may be strided by text and token, mask by text."""
    batch, max_seqlen, width = hidden.shape
    check_rows("hidden", hidden, batch, max_seqlen, width)
    check_rows("mask", mask, batch, max_seqlen)
    pooled = torch.empty((batch, width), dtype=torch.float32, device=hidden.device)
    _masked_mean_kernel[(batch, triton.cdiv(width, _BLOCK_H))](
        hidden,
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        pooled,
        max_seqlen=max_seqlen,
        stride_hb=hidden.stride(0),
        stride_ht=hidden.stride(1),
        stride_mb=mask.stride(0),
        HIDDEN=width,
        BLOCK_T=_BLOCK_T,
        BLOCK_H=_BLOCK_H,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return F.normalize(pooled, dim=-1) if normalize else pooled


masked_mean_pool = operation(masked_mean_pool_reference, cuda=masked_mean_pool_triton)
