"""Mean pooling in fp32: of each text's packed token rows, or of the rows of a padded batch that a mask selects.

    mean_pool:         y[b] = sum_t hidden[t] / length[b], t over the tokens of text b
    masked_mean_pool:  y[b] = sum_s mask[b, s] * hidden[b, s] / sum_s mask[b, s], a model card's `mean_pooling`

mean_pool sums the chunks of a text first, so that one long text fills a GPU too. Bound by memory: 2 * hidden bytes per
token in 16 bits, read once; masked tokens are not read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels import avx512
from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton

# Tokens per chunk, counted from the text's first token. A mean sums each chunk, then the chunks in order.
CHUNK_T = 128
# Columns per program that reads tokens: 256 bytes of a row in 16 bits.
BLOCK_H = 128
SUM_LAUNCH = {"BLOCK_T": 32, "BLOCK_H": BLOCK_H, "num_warps": 4, "enable_fp_fusion": True}


def mean_pool_reference(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average text by text.

    hidden: [total_tokens, hidden]; cu_seqlens: [batch + 1] int32. Returns [batch, hidden] fp32. The row of a text
    without tokens is zero.
    """
    pooled = torch.zeros(cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for row, start, end in zip(pooled, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if start < end:
            torch.div(hidden[start:end].sum(dim=0, dtype=torch.float32), end - start, out=row)
    return pooled


def masked_mean_pool_reference(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Average the rows of each text.

    hidden: [batch, max_seqlen, hidden]; mask: [batch, max_seqlen], any dtype, 0 for padding. Returns [batch, hidden]
    fp32. The row of a text without tokens is zero. The values of masked tokens do not matter, NaN included.
    """
    counts = mask != 0
    sums = hidden.float().masked_fill(~counts[:, :, None], 0.0).sum(dim=1)
    pooled = sums / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize(pooled, dim=-1) if normalize else pooled


@triton.jit
def _first_chunk(cu_seqlens_ptr, text, CHUNK_T: tl.constexpr):
    """Return the row of a text's first chunk sum. Some rows stay unused, which saves a prefix sum over the chunks."""
    return tl.load(cu_seqlens_ptr + text) // CHUNK_T + text


@triton.jit(do_not_specialize=["batch"])
def _chunk_sums_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    batch,
    stride_ht,
    HIDDEN: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    slot = tl.program_id(0)
    text, beyond = 0, batch  # bisect for the last text with _first_chunk <= slot
    while text + 1 < beyond:
        middle = (text + beyond) // 2
        if _first_chunk(cu_seqlens_ptr, middle, CHUNK_T) <= slot:
            text = middle
        else:
            beyond = middle
    first = tl.load(cu_seqlens_ptr + text) + (slot - _first_chunk(cu_seqlens_ptr, text, CHUNK_T)) * CHUNK_T
    end = tl.load(cu_seqlens_ptr + text + 1)

    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = (h < HIDDEN)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in tl.static_range(0, CHUNK_T, BLOCK_T):
        token = (first + start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        hidden_ptrs = hidden_ptr + token * stride_ht + h[None, :]
        sums += tl.load(hidden_ptrs, mask=(token < end) & h_mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + slot.to(tl.int64) * HIDDEN + h, tl.sum(sums, axis=0), mask=h < HIDDEN)


@triton.jit
def _mean_kernel(
    sums_ptr,
    cu_seqlens_ptr,
    pooled_ptr,
    HIDDEN: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text = tl.program_id(0)
    h = tl.arange(0, BLOCK)
    length = tl.load(cu_seqlens_ptr + text + 1) - tl.load(cu_seqlens_ptr + text)
    first, chunks = _first_chunk(cu_seqlens_ptr, text, CHUNK_T), tl.cdiv(length, CHUNK_T)
    sums = tl.zeros([BLOCK_C, BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK_C):
        chunk = (start + tl.arange(0, BLOCK_C))[:, None]
        mask = (chunk < chunks) & (h < HIDDEN)[None, :]
        sums += tl.load(sums_ptr + (first + chunk).to(tl.int64) * HIDDEN + h[None, :], mask=mask, other=0.0)
    pooled = tl.sum(sums, axis=0) / tl.maximum(length, 1)
    tl.store(pooled_ptr + text.to(tl.int64) * HIDDEN + h, pooled, mask=h < HIDDEN)


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


def mean_pool_triton(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Launch one program per chunk and block of columns, then one per text."""
    (total_tokens, width), batch = hidden.shape, cu_seqlens.shape[0] - 1
    check_rows("hidden", hidden, total_tokens, width)
    check_rows("cu_seqlens", cu_seqlens, batch + 1)
    pooled = torch.empty((batch, width), dtype=torch.float32, device=hidden.device)
    slots = total_tokens // CHUNK_T + batch
    sums = torch.empty((slots, width), dtype=torch.float32, device=hidden.device)
    _chunk_sums_kernel[(slots, triton.cdiv(width, BLOCK_H))](
        hidden, cu_seqlens, sums, batch=batch, stride_ht=hidden.stride(0), HIDDEN=width, CHUNK_T=CHUNK_T, **SUM_LAUNCH
    )
    blocks = {"CHUNK_T": CHUNK_T, "BLOCK_C": 8, "BLOCK": triton.next_power_of_2(width)}
    _mean_kernel[(batch,)](sums, cu_seqlens, pooled, HIDDEN=width, **blocks, num_warps=8, enable_fp_fusion=True)
    return pooled


def masked_mean_pool_triton(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Launch one program per text and block of columns. hidden may be strided by text and token, mask by text."""
    batch, max_seqlen, width = hidden.shape
    check_rows("hidden", hidden, batch, max_seqlen, width)
    check_rows("mask", mask, batch, max_seqlen)
    pooled = torch.empty((batch, width), dtype=torch.float32, device=hidden.device)
    _masked_mean_kernel[(batch, triton.cdiv(width, BLOCK_H))](
        hidden,
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        pooled,
        max_seqlen=max_seqlen,
        stride_hb=hidden.stride(0),
        stride_ht=hidden.stride(1),
        stride_mb=mask.stride(0),
        HIDDEN=width,
        **SUM_LAUNCH,
    )
    return F.normalize(pooled, dim=-1) if normalize else pooled


def mean_pool_cpu(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    if avx512.supports(hidden.dtype) and hidden.stride(-1) == 1 and cu_seqlens.is_contiguous():
        return avx512.mean_pool(hidden, cu_seqlens)
    return mean_pool_reference(hidden, cu_seqlens)


mean_pool = operation(
    mean_pool_reference,
    cpu=mean_pool_cpu,
    fake=lambda hidden, cu_seqlens: hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=torch.float32),
    cuda=mean_pool_triton,
)
masked_mean_pool = operation(masked_mean_pool_reference, cuda=masked_mean_pool_triton)
