"""LayerNorm of q and of k in packed qkv, in place, each over all heads of a token.

    q = LayerNorm(q),   k = LayerNorm(k)

Bound by memory: 8 * hidden bytes per token in 16 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton
from unpadded_kernels.layer_norm import normalized
from unpadded_kernels.tiles import row_launch


def qk_norm_reference(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Normalize q and k in place.

    qkv: [total_tokens, 3, heads, head_dim]; weight, bias: [2 * heads * head_dim], q's then k's.
    """
    for rows, row_weight, row_bias in zip(
        qkv[:, :2].unbind(1), weight.float().chunk(2), bias.float().chunk(2), strict=True
    ):
        rows.copy_(F.layer_norm(rows.flatten(1).float(), row_weight.shape, row_weight, row_bias, eps).view(rows.shape))


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
    y = normalized(x, mask, weight_ptr + part * HIDDEN, bias_ptr + part * HIDDEN, h, eps, HIDDEN)
    tl.store(row_ptrs, y, mask=mask)


def qk_norm_triton(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Launch one program per token for q and one for k. qkv may be strided by token; its heads must be contiguous."""
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


qk_norm_ = torch.library.custom_op("unpadded::qk_norm_", qk_norm_reference, mutates_args=("qkv",))
qk_norm_.register_kernel("cuda", device_guard(qk_norm_triton))


@qk_norm_.register_fake
def _(qkv: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    return None
