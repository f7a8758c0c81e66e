"""What a checkpoint says about its encoder, in the same words for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "swiglu", "geglu"]
GATED: frozenset[str] = frozenset({"swiglu", "geglu"})


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding over the whole head, half (NeoX) layout.

    With a `scaling_factor` f, a text of L tokens, L > trained_length M, takes the dynamic-NTK base
    base * (f * L / M - (f - 1)) ** (d / (d - 2)), from its own L alone.
    """

    base: float
    trained_length: int
    scaling_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A post-norm encoder: embeddings + LayerNorm, then `layers` x (attention, LayerNorm, MLP, LayerNorm)."""

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int  # width between the two products of the MLP
    vocabulary: int  # rows of the word table, padding of the vocabulary included
    token_types: int
    position_rows: int  # rows of the learned position table; 0 with rotary
    rotary: Rotary | None
    activation: Activation
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    up_bias: bool
    down_bias: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def up_rows(self) -> int:
        """Rows of the first MLP product: gate and up together, or up alone."""
        return 2 * self.intermediate if self.gated else self.intermediate


@dataclass(frozen=True)
class Slot:
    """One tensor of the encoder, and the names under which checkpoints store it."""

    shape: tuple[int, ...]
    alternatives: tuple[tuple[str, ...], ...]  # each: names whose tensors, equal in size, are stacked along dim 0
