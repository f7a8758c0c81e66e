"""Matrix products of a layer: y = x @ weight.T + bias, alone and with the MLP's activation in the same pass.

Bound by arithmetic: 2 * in_features * out_features flops per token. A row of the result has the same bits whatever rows
stand beside it; on CUDA that holds per product of one shape (cuBLAS chooses its kernel by the number of rows).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._triton import TensorDescriptor, tl, triton
from unpadded_kernels.activation import GATED, KINDS, activate, activation_reference, activation_triton
from unpadded_kernels.tiles import FUSED_ACTIVATION, generation, linear_tile, programs

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

    x: [total_tokens, hidden]; weight: [2 * intermediate, hidden], gate rows then up rows, when kind is gated (swiglu,
    geglu), else [intermediate, hidden] (gelu, gelu_tanh); bias: [weight's rows] or None.
    """
    return activation_reference(F.linear(x, weight, bias), kind)


def _onednn_runs(x: Tensor) -> bool:
    """Whether oneDNN's fused product takes this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _filled(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros below it, `rows` in all: the bits of a product's row depend on how rows are shared out."""
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if x.shape[0] < rows else x


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product where it runs: F.linear goes to MKL in fp32, 2.3 times slower on an EPYC (2026-11)."""
    total_tokens = x.shape[0]
    if total_tokens == 0:
        return x.new_empty(0, weight.shape[0])
    if _onednn_runs(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(_filled(x, 2), weight, bias, "none", [], "")
        return y[:total_tokens]
    return F.linear(_filled(x, -(-total_tokens // 8) * 8), weight, bias)[:total_tokens]


def linear_activation_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation, and up's multiplication by it, ride in oneDNN's products: nothing is written unactivated."""
    if kind not in _ONEDNN_ACTIVATION or not _onednn_runs(x) or x.shape[0] == 0:
        return activation_reference(linear_cpu(x, weight, bias), kind)
    total_tokens = x.shape[0]
    x = _filled(x, 2)
    attribute, algorithm = _ONEDNN_ACTIVATION[kind]
    product = torch.ops.mkldnn._linear_pointwise
    y: Tensor
    if kind in ("gelu", "gelu_tanh"):
        y = product(x, weight, bias, attribute, [], algorithm)
        return y[:total_tokens]
    gate_weight, up_weight = weight.chunk(2)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    gate = product(x, gate_weight, gate_bias, attribute, [], algorithm)
    y = product.binary(x, gate, up_weight, up_bias, "mul")
    return y[:total_tokens]


def linear_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """linear, then where kind is given its activation, in one order of additions whatever the number of rows."""
    return linear_reference(x, weight, bias) if kind is None else linear_activation_reference(x, weight, bias, kind)


def linear_invariant_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return linear_cpu(x, weight, bias) if kind is None else linear_activation_cpu(x, weight, bias, kind)


