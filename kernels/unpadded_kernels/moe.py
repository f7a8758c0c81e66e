"""Mixture-of-experts MLP: each token goes through the top_k experts that the router prefers, weighted by its softmax.

    y[t] = bias + sum over the chosen experts e of p[t, e] * down_e @ activation(up_e @ x[t])
    p[t] = softmax(router @ x[t])

The chosen weights are not renormalized, and the bias is added once. The choices (top_k per token) are sorted by expert,
so that each expert is one matmul over the tokens that chose it; on CUDA the host never waits for their counts.

Bound by arithmetic: 4 * top_k * hidden * intermediate flops per token.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.activation import activate
from unpadded_kernels.linear import linear_invariant_reference, matmul_tile
from unpadded_kernels.linear_cpu import linear_cpu
from unpadded_kernels.tiles import generation, hidden_launch, linear_tile

_ROUTE_T = 64  # tokens per program of the router's matmul


def expert_mlp_reference(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor,
    top_k: int,
    kind: str,
    linear: Callable[..., Tensor] = linear_invariant_reference,
) -> Tensor:
    """x: [total_tokens, hidden]; router: [experts, hidden]; up: [experts, intermediate, hidden]; bias: [hidden].

    down: [experts, hidden, intermediate]; kind: gelu or gelu_tanh. Returns [total_tokens, hidden] in x's dtype.
    """
    weight, expert = linear(x.float(), router.float(), None).softmax(-1).topk(top_k)  # [total_tokens, top_k]
    order = expert.flatten().argsort(stable=True)  # the choices by expert
    counts = expert.flatten().bincount(minlength=len(router)).tolist()
    token, weight = order // top_k, weight.flatten()[order, None]
    y = bias.float().repeat(x.shape[0], 1)
    pairs = zip(token.split(counts), weight.split(counts), up, down, strict=True)
    for expert_token, expert_weight, expert_up, expert_down in pairs:
        hidden = linear(x[expert_token], expert_up, None, kind)
        # in the order of the experts, so that a token's sum has the same bits in any batch
        y.index_add_(0, expert_token, linear(hidden, expert_down, None) * expert_weight)
    return y.to(x.dtype)


@triton.jit(do_not_specialize=["total_tokens"])
def _route_kernel(
    x_ptr,
    router_ptr,
    weight_ptr,
    expert_ptr,
    total_tokens,
    stride_xt,
    stride_re,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    token_mask, e_mask = token < total_tokens, e < EXPERTS
    x_ptrs = x_ptr + token[:, None] * stride_xt
    router_ptrs = router_ptr + e[:, None] * stride_re
    logits, _ = matmul_tile(
        x_ptrs, router_ptrs, 0, token_mask[:, None], e_mask[:, None], HIDDEN, False, BLOCK_T, BLOCK_E, BLOCK_K
    )
    logits = tl.where(e_mask[None, :], logits, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(odds, axis=1)
    odds = tl.where(odds == odds, odds, 0.0)  # the maximum of NaNs could be any lane; total keeps them
    for choice in tl.static_range(TOP_K):
        best, expert = tl.max(odds, axis=1, return_indices=True)
        tl.store(weight_ptr + token * TOP_K + choice, best / total, mask=token_mask)
        tl.store(expert_ptr + token * TOP_K + choice, expert, mask=token_mask)
        odds = tl.where(e[None, :] == expert[:, None], -1.0, odds)


@triton.jit
def _expert_linear_kernel(
    x_ptr,
    weight_ptr,
    order_ptr,
    offsets_ptr,
    y_ptr,
    stride_xt,
    stride_we,
    stride_wn,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[choice] = activation(weight[expert] @ x[choice // CHOICES]); one program per tile of an expert's choices."""
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    slot = tl.program_id(0) // tiles_n
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # An expert's first slot: at least as many slots as tiles, without a sum over the counts.
    e = tl.arange(0, BLOCK_E)
    first_slots = tl.load(offsets_ptr + e, mask=e < EXPERTS, other=0) // BLOCK_M + e
    expert = tl.sum(((first_slots <= slot) & (e < EXPERTS)).to(tl.int32), axis=0) - 1
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    place = start + (slot - start // BLOCK_M - expert) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.min(place, axis=0) >= end:
        return

    mask = place < end
    choice = tl.load(order_ptr + place, mask=mask, other=0)
    x_ptrs = x_ptr + (choice // CHOICES)[:, None] * stride_xt
    weight_ptrs = weight_ptr + expert.to(tl.int64) * stride_we + n[:, None] * stride_wn
    y, _ = matmul_tile(x_ptrs, weight_ptrs, 0, mask[:, None], (n < OUT)[:, None], IN, False, BLOCK_M, BLOCK_N, BLOCK_K)
    if KIND is not None:
        y = activate(y, y, KIND)
    tl.store(y_ptr + choice[:, None] * OUT + n[None, :], y, mask=mask[:, None] & (n < OUT)[None, :])


@triton.jit
def _mix_kernel(
    down_ptr, weight_ptr, bias_ptr, y_ptr, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    y = tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        row = token * TOP_K + choice
        y += tl.load(weight_ptr + row) * tl.load(down_ptr + row * HIDDEN + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * HIDDEN + h, y, mask=mask)


def expert_mlp_triton(
    x: Tensor, router: Tensor, up: Tensor, down: Tensor, bias: Tensor, top_k: int, kind: str
) -> Tensor:
    """Route, run up and down with one launch each for all experts, and mix. The dimensions alone fix the additions."""
    (total_tokens, hidden), (experts, _, intermediate) = x.shape, down.shape
    if kind not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation {kind!r} of experts is not supported: use gelu or gelu_tanh")
    check_rows("x", x, total_tokens, hidden)
    check_rows("router", router, experts, hidden)
    check_rows("up", up, experts, intermediate, hidden)
    check_rows("down", down, experts, hidden, intermediate)
    check_rows("bias", bias, hidden)
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k must be in 1..{experts}, got {top_k}")
    y = torch.empty((total_tokens, hidden), dtype=x.dtype, device=x.device)
    weight = torch.empty((total_tokens, top_k), dtype=torch.float32, device=x.device)
    expert = torch.empty((total_tokens, top_k), dtype=torch.int16, device=x.device)  # 16 bits: two radix passes
    _route_kernel[(triton.cdiv(total_tokens, _ROUTE_T),)](
        x,
        router,
        weight,
        expert,
        total_tokens=total_tokens,
        stride_xt=x.stride(0),
        stride_re=router.stride(0),
        HIDDEN=hidden,
        EXPERTS=experts,
        TOP_K=top_k,
        BLOCK_T=_ROUTE_T,
        BLOCK_E=max(16, triton.next_power_of_2(experts)),
        BLOCK_K=64,
        num_warps=4,
        enable_fp_fusion=True,
    )
    sorted_expert, order = expert.flatten().sort(stable=True)
    every_expert = torch.arange(experts + 1, dtype=torch.int16, device=x.device)
    offsets = torch.searchsorted(sorted_expert, every_expert, out_int32=True)  # of each expert's choices
    hidden_rows = _expert_linear(x, up, order, offsets, top_k, kind)
    down_rows = _expert_linear(hidden_rows, down, order, offsets, 1, None)
    _mix_kernel[(total_tokens,)](down_rows, weight, bias, y, TOP_K=top_k, **hidden_launch(hidden))
    return y


def _expert_linear(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, choices_per_row: int, kind: str | None
) -> Tensor:
    """Return row i of x through the experts of choices i * choices_per_row + j: [total choices, out_features].

    order: the choices sorted by expert; offsets: [experts + 1] int32, where each expert's choices start in order.
    """
    experts, out_features, in_features = weight.shape
    y = torch.empty((order.shape[0], out_features), dtype=x.dtype, device=x.device)
    tile = linear_tile(x.dtype, "activation", generation(x.device))  # without descriptors, which cannot gather rows
    tile = replace(tile, num_stages=min(tile.num_stages, 3))  # of 32 KB: two programs fit a multiprocessor of sm_90
    slots = order.shape[0] // tile.block_m + experts
    _expert_linear_kernel[(slots * triton.cdiv(out_features, tile.block_n),)](
        x,
        weight,
        order,
        offsets,
        y,
        stride_xt=x.stride(0),
        stride_we=weight.stride(0),
        stride_wn=weight.stride(1),
        CHOICES=choices_per_row,
        EXPERTS=experts,
        IN=in_features,
        OUT=out_features,
        KIND=kind,
        BLOCK_E=triton.next_power_of_2(experts),
        **tile.launch,
    )
    return y


expert_mlp = operation(
    expert_mlp_reference,
    fake=lambda x, *_: torch.empty_like(x),
    cpu=partial(expert_mlp_reference, linear=linear_cpu),
    cuda=expert_mlp_triton,
    schema="(Tensor x, Tensor router, Tensor up, Tensor down, Tensor bias, int top_k, str kind) -> Tensor",
)
