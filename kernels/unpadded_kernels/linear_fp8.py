"""Linear layer over rows in 8 bits (see `fp8`), optionally followed by an MLP's activation in the same pass.

    y[t, n] = activation(x_scale[t] * weight_scale[n] * (x[t] @ weight[n]) + bias[n])

A row's bits do not depend on the number of rows. Sums are as precise as the tensor cores': about 14 bits on sm_90,
according to publications; e4m3 itself has 4.

Bound by arithmetic: 2 * in_features * out_features flops per token, at twice the rate of 16 bits.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels.fp8 import E4M3, dequantize_rows
from unpadded_kernels.linear import fused_linear, linear_invariant_reference
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.linear_kernels import Epilogue


def linear_fp8_reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
    linear: Callable[..., Tensor] = linear_invariant_reference,
) -> Tensor:
    """Return `linear`, or `linear_activation` when kind is not None, of the dequantized rows, computed in fp32.

    x: [total_tokens, in_features] e4m3; x_scale: [total_tokens] fp32; weight: [rows, in_features] e4m3, gate rows then
    up rows when kind is gated; weight_scale: [rows] fp32; bias: [rows] or None. Returns [total_tokens, out_features]
    in dtype.
    """
    bias = None if bias is None else bias.float()
    return linear(dequantize_rows(x, x_scale), dequantize_rows(weight, weight_scale), bias, kind).to(dtype)


def linear_fp8_triton(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
) -> Tensor:
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be {E4M3}, got {x.dtype} and {weight.dtype}: pass them to quantize_rows")
    epilogue = Epilogue(scales=(x_scale, weight_scale), bias=bias, kind=kind)
    return fused_linear("linear_fp8", x, weight, epilogue, dtype)


linear_fp8 = operation(
    linear_fp8_reference,
    # slower than fp32, since no CPU multiplies e4m3, but invariant to the batch
    cpu=partial(linear_fp8_reference, linear=linear_cpu),
    cuda=linear_fp8_triton,
    schema="(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? kind, ScalarType dtype)"
    " -> Tensor",
)
