"""CUDA graphs for small batches, whose kernels are shorter than their launches.

A graph is captured once a bucket of tokens and replayed on new contents: ids, positions, cu_seqlens and the tile map
are read from one buffer that is overwritten, so nothing of a batch is baked in. A batch is filled up to its bucket with
tokens of no text, and with texts of no tokens; the rows of the first are computed and never read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.batch import PackedBatch

BUCKETS = (64, 128, 256, 512, 1024, 2048)  # tokens
TEXTS = 64  # of a bucket


def bucket_of(batch: PackedBatch) -> int | None:
    """Tokens of the smallest bucket that holds a batch.

    None where none does, where a text has its own rotary, or where tokens have types.
    """
    scaled = batch.inv_freq is not None and batch.inv_freq.shape[1] > 1
    if scaled or batch.token_types is not None or len(batch.lengths) > TEXTS:
        return None
    return next((bucket for bucket in BUCKETS if len(batch.input_ids) <= bucket), None)


def fill(batch: PackedBatch, tokens: int, texts: int, tiles: int) -> PackedBatch:
    """The batch with `tokens` tokens, `texts` texts and `tiles` tiles; what is added belongs to no text."""
    total_tokens = len(batch.input_ids)
    tile_map = batch.tile_map
    if tile_map is not None:
        tile_map = F.pad(tile_map, (0, 0, 0, tiles - len(tile_map)))  # of texts of no tokens
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, tokens - total_tokens)),
        positions=F.pad(batch.positions, (0, tokens - total_tokens)),
        cu_seqlens=F.pad(batch.cu_seqlens, (0, texts + 1 - len(batch.cu_seqlens)), value=total_tokens),
        tile_map=tile_map,
    )


class Graph:
    """One captured pass over a bucket: `run` of a batch on the device, whose tensors are views of `words`."""

    def __init__(self, words: Tensor, run: Callable[[], Tensor]) -> None:
        self.words = words
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and lets libraries set up, neither of which can be captured
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._rows = run()

    def replay(self, staged: Tensor) -> Tensor:
        """Overwrite the words with pinned ones of the host, and run. The rows are overwritten by the next replay."""
        self.words.copy_(staged, non_blocking=True)
        self._graph.replay()
        return self._rows
