"""An MLP of experts: every token goes through the `top` experts that the router prefers, weighted by its softmax.

    y[t] = bias + sum over the top experts e of p[t, e] * down_e @ activation(up_e @ x[t]),   p = softmax(router @ x[t])

The chosen weights are not renormalized, and the bias is added once. A token's `top` choices are sorted by expert, so
that each expert is one product over the tokens that chose it; on CUDA nothing of that waits for the host. Bound by
arithmetic: 4 * top * hidden * intermediate flops per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton
from unpadded_kernels.activation import GATED, KINDS, activate
from unpadded_kernels.linear import (
    linear_activation_cpu,
    linear_activation_reference,
    linear_cpu,
    linear_reference,
)
from unpadded_kernels.linear_kernels import products
from unpadded_kernels.tiles import expert_tile, generation, row_launch

# The router's product: tokens of one program, and its step along hidden.
_ROUTE_T, _ROUTE_K = 64, 64

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LinearActivation = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]


def _route(logits: Tensor, top: int) -> tuple[Tensor, Tensor, list[int]]:
    """Logits [total_tokens, experts] fp32 -> token and weight of each choice, sorted by expert, and the counts."""
    weight, expert = logits.softmax(-1).topk(top)
    order = expert.flatten().argsort(stable=True)
    counts = expert.flatten().bincount(minlength=logits.shape[1])
    return order // top, weight.flatten()[order, None], counts.tolist()


def _mix(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor,
    top: int,
    kind: str,
    linear: Linear,
    linear_activation: LinearActivation,
) -> Tensor:
    token, weight, counts = _route(linear(x.float(), router.float(), None), top)
    y = bias.float().repeat(x.shape[0], 1)
    pairs = zip(token.split(counts), weight.split(counts), up, down, strict=True)
    for expert_token, expert_weight, expert_up, expert_down in pairs:
        hidden = linear_activation(x[expert_token], expert_up, None, kind)
        # in the order of the experts: a token's sum has the same bits whoever stands beside it
        y.index_add_(0, expert_token, linear(hidden, expert_down, None) * expert_weight)
    return y.to(x.dtype)


def expert_mlp_reference(
    x: Tensor, router: Tensor, up: Tensor, down: Tensor, bias: Tensor, top: int, kind: str
) -> Tensor:
    """Route, and mix what the chosen experts make of every token.

    x: [total_tokens, hidden]; router: [experts, hidden]; up: [experts, intermediate, hidden], or twice the rows, gate
    then up, when kind is gated; down: [experts, hidden, intermediate]; bias: [hidden]. Returns [total_tokens, hidden]
    in x's dtype.
    """
    return _mix(x, router, up, down, bias, top, kind, linear_reference, linear_activation_reference)


def expert_mlp_cpu(x: Tensor, router: Tensor, up: Tensor, down: Tensor, bias: Tensor, top: int, kind: str) -> Tensor:
    return _mix(x, router, up, down, bias, top, kind, linear_cpu, linear_activation_cpu)


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
    TOP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    token_mask, e_mask = token < total_tokens, e < EXPERTS
    x_ptrs = x_ptr + token[:, None] * stride_xt
    router_ptrs = router_ptr + e[:, None] * stride_re
    logits, _ = products(
        x_ptrs, router_ptrs, 0, token_mask[:, None], e_mask[:, None], HIDDEN, False, BLOCK_T, BLOCK_E, BLOCK_K
    )
    logits = tl.where(e_mask[None, :], logits, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(odds, axis=1)
    odds = tl.where(odds == odds, odds, 0.0)  # of NaNs the greatest could lie in any lane; total keeps them
    for choice in tl.static_range(TOP):
        best, expert = tl.max(odds, axis=1, return_indices=True)
        tl.store(weight_ptr + token * TOP + choice, best / total, mask=token_mask)
        tl.store(expert_ptr + token * TOP + choice, expert, mask=token_mask)
        odds = tl.where(e[None, :] == expert[:, None], -1.0, odds)


@triton.jit
def _expert_product_kernel(
    x_ptr,
    weight_ptr,
    order_ptr,
    offsets_ptr,
    y_ptr,
    stride_xt,
    stride_we,
    stride_wn,
    stride_yc,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[choice] = activation(weight[its expert] @ x[choice // CHOICES]), a tile of one expert's choices a program."""
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    slot = tl.program_id(0) // tiles_n
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # An expert's first slot: never fewer slots than tiles, and known without adding up counts.
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
    y, up = products(
        x_ptrs, weight_ptrs, OUT * stride_wn, mask[:, None], (n < OUT)[:, None], IN, GATED, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if KIND is not None:
        y = activate(y, up, KIND)
    tl.store(y_ptr + choice[:, None] * stride_yc + n[None, :], y, mask=mask[:, None] & (n < OUT)[None, :])


@triton.jit
def _mix_kernel(
    down_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    HIDDEN: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    y = tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP):
        row = token * TOP + choice
        y += tl.load(weight_ptr + row) * tl.load(down_ptr + row * HIDDEN + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * HIDDEN + h, y, mask=mask)


def expert_mlp_triton(x: Tensor, router: Tensor, up: Tensor, down: Tensor, bias: Tensor, top: int, kind: str) -> Tensor:
    """Route; up, then down, each one launch over every expert; mix. The dimensions alone fix a token's additions."""
    (total_tokens, hidden), experts = x.shape, router.shape[0]
    intermediate = down.shape[2]
    if kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}: use swiglu, geglu, gelu or gelu_tanh")
    wanted = {
        "router": (router, (experts, hidden)),
        "up": (up, (experts, intermediate * (2 if kind in GATED else 1), hidden)),
        "down": (down, (experts, hidden, intermediate)),
        "bias": (bias, (hidden,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be {shape} with contiguous rows, got {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
    if not 0 < top <= experts:
        raise ValueError(f"top must lie in 1..{experts}, got {top}")
    if x.stride(1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {x.stride()}: pass .contiguous()")
    y = torch.empty((total_tokens, hidden), dtype=x.dtype, device=x.device)
    if total_tokens == 0:
        return y
    weight = torch.empty((total_tokens, top), dtype=torch.float32, device=x.device)
    expert = torch.empty((total_tokens, top), dtype=torch.int16, device=x.device)  # two digits of a radix sort
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
        TOP=top,
        BLOCK_T=_ROUTE_T,
        BLOCK_E=max(16, triton.next_power_of_2(experts)),
        BLOCK_K=_ROUTE_K,
        num_warps=4,
        enable_fp_fusion=True,
    )
    sorted_expert, order = expert.flatten().sort(stable=True)
    every_expert = torch.arange(experts + 1, dtype=torch.int16, device=x.device)
    offsets = torch.searchsorted(sorted_expert, every_expert, out_int32=True)  # where each one's choices start
    hidden_rows = _expert_products(x, up, order, offsets, top, kind)
    down_rows = _expert_products(hidden_rows, down, order, offsets, 1, None)
    block_h = triton.next_power_of_2(hidden)
    _mix_kernel[(total_tokens,)](
        down_rows, weight, bias, y, HIDDEN=hidden, TOP=top, BLOCK_H=block_h, **row_launch(block_h)
    )
    return y


def _expert_products(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, choices: int, kind: str | None
) -> Tensor:
    """Row i of x through the experts of the choices i * choices to (i + 1) * choices - 1: [all choices, out_features].

    order: the choices sorted by expert; offsets: [experts + 1] int32, where each expert's start among them.
    """
    experts, rows, in_features = weight.shape
    gated = kind in GATED
    out_features = rows // 2 if gated else rows
    y = torch.empty((order.shape[0], out_features), dtype=x.dtype, device=x.device)
    tile = expert_tile(x.dtype, gated, generation(x.device))
    slots = order.shape[0] // tile.block_m + experts
    _expert_product_kernel[(slots * triton.cdiv(out_features, tile.block_n),)](
        x,
        weight,
        order,
        offsets,
        y,
        stride_xt=x.stride(0),
        stride_we=weight.stride(0),
        stride_wn=weight.stride(1),
        stride_yc=y.stride(0),
        CHOICES=choices,
        EXPERTS=experts,
        IN=in_features,
        OUT=out_features,
        KIND=kind,
        GATED=gated,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.launch,
    )
    return y


expert_mlp = torch.library.custom_op("unpadded::expert_mlp", expert_mlp_reference, mutates_args=())
expert_mlp.register_kernel("cpu", expert_mlp_cpu)
expert_mlp.register_kernel("cuda", device_guard(expert_mlp_triton))


@expert_mlp.register_fake
def _(x: Tensor, router: Tensor, up: Tensor, down: Tensor, bias: Tensor, top: int, kind: str) -> Tensor:
    return torch.empty_like(x)
