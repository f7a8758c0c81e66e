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
    frequency_scale: float = 1.0  # multiplies every frequency; below 1 under static NTK


@dataclass(frozen=True, kw_only=True)
class LocalAttention:
    """Layers in which a token sees its neighbors only, under a rotary embedding of their own."""

    layers: tuple[int, ...]
    window: int  # the farthest neighbor, in tokens to either side
    rotary: Rotary


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Layers with a mixture-of-experts MLP: the `top_k` of a softmax over `num_experts`, not renormalized."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank changes of the weights, one set a task: W + scale * B A."""

    tasks: tuple[str, ...]  # in the order in which the weights stack them
    prompts: tuple[str, ...]  # of each task, where no other file states one
    rank: int  # 0: the checkpoint's files do not hold them
    scale: float
    folders: tuple[str, ...] = ()  # of each task, where the adapters lie in PEFT's files beside the encoder
    target_modules: tuple[str, ...] = ()  # the modules that each of those changes, by PEFT's names


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Embeddings + LayerNorm, then `layers` x (attention, LayerNorm, MLP, LayerNorm), a residual around each half.

    A pre-norm encoder is the same walk, except that the residual is the sum before its LayerNorm instead of after it:
    the norm that closes a layer is the one that opens the next, or the final one.
    """

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
    prenorm: bool = False
    norm_bias: bool = True
    rms_norm: bool = False  # in a pre-norm encoder: RMSNorm, and the embeddings go on as they are
    kv_heads: int | None = None  # fewer than heads where several share a key and a value; None: as many
    # learned positions count from the row after this one; a token of this id has this row
    padding_id: int | None = None
    alibi: bool = False
    qk_norm: bool = False  # LayerNorm over all heads of q, and of k
    inner_norm: bool = False  # attention's output is added to the residual and normalized before that is done again
    local_attention: LocalAttention | None = None
    experts: Experts | None = None
    lora: LoraSpec | None = None

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

    @property
    def position_limit(self) -> int:
        """Tokens that the learned positions serve; 0 where there are none."""
        return self.position_rows - (0 if self.padding_id is None else self.padding_id + 1)

    @property
    def rotary_embeddings(self) -> tuple[Rotary, ...]:
        """Rotary embedding of the layers with full attention, then of those with local attention, if any."""
        whole = () if self.rotary is None else (self.rotary,)
        return whole if self.local_attention is None else (*whole, self.local_attention.rotary)

    @property
    def layer_attention(self) -> tuple[tuple[int | None, int], ...]:
        """Per layer: window size (None = full attention) and index into `rotary_embeddings`."""
        local = self.local_attention
        if local is None:
            return ((None, 0),) * self.layers
        return tuple((local.window, 1) if index in local.layers else (None, 0) for index in range(self.layers))

    @property
    def alibi_slopes(self) -> tuple[float, ...]:
        """Of each head, as published (Press et al., arXiv 2108.12409); heads beyond a power of two fall in between."""
        power = 1 << (self.heads.bit_length() - 1)
        between = (2 ** (-4 * step / power) for step in range(1, 2 * (self.heads - power), 2))
        return (*(2 ** (-8 * step / power) for step in range(1, power + 1)), *between)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the encoder, and the names under which checkpoints store it."""

    shape: tuple[int, ...]
    alternatives: tuple[tuple[str, ...], ...]  # each: names whose tensors, equal in size, are stacked along dim 0
    up_before_gate: tuple[str, ...] = ()  # those of the names whose tensors store the up half before the gate half
    transposed: bool = False  # the encoder uses the transpose; `shape` is the stored shape
