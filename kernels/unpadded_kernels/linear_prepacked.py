"""Products on a CPU of weights that are laid out once, not anew in every product: the same bits, sooner.

oneDNN multiplies blocks of a weight that lie in the order in which it reads them. Of a plain one it makes such a copy
in every product, which is much of the work where rows are few.
"""

import torch
from torch import Tensor

from unpadded_kernels.activation import GATED
from unpadded_kernels.linear import onednn_linear, onednn_runs


class PrepackedWeight:
    """A weight in oneDNN's own layout, for `linear_prepacked` alone.

    weight: [out_features, in_features] on a CPU, one that `prepacks`; kind: the activation that follows, or None.
    """

    def __init__(self, weight: Tensor, kind: str | None = None) -> None:
        self.shape, self.dtype, self.kind = weight.shape, weight.dtype, kind
        halves = weight.detach().chunk(2) if kind in GATED else (weight.detach(),)
        self.parts = tuple(torch.ops.mkldnn._reorder_linear_weight(half) for half in halves)

    def plain(self) -> Tensor:
        """[out_features, in_features] as it was."""
        return torch.cat([part.to_dense() for part in self.parts])


def prepacks(weight: Tensor) -> bool:
    """Whether this one can be laid out: on a CPU, in a dtype that oneDNN multiplies there."""
    return weight.device.type == "cpu" and onednn_runs(weight.dtype)


def linear_prepacked(x: Tensor, weight: PrepackedWeight, bias: Tensor | None) -> Tensor:
    """`linear`, or `linear_activation` of the kind that the weight is laid out for.

    x: [total_tokens, in_features]; bias: [out_features] or None, in the weight's dtype, as x. Returns [total_tokens,
    out_features], half as many columns where the kind is gated.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, sum(map(len, weight.parts)) // len(weight.parts))
    return onednn_linear(x, weight.parts, bias, weight.kind)