@triton.jit
def _epilogue(
    gate, up, bias_ptr, n, OUT: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Bias and activation of one tile's fp32 sums."""
    if HAS_BIAS:
        gate += tl.load(bias_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptr + OUT + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    if KIND is not None:
        gate = activate(gate, up, KIND)
    return gate


@triton.jit(do_not_specialize=["total_tokens"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_tokens,
    stride_xt,
    stride_wn,
    stride_yt,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(total_tokens, BLOCK_M) * tiles_n
    k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        token = (tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        x_ptrs = x_ptr + token[:, None] * stride_xt + k[None, :]
        weight_ptrs = weight_ptr + n[:, None] * stride_wn + k[None, :]
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, IN, BLOCK_K):
            k_mask = (start + k < IN)[None, :]
            w_mask = (n < OUT)[:, None] & k_mask
            x = tl.load(x_ptrs + start, mask=(token < total_tokens)[:, None] & k_mask, other=0.0)
            weight = tl.load(weight_ptrs + start, mask=w_mask, other=0.0)
            gate = tl.dot(x, tl.trans(weight), gate, input_precision="ieee")
            if GATED:
                weight = tl.load(weight_ptrs + OUT * stride_wn + start, mask=w_mask, other=0.0)
                up = tl.dot(x, tl.trans(weight), up, input_precision="ieee")
        y = _epilogue(gate, up, bias_ptr, n, OUT, KIND, GATED, HAS_BIAS)
        y_mask = (token < total_tokens)[:, None] & (n < OUT)[None, :]
        tl.store(y_ptr + token[:, None] * stride_yt + n[None, :], y, mask=y_mask)


@triton.jit(do_not_specialize=["total_tokens"])
def _linear_tma_kernel(
    x_descriptor,
    weight_descriptor,
    bias_ptr,
    y_descriptor,
    total_tokens,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(total_tokens, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        token = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, IN, BLOCK_K):
            x = x_descriptor.load([token, k])
            gate = tl.dot(x, tl.trans(weight_descriptor.load([n, k])), gate)
            if GATED:
                up = tl.dot(x, tl.trans(weight_descriptor.load([OUT + n, k])), up)
        y = _epilogue(gate, up, bias_ptr, n + tl.arange(0, BLOCK_N), OUT, KIND, GATED, HAS_BIAS)
        y_descriptor.store([token, n], y.to(y_descriptor.dtype))


def _takes_descriptors(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.itemsize % 16 == 0 for tensor in tensors)


def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """One program per multiprocessor, tile after tile. The dimensions fix the tiles and the order of additions."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}: use swiglu, geglu, gelu or gelu_tanh")
    (total_tokens, in_features), rows = x.shape, weight.shape[0]
    if weight.shape[1] != in_features or (bias is not None and bias.shape != (rows,)):
        raise ValueError(
            f"weight must be [out_features, {in_features}] and bias [out_features], got {tuple(weight.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    if x.stride(1) != 1 or weight.stride(1) != 1 or (bias is not None and not bias.is_contiguous()):
        raise ValueError(f"rows must be contiguous, got strides {x.stride()} and {weight.stride()}: pass .contiguous()")
    gated = kind in GATED
    follows = "gated" if gated else "nothing" if kind is None else "activation"
    out_features = rows // 2 if gated else rows
    y = torch.empty((total_tokens, out_features), dtype=x.dtype, device=x.device)
    if total_tokens == 0:
        return y
    tile = linear_tile(x.dtype, follows, generation(x.device))
    use_tma = tile.tma and _takes_descriptors(x, weight, y)
    if tile.tma and not use_tma:
        tile = linear_tile(x.dtype, follows, 80)
    options = {
        "total_tokens": total_tokens,
        "IN": in_features,
        "OUT": out_features,
        "KIND": kind,
        "GATED": gated,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        **tile.launch,
    }
    tiles = triton.cdiv(total_tokens, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    grid = (min(tiles, programs(x.device)),)
    if use_tma:
        _linear_tma_kernel[grid](
            TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
            bias,
            TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n]),
            **options,
        )
    else:
        strides = {"stride_xt": x.stride(0), "stride_wn": weight.stride(0), "stride_yt": y.stride(0)}
        _linear_kernel[grid](x, weight, bias, y, **strides, **options)
    return y


def linear_activation_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """One kernel where tiles.py says so, else the library's product and the activation's kernel."""
    if generation(x.device) in FUSED_ACTIVATION:
        return linear_invariant_triton(x, weight, bias, kind)
    return activation_triton(F.linear(x, weight, bias), kind)


linear = torch.library.custom_op("unpadded::linear", linear_reference, mutates_args=())
linear.register_kernel("cpu", linear_cpu)
linear_activation = torch.library.custom_op("unpadded::linear_activation", linear_activation_reference, mutates_args=())
linear_activation.register_kernel("cpu", linear_activation_cpu)
linear_activation.register_kernel("cuda", linear_activation_triton)
linear_invariant = torch.library.custom_op("unpadded::linear_invariant", linear_invariant_reference, mutates_args=())
linear_invariant.register_kernel("cpu", linear_invariant_cpu)
linear_invariant.register_kernel("cuda", linear_invariant_triton)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@linear_activation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in GATED else weight.shape[0])


@linear_invariant.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if kind in GATED else weight.shape[0])
