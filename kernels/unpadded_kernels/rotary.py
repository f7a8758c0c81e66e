"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864) of q and k in packed qkv, half (NeoX) layout.

    q[j], q[j + d/2]  ->  q[j] * cos - q[j + d/2] * sin,  q[j + d/2] * cos + q[j] * sin,  angle = position * inv_freq[j]

Angles, cosines and sines are fp32: at position 8192 a bf16 angle is wrong by full rotations. The cosines and sines are
computed once per batch, by torch's own operations on CUDA too, and each text can have its own frequencies. Bound by
memory: 8 * hidden bytes per token in 16 bits (q and k are read and written) and 4 * head_dim for the cosines and sines.
"""

import torch
from torch import Tensor

from unpadded_kernels import avx512
from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.tiles import row_launch


def rotary_cos_sin_reference(positions: Tensor, inv_freq: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the cosines (first half of a row) and sines (second half) of every token: [total_tokens, head_dim] fp32.

    positions: [total_tokens] int32; inv_freq: fp32, [1, head_dim / 2] for all texts or [batch, head_dim / 2] with one
    row per text; cu_seqlens: [batch + 1] int32.
    """
    if inv_freq.shape[0] > 1:
        # the last text that starts at or before the token; tokens past the end of the last text have its frequencies
        token = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
        text = torch.searchsorted(cu_seqlens, token, right=True) - 1
        inv_freq = inv_freq[text.clamp(max=inv_freq.shape[0] - 1)]
    angles = positions[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_reference(qkv: Tensor, cos_sin: Tensor) -> None:
    """Rotate q and k in place. qkv: [total_tokens, 3, heads, head_dim]; cos_sin: [total_tokens, head_dim] fp32."""
    qk = qkv[:, :2]
    first, second = qk.float().chunk(2, dim=-1)
    cos, sin = cos_sin[:, None, None].chunk(2, dim=-1)
    qk.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def rotary_cpu(qkv: Tensor, cos_sin: Tensor) -> None:
    if avx512.supports(qkv.dtype) and qkv.is_contiguous() and cos_sin.is_contiguous():
        avx512.rotary(qkv, cos_sin)
    else:
        rotary_reference(qkv, cos_sin)


@triton.jit
def _rotary_kernel(
    qkv_ptr,
    cos_sin_ptr,
    stride_qt,
    stride_qs,
    stride_qh,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_R)  # the heads of q, then those of k
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HALF
    mask = (row < 2 * HEADS)[:, None] & d_mask[None, :]

    cos = tl.load(cos_sin_ptr + token * (2 * HALF) + d, mask=d_mask, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + token * (2 * HALF) + HALF + d, mask=d_mask, other=0.0)[None, :]
    row_offset = (row // HEADS) * stride_qs + (row % HEADS) * stride_qh
    first_ptrs = qkv_ptr + token * stride_qt + row_offset[:, None] + d[None, :]
    first = tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_ptrs, first * cos - second * sin, mask=mask)
    tl.store(first_ptrs + HALF, second * cos + first * sin, mask=mask)


def rotary_triton(qkv: Tensor, cos_sin: Tensor) -> None:
    """Launch one program per token. qkv may be strided by token and head; the row of a head must be contiguous."""
    total_tokens, _, heads, head_dim = qkv.shape
    if cos_sin.shape != (total_tokens, head_dim) or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin must be contiguous fp32 of ({total_tokens}, {head_dim}), got {cos_sin.dtype} of "
            f"{tuple(cos_sin.shape)}, strides {cos_sin.stride()}: make it with rotary_cos_sin"
        )
    check_rows("qkv", qkv, total_tokens, 3, heads, head_dim)
    block_r, block_d = triton.next_power_of_2(2 * heads), triton.next_power_of_2(head_dim // 2)
    _rotary_kernel[(total_tokens,)](
        qkv,
        cos_sin,
        stride_qt=qkv.stride(0),
        stride_qs=qkv.stride(1),
        stride_qh=qkv.stride(2),
        HEADS=heads,
        HALF=head_dim // 2,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        **row_launch(block_r * block_d),
    )


rotary_cos_sin = operation(
    rotary_cos_sin_reference,
    fake=lambda positions, inv_freq, cu_seqlens: inv_freq.new_empty(positions.shape[0], 2 * inv_freq.shape[1]),
)
rotary_ = operation(rotary_reference, cpu=rotary_cpu, cuda=rotary_triton, mutates_args=("qkv",))
