"""Linear layers as objects, y = x @ weight.T + bias and the activation that follows: `Linear`, or in C `PackedLinear`.

Loading builds every layer with `Linear`; the functions at the end of `weights` replace it by other kinds.
"""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from unpadded.checkpoint.spec import Activation
from unpadded_kernels import linear, linear_activation, linear_invariant
from unpadded_kernels.avx512 import PackedLinear


@dataclass(frozen=True, kw_only=True)
class Linear:
    """The library's matmul, or this project's: with the activation in the same pass, or invariant."""

    weight: Tensor  # [out_features, in_features]; gate rows, then up rows, before a gated activation
    bias: Tensor | None
    activation: Activation | None = None
    invariant: bool = False  # a row's bits do not depend on the number of rows, on CUDA too

    def __call__(self, x: Tensor) -> Tensor:
        """x: [total_tokens, in_features]. Returns [total_tokens, out_features], half of it if gated."""
        if self.invariant:
            return linear_invariant(x, self.weight, self.bias, self.activation)
        if self.activation is None:
            return linear(x, self.weight, self.bias)
        return linear_activation(x, self.weight, self.bias, self.activation)


AnyLinear: TypeAlias = Linear | PackedLinear
