"""The kernel of full attention for sm_90, after FlashAttention-3 (arXiv 2407.08608).

One program per multiprocessor computes every n-th tile of queries. Its producer loads q, k and v; two consumers compute
64 queries each. A consumer issues the scores of one block of keys together with the values of the block before, so that
the softmax of the one runs while the tensor cores add the other. The consumers take turns to issue. The partial block
at the end of a text comes first, so that the loop over the other blocks needs no mask.

The ring of q holds two tiles, that of k and v holds a block of keys as item 2 i and its values as item 2 i + 1.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from unpadded_kernels.tiles import multiprocessors

# the names of the latest triton, else those of 3.6
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
BLOCK_M, BLOCK_N = 128, 128
# Items in the ring of k and v, by head_dim: 128 would spill registers. At least 4: a consumer releases v of a block
# after it has k of the next but one.
SLOTS = {16: 8, 32: 8, 64: 8}


@gluon.jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Return barriers that complete a phase after so many arrivals. Fence before another warp uses them."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _tile(tile_map_ptr, work, HEADS: gl.constexpr):
    """Return (first token of the text, number of its tokens, index of the block of queries, head)."""
    row = tile_map_ptr + 3 * (work // HEADS)
    return gl.load(row), gl.load(row + 1), gl.load(row + 2), work % HEADS


@gluon.jit
def _wait_full(full, item, SLOTS: gl.constexpr, pred=True):
    """Wait until the item is in the ring. Return its slot."""
    mbarrier.wait(full.index(item % SLOTS), item // SLOTS & 1, pred=pred)
    return item % SLOTS


@gluon.jit
def _softmax(scores, highest, total, scale):
    """Add a block of keys to an online softmax. Return the new (highest, total, weights, decay), all fp32."""
    new_highest = gl.maximum(highest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_highest[:, None])
    decay = gl.exp2(highest - new_highest)
    return new_highest, total * decay + gl.sum(weights, 1), weights, decay


@gluon.jit
def _load_tiles(q_source, kv_source, tile_map_ptr, works, rings, HEADS: gl.constexpr):
    """Load q, k and v of this program's tiles, in the order in which the consumers read them."""
    q_ring, q_full, q_empty, kv_ring, kv_full, kv_empty = rings
    ROWS: gl.constexpr = q_ring.shape[1]
    SLOTS: gl.constexpr = kv_ring.shape[0]
    BLOCK_N: gl.constexpr = kv_ring.shape[1]
    HEAD_DIM: gl.constexpr = kv_ring.shape[2]
    tile = 0
    item = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        text_start, length, block_m, head = _tile(tile_map_ptr, work, HEADS)
        if block_m * (2 * ROWS) < length:  # a captured graph pads its map with empty tiles
            q_slot = tile % 2
            mbarrier.wait(q_empty.index(q_slot), tile // 2 & 1 ^ 1)
            mbarrier.expect(q_full.index(q_slot), 2 * ROWS * HEAD_DIM * 2)
            for half in gl.static_range(2):
                row = text_start + (block_m * 2 + half) * ROWS
                tma_load(q_source, [row, head * HEAD_DIM], q_full.index(q_slot), q_ring.index(q_slot * 2 + half))
            tile += 1
            blocks = (length + BLOCK_N - 1) // BLOCK_N
            for block in range(blocks):
                row = text_start + (blocks - 1 - block) * BLOCK_N
                for part in gl.static_range(1, 3):  # k, v
                    slot = item % SLOTS
                    mbarrier.wait(kv_empty.index(slot), item // SLOTS & 1 ^ 1)
                    mbarrier.expect(kv_full.index(slot), BLOCK_N * HEAD_DIM * 2)
                    column = (part * HEADS + head) * HEAD_DIM
                    tma_load(kv_source, [row, column], kv_full.index(slot), kv_ring.index(slot))
                    item += 1


@gluon.jit
def _attend(inputs, rings, turn, CONSUMER: gl.constexpr, HEADS: gl.constexpr, HAS_ALIBI: gl.constexpr):
    """Compute the consumer's half of the queries of every tile."""
    tile_map_ptr, alibi_slopes_ptr, out_ptr, works, scale = inputs
    q_ring, q_full, q_empty, kv_ring, kv_full, kv_empty = rings
    ROWS: gl.constexpr = q_ring.shape[1]
    SLOTS: gl.constexpr = kv_ring.shape[0]
    BLOCK_N: gl.constexpr = kv_ring.shape[1]
    HEAD_DIM: gl.constexpr = kv_ring.shape[2]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores_layout)).to(gl.float32)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores_layout)).to(gl.float32)
    no_scores = gl.zeros([ROWS, BLOCK_N], gl.float32, scores_layout)
    tile = 0
    item = 0
    turns = 0
    slope = 0.0
    next_start, next_length, next_block, next_head = _tile(tile_map_ptr, gl.program_id(0), HEADS)
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        text_start, length, block_m, head = next_start, next_length, next_block, next_head
        # a tile ahead, because global memory answers after hundreds of cycles
        next_work = gl.minimum(work + gl.num_programs(0), works - 1)
        next_start, next_length, next_block, next_head = _tile(tile_map_ptr, next_work, HEADS)
        if block_m * (2 * ROWS) < length:
            if HAS_ALIBI:
                slope = gl.load(alibi_slopes_ptr + head) * 1.4426950408889634 / scale
            first = (block_m * 2 + CONSUMER) * ROWS
            blocks = (length + BLOCK_N - 1) // BLOCK_N
            key = (blocks - 1) * BLOCK_N
            q_slot = _wait_full(q_full, tile, 2)
            queries = q_ring.index(q_slot * 2 + CONSUMER)
            k_slot = _wait_full(kv_full, item, SLOTS)
            mbarrier.wait(turn.index(CONSUMER), turns & 1)
            keys = kv_ring.index(k_slot).permute((1, 0))
            scores = warpgroup_mma(queries, keys, no_scores, use_acc=False, is_async=True)
            mbarrier.arrive(turn.index(1 - CONSUMER), count=1)
            turns += 1
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(kv_empty.index(k_slot), count=1)
            if HAS_ALIBI:
                scores = scores - slope * gl.abs((m + (first - key))[:, None] - n[None, :])
            scores = gl.where((n < length - key)[None, :], scores, float("-inf"))
            highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
            highest, total, weights, decay = _softmax(scores, highest, gl.zeros_like(highest), scale)
            weights = gl.convert_layout(weights.to(q_ring.dtype), weights_layout)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
            v_slot = _wait_full(kv_full, item + 1, SLOTS)
            if length - key < BLOCK_N:
                # 0 * NaN and 0 * inf are NaN: clear the rows of the next text. Both consumers store the same bits.
                v_row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, v_layout))
                v = kv_ring.index(v_slot).load(v_layout)
                kv_ring.index(v_slot).store(gl.where((v_row < length - key)[:, None], v, 0.0))
                fence_async_shared()
                thread_barrier()
            _wait_full(kv_full, item + 2, SLOTS, blocks > 1)
            for block in range(1, blocks):
                item += 2
                key -= BLOCK_N
                k_slot = item % SLOTS
                v_slot = (item - 1) % SLOTS
                mbarrier.wait(turn.index(CONSUMER), turns & 1)
                keys = kv_ring.index(k_slot).permute((1, 0))
                next_scores = warpgroup_mma(queries, keys, no_scores, use_acc=False, is_async=True)
                next_acc = warpgroup_mma(weights, kv_ring.index(v_slot), acc, is_async=True)
                mbarrier.arrive(turn.index(1 - CONSUMER), count=1)
                turns += 1
                scores = warpgroup_mma_wait(1, deps=(next_scores,))
                mbarrier.arrive(kv_empty.index(k_slot), count=1)
                if HAS_ALIBI:
                    scores = scores - slope * gl.abs((m + (first - key))[:, None] - n[None, :])
                highest, total, next_weights, decay = _softmax(scores, highest, total, scale)
                next_weights = gl.convert_layout(next_weights.to(q_ring.dtype), weights_layout)
                _wait_full(kv_full, item + 1, SLOTS)
                # ptxas would move the next wait for wgmmas before the exponentials, were there no branch between them
                _wait_full(kv_full, item + 2, SLOTS, block + 1 < blocks)
                acc, weights = warpgroup_mma_wait(0, deps=(next_acc, next_weights))
                mbarrier.arrive(kv_empty.index(v_slot), count=1)
                acc = acc * gl.convert_layout(decay, row_layout)[:, None]
            mbarrier.arrive(q_empty.index(q_slot), count=1)
            tile += 1
            v_slot = (item + 1) % SLOTS
            acc = warpgroup_mma(weights, kv_ring.index(v_slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(kv_empty.index(v_slot), count=1)
            item += 2
            y = acc * gl.convert_layout(1.0 / total, row_layout)[:, None]
            query = first + gl.arange(0, ROWS, layout=row_layout)
            d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, out_layout))
            row = (text_start + query).to(gl.int64) * HEADS + head
            out_ptrs = out_ptr + row[:, None] * HEAD_DIM + d[None, :]
            gl.store(out_ptrs, y.to(q_ring.dtype), mask=(query < length)[:, None])


