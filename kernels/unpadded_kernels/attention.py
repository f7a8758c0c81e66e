"""Variable-length bidirectional attention over packed qkv: every token attends to the tokens of its own text.

    out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[i, j]) v[j]
    bias[i, j] = -slope[head] * |i - j| with ALiBi (Press et al., arXiv 2108.12409), position_bias[head, j - i] as in T5
    (Raffel et al., arXiv 1910.10683), and -inf where |i - j| > window

A text can have fewer keys than tokens, which are its first tokens. A query without a key in its window gets 0.

Bound by arithmetic and by exp: 4 * length * heads * head_dim flops and length * heads exponentials per token.

One program of the kernel computes one head of one tile of queries: it loops over the keys of the text with an online
softmax (Milakov and Gimelshein, arXiv 1805.02867) in powers of two. Whole blocks of keys need no mask; a partial block
at the end of the text follows after the loop. Loads go through pointers or, from sm_90 on, tensor descriptors (TMA).
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import TensorDescriptor, check_rows, fast_divide, tl, triton
from unpadded_kernels.attention_cpu import attention_cpu
from unpadded_kernels.tiles import attention_tile, generation


def attention_reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
    position_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attend text by text, in fp32.

    qkv: [total_tokens, 3, heads, head_dim]; cu_seqlens: [batch + 1] int32; max_seqlen: tokens of the longest text;
    window: maximum distance from a query to a key in tokens, or None for full attention; alibi_slopes: [heads] fp32 or
    None; tile_map: from `make_tile_map`, or some of its rows: the results of the other queries are then undefined.
    Ignored here; position_bias: [heads, 2 * reach + 1] fp32 or None, a bias per distance key - query from -reach to
    reach, the first and last also for those beyond; key_lengths: [batch] int32, how many first tokens of each text are
    keys, at least 1, or None for all. Returns [total_tokens, heads * head_dim] in qkv's dtype.
    """
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads, head_dim)
    keys = cu_seqlens.diff() if key_lengths is None else key_lengths
    for (start, end), count in zip(itertools.pairwise(cu_seqlens.tolist()), keys.tolist(), strict=True):
        q, k, v = qkv[start:end].to(torch.promote_types(qkv.dtype, torch.float32)).permute(1, 2, 0, 3)
        position = torch.arange(end - start, device=qkv.device)
        for block in position.split(512):  # bounds the memory
            scores = q[:, block] @ k.transpose(1, 2) * scale  # [heads, block, length]
            distance = (block[:, None] - position).abs()
            if alibi_slopes is not None:
                scores -= alibi_slopes[:, None, None] * distance
            if position_bias is not None:
                reach = position_bias.shape[1] // 2
                scores += position_bias[:, (position - block[:, None]).clamp(-reach, reach) + reach]
            hidden = position >= count
            if window is not None:
                hidden = hidden | (distance > window)
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(hidden, 0.0)
            out[start + block] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out.view(total_tokens, heads * head_dim)


@triton.jit
def _load(source, text_start, row, column, length, stride_qt, MASKED, TMA, HEAD_DIM, BLOCK_R, BLOCK_D):
    """Load BLOCK_R rows of a text from `row` on, at one column of packed qkv.

    source: a tensor descriptor if TMA, else a pointer. MASKED: rows may exceed the text; a pointer load returns
    zeros for them, a descriptor load the rows of the next text.
    """
    if TMA:
        x = source.load([text_start + row, column])
    else:
        rows, d = row + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
        mask = (d < HEAD_DIM)[None, :]
        if MASKED:
            mask = mask & (rows < length)[:, None]
        x = tl.load(source + (text_start + rows).to(tl.int64)[:, None] * stride_qt + column + d, mask=mask, other=0.0)
    return x


