"""Linear to q, k and v with q and k rotated by position in the same pass: `linear_invariant`, then `rotary_`.

Like `linear_invariant`, a row's bits do not depend on the number of rows. Against two passes, q and k are not written
and read again (8 * hidden bytes per token in 16 bits), and are rounded once, after the rotation.

Bound by arithmetic: 6 * hidden**2 flops per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard
from unpadded_kernels.linear import linear_invariant_triton
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.linear_kernels import Epilogue, launch_linear
from unpadded_kernels.rotary import check_cos_sin, rotary_reference, rotary_triton


def linear_rotary_reference(x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int) -> Tensor:
    """x: [total_tokens, hidden]; weight: [3 * heads * head_dim, hidden], rows of q, k, v; bias: its rows or None.

    cos_sin: [total_tokens, head_dim] fp32, from rotary_cos_sin. Returns qkv: [total_tokens, 3, heads, head_dim].
    """
    qkv = F.linear(x, weight, bias).view(-1, 3, heads, cos_sin.shape[1])
    rotary_reference(qkv, cos_sin)
    return qkv


def linear_rotary_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int) -> Tensor:
    qkv = linear_cpu(x, weight, bias).view(-1, 3, heads, cos_sin.shape[1])
    rotary_reference(qkv, cos_sin)
    return qkv


def linear_rotary_triton(x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int) -> Tensor:
    """Run one kernel, or two when head_dim is above 128 or no power of two, since a tile contains whole heads."""
    head_dim = cos_sin.shape[1]
    if weight.shape[0] != 3 * heads * head_dim:
        raise ValueError(
            f"weight must have 3 * heads * head_dim = 3 * {heads} * {head_dim} rows, got {weight.shape[0]}"
        )
    check_cos_sin(cos_sin, x.shape[0], head_dim)
    shape = (-1, 3, heads, head_dim)
    if head_dim <= 128 and head_dim.bit_count() == 1:
        return launch_linear(x, weight, Epilogue(bias=bias, cos_sin=cos_sin), x.dtype).view(shape)
    qkv = linear_invariant_triton(x, weight, bias).view(shape)
    rotary_triton(qkv, cos_sin)
    return qkv


linear_rotary = torch.library.custom_op("unpadded::linear_rotary", linear_rotary_reference, mutates_args=())
linear_rotary.register_kernel("cpu", linear_rotary_cpu)
linear_rotary.register_kernel("cuda", device_guard(linear_rotary_triton))


@linear_rotary.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int) -> Tensor:
    return x.new_empty(x.shape[0], 3, heads, cos_sin.shape[1])
