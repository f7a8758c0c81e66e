"""An MLP of experts: every token goes through the `top` experts that the router prefers, weighted by its softmax.

    y[t] = bias + sum over the top experts e of p[t, e] * down_e @ activation(up_e @ x[t]),   p = softmax(router @ x[t])

The chosen weights are not renormalised, and the bias is added once. Tokens are sorted by expert, so that each expert is
one product over the tokens that chose it. Bound by arithmetic: 4 * top * hidden * intermediate flops per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unpadded_kernels.linear import (
    linear_activation_cpu,
    linear_activation_reference,
    linear_cpu,
    linear_reference,
)

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


expert_mlp = torch.library.custom_op("unpadded::expert_mlp", expert_mlp_reference, mutates_args=())
expert_mlp.register_kernel("cpu", expert_mlp_cpu)


@expert_mlp.register_fake
def _(x: Tensor, router: Tensor, up: Tensor, down: Tensor, bias: Tensor, top: int, kind: str) -> Tensor:
    return torch.empty_like(x)
