"""A linear layer in 8-bit integers on a CPU: y = activation(x @ weight.T + bias), quantized row by row.

    x[i]      = x_scale[i] * q[i] + middle[i]        middle = (max(x[i]) + min(x[i])) / 2,  |q| <= 127
    weight[j] = weight_scale[j] * p[j]               |p| <= 127
    y[i, j]   = x_scale[i] * weight_scale[j] * sum(q[i] * p[j]) + middle[i] * sum(weight[j]) + bias[j]

The sums are exact in int32, so a row's bits do not depend on the number of rows. An offset per row keeps the precision
of rows that are not centered, such as those after a GELU or with an outlier (bench/NOTES.md). Bound by arithmetic: VNNI
and AMX compute twice the flops of bf16.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.activation import GATED, activation_reference
from unpadded_kernels.linear_cpu import pad_rows

INT8_BLOCK = 256  # rows at a time, whose results in fp32 stay in a core's cache
_TINY = 1e-30  # scale of a row of equal values, which is quantized to zeros


class Int8Weight(NamedTuple):
    """A weight of [out_features, in_features], or the gate or up rows of one."""

    packed: Tensor  # p in oneDNN's own layout
    scale: Tensor  # [out_features] fp32
    sums: Tensor  # [out_features] fp32, sum(weight[j]) as quantized
    zero_points: Tensor  # [out_features] int32 zeros


def int8_is_supported() -> bool:
    """Whether the processor has instructions for sums of 8-bit products that do not saturate: VNNI or AMX."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return p, [out_features, in_features] int8, and weight_scale, [out_features] fp32."""
    scale = (weight.float().abs().amax(1) / 127).clamp_(min=_TINY)
    return (weight.float() / scale[:, None]).round_().to(torch.int8), scale


def prepack_int8(weight: Tensor, kind: str | None = None) -> tuple[Int8Weight, ...]:
    """Quantize a weight for `linear_int8`: gate and up rows apart when kind is gated.

    weight: [out_features, in_features]; kind: the activation that follows, or None.
    """
    parts = []
    for part in weight.chunk(2) if kind in GATED else (weight,):
        p, scale = quantize_weight(part)
        packed = torch.ops.onednn.qlinear_prepack(p, None)
        parts.append(Int8Weight(packed, scale, p.sum(1) * scale, torch.zeros(len(p), dtype=torch.int32)))
    return tuple(parts)


def quantize_rows_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q + 128, [total_tokens, in_features] uint8, x_scale and middle, [total_tokens, 1] fp32."""
    x = x.float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle = torch.lerp(low, high, 0.5)
    scale = (high - low).mul_(1 / 254).clamp_(min=_TINY)
    q = (x - middle).div_(scale).round_().to(torch.int8)
    return q.view(torch.uint8).bitwise_xor_(128), scale, middle


def linear_int8(
    x: Tensor, parts: Sequence[Int8Weight], bias: Tensor | None, kind: str | None, dtype: torch.dtype
) -> Tensor:
    """x: [total_tokens, in_features]; parts: see `prepack_int8`. Returns [total_tokens, out_features] in dtype."""
    return torch.cat([_linear_of_block(rows, parts, bias, kind).to(dtype) for rows in x.split(INT8_BLOCK)])


def _linear_of_block(x: Tensor, parts: Sequence[Int8Weight], bias: Tensor | None, kind: str | None) -> Tensor:
    quantized = quantize_rows_int8(pad_rows(x))
    biases = (None,) * len(parts) if bias is None else bias.chunk(len(parts))
    ys = [_affine(*quantized, part, part_bias)[: x.shape[0]] for part, part_bias in zip(parts, biases, strict=True)]
    if kind is None:
        return ys[0]
    if kind not in GATED:
        return activation_reference(ys[0], kind)
    return (F.silu(ys[0], inplace=True) if kind == "swiglu" else F.gelu(ys[0])).mul_(ys[1])


def _affine(q: Tensor, scale: Tensor, middle: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias of quantized rows: [total_tokens, out_features] fp32."""
    y = torch.ops.onednn.qlinear_pointwise(
        *(q, 1.0, 128, weight.packed, weight.scale, weight.zero_points, None, 1.0, 0, torch.float32, "none", [], "")
    )
    y = y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)
    return y.addcmul_(weight.sums, middle)
