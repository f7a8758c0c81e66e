"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864) of q and k in packed qkv, half (NeoX) layout.

    q[j], q[j + d/2]  ->  q[j] * cos - q[j + d/2] * sin,  q[j + d/2] * cos + q[j] * sin,  angle = position * inv_freq[j]

Angles, cosines and sines are fp32: at position 8192 a bf16 angle is wrong by full rotations. The cosines and sines are
computed once per batch, and each text can have its own frequencies. Bound by memory: 8 * hidden bytes per token in 16
bits (q and k are read and written) and 4 * head_dim for the cosines and sines.
"""

import torch
from torch import Tensor

from unpadded_kernels._triton import device_guard, tl, triton
from unpadded_kernels.tiles import row_launch

# Tokens per program of rotary_cos_sin.
_BLOCK_T = 32
# Tokens per block of the reference, whose fp32 temporaries then stay in a core's cache (2048 x 12 x 64: 1.2 ms in
# blocks, 3.7 ms at once; EPYC, 2026-11).
_CPU_BLOCK_T = 512


def rotary_cos_sin_reference(positions: Tensor, inv_freq: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the cosines (first half of a row) and sines (second half) of every token: [total_tokens, head_dim] fp32.

    positions: [total_tokens] int32; inv_freq: fp32, [1, head_dim / 2] for all texts or [batch, head_dim / 2] with one
    row per text; cu_seqlens: [batch + 1] int32.
    """
    if inv_freq.shape[0] > 1:
        inv_freq = inv_freq.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=positions.shape[0])
    angles = positions.float()[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_reference(qkv: Tensor, cos_sin: Tensor) -> None:
    """Rotate q and k in place. qkv: [total_tokens, 3, heads, head_dim]; cos_sin: [total_tokens, head_dim] fp32."""
    for qkv_block, cos_sin_block in zip(qkv.split(_CPU_BLOCK_T), cos_sin.split(_CPU_BLOCK_T), strict=True):
        qk = qkv_block[:, :2]
        first, second = qk.float().chunk(2, dim=-1)
        cos, sin = cos_sin_block[:, None, None].chunk(2, dim=-1)
        qk.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


@triton.jit
def _cos_sin(angle):
    """Return cosine and sine of fp32 angles, within 2.5e-7 up to 65536 radians. tl.cos goes further, but spills.

    Reduction by pi / 2 in parts of 8 bits (Cody and Waite), whose products are exact, then the polynomials of Cephes.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quarters * 1.5703125 - quarters * 0.0004825592041015625
    r = r - quarters * 1.2665987014770508e-06 - quarters * 9.920935796805404e-10
    r2 = r * r
    sin = r + r * r2 * (-1.6666654611e-1 + r2 * (8.3321608736e-3 - r2 * 1.9515295891e-4))
    cos = 1.0 - 0.5 * r2 + r2 * r2 * (4.166664568298827e-2 + r2 * (-1.388731625493765e-3 + r2 * 2.443315711809948e-5))
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    cos_sign = tl.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    sin_sign = tl.where(quadrant >= 2, -1.0, 1.0)
    return tl.where(odd, sin, cos) * cos_sign, tl.where(odd, cos, sin) * sin_sign


@triton.jit(do_not_specialize=["total_tokens", "batch", "search_steps"])
def _rotary_cos_sin_kernel(
    positions_ptr,
    inv_freq_ptr,
    cu_seqlens_ptr,
    cos_sin_ptr,
    total_tokens,
    batch,
    stride_ib,
    search_steps,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_TEXT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    token_mask = token < total_tokens
    mask = token_mask[:, None] & (d < HALF)[None, :]

    text = tl.zeros([BLOCK_T], tl.int32)
    if PER_TEXT:
        # bisect for the last text that starts at or before the token
        beyond = tl.zeros([BLOCK_T], tl.int32) + batch
        for _ in range(search_steps):
            middle = (text + beyond) // 2
            starts = tl.load(cu_seqlens_ptr + middle)
            text = tl.where(starts <= token, middle, text)
            beyond = tl.where(starts <= token, beyond, middle)

    position = tl.load(positions_ptr + token, mask=token_mask, other=0).to(tl.float32)
    inv_freq = tl.load(inv_freq_ptr + text[:, None] * stride_ib + d[None, :], mask=mask, other=0.0)
    cos, sin = _cos_sin(position[:, None] * inv_freq)
    cos_sin_ptrs = cos_sin_ptr + token[:, None] * (2 * HALF) + d[None, :]
    tl.store(cos_sin_ptrs, cos, mask=mask)
    tl.store(cos_sin_ptrs + HALF, sin, mask=mask)


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


def rotary_cos_sin_triton(positions: Tensor, inv_freq: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Launch one program per block of tokens."""
    total_tokens, (rows, half), batch = positions.shape[0], inv_freq.shape, cu_seqlens.shape[0] - 1
    if rows not in (1, batch):
        raise ValueError(f"inv_freq must have one row, or one per text, got {rows} rows for {batch} texts")
    if inv_freq.dtype != torch.float32 or inv_freq.stride(1) != 1:
        raise ValueError(
            f"inv_freq must be fp32 with contiguous rows, got {inv_freq.dtype}, strides {inv_freq.stride()}"
        )
    cos_sin = torch.empty((total_tokens, 2 * half), dtype=torch.float32, device=positions.device)
    if total_tokens == 0:
        return cos_sin
    _rotary_cos_sin_kernel[(triton.cdiv(total_tokens, _BLOCK_T),)](
        positions,
        inv_freq,
        cu_seqlens,
        cos_sin,
        total_tokens=total_tokens,
        batch=batch,
        stride_ib=inv_freq.stride(0),
        search_steps=batch.bit_length(),
        HALF=half,
        BLOCK_T=_BLOCK_T,
        BLOCK_D=triton.next_power_of_2(half),
        PER_TEXT=rows > 1,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return cos_sin


def check_cos_sin(cos_sin: Tensor, total_tokens: int, head_dim: int) -> None:
    """Raise ValueError unless cos_sin is from rotary_cos_sin for these tokens and this head_dim."""
    if head_dim % 2:
        raise ValueError(f"rotary needs an even head_dim, got {head_dim}")
    if cos_sin.shape != (total_tokens, head_dim) or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin must be contiguous fp32 of ({total_tokens}, {head_dim}), got {cos_sin.dtype} of "
            f"{tuple(cos_sin.shape)}, strides {cos_sin.stride()}: make it with rotary_cos_sin"
        )


def rotary_triton(qkv: Tensor, cos_sin: Tensor) -> None:
    """Launch one program per token. qkv may be strided by token and head; the row of a head must be contiguous."""
    total_tokens, _, heads, head_dim = qkv.shape
    check_cos_sin(cos_sin, total_tokens, head_dim)
    if qkv.stride(3) != 1:
        raise ValueError(f"the rows of a head must be contiguous, got strides {qkv.stride()}: pass .contiguous()")
    if total_tokens == 0:
        return
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


rotary_cos_sin = torch.library.custom_op("unpadded::rotary_cos_sin", rotary_cos_sin_reference, mutates_args=())
rotary_ = torch.library.custom_op("unpadded::rotary_", rotary_reference, mutates_args=("qkv",))
rotary_cos_sin.register_kernel("cuda", device_guard(rotary_cos_sin_triton))
rotary_.register_kernel("cuda", device_guard(rotary_triton))


@rotary_cos_sin.register_fake
def _(positions: Tensor, inv_freq: Tensor, cu_seqlens: Tensor) -> Tensor:
    return inv_freq.new_empty(positions.shape[0], 2 * inv_freq.shape[1])


@rotary_.register_fake
def _(qkv: Tensor, cos_sin: Tensor) -> None:
    return None
