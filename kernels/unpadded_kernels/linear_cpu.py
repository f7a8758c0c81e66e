"""The CPU body of linear layers whose weights are plain, through oneDNN where the processor and the dtype allow it.

A row of a result has the same bits whatever the number of rows. oneDNN and MKL choose their kernel by that number, so
inputs are padded with rows of zeros, or computed in blocks of one size, wherever the choice would change the bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.activation import GATED, activation_reference

# oneDNN's activations as (attribute, algorithm) of its fused linear.
_ONEDNN_ACTIVATION = {
    None: ("none", ""),
    "swiglu": ("swish", ""),
    "geglu": ("gelu", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
# Rows from which bits do not depend on their number: oneDNN runs other kernels for few rows (measured: bench/NOTES.md).
_MIN_ROWS = 128 if torch.__version__.startswith("2.11.") else 2
# Rows per matmul in bf16 with AMX, whose sums depend on the number of rows and of threads (measured: bench/NOTES.md).
_AMX_ROWS = 128


def onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused linear supports this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Prefer oneDNN: F.linear calls MKL in fp32, which is 2.3 times slower on an EPYC (2026-11)."""
    if not onednn_supports(x.dtype) or kind not in _ONEDNN_ACTIVATION:
        y = F.linear(pad_rows(x), weight, bias)[: x.shape[0]]
        return y if kind is None else activation_reference(y, kind)
    parts = weight.chunk(2) if kind in GATED else (weight,)
    if x.dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return _onednn_linear(pad_rows(x, _MIN_ROWS), parts, bias, kind)[: x.shape[0]]
    parts = tuple(torch.ops.mkldnn._reorder_linear_weight(part) for part in parts)  # once, not in every block
    y = x.new_empty(x.shape[0], weight.shape[0] // len(parts))
    for rows, block in zip(x.split(_AMX_ROWS), y.split(_AMX_ROWS), strict=True):
        block.copy_(_onednn_linear(pad_rows(rows, _AMX_ROWS), parts, bias, kind)[: rows.shape[0]])
    return y


def _onednn_linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, kind: str | None) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    biases = (None,) * len(parts) if bias is None else bias.chunk(len(parts))
    attribute, algorithm = _ONEDNN_ACTIVATION[kind]
    y: Tensor = linear(x, parts[0], biases[0], attribute, [], algorithm)
    return y if len(parts) == 1 else linear.binary(x, y, parts[1], biases[1], "mul")


def pad_rows(x: Tensor, minimum: int = 1) -> Tensor:
    """Append rows of zeros, up to one of few numbers, because oneDNN takes 0.2 ms to make a kernel for each."""
    step = 8 if x.shape[0] < 128 else 32
    rows = max(minimum, -(-x.shape[0] // step) * step)
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if x.shape[0] < rows else x
