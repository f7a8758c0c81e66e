"""Linear to q, k and v with q and k rotated by position.

On sm_90 one kernel does both (see `choices`): q and k are not written and read again (8 * hidden bytes per token in 16
bits), and they are rounded once, after the rotation. Otherwise `rotary_` follows the library's matmul, or
`linear_invariant` where a row's bits must not depend on the number of rows.

Bound by arithmetic: 6 * hidden**2 flops per token.
"""

import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels.linear import linear, linear_invariant_triton, try_hopper
from unpadded_kernels.linear_kernels import Epilogue
from unpadded_kernels.rotary import check_cos_sin, rotary_reference, rotary_triton


def linear_rotary_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int, invariant: bool = False
) -> Tensor:
    """x: [total_tokens, hidden]; weight: [3 * heads * head_dim, hidden], rows of q, k, v; bias: its rows or None.

    cos_sin: [total_tokens, head_dim] fp32, from rotary_cos_sin; invariant: whether a row's bits must not depend on the
    number of rows, as they never do on a CPU. Returns qkv: [total_tokens, 3, heads, head_dim].
    """
    qkv: Tensor = linear(x, weight, bias).view(-1, 3, heads, cos_sin.shape[1])
    rotary_reference(qkv, cos_sin)
    return qkv


def linear_rotary_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos_sin: Tensor, heads: int, invariant: bool = False
) -> Tensor:
    head_dim = cos_sin.shape[1]
    if weight.shape[0] != 3 * heads * head_dim:
        raise ValueError(
            f"weight must have 3 * heads * head_dim = 3 * {heads} * {head_dim} rows, got {weight.shape[0]}"
        )
    check_cos_sin(cos_sin, x.shape[0], head_dim)
    shape = (-1, 3, heads, head_dim)
    op = "linear_invariant" if invariant else "linear_rotary"
    fused = try_hopper(op, x, weight, Epilogue(bias=bias, cos_sin=cos_sin), x.dtype)
    if fused is not None:
        return fused.view(shape)
    qkv = (linear_invariant_triton if invariant else F.linear)(x, weight, bias).view(shape)
    rotary_triton(qkv, cos_sin)
    return qkv


linear_rotary = operation(linear_rotary_reference, cuda=linear_rotary_triton)
