"""Residual add + LayerNorm or RMSNorm, the last step of both halves of a layer.

    h = x + residual
    LayerNorm:  y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias
    RMSNorm:    y = h * rsqrt(mean(h ** 2) + eps) * weight

add_layer_norm returns y; pre_layer_norm and rms_norm also return h, the residual of a pre-norm layer. Bound by memory:
6 * hidden bytes per token in 16 bits for add_layer_norm, 8 * hidden for the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels import avx512
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


def _runs_in_c(x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    r = x if residual is None else residual
    return avx512.supports(x.dtype) and x.dtype == r.dtype == weight.dtype and x.stride(-1) == r.stride(-1) == 1


def add_layer_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if _runs_in_c(x, residual, weight):
        return avx512.norm(x, residual, weight, bias, eps, None)
    return add_layer_norm_reference(x, residual, weight, bias, eps)


def pre_layer_norm_cpu(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute RMSNorm if bias is None."""
    if _runs_in_c(x, residual, weight):
        total = torch.empty(x.shape, dtype=x.dtype)
        return avx512.norm(x, residual, weight, bias, eps, total), total
    if bias is None:
        return rms_norm_reference(x, residual, weight, eps)
    assert residual is not None
    return pre_layer_norm_reference(x, residual, weight, bias, eps)


add_layer_norm = operation(add_layer_norm_reference, cpu=add_layer_norm_cpu, cuda=add_layer_norm_triton)
pre_layer_norm = operation(pre_layer_norm_reference, cpu=pre_layer_norm_cpu, cuda=pre_layer_norm_triton)
rms_norm = operation(
    rms_norm_reference,
    cpu=lambda x, residual, weight, eps: pre_layer_norm_cpu(x, residual, weight, None, eps),
    cuda=rms_norm_triton,
)
