"""Variable-length bidirectional attention over packed qkv: every token attends to the tokens of its own text.

    out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[i, j]) v[j]
    bias[i, j] = -slope[head] * |i - j| with ALiBi (Press et al., arXiv 2108.12409), and -inf where |i - j| > window

Bound by arithmetic and by exp: 4 * length * heads * head_dim flops and length * heads exponentials per token.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import TensorDescriptor, device_guard, triton
from unpadded_kernels.attention_bias import attend_biased
from unpadded_kernels.attention_kernels import _attention_kernel
from unpadded_kernels.linear import linear_cpu
from unpadded_kernels.tiles import attention_block_m, attention_tile, generation

_LOG2_E = math.log2(math.e)

# On a CPU, texts longer than this go head by head through oneDNN (EPYC, 2026-11, head_dim 64: from 320 tokens in fp32,
# where scaled_dot_product_attention stays at 170 GFLOP/s and this reaches 300; from 1024 in bf16).
_CPU_LONG = {torch.float32: 384, torch.bfloat16: 768}
# Queries of a block there: 512 x 8192 fp32 scores are 16 MiB, within a last-level cache.
_CPU_BLOCK_Q = 512
# Scores held at once by the batched products of short texts: beyond 32 MiB every allocation is mapped and faulted anew.
_CPU_SCORES = 2**22


def attention_reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
) -> Tensor:
    """Text by text, in fp32.

    qkv: [total_tokens, 3, heads, head_dim]; cu_seqlens: [batch + 1] int32; max_seqlen: the longest text, in tokens;
    window: the farthest key a query sees, in tokens, or None for all; alibi_slopes: [heads] fp32 or None; tile_map:
    what the kernels run over, made by `make_tile_map`, or some of its rows, when they leave the other queries' results
    unwritten; not needed here. Returns [total_tokens, heads * head_dim] in qkv's dtype.
    """
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads, head_dim)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = qkv[start:end].to(torch.promote_types(qkv.dtype, torch.float32)).permute(1, 2, 0, 3)
        position = torch.arange(end - start, device=qkv.device)
        for block in position.split(_CPU_BLOCK_Q):
            scores = q[:, block] @ k.transpose(1, 2) * scale  # [heads, block, length]
            distance = (block[:, None] - position).abs()
            if alibi_slopes is not None:
                scores -= alibi_slopes[:, None, None] * distance
            if window is not None:
                scores.masked_fill_(distance > window, float("-inf"))
            out[start + block] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out.view(total_tokens, heads * head_dim)


def attention_cpu(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
) -> Tensor:
    """Neighbors of equal length together, without masks; each text's bits depend on its own rows and length alone.

    tile_map counts for long texts, which go block by block.
    """
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads, head_dim)
    block_m = attention_block_m(qkv.dtype, head_dim, qkv.device)
    asked: dict[int, list[slice]] = {}
    for first, _, block in [] if tile_map is None else tile_map.tolist():
        asked.setdefault(first, []).append(slice(block * block_m, (block + 1) * block_m))
    start = 0
    for length, run in itertools.groupby(cu_seqlens.diff().tolist()):
        if length == 0:
            continue
        texts = len(list(run))
        rows = slice(start, start + texts * length)
        start = rows.stop
        group = qkv[rows].view(texts, length, 3, heads, head_dim)
        out_group = out[rows].view(texts, length, heads, head_dim)
        if alibi_slopes is not None or (window is not None and length > window + 1):
            attend_biased(group, out_group, scale, window, alibi_slopes)
        elif length > _CPU_LONG.get(qkv.dtype, length):
            firsts = range(rows.start, rows.stop, length)
            for first, text, out_text in zip(firsts, group, out_group, strict=True):
                for queries in [slice(0, length)] if tile_map is None else asked.get(first, []):
                    _attend_head_by_head(text, out_text, scale, queries=queries)
        elif qkv.dtype == torch.bfloat16:
            at_once = max(1, _CPU_SCORES // (heads * length * length))
            for texts_block, out_block in zip(group.split(at_once), out_group.split(at_once), strict=True):
                _attend_batched(texts_block, out_block, scale)
        else:
            q, k, v = group.permute(2, 0, 3, 1, 4)
            out_group.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))
    return out.view(total_tokens, heads * head_dim)


def _attend_batched(qkv: Tensor, out: Tensor, scale: float) -> None:
    """Every text and head in two batched products. qkv: [texts, length, 3, heads, head_dim]; writes out."""
    texts, length, _, heads, head_dim = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, texts * heads, length, head_dim)
    weights = torch.bmm(q * scale, k.transpose(1, 2)).softmax(-1)
    out.copy_(torch.bmm(weights, v).view(texts, heads, length, head_dim).transpose(1, 2))


def _attend_head_by_head(qkv: Tensor, out: Tensor, scale: float, *, queries: slice) -> None:
    """Queries of one text, a block of one head at a time, by oneDNN's linear. qkv: [length, 3, heads, head_dim]."""
    # Contiguous copies: the product's bits follow its operands' layout, which must not depend on the batch.
    q, k, v = qkv.permute(1, 2, 0, 3)
    q, k, v_transposed = (q[:, queries] * scale).contiguous(), k.contiguous(), v.transpose(1, 2).contiguous()
    out = out[queries]
    for head in range(q.shape[0]):
        for q_block, out_block in zip(q[head].split(_CPU_BLOCK_Q), out[:, head].split(_CPU_BLOCK_Q), strict=True):
            weights = linear_cpu(q_block, k[head], None).softmax(-1)
            out_block.copy_(linear_cpu(weights, v_transposed[head], None))


