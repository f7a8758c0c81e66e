"""Sparse weights: the logits of all vocabulary entries at all tokens, reduced to each text's maximum.

    y[b, v] = max(0, max_t x[t] . weight[v] + bias[v]), t over the tokens of text b

log1p keeps the order, so log1p(y) is SPLADE's max_t log1p(relu(logit)). The logits, 4 * vocabulary bytes per token, are
never stored: a program loops over the tokens of one text and keeps the maxima of one block of the vocabulary. Bound by
arithmetic: 2 * hidden * vocabulary flops per token.
"""

from itertools import pairwise

import torch
from torch import Tensor

from unpadded_kernels import avx512
from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.linear import matmul_tile
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.tiles import generation, linear_tile

GROUP = 8  # blocks of the vocabulary whose programs run side by side and read a text's tokens from the L2 cache
CPU_BLOCK = 1024  # entries whose logits a CPU computes at a time


def vocabulary_max_reference(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Reduce text by text.

    x: [total_tokens, hidden]; weight: [vocabulary, hidden]; bias: [vocabulary] fp32; cu_seqlens: [batch + 1] int32.
    Returns [batch, vocabulary] fp32. The row of a text without tokens is zero. NaN in x makes the row of its text NaN,
    in the kernel infinite.
    """
    y = torch.zeros(cu_seqlens.shape[0] - 1, weight.shape[0], device=x.device)
    for row, (start, end) in zip(y, pairwise(cu_seqlens.tolist()), strict=True):
        if start < end:
            row += (x[start:end].float() @ weight.float().T + bias).amax(0).relu()
    return y


def vocabulary_max_cpu(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Reduce text by text and block by block; without AVX-512 the logits have x's dtype."""
    contiguous = x.stride(-1) == 1 and weight.stride(-1) == 1
    if avx512.supports(x.dtype) and weight.dtype == x.dtype and x.shape[1] % 2 == 0 and contiguous:
        return avx512.maxima(x, weight, cu_seqlens).add_(bias).relu_()
    y = torch.full((cu_seqlens.shape[0] - 1, weight.shape[0]), float("-inf"))
    for row, (start, end) in zip(y, pairwise(cu_seqlens.tolist()), strict=True):
        for entries, highest in zip(weight.split(CPU_BLOCK), row.split(CPU_BLOCK), strict=True):
            if start < end:
                highest.copy_(linear_cpu(x[start:end], entries, None).amax(0))
    return y.add_(bias).relu_()


@triton.jit
def _vocabulary_max_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    cu_seqlens_ptr,
    y_ptr,
    stride_xt,
    stride_wn,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    text = tl.program_id(1)
    n = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < OUT
    weight_ptrs, weight_mask = weight_ptr + n.to(tl.int64)[:, None] * stride_wn, n_mask[:, None]
    start, end = tl.load(cu_seqlens_ptr + text), tl.load(cu_seqlens_ptr + text + 1)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for first in range(start, end, BLOCK_M):
        # the last token once more changes no maximum
        token = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1).to(tl.int64)[:, None]
        x_ptrs, x_mask = x_ptr + token * stride_xt, token < end
        y, _ = matmul_tile(x_ptrs, weight_ptrs, 0, x_mask, weight_mask, IN, False, BLOCK_M, BLOCK_N, BLOCK_K)
        y = tl.where(y == y, y, float("inf"))  # tl.max ignores NaN
        highest = tl.maximum(highest, tl.max(y, axis=0))
    highest += tl.load(bias_ptr + n, mask=n_mask, other=0.0)
    tl.store(y_ptr + text.to(tl.int64) * OUT + n, tl.maximum(highest, 0.0), mask=n_mask)


def vocabulary_max_triton(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Launch one program per text and block of the vocabulary."""
    (total_tokens, hidden), vocabulary, batch = x.shape, weight.shape[0], cu_seqlens.shape[0] - 1
    check_rows("x", x, total_tokens, hidden)
    check_rows("weight", weight, vocabulary, hidden)
    check_rows("bias", bias, vocabulary)
    check_rows("cu_seqlens", cu_seqlens, batch + 1)
    y = torch.empty((batch, vocabulary), dtype=torch.float32, device=x.device)
    tile = linear_tile(x.dtype, "activation", generation(x.device))
    grid = GROUP, batch, triton.cdiv(vocabulary, GROUP * tile.block_n)
    shapes = {"stride_xt": x.stride(0), "stride_wn": weight.stride(0), "IN": hidden, "OUT": vocabulary}
    _vocabulary_max_kernel[grid](x, weight, bias, cu_seqlens, y, **shapes, **tile.launch)
    return y


vocabulary_max = operation(
    vocabulary_max_reference,
    fake=lambda x, weight, bias, cu_seqlens: bias.new_empty(cu_seqlens.shape[0] - 1, weight.shape[0]),
    cpu=vocabulary_max_cpu,
    cuda=vocabulary_max_triton,
)
