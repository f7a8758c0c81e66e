"""Matrix products of a layer: y = x @ weight.T + bias, alone and with the MLP's activation in the same pass.

Bound by arithmetic: 2 * in_features * out_features flops per token. A row of the result has the same bits whatever rows
stand beside it; on CUDA that holds per product of one shape (cuBLAS chooses its kernel by the number of rows).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import TensorDescriptor, device_guard, triton
from unpadded_kernels.activation import GATED, KINDS, activation_reference, activation_triton
from unpadded_kernels.linear_kernels import _linear_kernel
from unpadded_kernels.tiles import FUSED_ACTIVATION, generation, linear_tile, multiprocessors

# oneDNN's activations, as (attribute, algorithm) of its fused product.
_ONEDNN_ACTIVATION = {
    "swiglu": ("swish", ""),
    "geglu": ("gelu", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}

# Fewest rows of a product whose bits are those of any more. In fp32 oneDNN gives a lone row to another kernel; the one
# of torch 2.11 does so up to 127 rows, where in_features is 385, and fewer above (in_features 32 to 4096, 2026-11).
_LEAST_ROWS = 128 if torch.__version__.startswith("2.11.") else 2

# Rows of every bf16 product where the processor has AMX, whose sums follow their number: 1.4 TFLOP/s in such blocks,
# 0.9 in blocks of 64 and 2.2 of 512, to which a query would be filled up (768 x 3072, Xeon of 2 cores, 2026-11).
_AMX_ROWS = 128


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [total_tokens, in_features]; weight: [out_features, in_features]; bias: [out_features] or None."""
    return F.linear(x, weight, bias)


def linear_activation_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """activation(linear(x, weight, bias), kind): [total_tokens, intermediate].

    x: [total_tokens, hidden]; weight: [2 * intermediate, hidden], gate rows then up rows, when kind is gated (swiglu,
    geglu), else [intermediate, hidden] (gelu, gelu_tanh); bias: [weight's rows] or None.
    """
    return activation_reference(F.linear(x, weight, bias), kind)


