"""Linear layers as objects, y = x @ weight.T + bias and the activation that follows: one class per way to compute it.

Loading builds every layer with `Linear`; the functions at the end of `weights` replace it by other kinds.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from unpadded.checkpoint.spec import Activation
from unpadded_kernels import avx512, linear, linear_activation, linear_invariant
from unpadded_kernels.linear_cpu import linear_prepacked, onednn_supports, prepack, unpack


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


class PrepackedLinear:
    """A matmul on a CPU of a weight that is already in its layout."""

    def __init__(self, plain: Linear) -> None:
        self.weight = prepack(plain.weight, plain.activation)
        self.bias, self.activation = plain.bias, plain.activation

    def to_linear(self) -> Linear:
        weight = unpack(self.weight, self.activation)
        return Linear(weight=weight, bias=self.bias, activation=self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        return linear_prepacked(x, self.weight, self.bias, self.activation)


class Int8Linear:
    """A matmul in 8-bit integers on a CPU, with a scale and an offset per row of x, which is quantized here."""

    def __init__(self, plain: Linear, *, attended: bool) -> None:
        """attended: the result is the input of attention, which bf16 makes faster; otherwise it is in fp32."""
        self.weight = avx512.pack_int8(plain.weight, plain.activation)
        self.bias, self.activation = plain.bias, plain.activation
        self.dtype = torch.bfloat16 if attended and onednn_supports(torch.bfloat16) else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        return avx512.linear(x, self.weight, self.bias, self.activation, self.dtype)


AnyLinear: TypeAlias = Linear | PrepackedLinear | Int8Linear
