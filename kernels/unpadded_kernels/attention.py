"""Variable-length bidirectional attention over packed qkv: every token attends to the tokens of its own text.

    out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[i, j]) v[j]
    bias[i, j] = -slope[head] * |i - j| with ALiBi (Press et al., arXiv 2108.12409), and -inf where |i - j| > window

Bound by arithmetic and by exp: 4 * length * heads * head_dim flops and length * heads exponentials per token.
"""

import itertools

import torch
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows
from unpadded_kernels.attention_cpu import attention_cpu
from unpadded_kernels.attention_kernels import launch_attention, make_tile_map
from unpadded_kernels.choices import chosen
from unpadded_kernels.hopper import is_supported
from unpadded_kernels.tiles import attention_tile, generation

# Queries per block of the reference, which bounds its memory.
_REFERENCE_BLOCK_Q = 512


def attention_reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
) -> Tensor:
    """Attend text by text, in fp32.

    qkv: [total_tokens, 3, heads, head_dim]; cu_seqlens: [batch + 1] int32; max_seqlen: tokens of the longest text;
    window: maximum distance from a query to a key in tokens, or None for full attention; alibi_slopes: [heads] fp32 or
    None; tile_map: from `make_tile_map`, or some of its rows: the results of the other queries are then undefined.
    Ignored here. Returns [total_tokens, heads * head_dim] in qkv's dtype.
    """
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads, head_dim)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = qkv[start:end].to(torch.promote_types(qkv.dtype, torch.float32)).permute(1, 2, 0, 3)
        position = torch.arange(end - start, device=qkv.device)
        for block in position.split(_REFERENCE_BLOCK_Q):
            scores = q[:, block] @ k.transpose(1, 2) * scale  # [heads, block, length]
            distance = (block[:, None] - position).abs()
            if alibi_slopes is not None:
                scores -= alibi_slopes[:, None, None] * distance
            if window is not None:
                scores.masked_fill_(distance > window, float("-inf"))
            out[start + block] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out.view(total_tokens, heads * head_dim)


def _takes_descriptors(qkv: Tensor, head_dim: int) -> bool:
    """Return whether one tensor descriptor can address every head of packed qkv."""
    packed = qkv.stride(1) == qkv.shape[2] * head_dim and qkv.stride(2) == head_dim
    aligned = qkv.data_ptr() % 16 == 0 and qkv.stride(0) * qkv.itemsize % 16 == 0
    return packed and aligned and head_dim >= 16 and head_dim.bit_count() == 1


def attention_triton(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
) -> Tensor:
    """Launch the kernel that `choices` has. Without tile_map it is built here, which waits for the GPU."""
    total_tokens, _, heads, head_dim = qkv.shape
    check_rows("qkv", qkv, total_tokens, 3, heads, head_dim)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}: use head_dim**-0.5")
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 tokens or more, got {window}: use None for full attention")
    tile = attention_tile(qkv.dtype, head_dim, generation(qkv.device))
    if total_tokens == 0:
        return qkv.new_empty(0, heads * head_dim)
    if tile.tma and not _takes_descriptors(qkv, head_dim):
        tile = attention_tile(qkv.dtype, head_dim, 80)
    if tile_map is None:
        tile_map = make_tile_map(cu_seqlens.diff().tolist(), tile.block_m).to(qkv.device)
    # a tile with a window has too few blocks of keys for the loop of the other kernel
    if tile.tma and window is None and chosen("attention", qkv) == "hopper" and is_supported(qkv.device):
        from unpadded_kernels.hopper import attention as hopper  # needs Gluon

        if head_dim in hopper.SLOTS:
            return hopper.attention_hopper(qkv, tile_map, scale, alibi_slopes)
    return launch_attention(qkv, scale, window, alibi_slopes, tile_map, tile)


attention = operation(
    attention_reference,
    fake=lambda qkv, *_: qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3]),
    cpu=attention_cpu,
    cuda=attention_triton,
)