@triton.jit
def _softmax(
    scores, highest, total, query, key, length, scale, slope, biases, window, IS_TAIL, HAS_WINDOW, HAS_ALIBI, REACH
):
    """Add one block of keys to an online softmax. Return the new (highest, total, weights, decay), all fp32.

    highest: maximum score; total: sum of the weights; weights: exp2(score - highest) of this block; decay: the factor
    for the sums of earlier blocks; biases: those of the distances from -REACH on, in the unit of the scores.
    """
    if HAS_ALIBI:
        scores -= slope * tl.abs(query[:, None] - key[None, :])
    if REACH:
        index = (key.to(tl.int32) + REACH)[None, :] - query.to(tl.int32)[:, None]
        index = tl.minimum(tl.maximum(index, 0), 2 * REACH)
        # a load of so many would be coalesced, and its values would pass through shared memory to the layout of scores
        scores += tl.reshape(tl.gather(biases, tl.reshape(index, [index.numel]), 0), scores.shape)
    if HAS_WINDOW:
        scores = tl.where(tl.abs(query[:, None] - key[None, :]) <= window, scores, float("-inf"))
    if IS_TAIL:
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    origin = new_highest
    if HAS_WINDOW:
        # before the window of a row starts, -inf - -inf would be NaN
        origin = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.math.exp2(scores * scale - origin[:, None])
    decay = tl.math.exp2(highest - origin)
    return new_highest, total * decay + tl.sum(weights, axis=1), weights, decay


