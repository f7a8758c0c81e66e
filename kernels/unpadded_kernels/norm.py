"""LayerNorms of other layouts than the post-norm layer's: of a residual that goes on unnormalised, and of q and k.

    pre_layer_norm:  h = x + residual;  (LayerNorm(h), h)
    qk_norm_:        q = LayerNorm(q),  k = LayerNorm(k), each over all its heads

Bound by memory: 8 * hidden bytes per token in 16 bits, either way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import tl, triton
from unpadded_kernels.tiles import row_launch


def pre_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual: [total_tokens, hidden]; weight, bias: [hidden]. Returns x + residual, normalised and as it is."""
    h = x.float() + residual.float()
    return F.layer_norm(h, weight.shape, weight.float(), bias.float(), eps).to(x.dtype), h.to(x.dtype)


def qk_norm_reference(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Normalise q and k in place.

    qkv: [total_tokens, 3, heads, head_dim]; weight, bias: [2 * heads * head_dim], q's then k's.
    """
    for rows, row_weight, row_bias in zip(
        qkv[:, :2].unbind(1), weight.float().chunk(2), bias.float().chunk(2), strict=True
    ):
        rows.copy_(F.layer_norm(rows.flatten(1).float(), row_weight.shape, row_weight, row_bias, eps).view(rows.shape))


@triton.jit
def _normalised(x, mask, weight_ptr, bias_ptr, h, eps, HIDDEN: tl.constexpr):
    """LayerNorm of one fp32 row."""
    mean = tl.sum(x, axis=0) / HIDDEN
    # masked lanes hold 0, not mean: zeroed again, or they add mean**2 to the variance
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + h, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    return centred * rstd * weight + bias


@triton.jit
def _pre_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
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
    tl.store(sum_ptr + token * stride_yt + h, x, mask=mask)
    y = _normalised(x, mask, weight_ptr, bias_ptr, h, eps, HIDDEN)
    tl.store(y_ptr + token * stride_yt + h, y, mask=mask)


@triton.jit
def _qk_norm_kernel(
    qkv_ptr,
    weight_ptr,
    bias_ptr,
    stride_qt,
    stride_qs,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # q, then k
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    row_ptrs = qkv_ptr + token * stride_qt + part * stride_qs + h
    x = tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = _normalised(x, mask, weight_ptr + part * HIDDEN, bias_ptr + part * HIDDEN, h, eps, HIDDEN)
    tl.store(row_ptrs, y, mask=mask)


def pre_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """One row per program. The tokens of x and residual may be strided, their rows not."""
    total_tokens, hidden = x.shape
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape, got {tuple(residual.shape)} and {tuple(x.shape)}")
    if x.stride(1) != 1 or residual.stride(1) != 1 or not weight.is_contiguous() or not bias.is_contiguous():
        raise ValueError(
            f"rows must be contiguous, got strides {x.stride()} and {residual.stride()}: pass .contiguous()"
        )
    y, total = (torch.empty((total_tokens, hidden), dtype=x.dtype, device=x.device) for _ in range(2))
    if total_tokens == 0:
        return y, total
    block_h = triton.next_power_of_2(hidden)
    _pre_layer_norm_kernel[(total_tokens,)](
        x,
        residual,
        weight,
        bias,
        y,
        total,
        stride_xt=x.stride(0),
        stride_rt=residual.stride(0),
        stride_yt=y.stride(0),
        eps=eps,
        HIDDEN=hidden,
        BLOCK_H=block_h,
        **row_launch(block_h),
    )
    return y, total


def qk_norm_triton(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """A token's q or its k per program. Tokens may be strided; the heads of one must lie end to end."""
    total_tokens, _, heads, head_dim = qkv.shape
    hidden = heads * head_dim
    if qkv.stride()[2:] != (head_dim, 1) or not weight.is_contiguous() or not bias.is_contiguous():
        raise ValueError(f"the heads of a token must be contiguous, got strides {qkv.stride()}: pass .contiguous()")
    if weight.shape != (2 * hidden,) or bias.shape != (2 * hidden,):
        raise ValueError(
            f"weight and bias must be ({2 * hidden},), q's then k's, got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if total_tokens == 0:
        return
    block_h = triton.next_power_of_2(hidden)
    _qk_norm_kernel[(total_tokens, 2)](
        qkv,
        weight,
        bias,
        stride_qt=qkv.stride(0),
        stride_qs=qkv.stride(1),
        eps=eps,
        HIDDEN=hidden,
        BLOCK_H=block_h,
        **row_launch(block_h),
    )


pre_layer_norm = torch.library.custom_op("unpadded::pre_layer_norm", pre_layer_norm_reference, mutates_args=())
qk_norm_ = torch.library.custom_op("unpadded::qk_norm_", qk_norm_reference, mutates_args=("qkv",))
pre_layer_norm.register_kernel("cuda", pre_layer_norm_triton)
qk_norm_.register_kernel("cuda", qk_norm_triton)


@pre_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@qk_norm_.register_fake
def _(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    return None
