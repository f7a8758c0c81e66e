"""Description of an encoder and of its stored tensors, in the same terms for every family."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "swiglu", "geglu"]
GATED: frozenset[str] = frozenset({"swiglu", "geglu"})
BIASES = ("qkv", "out", "up", "down", "norm")


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding over the whole head, half (NeoX) layout.

    With a `scaling_factor` f, a text of L tokens, L > trained_length M, uses the dynamic-NTK base
    base * (f * L / M - (f - 1)) ** (d / (d - 2)), computed from its own length only.
    """

    base: float
    trained_length: int
    scaling_factor: float | None = None
    frequency_scale: float = 1.0  # multiplies every frequency; below 1 under static NTK


@dataclass(frozen=True, kw_only=True)
class LocalAttention:
    """Layers in which a token attends to its neighbors only, with a rotary embedding of their own."""

    layers: tuple[int, ...]
    window: int  # maximum distance of a neighbor, in tokens to either side
    rotary: Rotary


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Layers with a mixture-of-experts MLP: the `top_k` of a softmax over `num_experts`, not renormalized."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """One LoRA adapter per task, W + scale * B @ A, stored with the encoder's tensors."""

    tasks: tuple[str, ...]  # in the order in which the weights stack them
    prompts: tuple[str, ...]  # per task; a prompt stated in another file takes precedence
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Embeddings + LayerNorm, then `layers` x (attention, LayerNorm, MLP, LayerNorm), a residual around each half.

    A pre-norm encoder has the same sequence of steps, except that the residual is the sum before its LayerNorm instead
    of after it: the norm at the end of a layer is the first norm of the next layer, or the final norm.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int  # input width of the MLP's second linear
    vocabulary: int  # rows of the word embedding table, including padding of the vocabulary
    activation: Activation
    norm_eps: float
    token_types: int = 0
    position_rows: int = 0  # rows of the learned position table; 0 with rotary
    rotary: Rotary | None = None
    biases: tuple[str, ...] = BIASES  # the linears and norms that have a bias
    prenorm: bool = False
    rms_norm: bool = False  # RMSNorm, and none after the embeddings; only with prenorm
    kv_heads: int | None = None  # key and value heads, if fewer than heads
    # learned positions start at the row after this one; tokens with this id use this row
    padding_id: int | None = None
    alibi: bool = False
    position_bias: bool = False  # attention has a bias per head and bucket of distances, shared by the layers
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
        """Rows of the MLP's first linear: gate and up together, or up alone."""
        return 2 * self.intermediate if self.gated else self.intermediate

    @property
    def position_limit(self) -> int:
        """Maximum number of tokens with learned positions; 0 without learned positions."""
        return self.position_rows - (0 if self.padding_id is None else self.padding_id + 1)

    @property
    def rotary_embeddings(self) -> tuple[Rotary, ...]:
        """Rotary embedding of the layers with full attention, then of those with local attention, if any."""
        full = () if self.rotary is None else (self.rotary,)
        return full if self.local_attention is None else (*full, self.local_attention.rotary)

    @property
    def layer_attention(self) -> tuple[tuple[int | None, int], ...]:
        """Per layer: window size (None = full attention) and index into `rotary_embeddings`."""
        local = self.local_attention
        if local is None:
            return ((None, 0),) * self.layers
        return tuple((local.window, 1) if index in local.layers else (None, 0) for index in range(self.layers))

    @property
    def alibi_slopes(self) -> tuple[float, ...]:
        """ALiBi slope per head (Press et al., arXiv 2108.12409), also for a number of heads that is no power of two."""
        power = 1 << (self.heads.bit_length() - 1)
        between = (2 ** (-4 * step / power) for step in range(1, 2 * (self.heads - power), 2))
        return (*(2 ** (-8 * step / power) for step in range(1, power + 1)), *between)

    @property
    def distance_buckets(self) -> tuple[int, ...]:
        """Bucket of each distance key - query from -91 to 91, whose buckets go on, as in T5 (Raffel, arXiv 1910.10683).

        That of -d is d if d < 8, else min(8 + floor(2 * log2(d / 8)), 15); that of d is 16 more.
        """
        before = [d if d < 8 else min(7 + (d * d // 64).bit_length(), 15) for d in range(92)]
        return (*before[:0:-1], 0, *(16 + bucket for bucket in before[1:]))


@dataclass(frozen=True)
class TensorSpec:
    """Shape of one tensor of the encoder, and the names under which checkpoints store it."""

    shape: tuple[int, ...]
    # Spellings of the same tensor; each is the names of tensors of equal size that are stacked along dim 0.
    alternatives: tuple[tuple[str, ...], ...]
    up_before_gate: tuple[str, ...] = ()  # endings of names whose tensor has the up half before the gate half
