"""Residual add + LayerNorm, the last step of both halves of a layer.

    h = x + residual,   y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias

add_layer_norm returns y; pre_layer_norm also returns h, the residual of a pre-norm layer. Bound by memory: 6 and
8 * hidden bytes per token in 16 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton
from unpadded_kernels.tiles import row_launch


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: [total_tokens, hidden]; weight, bias: [hidden]. Returns [total_tokens, hidden] in x's dtype."""
    return pre_layer_norm_reference(x, residual, weight, bias, eps)[0]


def pre_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual: [total_tokens, hidden]; weight, bias: [hidden]. Returns (y, h), both like x."""
    h = x.float() + residual.float()
    return F.layer_norm(h, weight.shape, weight.float(), bias.float(), eps).to(x.dtype), h.to(x.dtype)


@triton.jit
def normalized(x, mask, weight_ptr, bias_ptr, h, eps, HIDDEN: tl.constexpr):
    """Return the LayerNorm of one fp32 row whose masked lanes hold 0; they hold 0 in the result, too."""
    # before the sums: no load passes their barriers
    weight = tl.load(weight_ptr + h, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / HIDDEN
    # masked lanes would hold -mean and add mean**2 to the variance
    centered = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, axis=0) / HIDDEN + eps)
    return centered * rstd * weight + bias


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    stride_xt,
    stride_rt,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_SUM: tl.constexpr,
):
    # int64: total_tokens * hidden exceeds 2**31 in one large batch
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    x = tl.load(x_ptr + token * stride_xt + h, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + token * stride_rt + h, mask=mask, other=0.0).to(tl.float32)
    if HAS_SUM:
        tl.store(sum_ptr + token * HIDDEN + h, x, mask=mask)
    y = normalized(x, mask, weight_ptr, bias_ptr, h, eps, HIDDEN)
    tl.store(y_ptr + token * HIDDEN + h, y, mask=mask)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Tensor | None) -> Tensor:
    """One program per row. The rows of x and residual may be strided, their elements may not."""
    total_tokens, hidden = x.shape
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape, got {tuple(residual.shape)} and {tuple(x.shape)}")
    if x.stride(1) != 1 or residual.stride(1) != 1 or not weight.is_contiguous() or not bias.is_contiguous():
        raise ValueError(
            f"rows must be contiguous, got strides {x.stride()} and {residual.stride()}: pass .contiguous()"
        )
    y = torch.empty((total_tokens, hidden), dtype=x.dtype, device=x.device)
    if total_tokens == 0:
        return y
    block_h = triton.next_power_of_2(hidden)
    _add_layer_norm_kernel[(total_tokens,)](
        x,
        residual,
        weight,
        bias,
        y,
        total,
        stride_xt=x.stride(0),
        stride_rt=residual.stride(0),
        eps=eps,
        HIDDEN=hidden,
        BLOCK_H=block_h,
        HAS_SUM=total is not None,
        **row_launch(block_h),
    )
    return y


def add_layer_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _launch(x, residual, weight, bias, eps, None)


def pre_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(x, residual, weight, bias, eps, total), total


add_layer_norm = torch.library.custom_op("unpadded::add_layer_norm", add_layer_norm_reference, mutates_args=())
add_layer_norm.register_kernel("cuda", device_guard(add_layer_norm_triton))
pre_layer_norm = torch.library.custom_op("unpadded::pre_layer_norm", pre_layer_norm_reference, mutates_args=())
pre_layer_norm.register_kernel("cuda", device_guard(pre_layer_norm_triton))


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@pre_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
