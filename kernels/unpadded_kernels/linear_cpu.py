"""The CPU body of all linear layers (see `linear`), through oneDNN where the processor and the dtype allow it.

A row of a result has the same bits whatever the number of rows. oneDNN and MKL choose their kernel by that number, so
inputs are padded with rows of zeros, or computed in blocks of one size, wherever the choice would change the bits.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.activation import GATED, activation_reference

# oneDNN's activations as (attribute, algorithm) of its fused linear.
_ONEDNN_ACTIVATION = {
    "swiglu": ("swish", ""),
    "geglu": ("gelu", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}

# From this number of rows on, bits do not depend on the number. In fp32 oneDNN runs another kernel for a single row;
# torch 2.11's does so up to 127 rows with in_features = 385, and for fewer above (in_features 32 to 4096, 2026-11).
_MIN_ROWS = 128 if torch.__version__.startswith("2.11.") else 2

# Rows of every bf16 linear on processors with AMX, whose sums depend on the number of rows: 1.4 TFLOP/s in blocks of
# 128, against 0.9 in blocks of 64 and 2.2 in blocks of 512, to which a query would be padded (768 x 3072, Xeon with
# 2 cores, 2026-11).
_AMX_ROWS = 128


def onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused linear supports this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Prefer oneDNN: F.linear calls MKL in fp32, which is 2.3 times slower on an EPYC (2026-11)."""
    total_tokens = x.shape[0]
    if total_tokens > 0 and onednn_supports(x.dtype) and (kind is None or kind in _ONEDNN_ACTIVATION):
        return _onednn_linear(x, weight.chunk(2) if kind in GATED else (weight,), bias, kind)
    if kind is not None:
        return activation_reference(linear_cpu(x, weight, bias), kind)
    if total_tokens == 0:
        return x.new_empty(0, weight.shape[0])
    return F.linear(pad_rows(x), weight, bias)[:total_tokens]


def can_prepack(weight: Tensor) -> bool:
    """Whether `prepack` supports this weight: it is on a CPU, in a dtype that oneDNN supports there."""
    return weight.device.type == "cpu" and onednn_supports(weight.dtype)


def prepack(weight: Tensor, kind: str | None = None) -> tuple[Tensor, ...]:
    """Copy a weight into oneDNN's own blocked layout, which it otherwise does in every call.

    weight: [out_features, in_features], one that `can_prepack`; kind: the activation that follows, or None.
    Returns opaque tensors for `linear_prepacked`: gate and up when kind is gated, else one.
    """
    parts = weight.detach().chunk(2) if kind in GATED else (weight.detach(),)
    return tuple(torch.ops.mkldnn._reorder_linear_weight(part) for part in parts)


def unpack(parts: Sequence[Tensor]) -> Tensor:
    """Return the weight that `prepack` was called with: [out_features, in_features]."""
    return torch.cat([part.to_dense() for part in parts])


def linear_prepacked(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Return `linear`, or `linear_activation` when kind is not None, of a prepacked weight, with the same bits."""
    return _onednn_linear(x, parts, bias, kind) if x.shape[0] else x.new_empty(0, len(parts[0]))


def _onednn_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, kind: str | None) -> Tensor:
    """Apply the activation, and the multiplication by up, inside oneDNN's matmuls: nothing is written unactivated.

    x: at least one row; weights: one, or gate and up when kind is gated; plain or prepacked.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    attribute, algorithm = ("none", "") if kind is None else _ONEDNN_ACTIVATION[kind]
    if len(weights) == 1:
        return _in_fixed_blocks(
            x, len(weights[0]), lambda rows: linear(rows, weights[0], bias, attribute, [], algorithm)
        )
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)

    def gated(rows: Tensor) -> Tensor:
        gate = linear(rows, weights[0], gate_bias, attribute, [], algorithm)
        y: Tensor = linear.binary(rows, gate, weights[1], up_bias, "mul")
        return y

    return _in_fixed_blocks(x, len(weights[1]), gated)


def _in_fixed_blocks(x: Tensor, out_features: int, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """Return linear(x), [total_tokens, out_features], such that a row's bits do not depend on the number of rows."""
    if x.dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return linear(pad_rows(x, _MIN_ROWS))[: x.shape[0]]
    y = x.new_empty(x.shape[0], out_features)
    for rows, y_rows in zip(x.split(_AMX_ROWS), y.split(_AMX_ROWS), strict=True):
        y_rows.copy_(linear(pad_rows(rows, _AMX_ROWS))[: rows.shape[0]])
    return y


def pad_rows(x: Tensor, minimum: int = 0) -> Tensor:
    """Append rows of zeros, up to one of few numbers, because oneDNN takes 0.2 ms to make a kernel for each."""
    step = 8 if x.shape[0] < 128 else 32
    rows = max(minimum, -(-x.shape[0] // step) * step)
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if x.shape[0] < rows else x
