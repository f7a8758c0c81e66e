"""Linear layers: y = x @ weight.T + bias, optionally followed by the activation of an MLP.

`linear` runs the library's matmul. `linear_invariant` runs this project's kernel, which applies the activation in the
same pass and always adds in the same order: a row's bits do not depend on the number of rows. On a CPU both have this
property; on CUDA cuBLAS chooses its kernel by the number of rows. `linear_activation` runs the one or the other, with
the activation as a second kernel after the library's matmul: see `FUSES_ACTIVATION`.

As many programs of the kernel as run at once take one tile of the result after the other. Bias and activation
are applied to a tile's fp32 sums before they are stored. Loads go through pointers or, from sm_90 on, tensor
descriptors (TMA).

Bound by arithmetic: 2 * in_features * out_features flops per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import TensorDescriptor, check_rows, tl, triton
from unpadded_kernels.activation import GATED, activate, activation_reference, activation_triton, check_kind
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.tiles import generation, linear_tile, multiprocessors

# Whether `linear_activation` is one kernel, by GPU generation, fp32 as on sm_80, whose tiles it uses. Not measured;
# predicted for H100 (2026-11): 11 % more tokens per second at 512 tokens per text.
FUSES_ACTIVATION = {80: False, 90: True, 100: False}


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [total_tokens, in_features]; weight: [out_features, in_features]; bias: [out_features] or None."""
    return F.linear(x, weight, bias)


def linear_activation_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return activation(linear(x, weight, bias), kind): [total_tokens, intermediate].

    x: [total_tokens, hidden]; weight: [2 * intermediate, hidden], gate rows then up rows, when kind is gated (swiglu,
    geglu), else [intermediate, hidden] (gelu, gelu_tanh); bias: [weight's rows] or None.
    """
    return activation_reference(F.linear(x, weight, bias), kind)


def linear_invariant_reference(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Return `linear`, or `linear_activation` when kind is not None."""
    return linear_reference(x, weight, bias) if kind is None else linear_activation_reference(x, weight, bias, kind)


@triton.jit
def matmul_tile(x_ptrs, weight_ptrs, up_offset, x_mask, weight_mask, IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K):
    """Return x @ weight.T in fp32 and, if GATED, x @ up.T, whose rows follow weight's by up_offset elements.

    x_ptrs, x_mask: [BLOCK_M, 1], rows of x; weight_ptrs, weight_mask: [BLOCK_N, 1], rows of weight. The names in upper
    case are constants.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k_mask = start + k < IN
        x = tl.load(x_ptrs + start + k, mask=x_mask & k_mask, other=0.0)
        weight = tl.load(weight_ptrs + start + k, mask=weight_mask & k_mask, other=0.0)
        gate = tl.dot(x, tl.trans(weight), gate, input_precision="ieee")
        if GATED:
            weight = tl.load(weight_ptrs + up_offset + start + k, mask=weight_mask & k_mask, other=0.0)
            up = tl.dot(x, tl.trans(weight), up, input_precision="ieee")
    return gate, up


@triton.jit
def _matmul_tile_tma(x_descriptor, weight_descriptor, token, n, IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K):
    """Return the same for x's rows from token on and weight's rows from n on, weight being [1 or 2, OUT, IN].

    Gate and up are one tile of one matmul: ptxas serializes the wgmmas of two (C7515), each with its full latency.
    """
    PARTS: tl.constexpr = 2 if GATED else 1
    y = tl.zeros([BLOCK_M, PARTS * BLOCK_N], tl.float32)
    for k in range(0, IN, BLOCK_K):
        weight = tl.reshape(weight_descriptor.load([0, n, k]), [PARTS * BLOCK_N, BLOCK_K])
        y = tl.dot(x_descriptor.load([token, k]), tl.trans(weight), y)
    up = y
    if GATED:
        # one thread holds both columns of a pair, so nothing moves between threads
        y, up = tl.split(tl.permute(tl.reshape(y, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1]))
    return y, up


@triton.jit(do_not_specialize=["total_tokens"])
def _linear_kernel(
    x_source,
    weight_source,
    bias_ptr,
    y_target,
    total_tokens,
    stride_xt,
    stride_wn,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x_source, weight_source, y_target: descriptors if TMA, else pointers. A pointer that is not used is None."""
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(total_tokens, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_token, first_n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        token = (first_token + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = first_n + tl.arange(0, BLOCK_N)
        token_mask, n_mask = (token < total_tokens)[:, None], n < OUT
        if TMA:
            y, up = _matmul_tile_tma(
                x_source, weight_source, first_token, first_n, IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            x_ptrs, weight_ptrs = x_source + token[:, None] * stride_xt, weight_source + n[:, None] * stride_wn
            up_offset, weight_mask = OUT * stride_wn, n_mask[:, None]
            y, up = matmul_tile(
                x_ptrs, weight_ptrs, up_offset, token_mask, weight_mask, IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K
            )
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_ptr + OUT + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if KIND is not None:
            y = activate(y, up, KIND)
        if TMA:
            y_target.store([first_token, first_n], y.to(y_target.dtype))
        else:
            tl.store(y_target + token[:, None] * OUT + n[None, :], y, mask=token_mask & n_mask[None, :])


def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None = None) -> Tensor:
    """Launch as many programs as run at once. Rows may be strided, their elements may not.

    The dimensions alone fix the tiles and the order of additions.
    """
    if kind is not None:
        check_kind(kind)
    (total_tokens, in_features), rows = x.shape, len(weight)
    check_rows("x", x, total_tokens, in_features)
    check_rows("weight", weight, rows, in_features)
    check_rows("bias", bias, rows)
    parts = 2 if kind in GATED else 1  # gate and up
    out_features = rows // parts
    y = torch.empty((total_tokens, out_features), dtype=x.dtype, device=x.device)
    if total_tokens == 0:
        return y
    tile_name = "gated" if parts == 2 else "activation" if kind else "nothing"
    tile = linear_tile(x.dtype, tile_name, generation(x.device))
    if tile.tma and not all(map(_can_be_described, (x, weight, y))):
        tile = linear_tile(x.dtype, tile_name, 80)
    x_source, weight_source, y_target = x, weight, y
    if tile.tma:  # one load takes the same rows of gate and up
        weight_source = TensorDescriptor.from_tensor(
            weight.view(parts, out_features, in_features), [parts, tile.block_n, tile.block_k]
        )
        x_source = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
        y_target = TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n])
    tiles = triton.cdiv(total_tokens, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    _linear_kernel[(min(tiles, multiprocessors(x.device)),)](
        x_source,
        weight_source,
        bias,
        y_target,
        total_tokens=total_tokens,
        stride_xt=x.stride(0),
        stride_wn=weight.stride(0),
        IN=in_features,
        OUT=out_features,
        KIND=kind,
        GATED=parts == 2,
        TMA=tile.tma,
        **tile.launch,
    )
    return y


def _can_be_described(tensor: Tensor) -> bool:
    """Whether TMA's alignment of 16 bytes is met."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.itemsize % 16 == 0


def linear_activation_triton(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if FUSES_ACTIVATION[80 if x.dtype == torch.float32 else generation(x.device)]:
        return linear_invariant_triton(x, weight, bias, kind)
    return activation_triton(F.linear(x, weight, bias), kind)


linear = operation(linear_reference, cpu=linear_cpu)
linear_activation = operation(linear_activation_reference, cpu=linear_cpu, cuda=linear_activation_triton)
linear_invariant = operation(linear_invariant_reference, cpu=linear_cpu, cuda=linear_invariant_triton)
