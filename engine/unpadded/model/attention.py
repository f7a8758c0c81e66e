"""Attention backends by name: this project's op, or a library's variable-length kernel, all over packed qkv."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unpadded.errors import OptionError, install_command
from unpadded.model.batch import PackedBatch
from unpadded_kernels import attention

Attend = Callable[[Tensor, PackedBatch, float, int | None, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Attention:
    """A backend: (qkv, batch, scale, window, alibi_slopes, position_bias) -> [total_tokens, heads * head_dim].

    qkv: [total_tokens, 3, heads, head_dim]; window: the distance up to which tokens attend to each other, None for
    full attention; alibi_slopes and position_bias: as of `attention`; only this project's op takes a position_bias.
    """

    name: str
    attend: Attend


NAMES = ("auto", "unpadded", "torch", "flash-attn")


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """Return the backend of that name, or the one that "auto" chooses; OptionError if it cannot run."""
    if name not in NAMES:
        raise OptionError(f"attention is unknown: {name!r}; use one of {', '.join(NAMES)}")
    if name in ("auto", "unpadded"):
        return Attention("unpadded", _unpadded)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise OptionError(
            f"attention={name!r} runs on CUDA in float16 or bfloat16 only: the device is {device}, the dtype {dtype}; "
            "use attention='auto'"
        )
    return Attention(name, _torch if name == "torch" else _flash_attn())


def _unpadded(
    qkv: Tensor, batch: PackedBatch, scale: float, window: int | None, slopes: Tensor | None, bias: Tensor | None
) -> Tensor:
    out: Tensor = attention(
        *(qkv, batch.cu_seqlens, batch.max_seqlen, scale, window, slopes, batch.tile_map, bias, batch.key_lengths)
    )
    return out


def _torch(
    qkv: Tensor, batch: PackedBatch, scale: float, window: int | None, alibi_slopes: Tensor | None, _: Tensor | None
) -> Tensor:
    """Run PyTorch's build of FlashAttention-2; torch.nn.attention.varlen, which wraps it, adds a launch."""
    q, k, v = qkv.unbind(1)
    cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False),
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
            "attention='flash-attn' needs the package flash-attn, whose import fails: "
            f"{error}; {install_command('flash-attn')}, or use attention='auto'"
        ) from error

    def attend(
        qkv: Tensor, batch: PackedBatch, scale: float, window: int | None, alibi_slopes: Tensor | None, _: Tensor | None
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
