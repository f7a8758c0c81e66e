"""Matrix products of a layer: y = x @ weight.T + bias, alone and with the MLP's activation in the same pass.

Bound by arithmetic: 2 * in_features * out_features flops per token. A row of the result has the same bits whatever rows
stand beside it; on CUDA that holds per product of one shape (cuBLAS chooses its kernel by the number of rows).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.activation import activation_reference

# oneDNN's activations, as (attribute, algorithm) of its fused product.
_ONEDNN_ACTIVATION = {
    "swiglu": ("swish", ""),
    "geglu": ("gelu", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [total_tokens, in_features]; weight: [out_features, in_features]; bias: [out_features] or None."""
    return F.linear(x, weight, bias)


def linear_activation_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """activation(linear(x, weight, bias), kind): [total_tokens, intermediate].

    x: [total_tokens, hidden]; weight: [2 * intermediate, hidden], gate rows then up rows, when kind is gated (swiglu, geglu),
    else [intermediate, hidden] (gelu, gelu_tanh); bias: [weight's rows] or None.
    """
    return activation_reference(F.linear(x, weight, bias), kind)


def _onednn_runs(x: Tensor) -> bool:
    """Whether oneDNN's fused product takes this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _at_least(rows: int, x: Tensor) -> Tensor:
    """x with zero rows below it: a product of very few rows adds up in another order than one of many."""
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if x.shape[0] < rows else x


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product where it runs: F.linear goes to MKL in fp32, 2.3 times slower on an EPYC (2026-11)."""
    total_tokens = x.shape[0]
    if total_tokens == 0:
        return x.new_empty(0, weight.shape[0])
    if _onednn_runs(x):
        product = torch.ops.mkldnn._linear_pointwise
        return product(_at_least(2, x), weight, bias, "none", [], "")[:total_tokens]
    return F.linear(_at_least(8, x), weight, bias)[:total_tokens]


def linear_activation_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation, and up's multiplication by it, ride in oneDNN's products: gate and up are never written unactivated."""
    if kind not in _ONEDNN_ACTIVATION or not _onednn_runs(x) or x.shape[0] == 0:
        return activation_reference(linear_cpu(x, weight, bias), kind)
    total_tokens = x.shape[0]
    x = _at_least(2, x)
    attribute, algorithm = _ONEDNN_ACTIVATION[kind]
    product = torch.ops.mkldnn._linear_pointwise
    if kind in ("gelu", "gelu_tanh"):
        return product(x, weight, bias, attribute, [], algorithm)[:total_tokens]
    gate_weight, up_weight = weight.chunk(2)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    gate = product(x, gate_weight, gate_bias, attribute, [], algorithm)
    return product.binary(x, gate, up_weight, up_bias, "mul")[:total_tokens]


linear = torch.library.custom_op("unpadded::linear", linear_reference, mutates_args=())
linear.register_kernel("cpu", linear_cpu)
linear_activation = torch.library.custom_op("unpadded::linear_activation", linear_activation_reference, mutates_args=())
linear_activation.register_kernel("cpu", linear_activation_cpu)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@linear_activation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in ("swiglu", "geglu") else weight.shape[0])
