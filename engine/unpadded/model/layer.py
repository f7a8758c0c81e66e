"""The parts of an encoder's layer as objects that are called: they hold its weights and hide its variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.checkpoint.spec import Activation
from unpadded.model.linear import AnyLinear
from unpadded_kernels import add_layer_norm, expert_mlp, pre_layer_norm, rms_norm, rotary_
from unpadded_kernels.avx512 import PackedLayer, PackedLinear

# of layers after the encoder
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu}
ACTIVATIONS["gelu_tanh"] = partial(F.gelu, approximate="tanh")


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """LayerNorm of x + residual. The next residual is its result (post-norm) or that sum (pre-norm)."""

    weight: Tensor  # [hidden]
    bias: Tensor
    eps: float
    prenorm: bool = False

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual: [total_tokens, hidden]. Returns both for what follows."""
        if self.prenorm:
            return pre_layer_norm(x, residual, self.weight, self.bias, self.eps)
        x = add_layer_norm(x, residual, self.weight, self.bias, self.eps)
        return x, x


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """RMSNorm of x + residual; the sum is the next residual (pre-norm)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, residual, self.weight, self.eps)


Norm: TypeAlias = LayerNorm | RMSNorm


@dataclass(frozen=True, kw_only=True)
class QKV:
    """Queries, keys and values, with q and k rotated where the encoder does so."""

    linear: AnyLinear  # [3 * hidden, hidden], rows ordered three, head, dim
    heads: int

    def __call__(self, x: Tensor, cos_sin: Tensor | None) -> Tensor:
        """x: [total_tokens, hidden]; cos_sin: the rotary table. Returns [total_tokens, 3, heads, head_dim]."""
        qkv = self.linear(x).view(x.shape[0], 3, self.heads, x.shape[1] // self.heads)
        if cos_sin is not None:
            rotary_(qkv, cos_sin)
        return qkv


@dataclass(frozen=True, kw_only=True)
class MLP:
    up: AnyLinear  # [up_rows, hidden], with the activation
    down: AnyLinear  # [hidden, intermediate]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@dataclass(frozen=True, kw_only=True)
class ExpertMLP:
    """Mixture of experts: each token goes through the top_k that the router prefers."""

    router: Tensor  # [experts, hidden]
    up: Tensor  # [experts, up_rows, hidden]
    down: Tensor  # [experts, hidden, intermediate]
    bias: Tensor  # [hidden]
    top_k: int
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        return expert_mlp(x, self.router, self.up, self.down, self.bias, self.top_k, self.activation)


@dataclass(frozen=True, kw_only=True)
class Layer:
    qkv: QKV
    out: AnyLinear  # [hidden, hidden]
    attention_norm: Norm
    mlp: MLP | ExpertMLP
    mlp_norm: Norm

    @cached_property
    def packed(self) -> PackedLayer | None:
        """The layer in one call if all its linears are packed."""
        linears = [one for one in self.linears.values() if isinstance(one, PackedLinear)]
        if len(linears) < 4 or linears[0].shape[1] // self.qkv.heads % 2:
            return None
        first = self.attention_norm
        norms = [(norm.weight, getattr(norm, "bias", None)) for norm in (first, self.mlp_norm)]
        return PackedLayer(linears, norms, self.qkv.heads, first.eps, getattr(first, "prenorm", True))

    @property
    def linears(self) -> dict[str, AnyLinear]:
        """The linear layers by the names of their weights, without experts."""
        mlp = {"up": self.mlp.up, "down": self.mlp.down} if isinstance(self.mlp, MLP) else {}
        return {"qkv": self.qkv.linear, "out": self.out, **mlp}

    def map_linears(self, prefix: str, change: Callable[[str, AnyLinear], AnyLinear]) -> Layer:
        """Return the layer with change(prefix + name, linear) in the place of each of `linears`."""
        changed = {name: change(prefix + name, linear) for name, linear in self.linears.items()}
        mlp = MLP(up=changed["up"], down=changed["down"]) if isinstance(self.mlp, MLP) else self.mlp
        return replace(self, qkv=replace(self.qkv, linear=changed["qkv"]), out=changed["out"], mlp=mlp)


class HeadLayer(NamedTuple):
    """A linear layer with an activation, or a LayerNorm, on rows after the encoder."""

    weight: Tensor  # [out_features, in_features], or [features] of a LayerNorm
    bias: Tensor | None
    activation: str = "identity"
    eps: float = 1e-5  # of a LayerNorm

    def __call__(self, rows: Tensor, linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """rows: [n, in_features]; linear: `linear` or `linear_invariant`. Returns [n, out_features]."""
        rows = rows.to(self.weight.dtype)
        if self.weight.ndim == 1:
            return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)
        rows = linear(rows, self.weight, self.bias)
        # in fp64, because torch may compute the last elements on a CPU by another function, as it does for sigmoid
        activation = ACTIVATIONS.get(self.activation)
        return activation(rows.double()).to(rows.dtype) if activation else rows

    def to(self, device: torch.device) -> HeadLayer:
        return self._replace(weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))
