"""Linear layers as objects, y = x @ weight.T + bias and the activation that follows: one class per way to compute it.

Loading builds every layer with `Linear`; the functions at the end of `weights` replace it by other kinds.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from unpadded.checkpoint.spec import Activation
from unpadded_kernels import avx512, linear, linear_activation, linear_invariant


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


class PackedLinear:
    """The matmul in C for AVX-512, whose weight is in its layout, in the weight's dtype or in 8-bit integers."""

    def __init__(self, plain: Linear, *, int8: bool = False, dtype: torch.dtype | None = None) -> None:
        """dtype: of the result, by default the weight's."""
        pack = avx512.pack_int8 if int8 else avx512.pack
        self.weight = pack(plain.weight, plain.activation)
        self.dtype = dtype or plain.weight.dtype
        self.bias, self.activation, self.int8 = plain.bias, plain.activation, int8

    def to_linear(self) -> Linear:
        weight = avx512.unpack(self.weight, self.activation)
        return Linear(weight=weight, bias=self.bias, activation=self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        return avx512.linear(x, self.weight, self.bias, self.activation, self.dtype)


AnyLinear: TypeAlias = Linear | PackedLinear
