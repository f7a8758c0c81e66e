"""The linear kernel for sm_90: one warp of a program loads tiles by TMA, two warpgroups multiply 64 rows each.

The warpgroups read the same ring of loaded stages. The second starts a few steps behind the first, so that the tensor
cores work for one while the other finishes a tile. Every tile adds in the same order, whatever the number of rows.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from unpadded_kernels._triton import triton
from unpadded_kernels.activation import activate
from unpadded_kernels.hopper.common import new_barriers, thread_barrier, tma_load, tma_store
from unpadded_kernels.linear_kernels import Epilogue, can_be_described, empty_result
from unpadded_kernels.tiles import multiprocessors

BLOCK_M, WEIGHT_ROWS = 128, 256  # tokens, and rows of weight per tile: half of them of gate, half of up if gated
BLOCK_BYTES = 128  # of a row per step, as many as the swizzle of shared memory spans
# A stage is 48 KB, and a tile of results 32 KB if gated, else 64 KB, of 227 KB.
STAGES_GATED, STAGES = 4, 3


@gluon.jit
def _load_tiles(ring, x_descriptor, weight_descriptor, total_tokens, IN: gl.constexpr, OUT: gl.constexpr):
    """Load the stages of every tile: rows of x, and rows of weight, which are gate, then up, if gated."""
    x_ring, weight_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BLOCK_N: gl.constexpr = weight_descriptor.block_shape[0]
    PARTS: gl.constexpr = weight_ring.shape[1] // BLOCK_N
    STAGE_BYTES: gl.constexpr = (BLOCK_M + PARTS * BLOCK_N) * BLOCK_K * x_ring.dtype.primitive_bitwidth // 8
    tiles_n: gl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tiles = (total_tokens + BLOCK_M - 1) // BLOCK_M * tiles_n
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token, n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        for k in range(0, IN, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
            mbarrier.expect(full.index(stage), STAGE_BYTES)
            tma_load(x_descriptor, [token, k], full.index(stage), x_ring.index(stage))
            for part in gl.static_range(PARTS):
                weight = weight_ring.index(stage).slice(part * BLOCK_N, BLOCK_N, 0)
                tma_load(weight_descriptor, [part * OUT + n, k], full.index(stage), weight)
            step += 1


@gluon.jit
def _rotate(y, cos_sin_ptr, token, total_tokens, HEAD_DIM: gl.constexpr):
    """Rotate the heads of y: [rows, columns], the first row being that of `token`."""
    HALF: gl.constexpr = HEAD_DIM // 2
    # one thread has both halves of a head
    halves = gl.permute(gl.reshape(y, [y.shape[0], y.shape[1] // HEAD_DIM, 2, HALF]), [0, 1, 3, 2])
    first_half, second_half = gl.split(halves)
    layout: gl.constexpr = gl.SliceLayout(1, first_half.type.layout)
    row = token + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    cos_sin_ptrs = cos_sin_ptr + row.to(gl.int64)[:, None] * HEAD_DIM + d[None, :]
    mask = (row < total_tokens)[:, None] & (d < HALF)[None, :]
    cos = gl.expand_dims(gl.load(cos_sin_ptrs, mask=mask, other=0.0), 1)
    sin = gl.expand_dims(gl.load(cos_sin_ptrs + HALF, mask=mask, other=0.0), 1)
    halves = gl.join(first_half * cos - second_half * sin, second_half * cos + first_half * sin)
    return gl.reshape(gl.permute(halves, [0, 1, 3, 2]), y.shape)


@gluon.jit
def _multiply_tiles(ring, first_is_ahead, vectors, result, total_tokens, WARPGROUP, IN, OUT, KIND, GATED, HEAD_DIM):
    """Compute a warpgroup's half of the rows of every tile. The names in upper case are constants."""
    x_ring, weight_ring, full, empty = ring
    x_scale_ptr, weight_scale_ptr, bias_ptr, cos_sin_ptr = vectors
    y_descriptor, y_blocks = result
    y_block = y_blocks.index(WARPGROUP)
    STAGES: gl.constexpr = x_ring.shape[0]
    ROWS: gl.constexpr = x_ring.shape[1] // 2
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    BLOCK_N: gl.constexpr = y_block.shape[1]
    WEIGHT_ROWS: gl.constexpr = weight_ring.shape[1]
    instruction: gl.constexpr = [16, WEIGHT_ROWS, 256 // x_ring.dtype.primitive_bitwidth]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=instruction)
    tiles_n: gl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tiles = (total_tokens + 2 * ROWS - 1) // (2 * ROWS) * tiles_n
    lag: gl.constexpr = STAGES // 2
    step = 0
    if WARPGROUP == 1:
        mbarrier.wait(first_is_ahead, 0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token, n = tile // tiles_n * 2 * ROWS + WARPGROUP * ROWS, tile % tiles_n * BLOCK_N
        y = warpgroup_mma_init(gl.zeros([ROWS, WEIGHT_ROWS], gl.float32, layout))
        for k in range(0, IN, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            x = x_ring.index(stage).slice(WARPGROUP * ROWS, ROWS, 0)
            y = warpgroup_mma(x, weight_ring.index(stage).permute((1, 0)), y, use_acc=k > 0, is_async=True)
            y = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(y,)))  # the step before is complete
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
            if WARPGROUP == 0:
                mbarrier.arrive(first_is_ahead, count=1, pred=step == lag)
        y = warpgroup_mma_wait(0, deps=(y,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        column = gl.arange(0, WEIGHT_ROWS, layout=gl.SliceLayout(0, layout))
        weight_row = n + column
        if GATED:
            weight_row += gl.where(column < BLOCK_N, 0, OUT - BLOCK_N)
        in_weight = weight_row < (2 * OUT if GATED else OUT)
        if x_scale_ptr is not None:
            row = token + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            x_scale = gl.load(x_scale_ptr + row, mask=row < total_tokens, other=0.0)
            y = y * x_scale[:, None] * gl.load(weight_scale_ptr + weight_row, mask=in_weight, other=0.0)[None, :]
        if bias_ptr is not None:
            y += gl.load(bias_ptr + weight_row, mask=in_weight, other=0.0).to(gl.float32)[None, :]
        if GATED:
            gate, up = gl.split(gl.permute(gl.reshape(y, [ROWS, 2, BLOCK_N]), [0, 2, 1]))
            y = activate(gate, up, KIND)
        elif KIND is not None:
            y = activate(y, y, KIND)
        elif HEAD_DIM > 0 and n < OUT // 3 * 2:  # a multiple of BLOCK_N: a tile is of q and k, or of v
            y = gl.convert_layout(_rotate(y, cos_sin_ptr, token, total_tokens, HEAD_DIM), layout)
        tma.store_wait(0)  # the store of the tile before has read y_block
        thread_barrier()
        y_block.store(y.to(y_block.dtype))
        fence_async_shared()
        thread_barrier()
        tma_store(y_descriptor, [token, n], y_block)
    if WARPGROUP == 0:
        mbarrier.arrive(first_is_ahead, count=1, pred=step < lag)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total_tokens"])
def _linear_hopper_kernel(
    x_descriptor,
    x_scale_ptr,
    weight_descriptor,
    weight_scale_ptr,
    bias_ptr,
    cos_sin_ptr,
    y_descriptor,
    total_tokens,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    KIND: gl.constexpr,
    GATED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A pointer that the epilogue does not use is None; HEAD_DIM is 0 without rotary."""
    BLOCK_M: gl.constexpr = x_descriptor.block_shape[0]
    BLOCK_K: gl.constexpr = x_descriptor.block_shape[1]
    BLOCK_N: gl.constexpr = y_descriptor.block_shape[1]
    WEIGHT_ROWS: gl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    x_ring = gl.allocate_shared_memory(x_descriptor.dtype, [STAGES, BLOCK_M, BLOCK_K], x_descriptor.layout)
    weight_ring = gl.allocate_shared_memory(x_descriptor.dtype, [STAGES, WEIGHT_ROWS, BLOCK_K], x_descriptor.layout)
    y_blocks = gl.allocate_shared_memory(y_descriptor.dtype, [2, BLOCK_M // 2, BLOCK_N], y_descriptor.layout)
    ring = (x_ring, weight_ring, new_barriers(STAGES, 1), new_barriers(STAGES, 2))
    ahead = new_barriers(1, 1).index(0)
    fence_async_shared()
    vectors = (x_scale_ptr, weight_scale_ptr, bias_ptr, cos_sin_ptr)
    result = (y_descriptor, y_blocks)
    # a thread of a warpgroup has 240 registers, and one of the warp that loads 24, of 65,536
    gl.warp_specialize(
        [
            (_multiply_tiles, (ring, ahead, vectors, result, total_tokens, 0, IN, OUT, KIND, GATED, HEAD_DIM)),
            (_multiply_tiles, (ring, ahead, vectors, result, total_tokens, 1, IN, OUT, KIND, GATED, HEAD_DIM)),
            (_load_tiles, (ring, x_descriptor, weight_descriptor, total_tokens, IN, OUT)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(x: Tensor, weight: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> bool:
    """Whether the kernel supports the operands."""
    out_features = weight.shape[0] // 2 if epilogue.gated else weight.shape[0]
    aligned = can_be_described(x) and can_be_described(weight) and out_features * dtype.itemsize % 16 == 0
    head_dim = 64 if epilogue.cos_sin is None else epilogue.cos_sin.shape[1]
    whole = epilogue.cos_sin is None or out_features // 3 * 2 % WEIGHT_ROWS == 0
    return aligned and whole and head_dim in (32, 64, 128)


def linear_hopper(x: Tensor, weight: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """Return epilogue(x @ weight.T), as `launch_linear` does, of operands that fit."""
    gated = epilogue.gated
    y = empty_result(x, weight, epilogue, dtype)
    total_tokens, out_features = y.shape
    if total_tokens == 0:
        return y
    block_n, block_k = WEIGHT_ROWS // 2 if gated else WEIGHT_ROWS, BLOCK_BYTES // x.itemsize
    tiles = triton.cdiv(total_tokens, BLOCK_M) * triton.cdiv(out_features, block_n)
    x_scale, weight_scale = epilogue.scales or (None, None)
    _linear_hopper_kernel[(min(tiles, multiprocessors(x.device)),)](
        _descriptor(x, [BLOCK_M, block_k]),
        x_scale,
        _descriptor(weight, [block_n, block_k]),
        weight_scale,
        epilogue.bias,
        epilogue.cos_sin,
        _descriptor(y, [BLOCK_M // 2, block_n]),
        total_tokens=total_tokens,
        IN=x.shape[1],
        OUT=out_features,
        KIND=epilogue.kind,
        GATED=gated,
        HEAD_DIM=0 if epilogue.cos_sin is None else epilogue.cos_sin.shape[1],
        STAGES=STAGES_GATED if gated else STAGES,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_BYTES, element_bitwidth=8 * tensor.itemsize, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)