@triton.jit(do_not_specialize=["window"])
def _attention_kernel(
    q_source,
    kv_source,
    tile_map_ptr,
    alibi_slopes_ptr,
    position_bias_ptr,
    out_ptr,
    stride_qt,
    stride_qs,
    stride_qh,
    scale,
    window,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    REACH: tl.constexpr,
):
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row_ptr = tile_map_ptr + (4 if HAS_KEYS else 3) * tile
    text_start = tl.load(row_ptr)
    length = tl.load(row_ptr + 1)
    first = tl.load(row_ptr + 2) * BLOCK_M
    if first >= length:  # a captured graph pads its map with empty tiles
        return
    keys = length
    if HAS_KEYS:
        keys = tl.load(row_ptr + 3)
    slope, biases = 0.0, 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes_ptr + head) * 1.4426950408889634 / scale
    if REACH:
        index = tl.minimum(tl.arange(0, triton.next_power_of_2(2 * REACH + 1)), 2 * REACH)
        biases = tl.load(position_bias_ptr + head * (2 * REACH + 1) + index) * 1.4426950408889634 / scale

    query, n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    query_position = query.to(tl.float32)
    q_column = head * stride_qh
    k_column, v_column = q_column + stride_qs, q_column + 2 * stride_qs
    q = _load(q_source, text_start, first, q_column, length, stride_qt, True, TMA, HEAD_DIM, BLOCK_M, BLOCK_D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # the keys: whole blocks from `start` to `whole`, then a partial one if `tail`
    start = 0
    whole = keys // BLOCK_N * BLOCK_N
    tail = whole < keys
    if HAS_WINDOW:
        start = tl.maximum(first - window, 0) // BLOCK_N * BLOCK_N
        window_end = first + BLOCK_M + window
        tail = tail & (whole < window_end)
        whole = tl.minimum(whole, tl.cdiv(window_end, BLOCK_N) * BLOCK_N)
    for block in range(start, whole, BLOCK_N):
        k = _load(kv_source, text_start, block, k_column, keys, stride_qt, False, TMA, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = _load(kv_source, text_start, block, v_column, keys, stride_qt, False, TMA, HEAD_DIM, BLOCK_N, BLOCK_D)
        highest, total, weights, decay = _softmax(
            *(scores, highest, total, query_position, (block + n).to(tl.float32), keys, scale, slope, biases),
            *(window, False, HAS_WINDOW, HAS_ALIBI, REACH),
        )
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    if tail:
        k = _load(kv_source, text_start, whole, k_column, keys, stride_qt, True, TMA, HEAD_DIM, BLOCK_N, BLOCK_D)
        v = _load(kv_source, text_start, whole, v_column, keys, stride_qt, True, TMA, HEAD_DIM, BLOCK_N, BLOCK_D)
        if TMA:
            # 0 * NaN and 0 * inf are NaN: drop the rows of the next text
            v = tl.where((whole + n < keys)[:, None], v, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        highest, total, weights, decay = _softmax(
            *(scores, highest, total, query_position, (whole + n).to(tl.float32), keys, scale, slope, biases),
            *(window, True, HAS_WINDOW, HAS_ALIBI, REACH),
        )
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    if HAS_KEYS:  # a query whose window has no key
        total = tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + (text_start + query).to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + d[None, :]
    y = acc * fast_divide(1.0, total)[:, None]
    tl.store(out_ptrs, y, mask=(query < length)[:, None] & (d < HEAD_DIM)[None, :])


def make_tile_map(lengths: Sequence[int], block_m: int, key_lengths: Tensor | None = None) -> Tensor:
    """Return the tiles that the kernel runs over, longest texts first: [tiles, 3] int32, [tiles, 4] with key_lengths.

    A row is (first token of the text, number of its tokens, index of a block of block_m queries, number of keys).
    block_m: from `attention_block_m`; key_lengths: as in `attention_reference`, on the host.
    """
    # By numpy, because torch's threads would wait for each other while a tokenizer uses all cores.
    tokens = torch.empty(len(lengths), dtype=torch.int32).numpy()
    tokens[:] = lengths
    starts = tokens.cumsum() - tokens
    order = (-tokens).argsort(kind="stable")
    blocks = -(-tokens[order] // block_m)
    text = order.repeat(blocks)
    tile_map = torch.empty(len(text), 3 if key_lengths is None else 4, dtype=torch.int32)
    columns = tile_map.numpy().T
    columns[0], columns[1] = starts[text], tokens[text]
    columns[2] = (text >= 0).cumsum() - 1 - (blocks.cumsum() - blocks).repeat(blocks)
    if key_lengths is not None:
        columns[3] = key_lengths.numpy()[text]
    return tile_map


def _takes_descriptors(qkv: Tensor, head_dim: int) -> bool:
    """Return whether one tensor descriptor can address every head of packed qkv."""
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
    position_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Launch one program per tile and head. Without tile_map it is built here, which waits for the GPU."""
    total_tokens, _, heads, head_dim = qkv.shape
    check_rows("qkv", qkv, total_tokens, 3, heads, head_dim)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}: use head_dim**-0.5")
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 tokens or more, got {window}: use None for full attention")
    if position_bias is not None:
        check_rows("position_bias", position_bias, heads, position_bias.shape[1] | 1)
        position_bias = position_bias.contiguous()
    tile = attention_tile(qkv.dtype, head_dim, generation(qkv.device))
    if total_tokens == 0:
        return qkv.new_empty(0, heads * head_dim)
    if tile.tma and not _takes_descriptors(qkv, head_dim):
        tile = attention_tile(qkv.dtype, head_dim, 80)
    if tile_map is None:
        on_host = None if key_lengths is None else key_lengths.cpu()
        tile_map = make_tile_map(cu_seqlens.diff().tolist(), tile.block_m, on_host).to(qkv.device)
    if (columns := 3 if key_lengths is None else 4) != tile_map.shape[1]:
        raise ValueError(f"tile_map must have {columns} columns, got {tile_map.shape[1]}: make it with key_lengths")
    out = torch.empty((total_tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
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
        position_bias,
        out,
        stride_qt=qkv.stride(0),
        stride_qs=qkv.stride(1),
        stride_qh=qkv.stride(2),
        scale=scale * math.log2(math.e),
        window=window or 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        TMA=tile.tma,
        HAS_WINDOW=window is not None,
        HAS_ALIBI=alibi_slopes is not None,
        HAS_KEYS=tile_map.shape[1] == 4,
        REACH=0 if position_bias is None else position_bias.shape[1] // 2,
        **tile.launch,
    )
    return out


attention = operation(
    attention_reference,
    fake=lambda qkv, *_: qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3]),
    cpu=attention_cpu,
    cuda=attention_triton,
)
