"""Residual add + LayerNorm, the closing step of both halves of a post-norm layer.

    y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias,   h = x + residual

Bound by memory: 6 * hidden bytes per token in 16 bits (two rows read, one written).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import tl, triton
from unpadded_kernels.tiles import row_launch


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: [total_tokens, hidden]; weight, bias: [hidden]. Returns [total_tokens, hidden] in x's dtype."""
    h = x.float() + residual.float()
    return F.layer_norm(h, weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stride_xt,
    stride_rt,
    stride_yt,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # int64: total_tokens * hidden passes 2**31 in one large batch
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN

    x = tl.load(x_ptr + token * stride_xt + h, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + token * stride_rt + h, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / HIDDEN
    # masked lanes hold 0, not mean: zeroed again, or they add mean**2 to the variance
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / HIDDEN + eps)

    weight = tl.load(weight_ptr + h, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * stride_yt + h, centred * rstd * weight + bias, mask=mask)


def add_layer_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """One row per program. The tokens of x and residual may be strided, their rows not."""
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
        stride_xt=x.stride(0),
        stride_rt=residual.stride(0),
        stride_yt=y.stride(0),
        eps=eps,
        HIDDEN=hidden,
        BLOCK_H=block_h,
        **row_launch(block_h),
    )
    return y


add_layer_norm = torch.library.custom_op("unpadded::add_layer_norm", add_layer_norm_reference, mutates_args=())
add_layer_norm.register_kernel("cuda", add_layer_norm_triton)


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)