def make_tile_map(lengths: Sequence[int], block_m: int) -> Tensor:
    """Return the tiles that the kernel runs over, longest texts first: [tiles, 3] int32.

    A row is (first token of the text, number of its tokens, index of a block of block_m queries). block_m: from
    `attention_block_m`.
    """
    lengths_ = torch.tensor(lengths, dtype=torch.int64)
    starts = lengths_.cumsum(0) - lengths_
    lengths_, order = torch.sort(lengths_, descending=True, stable=True)
    blocks = (lengths_ + block_m - 1) // block_m
    before = blocks.cumsum(0) - blocks
    text = torch.arange(len(blocks)).repeat_interleave(blocks)
    block = torch.arange(len(text)) - before[text]
    return torch.stack((starts[order][text], lengths_[text], block), dim=1).to(torch.int32)


def _takes_descriptors(qkv: Tensor, head_dim: int) -> bool:
    """Whether one tensor descriptor reaches every head of packed qkv."""
    packed = qkv.stride(1) == qkv.shape[2] * head_dim and qkv.stride(2) == head_dim
    aligned = qkv.data_ptr() % 16 == 0 and qkv.stride(0) * qkv.itemsize % 16 == 0
    return packed and aligned and head_dim >= 16 and head_dim.bit_count() == 1


def attention_triton(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
) -> Tensor:
    """A tile of one head per program. Without tile_map it is built here, which waits for the GPU."""
    total_tokens, _, heads, head_dim = qkv.shape
    if qkv.stride(3) != 1:
        raise ValueError(f"the rows of a head must be contiguous, got strides {qkv.stride()}: pass .contiguous()")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 tokens or more, got {window}: use None for all")
    tile = attention_tile(qkv.dtype, head_dim, generation(qkv.device))
    out = torch.empty((total_tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    if total_tokens == 0:
        return out
    if tile.tma and not _takes_descriptors(qkv, head_dim):
        tile = attention_tile(qkv.dtype, head_dim, 80)
    if tile_map is None:
        tile_map = make_tile_map(cu_seqlens.diff().tolist(), tile.block_m).to(qkv.device)
    q_source = kv_source = qkv
    if tile.tma:
        shape, strides = [total_tokens, 3 * heads * head_dim], [qkv.stride(0), 1]
        q_source = TensorDescriptor(qkv, shape, strides, [tile.block_m, head_dim])
        kv_source = TensorDescriptor(qkv, shape, strides, [tile.block_n, head_dim])
    _attention_kernel[(tile_map.shape[0] * heads,)](
        q_source,
        kv_source,
        tile_map,
        alibi_slopes,
        out,
        stride_qt=qkv.stride(0),
        stride_qs=qkv.stride(1),
        stride_qh=qkv.stride(2),
        stride_ot=out.stride(0),
        scale=scale * _LOG2_E,
        window=window or 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        TMA=tile.tma,
        # with a window or ALiBi the registers it takes would spill
        OVERLAP=tile.overlap and window is None and alibi_slopes is None,
        HAS_WINDOW=window is not None,
        HAS_ALIBI=alibi_slopes is not None,
        **tile.launch,
    )
    return out


attention = torch.library.custom_op("unpadded::attention", attention_reference, mutates_args=())
attention.register_kernel("cpu", attention_cpu)
attention.register_kernel("cuda", device_guard(attention_triton))


@attention.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])
