"""Mean pooling: the mean of each text's packed token rows, in fp32.

The chunks of a text are summed first, so that one long text fills a GPU too. Bound by memory: 2 * hidden bytes per
token in 16 bits, read once.
"""

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton

# Tokens per chunk, counted from the text's first token. A mean sums each chunk, then the chunks in order.
CHUNK_T = 128
BLOCK_T = 32
# Columns per program of a chunk: 256 bytes of a row in 16 bits.
BLOCK_H = 128
CHUNK_LAUNCH = {"CHUNK_T": CHUNK_T, "BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "num_warps": 4, "enable_fp_fusion": True}
MEAN_LAUNCH = {"CHUNK_T": CHUNK_T, "BLOCK_C": 8, "num_warps": 8, "enable_fp_fusion": True}  # BLOCK_C: chunks per step


def mean_pool_reference(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average text by text.

    hidden: [total_tokens, hidden]; cu_seqlens: [batch + 1] int32. Returns [batch, hidden] fp32. The row of a text
    without tokens is zero.
    """
    pooled = torch.zeros(cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    bounds = cu_seqlens.tolist()
    for row, start, end in zip(pooled, bounds, bounds[1:], strict=False):
        if start < end:
            torch.div(hidden[start:end].sum(dim=0, dtype=torch.float32), end - start, out=row)
    return pooled


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
        sums += tl.load(hidden_ptr + token * stride_ht + h[None, :], mask=(token < end) & h_mask, other=0.0).to(
            tl.float32
        )
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


def mean_pool_triton(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Launch one program per chunk and block of columns, then one per text."""
    (total_tokens, width), batch = hidden.shape, cu_seqlens.shape[0] - 1
    check_rows("hidden", hidden, total_tokens, width)
    check_rows("cu_seqlens", cu_seqlens, batch + 1)
    pooled = torch.empty((batch, width), dtype=torch.float32, device=hidden.device)
    slots = total_tokens // CHUNK_T + batch
    sums = torch.empty((slots, width), dtype=torch.float32, device=hidden.device)
    _chunk_sums_kernel[(slots, triton.cdiv(width, BLOCK_H))](
        hidden, cu_seqlens, sums, batch=batch, stride_ht=hidden.stride(0), HIDDEN=width, **CHUNK_LAUNCH
    )
    _mean_kernel[(batch,)](sums, cu_seqlens, pooled, HIDDEN=width, BLOCK=triton.next_power_of_2(width), **MEAN_LAUNCH)
    return pooled


mean_pool = operation(
    mean_pool_reference,
    fake=lambda hidden, cu_seqlens: hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=torch.float32),
    cuda=mean_pool_triton,
)
