"""Matrix product of rows in 8 bits (see `fp8`), alone or with the MLP's activation in the same pass.

    y[t, n] = activation(x_scale[t] * weight_scale[n] * (x[t] @ weight[n]) + bias[n])

Bound by arithmetic: 2 * in_features * out_features flops per token, at twice the rate of 16 bits. The sums are as fine
as the tensor cores keep them: by what is published, to about 14 bits on sm_90, where an e4m3 has 4. A row of the result
has the same bits whatever rows stand beside it.
"""

import torch
from torch import Tensor

from unpadded_kernels._triton import TensorDescriptor, tl, triton
from unpadded_kernels.activation import GATED, KINDS, activate
from unpadded_kernels.fp8 import E4M3, dequantized
from unpadded_kernels.linear import _takes_descriptors, linear_invariant_cpu, linear_invariant_reference
from unpadded_kernels.tiles import generation, linear_fp8_tile, programs


def linear_fp8_reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """linear, then where kind is given its activation, in fp32 of what the rows of x and weight stand for.

    x: [total_tokens, in_features] e4m3; x_scale: [total_tokens] fp32; weight: [rows, in_features] e4m3, gate rows then
    up rows when kind is gated; weight_scale: [rows] fp32; bias: [rows] or None. Returns [total_tokens, out_features] in
    dtype.
    """
    operands = dequantized(x, x_scale), dequantized(weight, weight_scale), None if bias is None else bias.float()
    return linear_invariant_reference(*operands, kind).to(dtype)


def linear_fp8_cpu(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """The reference in products that keep a row's bits; slower than fp32, since nothing here multiplies e4m3."""
    operands = dequantized(x, x_scale), dequantized(weight, weight_scale), None if bias is None else bias.float()
    return linear_invariant_cpu(*operands, kind).to(dtype)


@triton.jit
def _load(
    source, row, k, rows, stride, IN: tl.constexpr, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[BLOCK_R, BLOCK_K] of a matrix, zeros beyond it. source: a descriptor with TMA, else a pointer."""
    if TMA:
        block = source.load([row, k])
    else:
        r = (row + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        c = (k + tl.arange(0, BLOCK_K))[None, :]
        block = tl.load(source + r * stride + c, mask=(r < rows) & (c < IN), other=0.0)
    return block


@triton.jit
def _scaled(sums, x_scale, weight_scale_ptr, bias_ptr, n, mask, HAS_BIAS: tl.constexpr):
    """One tile's fp32 sums times both scales, and the bias."""
    y = sums * x_scale[:, None] * tl.load(weight_scale_ptr + n, mask=mask, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["total_tokens"])
def _linear_fp8_kernel(
    x_source,
    x_scale_ptr,
    weight_source,
    weight_scale_ptr,
    bias_ptr,
    y_target,
    total_tokens,
    stride_xt,
    stride_wn,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    rows: tl.constexpr = 2 * OUT if GATED else OUT
    tiles = tl.cdiv(total_tokens, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_token = tile // tiles_n * BLOCK_M
        first_n = tile % tiles_n * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, IN, BLOCK_K):
            x = _load(x_source, first_token, k, total_tokens, stride_xt, IN, TMA, BLOCK_M, BLOCK_K)
            weight = _load(weight_source, first_n, k, rows, stride_wn, IN, TMA, BLOCK_N, BLOCK_K)
            gate = tl.dot(x, tl.trans(weight), gate)
            if GATED:
                weight = _load(weight_source, OUT + first_n, k, rows, stride_wn, IN, TMA, BLOCK_N, BLOCK_K)
                up = tl.dot(x, tl.trans(weight), up)

        token = (first_token + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = first_n + tl.arange(0, BLOCK_N)
        x_scale = tl.load(x_scale_ptr + token, mask=token < total_tokens, other=0.0)
        y = _scaled(gate, x_scale, weight_scale_ptr, bias_ptr, n, n < OUT, HAS_BIAS)
        if GATED:
            up = _scaled(up, x_scale, weight_scale_ptr, bias_ptr, OUT + n, n < OUT, HAS_BIAS)
        if KIND is not None:
            y = activate(y, up, KIND)
        if TMA:
            y_target.store([first_token, first_n], y.to(y_target.dtype))
        else:
            mask = (token < total_tokens)[:, None] & (n < OUT)[None, :]
            tl.store(y_target + token[:, None] * OUT + n[None, :], y, mask=mask)


def linear_fp8_triton(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """One program per multiprocessor, tile after tile. The dimensions fix the tiles and the order of additions."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}: use swiglu, geglu, gelu or gelu_tanh")
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be {E4M3}, got {x.dtype} and {weight.dtype}: pass them to quantize_rows")
    (total_tokens, in_features), rows = x.shape, weight.shape[0]
    shapes = [tuple(tensor.shape) for tensor in (x_scale, weight, weight_scale, *([] if bias is None else [bias]))]
    if shapes != [(total_tokens,), (rows, in_features), (rows,), (rows,)][: len(shapes)]:
        raise ValueError(
            f"of x {tuple(x.shape)}, x_scale must be [{total_tokens}], weight [rows, {in_features}], weight_scale and "
            f"bias [rows], got {shapes}"
        )
    vectors = (x_scale, weight_scale, *([] if bias is None else [bias]))
    if x.stride(1) != 1 or weight.stride(1) != 1 or not all(vector.is_contiguous() for vector in vectors):
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {weight.stride()}: pass .contiguous()")
    gated = kind in GATED
    follows = "gated" if gated else "activation" if kind else "nothing"
    out_features = rows // 2 if gated else rows
    y = torch.empty((total_tokens, out_features), dtype=dtype, device=x.device)
    if total_tokens == 0:
        return y
    tile = linear_fp8_tile(follows, generation(x.device))
    if tile.tma and not _takes_descriptors(x, weight, y):
        tile = linear_fp8_tile(follows, 80)
    source, weight_source, target = x, weight, y
    if tile.tma:
        source = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
        weight_source = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
        target = TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n])
    tiles = triton.cdiv(total_tokens, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    _linear_fp8_kernel[(min(tiles, programs(x.device)),)](
        source,
        x_scale,
        weight_source,
        weight_scale,
        bias,
        target,
        total_tokens=total_tokens,
        stride_xt=x.stride(0),
        stride_wn=weight.stride(0),
        IN=in_features,
        OUT=out_features,
        KIND=kind,
        GATED=gated,
        HAS_BIAS=bias is not None,
        TMA=tile.tma,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.launch,
    )
    return y


linear_fp8 = torch.library.custom_op("unpadded::linear_fp8", linear_fp8_reference, mutates_args=())
linear_fp8.register_kernel("cpu", linear_fp8_cpu)
linear_fp8.register_kernel("cuda", linear_fp8_triton)


@linear_fp8.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in GATED else weight.shape[0], dtype=dtype)
