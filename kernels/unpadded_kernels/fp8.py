"""Quantization of rows to 8 bits: e4m3 with one fp32 scale per row.

    scale[t] = max |x[t]| / 448,   rows[t] = e4m3(x[t] / scale[t])

The largest e4m3 value is 448 and its mantissa has 3 bits, so an element's error is at most a 16th of the element.
Bound by memory: 3 bytes per element of 16 bits.
"""

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.tiles import hidden_launch

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
# Taken as the maximum of a row of zeros, so that its scale is not 0.
_TINY = 1e-30


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [total_tokens, width]. Returns its rows in e4m3 and their scales: [total_tokens] fp32."""
    largest = x.float().abs().amax(1).clamp_min(_TINY)
    limit = torch.full_like(largest, _LARGEST)  # torch replaces a division by a Python number with a multiplication
    return (x.float() * (limit / largest)[:, None]).to(E4M3), largest / limit


def dequantize_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values of quantized rows: [total_tokens, width]."""
    return rows.float() * scale[:, None]


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


quantize_rows = operation(quantize_rows_reference, cuda=quantize_rows_triton)
