"""Linear layers: y = x @ weight.T + bias, optionally followed by the activation of an MLP.

`linear` and `linear_activation` run the library's matmul, on CUDA with the activation as a second kernel.
`linear_invariant` runs this project's kernel, which applies the activation in the same pass and always adds in the same
order: a row's bits do not depend on the number of rows. On a CPU all three have this property; on CUDA cuBLAS chooses
its kernel by the number of rows. The fused kernel serves `batch_invariant` and fp8 only: whether it is faster than
cuBLAS has not been measured.

Bound by arithmetic: 2 * in_features * out_features flops per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import device_guard
from unpadded_kernels.activation import GATED, activation_reference, activation_triton
from unpadded_kernels.linear_cpu import linear_activation_cpu, linear_cpu, linear_invariant_cpu
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
    return activation_triton(F.linear(x, weight, bias), kind)


def linear_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Return `linear`, or `linear_activation` when kind is not None."""
    return linear_reference(x, weight, bias) if kind is None else linear_activation_reference(x, weight, bias, kind)


def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return launch_linear(x, weight, Epilogue(bias=bias, kind=kind), x.dtype)


linear = torch.library.custom_op("unpadded::linear", linear_reference, mutates_args=())
linear.register_kernel("cpu", linear_cpu)
linear_activation = torch.library.custom_op("unpadded::linear_activation", linear_activation_reference, mutates_args=())
linear_activation.register_kernel("cpu", linear_activation_cpu)
linear_activation.register_kernel("cuda", device_guard(linear_activation_triton))
linear_invariant = torch.library.custom_op("unpadded::linear_invariant", linear_invariant_reference, mutates_args=())
linear_invariant.register_kernel("cpu", linear_invariant_cpu)
linear_invariant.register_kernel("cuda", device_guard(linear_invariant_triton))


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@linear_activation.register_fake
@linear_invariant.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in GATED else weight.shape[0])
