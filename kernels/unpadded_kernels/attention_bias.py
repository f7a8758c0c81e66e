"""Attention with a window or ALiBi on a CPU: blocks of queries over the keys that they see, the bias as a mask.

A window costs 4 * heads * head_dim * (block + 2 * window) flops per token, whatever the length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the mask of one block, 16 MiB in fp32: within a last-level cache, at any length.
_MASK = 2**22


def attend_biased(qkv: Tensor, out: Tensor, scale: float, window: int | None, alibi_slopes: Tensor | None) -> None:
    """Texts of one length. qkv: [texts, length, 3, heads, head_dim]; writes out: [texts, length, heads, head_dim].

    A text's bits depend on its own rows and length alone: so do the blocks.
    """
    length = qkv.shape[1]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    position = torch.arange(length)
    mask_heads = 1 if alibi_slopes is None else len(alibi_slopes)
    block = max(32, _MASK // (mask_heads * length)) if window is None else max(32, 2 * window)
    for queries in position.split(block):
        start, stop = int(queries[0]), int(queries[-1]) + 1
        keys = slice(0, length) if window is None else slice(max(0, start - window), stop + window)
        distance = (queries[:, None] - position[keys]).abs()
        mask = torch.zeros(mask_heads, *distance.shape)
        if alibi_slopes is not None:
            mask -= alibi_slopes[:, None, None] * distance
        if window is not None:
            mask.masked_fill_(distance > window, float("-inf"))
        rows = slice(start, stop)
        mixed = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask, scale=scale)
        out[:, rows] = mixed.transpose(1, 2)
