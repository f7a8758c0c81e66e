"""Attention on a CPU: by the kernel for AVX-512, or by torch's, in runs of texts of equal length without padding.

The bits of a text depend on its own rows and length alone, so every block size follows from the length. A window
costs 4 * heads * head_dim * (block + 2 * window) flops per token, whatever the length.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels import avx512
from unpadded_kernels.linear_cpu import bits_follow_threads
from unpadded_kernels.tiles import attention_block_m

# With more threads the bits of torch's kernel depend on the number of texts, so that each text has a call of its own
# (measured: bench/NOTES.md).
MAX_THREADS = 7
# With fewer queries bf16 is computed in fp32, because they do so in bf16 from 4 threads per query on. Without AMX it
# always is: fp32 is as fast there.
_FP32_BELOW = 4 * MAX_THREADS if bits_follow_threads(torch.bfloat16) else 1 << 31


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
    """Compute `attention_reference`. The queries that tile_map leaves out are skipped in texts of several blocks."""
    total_tokens, _, heads, head_dim = qkv.shape
    if avx512.supports(qkv.dtype) and head_dim % 2 == 0:
        skipped = biases = None
        if tile_map is not None:
            skipped = avx512.skipped_blocks(cu_seqlens, tile_map, attention_block_m(qkv.dtype, head_dim, qkv.device))
        if window is not None or alibi_slopes is not None or position_bias is not None:
            biases = _biases(max_seqlen, window, alibi_slopes, position_bias)
        return avx512.attention(qkv, cu_seqlens, scale, window, biases, key_lengths, skipped)
    out = qkv.new_empty(total_tokens, heads, head_dim)
    start = done = 0
    lengths = cu_seqlens.diff()
    keys = lengths if key_lengths is None else key_lengths
    for (length, masked), run in itertools.groupby(zip(lengths.tolist(), (keys < lengths).tolist(), strict=True)):
        texts = len(list(run))
        done += texts
        if length == 0:
            continue
        rows = slice(start, start + texts * length)
        start = rows.stop
        group = qkv[rows].view(texts, length, 3, heads, head_dim)
        out_group = out[rows].view(texts, length, heads, head_dim)
        biased = alibi_slopes is not None or position_bias is not None or (window is not None and length > window + 1)
        if biased or masked:
            biases = _biases(length, window, alibi_slopes, position_bias)
            _attend_biased(group, out_group, scale, biases, window, keys[done - texts : done] if masked else None)
        else:
            q, k, v = group.permute(2, 0, 3, 1, 4)
            out_group.copy_(_attend_fused(q, k, v, None, scale).transpose(1, 2))
    return out.view(total_tokens, heads * head_dim)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend by torch's fused kernel. q, k, v: [texts, heads, length, head_dim]. Returns a tensor like q."""
    if q.dtype == torch.bfloat16 and q.shape[2] < _FP32_BELOW:
        q, k, v = q.float(), k.float(), v.float()
    if torch.get_num_threads() <= MAX_THREADS:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    masks = [mask] * len(q) if mask is None or len(mask) == 1 else mask.split(1)
    calls = zip(q.split(1), k.split(1), v.split(1), masks, strict=True)
    return torch.cat([F.scaled_dot_product_attention(*call, scale=scale) for call in calls])


def _biases(length: int, window: int | None, alibi_slopes: Tensor | None, position_bias: Tensor | None) -> Tensor:
    """Return the bias of each distance key - query from 1 - length on: [heads or 1, 2 * length - 1] fp32."""
    distance = torch.arange(1 - length, length)
    biases = torch.zeros(1, len(distance))
    if alibi_slopes is not None:
        biases = biases - alibi_slopes[:, None] * distance.abs()
    if position_bias is not None:
        reach = position_bias.shape[1] // 2
        biases = biases + position_bias[:, distance.clamp(-reach, reach) + reach]
    return biases if window is None else biases.masked_fill(distance.abs() > window, float("-inf"))


def _attend_biased(
    qkv: Tensor, out: Tensor, scale: float, biases: Tensor, window: int | None, key_lengths: Tensor | None
) -> None:
    """Attend with `_biases`; with a window, a block of queries at a time over the keys that it sees.

    qkv: [texts, length, 3, heads, head_dim]; key_lengths: [texts]; writes out: [texts, length, heads, head_dim].
    """
    length = qkv.shape[1]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    block = length if window is None else max(32, 2 * window)
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = (0, length) if window is None else (max(0, start - window), min(stop + window, length))
        # The bias depends on key - query alone, so that with the queries in reverse order the mask is a view of the
        # biases. It has four dimensions: with three torch takes bmm, whose bits follow the number of texts, and 1.5 to
        # 3.8 times the time (Xeon and EPYC, texts of 512 and 2048, 2026-11).
        mask = biases[:, length - stop + first : length - start + last - 1].unfold(1, last - first, 1)[None]
        if key_lengths is not None:  # [texts, 1, 1, keys]: texts of equal length differ in their number of keys
            mask = torch.where(torch.arange(first, last) < key_lengths[:, None, None, None], mask, float("-inf"))
        queries = q[:, :, start:stop].flip(2)
        attended = _attend_fused(queries, k[:, :, first:last], v[:, :, first:last], mask, scale)
        out[:, start:stop] = attended.flip(2).transpose(1, 2)
