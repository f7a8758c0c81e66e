"""Linear layers: y = x @ weight.T + bias, optionally followed by the activation of an MLP.

`linear` runs the library's matmul. `linear_invariant` runs this project's kernel, which applies the activation in the
same pass and always adds in the same order: a row's bits do not depend on the number of rows. On a CPU both have this
property; on CUDA cuBLAS chooses its kernel by the number of rows. `linear_activation` runs the one or the other, with
the activation as a second kernel after the library's matmul: see `choices`.

Bound by arithmetic: 2 * in_features * out_features flops per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels.activation import activation_reference, activation_triton
from unpadded_kernels.choices import chosen
from unpadded_kernels.hopper import is_supported
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.linear_kernels import Epilogue, launch_linear


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
