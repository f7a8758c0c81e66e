"""Pooling: one fp32 row per text from its packed token rows, then optional steps on that row.

    mean: sum of the text's rows / their number      cls: its first row      last: its last row
    then: layer norm without affine parameters (nomic's matryoshka), truncation to `dimensions`, L2 normalization

Sums are fp32, over chunks of one text, so that a single long text fills a GPU too. Bound by memory: 2 * hidden bytes
per token in 16 bits, read once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton

# Tokens per chunk, counted from the text's first token. A mean sums each chunk, then the chunks in order.
CHUNK_T = 128
BLOCK_T = 32
# Columns per program of a chunk: 256 bytes of a row in 16 bits.
BLOCK_H = 128
# Chunk sums per step of the kernel that adds them up.
BLOCK_C = 8
# Launch options of the kernels with one program per chunk, and of those with one per text.
CHUNK_LAUNCH = {"CHUNK_T": CHUNK_T, "BLOCK_T": BLOCK_T, "BLOCK_H": BLOCK_H, "num_warps": 4, "enable_fp_fusion": True}
TEXT_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


def matryoshka(pooled: Tensor, layer_norm: bool, dimensions: int, normalize: bool) -> Tensor:
    """Apply the steps after pooling. pooled: [batch, hidden] fp32. Returns [batch, dimensions] fp32."""
    if layer_norm:
        pooled = F.layer_norm(pooled, pooled.shape[-1:])
    pooled = pooled[:, :dimensions]
    return F.normalize(pooled, dim=-1) if normalize else pooled.contiguous()


def pool_reference(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, layer_norm: bool, dimensions: int, normalize: bool
) -> Tensor:
    """Pool text by text.

    hidden: [total_tokens, hidden]; cu_seqlens: [batch + 1] int32; mode: mean, cls or last. Returns [batch, dimensions]
    fp32. The row of a text without tokens is zero.
    """
    if mode not in ("mean", "cls", "last"):
        raise ValueError(f"unknown pooling {mode!r}: use mean, cls or last")
    pooled = torch.zeros(cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    bounds = cu_seqlens.tolist()
    for row, start, end in zip(pooled, bounds, bounds[1:], strict=False):
        if start == end:
            continue
        if mode == "mean":
            torch.div(hidden[start:end].sum(dim=0, dtype=torch.float32), end - start, out=row)
        else:
            row.copy_(hidden[start if mode == "cls" else end - 1])
    return matryoshka(pooled, layer_norm, dimensions, normalize)


@triton.jit
def postprocess_and_store(
    pooled,
    pooled_ptr,
    text,
    HIDDEN: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Apply the steps after pooling to one fp32 row and store it."""
    h = tl.arange(0, BLOCK)
    if LAYER_NORM:
        mean = tl.sum(pooled, axis=0) / HIDDEN
        centered = tl.where(h < HIDDEN, pooled - mean, 0.0)
        pooled = centered * (1 / tl.sqrt(tl.sum(centered * centered, axis=0) / HIDDEN + 1e-5))
    pooled = tl.where(h < DIMENSIONS, pooled, 0.0)
    if NORMALIZE:
        pooled = pooled / tl.maximum(tl.sqrt(tl.sum(pooled * pooled, axis=0)), 1e-12)
    tl.store(pooled_ptr + text.to(tl.int64) * DIMENSIONS + h, pooled, mask=h < DIMENSIONS)


