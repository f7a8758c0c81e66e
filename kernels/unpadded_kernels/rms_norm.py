"""Residual add + RMSNorm of a pre-norm layer, which also needs the unnormalized sum.

    h = x + residual;  y = h * rsqrt(mean(h ** 2) + eps) * weight;  (y, h)

Bound by memory: 8 * hidden bytes per token in 16 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton
from unpadded_kernels.tiles import row_launch


def rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and h in x's dtype.

    x: [total_tokens, hidden]; residual: the same, or None for zeros; weight: [hidden].
    """
    h = x.float() + (0 if residual is None else residual.float())
    return F.rms_norm(h, weight.shape, weight.float(), eps).to(x.dtype), h.to(x.dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    stride_xt,
    stride_rt,
    stride_yt,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # int64: total_tokens * hidden exceeds 2**31 in a large batch
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    x = tl.load(x_ptr + token * stride_xt + h, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + token * stride_rt + h, mask=mask, other=0.0).to(tl.float32)
    # loaded before the sum, whose barrier would delay it
    weight = tl.load(weight_ptr + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_ptr + token * stride_yt + h, x, mask=mask)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    tl.store(y_ptr + token * stride_yt + h, x * rstd * weight, mask=mask)


def rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch one program per row. x and residual may be strided by token; their rows must be contiguous."""
    total_tokens, hidden = x.shape
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape, got {tuple(residual.shape)} and {tuple(x.shape)}")
    rows = [tensor for tensor in (x, residual) if tensor is not None]
    if any(tensor.stride(1) != 1 for tensor in rows) or not weight.is_contiguous():
        raise ValueError(
            f"rows must be contiguous, got strides {[tensor.stride() for tensor in rows]}: pass .contiguous()"
        )
    y, total = (torch.empty((total_tokens, hidden), dtype=x.dtype, device=x.device) for _ in range(2))
    if total_tokens == 0:
        return y, total
    block_h = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(total_tokens,)](
        x,
        rows[-1],
        weight,
        y,
        total,
        stride_xt=x.stride(0),
        stride_rt=rows[-1].stride(0),
        stride_yt=y.stride(0),
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        HIDDEN=hidden,
        BLOCK_H=block_h,
        **row_launch(block_h),
    )
    return y, total


rms_norm = torch.library.custom_op("unpadded::rms_norm", rms_norm_reference, mutates_args=())
rms_norm.register_kernel("cuda", device_guard(rms_norm_triton))


@rms_norm.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
