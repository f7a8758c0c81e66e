"""The kernel of a matrix product with fixed tiles, through pointers or, from sm_90 on, tensor descriptors (TMA).

A program takes tile after tile of the result. What follows the product happens on the tile's fp32 sums: the scales of
e4m3 rows, the bias, then the MLP's activation or the rotation of q and k.
"""

from unpadded_kernels._triton import tl, triton
from unpadded_kernels.activation import activate


@triton.jit
def products(
    x_ptrs,
    weight_ptrs,
    up_offset,
    x_mask,
    weight_mask,
    IN: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ weight.T, and where GATED x @ up.T, whose rows lie up_offset elements behind. fp32.

    x_ptrs, x_mask: [BLOCK_M, 1], rows of x; weight_ptrs, weight_mask: [BLOCK_N, 1], rows of weight.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k_mask = start + k < IN
        x = tl.load(x_ptrs + start + k, mask=x_mask & k_mask, other=0.0)
        weight = tl.load(weight_ptrs + start + k, mask=weight_mask & k_mask, other=0.0)
        gate = tl.dot(x, tl.trans(weight), gate, input_precision="ieee")
        if GATED:
            weight = tl.load(weight_ptrs + up_offset + start + k, mask=weight_mask & k_mask, other=0.0)
            up = tl.dot(x, tl.trans(weight), up, input_precision="ieee")
    return gate, up


@triton.jit
def _descriptor_products(
    x_descriptor,
    weight_descriptor,
    token,
    n,
    IN: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of the rows from token on and those from n on, of gate and of up where GATED.

    Gate and up are one tile of one product: ptxas runs the wgmmas of two one by one (C7515), each with its latency.
    """
    PARTS: tl.constexpr = 2 if GATED else 1
    y = tl.zeros([BLOCK_M, PARTS * BLOCK_N], tl.float32)
    for k in range(0, IN, BLOCK_K):
        weight = tl.reshape(weight_descriptor.load([0, n, k]), [PARTS * BLOCK_N, BLOCK_K])
        y = tl.dot(x_descriptor.load([token, k]), tl.trans(weight), y)
    up = y
    if GATED:
        # one thread holds both columns of a pair, so nothing moves
        y, up = tl.split(tl.permute(tl.reshape(y, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1]))
    return y, up


@triton.jit
def _turn(y, cos_sin_ptr, token, first, total_tokens, TURNED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A tile of qkv with the heads of q and k, those before column TURNED, turned. first: the tile's first column."""
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_M: tl.constexpr = y.shape[0]
    HEADS: tl.constexpr = y.shape[1] // HEAD_DIM
    # of a product by tensor cores one thread holds both halves of a head: only the table moves between threads
    halves = tl.permute(tl.reshape(y, [BLOCK_M, HEADS, 2, HALF]), [0, 1, 3, 2])
    first_half, second_half = tl.split(halves)
    cos_sin_ptrs = cos_sin_ptr + token[:, None] * HEAD_DIM + tl.arange(0, HALF)[None, :]
    mask = (token < total_tokens)[:, None]
    turned = (first + tl.arange(0, HEADS) * HEAD_DIM < TURNED)[None, :, None]
    cos = tl.where(turned, tl.load(cos_sin_ptrs, mask=mask, other=0.0)[:, None, :], 1.0)
    sin = tl.where(turned, tl.load(cos_sin_ptrs + HALF, mask=mask, other=0.0)[:, None, :], 0.0)
    halves = tl.join(first_half * cos - second_half * sin, second_half * cos + first_half * sin)
    return tl.reshape(tl.permute(halves, [0, 1, 3, 2]), y.shape)


@triton.jit(do_not_specialize=["total_tokens"])
def _linear_kernel(
    x_source,
    x_scale_ptr,
    weight_source,
    weight_scale_ptr,
    bias_ptr,
    cos_sin_ptr,
    y_target,
    total_tokens,
    stride_xt,
    stride_wn,
    stride_yt,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x_source, weight_source, y_target: descriptors with TMA, else pointers; HEAD_DIM: 0 where nothing turns.

    The descriptor of weight is of [1, OUT, IN], or where GATED of [2, OUT, IN].

    SCALED: whether each row of x and weight has an fp32 scale.
    """
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(total_tokens, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_token, first_n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        token = (first_token + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = first_n + tl.arange(0, BLOCK_N)
        token_mask, n_mask = (token < total_tokens)[:, None], n < OUT
        if TMA:
            y, up = _descriptor_products(
                x_source, weight_source, first_token, first_n, IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            x_ptrs, weight_ptrs = x_source + token[:, None] * stride_xt, weight_source + n[:, None] * stride_wn
            up_offset, weight_mask = OUT * stride_wn, n_mask[:, None]
            y, up = products(
                x_ptrs, weight_ptrs, up_offset, token_mask, weight_mask, IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K
            )
        if SCALED:
            x_scale = tl.load(x_scale_ptr + token[:, None], mask=token_mask, other=0.0)
            y = y * x_scale * tl.load(weight_scale_ptr + n, mask=n_mask, other=0.0)[None, :]
            if GATED:
                up = up * x_scale * tl.load(weight_scale_ptr + OUT + n, mask=n_mask, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_ptr + OUT + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if KIND is not None:
            y = activate(y, up, KIND)
        if HEAD_DIM > 0:
            y = _turn(y, cos_sin_ptr, token, first_n, total_tokens, OUT // 3 * 2, HEAD_DIM)
        if TMA:
            y_target.store([first_token, first_n], y.to(y_target.dtype))
        else:
            tl.store(y_target + token[:, None] * stride_yt + n[None, :], y, mask=token_mask & n_mask[None, :])