def onednn_runs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused product takes this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _onednn_product(x: Tensor, out_features: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """product of the rows of x, [total_tokens, out_features], with bits that do not depend on how many there are."""
    total_tokens = x.shape[0]
    if x.dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return product(_filled(x, _LEAST_ROWS))[:total_tokens]
    y = x.new_empty(total_tokens, out_features)
    for rows, y_rows in zip(x.split(_AMX_ROWS), y.split(_AMX_ROWS), strict=True):
        y_rows.copy_(product(_filled(rows, _AMX_ROWS))[: len(rows)])
    return y


def _filled(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros below it, `rows` in all: the bits of a product's row depend on how rows are shared out."""
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if x.shape[0] < rows else x


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product where it runs: F.linear goes to MKL in fp32, 2.3 times slower on an EPYC (2026-11)."""
    total_tokens = x.shape[0]
    if total_tokens == 0:
        return x.new_empty(0, weight.shape[0])
    if onednn_runs(x.dtype):
        return onednn_linear(x, (weight,), bias, None)
    return F.linear(_filled(x, -(-total_tokens // 8) * 8), weight, bias)[:total_tokens]


def linear_activation_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if kind not in _ONEDNN_ACTIVATION or not onednn_runs(x.dtype) or x.shape[0] == 0:
        return activation_reference(linear_cpu(x, weight, bias), kind)
    return onednn_linear(x, weight.chunk(2) if kind in GATED else (weight,), bias, kind)


def onednn_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, kind: str | None) -> Tensor:
    """The activation, and up's multiplication by it, ride in oneDNN's products: nothing is written unactivated.

    weights: the weight, or of a gated kind gate's and up's, plain or as oneDNN lays them out. At least one row of x.
    """
    product = torch.ops.mkldnn._linear_pointwise
    attribute, algorithm = ("none", "") if kind is None else _ONEDNN_ACTIVATION[kind]
    if len(weights) == 1:
        return _onednn_product(
            x, len(weights[0]), lambda rows: product(rows, weights[0], bias, attribute, [], algorithm)
        )
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)

    def gated(rows: Tensor) -> Tensor:
        gate = product(rows, weights[0], gate_bias, attribute, [], algorithm)
        y: Tensor = product.binary(rows, gate, weights[1], up_bias, "mul")
        return y

    return _onednn_product(x, len(weights[1]), gated)


def linear_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """linear, then where kind is given its activation, in one order of additions whatever the number of rows."""
    return linear_reference(x, weight, bias) if kind is None else linear_activation_reference(x, weight, bias, kind)


def linear_invariant_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return linear_cpu(x, weight, bias) if kind is None else linear_activation_cpu(x, weight, bias, kind)


def _takes_descriptors(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.itemsize % 16 == 0 for tensor in tensors)


def product_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None, cos_sin: Tensor | None) -> Tensor:
    """The product of rows that have no scales, in x's dtype."""
    return scaled_product_triton(x, None, weight, None, bias, kind, cos_sin, x.dtype)


def scaled_product_triton(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kind: str | None,
    cos_sin: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As many programs as run at once, tile after tile. The dimensions fix the tiles and the order of additions.

    x_scale, weight_scale: those of rows in e4m3, else None; kind: the activation that follows, or None; cos_sin: the
    table that turns q and k where weight gives qkv, or None; dtype: the result's.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}: use swiglu, geglu, gelu or gelu_tanh")
    (total_tokens, in_features), rows = x.shape, weight.shape[0]
    if weight.shape[1] != in_features or (bias is not None and bias.shape != (rows,)):
        raise ValueError(
            f"weight must be [out_features, {in_features}] and bias [out_features], got {tuple(weight.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    vectors = (vector for vector in (x_scale, weight_scale, bias) if vector is not None)
    if x.stride(1) != 1 or weight.stride(1) != 1 or not all(vector.is_contiguous() for vector in vectors):
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {weight.stride()}: pass .contiguous()")
    gated, head_dim = kind in GATED, 0 if cos_sin is None else cos_sin.shape[1]
    follows = "rotary" if head_dim else "gated" if gated else "activation" if kind else "nothing"
    out_features = rows // 2 if gated else rows
    y = torch.empty((total_tokens, out_features), dtype=dtype, device=x.device)
    if total_tokens == 0:
        return y
    tile = linear_tile(x.dtype, follows, generation(x.device))
    if tile.tma and not _takes_descriptors(x, weight, y):
        tile = linear_tile(x.dtype, follows, 80)
    x_source, weight_source, y_target = x, weight, y
    if tile.tma:
        x_source = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
        parts, block = rows // out_features, [tile.block_n, tile.block_k]
        weight_source = TensorDescriptor.from_tensor(weight.view(parts, out_features, -1), [parts, *block])
        y_target = TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n])
    tiles = triton.cdiv(total_tokens, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    _linear_kernel[(min(tiles, tile.at_once * multiprocessors(x.device)),)](
        x_source,
        x_scale,
        weight_source,
        weight_scale,
        bias,
        cos_sin,
        y_target,
        total_tokens=total_tokens,
        stride_xt=x.stride(0),
        stride_wn=weight.stride(0),
        stride_yt=y.stride(0),
        IN=in_features,
        OUT=out_features,
        KIND=kind,
        GATED=gated,
        SCALED=x_scale is not None,
        HAS_BIAS=bias is not None,
        HEAD_DIM=head_dim,
        TMA=tile.tma,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.launch,
    )
    return y


def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return product_triton(x, weight, bias, kind, None)


def linear_activation_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """One kernel where tiles.py says so, else the library's product and the activation's kernel."""
    if generation(x.device) in FUSED_ACTIVATION:
        return linear_invariant_triton(x, weight, bias, kind)
    return activation_triton(F.linear(x, weight, bias), kind)


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
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in GATED else weight.shape[0])


@linear_invariant.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in GATED else weight.shape[0])