@triton.jit
def mean_of_chunks(sums_ptr, first, chunks, length, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of rows first .. first + chunks of sums_ptr, divided by length."""
    h = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK_C, BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK_C):
        chunk = (start + tl.arange(0, BLOCK_C))[:, None]
        mask = (chunk < chunks) & (h < HIDDEN)[None, :]
        sums += tl.load(sums_ptr + (first + chunk).to(tl.int64) * HIDDEN + h[None, :], mask=mask, other=0.0)
    return tl.sum(sums, axis=0) / tl.maximum(length, 1)


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
    DIMENSIONS: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    text = tl.program_id(0)
    length = tl.load(cu_seqlens_ptr + text + 1) - tl.load(cu_seqlens_ptr + text)
    first = _first_chunk(cu_seqlens_ptr, text, CHUNK_T)
    pooled = mean_of_chunks(sums_ptr, first, tl.cdiv(length, CHUNK_T), length, HIDDEN, BLOCK_C, BLOCK)
    postprocess_and_store(pooled, pooled_ptr, text, HIDDEN, DIMENSIONS, BLOCK, LAYER_NORM, NORMALIZE)


@triton.jit
def _token_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    pooled_ptr,
    stride_ht,
    HIDDEN: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    text = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + text)
    end = tl.load(cu_seqlens_ptr + text + 1)
    token = start.to(tl.int64)
    if LAST:
        token = end.to(tl.int64) - 1
    h = tl.arange(0, BLOCK)
    mask = h < tl.where(start < end, HIDDEN, 0)  # the row of a text without tokens is zero
    pooled = tl.load(hidden_ptr + token * stride_ht + h, mask=mask, other=0.0).to(tl.float32)
    postprocess_and_store(pooled, pooled_ptr, text, HIDDEN, DIMENSIONS, BLOCK, LAYER_NORM, NORMALIZE)


def pool_triton(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, layer_norm: bool, dimensions: int, normalize: bool
) -> Tensor:
    """Launch one program per text; for mean, first one program per chunk and block of columns."""
    (total_tokens, width), batch = hidden.shape, cu_seqlens.shape[0] - 1
    if mode not in ("mean", "cls", "last"):
        raise ValueError(f"unknown pooling {mode!r}: use mean, cls or last")
    if not 0 < dimensions <= width:
        raise ValueError(f"dimensions must be between 1 and {width}, got {dimensions}")
    if hidden.stride(1) != 1 or not cu_seqlens.is_contiguous():
        raise ValueError(f"rows must be contiguous, got strides {hidden.stride()}: pass .contiguous()")
    pooled = torch.empty((batch, dimensions), dtype=torch.float32, device=hidden.device)
    if batch == 0:
        return pooled
    block = triton.next_power_of_2(width)
    steps = {"LAYER_NORM": layer_norm, "NORMALIZE": normalize, **TEXT_LAUNCH}
    if mode != "mean":
        _token_kernel[(batch,)](
            hidden,
            cu_seqlens,
            pooled,
            stride_ht=hidden.stride(0),
            HIDDEN=width,
            DIMENSIONS=dimensions,
            BLOCK=block,
            LAST=mode == "last",
            **steps,
        )
        return pooled
    slots = total_tokens // CHUNK_T + batch
    sums = torch.empty((slots, width), dtype=torch.float32, device=hidden.device)
    _chunk_sums_kernel[(slots, triton.cdiv(width, BLOCK_H))](
        hidden,
        cu_seqlens,
        sums,
        batch=batch,
        stride_ht=hidden.stride(0),
        HIDDEN=width,
        **CHUNK_LAUNCH,
    )
    _mean_kernel[(batch,)](
        sums,
        cu_seqlens,
        pooled,
        HIDDEN=width,
        DIMENSIONS=dimensions,
        CHUNK_T=CHUNK_T,
        BLOCK_C=BLOCK_C,
        BLOCK=block,
        **steps,
    )
    return pooled


pool = torch.library.custom_op("unpadded::pool", pool_reference, mutates_args=())
pool.register_kernel("cuda", device_guard(pool_triton))


@pool.register_fake
def _(hidden: Tensor, cu_seqlens: Tensor, mode: str, layer_norm: bool, dimensions: int, normalize: bool) -> Tensor:
    return hidden.new_empty(cu_seqlens.shape[0] - 1, dimensions, dtype=torch.float32)
