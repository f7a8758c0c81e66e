"""Linear layers: y = x @ weight.T + bias, optionally followed by the activation of an MLP or by rotary.

`linear` runs the library's matmul. `linear_invariant` runs this project's kernel, which applies the activation in the
same pass and always adds in the same order: a row's bits do not depend on the number of rows. On a CPU both have this
property; on CUDA cuBLAS chooses its kernel by the number of rows. `linear_activation` runs the one or the other, with
the activation as a second kernel after the library's matmul: see `choices`.

`linear_rotary` is linear to q, k and v with q and k rotated by position. On sm_90 one kernel does both: q and k are not
written and read again (8 * hidden bytes per token in 16 bits), and they are rounded once, after the rotation. Otherwise
`rotary_` follows the matmul of `linear`, or of `linear_invariant`.

Bound by arithmetic: 2 * in_features * out_features flops per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows
from unpadded_kernels.activation import activation_reference, activation_triton
from unpadded_kernels.choices import chosen
from unpadded_kernels.hopper import is_supported
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.linear_kernels import Epilogue, launch_linear
from unpadded_kernels.rotary import check_cos_sin, rotary_reference, rotary_triton


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [total_tokens, in_features]; weight: [out_features, in_features]; bias: [out_features] or None."""
    return F.linear(x, weight, bias)


def linear_activation_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return activation(linear(x, weight, bias), kind): [total_tokens, intermediate].

    x: [total_tokens, hidden]; weight: [2 * intermediate, hidden], gate rows then up rows, when kind is gated (swiglu,
    geglu), else [intermediate, hidden] (gelu, gelu_tanh); bias: [weight's rows] or None.
    """
    return activation_reference(F.linear(x, weight, bias), kind)


def linear_activation_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if chosen("linear_activation", x) == "library":
        return activation_triton(F.linear(x, weight, bias), kind)
    return fused_linear("linear_activation", x, weight, Epilogue(bias=bias, kind=kind), x.dtype)


def linear_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Return `linear`, or `linear_activation` when kind is not None."""
    return linear_reference(x, weight, bias) if kind is None else linear_activation_reference(x, weight, bias, kind)


def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return fused_linear("linear_invariant", x, weight, Epilogue(bias=bias, kind=kind), x.dtype)


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
    check_rows("weight", weight, 3 * heads * head_dim, x.shape[1])
    check_cos_sin(cos_sin, x.shape[0], head_dim)
    shape = (-1, 3, heads, head_dim)
    op = "linear_invariant" if invariant else "linear_rotary"
    fused = try_hopper(op, x, weight, Epilogue(bias=bias, cos_sin=cos_sin), x.dtype)
    if fused is not None:
        return fused.view(shape)
    qkv = (linear_invariant_triton if invariant else F.linear)(x, weight, bias).view(shape)
    rotary_triton(qkv, cos_sin)
    return qkv


def fused_linear(op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """Return epilogue(x @ weight.T) in dtype from the kernel that `choices` has for the op."""
    y = try_hopper(op, x, weight, epilogue, dtype)
    return launch_linear(x, weight, epilogue, dtype) if y is None else y


def try_hopper(op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor | None:
    """Return the same from the kernel for sm_90, or None where it is not chosen or cannot run."""
    if chosen(op, x) != "hopper" or not is_supported(x.device):
        return None
    from unpadded_kernels.hopper import linear as hopper  # needs Gluon

    return hopper.linear_hopper(x, weight, epilogue, dtype) if hopper.fits(x, weight, epilogue, dtype) else None


linear = operation(linear_reference, cpu=linear_cpu)
linear_activation = operation(linear_activation_reference, cpu=linear_cpu, cuda=linear_activation_triton)
linear_invariant = operation(linear_invariant_reference, cpu=linear_cpu, cuda=linear_invariant_triton)
linear_rotary = operation(linear_rotary_reference, cuda=linear_rotary_triton)
