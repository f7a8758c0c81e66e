"""Attention on a CPU: by the kernel for AVX-512, otherwise by torch's, in fp32 and one text at a time.

The bits of a text depend on its own rows and length alone, so every block size follows from the length. A window
costs 4 * heads * head_dim * (block + 2 * window) flops per token, whatever the length.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels import avx512


def attention_cpu(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    tile_map: Tensor | None = None,
    position_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Compute `attention_reference` for all queries; tile_map is ignored."""
    total_tokens, _, heads, head_dim = qkv.shape
    biases = biases_by_distance(max_seqlen, window, alibi_slopes, position_bias)
    if avx512.supports(qkv.dtype) and head_dim % 2 == 0:
        return avx512.attention(qkv, cu_seqlens, scale, window, biases, key_lengths)
    out = qkv.new_empty(total_tokens, heads, head_dim)
    for text, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        keys = end - start if key_lengths is None else int(key_lengths[text])
        if start < end:
            q, k, v = qkv[start:end].permute(1, 2, 0, 3)
            _attend(q, k[:, :keys], v[:, :keys], out[start:end].transpose(0, 1), scale, window, biases)
    return out.view(total_tokens, heads * head_dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, window: int | None, biases: Tensor | None
) -> None:
    """Attend in one text; with a window, a block of queries at a time from the keys that it sees.

    q: [heads, length, head_dim]; k, v: [heads, keys, head_dim]; biases: see `biases_by_distance`; writes out, like q.
    """
    length, keys = q.shape[1], k.shape[1]
    block = length if window is None else max(32, 2 * window)
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = (0, keys) if window is None else (max(0, start - window), min(stop + window, keys))
        if first >= last:
            out[:, start:stop] = 0
            continue
        mask = None
        if biases is not None:  # by key - query alone, so that with the queries in reverse order it is a view of them
            middle = biases.shape[1] // 2
            mask = biases[:, middle + first - stop + 1 : middle + last - start].unfold(1, last - first, 1)[None]
        queries, *seen = (x.float()[None] for x in (q[:, start:stop].flip(1), k[:, first:last], v[:, first:last]))
        attended = F.scaled_dot_product_attention(queries, seen[0], seen[1], mask, scale=scale)[0]
        out[:, start:stop] = attended.flip(1)


def biases_by_distance(length: int, window: int | None, slopes: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return the bias of each distance key - query from 1 - length on, or None: [heads or 1, 2 * length - 1] fp32."""
    if window is None and slopes is None and bias is None:
        return None
    distance = torch.arange(1 - length, length)
    biases = torch.zeros(1, len(distance))
    if slopes is not None:
        biases = biases - slopes[:, None] * distance.abs()
    if bias is not None:
        reach = bias.shape[1] // 2
        biases = biases + bias[:, distance.clamp(-reach, reach) + reach]
    return biases if window is None else biases.masked_fill(distance.abs() > window, float("-inf"))
