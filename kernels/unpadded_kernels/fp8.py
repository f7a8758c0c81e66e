"""Quantization of rows to 8 bits, e4m3 with one fp32 scale per row, and linear layers over such rows.

    quantize_rows:  scale[t] = max |x[t]| / 448,   rows[t] = e4m3(x[t] / scale[t])
    linear_fp8:     y[t, n] = activation(x_scale[t] * weight_scale[n] * (x[t] @ weight[n]) + bias[n])

The largest e4m3 value is 448 and its mantissa has 3 bits, so an element's error is at most a 16th of the element. Sums
are as precise as the tensor cores': about 14 bits on sm_90, according to publications. A row's bits do not depend on
the number of rows.

quantize_rows is bound by memory, 3 bytes per element of 16 bits; linear_fp8 by arithmetic, 2 * in_features *
out_features flops per token, at twice the rate of 16 bits.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.linear import linear_invariant_reference, linear_invariant_triton
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.tiles import hidden_launch

E4M3 = torch.float8_e4m3fn


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [total_tokens, width]. Returns its rows in e4m3 and their scales: [total_tokens] fp32."""
    largest = x.float().abs().amax(1).clamp_min(1e-30)  # the scale of a row of zeros must not be 0
    limit = torch.full_like(largest, 448.0)  # torch replaces a division by a Python number with a multiplication
    return (x.float() * (limit / largest)[:, None]).to(E4M3), largest / limit


def dequantize_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values of quantized rows: [total_tokens, width]."""
    return rows.float() * scale[:, None]


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


@triton.jit
def _quantize_rows_kernel(x_ptr, rows_ptr, scale_ptr, stride_xt, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    x = tl.load(x_ptr + token * stride_xt + h, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30)
    # div_rn: fast division differs from the reference's by one unit in the last place
    tl.store(rows_ptr + token * HIDDEN + h, x * tl.div_rn(448.0, largest), mask=mask)
    tl.store(scale_ptr + token, tl.div_rn(largest, 448.0))


def quantize_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """One program per row. The rows of x may be strided, their elements may not."""
    total_tokens, width = x.shape
    check_rows("x", x, total_tokens, width)
    rows = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(total_tokens, dtype=torch.float32, device=x.device)
    _quantize_rows_kernel[(total_tokens,)](x, rows, scale, stride_xt=x.stride(0), **hidden_launch(width))
    return rows, scale


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
    return linear_invariant_triton(x, weight, bias, kind, dtype, x_scale, weight_scale)


quantize_rows = operation(quantize_rows_reference, cuda=quantize_rows_triton)
linear_fp8 = operation(
    linear_fp8_reference,
    # slower than fp32, since no CPU multiplies e4m3, but invariant to the batch
    cpu=partial(linear_fp8_reference, linear=linear_cpu),
    cuda=linear_fp8_triton,
    schema="(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? kind, ScalarType dtype)"
    " -> Tensor",
)
