"""The attention kernels alone, under transformers' AttentionInterface: attn_implementation="unpadded"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from unpadded.errors import OptionError
from unpadded.integrations.padding import pad
from unpadded.model.attention import attention_backend
from unpadded.model.batch import PackedBatch

NAME = "unpadded"
# Keywords with which a model asks for more than plain attention.
NOT_OFFERED = ("position_bias", "softcap", "s_aux", "sliding_window", "cu_seq_lens_q")


def register() -> None:
    """Make attn_implementation="unpadded" known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)  # the mask as it came, [batch, length]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention of padded [batch, heads, length, head_dim]; returns [batch, length, heads, head_dim].

    attention_mask: [batch, length], zeros at padding, or None. OptionError for what the kernels do not do: causal,
    cross and grouped-query attention, dropout, windows and biases.
    """
    batch, heads, length, head_dim = query.shape
    _check(query, key, value, attention_mask, dropout, keywords)
    if is_causal if is_causal is not None else getattr(module, "is_causal", False):
        raise OptionError("causal attention is not offered: is_causal = True; use attn_implementation='sdpa'")
    rows = torch.stack((query, key, value)).permute(1, 3, 0, 2, 4).reshape(batch * length, 3, heads, head_dim)
    kept = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    places = kept.flatten().nonzero().flatten()
    lengths = kept.sum(1)
    lengths = lengths[lengths > 0]
    if attention_mask is not None:
        rows = rows[places.to(rows.device)]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(rows.device, torch.int32)
    packed = PackedBatch(
        input_ids=cu_seqlens[:0],
        positions=cu_seqlens[:0],
        cu_seqlens=cu_seqlens,
        inv_freq=None,
        lengths=tuple(lengths.tolist()),
    )
    backend = attention_backend("auto", rows.device, rows.dtype)
    scale = head_dim**-0.5 if scaling is None else scaling
    out = backend.attend(rows.contiguous(), packed, scale, None, None)
    return pad(out, places, (batch, length)).view(batch, length, heads, head_dim), None


def _check(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float, keywords: dict[str, Any]
) -> None:
    if query.shape != key.shape or query.shape != value.shape:
        raise OptionError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} differ: cross and "
            "grouped-query attention are not offered; use attn_implementation='sdpa'"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise OptionError(
            f"attention_mask has {attention_mask.ndim} dimensions, and only padding, [batch, length], is offered; "
            "use attn_implementation='sdpa'"
        )
    if dropout:
        raise OptionError(f"dropout = {dropout} is not offered; call eval(), or use attn_implementation='sdpa'")
    for name in NOT_OFFERED:
        if keywords.get(name) is not None:
            raise OptionError(f"{name} is not offered: {keywords[name]!r:.80}; use attn_implementation='sdpa'")
