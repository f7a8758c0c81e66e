"""Masked mean over padded rows, optionally L2-normalized: a model card's `mean_pooling` and `F.normalize`.

    y[b] = sum_s mask[b, s] * hidden[b, s] / sum_s mask[b, s]

Sums are fp32. Bound by memory: 2 * hidden bytes per unmasked token in 16 bits, read once; masked tokens are not read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton
from unpadded_kernels.pooling import (
    BLOCK_C,
    BLOCK_H,
    CHUNK_LAUNCH,
    CHUNK_T,
    TEXT_LAUNCH,
    mean_of_chunks,
    postprocess_and_store,
)


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
def _masked_sums_kernel(
    hidden_ptr,
    mask_ptr,
    sums_ptr,
    max_seqlen,
    stride_hb,
    stride_ht,
    stride_mb,
    HIDDEN: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    chunks = tl.cdiv(max_seqlen, CHUNK_T)
    text = tl.program_id(0).to(tl.int64) // chunks
    first = tl.program_id(0) % chunks * CHUNK_T
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = (h < HIDDEN)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in tl.static_range(0, CHUNK_T, BLOCK_T):
        token = (first + start + tl.arange(0, BLOCK_T)).to(tl.int64)
        counts = tl.load(mask_ptr + text * stride_mb + token, mask=token < max_seqlen, other=0) != 0
        hidden_ptrs = hidden_ptr + text * stride_hb + token[:, None] * stride_ht + h[None, :]
        sums += tl.load(hidden_ptrs, mask=counts[:, None] & h_mask, other=0.0).to(tl.float32)
    sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + h
    tl.store(sums_ptrs, tl.sum(sums, axis=0), mask=h < HIDDEN)


@triton.jit(do_not_specialize=["max_seqlen"])
def _masked_mean_kernel(
    sums_ptr,
    mask_ptr,
    pooled_ptr,
    max_seqlen,
    stride_mb,
    HIDDEN: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    text = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, max_seqlen, BLOCK):
        token_mask = tl.load(mask_ptr + text * stride_mb + start + h, mask=start + h < max_seqlen, other=0)
        counts += (token_mask != 0).to(tl.int32)
    chunks = tl.cdiv(max_seqlen, CHUNK_T)
    pooled = mean_of_chunks(sums_ptr, text * chunks, chunks, tl.sum(counts, axis=0), HIDDEN, BLOCK_C, BLOCK)
    postprocess_and_store(pooled, pooled_ptr, text, HIDDEN, HIDDEN, BLOCK, False, NORMALIZE)


def masked_mean_pool_triton(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Launch one program per chunk and block of columns, then one per text.

    hidden may be strided by text and token, mask by text; their rows must be contiguous.
    """
    batch, max_seqlen, width = hidden.shape
    if mask.shape != (batch, max_seqlen):
        raise ValueError(f"mask must be {(batch, max_seqlen)}, got {tuple(mask.shape)}")
    if hidden.stride(2) != 1 or mask.stride(1) != 1:
        raise ValueError(
            f"rows must be contiguous, got strides {hidden.stride()} and {mask.stride()}: pass .contiguous()"
        )
    pooled = torch.empty((batch, width), dtype=torch.float32, device=hidden.device)
    if batch == 0:
        return pooled
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    chunks = triton.cdiv(max_seqlen, CHUNK_T)
    sums = torch.empty((batch * chunks, width), dtype=torch.float32, device=hidden.device)
    if max_seqlen > 0:
        _masked_sums_kernel[(batch * chunks, triton.cdiv(width, BLOCK_H))](
            hidden,
            mask,
            sums,
            max_seqlen=max_seqlen,
            stride_hb=hidden.stride(0),
            stride_ht=hidden.stride(1),
            stride_mb=mask.stride(0),
            HIDDEN=width,
            **CHUNK_LAUNCH,
        )
    _masked_mean_kernel[(batch,)](
        sums,
        mask,
        pooled,
        max_seqlen=max_seqlen,
        stride_mb=mask.stride(0),
        HIDDEN=width,
        CHUNK_T=CHUNK_T,
        BLOCK_C=BLOCK_C,
        BLOCK=triton.next_power_of_2(width),
        NORMALIZE=normalize,
        **TEXT_LAUNCH,
    )
    return pooled


masked_mean_pool = torch.library.custom_op("unpadded::masked_mean_pool", masked_mean_pool_reference, mutates_args=())
masked_mean_pool.register_kernel("cuda", device_guard(masked_mean_pool_triton))


@masked_mean_pool.register_fake
def _(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[2], dtype=torch.float32)
