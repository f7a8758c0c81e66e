"""Attention on a CPU: by runs of texts of equal length, without padding.

The bits of a text depend on its own rows and length alone, so every block size follows from the length. A window
costs 4 * heads * head_dim * (block + 2 * window) flops per token, whatever the length.
"""

import itertools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.linear_cpu import bits_follow_threads, linear_cpu, onednn_supports
from unpadded_kernels.tiles import attention_block_m

_AMX = bits_follow_threads(torch.bfloat16)
# Texts longer than this go head by head through oneDNN, where that is faster (measured: bench/NOTES.md).
_LONG: dict[torch.dtype, int] = {} if _AMX else {torch.bfloat16: 768}
if "AVX512" in torch.backends.cpu.get_cpu_capability() and not _AMX:
    _LONG[torch.float32] = 320
# With fewer queries bf16 is computed in fp32. With AMX: bits of torch's fused kernel depend on the number of threads
# when there are fewer than 4 queries per thread. Without: oneDNN takes 0.8 ms to make a kernel for each shape.
_FP32_BELOW = 4 * (os.cpu_count() or 1) if _AMX else 64
# Queries per block of one head: 512 x 8192 fp32 scores are 16 MiB, which a last-level cache holds.
_BLOCK_Q = 512
_ONEDNN_SOFTMAX = 128  # scores per row
_MAX_SCORES = 2**19  # per batched matmul: 1 MiB in bf16, which a core's cache holds


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
    """Compute `attention_reference`. The queries that tile_map leaves out are skipped in texts that go head by head."""
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads, head_dim)
    block_m = attention_block_m(qkv.dtype, head_dim, qkv.device)
    queries_by_text: dict[int, list[slice]] = {}  # by the first token of a text
    for first, _, block in [] if tile_map is None else tile_map.tolist():
        queries_by_text.setdefault(first, []).append(slice(block * block_m, (block + 1) * block_m))
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
        elif length > _LONG.get(qkv.dtype, length):
            firsts = range(rows.start, rows.stop, length)
            for first, text, out_text in zip(firsts, group, out_group, strict=True):
                for queries in [slice(0, length)] if tile_map is None else queries_by_text.get(first, []):
                    _attend_head_by_head(text, out_text, scale, queries=queries)
        elif qkv.dtype == torch.bfloat16 and length >= _FP32_BELOW and not _AMX:
            _attend_batched(group, out_group, scale)
        else:
            q, k, v = group.permute(2, 0, 3, 1, 4)
            out_group.copy_(_attend_fused(q, k, v, None, scale).transpose(1, 2))
    return out.view(total_tokens, heads * head_dim)


def _attend_batched(qkv: Tensor, out: Tensor, scale: float) -> None:
    """Attend in batched matmuls over several texts and heads. qkv: [texts, length, 3, heads, head_dim]; writes out."""
    texts, length, _, heads, head_dim = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, texts * heads, length, head_dim)
    attended = torch.empty_like(q)
    blocks = (rows.split(max(1, _MAX_SCORES // length**2)) for rows in (q * scale, k.transpose(1, 2), v, attended))
    for q_block, k_block, v_block, block in zip(*blocks, strict=True):
        torch.bmm(_softmax(torch.bmm(q_block, k_block)), v_block, out=block)
    out.copy_(attended.view(texts, heads, length, head_dim).transpose(1, 2))


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend by torch's fused kernel. q, k, v: [texts, heads, length, head_dim]. Returns a tensor like q."""
    if q.dtype == torch.bfloat16 and q.shape[2] < _FP32_BELOW:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _attend_head_by_head(qkv: Tensor, out: Tensor, scale: float, *, queries: slice) -> None:
    """Attend from some queries of one text, a block of one head at a time, by oneDNN's linear.

    qkv: [length, 3, heads, head_dim]; writes out: [length, heads, head_dim].
    """
    # Contiguous copies: the bits of a matmul follow the layout of its operands, which must not depend on the batch.
    q, k, v = qkv.permute(1, 2, 0, 3)
    q, k, v_transposed = (q[:, queries] * scale).contiguous(), k.contiguous(), v.transpose(1, 2).contiguous()
    out = out[queries]
    for head in range(q.shape[0]):
        for q_block, out_block in zip(q[head].split(_BLOCK_Q), out[:, head].split(_BLOCK_Q), strict=True):
            weights = _softmax(linear_cpu(q_block, k[head], None))
            out_block.copy_(linear_cpu(weights, v_transposed[head], None))


def _softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension: of long rows in bf16 by oneDNN.

    oneDNN's is faster, but the kernels that it makes for each shape cost more than that in shorter rows.
    """
    if scores.dtype == torch.bfloat16 and scores.shape[-1] >= _ONEDNN_SOFTMAX and onednn_supports(scores.dtype):
        return torch.softmax(scores.to_mkldnn(), -1).to_dense()
    return scores.softmax(-1)


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
