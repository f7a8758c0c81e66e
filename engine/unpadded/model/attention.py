"""Attention by name: the project's own op, or a library's variable-length kernel, all over the same packed qkv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unpadded.errors import OptionError
from unpadded.model.batch import PackedBatch
from unpadded_kernels import attention

Attend = Callable[[Tensor, PackedBatch, float, int | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Attention:
    """A way to attend: (qkv, batch, scale, window, alibi_slopes) -> [total_tokens, heads * head_dim].

    qkv: [total_tokens, 3, heads, head_dim]; window: the farthest token that a token sees, None for all;
    alibi_slopes: [heads] fp32 or None.
    """

    name: str
    attend: Attend


NAMES = ("auto", "unpadded", "torch", "flash-attn")


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend of that name, or the one that "auto" chooses; OptionError where it cannot run."""
    if name not in NAMES:
        raise OptionError(f"attention is unknown: {name!r}; use one of {', '.join(NAMES)}")
    if name in ("auto", "unpadded"):
        return Attention("unpadded", _own)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise OptionError(
            f"attention={name!r} runs on CUDA in float16 or bfloat16 only: the device is {device}, the dtype {dtype}; "
            "use attention='auto'"
        )
    return Attention(name, _torch if name == "torch" else _flash_attn())


def _own(qkv: Tensor, batch: PackedBatch, scale: float, window: int | None, alibi_slopes: Tensor | None) -> Tensor:
    out: Tensor = attention(qkv, batch.cu_seqlens, batch.max_seqlen, scale, window, alibi_slopes, batch.tile_map)
    return out


def _torch(qkv: Tensor, batch: PackedBatch, scale: float, window: int | None, alibi_slopes: Tensor | None) -> Tensor:
    """PyTorch's own build of FlashAttention-2 (aten); torch.nn.attention.varlen wraps it and adds a launch."""
    q, k, v = qkv.unbind(1)
    longest = batch.max_seqlen
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(q, k, v, batch.cu_seqlens, batch.cu_seqlens, longest, longest, 0.0, False, False),
        scale=scale,
        window_size_left=window,
        window_size_right=window,
        alibi_slopes=alibi_slopes,
    )[0]
    return out.flatten(1)


def _flash_attn() -> Attend:
    try:
        from flash_attn import flash_attn_varlen_qkvpacked_func
    except ImportError as error:
        raise OptionError(
            "attention='flash-attn' needs the package flash-attn, which does not import: "
            f"{error}; install unpadded[flash-attn] or use attention='auto'"
        ) from error

    def attend(
        qkv: Tensor, batch: PackedBatch, scale: float, window: int | None, alibi_slopes: Tensor | None
    ) -> Tensor:
        out: Tensor = flash_attn_varlen_qkvpacked_func(
            qkv,
            batch.cu_seqlens,
            batch.max_seqlen,
            softmax_scale=scale,
            window_size=(-1, -1) if window is None else (window, window),
            alibi_slopes=alibi_slopes,
        )
        return out.flatten(1)

    return attend
