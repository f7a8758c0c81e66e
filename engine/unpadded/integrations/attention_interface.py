"""The packed attention kernel as an attention implementation of transformers: attn_implementation="unpadded"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from unpadded.errors import OptionError
from unpadded.integrations.padding import pad, to_device, to_host
from unpadded_kernels import attention
from unpadded_kernels.attention import make_tile_map
from unpadded_kernels.tiles import attention_block_m

NAME = "unpadded"
# Keywords by which a model asks for more than plain attention.
UNSUPPORTED = ("position_bias", "softcap", "s_aux", "sliding_window", "cu_seq_lens_q")
REMEDY = "use attn_implementation='sdpa'"


def register() -> None:
    """Make attn_implementation="unpadded" known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, padding_mask)


@dataclass(frozen=True)
class PaddingMask:
    """The tokens that an attention mask keeps. A model makes it once per forward pass; its layers share it."""

    indices: Tensor | None  # [total_tokens] int64, of the kept tokens in the flattened mask; None: all are kept
    cu_seqlens: Tensor  # [texts + 1] int32
    lengths: tuple[int, ...]  # tokens of each text; stays on the host
    tile_maps: dict[int, Tensor] = field(default_factory=dict)  # by queries per tile; filled by the first layer

    def tile_map(self, block_m: int) -> Tensor:
        """Return what the kernel runs over; see `make_tile_map`."""
        if block_m not in self.tile_maps:
            tile_map = make_tile_map(self.lengths, block_m).numpy()
            self.tile_maps[block_m] = to_device(tile_map, self.cu_seqlens.device)
        return self.tile_maps[block_m]


def padding_mask(
    batch_size: int, q_length: int, *, device: torch.device, attention_mask: Tensor | None = None, **_: Any
) -> PaddingMask:
    """Read a mask of [batch_size, q_length], zeros at padding; None keeps everything.

    transformers calls this once per forward pass with more keywords, and passes the result to every layer. It waits for
    the device once, to read the mask.
    """
    (kept,) = to_host(attention_mask)
    if kept is None or kept.all():
        indices, lengths = None, np.full(batch_size, q_length)
    else:
        indices, lengths = to_device(np.flatnonzero(kept), device), kept.sum(1, dtype=np.int64)
    cu_seqlens = to_device(np.concatenate(([0], lengths.cumsum())).astype(np.int32), device)
    return PaddingMask(indices, cu_seqlens, tuple(lengths.tolist()))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddingMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend in both directions; [batch, heads, length, head_dim] -> [batch, length, heads, head_dim].

    attention_mask: None to keep everything, as models without padding pass.
    OptionError for causal, cross and grouped-query attention, dropout, sliding windows and biases.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    _check(query, key, value, attention_mask, dropout, causal, keywords)
    batch, heads, length, head_dim = query.shape
    if attention_mask is None:
        attention_mask = padding_mask(batch, length, device=query.device)
    qkv = torch.stack((query, key, value)).permute(1, 3, 0, 2, 4).reshape(batch * length, 3, heads, head_dim)
    if attention_mask.indices is not None:
        qkv = qkv[attention_mask.indices]
    tile_map = None
    if qkv.is_cuda:
        tile_map = attention_mask.tile_map(attention_block_m(qkv.dtype, head_dim, qkv.device))
    scale = head_dim**-0.5 if scaling is None else scaling
    longest = max(attention_mask.lengths, default=0)
    out = attention(qkv.contiguous(), attention_mask.cu_seqlens, longest, scale, None, None, tile_map)
    return pad(out, attention_mask.indices, (batch, length)).view(query.transpose(1, 2).shape), None


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PaddingMask | Tensor | None,
    dropout: float,
    causal: bool,
    keywords: dict[str, Any],
) -> None:
    if query.shape != key.shape or query.shape != value.shape:
        raise OptionError(
            f"cross and grouped-query attention are not supported: query has shape {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}; {REMEDY}"
        )
    if isinstance(attention_mask, Tensor):
        raise OptionError(
            f"attention_mask has {attention_mask.ndim} dimensions when it reaches a layer; pass the model a padding "
            f"mask of [batch, length], or {REMEDY}"
        )
    if causal:
        raise OptionError(f"causal attention is not supported: is_causal = True; {REMEDY}")
    if dropout:
        raise OptionError(f"dropout = {dropout} is not supported; call eval(), or {REMEDY}")
    for name in UNSUPPORTED:
        if keywords.get(name) is not None:
            raise OptionError(f"{name} is not supported: {keywords[name]!r:.80}; {REMEDY}")
