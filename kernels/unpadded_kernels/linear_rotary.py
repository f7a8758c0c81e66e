"""qkv of a layer with q and k turned by position: linear, then rotary_, in one pass where that is faster.

Bound by arithmetic: 6 * hidden**2 flops per token. Turned in the product's own pass, q and k are not read and written
again (8 * hidden bytes per token in 16 bits), and are rounded once, after the rotation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard
from unpadded_kernels.linear import linear_cpu, linear_invariant_triton, product_triton
from unpadded_kernels.rotary import check_cos_sin, rotary_reference, rotary_triton
from unpadded_kernels.tiles import FUSED_ROTARY, generation


def linear_rotary_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int, batch_invariant: bool
) -> Tensor:
    """x: [total_tokens, hidden]; weight: [3 * heads * head_dim, hidden], rows of q, k, v; bias: its rows or None.

    cos_sin: [total_tokens, head_dim] fp32 as rotary_cos_sin makes it; batch_invariant: one order of additions whatever
    the number of rows, on CUDA too. Returns qkv, [total_tokens, 3, heads, head_dim], with q and k turned.
    """
    return _turned(F.linear(x, weight, bias), cos_sin, heads)


def linear_rotary_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int, batch_invariant: bool
) -> Tensor:
    return _turned(linear_cpu(x, weight, bias), cos_sin, heads)


def _turned(product: Tensor, cos_sin: Tensor, heads: int) -> Tensor:
    qkv = product.view(-1, 3, heads, cos_sin.shape[1])
    rotary_reference(qkv, cos_sin)
    return qkv


def linear_rotary_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int, batch_invariant: bool
) -> Tensor:
    """One kernel where the bits must not follow the batch or tiles.py says so, else the library's product and a second.

    A tile holds whole heads, so a head_dim that is no power of two always takes two.
    """
    head_dim = cos_sin.shape[1]
    if weight.shape[0] != 3 * heads * head_dim:
        raise ValueError(
            f"weight must have 3 * heads * head_dim = 3 * {heads} * {head_dim} rows, got {weight.shape[0]}"
        )
    check_cos_sin(cos_sin, x.shape[0], head_dim)
    shape = (-1, 3, heads, head_dim)
    whole_heads = head_dim <= 128 and head_dim.bit_count() == 1
    if whole_heads and (batch_invariant or generation(x.device) in FUSED_ROTARY):
        return product_triton(x, weight, bias, None, cos_sin).view(shape)
    qkv = (linear_invariant_triton if batch_invariant else F.linear)(x, weight, bias).view(shape)
    rotary_triton(qkv, cos_sin)
    return qkv


linear_rotary = torch.library.custom_op("unpadded::linear_rotary", linear_rotary_reference, mutates_args=())
linear_rotary.register_kernel("cpu", linear_rotary_cpu)
linear_rotary.register_kernel("cuda", device_guard(linear_rotary_triton))


@linear_rotary.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int, batch_invariant: bool) -> Tensor:
    return x.new_empty(x.shape[0], 3, heads, cos_sin.shape[1])
