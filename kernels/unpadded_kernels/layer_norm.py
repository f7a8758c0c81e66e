"""Residual add + LayerNorm or RMSNorm, the last step of both halves of a layer; LayerNorm of q and k.

    h = x + residual
    LayerNorm:  y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias
    RMSNorm:    y = h * rsqrt(mean(h ** 2) + eps) * weight

add_layer_norm returns y; pre_layer_norm and rms_norm also return h, the residual of a pre-norm layer. qk_norm_ applies
LayerNorm, without a residual, to q and to k in packed qkv, each over all heads of a token. Bound by memory:
6 * hidden bytes per token in 16 bits for add_layer_norm, 8 * hidden for the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.tiles import hidden_launch


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: [total_tokens, hidden]; weight, bias: [hidden]. Returns [total_tokens, hidden] in x's dtype."""
    return pre_layer_norm_reference(x, residual, weight, bias, eps)[0]


def pre_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual: [total_tokens, hidden]; weight, bias: [hidden]. Returns (y, h), both like x."""
    h = x.float() + residual.float()
    return F.layer_norm(h, weight.shape, weight.float(), bias.float(), eps).to(x.dtype), h.to(x.dtype)


def rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [total_tokens, hidden], residual None for zeros; weight: [hidden]. Returns (y, h), both like x."""
    h = x.float() + (0 if residual is None else residual.float())
    return F.rms_norm(h, weight.shape, weight.float(), eps).to(x.dtype), h.to(x.dtype)


def qk_norm_reference(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Normalize q and k in place.

    qkv: [total_tokens, 3, heads, head_dim]; weight, bias: [2 * heads * head_dim], q's then k's.
    """
    for rows, row_weight, row_bias in zip(
        qkv[:, :2].unbind(1), weight.float().chunk(2), bias.float().chunk(2), strict=True
    ):
        rows.copy_(F.layer_norm(rows.flatten(1).float(), row_weight.shape, row_weight, row_bias, eps).view(rows.shape))


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
def _norm_kernel(
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
):
    # int64: total_tokens * hidden exceeds 2**31 in one large batch
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    x = tl.load(x_ptr + token * stride_xt + h, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + token * stride_rt + h, mask=mask, other=0.0).to(tl.float32)
    if sum_ptr is not None:
        tl.store(sum_ptr + token * HIDDEN + h, x, mask=mask)
    if bias_ptr is None:
        weight = tl.load(weight_ptr + h, mask=mask, other=0.0).to(tl.float32)
        y = x * (1 / tl.sqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)) * weight
    else:
        y = normalized(x, mask, weight_ptr, bias_ptr, h, eps, HIDDEN)
    tl.store(y_ptr + token * HIDDEN + h, y, mask=mask)


@triton.jit
def _qk_norm_kernel(
    qkv_ptr, weight_ptr, bias_ptr, stride_qt, stride_qs, eps, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # q, then k
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    row_ptrs = qkv_ptr + token * stride_qt + part * stride_qs + h
    x = tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = normalized(x, mask, weight_ptr + part * HIDDEN, bias_ptr + part * HIDDEN, h, eps, HIDDEN)
    tl.store(row_ptrs, y, mask=mask)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, total: Tensor | None
) -> Tensor:
    """Launch one program per row, of RMSNorm if bias is None. x and residual may be strided by token."""
    total_tokens, hidden = x.shape
    for name, rows in {"x": x, "residual": residual}.items():
        check_rows(name, rows, total_tokens, hidden)
    for name, vector in {"weight": weight, "bias": bias}.items():
        check_rows(name, vector, hidden)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_kernel[(total_tokens,)](
        x,
        residual,
        weight,
        bias,
        y,
        total,
        stride_xt=x.stride(0),
        stride_rt=0 if residual is None else residual.stride(0),
        eps=eps,
        **hidden_launch(hidden),
    )
    return y


def add_layer_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _launch(x, residual, weight, bias, eps, None)


def pre_layer_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(x, residual, weight, bias, eps, total), total


def rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return pre_layer_norm_triton(x, residual, weight, None, eps)


def qk_norm_triton(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Launch one program per token for q and one for k. qkv may be strided by token; its heads must be contiguous."""
    total_tokens, _, heads, head_dim = qkv.shape
    hidden = heads * head_dim
    if qkv.stride()[2:] != (head_dim, 1):
        raise ValueError(f"the heads of a token must be contiguous, got strides {qkv.stride()}: pass .contiguous()")
    check_rows("weight", weight, 2 * hidden)
    check_rows("bias", bias, 2 * hidden)
    _qk_norm_kernel[(total_tokens, 2)](
        qkv, weight, bias, stride_qt=qkv.stride(0), stride_qs=qkv.stride(1), eps=eps, **hidden_launch(hidden)
    )


add_layer_norm = operation(add_layer_norm_reference, cuda=add_layer_norm_triton)
pre_layer_norm = operation(pre_layer_norm_reference, cuda=pre_layer_norm_triton)
rms_norm = operation(rms_norm_reference, cuda=rms_norm_triton)
qk_norm_ = operation(qk_norm_reference, cuda=qk_norm_triton, mutates_args=("qkv",))