@gluon.jit(do_not_specialize=["works"])
def _attention_hopper_kernel(
    q_source,
    kv_source,
    tile_map_ptr,
    alibi_slopes_ptr,
    out_ptr,
    works,
    scale,
    HEADS: gl.constexpr,
    SLOTS: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
):
    """works: tiles times heads."""
    ROWS: gl.constexpr = q_source.block_shape[0]
    BLOCK_N: gl.constexpr = kv_source.block_shape[0]
    HEAD_DIM: gl.constexpr = kv_source.block_shape[1]
    q_ring = gl.allocate_shared_memory(q_source.dtype, [4, ROWS, HEAD_DIM], q_source.layout)
    kv_ring = gl.allocate_shared_memory(q_source.dtype, [SLOTS, BLOCK_N, HEAD_DIM], kv_source.layout)
    rings = (q_ring, _barriers(2, 1), _barriers(2, 2), kv_ring, _barriers(SLOTS, 1), _barriers(SLOTS, 2))
    turn = _barriers(2, 1)
    fence_async_shared()
    mbarrier.arrive(turn.index(0), count=1)
    inputs = (tile_map_ptr, alibi_slopes_ptr, out_ptr, works, scale)
    gl.warp_specialize(
        [
            (_attend, (inputs, rings, turn, 0, HEADS, HAS_ALIBI)),
            (_attend, (inputs, rings, turn, 1, HEADS, HAS_ALIBI)),
            (_load_tiles, (q_source, kv_source, tile_map_ptr, works, rings, HEADS)),
        ],
        [4, 1],
        [240, 24],  # registers per thread of a consumer and of the producer: 128 * (240 + 240 + 24) of 65,536
    )


def attention_hopper(qkv: Tensor, tile_map: Tensor, scale: float, alibi_slopes: Tensor | None) -> Tensor:
    """Return the same as `attention_triton` without a window, of packed qkv in 16 bits."""
    total_tokens, _, heads, head_dim = qkv.shape
    out = torch.empty((total_tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)

    def source(rows: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([rows, head_dim], gl.float16)  # of any 16-bit dtype
        return TensorDescriptor(qkv, [total_tokens, 3 * out.shape[1]], [qkv.stride(0), 1], [rows, head_dim], layout)

    works = len(tile_map) * heads
    _attention_hopper_kernel[(min(works, multiprocessors(qkv.device)),)](
        source(BLOCK_M // 2),
        source(BLOCK_N),
        tile_map,
        alibi_slopes,
        out,
        works=works,
        scale=scale / math.log(2),
        HEADS=heads,
        SLOTS=SLOTS[head_dim],
        HAS_ALIBI=alibi_slopes is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
